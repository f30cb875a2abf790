//! What a daemon remembers of its replications for the console's charts: one
//! sample each [`SAMPLE_PERIOD`], an hour of them. Pure; bounded by the number of
//! configurations.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use serde::ser::{Serialize, SerializeTuple, Serializer};

use super::efs::last_replicated;
use crate::id::FileSystemId;
use crate::status::Status;
use crate::time::Timestamp;

/// Between two samples. A lag that matters lasts longer, and then grows: none is
/// missed between two samples.
pub const SAMPLE_PERIOD: Duration = Duration::from_secs(5);
/// Samples kept of each configuration: an hour.
pub const SAMPLES_MAX: usize = 720;
/// A report of the other side that is older is no word of the present.
const OLD: Duration = Duration::from_secs(10);

/// One moment of one replication.
#[derive(Clone, Debug, PartialEq)]
pub struct Sample {
    /// Which one, counted since the daemon started.
    pub number: u64,
    /// When, this side's clock.
    pub time: Timestamp,
    /// See [`lag`].
    pub lag: Option<f64>,
    /// Content bytes shipped a second since the sample before; `None` where
    /// there is nothing to compare with.
    pub bytes_per_second: Option<f64>,
    /// Records journaled a second since then.
    pub records_per_second: Option<f64>,
    /// Records that wait.
    pub backlog: Option<u64>,
}

/// As a short list, in the order of the fields but for the number: an hour of
/// them goes to each console that is opened.
impl Serialize for Sample {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let short = |value: Option<f64>| value.map(|value| (value * 1e3).round() / 1e3);
        let mut tuple = serializer.serialize_tuple(5)?;
        tuple.serialize_element(&(self.time.0 / 1_000_000))?;
        tuple.serialize_element(&short(self.lag))?;
        tuple.serialize_element(&short(self.bytes_per_second))?;
        tuple.serialize_element(&short(self.records_per_second))?;
        tuple.serialize_element(&self.backlog)?;
        tuple.end()
    }
}

/// How many seconds the replica is behind, as far as this side can tell: `None`
/// before the initial sync is through. On one clock: the source's, unless its
/// report is of long ago.
pub fn lag(status: &Status, now: Timestamp) -> Option<f64> {
    let moment = last_replicated(status)?;
    if let Some(source) = &status.source
        && now.since(source.time) <= OLD
    {
        return Some(source.time.since(moment).as_secs_f64());
    }
    let destination = status.destination.as_ref();
    destination
        .and_then(|report| {
            // The report may be old, too (then this is the source's daemon).
            let since = now.since(report.time).as_secs_f64();
            report.time_since_last_sync.map(|age| age + since)
        })
        .or(Some(now.since(moment).as_secs_f64()))
}

/// The samples of every configuration.
#[derive(Debug, Default)]
pub struct History {
    taken: u64,
    rings: BTreeMap<FileSystemId, Ring>,
}

#[derive(Debug, Default)]
struct Ring {
    samples: VecDeque<Sample>,
    last: Option<Point>,
}

/// Counters as the source last told them.
#[derive(Clone, Copy, Debug)]
struct Point {
    time: Timestamp,
    bytes: u64,
    records: u64,
}

impl Point {
    fn of(status: &Status) -> Option<Self> {
        let source = status.source.as_ref()?;
        let counters = &source.counters;
        Some(Self { time: source.time, bytes: counters.bytes_shipped, records: counters.records })
    }

    /// Bytes and records a second since `earlier`; `None` when the source has not
    /// been heard since, or counts anew.
    fn rates(self, earlier: Self) -> Option<(f64, f64)> {
        let seconds = self.time.since(earlier.time).as_secs_f64();
        let bytes = self.bytes.checked_sub(earlier.bytes)?;
        let records = self.records.checked_sub(earlier.records)?;
        (seconds > 0.0).then(|| (bytes as f64 / seconds, records as f64 / seconds))
    }
}

impl History {
    /// Takes a sample of each configuration; what is gone is forgotten.
    pub fn take(&mut self, all: &[Status], now: Timestamp) {
        self.taken += 1;
        self.rings.retain(|id, _| all.iter().any(|status| status.source_file_system_id == *id));
        for status in all {
            let ring = self.rings.entry(status.source_file_system_id.clone()).or_default();
            let point = Point::of(status);
            let rates = point.zip(ring.last).and_then(|(now, before)| now.rates(before));
            ring.last = point.or(ring.last);
            if ring.samples.len() == SAMPLES_MAX {
                ring.samples.pop_front();
            }
            ring.samples.push_back(Sample {
                number: self.taken,
                time: now,
                lag: lag(status, now),
                bytes_per_second: rates.map(|(bytes, _)| bytes),
                records_per_second: rates.map(|(_, records)| records),
                backlog: status.source.as_ref().map(|source| source.backlog_records),
            });
        }
    }

    /// How many times samples were taken.
    pub fn taken(&self) -> u64 {
        self.taken
    }

    /// Each configuration's samples after the first `after`, oldest first.
    pub fn since(&self, after: u64) -> BTreeMap<&FileSystemId, Vec<&Sample>> {
        let later = |ring: &'_ Ring| -> usize {
            ring.samples.partition_point(|sample| sample.number <= after)
        };
        self.rings
            .iter()
            .map(|(id, ring)| (id, ring.samples.range(later(ring)..).collect()))
            .collect()
    }
}

#[cfg(test)]
mod tests;
