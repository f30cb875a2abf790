//! What the source counts and times beside status; see
//! `replicator_common::telemetry` for names and meaning.

use std::time::{Duration, Instant};

use metrics::{Counter, Gauge, Histogram};
use replicator_common::id::FileSystemId;
use replicator_common::telemetry::Series;
use replicator_common::time::Timestamp;
use replicator_common::verification::Verification;

/// What can go wrong, as `kind` in `replicator_errors_total`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ErrorKind {
    /// A session ended that should not have, or could not be opened.
    Session,
    /// The destination broke the protocol.
    Protocol,
    /// A file could not be read.
    Read,
    /// The destination had no place for something.
    NoPlace,
    /// Capturing stopped.
    Capture,
    /// The journal could not be flushed.
    Journal,
    /// The replication stopped, or could not be started.
    Engine,
}

impl ErrorKind {
    const ALL: [(Self, &'static str); 7] = [
        (Self::Session, "session"),
        (Self::Protocol, "protocol"),
        (Self::Read, "read"),
        (Self::NoPlace, "no_place"),
        (Self::Capture, "capture"),
        (Self::Journal, "journal"),
        (Self::Engine, "engine"),
    ];
}

/// What a batch has passed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// Flushed to the journal.
    Journaled,
    /// Committed to the destination.
    Shipped,
    /// Said to be durable there.
    Durable,
    /// Said to be in the replica.
    Applied,
}

impl Stage {
    const ALL: [&'static str; 4] = ["journaled", "shipped", "durable", "applied"];
}

/// The series of one configuration.
pub struct Meters {
    series: Series,
    stages: Vec<Histogram>,
    batch_seconds: Histogram,
    batch_operations: Histogram,
    halts: Counter,
    passes: Counter,
    errors: Vec<(ErrorKind, Counter)>,
}

impl Meters {
    /// Of the configuration that replicates `source` to `destination`.
    pub fn new(source: &FileSystemId, destination: &FileSystemId) -> Self {
        let series = Series::new(source, destination);
        let stage = |stage| series.with("stage", stage).histogram("replicator_source_lag_seconds");
        let own = series.with("side", "source");
        let error = |(kind, name): (ErrorKind, &'static str)| {
            (kind, own.with("kind", name).counter("replicator_errors_total"))
        };
        for (kind, _) in Verification::default().by_kind() {
            // Shown from 0 on.
            drop(differences(&series, kind.as_str()));
        }
        Self {
            stages: Stage::ALL.into_iter().map(stage).collect(),
            batch_seconds: series.histogram("replicator_source_batch_seconds"),
            batch_operations: series.histogram("replicator_source_batch_operations"),
            halts: series.counter("replicator_source_halts_total"),
            passes: series.counter("replicator_source_verification_passes_total"),
            errors: ErrorKind::ALL.into_iter().map(error).collect(),
            series,
        }
    }

    /// The oldest of some changes took so long to a stage.
    pub fn reached(&self, stage: Stage, took: Duration) {
        if let Some(histogram) = self.stages.get(stage as usize) {
            histogram.record(took);
        }
    }

    /// A batch of `operations` is about to be committed; the event of the oldest
    /// change in it was read at `oldest`.
    pub fn shipped(&self, operations: usize, oldest: Option<Instant>) {
        self.batch_operations.record(operations as f64);
        self.passed(Stage::Shipped, oldest);
    }

    /// A batch passes a stage now.
    pub fn passed(&self, stage: Stage, oldest: Option<Instant>) {
        if let Some(oldest) = oldest {
            self.reached(stage, oldest.elapsed());
        }
    }

    /// A batch was acknowledged, so long after its commit.
    pub fn acknowledged(&self, took: Duration) {
        self.batch_seconds.record(took);
    }

    /// Replication has halted.
    pub fn halted(&self) {
        self.halts.increment(1);
    }

    /// Something went wrong.
    pub fn error(&self, kind: ErrorKind) {
        for (_, counter) in self.errors.iter().filter(|(known, _)| *known == kind) {
            counter.increment(1);
        }
    }

    /// A pass of verification came to its end.
    pub fn verified(&self, pass: &Verification) {
        self.passes.increment(1);
        for (kind, found) in pass.by_kind() {
            differences(&self.series, kind.as_str()).increment(found);
        }
    }

    /// Shows since when the capture thread has not come round; set by each turn.
    pub fn turns(&self) -> Gauge {
        let turns = self.series.gauge("replicator_source_capture_timestamp_seconds");
        turns.set(Timestamp::now().as_seconds());
        turns
    }

    /// A barrier was drawn. (Not registered before the first: a gauge that shows
    /// 0 would say 1970.)
    pub fn barrier(&self) {
        let barrier = self.series.gauge("replicator_source_barrier_timestamp_seconds");
        barrier.set(Timestamp::now().as_seconds());
    }
}

fn differences(series: &Series, kind: &'static str) -> Counter {
    series.with("kind", kind).counter("replicator_source_verification_differences_total")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stages_are_in_the_order_of_their_names() {
        for (stage, name) in [
            (Stage::Journaled, "journaled"),
            (Stage::Shipped, "shipped"),
            (Stage::Durable, "durable"),
            (Stage::Applied, "applied"),
        ] {
            assert_eq!(Stage::ALL[stage as usize], name);
        }
    }
}
