//! The source's sense of before and after (trap 17: the clock steps back).
//!
//! Everything that is ordered by time (barriers, floors, the watermark before
//! it is told to anybody, `wait`) is ordered by *internal moments*. They run
//! with the wall clock and equal it until it is set back; from then on they
//! are ahead of it by what it lost, so that they never step back themselves.
//! [`Clock::wall`] turns one back into what the wall clock showed.
//!
//! Change times of files are the wall clock's, and are compared with its
//! readings only.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use replicator_common::time::Timestamp;

/// Steps back that are remembered one by one; older ones are merged, to the
/// cautious side.
const STEPS: usize = 64;

/// Where the wall clock is read. Tests set their own back.
#[derive(Clone)]
pub struct Wall(Arc<dyn Fn() -> Timestamp + Send + Sync>);

impl Wall {
    /// Reads the wall clock by `read`.
    pub fn new(read: impl Fn() -> Timestamp + Send + Sync + 'static) -> Self {
        Self(Arc::new(read))
    }

    /// What it shows.
    pub fn now(&self) -> Timestamp {
        (self.0)()
    }
}

impl Default for Wall {
    fn default() -> Self {
        Self::new(Timestamp::now)
    }
}

impl fmt::Debug for Wall {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Wall")
    }
}

/// Makes internal moments. Shared by all threads of a replication.
#[derive(Debug, Default)]
pub struct Clock {
    wall: Wall,
    ticks: Mutex<Ticks>,
}

impl Clock {
    /// Runs with `wall`.
    pub fn new(wall: Wall) -> Self {
        Self { wall, ticks: Mutex::default() }
    }

    /// This internal moment: never before one that was given earlier.
    pub fn now(&self) -> Timestamp {
        // Read while locked: two readings must not change places.
        let mut ticks = self.ticks();
        ticks.read(self.wall.now())
    }

    /// What the wall clock showed at an internal moment of this process, or
    /// a little less; [`Timestamp::NEVER`] for one of a process before.
    pub fn wall(&self, moment: Timestamp) -> Timestamp {
        self.ticks().wall(moment)
    }

    /// From here on all moments are after `earlier`, which a process before
    /// this one left behind.
    pub fn begin_after(&self, earlier: Timestamp) {
        let mut ticks = self.ticks();
        *ticks = Ticks { last: ticks.last.max(earlier.offset(1)), epochs: Vec::new() };
    }

    fn ticks(&self) -> MutexGuard<'_, Ticks> {
        // No holder can panic halfway: each field is whole by itself.
        self.ticks.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The pure part.
#[derive(Debug)]
struct Ticks {
    /// The last moment given.
    last: Timestamp,
    /// From which moment on moments are ahead of the wall clock by how many
    /// nanoseconds. Both only grow.
    epochs: Vec<(Timestamp, i64)>,
}

impl Default for Ticks {
    fn default() -> Self {
        Self { last: Timestamp::NEVER, epochs: Vec::new() }
    }
}

impl Ticks {
    fn read(&mut self, wall: Timestamp) -> Timestamp {
        let ahead = self.epochs.last().map(|(_, ahead)| *ahead);
        let moment = wall.offset(ahead.unwrap_or(0));
        if ahead.is_none() || moment < self.last {
            let start = moment.max(self.last);
            self.epochs.push((start, start.0.saturating_sub(wall.0)));
            if self.epochs.len() > STEPS {
                // Of the two oldest, the later start and lead: what lies
                // before is taken for older than it is.
                self.epochs.remove(0);
            }
            self.last = start;
        } else {
            self.last = moment;
        }
        self.last
    }

    fn wall(&self, moment: Timestamp) -> Timestamp {
        let epoch = self.epochs.iter().rev().find(|(start, _)| *start <= moment);
        epoch.map_or(Timestamp::NEVER, |(_, ahead)| moment.offset(ahead.saturating_neg()))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicI64, Ordering};

    use super::*;

    fn set() -> (Arc<AtomicI64>, Clock) {
        let hands = Arc::new(AtomicI64::new(1000));
        let read = hands.clone();
        let wall = Wall::new(move || Timestamp(read.load(Ordering::Relaxed)));
        (hands, Clock::new(wall))
    }

    #[test]
    fn moments_are_the_wall_clocks_while_it_runs() {
        let (hands, clock) = set();
        for time in [1000, 1001, 1001, 5000] {
            hands.store(time, Ordering::Relaxed);
            let moment = clock.now();
            assert_eq!((moment, clock.wall(moment)), (Timestamp(time), Timestamp(time)));
        }
    }

    #[test]
    fn trap_17_moments_go_on_when_the_clock_steps_back() {
        let (hands, clock) = set();
        let before = clock.now();
        let mut last = before;
        for time in [400, 410, 100, 101, 90, 2000] {
            hands.store(time, Ordering::Relaxed);
            let moment = clock.now();
            assert!(moment >= last, "{time}: {moment:?} is before {last:?}");
            assert_eq!(clock.wall(moment), Timestamp(time), "as the wall clock shows");
            last = moment;
        }
        hands.store(2010, Ordering::Relaxed);
        assert_eq!(clock.now(), last.offset(10), "they run as the wall clock runs");
        assert_eq!(clock.wall(before.offset(-1)), Timestamp::NEVER);
    }

    #[test]
    fn trap_17_a_clock_set_back_while_nobody_ran_proves_nothing_of_before() {
        let (_, clock) = set();
        clock.begin_after(Timestamp(7000));
        let moment = clock.now();
        assert!(moment > Timestamp(7000));
        assert_eq!(clock.wall(moment), Timestamp(1000));
        assert_eq!(clock.wall(Timestamp(7000)), Timestamp::NEVER);
    }

    #[test]
    fn many_steps_are_merged_to_the_cautious_side() {
        let (hands, clock) = set();
        let mut seen = Vec::new();
        for step in 0..3 * STEPS as i64 {
            hands.store(1_000_000 - step * 100, Ordering::Relaxed);
            clock.now();
            hands.fetch_add(50, Ordering::Relaxed);
            seen.push((clock.now(), hands.load(Ordering::Relaxed)));
        }
        assert!(clock.ticks().epochs.len() <= STEPS);
        for (moment, time) in seen {
            assert!(clock.wall(moment) <= Timestamp(time), "claims more than was");
        }
    }
}
