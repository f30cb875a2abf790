//! Bodies of our own operations: what the command line and the server both
//! speak. Members of requests are lower-case; answers have EFS's spelling,
//! like the status that they stand beside.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::efs::FileSystemBody;
use crate::control::{DeletionMode, WatcherChoice};

/// Bytes a second that a pass of verification may be bound to. A slower one would never
/// end, and none begins while one is under way.
pub const VERIFY_RATE: std::ops::RangeInclusive<u64> = (4 << 10)..=(1 << 40);
/// The longest wait that can be asked for, and the one without
/// `timeout_seconds`: a day.
pub const WAIT_MAX_SECONDS: u64 = 86_400;

/// Enables replication.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CreateBody {
    /// The directory or mount to replicate, absolute; or its id.
    pub source: PathBuf,
    /// The destination's enrolment token; or the id of a file system of this
    /// daemon, where it runs both sides.
    pub token: String,
    /// Replicate device nodes too; absent: as the daemon's configuration says.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub devices: Option<bool>,
    /// Which watcher; absent: as the daemon's configuration says.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub watcher: Option<WatcherChoice>,
}

/// Names a configuration.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Target {
    /// The file system at either end, or its ARN; may be absent where there is
    /// only one configuration.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub id: Option<String>,
}

/// Ships again.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ResumeBody {
    /// As in [`Target`].
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub id: Option<String>,
    /// Lets the deletions through for which replication has halted.
    #[serde(default)]
    pub accept_deletions: bool,
}

/// Waits until what was done on the source so far is on the replica.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WaitBody {
    /// As in [`Target`].
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub id: Option<String>,
    /// How long at most, seconds, 0 to [`WAIT_MAX_SECONDS`] (the default).
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub timeout_seconds: Option<f64>,
}

/// What a wait brought.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct WaitAnswer {
    /// The source's file system.
    pub source_file_system_id: String,
    /// The watermark reached, seconds since the epoch.
    pub last_replicated_timestamp: f64,
}

/// Fails over: deletes a configuration and makes the replica writable.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FailoverBody {
    /// As in [`Target`].
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub id: Option<String>,
    /// Which sides it reaches; both by default.
    #[serde(default)]
    pub mode: DeletionMode,
}

/// Asks a destination for an enrolment token.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TokenBody {
    /// The directory that becomes the replica, absolute, made when missing; or
    /// the id of a registered one.
    pub replica: PathBuf,
    /// How long the token can be used, seconds, 60 to 604800; absent: as the
    /// daemon's configuration says.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub valid_seconds: Option<u64>,
    /// Take a directory that is not empty.
    #[serde(default)]
    pub reconcile: bool,
}

/// Bounds of [`TokenBody::valid_seconds`].
pub const TOKEN_VALID_SECONDS: std::ops::RangeInclusive<u64> = 60..=604_800;

/// A new token.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct TokenAnswer {
    /// One line, to be handed to the source. A secret until it is used.
    pub token: String,
    /// For which replica.
    pub replica: PathBuf,
}

/// Begins a pass of verification.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VerifyBody {
    /// As in [`Target`].
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub id: Option<String>,
    /// Puts right what differs; `true` when absent.
    #[serde(default = "yes")]
    pub repair: bool,
    /// Bytes a second at most, within [`VERIFY_RATE`]; absent: as fast as can be.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub bytes_per_second: Option<u64>,
}

fn yes() -> bool {
    true
}

/// Which pass began.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct VerifyAnswer {
    /// The source's file system.
    pub source_file_system_id: String,
    /// The pass, for [`FindingsBody`].
    pub pass: u64,
}

/// Asks what a pass has found.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FindingsBody {
    /// As in [`Target`].
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub id: Option<String>,
    /// The pass.
    pub pass: u64,
    /// The asker has so many of its differences; see
    /// [`Findings::next`](crate::verification::Findings::next).
    #[serde(default)]
    pub after: u64,
}

/// Registers a file system.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RegisterBody {
    /// Its directory or mount, absolute; made when missing (its parent is not).
    pub path: PathBuf,
    /// Names the registration, 1 to 64 characters; absent: made of the path.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub creation_token: Option<String>,
    /// Tags.
    #[serde(skip_serializing_if = "BTreeMap::is_empty", default)]
    pub tags: BTreeMap<String, String>,
}

/// A file system that has an id here.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct FileSystem {
    /// Where it is, on its own host; absent when that is not known.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub path: Option<String>,
    /// It is on this daemon's host.
    pub here: bool,
    /// `SOURCE` or `DESTINATION`, when it is in a configuration.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub end: Option<String>,
    /// EFS's form of it.
    #[serde(flatten)]
    pub file_system: FileSystemBody,
}

/// Whether all is well.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct Health {
    /// No configuration needs help.
    pub healthy: bool,
    /// Configurations of this daemon.
    pub configurations: usize,
    /// Why it is not healthy, one a configuration.
    pub unhealthy_reasons: Vec<String>,
}
