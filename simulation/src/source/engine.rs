//! The engine's loop, and what a session's begin and end mean to it.

use std::collections::BTreeMap;
use std::sync::atomic::Ordering;

use rand::Rng;
use rand::rngs::StdRng;
use replicator_common::id::{BatchId, Edition, Incarnation, ObjectId};
use replicator_common::time::Timestamp;
use replicator_src::index::{Index, Mark, View};
use replicator_src::ledger::{Gap, Memory, Owed, take_back};
use replicator_src::plan::Dirty;

use super::{Engine, Event, Expected, IN_FLIGHT, Source};
use crate::net::{Down, Wire};
use crate::world::{ROOT, World, id};

impl Source {
    /// One step of the engine's loop.
    pub fn work(
        &mut self,
        world: &mut World,
        wires: &mut BTreeMap<u64, Wire>,
        random: &mut StdRng,
    ) {
        self.hands.store(world.now, Ordering::Relaxed);
        let Some(engine) = &mut self.engine else { return };
        if engine.draft.is_some() {
            return self.go_on(world, wires, random);
        }
        if let Some(event) = engine.inbox.pop_front() {
            return self.event(event, wires);
        }
        if random.random_bool(0.3) {
            self.lane(world, wires, random);
        }
        self.look_ahead();
        let engine = self.engine();
        if random.random_bool(0.2) && engine.flights.is_empty() {
            engine.index.merge().unwrap();
        }
        let walked = engine.gap.is_some();
        let heartbeat = world.now - engine.last_build > 1_000_000_000 && engine.flights.is_empty();
        let due = !engine.dirty.is_empty() || engine.leaving || walked || heartbeat;
        if engine.session.is_some() && engine.flights.len() < IN_FLIGHT && due {
            self.begin(world, random);
        }
    }

    /// Whether everything that was journaled is in the replica.
    pub fn is_idle(&self, world: &World) -> bool {
        self.engine.as_ref().is_some_and(|engine| {
            let quiet = engine.dirty.is_empty() && engine.draft.is_none() && engine.gap.is_none();
            let through = engine.flights.is_empty() && engine.holds.is_empty();
            let orphans = engine.index.orphans().unwrap();
            quiet && through && orphans.is_empty() && world.events.is_empty()
        })
    }

    pub(super) fn event(&mut self, event: Event, wires: &mut BTreeMap<u64, Wire>) {
        match event {
            Event::Connected { number, incarnation, committed } => {
                self.connected(number, incarnation, committed, wires);
            }
            Event::Lost(number) => {
                let engine = self.engine();
                if engine.session == Some(number) {
                    engine.session = None;
                    self.reset_transfers();
                }
            }
            Event::Message(number, _) if self.engine().session != Some(number) => {}
            Event::Message(_, Down::Durable(batch)) => self.engine().flights.durable(batch),
            Event::Message(_, Down::Applied(batch)) => self.applied(batch),
            Event::Message(_, Down::Transferred(transfer)) => self.transfer_arrived(transfer),
            Event::Message(_, Down::Hello { .. }) => panic!("hello said twice"),
        }
    }

    pub(super) fn connected(
        &mut self,
        number: u64,
        life: Incarnation,
        committed: Edition,
        wires: &mut BTreeMap<u64, Wire>,
    ) {
        let tables = self.store.read();
        let pending = tables.pending.iter().map(|delta| delta.mark.edition()).collect();
        let merged = self.engine().index.acknowledged().unwrap_or(tables.mark).edition();
        let memory = Memory { peer: tables.peer, merged, pending };
        if !memory.agrees(life, committed) {
            if let Some(wire) = wires.get_mut(&number) {
                wire.hang_up();
            }
            return self.distrust();
        }
        if tables.peer != Some(life) {
            self.store.set_peer(life);
        }
        self.settle(committed.batch);
        let engine = self.engine();
        engine.next_batch = committed.batch.next();
        engine.session = Some(number);
    }

    pub(super) fn distrust(&mut self) {
        self.lives += 1;
        let life = Incarnation([self.lives; 16]);
        self.say(|| "a new life".to_owned());
        self.store.reset(life);
        self.expected.insert((life.0, Edition::default()), Expected::default());
        self.told = Timestamp::NEVER;
        self.reset_transfers();
        let (store, greeting) = (self.store.clone(), self.greeting());
        let engine = self.engine();
        engine.index = Index::new(store).unwrap();
        engine.flights.clear();
        engine.holds.clear();
        engine.dirty = Dirty::default();
        engine.covered = Timestamp::NEVER;
        engine.reached = Timestamp::NEVER;
        engine.owed = Owed::default();
        engine.seen = Timestamp::NEVER;
        engine.claimed = Timestamp::NEVER;
        engine.totals = Mark { seq: engine.totals.seq, ..Mark::default() };
        engine.next_batch = BatchId(1);
        engine.gap = None;
        engine.greeting = greeting;
        self.open_gap("compared anew");
    }

    pub(super) fn settle(&mut self, committed: BatchId) {
        let engine = self.engine();
        engine.index.settle(committed).unwrap();
        let settled = engine.flights.settle(committed);
        for batch in settled.done {
            self.trim(&batch.mark);
        }
        let engine = self.engine();
        for mut batch in settled.lost {
            let floors = engine.holds.values_mut().map(|held| &mut held.floor);
            take_back(&mut batch, &mut engine.covered, &mut engine.gap, floors);
            engine.reached = engine.reached.min(batch.before);
            engine.dirty.merge(batch.input);
        }
        self.forget_owed();
        let engine = self.engine();
        if engine.gap.is_some() {
            engine.dirty.walk_orphans(engine.orphans());
        }
        engine.leaving = engine.leaves();
        let mark = self.store.read().mark;
        let engine = self.engine();
        engine.totals = mark;
        engine.claimed = mark.watermark.unwrap_or(Timestamp::NEVER);
        self.tell(&mark);
        let greeting = self.greeting();
        self.engine().greeting = greeting;
    }

    pub(super) fn applied(&mut self, batch: BatchId) {
        let done = self.engine().flights.applied(batch);
        if done.iter().any(|done| !done.dropped.is_empty()) {
            self.forget_dropped();
        }
        let Some(mark) = done.last().map(|done| done.mark) else { return };
        self.engine().index.acknowledge(batch);
        self.trim(&mark);
        self.tell(&mark);
        let greeting = &mut self.engine().greeting;
        greeting.acknowledged = mark.edition();
        greeting.pending.retain(|pending| pending.batch > mark.batch);
    }

    pub(super) fn trim(&mut self, mark: &Mark) {
        self.journal.trim(mark.seq);
        self.trims.push(mark.batch);
    }

    pub(super) fn tell(&mut self, mark: &Mark) {
        self.told = self.told.max(mark.watermark.unwrap_or(Timestamp::NEVER));
    }

    pub(super) fn open_gap(&mut self, reason: &str) {
        let engine = self.engine();
        let now = engine.clock.now();
        if Gap::open(&mut engine.gap, reason.to_owned(), engine.covered, now) {
            self.start_walk();
        }
    }

    pub(super) fn start_walk(&mut self) {
        let engine = self.engine();
        let orphans = engine.orphans();
        engine.dirty.walk(id(ROOT), orphans);
    }
}

impl Engine {
    /// Whether trees that left are still to be taken apart.
    pub(super) fn leaves(&self) -> bool {
        self.index.orphans().unwrap().iter().any(|(_, orphan)| orphan.left)
    }

    /// Those that a walk is told of.
    fn orphans(&self) -> Vec<ObjectId> {
        let orphans = self.index.orphans().unwrap().into_iter();
        orphans.filter(|(_, orphan)| !orphan.left).map(|(one, _)| one).collect()
    }
}
