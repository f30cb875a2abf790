//! The file systems that have an id here: the registry's, and both ends of
//! every configuration.

use std::path::{Path, PathBuf};

use super::{Api, ApiError, efs};
use crate::id::FileSystemId;
use crate::registry::FileSystem;
use crate::status::{ReplicationStatus, Status};
use crate::time::Timestamp;

/// Where in a configuration a file system is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum End {
    Source,
    Destination,
}

/// A file system that has an id here.
#[derive(Clone, Debug)]
pub(super) struct Known {
    pub(super) id: FileSystemId,
    /// Where it is, on its own host.
    pub(super) path: Option<String>,
    pub(super) created: Timestamp,
    pub(super) region: String,
    /// What the registry has of it; `None`: it is at the other side.
    pub(super) record: Option<FileSystem>,
    /// Where in a configuration it is, if it is in one.
    pub(super) end: Option<End>,
    /// That configuration is being deleted.
    deleting: bool,
    /// A directory here that holds the same: its own, or that of the other end.
    nearest: Option<PathBuf>,
}

impl Api {
    /// All of them.
    pub(super) fn known(&self) -> Vec<Known> {
        let statuses = self.control.list();
        let mut all: Vec<Known> =
            self.registry.list().into_iter().map(|r| self.registered(r)).collect();
        for status in &statuses {
            for end in [End::Source, End::Destination] {
                let known = self.at_end(status, end);
                match all.iter_mut().find(|other| other.id == known.id) {
                    Some(other) => (other.end, other.deleting) = (known.end, known.deleting),
                    None => all.push(known),
                }
            }
        }
        all
    }

    /// The one that a client names by its id or ARN.
    ///
    /// # Errors
    /// `BadRequest` when that is neither, `FileSystemNotFound`.
    pub(super) fn known_as(&self, text: &str) -> Result<Known, ApiError> {
        let id = super::route::file_system_id(text)?;
        find(self.known(), &id)
    }

    fn registered(&self, record: FileSystem) -> Known {
        Known {
            id: record.id.clone(),
            path: record.path.to_str().map(str::to_owned),
            created: record.creation_time,
            region: self.options.region.clone(),
            end: None,
            deleting: false,
            nearest: Some(record.path.clone()),
            record: Some(record),
        }
    }

    fn at_end(&self, status: &Status, end: End) -> Known {
        let source = status.source.as_ref().map(|report| report.path.clone());
        let destination = status.destination.as_ref().map(|report| report.path.clone());
        let (id, region, path, other) = match end {
            End::Source => (
                &status.source_file_system_id,
                &status.source_file_system_region,
                source,
                &status.destination_file_system_id,
            ),
            End::Destination => (
                &status.destination_file_system_id,
                &status.destination_file_system_region,
                destination,
                &status.source_file_system_id,
            ),
        };
        Known {
            id: id.clone(),
            path,
            created: status.creation_time,
            region: region.clone(),
            record: None,
            end: Some(end),
            deleting: status.status == ReplicationStatus::Deleting,
            nearest: self.registry.get(other).map(|record| record.path),
        }
    }
}

/// The one with this id.
pub(super) fn find(all: Vec<Known>, id: &FileSystemId) -> Result<Known, ApiError> {
    all.into_iter().find(|one| one.id == *id).ok_or_else(|| ApiError::unknown_file_system(id))
}

impl Known {
    /// EFS's word for how it is.
    pub(super) fn life_cycle_state(&self) -> &'static str {
        match &self.record {
            _ if self.deleting => "updating",
            Some(record) if !record.path.is_dir() => "error",
            _ => "available",
        }
    }

    /// Refuses what cannot be done to one that is not there.
    pub(super) fn check_available(&self) -> Result<(), ApiError> {
        match self.life_cycle_state() {
            "available" => Ok(()),
            state => Err(ApiError::new(
                409,
                "IncorrectFileSystemLifeCycleState",
                format!(
                    "file system {} is in state {state:?} ({})",
                    self.id,
                    self.path.as_deref().unwrap_or("its directory is not known")
                ),
            )),
        }
    }

    /// EFS's word for its protection.
    pub(super) fn protection(&self) -> &'static str {
        match (self.end, &self.record) {
            (Some(End::Destination), _) => "REPLICATING",
            (_, Some(record)) if !record.protected => "DISABLED",
            _ => "ENABLED",
        }
    }

    /// As EFS tells of it.
    pub(super) fn body(&self) -> efs::FileSystemBody {
        let id = self.id.as_str();
        let tags = self.tags();
        let name = tags.iter().find(|tag| tag.key == "Name").map(|tag| tag.value.clone());
        let record = self.record.as_ref();
        efs::FileSystemBody {
            owner_id: efs::OWNER_ID.to_owned(),
            creation_token: record.map_or(id, |record| &record.creation_token).to_owned(),
            file_system_id: id.to_owned(),
            file_system_arn: efs::arn(&self.region, id),
            creation_time: efs::seconds(self.created),
            life_cycle_state: self.life_cycle_state().to_owned(),
            name,
            number_of_mount_targets: 0,
            size_in_bytes: size(self.nearest.as_deref()),
            performance_mode: "generalPurpose".to_owned(),
            encrypted: false,
            throughput_mode: record.map(|record| record.throughput_mode).unwrap_or_default(),
            tags,
            file_system_protection: efs::Protection::new(self.protection()),
        }
    }

    /// Its tags, that of the path among them.
    pub(super) fn tags(&self) -> Vec<efs::Tag> {
        let none = Default::default();
        let tags = self.record.as_ref().map_or(&none, |record| &record.tags);
        efs::tags_of(tags, self.path.as_deref())
    }
}

fn size(path: Option<&Path>) -> efs::Size {
    let found = path.and_then(|path| rustix::fs::statvfs(path).ok());
    found.map_or(efs::Size { value: 0, timestamp: None }, |found| efs::Size {
        value: found.f_blocks.saturating_sub(found.f_bfree).saturating_mul(found.f_frsize),
        timestamp: Some(efs::seconds(Timestamp::now())),
    })
}
