//! `create-replication-configuration`.

use anyhow::Context;
use replicator_common::api::client::{Access, Client};
use replicator_common::api::own::CreateBody;
use replicator_common::id::FileSystemId;

use crate::arguments::Create;
use crate::exit::{Usage, print};

pub fn run(access: &Access, arguments: &Create) -> anyhow::Result<()> {
    let id = arguments.source.to_str().is_some_and(|text| text.parse::<FileSystemId>().is_ok());
    let source = match id {
        true => arguments.source.clone(),
        false => std::path::absolute(&arguments.source)
            .with_context(|| format!("cannot use {}", arguments.source.display()))?,
    };
    if source.to_str().is_none() {
        return Err(Usage(format!(
            "{} is not UTF-8, which the API needs for the source's own path: give a symbolic link to it",
            source.display()
        ))
        .into());
    }
    let configuration = Client::open(access)?.create(&CreateBody {
        source,
        token: arguments.destination.trim().to_owned(),
        // Without the option, the daemon's configuration decides.
        devices: arguments.devices.then_some(true),
        watcher: arguments.watcher.map(Into::into),
    })?;
    print(&configuration)
}
