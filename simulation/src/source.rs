//! The source: its capture, its journal, and the loop of its engine, in memory
//! and cut into steps between which anything can happen.
//!
//! What decides is the product's: [`Resolve`] and `plan::assemble` plan, [`Index`]
//! keeps the deltas, the [`replicator_src::ledger`] keeps the books. The order
//! of the engine's steps (`replicator_src::engine`) is repeated here.

mod build;
mod commit;
mod engine;
mod expected;
mod holds;
mod journal;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};

use foldhash::HashMap;
use rand::rngs::StdRng;
use replicator_common::id::{
    BatchId, Edition, FileSystemId, Incarnation, ObjectId, Seq, TransferId,
};
use replicator_common::time::Timestamp;
use replicator_common::wire::{Hash, SourceHello};
use replicator_src::clock::{Clock, Wall};
use replicator_src::index::{Content, Index, Known, Mark, View};
use replicator_src::journal::Record;
use replicator_src::ledger::{Flights, Gap, Owed, Span};
use replicator_src::plan::{Dirty, Hold, Need, Outcome, Resolve};

pub use expected::Expected;
pub use journal::Journal;

use crate::net::{Down, Up, Wire};
use crate::store::Store;
use crate::world::World;

/// As the engine's.
const IN_FLIGHT: usize = 3;
const ROUNDS: u32 = 3;
const OUTSIDE_AFTER: i64 = 100_000_000;
/// Few, so that small trees are taken apart in several batches.
const APART: usize = 2;
/// Files whose number this divides travel as transfers.
const LARGE: u32 = 4;

/// What reaches the engine.
#[derive(Clone, Debug)]
enum Event {
    Connected { number: u64, incarnation: Incarnation, committed: Edition },
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

/// What the engine keeps in memory.
struct Engine {
    clock: Clock,
    index: Index<Store>,
    dirty: Dirty,
    /// Trees that left the source are still to be taken apart.
    leaving: bool,
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
    pub expected: BTreeMap<(Incarnation16, Edition), Expected>,
    /// Batches built so far, in all lives: the last one's nonce.
    built: u64,
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
            built: 0,
            told: Timestamp::NEVER,
            trims: Vec::new(),
            log: VecDeque::new(),
        };
        source.expected.insert(([1; 16], Edition::default()), Expected::default());
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
            leaving: false,
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
        let engine = self.engine.insert(engine);
        engine.leaving = engine.leaves();
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
            acknowledged: tables.mark.edition(),
            pending: tables.pending.iter().map(|delta| delta.mark.edition()).collect(),
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
}

/// Whether the replica has an object, or may have it again.
fn is_ours(index: &Index<Store>, flights: &Flights<()>, object: &ObjectId) -> bool {
    index.object(object).unwrap().is_some() || flights.drops(object)
}

fn content_of(world: &World, n: u32) -> Content {
    Content::Whole(Hash::of(&world.inodes[&n].body.content.to_be_bytes()))
}
