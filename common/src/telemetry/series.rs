//! The labels of what is counted.

use metrics::{Counter, Gauge, Histogram, Label};

use crate::id::FileSystemId;
use crate::status::Status;

/// The label that names the source's file system; EFS's `FileSystemId`.
pub const SOURCE: &str = "source_file_system_id";
/// The label that names the replica's; EFS's `DestinationFileSystemId`.
pub const DESTINATION: &str = "destination_file_system_id";

/// Which end of a replication speaks, where both can.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// The source's.
    Source,
    /// The destination's.
    Destination,
}

impl Side {
    /// The label's value.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Source => "source",
            Self::Destination => "destination",
        }
    }
}

/// Makes the series of one configuration. What it makes is to be kept: to look
/// a series up takes longer than to count.
#[derive(Clone, Debug)]
pub struct Series {
    labels: Vec<Label>,
}

impl Series {
    /// Of the configuration that replicates `source` to `destination`.
    pub fn new(source: &FileSystemId, destination: &FileSystemId) -> Self {
        let label = |key, id: &FileSystemId| Label::new(key, id.to_string());
        Self { labels: vec![label(SOURCE, source), label(DESTINATION, destination)] }
    }

    /// Of a configuration as status names it.
    pub fn of(status: &Status) -> Self {
        Self::new(&status.source_file_system_id, &status.destination_file_system_id)
    }

    /// The same with one more label.
    #[must_use]
    pub fn with(&self, key: &'static str, value: impl Into<metrics::SharedString>) -> Self {
        let mut labels = self.labels.clone();
        labels.push(Label::new(key, value));
        Self { labels }
    }

    /// A counter, shown from 0 on: so that its first step is seen as one.
    pub fn counter(&self, name: &'static str) -> Counter {
        let counter = metrics::counter!(name, self.labels.clone());
        counter.increment(0);
        counter
    }

    /// A gauge; not shown before it is set, when it is only registered by a set.
    pub fn gauge(&self, name: &'static str) -> Gauge {
        metrics::gauge!(name, self.labels.clone())
    }

    /// A histogram.
    pub fn histogram(&self, name: &'static str) -> Histogram {
        metrics::histogram!(name, self.labels.clone())
    }

    /// Sets a gauge.
    pub(super) fn set(&self, name: &'static str, value: f64) {
        self.gauge(name).set(value);
    }

    /// Sets a gauge, where there is something to say.
    pub(super) fn set_some(&self, name: &'static str, value: Option<f64>) {
        if let Some(value) = value {
            self.set(name, value);
        }
    }

    /// Sets a counter to what was counted elsewhere.
    pub(super) fn total(&self, name: &'static str, value: u64) {
        metrics::counter!(name, self.labels.clone()).absolute(value);
    }
}
