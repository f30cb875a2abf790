//! `delete-replication-configuration`: EFS's deletion, which answers nothing.

use replicator_common::api::client::{Access, Client};

use crate::arguments::Delete;

pub fn run(access: &Access, arguments: &Delete) -> anyhow::Result<()> {
    let mode = arguments.deletion_mode.into();
    Client::open(access)?.delete(&arguments.source_file_system_id, mode)?;
    Ok(())
}
