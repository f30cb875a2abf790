//! A file system's shapes, and its tags'.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::api::ApiError;
use crate::registry::ThroughputMode;

/// The tag that says where a file system is. Given when it is registered, and
/// not changed.
pub const PATH_TAG: &str = "replicator:path";
/// EFS's bounds, in characters and in tags of one file system.
const KEY_MAX: usize = 128;
const VALUE_MAX: usize = 256;
const TAGS_MAX: usize = 50;
/// See [`is_of_tags`].
const OF_TAGS: &str = "letters, digits, blanks and _.:/=+-@";

/// A file system.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct FileSystemBody {
    /// [`OWNER_ID`](super::OWNER_ID).
    pub owner_id: String,
    /// What its registration was named by.
    pub creation_token: String,
    /// Its id.
    pub file_system_id: String,
    /// Its ARN.
    pub file_system_arn: String,
    /// When it became known, seconds since the epoch.
    pub creation_time: f64,
    /// `available`; `updating` while its configuration is being deleted; `error`
    /// when its directory is not there.
    pub life_cycle_state: String,
    /// The tag `Name`.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub name: Option<String>,
    /// Always 0: it is mounted by other means.
    pub number_of_mount_targets: u32,
    /// What is in use.
    pub size_in_bytes: Size,
    /// Always `generalPurpose`.
    pub performance_mode: String,
    /// Always `false`: that is the file system's own affair.
    pub encrypted: bool,
    /// As it was asked for.
    pub throughput_mode: ThroughputMode,
    /// By key, the path's among them.
    pub tags: Vec<Tag>,
    /// Whether it may become a replica.
    pub file_system_protection: Protection,
}

/// How much is in use.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct Size {
    /// Bytes in use of the file system that it lies on; of a replica elsewhere,
    /// its source's.
    pub value: u64,
    /// When that was, seconds since the epoch; absent when it is not known.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub timestamp: Option<f64>,
}

/// A tag.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct Tag {
    /// Its key.
    pub key: String,
    /// Its value.
    pub value: String,
}

/// Whether a file system may become a replica: ENABLED (not), DISABLED, or
/// REPLICATING (it is one).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct Protection {
    /// EFS's word.
    pub replication_overwrite_protection: String,
}

impl Protection {
    pub(in crate::api) fn new(word: &str) -> Self {
        Self { replication_overwrite_protection: word.to_owned() }
    }
}

/// What DescribeFileSystems answers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct FileSystems {
    /// What the query said.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub marker: Option<String>,
    /// By creation.
    pub file_systems: Vec<FileSystemBody>,
    /// Where the next page starts; absent on the last one.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub next_marker: Option<String>,
}

/// What ListTagsForResource answers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct TagList {
    /// By key.
    pub tags: Vec<Tag>,
    /// Where the next page starts; absent on the last one.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub next_token: Option<String>,
}

/// The body of CreateFileSystem.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(in crate::api) struct CreateFileSystemBody {
    pub(in crate::api) creation_token: Option<String>,
    performance_mode: Option<String>,
    throughput_mode: Option<String>,
    encrypted: Option<bool>,
    kms_key_id: Option<String>,
    backup: Option<bool>,
    availability_zone_name: Option<String>,
    #[serde(default)]
    pub(in crate::api) tags: Vec<Tag>,
}

impl CreateFileSystemBody {
    /// The throughput mode, when nothing is asked for that nobody here does.
    pub(in crate::api) fn throughput_mode(&self) -> Result<ThroughputMode, ApiError> {
        let refused =
            |what: &str| Err(ApiError::bad_request(format!("{what} is not to be had here")));
        match self.performance_mode.as_deref() {
            None | Some("generalPurpose") => {}
            Some(other) => return refused(&format!("PerformanceMode {other:?}")),
        }
        if self.encrypted == Some(true) || self.kms_key_id.is_some() {
            return refused("encryption (it is the file system's own affair)");
        }
        if self.backup == Some(true) {
            return refused("backup");
        }
        if self.availability_zone_name.is_some() {
            let message = "there are no availability zones here";
            return Err(ApiError::new(400, "UnsupportedAvailabilityZone", message));
        }
        match self.throughput_mode.as_deref() {
            None | Some("bursting") => Ok(ThroughputMode::Bursting),
            Some("elastic") => Ok(ThroughputMode::Elastic),
            Some(other) => refused(&format!("ThroughputMode {other:?}")),
        }
    }
}

/// The body of UpdateFileSystemProtection.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(in crate::api) struct ProtectionBody {
    replication_overwrite_protection: Option<String>,
}

impl ProtectionBody {
    /// Whether the file system is to be protected.
    pub(in crate::api) fn protected(&self) -> Result<bool, ApiError> {
        match self.replication_overwrite_protection.as_deref() {
            Some("ENABLED") => Ok(true),
            Some("DISABLED") => Ok(false),
            other => Err(ApiError::bad_request(format!(
                "ReplicationOverwriteProtection can be set to ENABLED or DISABLED, not {other:?}"
            ))),
        }
    }
}

/// The body of TagResource.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(in crate::api) struct TagsBody {
    pub(in crate::api) tags: Vec<Tag>,
}

/// Checks tags that a client gives, and puts them among those that are there.
pub(in crate::api) fn tags(
    mut there: BTreeMap<String, String>,
    given: Vec<Tag>,
) -> Result<BTreeMap<String, String>, ApiError> {
    for Tag { key, value } in given {
        check_key(&key)?;
        if value.chars().count() > VALUE_MAX || !value.chars().all(is_of_tags) {
            return Err(ApiError::bad_request(format!(
                "the value of tag {key:?} has more than {VALUE_MAX} characters, or others than {OF_TAGS}"
            )));
        }
        there.insert(key, value);
    }
    if there.len() > TAGS_MAX {
        return Err(ApiError::bad_request(format!("there can be {TAGS_MAX} tags at most")));
    }
    Ok(there)
}

/// Checks a tag's key.
fn check_key(key: &str) -> Result<(), ApiError> {
    if key == PATH_TAG {
        return Err(ApiError::bad_request(format!(
            "{PATH_TAG} is where the file system is: it is given when it is made, and stays"
        )));
    }
    if !(1..=KEY_MAX).contains(&key.chars().count()) || !key.chars().all(is_of_tags) {
        return Err(ApiError::bad_request(format!(
            "a tag's key has 1 to {KEY_MAX} characters: {OF_TAGS}"
        )));
    }
    if key.to_ascii_lowercase().starts_with("aws:") {
        return Err(ApiError::bad_request("a tag's key cannot begin with aws:"));
    }
    Ok(())
}

/// Whether EFS has a character in tags. (A path is as it is.)
fn is_of_tags(character: char) -> bool {
    let blank = character.is_whitespace() && !character.is_control();
    character.is_alphanumeric() || blank || "_.:/=+-@".contains(character)
}

/// The tags as they are told, the path's among them.
pub(in crate::api) fn tags_of(tags: &BTreeMap<String, String>, path: Option<&str>) -> Vec<Tag> {
    let mut all: Vec<Tag> =
        tags.iter().map(|(key, value)| Tag { key: key.clone(), value: value.clone() }).collect();
    all.extend(path.map(|path| Tag { key: PATH_TAG.to_owned(), value: path.to_owned() }));
    all.sort_by(|a, b| a.key.cmp(&b.key));
    all
}
