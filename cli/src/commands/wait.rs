//! `wait`: the write barrier.

use std::time::Duration;

use replicator_common::api::client::{Access, Client};

use crate::arguments::Wait;
use crate::exit::print;

pub fn run(access: &Access, arguments: &Wait) -> anyhow::Result<()> {
    let id = arguments.target.source_file_system_id.clone();
    // The grammar has checked the bounds.
    print(&Client::open(access)?.wait(id, Duration::from_secs_f64(arguments.timeout))?)
}
