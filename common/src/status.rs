//! Status: plain data, apart from the machinery that fills it.
//!
//! Desired state (what the operator asked for) and observed state are separate
//! fields. Words are EFS's where EFS has one. All of it serialises to the JSON
//! that `replicator status --json` prints, with EFS's spelling of names.

use serde::{Deserialize, Serialize};

use crate::id::{BatchId, FileSystemId, Seq, TransferId};
use crate::time::Timestamp;
use crate::verification::Verification;

/// EFS's status of a replication.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum ReplicationStatus {
    /// The initial sync runs; nothing is promised yet.
    Enabling,
    /// Changes replicate continuously.
    Enabled,
    /// Replication is being paused.
    Pausing,
    /// Replication is paused; changes are journaled.
    Paused,
    /// The configuration is being deleted (failover runs).
    Deleting,
    /// Replication cannot go on without help; `StatusMessage` says why.
    Error,
    /// So much was deleted on the source that the replica does not follow until
    /// the operator says so, while changes are journaled; or the source is not
    /// mounted where it was. A word of ours: EFS's API says `ERROR`.
    Halted,
}

impl ReplicationStatus {
    /// As EFS spells it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Enabling => "ENABLING",
            Self::Enabled => "ENABLED",
            Self::Pausing => "PAUSING",
            Self::Paused => "PAUSED",
            Self::Deleting => "DELETING",
            Self::Error => "ERROR",
            Self::Halted => "HALTED",
        }
    }
}

/// What the operator asked for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum DesiredState {
    /// Replicate.
    #[default]
    Enabled,
    /// Journal, but do not ship.
    Paused,
}

/// How changes are captured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum WatcherKind {
    /// A fanotify mark on the whole file system.
    Fanotify,
    /// A watch on each directory: a fanotify mark where the kernel gives one to
    /// users without privilege (since Linux 5.17), else an inotify watch.
    Inotify,
    /// A periodic walk.
    Scan,
}

impl WatcherKind {
    /// As the command line spells it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Fanotify => "fanotify",
            Self::Inotify => "inotify",
            Self::Scan => "scan",
        }
    }
}

/// Which watcher runs, and why that one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct WatcherReport {
    /// Which.
    pub kind: WatcherKind,
    /// Why it was chosen, in words.
    pub reason: String,
    /// What this choice cannot see or promise, in words; empty when nothing.
    #[serde(deserialize_with = "crate::codec::list")]
    pub doubts: Vec<String>,
    /// Directories, and files with several names, that are watched one by one,
    /// where that has a cost (inotify).
    pub watches: Option<u64>,
}

/// Positions in the journal, one a stage.
///
/// Order: captured ≥ journaled ≥ shipped ≥ durable ≥ applied. Captured is
/// ahead of journaled only while events wait in memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct Positions {
    /// The watcher has read events up to here.
    pub captured: Seq,
    /// In the journal, flushed.
    pub journaled: Seq,
    /// Sent to the destination.
    pub shipped: Seq,
    /// Durable on the destination.
    pub durable: Seq,
    /// Visible in the replica, acknowledged; the journal is trimmed to here.
    pub applied: Seq,
}

/// How old the oldest change is that has not passed each stage, seconds; 0
/// when none waits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct StageLag {
    /// Captured but not journaled.
    pub journaled: f64,
    /// Journaled but not shipped.
    pub shipped: f64,
    /// Shipped but not durable.
    pub durable: f64,
    /// Not acknowledged as applied.
    pub applied: f64,
}

/// Progress of the initial sync or of a rescan.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct Progress {
    /// The source was counted, so the totals are final. (In a rescan, objects are
    /// those of the replica, and bytes those that are done.)
    pub walk_complete: bool,
    /// Objects found so far.
    pub objects_found: u64,
    /// Content bytes of regular files found so far.
    pub bytes_found: u64,
    /// Objects that are known to be equal on the replica.
    pub objects_done: u64,
    /// Content bytes of them.
    pub bytes_done: u64,
    /// Content bytes a second over the last seconds.
    pub bytes_per_second: f64,
    /// Objects a second over the last seconds.
    pub objects_per_second: f64,
    /// Estimated seconds left; `None` when not known.
    pub seconds_left: Option<f64>,
}

/// One thing that the watermark waits for.
///
/// (No field of these types may be left out when it is empty: they travel in
/// bincode too, which knows no field names.)
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct Blocker {
    /// In words: `initial sync`, `rescan after queue overflow`, `large file` …
    pub reason: String,
    /// The path relative to the source, where one file is to blame.
    pub path: Option<String>,
    /// Content bytes that still have to travel, where known.
    pub bytes_left: Option<u64>,
    /// Since when it blocks.
    pub since: Timestamp,
}

/// What was passed over or could not be held, by kind; numbers of objects.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct Skipped {
    /// Sockets, never replicated.
    pub sockets: u64,
    /// FIFOs, never replicated.
    pub fifos: u64,
    /// Device nodes, replicated only on request.
    pub devices: u64,
    /// Other file systems mounted below the source, not entered; by path.
    #[serde(deserialize_with = "crate::codec::list")]
    pub nested_mounts: Vec<String>,
    /// Files that could not be read; by path, with the error. At most 100.
    #[serde(deserialize_with = "crate::codec::list")]
    pub unreadable: Vec<PathError>,
}

/// An error with the file it concerns.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct PathError {
    /// Relative to the source or the replica.
    pub path: String,
    /// What happened.
    pub error: String,
}

/// What the replica can hold; what it cannot is counted in [`Shortfalls`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct Abilities {
    /// The applier may give files to any owner.
    pub chown: bool,
    /// `user.*` xattrs are supported.
    pub xattrs: bool,
    /// `security.*` and `trusted.*` xattrs may be set.
    pub privileged_xattrs: bool,
    /// Device nodes may be made.
    pub devices: bool,
    /// Objects are found by handle.
    pub handles: bool,
    /// Names that a file may have at most; `None` where no bound is known.
    #[serde(default)]
    pub links_max: Option<u32>,
    /// Bytes that a name may have at most; `None` where no bound is known.
    #[serde(default)]
    pub name_max: Option<u32>,
}

/// Attributes that the replica could not take, in objects.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct Shortfalls {
    /// Owner or group not set.
    pub ownership: u64,
    /// Mode bits not set.
    pub mode: u64,
    /// Xattrs (ACLs and capabilities among them) not set.
    pub xattrs: u64,
    /// Device nodes not made.
    pub devices: u64,
    /// Times not set.
    pub times: u64,
    /// Up to 100 examples, newest last.
    #[serde(deserialize_with = "crate::codec::list")]
    pub examples: Vec<PathError>,
}

/// How the replica is kept read-only.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct Enforcement {
    /// `mount` (read-only bind mount, writes through a private clone),
    /// `permissions` (only the applier's user may write) or `none`.
    pub kind: EnforcementKind,
    /// Why, and what it does not cover.
    pub reason: String,
}

/// See [`Enforcement`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum EnforcementKind {
    /// A read-only bind mount over the replica: even root gets EROFS.
    Mount,
    /// Permissions of the tree; other users cannot write, the owner and root can.
    Permissions,
    /// Nothing holds others back.
    None,
}

/// Counters since the configuration was made, as far as this side knows.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct Counters {
    /// Events read from the kernel.
    pub events: u64,
    /// Records journaled.
    pub records: u64,
    /// Batches acknowledged.
    pub batches: u64,
    /// Of them, exact.
    pub exact_batches: u64,
    /// Objects whose state travelled.
    pub objects_shipped: u64,
    /// Content bytes that changed, as a user would count them: of a small file
    /// its length each time its content changed, of a large one the bytes of
    /// chunks that the version before did not have. Before compression, and
    /// once a batch, however often it was read.
    pub bytes_changed: u64,
    /// Content bytes that travelled: compressed, and with all that was sent
    /// again or in vain. Divided by [`Self::bytes_changed`], what a changed byte
    /// costs.
    pub bytes_shipped: u64,
    /// Bytes on the wire, all frames, after compression, before QUIC.
    pub bytes_wired: u64,
    /// Gaps met.
    pub gaps: u64,
    /// Rescans run.
    pub rescans: u64,
    /// Sessions opened.
    pub sessions: u64,
}

/// The state of the connection between the two sides.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct Link {
    /// A session is open.
    pub connected: bool,
    /// Since when it is as it is.
    pub since: Timestamp,
    /// The other side's address.
    pub peer: String,
    /// Round trip, microseconds, while connected.
    pub round_trip_micros: Option<u64>,
    /// Nanoseconds by which the destination's clock is ahead of the source's,
    /// while known.
    pub clock_offset_nanos: Option<i64>,
    /// Why the last session ended or could not be opened.
    pub last_error: Option<String>,
    /// When the source tries again, while there is no connection; in the past
    /// while it tries. `None` at the destination, which only waits.
    pub next_attempt: Option<Timestamp>,
}

/// The source's view.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct SourceReport {
    /// When this was made, the source's clock.
    pub time: Timestamp,
    /// What the operator asked for.
    pub desired: DesiredState,
    /// What is.
    pub status: ReplicationStatus,
    /// In words, when there is something to say.
    pub message: Option<String>,
    /// The source's path.
    pub path: String,
    /// The watermark as acknowledged; [`Timestamp::NEVER`] before the initial
    /// sync is through.
    pub watermark: Timestamp,
    /// How changes are captured.
    pub watcher: WatcherReport,
    /// Positions.
    pub positions: Positions,
    /// Lag a stage.
    pub lag: StageLag,
    /// Records that wait in the journal.
    pub backlog_records: u64,
    /// Bytes of the state directory's stores.
    pub store_bytes: u64,
    /// While an initial sync or a rescan runs.
    pub progress: Option<Progress>,
    /// What the watermark waits for.
    #[serde(deserialize_with = "crate::codec::list")]
    pub blocked_by: Vec<Blocker>,
    /// What is passed over.
    pub skipped: Skipped,
    /// The connection.
    pub link: Link,
    /// Counters.
    pub counters: Counters,
    /// The last error that an operator should know, with its time.
    pub last_error: Option<TimedError>,
    /// What is known of verification.
    #[serde(default)]
    pub verification: Verification,
}

/// An error and when it happened.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct TimedError {
    /// When.
    pub time: Timestamp,
    /// What.
    pub error: String,
}

/// A large file whose content is on its way.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct Arriving {
    /// The transfer, within the present session.
    pub transfer: TransferId,
    /// Bytes of the file that are staged, those taken from its old content
    /// included.
    pub bytes: u64,
}

/// The destination's view.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct DestinationReport {
    /// When this was made, the destination's clock.
    pub time: Timestamp,
    /// The replica's path.
    pub path: String,
    /// EFS's LastReplicatedTimestamp (source's clock); `None` until the initial
    /// sync is through.
    pub last_replicated: Option<Timestamp>,
    /// The instant of the source that the last exact batch equals.
    pub last_consistent: Option<Timestamp>,
    /// Seconds between [`Self::last_replicated`], brought to the destination's
    /// clock, and now.
    pub time_since_last_sync: Option<f64>,
    /// The last batch applied.
    pub applied: BatchId,
    /// The last batch durable.
    pub durable: BatchId,
    /// Objects in the replica.
    pub objects: u64,
    /// Objects in the orphan area.
    pub orphans: u64,
    /// How the replica is kept read-only.
    pub enforcement: Enforcement,
    /// What the replica can hold.
    pub abilities: Abilities,
    /// What it could not hold.
    pub shortfalls: Shortfalls,
    /// Staged bytes not yet applied.
    pub staged_bytes: u64,
    /// Large files that are arriving.
    #[serde(deserialize_with = "crate::codec::list")]
    pub arriving: Vec<Arriving>,
    /// Replication cannot be applied now, and why.
    pub stalled: Option<String>,
    /// The connection.
    pub link: Link,
    /// The last error that an operator should know.
    pub last_error: Option<TimedError>,
}

/// Everything about one configuration that a side knows. Each daemon fills its
/// own half from the machinery and the other from the peer's last report.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct Status {
    /// The source's file system.
    pub source_file_system_id: FileSystemId,
    /// The replica's file system.
    pub destination_file_system_id: FileSystemId,
    /// The region that the source says it is in.
    pub source_file_system_region: String,
    /// The region that the destination says it is in.
    pub destination_file_system_region: String,
    /// When the configuration was made.
    pub creation_time: Timestamp,
    /// EFS's word for the whole.
    pub status: ReplicationStatus,
    /// In words, when there is something to say.
    pub status_message: Option<String>,
    /// The source's view, as of [`SourceReport::time`].
    pub source: Option<SourceReport>,
    /// The destination's view, as of [`DestinationReport::time`].
    pub destination: Option<DestinationReport>,
}

/// What failover did, and what was not replicated.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct FailoverReport {
    /// The source's file system.
    pub source_file_system_id: FileSystemId,
    /// The replica's file system.
    pub destination_file_system_id: FileSystemId,
    /// The replica's path; it is writable now.
    pub path: String,
    /// Every change before this moment is in the replica; `None` when the
    /// initial sync was never through.
    pub last_replicated: Option<Timestamp>,
    /// The replica equals (for exact batches) the source at this instant.
    pub last_consistent: Option<Timestamp>,
    /// Seconds between the last replicated moment and failover, destination's clock.
    pub time_since_last_sync: Option<f64>,
    /// The lost+found directory, relative to the replica; `None` when nothing
    /// had to be set aside.
    pub lost_and_found: Option<String>,
    /// Items in it.
    pub set_aside: u64,
    /// Objects that were being moved and were put back where they had been.
    pub put_back: u64,
    /// Changes known on the source but not replicated: records in its journal,
    /// when the source took part in the failover.
    pub not_replicated_records: Option<u64>,
    /// Up to 1000 paths of them.
    #[serde(deserialize_with = "crate::codec::list")]
    pub not_replicated_paths: Vec<String>,
    /// What could not be done, in words; empty when all is well.
    #[serde(deserialize_with = "crate::codec::list")]
    pub warnings: Vec<String>,
}
