//! `pause` and `resume`.

use replicator_common::api::client::{Access, Client};
use replicator_common::api::own::ResumeBody;
use replicator_common::status::Status;
use serde_json::json;

use crate::arguments::{Resume, Target};
use crate::exit::{print, say};

pub fn pause(access: &Access, target: &Target) -> anyhow::Result<()> {
    let status = Client::open(access)?.pause(target.source_file_system_id.clone())?;
    say("paused: changes are journaled and will be shipped after `replicator resume`");
    answer(&status)
}

pub fn resume(access: &Access, arguments: &Resume) -> anyhow::Result<()> {
    let status = Client::open(access)?.resume(&ResumeBody {
        id: arguments.target.source_file_system_id.clone(),
        accept_deletions: arguments.accept_deletions,
    })?;
    say("resumed");
    answer(&status)
}

fn answer(status: &Status) -> anyhow::Result<()> {
    print(&json!({
        "SourceFileSystemId": status.source_file_system_id,
        "Status": status.status.as_str(),
    }))
}
