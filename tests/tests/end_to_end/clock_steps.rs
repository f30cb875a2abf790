//! The wall clock of either side is set, forth and back, by an hour, under the
//! running daemons: the watermark does not move back, does not claim what the
//! source's clock has not shown, and claims nothing that is not there.
//!
//! Only the daemons' reading of the clock is set. What the kernel stamps on files
//! stays true, so files look an hour older or younger than the daemon's time:
//! what follows from change times is put to the test as well.

use std::thread;
use std::time::{Duration, Instant};

use replicator_common::status::Status;
use replicator_common::time::Timestamp;
use replicator_tests::hosts::{Hosts, Side};
use replicator_tests::scenario::patience;
use replicator_tests::stamps::Stamper;

const HOUR: i64 = 3600;
/// How far a second look at a clock may come after the first.
const SLACK: f64 = 60.0;

struct Run {
    hosts: Hosts,
    stamper: Stamper,
    /// The highest claim so far, of each side's status.
    claims: [Timestamp; 2],
    files: u64,
}

impl Run {
    fn new() -> Self {
        let hosts = Hosts::with_clocks().enrol();
        let stamper = Stamper::new(hosts.source());
        Self { hosts, stamper, claims: [Timestamp::NEVER; 2], files: 0 }
    }

    fn status(&self, side: Side) -> Status {
        self.hosts.daemon(side).status()
    }

    /// The claim of one side's status, held against all that it must hold.
    #[track_caller]
    fn check(&mut self, side: Side) -> Timestamp {
        // Between the daemon's word and the look at the replica more may come;
        // never less.
        let status = self.status(side);
        let source = status.source.as_ref().map(|source| source.watermark);
        let destination = status.destination.as_ref().expect("it has reported");
        let claim = match side {
            Side::Source => source.expect("it is the source"),
            Side::Destination => destination.last_replicated.expect("it is ENABLED"),
        };
        let last = &mut self.claims[side as usize];
        assert!(claim >= *last, "{side:?}: the watermark moved back from {last} to {claim}");
        *last = claim;
        let broken = self.stamper.broken_claims(self.hosts.replica(), claim);
        assert!(broken.is_empty(), "{side:?}: {claim} was claimed, but:\n{}", broken.join("\n"));
        claim
    }

    /// Writes and looks for a while, with both statuses; gives the last claim.
    #[track_caller]
    fn go_on(&mut self) -> Timestamp {
        for _ in 0..8 {
            for _ in 0..5 {
                self.files += 1;
                let name = format!("directory-{}/file-{}", self.files % 3, self.files);
                self.stamper.write(&name, 1).unwrap();
                let name = format!("directory/slot-{}", self.files % 7);
                self.stamper.write(&name, self.files).unwrap();
            }
            self.check(Side::Source);
            self.check(Side::Destination);
            thread::sleep(Duration::from_millis(100));
        }
        self.hosts.settle(&"written while the clocks were set");
        self.check(Side::Source).max(self.check(Side::Destination))
    }

    /// No claim is of a moment that the source's clock has not shown.
    #[track_caller]
    fn assert_not_ahead(&self, claim: Timestamp) {
        let now = self.stamper.now();
        assert!(claim <= now, "{claim} was claimed at {now}");
    }

    /// Waits until the destination's claim is past what the source's clock shows
    /// now: the watermark moves.
    #[track_caller]
    fn assert_moves_on(&mut self) {
        let (now, start) = (self.stamper.now(), Instant::now());
        while self.check(Side::Destination) <= now || self.check(Side::Source) <= now {
            assert!(start.elapsed() < patience(), "the watermark does not reach {now}");
            thread::sleep(Duration::from_millis(50));
        }
        let claim = self.check(Side::Source);
        self.assert_not_ahead(claim);
    }

    /// TimeSinceLastSync comes to be less than a minute more than `most`, and is
    /// never below nothing.
    #[track_caller]
    fn assert_age(&self, most: Duration) {
        let (start, most) = (Instant::now(), most.as_secs_f64() + SLACK);
        loop {
            let destination = self.status(Side::Destination).destination;
            let age = destination.and_then(|one| one.time_since_last_sync).expect("it is known");
            assert!(age >= 0.0);
            if age < most {
                return;
            }
            // The clocks are compared with the next report.
            assert!(start.elapsed() < patience(), "TimeSinceLastSync is {age} s");
            thread::sleep(Duration::from_millis(50));
        }
    }

    fn set(&mut self, side: Side, ahead: i64) {
        self.hosts.set_clock(side, ahead);
        if side == Side::Source {
            self.stamper.set_clock(ahead);
        }
        // Else nothing is shown.
        let start = Instant::now();
        loop {
            let status = self.status(side);
            let shown = match side {
                Side::Source => status.source.map(|one| one.time),
                Side::Destination => status.destination.map(|one| one.time),
            };
            let expected = Timestamp::now().offset(ahead * 1_000_000_000);
            let apart = shown.map(|shown| shown.0.abs_diff(expected.0));
            if apart.is_some_and(|apart| apart < 60_000_000_000) {
                return;
            }
            assert!(start.elapsed() < patience(), "{side:?} shows {shown:?}, not {expected}");
            thread::sleep(Duration::from_millis(50));
        }
    }

    /// A restart compares change times, which are true, with what the source
    /// remembers from its own clock.
    #[track_caller]
    fn restart(&mut self, side: Side) {
        self.hosts.kill(side);
        self.hosts.start(side);
        self.hosts.await_enabled(Side::Source);
        self.hosts.settle(&"after a restart");
    }
}

#[test]
fn the_source_s_clock_steps_forth() {
    let mut run = Run::new();
    run.go_on();
    run.set(Side::Source, HOUR);
    let claim = run.go_on();
    run.assert_not_ahead(claim);
    run.assert_moves_on();
    run.assert_age(Duration::ZERO);
    run.restart(Side::Source);
    run.go_on();
    run.assert_moves_on();
    run.assert_age(Duration::ZERO);
}

#[test]
fn the_source_s_clock_steps_back() {
    let mut run = Run::new();
    run.go_on();
    run.set(Side::Source, -HOUR);
    let (stepped, held) = (Instant::now(), run.claims[0].max(run.claims[1]));
    // What is written from now on has stamps that were claimed before: there the
    // watermark says nothing, only `wait` does (in `go_on`).
    run.stamper.forget();
    thread::sleep(Duration::from_secs(2));
    let latest = run.check(Side::Source).max(run.check(Side::Destination));
    let reading = Duration::from_secs(5);
    assert!(latest.since(held) < reading, "{latest} is not of before the step, {held}");
    for _ in 0..2 {
        for number in 0..10 {
            run.files += 1;
            let name = format!("back/file-{}-{number}", run.files);
            run.stamper.write(&name, 1).unwrap();
        }
        run.hosts.settle(&"written after the step");
        run.stamper.forget();
        assert_eq!(run.check(Side::Source), latest, "it stands until the clock has passed it");
        assert_eq!(run.check(Side::Destination), latest);
        let message = run.status(Side::Source).status_message.unwrap_or_default();
        assert!(message.contains("set back"), "it says so: {message:?}");
        // It stands, and its age says so.
        run.assert_age(stepped.elapsed());
        run.restart(Side::Source);
    }
    // The clock is put right: it is past the claim at once.
    run.set(Side::Source, 0);
    run.go_on();
    run.assert_moves_on();
    run.assert_age(Duration::ZERO);
}

#[test]
fn the_destination_s_clock_steps_forth_and_back() {
    let mut run = Run::new();
    for ahead in [HOUR, -HOUR, 0] {
        run.go_on();
        run.set(Side::Destination, ahead);
        let claim = run.go_on();
        // The destination's clock is no measure of what the source did.
        run.assert_not_ahead(claim);
        run.assert_moves_on();
        run.assert_age(Duration::ZERO);
    }
    run.set(Side::Destination, -HOUR);
    run.restart(Side::Destination);
    run.go_on();
    run.assert_moves_on();
    run.assert_age(Duration::ZERO);
}
