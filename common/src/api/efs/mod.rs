//! EFS's shapes: the configuration and its list, field for field.
//!
//! EFS's form of creation has no room for a source's path and a destination's
//! token. Since EFS's clients check no patterns, an absolute path is taken
//! where the source's id stands, and the token where the destination's id does:
//! `aws efs create-replication-configuration --source-file-system-id /data
//! --destinations FileSystemId=TOKEN`. Answers always have real ids.

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde::{Deserialize, Serialize};

use super::ApiError;
use super::route::{Query, file_system_id};
use crate::id::FileSystemId;
use crate::status::{ReplicationStatus, Status};
use crate::time::Timestamp;

/// The owner that answers name: 12 digits, as EFS wants them.
pub const OWNER_ID: &str = "000000000000";
/// The most configurations of one answer, and the number without `MaxResults`.
const PAGE_MAX: usize = 100;

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
    /// Not EFS's: the replica was compared with the source by content, and was
    /// right or was put right, after this moment (see
    /// [`Verification`](crate::verification::Verification)); absent before the
    /// first such pass.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub last_verified_timestamp: Option<f64>,
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
        let arn = format!("arn:aws:elasticfilesystem:{region}:{OWNER_ID}:file-system/{source}");
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
                last_verified_timestamp: status
                    .source
                    .as_ref()
                    .and_then(|source| source.verification.last_verified_timestamp)
                    .map(seconds),
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
pub(super) fn describe(mut all: Vec<Status>, query: &Query) -> Result<Replications, ApiError> {
    let wanted = query.get("FileSystemId").map(file_system_id).transpose()?;
    let page = page_size(query.get("MaxResults"))?;
    let after = query.get("NextToken").map(Cursor::read).transpose()?;
    if let Some(id) = &wanted {
        all.retain(|status| concerns(status, id));
        if all.is_empty() {
            return Err(crate::control::ControlError::FileSystemNotFound(id.clone()).into());
        }
    }
    all.sort_by_key(Cursor::of);
    let mut rest =
        all.iter().filter(|status| after.as_ref().is_none_or(|c| Cursor::of(status) > *c));
    let chosen: Vec<&Status> = rest.by_ref().take(page).collect();
    let more = rest.next().is_some();
    Ok(Replications {
        replications: chosen.iter().map(|status| Configuration::new(status)).collect(),
        next_token: chosen.last().filter(|_| more).map(|status| Cursor::of(status).write()),
    })
}

/// Whether a file system is at either end of a configuration.
pub(super) fn concerns(status: &Status, id: &FileSystemId) -> bool {
    status.source_file_system_id == *id || status.destination_file_system_id == *id
}

fn page_size(text: Option<&str>) -> Result<usize, ApiError> {
    let Some(text) = text else { return Ok(PAGE_MAX) };
    match text.parse::<u64>() {
        Ok(number) if number >= 1 => Ok(number.min(PAGE_MAX as u64) as usize),
        _ => Err(ApiError::bad_request(format!("MaxResults must be 1 or more, not {text:?}"))),
    }
}

/// The last configuration of a page. Opaque to clients; stays valid when
/// configurations come and go between pages.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Cursor {
    created: i64,
    source: FileSystemId,
}

impl Cursor {
    fn of(status: &Status) -> Self {
        Self { created: status.creation_time.0, source: status.source_file_system_id.clone() }
    }

    fn write(&self) -> String {
        URL_SAFE_NO_PAD.encode(format!("{}/{}", self.created, self.source))
    }

    fn read(token: &str) -> Result<Self, ApiError> {
        let parse = || {
            let text = String::from_utf8(URL_SAFE_NO_PAD.decode(token).ok()?).ok()?;
            let (created, source) = text.split_once('/')?;
            Some(Self { created: created.parse().ok()?, source: source.parse().ok()? })
        };
        parse().ok_or_else(|| {
            ApiError::bad_request("NextToken is not one that an earlier answer contained")
        })
    }
}
