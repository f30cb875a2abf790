//! What the destination counts and times beside status; see
//! `replicator_common::telemetry` for names and meaning.

use metrics::{Counter, Histogram};
use replicator_common::id::FileSystemId;
use replicator_common::telemetry::Series;

/// What can go wrong, as `kind` in `replicator_errors_total`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ErrorKind {
    /// A session ended that should not have.
    Session,
    /// Something cannot be staged now; it is tried again or given back.
    Stage,
    /// An object finds no place, and is given back.
    NoPlace,
    /// The replica cannot take changes now.
    Apply,
    /// The replica's file system could not be synced.
    Sync,
    /// The replica was changed by somebody else.
    Foreign,
}

impl ErrorKind {
    const ALL: [(Self, &'static str); 6] = [
        (Self::Session, "session"),
        (Self::Stage, "stage"),
        (Self::NoPlace, "no_place"),
        (Self::Apply, "apply"),
        (Self::Sync, "sync"),
        (Self::Foreign, "foreign"),
    ];
}

/// The series of one configuration.
pub struct Meters {
    /// Bytes of data frames received.
    pub received: Counter,
    /// Small objects staged.
    pub staged: Counter,
    /// Small objects that an earlier session had staged.
    pub reused: Counter,
    /// Batches committed.
    pub committed: Counter,
    /// Steps done.
    pub steps: Counter,
    /// From a whole batch to its being durable.
    pub seal: Histogram,
    /// Calls of syncfs.
    pub sync: Histogram,
    /// From a durable batch to its being visible.
    pub apply: Histogram,
    errors: Vec<(ErrorKind, Counter)>,
}

impl Meters {
    /// Of the configuration that replicates `source` to `destination`.
    pub fn new(source: &FileSystemId, destination: &FileSystemId) -> Self {
        let series = Series::new(source, destination);
        let own = series.with("side", "destination");
        let error = |(kind, name): (ErrorKind, &'static str)| {
            (kind, own.with("kind", name).counter("replicator_errors_total"))
        };
        Self {
            received: series.counter("replicator_destination_received_bytes_total"),
            staged: series.counter("replicator_destination_staged_objects_total"),
            reused: series.counter("replicator_destination_reused_objects_total"),
            committed: series.counter("replicator_destination_committed_batches_total"),
            steps: series.counter("replicator_destination_applied_steps_total"),
            seal: series.histogram("replicator_destination_seal_seconds"),
            sync: series.histogram("replicator_destination_sync_seconds"),
            apply: series.histogram("replicator_destination_apply_seconds"),
            errors: ErrorKind::ALL.into_iter().map(error).collect(),
        }
    }

    /// Something went wrong.
    pub fn error(&self, kind: ErrorKind) {
        for (_, counter) in self.errors.iter().filter(|(known, _)| *known == kind) {
            counter.increment(1);
        }
    }
}
