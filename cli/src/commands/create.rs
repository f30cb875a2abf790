//! `create-replication-configuration`.

use anyhow::Context;
use replicator_common::api::client::Client;
use replicator_common::api::own::CreateBody;

use crate::arguments::Create;
use crate::exit::{Usage, print};

pub fn run(endpoint: &str, arguments: &Create) -> anyhow::Result<()> {
    let source = std::path::absolute(&arguments.source)
        .with_context(|| format!("cannot use {}", arguments.source.display()))?;
    if source.to_str().is_none() {
        return Err(Usage(format!(
            "{} is not UTF-8, which the API needs for the source's own path: give a symbolic link to it",
            source.display()
        ))
        .into());
    }
    let configuration = Client::new(endpoint)?.create(&CreateBody {
        source,
        token: arguments.destination.trim().to_owned(),
        // Without the option, the daemon's configuration decides.
        devices: arguments.devices.then_some(true),
        watcher: arguments.watcher.map(Into::into),
    })?;
    print(&configuration)
}
