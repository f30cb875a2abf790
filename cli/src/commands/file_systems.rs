//! File systems and their ids.

use anyhow::Context;
use replicator_common::api::client::{Access, Client};
use replicator_common::api::efs::Protection;
use replicator_common::api::own::RegisterBody;

use crate::arguments::{CreateFileSystem, FileSystem, UpdateProtection};
use crate::exit::print;

pub fn create(access: &Access, arguments: &CreateFileSystem) -> anyhow::Result<()> {
    let path = std::path::absolute(&arguments.path)
        .with_context(|| format!("cannot use {}", arguments.path.display()))?;
    let tags = arguments.name.iter().map(|name| ("Name".to_owned(), name.clone())).collect();
    let body = RegisterBody { path, creation_token: None, tags };
    print(&Client::open(access)?.register(&body)?)
}

pub fn describe(access: &Access) -> anyhow::Result<()> {
    print(&Client::open(access)?.file_systems()?)
}

pub fn delete(access: &Access, arguments: &FileSystem) -> anyhow::Result<()> {
    Ok(Client::open(access)?.forget(&arguments.file_system_id)?)
}

pub fn protect(access: &Access, arguments: &UpdateProtection) -> anyhow::Result<()> {
    let word = arguments.replication_overwrite_protection.clone();
    let wanted = Protection { replication_overwrite_protection: word };
    print(&Client::open(access)?.protect(&arguments.file_system.file_system_id, &wanted)?)
}
