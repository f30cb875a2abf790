//! One run: what happens next is drawn from the seed.

use std::collections::BTreeMap;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use replicator_common::time::Timestamp;

use crate::destination::{Destination, Died, Point, Records};
use crate::net::Wire;
use crate::source::{Journal, Source};
use crate::store::Store;
use crate::tree::{Model, Stop};
use crate::world::World;
use crate::{check, failover};

/// Steps at most until all is quiet at the end.
const PATIENCE: u32 = 20_000;

/// How often what goes wrong, in thousandths of steps.
#[derive(Clone, Copy, Debug)]
struct Faults {
    cut: u32,
    overflow: u32,
    source: u32,
    destination: u32,
    disk: u32,
    back: u32,
}

/// What was saved of the source, and of the destination.
type Saved = (Option<(Store, Journal)>, Option<(Records, Model)>);

/// A run.
pub struct Run {
    random: StdRng,
    world: World,
    wires: BTreeMap<u64, Wire>,
    source: Source,
    destination: Destination,
    faults: Faults,
    steps: u32,
    /// What was saved, to be put back.
    saved: Saved,
    /// A side was set back: what it had acknowledged is not there any more.
    back: bool,
}

/// Runs a seed to its end. Panics where a promise is broken.
pub fn run(seed: u64) -> u32 {
    let mut run = Run::new(seed);
    let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| run.all()));
    if let Err(reason) = result {
        run.tell(seed);
        std::panic::resume_unwind(reason);
    }
    run.steps
}

impl Run {
    fn new(seed: u64) -> Self {
        let mut random = StdRng::seed_from_u64(seed);
        let mut rate =
            |most: u32| if random.random_bool(0.5) { random.random_range(0..most) } else { 0 };
        let faults = Faults {
            cut: rate(20),
            overflow: rate(10),
            source: rate(15),
            destination: rate(20),
            disk: rate(30),
            back: rate(6),
        };
        Self {
            random,
            world: World::new(),
            wires: BTreeMap::new(),
            source: Source::new(),
            destination: Destination::new(),
            faults,
            steps: 0,
            saved: (None, None),
            back: false,
        }
    }

    fn all(&mut self) {
        for _ in 0..self.random.random_range(0..40) {
            self.world.act(&mut self.random);
            self.pass();
        }
        let steps = self.random.random_range(50..500);
        for _ in 0..steps {
            self.pass();
            if self.random.random_range(0..100) < 30 {
                self.change();
            } else {
                self.go_on();
            }
            self.go_wrong();
            self.check();
            if self.random.random_bool(0.02) {
                self.fail_over();
            }
        }
        self.end();
    }

    fn pass(&mut self) {
        self.steps += 1;
        let nanos = match self.random.random_range(0..50) {
            0 => 3_000_000_000,
            1..10 => self.random.random_range(1..300_000_000),
            _ => self.random.random_range(1..5_000_000),
        };
        self.world.pass(nanos);
    }

    fn change(&mut self) {
        if self.random.random_bool(0.2) {
            self.world.finish_call(&mut self.random);
        } else {
            self.world.act(&mut self.random);
        }
    }

    /// One of those who have something to do does some of it.
    fn go_on(&mut self) {
        match self.random.random_range(0..100) {
            0..10 if self.source.runs() => {
                let most = self.random.random_range(1..6);
                self.source.capture(&mut self.world, most);
            }
            0..10 => self.source.start(&self.world),
            10..25 => self.source.link(&mut self.wires),
            25..55 => self.source.work(&mut self.world, &mut self.wires, &mut self.random),
            55..60 if !self.destination.runs() => self.destination.start(),
            55..80 => {
                let taken = self.destination.take(&mut self.wires, &mut self.random);
                self.survive(taken);
            }
            _ => {
                let worked = self.destination.work(&mut self.wires, &mut self.random);
                self.survive(worked);
            }
        }
    }

    fn survive(&mut self, result: Result<(), Died>) {
        if result.is_err() {
            self.kill_destination();
        }
    }

    fn kill_destination(&mut self) {
        let power = self.random.random_bool(0.5);
        self.destination.crash(power, &mut self.random);
        for wire in self.wires.values_mut() {
            wire.cut(&mut self.random);
            wire.up.clear();
            wire.data.iter_mut().for_each(std::collections::VecDeque::clear);
        }
    }

    fn kill_source(&mut self) {
        let power = self.random.random_bool(0.5);
        let Self { source, world, wires, random, .. } = self;
        source.crash(power, world, wires, random);
    }

    fn go_wrong(&mut self) {
        let faults = self.faults;
        let happens = |random: &mut StdRng, rate: u32| random.random_range(0..1000) < rate;
        if happens(&mut self.random, faults.cut) {
            let cut = self.wires.values_mut().next_back();
            cut.into_iter().for_each(|wire| wire.cut(&mut self.random));
        }
        if happens(&mut self.random, faults.overflow) {
            self.world.overflow();
        }
        if happens(&mut self.random, faults.source) && self.source.runs() {
            self.kill_source();
        }
        if happens(&mut self.random, faults.destination) && self.destination.runs() {
            match self.random.random_range(0..7) {
                0 => self.kill_destination(),
                1 => self.destination.die_at = Some(Point::Staged),
                2 => self.destination.die_at = Some(Point::Synced),
                3 => self.destination.die_at = Some(Point::Committed),
                4 => self.destination.die_at = Some(Point::Applied),
                _ => {
                    self.destination.tree.fuse =
                        Some((self.random.random_range(0..12), Stop::Crash))
                }
            }
        }
        if happens(&mut self.random, faults.disk) && self.destination.runs() {
            match self.random.random_bool(0.4) {
                true => self.destination.sync_fails = true,
                false => {
                    self.destination.tree.fuse = Some((self.random.random_range(0..8), Stop::Disk))
                }
            }
        }
        if happens(&mut self.random, faults.back) {
            self.set_back();
        }
        while self.wires.len() > 4 {
            self.wires.pop_first();
        }
    }

    /// Saves the state of a side, or puts back what was saved.
    fn set_back(&mut self) {
        match self.random.random_range(0..6) {
            0 => self.saved.0 = Some(self.source.save()),
            1 => {
                let (records, mut tree) =
                    (self.destination.durable.clone(), self.destination.tree.clone());
                tree.cut(&mut self.random);
                self.saved.1 = Some((records, tree));
            }
            2 | 3 => {
                let Some(saved) = self.saved.0.take() else { return };
                self.back = true;
                self.kill_source();
                self.source.restore(saved);
            }
            which => {
                let Some((records, tree)) = self.saved.1.take() else { return };
                self.back = true;
                self.kill_destination();
                let both = self.random.random_bool(0.4);
                self.destination.set_back(
                    (both || which == 4).then_some(records),
                    (both || which == 5).then_some(tree),
                );
            }
        }
    }

    /// Fails over here, on a copy.
    fn fail_over(&mut self) {
        let Self { destination, random, world, source, .. } = self;
        if destination.is_sound() {
            let (store, durable) = (&destination.now, &destination.durable);
            let over = failover::run(&destination.tree, store, durable, random);
            check::handed_over(world, source, &over);
        }
    }

    fn check(&mut self) {
        if self.back {
            self.source.trims.clear();
        } else {
            check::forgotten(&mut self.source, &self.destination);
        }
        if !std::mem::take(&mut self.destination.settled) {
            return;
        }
        check::truth(&self.world, &self.destination);
        if self.destination.is_distrusted() {
            return;
        }
        check::between_batches(&self.source, &self.destination);
        check::exact(&self.world, &self.source, &self.destination);
    }

    /// Faults end, changes end, and all becomes quiet.
    fn end(&mut self) {
        self.world.finish_calls();
        self.destination.sync_fails = false;
        self.destination.die_at = None;
        self.destination.tree.fuse = None;
        let quiet = self.world.now;
        for _ in 0..PATIENCE {
            self.pass();
            self.go_on();
            self.check();
            let idle = self.source.is_idle(&self.world) && self.destination.is_idle();
            if idle && self.destination.told.watermark > Timestamp(quiet) {
                check::converged(&self.world, &self.destination);
                assert!(
                    self.source.told > Timestamp(quiet)
                        || self.source.told <= self.destination.told.watermark
                );
                return;
            }
        }
        panic!(
            "never quiet, watermark {:?} of {quiet}: {}",
            self.destination.told.watermark,
            self.source.describe()
        );
    }

    fn tell(&self, seed: u64) {
        eprintln!("seed {seed} failed at step {}, {:?}", self.steps, self.faults);
        for (who, log) in [
            ("source's file system", &self.world.log),
            ("source", &self.source.log),
            ("destination", &self.destination.log),
        ] {
            eprintln!("-- {who}:");
            log.iter().for_each(|line| eprintln!("   {line}"));
        }
        eprintln!("replay: just simulate-one {seed}");
    }
}
