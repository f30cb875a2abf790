use proptest::prelude::*;

use super::*;
use crate::api::fake::status;

const HOLD: Duration = Duration::from_secs(60);
const RULE: Rule = Rule { lag: 300.0, hold: HOLD };

/// Virtual time, one configuration, one look a second.
struct World {
    watch: Watch,
    start: Instant,
    second: u64,
    told: Vec<(u64, Kind, Option<Kind>)>,
}

impl World {
    fn new() -> Self {
        let watch = Watch::new(Side::Source, RULE);
        Self { watch, start: Instant::now(), second: 0, told: Vec::new() }
    }

    /// A second passes, with this status and lag (`None`: no initial sync yet).
    fn pass(&mut self, word: ReplicationStatus, lag: Option<u64>) {
        self.second += 1;
        let time = Timestamp(self.second as i64 * 1_000_000_000);
        let mut one = status(1);
        one.status = word;
        one.source.as_mut().unwrap().watermark =
            lag.map_or(Timestamp::NEVER, |lag| time.offset(-(lag as i64) * 1_000_000_000));
        let now = self.start + Duration::from_secs(self.second);
        for event in self.watch.look(&[one], now, time) {
            self.told.push((self.second, event.kind, event.recovered_from));
        }
    }

    fn pass_many(&mut self, seconds: u64, word: ReplicationStatus, lag: Option<u64>) {
        for _ in 0..seconds {
            self.pass(word, lag);
        }
    }
}

use ReplicationStatus::{Deleting, Enabled, Enabling, Error, Halted, Paused};

#[test]
fn an_error_is_told_at_once_and_its_end_when_it_lasts() {
    let mut world = World::new();
    world.pass_many(10, Enabled, Some(1));
    world.pass_many(5, Error, Some(1));
    world.pass_many(100, Enabled, Some(1));
    assert_eq!(world.told, [(11, Kind::Error, None), (76, Kind::Recovered, Some(Kind::Error))]);
}

#[test]
fn an_error_that_comes_and_goes_is_told_once() {
    let mut world = World::new();
    for _ in 0..50 {
        world.pass_many(3, Error, Some(1));
        world.pass_many(30, Enabled, Some(1));
    }
    assert_eq!(world.told, [(1, Kind::Error, None)]);
}

#[test]
fn a_halt_is_no_error() {
    let mut world = World::new();
    world.pass_many(5, Halted, Some(1));
    world.pass_many(70, Enabled, Some(1));
    assert_eq!(world.told, [(1, Kind::Halted, None), (66, Kind::Recovered, Some(Kind::Halted))]);
}

#[test]
fn a_lag_is_told_when_it_lasts() {
    let mut world = World::new();
    world.pass_many(59, Enabled, Some(400));
    world.pass_many(1, Enabled, Some(300));
    assert_eq!(world.told, [], "not above the threshold for long enough");
    world.pass_many(61, Enabled, Some(301));
    assert_eq!(world.told, [(121, Kind::Lag, None)]);
    // Below the threshold, but not by much: it is not over.
    world.pass_many(600, Enabled, Some(200));
    assert_eq!(world.told.len(), 1);
    world.pass_many(61, Enabled, Some(150));
    assert_eq!(world.told[1..], [(782, Kind::Recovered, Some(Kind::Lag))]);
}

#[test]
fn a_lag_around_the_threshold_is_told_once() {
    let mut world = World::new();
    world.pass_many(100, Enabled, Some(310));
    for _ in 0..100 {
        world.pass_many(7, Enabled, Some(310));
        world.pass_many(70, Enabled, Some(290));
    }
    assert_eq!(world.told.len(), 1, "{:?}", world.told);
}

#[test]
fn pausing_neither_lags_nor_recovers() {
    let mut world = World::new();
    world.pass_many(600, Paused, Some(4000));
    assert_eq!(world.told, []);
    world.pass_many(100, Enabled, Some(4000));
    world.pass_many(600, Paused, Some(10));
    assert_eq!(world.told.len(), 1, "{:?}", world.told);
}

#[test]
fn the_initial_sync_has_no_lag() {
    let mut world = World::new();
    world.pass_many(10_000, Enabling, None);
    assert_eq!(world.told, []);
}

#[test]
fn a_failover_is_no_recovery() {
    let mut world = World::new();
    world.pass_many(5, Error, Some(1));
    world.pass_many(600, Deleting, Some(1));
    assert_eq!(world.told, [(1, Kind::Error, None)]);
    // Deleted, and something else of that name: nothing is remembered.
    let now = world.start + Duration::from_secs(9999);
    assert_eq!(world.watch.look(&[], now, Timestamp(0)), []);
    world.pass(Error, Some(1));
    assert_eq!(world.told.len(), 2);
}

#[test]
fn a_message_is_cut_between_characters() {
    let mut one = status(1);
    one.status = Error;
    one.status_message = Some("ä".repeat(MESSAGE_MAX));
    let mut watch = Watch::new(Side::Source, RULE);
    let events = watch.look(&[one], Instant::now(), Timestamp(0));
    assert_eq!(events[0].message.len(), MESSAGE_MAX);
    assert_eq!(events[0].status, "ERROR");
}

proptest! {
    /// Whatever happens: alarms and their ends take turns, an end never comes
    /// sooner than the hold after it, and what lasts is told.
    #[test]
    fn alarms_and_ends_take_turns(steps in prop::collection::vec((0_usize..4, 1_u64..200, 0_u64..500), 1..60)) {
        let mut world = World::new();
        for (word, seconds, lag) in steps {
            world.pass_many(seconds, [Enabled, Error, Halted, Paused][word], Some(lag));
        }
        for kind in [Kind::Error, Kind::Halted, Kind::Lag] {
            let mut raised: Option<u64> = None;
            for (second, told, from) in &world.told {
                if *told == kind {
                    prop_assert!(raised.is_none());
                    raised = Some(*second);
                } else if *from == Some(kind) {
                    let since = raised.take();
                    prop_assert!(since.is_some_and(|since| second - since >= HOLD.as_secs()));
                }
            }
        }
        world.pass_many(61, Enabled, Some(0));
        let ends = world.told.iter().filter(|(_, kind, _)| *kind == Kind::Recovered).count();
        prop_assert_eq!(ends * 2, world.told.len(), "all is over: {:?}", world.told);
    }
}
