//! `describe-replication-configurations`.

use replicator_common::api::client::Client;

use crate::arguments::Describe;
use crate::exit::print;

pub fn run(endpoint: &str, arguments: &Describe) -> anyhow::Result<()> {
    print(&Client::new(endpoint)?.describe(arguments.file_system_id.as_deref())?)
}
