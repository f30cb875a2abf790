//! What can be asked of a running side, whoever asks: the HTTP API, the
//! command line of `run`, a test.
//!
//! Calls block (they may wait for a disk or a peer); async callers run them
//! on a blocking thread.

use std::path::PathBuf;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::id::FileSystemId;
use crate::status::{DesiredState, FailoverReport, Status};
use crate::time::Timestamp;
use crate::verification::{Findings, PassOptions};

/// Which half of a replication deletion reaches.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum DeletionMode {
    /// Both sides. Fails when the other side cannot be reached.
    #[default]
    AllConfigurations,
    /// This side alone: what works when the other side is dead.
    LocalConfigurationOnly,
}

/// Which halves of its replications a control has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum Side {
    /// A source's daemon.
    Source,
    /// A destination's daemon.
    Destination,
    /// Both in one process.
    Both,
}

/// Asks a source to enable replication.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct CreateRequest {
    /// The directory or mount to replicate.
    pub source: PathBuf,
    /// The destination's enrolment token (see [`crate::net::token`]).
    pub token: String,
    /// Replicate device nodes too.
    #[serde(default)]
    pub devices: bool,
    /// Which watcher: `auto`, `fanotify`, `inotify`, `scan`.
    #[serde(default)]
    pub watcher: WatcherChoice,
}

/// The operator's choice of watcher.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum WatcherChoice {
    /// The best that privilege and file system allow.
    #[default]
    Auto,
    /// fanotify or an error.
    Fanotify,
    /// A watch on each directory, or an error; see
    /// [`WatcherKind::Inotify`](crate::status::WatcherKind::Inotify).
    Inotify,
    /// A periodic walk.
    Scan,
}

/// Why something that was asked for was not done. The variants are EFS's error
/// classes, so that the API can name them.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// The request makes no sense.
    #[error("{0}")]
    Validation(String),
    /// There is no such file system here.
    #[error("file system {0} is not known here")]
    FileSystemNotFound(FileSystemId),
    /// The file system is in no replication configuration here.
    #[error("file system {0} has no replication configuration")]
    ReplicationNotFound(FileSystemId),
    /// The file system already is in a configuration.
    #[error("{0}")]
    ReplicationAlreadyExists(String),
    /// It conflicts with what is going on, or the other side refuses.
    #[error("{0}")]
    Conflict(String),
    /// The time given ran out before it was done.
    #[error("{0}")]
    TimedOut(String),
    /// Something broke.
    #[error("{0}")]
    Internal(String),
}

/// How long somebody waits.
#[derive(Clone, Copy, Debug)]
pub struct Patience<'a> {
    /// At most.
    pub time: Duration,
    /// He waits no more; looked at once a second.
    pub gone: &'a AtomicBool,
}

impl Patience<'static> {
    /// Of one who stays.
    pub fn of(time: Duration) -> Self {
        static STAYS: AtomicBool = AtomicBool::new(false);
        Self { time, gone: &STAYS }
    }
}

/// A running source, destination, or both.
pub trait Control: Send + Sync + 'static {
    /// Which side answers: not everything can be asked of each.
    fn side(&self) -> Side {
        Side::Both
    }

    /// Enables replication of a directory; returns when both sides are
    /// enrolled. A destination answers with [`ControlError::Validation`].
    fn create(&self, request: &CreateRequest) -> Result<Status, ControlError>;

    /// Every configuration of this side, ordered by creation.
    fn list(&self) -> Vec<Status>;

    /// Deletes a configuration: the failover. On a destination with
    /// `AllConfigurations` while the source cannot be reached: a conflict that
    /// says to use the local mode.
    fn delete(
        &self,
        source: &FileSystemId,
        mode: DeletionMode,
    ) -> Result<FailoverReport, ControlError>;

    /// Returns when everything that was done on the source before the call is
    /// durable on the replica: the watermark reached by then. Only a source
    /// can tell; a destination answers with a conflict that says so.
    fn wait(
        &self,
        source: &FileSystemId,
        patience: Patience<'_>,
    ) -> Result<Timestamp, ControlError>;

    /// Pauses or resumes shipping. Changes are captured either way. On a
    /// destination: stops taking batches. What has halted is not resumed so: a
    /// conflict that says to accept the deletions.
    fn set_desired(
        &self,
        source: &FileSystemId,
        desired: DesiredState,
    ) -> Result<Status, ControlError>;

    /// Resumes, and lets the deletions through for which replication has halted.
    /// Where it has not, they count on as always. Only a source halts.
    fn accept_deletions(&self, source: &FileSystemId) -> Result<Status, ControlError> {
        Err(ControlError::Validation(format!(
            "only the source of {source} can accept deletions: ask its daemon"
        )))
    }

    /// Begins a pass of verification now, and gives its number. Only a source
    /// can; while a pass runs that somebody asked for, it is a conflict. One
    /// that began by itself goes on where it is, as the options say.
    fn verify(&self, _source: &FileSystemId, _options: PassOptions) -> Result<u64, ControlError> {
        Err(ControlError::Conflict("only the source verifies: ask it".to_owned()))
    }

    /// What pass `pass` has found, after the first `after` differences.
    fn findings(
        &self,
        _source: &FileSystemId,
        _pass: u64,
        _after: u64,
    ) -> Result<Findings, ControlError> {
        Err(ControlError::Conflict("only the source verifies: ask it".to_owned()))
    }
}
