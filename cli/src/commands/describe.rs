//! `describe-replication-configurations`.

use replicator_common::api::client::{Access, Client};

use crate::arguments::Describe;
use crate::exit::print;

pub fn run(access: &Access, arguments: &Describe) -> anyhow::Result<()> {
    print(&Client::open(access)?.describe(arguments.file_system_id.as_deref())?)
}
