//! EFS's shapes, field for field, and what stands where EFS's ids do.
//!
//! **File systems** have ids: a directory or mount that somebody registered
//! (CreateFileSystem, with its path as the tag [`PATH_TAG`]), or that is or was
//! in a configuration of this daemon (see [`Registry`](crate::registry::Registry)).
//! One is known by its path and keeps its id. Forgetting it (DeleteFileSystem)
//! leaves what is in it alone. `SizeInBytes` is what is in use of the file system
//! that the path lies on. What EFS does and we do not (encryption, backups,
//! provisioned throughput) is refused, not ignored.
//!
//! **CreateReplicationConfiguration** names two ends:
//! - `SourceFileSystemId`: the id of a file system that is registered at the
//!   daemon that is asked; or, since EFS's clients check no patterns, an absolute
//!   path (`--source-file-system-id /srv/data`), which gets an id.
//! - `Destinations[0].FileSystemId`: an enrolment token; or the id of a file
//!   system that is registered at this same daemon, where it runs both sides
//!   (`replicator run`). Its protection must be DISABLED first; what it holds and
//!   the source lacks goes to lost+found.
//!
//! Between two hosts it is always a token: an id says neither where the other
//! daemon is nor that it agrees. There, the replica is registered at its own
//! daemon, whose token for it (`POST /replicator/v1/tokens`; its id may stand
//! for its path) carries the consent; the configuration then has its id. Of a
//! replica that is registered by hand there is no token while it is protected.
//!
//! **Protection** reads REPLICATING at a destination, and ENABLED once the
//! configuration is deleted; only then can it be DISABLED.

mod file_system;
mod page;

pub(super) use file_system::{CreateFileSystemBody, ProtectionBody, TagsBody, tags, tags_of};
pub use file_system::{FileSystemBody, FileSystems, PATH_TAG, Protection, Size, Tag, TagList};
pub(super) use page::{Created, Key, Paging, page};

use serde::{Deserialize, Serialize};

use super::ApiError;
use super::route::Query;
use crate::id::FileSystemId;
use crate::status::{ReplicationStatus, Status};
use crate::time::Timestamp;

/// The owner that answers name: 12 digits, as EFS wants them.
pub const OWNER_ID: &str = "000000000000";

/// A replication configuration.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct Configuration {
    /// The source's file system.
    pub source_file_system_id: String,
    /// Its region.
    pub source_file_system_region: String,
    /// Its ARN.
    pub source_file_system_arn: String,
    /// The same: a replica that became a source starts a configuration anew.
    pub original_source_file_system_arn: String,
    /// When it was made, seconds since the epoch.
    pub creation_time: f64,
    /// Exactly one.
    pub destinations: Vec<Destination>,
    /// [`OWNER_ID`].
    pub source_file_system_owner_id: String,
}

/// The destination of a configuration.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct Destination {
    /// Status of the replication.
    pub status: ReplicationStatus,
    /// The replica's file system.
    pub file_system_id: String,
    /// Its region.
    pub region: String,
    /// Every change on the source before this moment (seconds since the
    /// epoch, rounded down to microseconds) is on the replica; absent until
    /// the initial sync is done.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub last_replicated_timestamp: Option<f64>,
    /// [`OWNER_ID`].
    pub owner_id: String,
    /// In words, when there is something to say.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub status_message: Option<String>,
}

/// What DescribeReplicationConfigurations answers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct Replications {
    /// By creation.
    pub replications: Vec<Configuration>,
    /// Where the next page starts; absent on the last one.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub next_token: Option<String>,
}

impl Configuration {
    /// A configuration as EFS spells it.
    pub fn new(status: &Status) -> Self {
        let source = status.source_file_system_id.as_str();
        let region = &status.source_file_system_region;
        let arn = arn(region, source);
        Self {
            source_file_system_id: source.to_owned(),
            source_file_system_region: region.clone(),
            source_file_system_arn: arn.clone(),
            original_source_file_system_arn: arn,
            creation_time: seconds(status.creation_time),
            destinations: vec![Destination {
                status: match status.status {
                    // EFS has no word for it, and its clients know only EFS's.
                    ReplicationStatus::Halted => ReplicationStatus::Error,
                    status => status,
                },
                file_system_id: status.destination_file_system_id.to_string(),
                region: status.destination_file_system_region.clone(),
                last_replicated_timestamp: last_replicated(status).map(seconds),
                owner_id: OWNER_ID.to_owned(),
                status_message: status.status_message.clone(),
            }],
            source_file_system_owner_id: OWNER_ID.to_owned(),
        }
    }
}

/// The watermark as far as either side's report proves it: both only ever
/// claim what is durable on the replica, and either may be the older one.
pub fn last_replicated(status: &Status) -> Option<Timestamp> {
    let at_destination = status.destination.as_ref().and_then(|report| report.last_replicated);
    let at_source = status.source.as_ref().map(|report| report.watermark);
    at_destination.max(at_source.filter(|watermark| *watermark != Timestamp::NEVER))
}

/// Epoch seconds, rounded down to microseconds: a double does not hold
/// nanoseconds, and a watermark must not be rounded up.
pub fn seconds(time: Timestamp) -> f64 {
    time.0.div_euclid(1000) as f64 / 1e6
}

/// The body of CreateReplicationConfiguration. Other members of EFS's
/// (Region, AvailabilityZoneName, KmsKeyId, RoleArn) have no meaning here.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(super) struct CreateBody {
    #[serde(default)]
    pub(super) destinations: Vec<DestinationToCreate>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(super) struct DestinationToCreate {
    pub(super) file_system_id: Option<String>,
}

impl CreateBody {
    /// The one destination.
    pub(super) fn destination(&self) -> Result<&DestinationToCreate, ApiError> {
        match &self.destinations[..] {
            [destination] => Ok(destination),
            other => Err(ApiError::validation(format!(
                "Destinations must have exactly one member, not {}",
                other.len()
            ))),
        }
    }
}

/// One page of configurations, as the query asks for it.
pub(super) fn describe(all: Vec<Status>, query: &Query) -> Result<Replications, ApiError> {
    let paging = Paging::read(query, "MaxResults", "NextToken")?;
    let created =
        |status: &Status| Created::new(status.creation_time, &status.source_file_system_id);
    let (chosen, next_token) = page(all, created, &paging);
    let replications = chosen.iter().map(Configuration::new).collect();
    Ok(Replications { replications, next_token })
}

/// The name of a file system among all of Amazon's.
pub(super) fn arn(region: &str, id: &str) -> String {
    format!("arn:aws:elasticfilesystem:{region}:{OWNER_ID}:file-system/{id}")
}

/// Whether a file system is at either end of a configuration.
pub(super) fn concerns(status: &Status, id: &FileSystemId) -> bool {
    status.source_file_system_id == *id || status.destination_file_system_id == *id
}
