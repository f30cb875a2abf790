//! The source: its capture, its journal, and the loop of its engine, in memory
//! and cut into steps between which anything can happen.
//!
//! What decides is the product's: [`Resolve`] and [`assemble()`] plan, [`Index`]
//! keeps the deltas, the [`replicator_src::ledger`] keeps the books. The order
//! of the engine's steps (`replicator_src::engine`) is repeated here.

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};

use rand::Rng;
use rand::rngs::StdRng;
use replicator_common::id::{BatchId, FileSystemId, Incarnation, ObjectId, Seq, TransferId};
use replicator_common::name::Name;
use replicator_common::object::Kind;
use replicator_common::time::Timestamp;
use replicator_common::wire::{BatchHeader, ContentSource, Hash, SourceHello};
use replicator_src::clock::{Clock, Wall};
use replicator_src::index::{Content, Delta, Index, Known, Mark, Noted, View};
use replicator_src::journal::Record;
use replicator_src::ledger::{
    Claim, Closing, Flight, Flights, Gap, Memory, Owed, Place, Reach, Span, take_back,
};
use replicator_src::plan::resolve::Budget;
use replicator_src::plan::waits::{is_through, is_touched};
use replicator_src::plan::{
    Assembly, Dirty, Hold, HoldReason, Limits, Listing, Meanwhile, Need, Outcome, Resolve,
    Settings, assemble,
};
use replicator_src::watcher::What;

use crate::net::{Data, Down, Of, STREAMS, Up, Wire};
use crate::store::Store;
use crate::world::{ROOT, World, id, inode};

/// As the engine's.
const IN_FLIGHT: usize = 2;
const ROUNDS: u32 = 3;
const OUTSIDE_AFTER: i64 = 100_000_000;
/// Files whose number this divides travel as transfers.
const LARGE: u32 = 4;

/// The journal.
#[derive(Clone, Debug, Default)]
pub struct Journal {
    records: BTreeMap<u64, Record>,
    last: u64,
    /// Forgotten up to here.
    pub trimmed: u64,
}

impl Journal {
    fn append(&mut self, record: Record) {
        self.last += 1;
        self.records.insert(self.last, record);
    }

    fn read(&self, after: Seq) -> Vec<(Seq, Record)> {
        self.records.range(after.0 + 1..).map(|(seq, record)| (Seq(*seq), record.clone())).collect()
    }

    fn trim(&mut self, through: Seq) {
        self.trimmed = self.trimmed.max(through.0);
        self.records.retain(|seq, _| *seq > through.0);
    }

    /// Nothing is left but barriers.
    pub fn is_empty(&self) -> bool {
        self.records.values().all(|record| matches!(record, Record::Barrier { .. }))
    }

    /// The power goes: what was not flushed may be lost.
    fn cut(&mut self, random: &mut StdRng) {
        let keep = self.last - random.random_range(0..=self.records.len().min(5)) as u64;
        self.records.retain(|seq, _| *seq <= keep);
    }

    /// It is opened, as the product's is.
    fn open(&mut self, floor: Seq) {
        let ends = (self.records.keys().next(), self.records.keys().next_back());
        (self.trimmed, self.last) = match ends {
            (Some(first), Some(last)) => (first - 1, *last.max(&floor.0)),
            _ => (floor.0, floor.0),
        };
    }
}

/// What reaches the engine.
#[derive(Clone, Debug)]
enum Event {
    Connected { number: u64, incarnation: Incarnation, committed: BatchId },
    Message(u64, Down),
    Lost(u64),
}

enum Transfer {
    Waiting,
    Running(TransferId),
    Ready { number: TransferId, arrived: bool, file: Box<File> },
}

struct File {
    known: Known,
    started: Timestamp,
    moving: bool,
}

struct Held {
    hold: Hold,
    floor: Timestamp,
    since: Timestamp,
    transfer: Transfer,
    touched: bool,
}

/// A large file that is being read.
struct Lane {
    number: TransferId,
    object: ObjectId,
    session: u64,
    started: Timestamp,
    ctime: Timestamp,
}

struct Draft {
    batch: BatchId,
    resolve: Resolve,
    outcomes: HashMap<ObjectId, Outcome>,
    input: Dirty,
    span: Span,
    version: u32,
    packed: u64,
    placed: BTreeMap<ObjectId, (TransferId, File)>,
    budget: usize,
    round: u32,
    /// Still to be read in this round.
    unread: Vec<(ObjectId, Need)>,
}

/// A batch as the index describes it: what the replica must be after it.
#[derive(Clone, Debug, Default)]
pub struct Expected {
    /// Entries.
    pub entries: BTreeMap<(u32, Name), u32>,
    /// Objects with their content's hash and mode.
    pub objects: BTreeMap<u32, (Content, u32)>,
    /// What it claims.
    pub watermark: Option<Timestamp>,
    /// The moment that it equals the source at.
    pub exact: Option<Timestamp>,
}

impl Expected {
    fn after(&self, delta: &Delta) -> Self {
        let mut next = Self { exact: None, ..self.clone() };
        for change in &delta.entries {
            let place = (inode(&change.directory), change.name.clone());
            match &change.new {
                Some(new) => next.entries.insert(place, inode(new)),
                None => next.entries.remove(&place),
            };
        }
        for (object, known) in &delta.objects {
            let object = inode(object);
            match known {
                Some(known) => {
                    let now = (known.content.clone(), known.state.attributes.mode);
                    next.objects.insert(object, now);
                }
                None => drop(next.objects.remove(&object)),
            }
        }
        next
    }
}

/// What the engine keeps in memory.
struct Engine {
    clock: Clock,
    index: Index<Store>,
    dirty: Dirty,
    cursor: Seq,
    inherited: Seq,
    seen: Timestamp,
    covered: Timestamp,
    gap: Option<Gap>,
    reached: Timestamp,
    holds: BTreeMap<ObjectId, Held>,
    owed: Owed,
    lanes: Vec<Lane>,
    arrived: BTreeSet<TransferId>,
    flights: Flights<()>,
    next_batch: BatchId,
    next_transfer: TransferId,
    claimed: Timestamp,
    totals: Mark,
    session: Option<u64>,
    inbox: VecDeque<Event>,
    draft: Option<Draft>,
    /// What the link says first.
    greeting: SourceHello,
    /// The connection that the link has, and whether it was answered.
    link: Option<(u64, bool)>,
    last_build: i64,
}

/// The source.
pub struct Source {
    /// The index, durable.
    pub store: Arc<Store>,
    /// The journal.
    pub journal: Journal,
    engine: Option<Engine>,
    hands: Arc<AtomicI64>,
    lives: u8,
    next_session: u64,
    /// By life and batch, what the replica must be after it.
    pub expected: BTreeMap<(Incarnation16, BatchId), Expected>,
    /// By life and batch, where the batch of that number that was built last ends.
    built: BTreeMap<(Incarnation16, BatchId), Seq>,
    /// What others were told here.
    pub told: Timestamp,
    /// Positions up to which the journal was trimmed since somebody looked,
    /// with the batch whose acknowledgement allowed it.
    pub trims: Vec<BatchId>,
    /// What happened last, in words.
    pub log: VecDeque<String>,
}

/// An incarnation that can be a key.
pub type Incarnation16 = [u8; 16];

fn file_system() -> FileSystemId {
    "fs-00000000000000001".parse().unwrap()
}

impl Default for Source {
    fn default() -> Self {
        Self::new()
    }
}

impl Source {
    /// A new one.
    pub fn new() -> Self {
        let mut source = Self {
            store: Arc::new(Store::new(Incarnation([1; 16]))),
            journal: Journal::default(),
            engine: None,
            hands: Arc::default(),
            lives: 1,
            next_session: 1,
            expected: BTreeMap::new(),
            built: BTreeMap::new(),
            told: Timestamp::NEVER,
            trims: Vec::new(),
            log: VecDeque::new(),
        };
        source.expected.insert(([1; 16], BatchId(0)), Expected::default());
        source
    }

    fn say(&mut self, what: impl FnOnce() -> String) {
        self.log.push_back(what());
        if self.log.len() > 60 {
            self.log.pop_front();
        }
    }

    /// Whether the process runs.
    pub fn runs(&self) -> bool {
        self.engine.is_some()
    }

    /// The process starts.
    pub fn start(&mut self, world: &World) {
        self.hands.store(world.now, Ordering::Relaxed);
        let hands = self.hands.clone();
        let clock = Clock::new(Wall::new(move || Timestamp(hands.load(Ordering::Relaxed))));
        let tables = self.store.read();
        self.journal.open(tables.mark.seq);
        let claimed = tables.mark.watermark.unwrap_or(Timestamp::NEVER);
        let index = Index::new(self.store.clone()).unwrap();
        let orphans = index.orphans().unwrap();
        let left = orphans.iter().map(|(_, orphan)| orphan.since.max(orphan.floor));
        clock.begin_after(left.fold(claimed, Timestamp::max));
        let engine = Engine {
            clock,
            index,
            dirty: Dirty::default(),
            cursor: Seq(self.journal.trimmed),
            inherited: Seq(self.journal.last),
            seen: Timestamp::NEVER,
            covered: claimed,
            reached: claimed,
            owed: Owed::default(),
            gap: None,
            holds: BTreeMap::new(),
            lanes: Vec::new(),
            arrived: BTreeSet::new(),
            flights: Flights::default(),
            next_batch: tables.mark.batch.next(),
            next_transfer: TransferId(1),
            claimed,
            totals: tables.mark,
            session: None,
            inbox: VecDeque::new(),
            draft: None,
            greeting: self.greeting(),
            link: None,
            last_build: 0,
        };
        self.engine = Some(engine);
        self.open_gap("restart");
    }

    /// The process dies; with `power`, the machine does.
    pub fn crash(
        &mut self,
        power: bool,
        world: &mut World,
        wires: &mut BTreeMap<u64, Wire>,
        random: &mut StdRng,
    ) {
        self.say(|| format!("crash, of the machine: {power}"));
        self.engine = None;
        self.store = Arc::new(self.store.after_crash());
        if power {
            self.journal.cut(random);
        }
        // Nobody watched.
        world.events.clear();
        wires.values_mut().for_each(Wire::hang_up);
    }

    /// The state directory as it is, to be put back later.
    pub fn save(&self) -> (Store, Journal) {
        (self.store.after_crash(), self.journal.clone())
    }

    /// Whether an earlier state remembers a batch on its way that was lost, and
    /// built anew under the same number.
    pub fn has_rebuilt(&self, store: &Store) -> bool {
        let tables = store.read();
        let life = tables.incarnation.0;
        tables.pending.iter().any(|delta| {
            let last = self.built.get(&(life, delta.mark.batch));
            last.is_some_and(|seq| *seq != delta.mark.seq)
        })
    }

    /// Puts an earlier one back; the process is down.
    pub fn restore(&mut self, (store, journal): (Store, Journal)) {
        self.say(|| format!("set back to batch {}", store.read().mark.batch));
        self.store = Arc::new(store);
        self.journal = journal;
        self.told = Timestamp::NEVER;
    }

    fn greeting(&self) -> SourceHello {
        let tables = self.store.read();
        SourceHello {
            source: file_system(),
            incarnation: tables.incarnation,
            destination_incarnation: tables.peer,
            acknowledged: tables.mark.batch,
            pending: tables.pending.last().map(|delta| delta.mark.batch),
            previous: None,
            time: Timestamp(0),
        }
    }

    fn engine(&mut self) -> &mut Engine {
        self.engine.as_mut().unwrap()
    }

    fn life(&self) -> Incarnation16 {
        self.store.read().incarnation.0
    }

    // ---------------------------------------------------------------- capture

    /// Moves some events from the kernel's queue to the journal.
    pub fn capture(&mut self, world: &mut World, most: usize) {
        for _ in 0..most {
            let Some(record) = world.events.pop_front() else { return };
            self.journal.append(record);
        }
    }

    /// Drains the kernel's queue.
    fn barrier(&mut self, world: &mut World) -> (Seq, Timestamp) {
        self.hands.store(world.now, Ordering::Relaxed);
        let time = self.engine().clock.now();
        self.capture(world, usize::MAX);
        self.journal.append(Record::Barrier { time });
        (Seq(self.journal.last), time)
    }

    // ------------------------------------------------------------------- link

    /// The link's turn: opens a session where there is none, passes on what has
    /// come, notices that the line is gone.
    pub fn link(&mut self, wires: &mut BTreeMap<u64, Wire>) {
        let Some(engine) = &mut self.engine else { return };
        let Some((number, answered)) = engine.link else {
            let number = self.next_session;
            self.next_session += 1;
            let mut wire = Wire::default();
            wire.up.push_back(Up::Hello(engine.greeting.clone()));
            wires.insert(number, wire);
            engine.link = Some((number, false));
            return;
        };
        let wire = wires.get_mut(&number);
        let broken = wire.as_ref().is_none_or(|wire| wire.broken);
        let message = wire.and_then(|wire| wire.down.pop_front());
        match message {
            Some(Down::Hello { incarnation, committed }) => {
                engine.link = Some((number, true));
                engine.inbox.push_back(Event::Connected { number, incarnation, committed });
            }
            Some(message) => engine.inbox.push_back(Event::Message(number, message)),
            None if broken => {
                engine.link = None;
                if answered {
                    engine.inbox.push_back(Event::Lost(number));
                }
            }
            None => {}
        }
    }

    // ----------------------------------------------------------------- engine

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
        let walked = engine.gap.is_some() && engine.flights.is_empty();
        let heartbeat = world.now - engine.last_build > 1_000_000_000 && engine.flights.is_empty();
        let due = !engine.dirty.is_empty() || walked || heartbeat;
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

    fn event(&mut self, event: Event, wires: &mut BTreeMap<u64, Wire>) {
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

    fn connected(
        &mut self,
        number: u64,
        life: Incarnation,
        committed: BatchId,
        wires: &mut BTreeMap<u64, Wire>,
    ) {
        let tables = self.store.read();
        let pending = tables.pending.last().map(|delta| delta.mark.batch);
        let memory = Memory { peer: tables.peer, merged: tables.mark.batch, pending };
        if !memory.agrees(life, committed) {
            if let Some(wire) = wires.get_mut(&number) {
                wire.hang_up();
            }
            return self.distrust();
        }
        if tables.peer != Some(life) {
            self.store.set_peer(life);
        }
        self.settle(committed);
        let engine = self.engine();
        engine.next_batch = committed.next();
        engine.session = Some(number);
    }

    fn distrust(&mut self) {
        self.lives += 1;
        let life = Incarnation([self.lives; 16]);
        self.say(|| "a new life".to_owned());
        self.store.reset(life);
        self.expected.insert((life.0, BatchId(0)), Expected::default());
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

    fn settle(&mut self, committed: BatchId) {
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
        let mark = self.store.read().mark;
        let engine = self.engine();
        engine.totals = mark;
        engine.claimed = mark.watermark.unwrap_or(Timestamp::NEVER);
        self.tell(&mark);
        let greeting = self.greeting();
        self.engine().greeting = greeting;
    }

    fn applied(&mut self, batch: BatchId) {
        let done = self.engine().flights.applied(batch);
        if done.iter().any(|done| !done.dropped.is_empty()) {
            self.forget_dropped();
        }
        let Some(mark) = done.last().map(|done| done.mark) else { return };
        self.engine().index.acknowledge(batch);
        self.trim(&mark);
        self.tell(&mark);
        let greeting = &mut self.engine().greeting;
        greeting.acknowledged = mark.batch;
        greeting.pending = greeting.pending.filter(|pending| *pending > mark.batch);
    }

    fn trim(&mut self, mark: &Mark) {
        self.journal.trim(mark.seq);
        self.trims.push(mark.batch);
    }

    fn tell(&mut self, mark: &Mark) {
        self.told = self.told.max(mark.watermark.unwrap_or(Timestamp::NEVER));
    }

    fn open_gap(&mut self, reason: &str) {
        let engine = self.engine();
        let now = engine.clock.now();
        if Gap::open(&mut engine.gap, reason.to_owned(), engine.covered, now) {
            self.start_walk();
        }
    }

    fn start_walk(&mut self) {
        let engine = self.engine();
        engine.dirty.listings.retain(|listing| !listing.deep);
        engine.dirty.listings.push_back(Listing::new(id(ROOT), true));
        let orphans = engine.index.orphans().unwrap().into_iter();
        engine.dirty.listings.extend(orphans.map(|(one, _)| Listing::new(one, true)));
    }

    // ------------------------------------------------------------------ build

    fn begin(&mut self, world: &mut World, random: &mut StdRng) {
        let (seq, time) = self.barrier(world);
        self.engine().last_build = world.now;
        let mut draft = self.draft(random);
        draft.resolve.walking = self.engine().gap.is_some();
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

    fn draft(&mut self, random: &mut StdRng) -> Draft {
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

    fn take_records(&mut self, draft: &mut Draft) {
        let after = self.engine().cursor;
        let mut records = self.journal.read(after);
        let last = records.last().map(|(seq, _)| *seq);
        records.retain(|(_, record)| self.concerns(record));
        self.absorb(&records, draft);
        let engine = self.engine();
        engine.cursor = last.unwrap_or(engine.cursor);
        draft.span.seq = engine.cursor;
    }

    fn concerns(&mut self, record: &Record) -> bool {
        let engine = self.engine();
        let object = match record {
            Record::Gap { .. } | Record::Barrier { .. } => return true,
            Record::Object { object, .. } if engine.holds.contains_key(object) => return true,
            Record::Object { object, .. } => object,
            Record::Entry { directory, .. } | Record::Named { directory, .. } => directory,
        };
        is_ours(&engine.index, &engine.flights, object)
    }

    fn look_ahead(&mut self) {
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

    fn absorb(&mut self, records: &[(Seq, Record)], draft: &mut Draft) {
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

    fn resolve(&mut self, draft: &mut Draft, world: &mut World) {
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
        for (object, need) in draft.resolve.take_needs() {
            if !self.take_ready(draft, &object, &need, world) {
                draft.unread.push((object, need));
            }
        }
    }

    /// The next step of a batch that is being built.
    fn go_on(&mut self, world: &mut World, wires: &mut BTreeMap<u64, Wire>, random: &mut StdRng) {
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
        let nothing = draft.resolve.bindings.is_empty() && draft.resolve.read.is_empty();
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
    fn read(
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

    fn give_up(&mut self, draft: Draft) {
        self.engine().dirty.merge(draft.input);
        for (object, (_, file)) in draft.placed {
            match self.engine().holds.get_mut(&object) {
                Some(held) => held.transfer = Transfer::Waiting,
                None => self.hold_again(object, &file),
            }
        }
    }

    fn finish(&mut self, mut draft: Draft, world: &mut World, wires: &mut BTreeMap<u64, Wire>) {
        let engine = self.engine.as_mut().unwrap();
        let gap = engine.gap.clone();
        let floor = gap.as_ref().map_or(engine.covered, |gap| gap.floor);
        let settled = gap.is_none() && draft.span.reached && engine.dirty.is_empty();
        let settings = Settings {
            now: engine.clock.now(),
            floor: floor.min(engine.reached),
            outside_before: settled.then(|| draft.span.time.offset(-OUTSIDE_AFTER)),
            limits: Limits::default(),
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
            let last = (self.life(), self.engine().totals.batch);
            self.expected.entry(last).or_default().exact = Some(moment);
        }
        self.forget_dropped();
    }

    fn close_gap(&mut self, walked: bool) -> Option<Gap> {
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

    fn commit(
        &mut self,
        draft: Draft,
        assembly: Assembly,
        closed: Option<Gap>,
        wires: &mut BTreeMap<u64, Wire>,
    ) -> Option<Timestamp> {
        let engine = self.engine();
        let covered = engine.covered;
        let floors = engine.holds.values().map(|held| held.floor);
        let orphans = orphan_floor(&engine.index, &assembly);
        let claim = Claim {
            span: draft.span,
            covered,
            gap: engine.gap.as_ref(),
            closed: closed.as_ref(),
            proves: true,
            waiting: floors.chain(engine.owed.floor()).chain(orphans).min(),
        };
        let reach = claim.reach();
        let before = std::mem::replace(&mut engine.reached, reach.reached);
        engine.covered = reach.covered;
        let Reach { reached, exact, .. } = reach;
        let watermark = engine.clock.wall(reached).max(engine.claimed);
        let header = BatchHeader {
            seq: draft.span.seq,
            watermark,
            exact: exact.then(|| engine.clock.wall(draft.span.time)),
            packed: draft.packed,
            ops: assembly.ops.len() as u64,
            complete: watermark > Timestamp::NEVER,
            bytes_changed: 0,
            bytes_shipped: 0,
        };
        let gone = assembly.delta.objects.iter().filter(|(_, known)| known.is_none()).cloned();
        let flight = Flight {
            mark: Mark::default(),
            input: draft.input,
            closed,
            dropped: gone.map(|(object, _)| object).collect(),
            ops: header.ops,
            durable: false,
            before,
            reached,
            note: (),
        };
        let exact = header.exact;
        self.send_batch(assembly, header, flight, wires);
        exact
    }

    /// The order of these two is the invariant of trap 5.
    fn send_batch(
        &mut self,
        assembly: Assembly,
        header: BatchHeader,
        flight: Flight<()>,
        wires: &mut BTreeMap<u64, Wire>,
    ) {
        let life = self.life();
        let Assembly { mut ops, mut delta, .. } = assembly;
        // They come in no particular order; a seed must give the same run.
        ops.sort_by_cached_key(|op| format!("{op:?}"));
        let waits = self.waits();
        let engine = self.engine();
        let batch = engine.next_batch;
        let mark = Mark {
            batch,
            seq: header.seq,
            watermark: (header.watermark > Timestamp::NEVER).then_some(header.watermark),
            consistent: header.exact.or(engine.totals.consistent),
            ..engine.totals
        };
        delta.mark = mark;
        engine.index.prepare(delta.clone(), &Noted::default()).unwrap();
        engine.greeting.pending = Some(batch);
        engine.totals = mark;
        engine.claimed = engine.claimed.max(header.watermark);
        engine.next_batch = batch.next();
        engine.flights.push(Flight { mark, ..flight });
        let session = engine.session;
        if let Some(wire) = session.and_then(|number| wires.get_mut(&number))
            && !wire.broken
        {
            wire.up.push_back(Up::Plan(batch, ops));
            wire.up.push_back(Up::Commit(batch, header.clone()));
        }
        self.say(|| {
            let changed = delta.entries.iter().map(|change| {
                let to = change.new.as_ref().map_or(0, inode);
                format!("{}/{}={to}", inode(&change.directory), change.name)
            });
            let changed = changed.collect::<Vec<_>>().join(" ");
            format!("batch {batch} claims {:?}, holds {waits}: {changed}", header.watermark)
        });
        let before = &self.expected[&(life, BatchId(batch.0 - 1))];
        let mut next = before.after(&delta);
        next.watermark = mark.watermark;
        self.expected.insert((life, batch), next);
        self.built.insert((life, batch), mark.seq);
    }

    // ------------------------------------------------------------ large files

    fn take_holds(&mut self, holds: BTreeMap<ObjectId, Hold>, floor: Timestamp) {
        let engine = self.engine();
        for (object, hold) in holds {
            match engine.holds.get_mut(&object) {
                Some(held) => {
                    held.hold.reason = hold.reason;
                    held.hold.entries.extend(hold.entries);
                }
                None => {
                    let (since, transfer) = (engine.clock.now(), Transfer::Waiting);
                    let held = Held { hold, floor, since, transfer, touched: false };
                    engine.holds.insert(object, held);
                }
            }
        }
    }

    fn redo_hold(&mut self, object: &ObjectId) {
        let engine = self.engine.as_mut().unwrap();
        let Some(held) = engine.holds.get(object) else { return };
        let what = What { content: true, attributes: true };
        for (directory, name) in held.hold.entries.clone() {
            engine.dirty.entry(directory, name, what);
        }
        engine.dirty.object(object.clone(), what);
    }

    /// A lane's turn: begins to read a large file, or is through with one.
    fn lane(&mut self, world: &World, wires: &mut BTreeMap<u64, Wire>, random: &mut StdRng) {
        let engine = self.engine();
        let Some(session) = engine.session else { return };
        if engine.lanes.len() < 2 && random.random_bool(0.6) {
            let waits = |held: &&mut Held| matches!(held.transfer, Transfer::Waiting);
            let waiting = engine.holds.iter_mut();
            let next =
                waiting.map(|(object, held)| (object.clone(), held)).find(|(_, held)| waits(held));
            let Some((object, held)) = next else { return };
            let number = engine.next_transfer;
            engine.next_transfer = number.next();
            (held.touched, held.transfer) = (false, Transfer::Running(number));
            let started = engine.clock.now();
            let n = inode(&object);
            let ctime = match world.inodes.contains_key(&n) {
                true => world.changed(n),
                false => Timestamp(0),
            };
            engine.lanes.push(Lane { number, object, session, started, ctime });
            return;
        }
        if engine.lanes.is_empty() {
            return;
        }
        let lane = engine.lanes.remove(random.random_range(0..engine.lanes.len()));
        let arrived = engine.arrived.remove(&lane.number);
        let n = inode(&lane.object);
        let there = world.inodes.contains_key(&n);
        if there {
            let (state, content) = (world.state(n), world.inodes[&n].body.content);
            let data =
                Data { of: Of::Transfer(lane.number), object: lane.object.clone(), state, content };
            match wires.get_mut(&lane.session).filter(|wire| !wire.broken) {
                Some(wire) => wire.data[STREAMS - 1].push_back(data),
                None => {
                    // The engine will hear that the session is lost.
                    if let Some(held) = awaited(&mut engine.holds, &lane) {
                        held.transfer = Transfer::Waiting;
                    }
                    return;
                }
            }
        }
        let Some(held) = awaited(&mut engine.holds, &lane) else {
            if there && let Some(wire) = wires.get_mut(&lane.session) {
                abort(wire, lane.number, &lane.object, world);
            }
            return;
        };
        if !there {
            self.redo_hold(&lane.object);
            if let Some(held) = self.engine().holds.remove(&lane.object) {
                let links = self.engine().index.links(&lane.object).unwrap();
                let places = held.hold.entries.into_iter().chain(links);
                self.look_at_rest(&Resolve::default(), places.collect(), held.floor);
            }
            return;
        }
        let known = Known {
            state: world.state(n),
            ctime: world.changed(n),
            read_at: lane.started,
            version: BatchId(0),
            content: content_of(world, n),
            entry: None,
            links: 0,
            nlink: world.links(n) as u32,
        };
        let moving = known.ctime != lane.ctime;
        let file = Box::new(File { known, started: lane.started, moving });
        held.transfer = Transfer::Ready { number: lane.number, arrived, file };
        if arrived {
            self.redo_hold(&lane.object);
        }
    }

    fn transfer_arrived(&mut self, transfer: TransferId) {
        let engine = self.engine();
        if engine.lanes.iter().any(|lane| lane.number == transfer) {
            engine.arrived.insert(transfer);
            return;
        }
        let mut found = None;
        for (object, held) in &mut engine.holds {
            if let Transfer::Ready { number, arrived, .. } = &mut held.transfer
                && *number == transfer
            {
                *arrived = true;
                found = Some(object.clone());
            }
        }
        if let Some(object) = found {
            self.redo_hold(&object);
        }
    }

    fn reset_transfers(&mut self) {
        let engine = self.engine();
        engine.lanes.clear();
        engine.arrived.clear();
        engine.holds.values_mut().for_each(|held| held.transfer = Transfer::Waiting);
    }

    fn take_ready(
        &mut self,
        draft: &mut Draft,
        object: &ObjectId,
        need: &Need,
        world: &World,
    ) -> bool {
        if need.kind != Kind::File || !need.content {
            return false;
        }
        if let Some((_, file)) = draft.placed.get_mut(object) {
            file.moving = true;
            return true;
        }
        let engine = self.engine();
        let Some(held) = engine.holds.get_mut(object) else { return false };
        match std::mem::replace(&mut held.transfer, Transfer::Waiting) {
            Transfer::Waiting => false,
            under_way @ (Transfer::Running(_) | Transfer::Ready { arrived: false, .. }) => {
                held.transfer = under_way;
                draft.outcomes.insert(object.clone(), Outcome::Large { size: 4 });
                held.touched |= engine.gap.is_none();
                true
            }
            Transfer::Ready { number, mut file, .. } => {
                file.moving |= held.touched;
                let n = inode(object);
                if world.inodes.contains_key(&n) {
                    file.moving |= world.changed(n) != file.known.ctime;
                    file.known.state.attributes.mode = world.inodes[&n].body.mode;
                    file.known.nlink = world.links(n) as u32;
                }
                let mut known = file.known.clone();
                known.version = draft.batch;
                let content = ContentSource::Transferred { transfer: number };
                draft.outcomes.insert(object.clone(), Outcome::Ship { known, content });
                draft.placed.insert(object.clone(), (number, *file));
                true
            }
        }
    }

    fn settle_placed(&mut self, draft: &mut Draft, assembly: &Assembly) -> BTreeSet<ObjectId> {
        let mut all = BTreeSet::new();
        for (object, (_, file)) in std::mem::take(&mut draft.placed) {
            all.insert(object.clone());
            if let Some(held) = self.engine().holds.remove(&object) {
                self.look_at_rest(&draft.resolve, held.hold.entries, held.floor);
            }
            let put =
                assembly.delta.objects.iter().any(|(id, known)| *id == object && known.is_some());
            if put && file.moving {
                self.hold_again(object, &file);
                draft.span.exact = false;
            }
        }
        all
    }

    fn hold_again(&mut self, object: ObjectId, file: &File) {
        let engine = self.engine();
        let hold = Hold { reason: HoldReason::Large { size: 4 }, entries: BTreeSet::new() };
        let (since, transfer) = (engine.clock.now(), Transfer::Waiting);
        let held = Held { hold, floor: file.started, since, transfer, touched: false };
        engine.holds.insert(object, held);
    }

    fn release_holds(&mut self, draft: &Draft, assembly: &Assembly, placed: &BTreeSet<ObjectId>) {
        let through = |object: &ObjectId, held: &Held| {
            !placed.contains(object)
                && !assembly.holds.contains_key(object)
                && is_through(object, &held.hold.entries, &draft.resolve, &draft.outcomes)
        };
        let holds = self.engine().holds.iter();
        let gone: Vec<_> =
            holds.filter(|(o, held)| through(o, held)).map(|(o, _)| o.clone()).collect();
        for object in gone {
            let Some(mut held) = self.engine().holds.remove(&object) else { continue };
            if draft.outcomes.get(&object) == Some(&Outcome::Gone) {
                held.hold.entries.extend(self.engine().index.links(&object).unwrap());
            }
            self.look_at_rest(&draft.resolve, held.hold.entries, held.floor);
        }
    }

    fn look_at_rest(
        &mut self,
        resolve: &Resolve,
        entries: BTreeSet<(ObjectId, Name)>,
        floor: Timestamp,
    ) {
        self.engine().owed.release(entries.iter().cloned(), floor);
        for (directory, name) in entries {
            if !resolve.bindings.contains_key(&(directory.clone(), name.clone())) {
                self.engine().dirty.entry(directory, name, What::default());
            }
        }
    }

    fn forget_dropped(&mut self) {
        let engine = self.engine();
        let (index, flights) = (&engine.index, &engine.flights);
        let ours = |object: &ObjectId| is_ours(index, flights, object);
        let mut fewer = Vec::new();
        for (object, held) in &mut engine.holds {
            let before = held.hold.entries.len();
            held.hold.entries.retain(|(directory, _)| ours(directory));
            if held.hold.entries.len() < before {
                fewer.push(object.clone());
            }
        }
        engine.holds.retain(|object, held| !held.hold.entries.is_empty() || ours(object));
        fewer.iter().for_each(|object| self.redo_hold(object));
        self.forget_owed();
    }

    fn forget_owed(&mut self) {
        let engine = self.engine.as_mut().unwrap();
        let (index, flights) = (&engine.index, &engine.flights);
        engine.owed.forget(|directory| !is_ours(index, flights, directory));
    }

    fn waits(&self) -> String {
        let holds = self.engine.iter().flat_map(|engine| &engine.holds);
        let words = holds.map(|(object, held)| {
            format!("{} of {} since {:?}", inode(object), held.floor.0, held.since)
        });
        words.collect::<Vec<_>>().join(", ")
    }

    /// What keeps it from being idle, in words.
    pub fn describe(&self) -> String {
        let Some(engine) = &self.engine else { return "down".to_owned() };
        let holds = self.waits();
        format!(
            "session {:?}, dirty {:?}, draft {}, gap {:?}, under way {}, holds {holds}, orphans {:?}, covered {:?}",
            engine.session,
            engine.dirty,
            engine.draft.is_some(),
            engine.gap,
            engine.flights.len(),
            engine.index.orphans(),
            engine.covered,
        )
    }
}

/// Whether the replica has an object, or may have it again.
fn is_ours(index: &Index<Store>, flights: &Flights<()>, object: &ObjectId) -> bool {
    index.object(object).unwrap().is_some() || flights.drops(object)
}

fn awaited<'a>(holds: &'a mut BTreeMap<ObjectId, Held>, lane: &Lane) -> Option<&'a mut Held> {
    holds
        .get_mut(&lane.object)
        .filter(|held| matches!(held.transfer, Transfer::Running(number) if number == lane.number))
}

fn abort(wire: &mut Wire, transfer: TransferId, object: &ObjectId, world: &World) {
    let state = world.state(inode(object));
    let data = Data { of: Of::Abort(transfer), object: object.clone(), state, content: 0 };
    wire.data[STREAMS - 1].push_back(data);
}

fn content_of(world: &World, n: u32) -> Content {
    Content::Whole(Hash::of(&world.inodes[&n].body.content.to_be_bytes()))
}

/// Where orphans that are left hold the watermark.
fn orphan_floor(index: &Index<Store>, assembly: &Assembly) -> Option<Timestamp> {
    if assembly.orphans == 0 {
        return None;
    }
    let mut all: BTreeMap<ObjectId, _> = index.orphans().unwrap().into_iter().collect();
    for (object, orphan) in &assembly.delta.orphans {
        match orphan {
            Some(orphan) => drop(all.insert(object.clone(), *orphan)),
            None => drop(all.remove(object)),
        }
    }
    all.values().map(|orphan| orphan.floor).min()
}
