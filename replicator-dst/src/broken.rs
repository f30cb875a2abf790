//! A configuration whose replica cannot be opened: its directory is gone, its
//! file system is not mounted, its store is damaged. It is shown with the
//! reason, keeps its source's certificate pinned, and is tried again whenever
//! its source comes. The others go on.

use std::path::PathBuf;

use replicator_common::id::BatchId;
use replicator_common::status::{
    Abilities, DestinationReport, Enforcement, EnforcementKind, Link, ReplicationStatus,
    Shortfalls, Status, TimedError,
};
use replicator_common::time::Timestamp;

use crate::replica::Config;

/// See the module.
#[derive(Clone, Debug)]
pub(crate) struct Broken {
    /// Its state directory.
    pub(crate) directory: PathBuf,
    /// Its configuration.
    pub(crate) config: Config,
    /// Why it cannot be opened, and since when.
    pub(crate) error: TimedError,
}

impl Broken {
    pub(crate) fn new(directory: PathBuf, config: Config, error: &dyn std::fmt::Display) -> Self {
        tracing::error!(source = %config.source, %error, "the replica cannot be opened");
        let error = TimedError { time: Timestamp::now(), error: error.to_string() };
        Self { directory, config, error }
    }

    /// All that can be said of it.
    pub(crate) fn status(&self, now: Timestamp, region: &str) -> Status {
        Status {
            source_file_system_id: self.config.source.clone(),
            destination_file_system_id: self.config.destination.clone(),
            source_file_system_region: self.config.source_region.clone(),
            destination_file_system_region: region.to_owned(),
            creation_time: self.config.creation_time,
            status: ReplicationStatus::Error,
            status_message: Some(self.error.error.clone()),
            source: None,
            destination: Some(self.report(now)),
        }
    }

    fn report(&self, now: Timestamp) -> DestinationReport {
        DestinationReport {
            time: now,
            path: self.config.path.display().to_string(),
            // Where the replica stands is in what cannot be read.
            last_replicated: None,
            last_consistent: None,
            time_since_last_sync: None,
            applied: BatchId(0),
            durable: BatchId(0),
            objects: 0,
            orphans: 0,
            enforcement: Enforcement {
                kind: EnforcementKind::None,
                reason: "the replica is not open".to_owned(),
            },
            abilities: Abilities {
                chown: false,
                xattrs: false,
                privileged_xattrs: false,
                devices: false,
                handles: false,
                links_max: None,
                name_max: None,
            },
            shortfalls: Shortfalls::default(),
            staged_bytes: 0,
            arriving: Vec::new(),
            stalled: Some(self.error.error.clone()),
            link: Link {
                connected: false,
                since: self.error.time,
                peer: String::new(),
                round_trip_micros: None,
                clock_offset_nanos: None,
                last_error: None,
                next_attempt: None,
            },
            last_error: Some(self.error.clone()),
        }
    }
}
