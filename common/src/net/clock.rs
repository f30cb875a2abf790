//! By how much one side's clock is ahead of the other's, from messages that go
//! there and back (NTP's four timestamps). Pure.

use std::time::{Duration, Instant};

use crate::time::Timestamp;

/// How far two clocks may run apart, nanoseconds a second: twice what the
/// quartz of a poor machine does.
const DRIFT: u64 = 100_000;

/// A message to the other side, and its answer. What the other side took
/// between the two counts as no travel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exchange {
    /// When we sent the message, by our clock.
    pub sent: Timestamp,
    /// When it arrived, by the other's.
    pub received: Timestamp,
    /// When the answer was sent, by the other's.
    pub answered: Timestamp,
    /// When it arrived, by ours.
    pub heard: Timestamp,
}

impl Exchange {
    /// Nanoseconds by which the other's clock is ahead, if both ways took the
    /// same time.
    pub fn offset(&self) -> i64 {
        let there = i128::from(self.received.0) - i128::from(self.sent.0);
        let back = i128::from(self.answered.0) - i128::from(self.heard.0);
        let offset = (there + back) / 2;
        offset.clamp(i128::from(i64::MIN), i128::from(i64::MAX)) as i64
    }

    /// How long both ways took; the offset is wrong by half of it at most.
    /// `None` when a clock was set meanwhile.
    pub fn round_trip(&self) -> Option<Duration> {
        let ours = i128::from(self.heard.0) - i128::from(self.sent.0);
        let theirs = i128::from(self.answered.0) - i128::from(self.received.0);
        (theirs >= 0).then(|| u64::try_from(ours - theirs).ok()).flatten().map(Duration::from_nanos)
    }
}

/// The best of several exchanges: the one of the least round trip, as long as
/// it is not too old.
#[derive(Clone, Debug, Default)]
pub struct Estimate {
    best: Option<Sample>,
}

#[derive(Clone, Copy, Debug)]
struct Sample {
    offset: i64,
    /// How wrong it could be when it was taken, nanoseconds.
    error: u64,
    taken: Instant,
}

impl Sample {
    fn error_at(&self, now: Instant) -> u64 {
        let age = now.saturating_duration_since(self.taken).as_millis();
        let drift = u64::try_from(age).unwrap_or(u64::MAX).saturating_mul(DRIFT) / 1000;
        self.error.saturating_add(drift)
    }
}

impl Estimate {
    /// Takes an exchange that ended at `now` into account.
    pub fn add(&mut self, exchange: &Exchange, now: Instant) {
        let Some(round_trip) = exchange.round_trip() else { return };
        let error = u64::try_from(round_trip.as_nanos() / 2).unwrap_or(u64::MAX);
        let new = Sample { offset: exchange.offset(), error, taken: now };
        let better = self.best.is_none_or(|old| {
            let bound = old.error_at(now);
            // Two that cannot both be right: a clock was set in between.
            let apart = old.offset.abs_diff(new.offset) > bound.saturating_add(error);
            error <= bound || apart
        });
        if better {
            self.best = Some(new);
        }
    }

    /// Nanoseconds by which the other's clock is ahead, once known.
    pub fn offset(&self) -> Option<i64> {
        self.best.map(|sample| sample.offset)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: i64 = 1_000_000;

    /// The other's clock is ahead by `ahead`; each way and the other's work
    /// take that long (milliseconds).
    fn exchange(ahead: i64, there: i64, work: i64, back: i64) -> Exchange {
        let at = |ms: i64| Timestamp(1_795_248_930_250_000_000 + ms * MS);
        Exchange {
            sent: at(0),
            received: at(there + ahead),
            answered: at(there + work + ahead),
            heard: at(there + work + back),
        }
    }

    #[test]
    fn the_others_work_does_not_count() {
        for ahead in [0, 7, -40_000] {
            let slow = exchange(ahead, 5, 80, 5);
            assert_eq!(slow.offset(), ahead * MS);
            assert_eq!(slow.round_trip(), Some(Duration::from_millis(10)));
        }
        // Ways of different length: wrong by half the difference.
        assert_eq!(exchange(0, 1, 50, 3).offset(), -MS);
    }

    #[test]
    fn the_least_round_trip_counts_until_it_is_old() {
        let start = Instant::now();
        let mut estimate = Estimate::default();
        assert_eq!(estimate.offset(), None);
        estimate.add(&exchange(10, 40, 0, 2), start);
        estimate.add(&exchange(10, 1, 0, 1), start);
        assert_eq!(estimate.offset(), Some(10 * MS));
        let later = start + Duration::from_secs(10);
        estimate.add(&exchange(11, 30, 0, 2), later);
        assert_eq!(estimate.offset(), Some(10 * MS), "a message that waited in a queue");
        let much_later = start + Duration::from_secs(3600);
        estimate.add(&exchange(15, 30, 0, 30), much_later);
        assert_eq!(estimate.offset(), Some(15 * MS), "the clocks may have run apart");
    }

    #[test]
    fn a_clock_that_is_set_is_noticed_at_once() {
        let start = Instant::now();
        let mut estimate = Estimate::default();
        estimate.add(&exchange(10, 1, 0, 1), start);
        estimate.add(&exchange(-3_600_000, 30, 0, 30), start);
        assert_eq!(estimate.offset(), Some(-3_600_000 * MS));
        let turned = Exchange { heard: Timestamp(0), ..exchange(0, 1, 0, 1) };
        assert_eq!(turned.round_trip(), None);
        estimate.add(&turned, start);
        assert_eq!(estimate.offset(), Some(-3_600_000 * MS));
    }
}
