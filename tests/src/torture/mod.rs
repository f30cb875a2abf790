//! Two daemons that are killed at random instants under a random workload, and
//! everything that must hold all the same.
//!
//! A run has an initial sync that is interrupted, then rounds until its time is
//! up: writers write (`writers`), daemons are killed and started (`chaos`),
//! what is claimed is held against what is there (`witness`); then the writers
//! stop, the replica has to become identical, and a restart in quiet has to ship
//! nothing. What never changes (`ballast`) must never be written to again, and
//! what the daemons need (`vitals`) must not grow from round to round.
//!
//! A seed names the victims, the moments aimed at, the file systems and what the
//! writers do, although not the interleaving.

mod ballast;
mod chaos;
mod vitals;
mod witness;
mod writers;

use std::fmt;
use std::fs;
use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant};

use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};

use crate::compare;
use crate::hosts::{Hosts, Side};
use crate::mounts::FileSystem;
use crate::scenario::patience;
use ballast::Ballast;
use chaos::Chaos;
use vitals::Vitals;
use writers::Writers;

/// How long the writers of one round work.
const ROUND: Duration = Duration::from_secs(6);
/// The initial sync is interrupted at most so often.
const INITIAL_KILLS: u32 = 6;

/// What to do, and for how long.
#[derive(Clone, Copy, Debug)]
pub struct Torture {
    /// Names everything that is random.
    pub seed: u64,
    /// Rounds are begun for so long; at least one is.
    pub time: Duration,
}

impl Torture {
    /// `REPLICATOR_TORTURE_SECONDS` and `REPLICATOR_SEED`, or `seconds` and a
    /// seed of its own.
    pub fn from_environment(seconds: u64) -> Self {
        let number = |name| {
            let text = std::env::var(name).ok().filter(|text| !text.is_empty())?;
            Some(text.parse().unwrap_or_else(|_| panic!("{name}={text:?}: not a number")))
        };
        let time = number("REPLICATOR_TORTURE_SECONDS").unwrap_or(seconds);
        let seed = number("REPLICATOR_SEED").unwrap_or_else(rand::random);
        Self { seed, time: Duration::from_secs(time) }
    }

    /// Does it, and panics with what did not hold.
    pub fn run(self) {
        eprintln!("{self}");
        let mut run = Run::new(self);
        let end = Instant::now() + self.time;
        run.initial_sync();
        loop {
            run.round();
            if Instant::now() >= end {
                break;
            }
        }
        eprintln!("{self}: {} kills in {} rounds", run.chaos.kills, run.rounds);
    }
}

impl fmt::Display for Torture {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "torture for {} s, REPLICATOR_SEED={}", self.time.as_secs(), self.seed)
    }
}

/// A run that is under way.
struct Run {
    torture: Torture,
    chaos: Chaos,
    writers: Writers,
    ballast: Ballast,
    vitals: Vitals,
    source: PathBuf,
    replica: PathBuf,
    rounds: u64,
}

impl Run {
    fn new(torture: Torture) -> Self {
        let mut rng = StdRng::seed_from_u64(torture.seed);
        let kinds = [FileSystem::Ext4, FileSystem::Xfs, FileSystem::Btrfs];
        let mut kind = || *kinds.choose(&mut rng).unwrap();
        let mut hosts = Hosts::strangers_on(kind(), kind());
        if torture.time > Duration::from_secs(60) {
            hosts.give_up_share();
        }
        let source = hosts.source().join("source");
        let outside = hosts.source().join("outside");
        let replica = hosts.replica().to_owned();
        for directory in [&source, &outside] {
            fs::create_dir(directory).unwrap();
        }
        Self {
            torture,
            ballast: Ballast::write(&source, &replica),
            writers: Writers::new(&source, &outside, rng.random()),
            chaos: Chaos::new(hosts, &replica, rng),
            vitals: Vitals::default(),
            source,
            replica,
            rounds: 0,
        }
    }

    /// Killed while the initial sync is under way, again and again.
    fn initial_sync(&mut self) {
        let hosts = &self.chaos.hosts;
        hosts.create(&self.source, &hosts.token(&[])).success();
        for _ in 0..INITIAL_KILLS {
            self.chaos.strike(&self.writers.stamper, Duration::from_secs(2));
            self.ballast.check();
        }
        self.settle("the initial sync");
        self.ballast.settled();
    }

    fn round(&mut self) {
        self.rounds += 1;
        let end = Instant::now() + ROUND;
        thread::scope(|scope| {
            let writers = self.writers.start(scope, self.rounds, end);
            while Instant::now() < end {
                self.chaos.strike(&self.writers.stamper, end - Instant::now());
                self.ballast.check();
            }
            for writer in writers {
                writer.join().unwrap_or_else(|_| panic!("a writer failed"));
            }
        });
        self.settle("the workload");
        self.chaos.held(&self.writers.stamper);
        self.quiet_restart();
        self.ballast.check();
        self.vitals.check(&self.chaos.hosts);
    }

    /// Both sides run, all is replicated, and source and replica are the same.
    fn settle(&mut self, after: &str) {
        self.chaos.revive();
        let begin = Instant::now();
        self.chaos.hosts.daemon(Side::Source).wait(patience());
        eprintln!(
            "settled after {after} in {:?}, {} kills so far",
            begin.elapsed(),
            self.chaos.kills
        );
        let Self { torture, rounds, .. } = self;
        let context = format!("after {after} of round {rounds}, {torture}");
        compare::assert_same(&self.source, &self.replica, &context);
    }

    /// What was acknowledged is not sent again: killed and started in quiet,
    /// not a byte of content travels and nothing in the replica is replaced.
    fn quiet_restart(&mut self) {
        let before = ballast::touched(&self.replica);
        let shipped = self.shipped();
        for side in [Side::Source, Side::Destination] {
            self.chaos.kill(side);
        }
        self.settle("a restart in quiet");
        ballast::assert_untouched(&before, &ballast::touched(&self.replica));
        let after = self.shipped();
        // Counters may go on after a restart or begin anew.
        let again = after.checked_sub(shipped).unwrap_or(after);
        assert_eq!(again, 0, "bytes shipped again by a restart in quiet, {}", self.torture);
    }

    fn shipped(&self) -> u64 {
        self.chaos.hosts.daemon(Side::Source).counters().bytes_shipped
    }
}
