//! How far a walk is: what it found, what the replica has of it, at what pace.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use replicator_common::status::Progress;

use super::Shared;

/// Over how long rates are computed.
const RATE_SPAN: Duration = Duration::from_secs(5);

/// Progress with the samples that rates need.
#[derive(Default)]
pub(super) struct Meter {
    active: bool,
    done: (u64, u64),
    found: (u64, u64),
    counted: bool,
    samples: VecDeque<(Instant, u64, u64)>,
}

impl Meter {
    /// No walk is under way any more.
    pub(super) fn end(&mut self) {
        self.active = false;
    }

    /// How far the walk is, while one is under way.
    pub(super) fn read(&mut self) -> Option<Progress> {
        if !self.active {
            return None;
        }
        let now = Instant::now();
        self.samples.push_back((now, self.done.0, self.done.1));
        while self.samples.len() > 2
            && self.samples.get(1).is_some_and(|(at, ..)| now - *at > RATE_SPAN)
        {
            self.samples.pop_front();
        }
        let (objects, bytes) = self.samples.front().map_or((0.0, 0.0), |(at, objects, bytes)| {
            let span = (now - *at).as_secs_f64().max(0.05);
            ((self.done.0 - objects) as f64 / span, (self.done.1 - bytes) as f64 / span)
        });
        let found = (self.found.0.max(self.done.0), self.found.1.max(self.done.1));
        let left = (found.0 - self.done.0, found.1 - self.done.1);
        let estimate = |left: u64, rate: f64| match left {
            0 => Some(0.0),
            left => (rate > 0.0).then(|| left as f64 / rate),
        };
        let seconds_left = match (estimate(left.0, objects), estimate(left.1, bytes)) {
            (Some(a), Some(b)) => Some(a.max(b)),
            _ => None,
        };
        Some(Progress {
            walk_complete: self.counted,
            objects_found: found.0,
            bytes_found: found.1,
            objects_done: self.done.0,
            bytes_done: self.done.1,
            bytes_per_second: bytes,
            objects_per_second: objects,
            seconds_left: seconds_left.filter(|_| self.counted),
        })
    }
}

impl Shared {
    /// A walk begins.
    pub fn begin_progress(&self) {
        let meter = &mut self.lock().progress;
        let (found, counted) = (meter.found, meter.counted);
        *meter = Meter { active: true, found, counted, ..Meter::default() };
    }

    /// The walk has closed its gap.
    pub fn end_progress(&self) {
        self.lock().progress.counted = true;
    }

    /// Whether it is known how much there is.
    pub fn is_counted(&self) -> bool {
        self.lock().progress.counted
    }

    /// The census of the source counted objects and bytes so far, or in all.
    pub fn found(&self, objects: u64, bytes: u64, all: bool) {
        let mut inner = self.lock();
        inner.progress.found = (objects, bytes);
        inner.progress.counted |= all;
    }

    /// Objects and bytes are known to be equal on the replica.
    pub fn progressed(&self, (objects, bytes): (u64, u64)) {
        let mut inner = self.lock();
        let meter = &mut inner.progress;
        meter.done.0 += objects;
        meter.done.1 += bytes;
    }
}
