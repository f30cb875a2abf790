//! A batch is built: looked at, read, assembled.

use std::collections::BTreeMap;

use foldhash::{HashMap, HashMapExt};
use rand::Rng;
use rand::rngs::StdRng;
use replicator_common::id::{BatchId, ObjectId, Seq};
use replicator_common::object::Kind;
use replicator_common::time::Timestamp;
use replicator_common::wire::ContentSource;
use replicator_src::index::{Content, Known, View};
use replicator_src::journal::Record;
use replicator_src::ledger::{Closing, Gap, Place, Span};
use replicator_src::plan::resolve::Budget;
use replicator_src::plan::waits::is_touched;
use replicator_src::plan::{
    Dirty, Limits, Listing, Meanwhile, Need, Outcome, Resolve, Settings, assemble,
};
use replicator_src::watcher::What;

use super::{APART, Draft, LARGE, OUTSIDE_AFTER, ROUNDS, Source, Transfer, content_of, is_ours};
use crate::net::{Data, Of, STREAMS, Wire};
use crate::world::{ROOT, World, id, inode};

impl Source {
    pub(super) fn begin(&mut self, world: &mut World, random: &mut StdRng) {
        let (seq, time) = self.barrier(world);
        self.engine().last_build = world.now;
        let mut draft = self.draft(random);
        draft.resolve.walking = self.engine().gap.is_some();
        draft.resolve.root = self.engine().leaves().then(|| id(ROOT));
        self.take_records(&mut draft);
        draft.span.reach(seq, time);
        let engine = self.engine();
        let held = engine.holds.values().flat_map(|held| &held.hold.entries);
        let waiting = held.chain(engine.owed.places()).cloned().collect();
        draft.resolve.waiting = engine.gap.is_some().then_some(waiting);
        if engine.index.object(&id(ROOT)).unwrap().is_none() {
            draft.resolve.begin_at(&id(ROOT));
        }
        draft.input = engine.dirty.clone();
        self.resolve(&mut draft, world);
        self.engine().draft = Some(draft);
    }

    pub(super) fn draft(&mut self, random: &mut StdRng) -> Draft {
        let engine = self.engine();
        let walked = engine.dirty.listings.is_empty();
        Draft {
            batch: engine.next_batch,
            resolve: Resolve::default(),
            outcomes: HashMap::new(),
            input: Dirty::default(),
            span: Span::new(engine.cursor, engine.covered.max(engine.seen), walked),
            version: 0,
            packed: 0,
            placed: BTreeMap::new(),
            budget: if random.random_bool(0.2) { random.random_range(1..5) } else { 1000 },
            round: 0,
            unread: Vec::new(),
        }
    }

    pub(super) fn take_records(&mut self, draft: &mut Draft) {
        let after = self.engine().cursor;
        let mut records = self.journal.read(after);
        let last = records.last().map(|(seq, _)| *seq);
        records.retain(|(_, record)| self.concerns(record));
        self.absorb(&records, draft);
        let engine = self.engine();
        engine.cursor = last.unwrap_or(engine.cursor);
        draft.span.seq = engine.cursor;
    }

    pub(super) fn concerns(&mut self, record: &Record) -> bool {
        let engine = self.engine();
        let object = match record {
            Record::Gap { .. } | Record::Barrier { .. } => return true,
            Record::Object { object, .. } if engine.holds.contains_key(object) => return true,
            Record::Object { object, .. } => object,
            Record::Entry { directory, .. } | Record::Named { directory, .. } => directory,
        };
        is_ours(&engine.index, &engine.flights, object)
    }

    pub(super) fn look_ahead(&mut self) {
        let engine = self.engine();
        let (cursor, walked) = (engine.cursor, engine.dirty.listings.is_empty());
        let span = Span::new(cursor, engine.covered.max(engine.seen), walked);
        if cursor.0 < self.journal.last {
            let mut draft = Draft {
                batch: BatchId(0),
                resolve: Resolve::default(),
                outcomes: HashMap::new(),
                input: Dirty::default(),
                span,
                version: 0,
                packed: 0,
                placed: BTreeMap::new(),
                budget: 0,
                round: 0,
                unread: Vec::new(),
            };
            self.take_records(&mut draft);
            let engine = self.engine();
            engine.seen = engine.seen.max(draft.span.time);
        }
    }

    pub(super) fn absorb(&mut self, records: &[(Seq, Record)], draft: &mut Draft) {
        for (seq, record) in records {
            match record {
                Record::Gap { reason } => self.open_gap(reason),
                Record::Barrier { time } => {
                    let inherited = self.engine().inherited;
                    draft.span.pass(*seq, *time, inherited);
                }
                other => {
                    let engine = self.engine();
                    for (object, held) in &mut engine.holds {
                        held.touched |= is_touched(other, object, &held.hold.entries, None);
                    }
                    engine.dirty.absorb(other);
                }
            }
            self.engine().cursor = *seq;
        }
        draft.span.seq = self.engine().cursor;
    }

    pub(super) fn resolve(&mut self, draft: &mut Draft, world: &mut World) {
        let engine = self.engine.as_mut().unwrap();
        let objects = draft.budget;
        let budget = Budget {
            objects,
            entries: objects * 2,
            compared: objects * 4,
            bytes: u64::MAX,
            large: 0,
        };
        draft.resolve.feed(&mut engine.dirty, budget, &engine.index, world).unwrap();
        draft.version += 1;
        for (object, need) in draft.resolve.asked.take() {
            if !self.take_ready(draft, &object, &need, world) {
                draft.unread.push((object, need));
            }
        }
    }

    /// The next step of a batch that is being built.
    pub(super) fn go_on(
        &mut self,
        world: &mut World,
        wires: &mut BTreeMap<u64, Wire>,
        random: &mut StdRng,
    ) {
        let Some(mut draft) = self.engine().draft.take() else { return };
        let some = random.random_range(1..=4).min(draft.unread.len());
        for (object, need) in draft.unread.drain(..some).collect::<Vec<_>>() {
            if !self.read(&mut draft, object, &need, world, wires, random) {
                return self.give_up(draft);
            }
        }
        if !draft.unread.is_empty() {
            self.engine().draft = Some(draft);
            return;
        }
        let gap = self.engine().gap.is_some();
        let nothing = draft.resolve.bindings.is_empty() && draft.resolve.asked.is_empty();
        if gap || !draft.span.reached || nothing {
            draft.span.exact = !gap && draft.span.reached;
            return self.finish(draft, world, wires);
        }
        let (seq, time) = self.barrier(world);
        let after = self.engine().cursor;
        let records = self.journal.read(after);
        draft.round += 1;
        match draft.resolve.meanwhile(records.iter().map(|(_, record)| record)) {
            Meanwhile::Untouched => {
                draft.span.exact = true;
                return self.finish(draft, world, wires);
            }
            Meanwhile::Touched if draft.round < ROUNDS => {}
            Meanwhile::Touched | Meanwhile::Lost => return self.finish(draft, world, wires),
        }
        self.absorb(&records, &mut draft);
        draft.span.reach(seq, time);
        draft.input.merge(self.engine().dirty.clone());
        self.resolve(&mut draft, world);
        self.engine().draft = Some(draft);
    }

    /// Reads one object; false when the session is gone.
    pub(super) fn read(
        &mut self,
        draft: &mut Draft,
        object: ObjectId,
        need: &Need,
        world: &World,
        wires: &mut BTreeMap<u64, Wire>,
        random: &mut StdRng,
    ) -> bool {
        let n = inode(&object);
        let engine = self.engine();
        let old = if need.new { None } else { engine.index.object(&object).unwrap() };
        if !world.inodes.contains_key(&n) {
            draft.outcomes.insert(object, Outcome::Gone);
            return true;
        }
        let state = world.state(n);
        let file = state.kind == Kind::File;
        let known = old.as_ref();
        let content = file
            && (need.content
                || known
                    .is_some_and(|known| known.state.attributes.mtime != state.attributes.mtime));
        if content && n.is_multiple_of(LARGE) {
            draft.outcomes.insert(object, Outcome::Large { size: 4 });
            return true;
        }
        if file && !content && known.is_none() {
            draft.outcomes.insert(object, Outcome::Gone);
            return true;
        }
        let read = content_of(world, n);
        let mut new = Known {
            state: state.clone(),
            ctime: world.changed(n),
            read_at: Timestamp(world.now),
            version: known.map_or(draft.batch, |known| known.version),
            content: if file { read } else { Content::None },
            entry: None,
            links: 0,
            nlink: world.links(n) as u32,
        };
        if file && !content {
            new.content = known.unwrap().content.clone();
            new.read_at = new.ctime;
        }
        let travels = content && known.is_none_or(|known| known.content != new.content);
        let outcome = if travels {
            new.version = draft.batch;
            let version = draft.version;
            draft.packed += 1;
            let of = Of::Batch(draft.batch, version);
            let data =
                Data { of, object: object.clone(), state, content: world.inodes[&n].body.content };
            let session = engine.session.and_then(|number| wires.get_mut(&number));
            let Some(wire) = session.filter(|wire| !wire.broken) else { return false };
            wire.data[random.random_range(0..STREAMS - 1)].push_back(data);
            Outcome::Ship { known: new, content: ContentSource::Packed { version } }
        } else if known.is_some_and(|known| known.state == new.state) {
            Outcome::Same { known: new }
        } else {
            Outcome::Ship { known: new, content: ContentSource::Unchanged }
        };
        draft.outcomes.insert(object, outcome);
        true
    }

    pub(super) fn give_up(&mut self, draft: Draft) {
        self.engine().dirty.merge(draft.input);
        for (object, (_, file)) in draft.placed {
            match self.engine().holds.get_mut(&object) {
                Some(held) => held.transfer = Transfer::Waiting,
                None => self.hold_again(object, &file),
            }
        }
    }

    pub(super) fn finish(
        &mut self,
        mut draft: Draft,
        world: &mut World,
        wires: &mut BTreeMap<u64, Wire>,
    ) {
        let engine = self.engine.as_mut().unwrap();
        let gap = engine.gap.clone();
        let floor = gap.as_ref().map_or(engine.covered, |gap| gap.floor);
        let settled = gap.is_none() && draft.span.reached && engine.dirty.is_empty();
        let settings = Settings {
            now: engine.clock.now(),
            floor: floor.min(engine.reached),
            outside_before: settled.then(|| draft.span.time.offset(-OUTSIDE_AFTER)),
            limits: Limits::default(),
            apart: APART,
        };
        let mut assembly =
            assemble(&draft.resolve, &draft.outcomes, &id(ROOT), settings, &engine.index, world)
                .unwrap();
        let placed = self.settle_placed(&mut draft, &assembly);
        self.release_holds(&draft, &assembly, &placed);
        let walking = gap.is_some();
        let engine = self.engine();
        let behind = !engine.dirty.is_empty() || !assembly.again.is_empty();
        if behind && engine.gap.is_none() {
            draft.span.leave_behind(engine.covered);
        }
        engine.leaving = assembly.left > 0;
        let walked = draft.span.walked && draft.span.reached && assembly.again.is_empty();
        let closed = self.close_gap(walked);
        self.take_holds(std::mem::take(&mut assembly.holds), floor);
        let engine = self.engine();
        let holds = engine.holds.values_mut();
        let holds = holds.map(|held| (&held.hold.entries, &mut held.floor));
        let seen = |place: &Place| draft.resolve.bindings.contains_key(place);
        engine.owed.settle(seen, &assembly.again, holds);
        if walking {
            let orphaned = std::mem::take(&mut assembly.orphaned).into_iter();
            engine.dirty.listings.extend(orphaned.map(|one| Listing::new(one, true)));
        }
        for (directory, name) in std::mem::take(&mut assembly.again) {
            engine.dirty.entry(directory, name, What::default());
            draft.span.exact = false;
        }
        // A call under way may be there in part.
        let whole = !world.is_busy() && Timestamp(world.busy) < draft.span.time;
        let exact = self.commit(draft, assembly, closed, wires);
        if let Some(moment) = exact.filter(|_| whole) {
            let last = (self.life(), self.engine().totals.edition());
            self.expected.entry(last).or_default().exact = Some(moment);
        }
        self.forget_dropped();
    }

    pub(super) fn close_gap(&mut self, walked: bool) -> Option<Gap> {
        let engine = self.engine();
        let through = walked && engine.dirty.is_empty();
        match Gap::close(&mut engine.gap, through, engine.clock.now()) {
            Closing::No => None,
            Closing::Again => {
                self.start_walk();
                None
            }
            Closing::Closed(gap) => Some(gap),
        }
    }
}
