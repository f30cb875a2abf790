//! `delete-replication-configuration`: EFS's deletion, which answers nothing.

use replicator_common::api::client::Client;

use crate::arguments::Delete;

pub fn run(endpoint: &str, arguments: &Delete) -> anyhow::Result<()> {
    let mode = arguments.deletion_mode.into();
    Client::new(endpoint)?.delete(&arguments.source_file_system_id, mode)?;
    Ok(())
}
