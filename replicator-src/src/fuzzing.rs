//! The bodies of the fuzz targets that concern this crate. For tests alone.

use std::collections::{BTreeMap, BTreeSet};

use replicator_common::chunk::Chunk;
use replicator_common::fuzzing;
use replicator_common::id::{BatchId, Edition, Incarnation, ObjectId, Seq};
use replicator_common::time::Timestamp;
use replicator_common::wire::kept::{KEPT_CHUNKS_MAX, KEPT_PACKED_MAX, KEPT_TRANSFERS_MAX};
use replicator_common::wire::{Hash, KeptChunk, KeptObject};

use crate::engine::kept::Kept;
use crate::index::Mark;
use crate::journal::Record;
use crate::ledger::{Flight, Flights, Memory};
use crate::replies::{Breach, Parts};

/// Arbitrary bytes as a block of the journal's records, and as one, which is what
/// a journal of version 1 holds.
pub fn journal_record(bytes: &[u8]) {
    fuzzing::record::<Vec<Record>>(bytes);
    fuzzing::record::<Record>(bytes);
}

/// Arbitrary bytes as what a source does and a destination says, in an order
/// that no honest destination would choose: an event is one byte that says
/// which, and the bytes that it needs. Returns how many changes of the source
/// were acknowledged, or the breach.
///
/// What the engine does with the answers is repeated here in its order; that it
/// asks [`Flights`], [`Parts`] and `Kept` before it acts, its code shows.
pub fn replies(bytes: &[u8]) -> Result<usize, Breach> {
    let mut world = World {
        bytes: bytes.iter(),
        flights: Flights::default(),
        next: BatchId(1),
        merged: BatchId(0),
        seq: 0,
        trimmed: 0,
        dirty: BTreeSet::new(),
        acknowledged: BTreeSet::new(),
        kept: Kept::default(),
        asked: BTreeMap::new(),
        parts: Parts::default(),
        wanted: 0,
        numbered: 0,
    };
    // The first breach ends a session.
    while let Some(event) = world.byte() {
        world.event(event)?;
        world.check();
    }
    Ok(world.acknowledged.len())
}

/// Batches that are under way at once.
const IN_FLIGHT: usize = 3;
/// Parts of the inventory that are asked for ahead.
const WINDOW: usize = 4;
/// The destination's life.
const PEER: Incarnation = Incarnation([1; 16]);

struct World<'a> {
    bytes: std::slice::Iter<'a, u8>,
    /// What each batch brings: changes by their place in the journal.
    flights: Flights<BTreeSet<u64>>,
    next: BatchId,
    /// The last batch acknowledged.
    merged: BatchId,
    /// The last record of the journal.
    seq: u64,
    /// The journal is trimmed up to here.
    trimmed: u64,
    /// Changes that are in no batch under way, and not acknowledged.
    dirty: BTreeSet<u64>,
    acknowledged: BTreeSet<u64>,
    kept: Kept,
    /// Large files whose chunks were asked for, and how many may have come.
    asked: BTreeMap<ObjectId, usize>,
    parts: Parts,
    /// Parts of the inventory that were asked for, and not taken.
    wanted: usize,
    /// Objects that the destination made up.
    numbered: u32,
}

impl World<'_> {
    fn byte(&mut self) -> Option<u8> {
        self.bytes.next().copied()
    }

    /// A small number; zero at the end of the input.
    fn small(&mut self, below: u8) -> u8 {
        self.byte().unwrap_or(0) % below
    }

    /// Mostly a small number, since many things take their time; seldom a large one.
    fn count(&mut self) -> u8 {
        match self.byte().unwrap_or(0) {
            few @ 0..=239 => few % 8,
            many => many,
        }
    }

    /// Mostly the oldest batch under way, or one behind it; sometimes one near
    /// it, seldom any.
    fn batch(&mut self) -> BatchId {
        let oldest = self.flights.front().map_or(self.next, |oldest| oldest.mark.batch);
        match self.byte().unwrap_or(0) {
            near @ 0..=199 => BatchId(oldest.0 + u64::from(near / 80)),
            near @ 200..=250 => BatchId((self.next.0 + u64::from(near - 200)).saturating_sub(25)),
            251 => BatchId(0),
            _ => BatchId(u64::MAX),
        }
    }

    /// One of the few that the source knows.
    fn object(&mut self) -> ObjectId {
        let number = self.small(4);
        object(u32::from(number))
    }

    fn event(&mut self, event: u8) -> Result<(), Breach> {
        match event % 12 {
            0 | 1 => self.commit(),
            2 => {
                let batch = self.batch();
                self.flights.may_acknowledge(batch, self.next)?;
                self.flights.durable(batch);
            }
            3 => {
                let batch = self.batch();
                self.flights.may_acknowledge(batch, self.next)?;
                let done = self.flights.applied(batch);
                self.done(done);
            }
            4 => self.returned()?,
            5 => self.begin_anew(),
            6 => self.tell(),
            7 => {
                let object = self.object();
                if self.kept.ask(&object) {
                    self.asked.insert(object, 0);
                }
            }
            8 => self.answer(),
            9 => self.begin_transfer(),
            10 => {
                if self.wanted < WINDOW {
                    self.parts.ask();
                    self.wanted += 1;
                }
            }
            _ => {
                let take = self.small(2) == 1;
                if take {
                    self.wanted -= usize::from(self.parts.take().is_some());
                } else {
                    self.parts.arrived(Vec::new(), false)?;
                }
            }
        }
        Ok(())
    }

    /// Something changes on the source, and all that is dirty is sent.
    fn commit(&mut self) {
        let ops = u64::from(self.small(4));
        self.seq += 1;
        self.dirty.insert(self.seq);
        if self.flights.len() >= IN_FLIGHT {
            return;
        }
        let mark = Mark { batch: self.next, seq: Seq(self.seq), ..Mark::default() };
        self.next = self.next.next();
        self.flights.push(Flight {
            mark,
            input: Default::default(),
            closed: None,
            dropped: Default::default(),
            ops,
            durable: false,
            before: Timestamp::NEVER,
            reached: Timestamp::NEVER,
            note: std::mem::take(&mut self.dirty),
        });
    }

    /// Batches took effect: the journal is trimmed.
    fn done(&mut self, done: Vec<Flight<BTreeSet<u64>>>) {
        for flight in done {
            self.merged = flight.mark.batch;
            self.trimmed = flight.mark.seq.0;
            self.acknowledged.extend(flight.note);
        }
    }

    fn settle(&mut self, committed: BatchId) {
        let settled = self.flights.settle(committed);
        self.done(settled.done);
        for lost in settled.lost {
            self.dirty.extend(lost.note);
        }
        self.next = committed.next();
    }

    fn returned(&mut self) -> Result<(), Breach> {
        let (batch, objects, last) = (self.batch(), self.small(4), self.small(2) == 1);
        let before = self.merged;
        self.flights.may_return(batch, objects.into())?;
        if last {
            self.settle(BatchId(batch.0 - 1));
        }
        assert_eq!(self.merged, before, "what is given back acknowledges nothing");
        Ok(())
    }

    /// The session ends, and the next one's hello names the last batch.
    fn begin_anew(&mut self) {
        let committed = self.batch();
        let pending = self.flights.iter().map(|flight| flight.mark.edition()).collect();
        // No nonces: what a liar says of them is as good as what it says of numbers.
        let edition = |batch| Edition { batch, ..Edition::default() };
        let memory = Memory { peer: Some(PEER), merged: edition(self.merged), pending };
        if memory.agrees(PEER, edition(committed)) {
            self.settle(committed);
        } else {
            // Everything is compared anew.
            for lost in self.flights.iter() {
                self.dirty.extend(&lost.note);
            }
            self.flights.clear();
            (self.next, self.merged) = (BatchId(1), BatchId(0));
        }
        self.kept = Kept::default();
        self.asked.clear();
        self.parts = Parts::default();
        self.wanted = 0;
    }

    /// The destination names what it has: few objects, or many.
    fn tell(&mut self) {
        let (packed, large, last) = (self.count(), self.count(), self.small(2) == 1);
        let packed = (0..packed).map(|_| {
            self.numbered += 1;
            KeptObject { object: object(self.numbered), hash: Hash([0; 32]) }
        });
        let packed = packed.collect();
        let large = (0..large).map(|number| object(number.into())).collect();
        let (was, told) = (self.kept.size(), self.kept.is_told());
        self.kept.tell(packed, large, last);
        assert!(!told || self.kept.size() == was, "it had said all");
    }

    fn answer(&mut self) {
        let (object, count, last) = (self.object(), self.small(8), self.small(2) == 1);
        let chunk =
            |from| KeptChunk { from, chunk: Chunk { length: 1, hash: Hash([from as u8; 32]) } };
        let chunks = (0..u64::from(count)).map(chunk).collect();
        let awaited = self.kept.is_awaited(&object);
        self.kept.answer(&object, (0, Timestamp::NEVER), chunks, last);
        assert_eq!(self.kept.is_answered(&object) && awaited, last && awaited);
        if awaited {
            *self.asked.entry(object).or_default() += usize::from(count);
        }
    }

    /// A transfer begins with what was answered; sometimes it comes to nothing.
    fn begin_transfer(&mut self) {
        let (object, back) = (self.object(), self.small(2) == 1);
        // As the engine: only what waits for no answer begins.
        if !self.kept.is_awaited(&object) {
            let list = self.kept.begin(&object);
            let said = self.asked.remove(&object).unwrap_or_default();
            assert_eq!(list.map_or(0, |list| list.len()), said, "what was asked for, and said");
            if back {
                self.kept.put_back(object);
            }
        }
    }

    /// What must hold after each event.
    fn check(&self) {
        // INVARIANT (acknowledged means durable).
        assert!(self.flights.iter().all(|flight| flight.mark.batch > self.merged));
        let under_way = self.flights.iter().flat_map(|flight| &flight.note);
        let open: BTreeSet<&u64> = self.dirty.iter().chain(under_way).collect();
        assert!(open.iter().all(|change| !self.acknowledged.contains(change)));
        assert_eq!(open.len() + self.acknowledged.len(), self.seq as usize, "a change is lost");
        assert!(open.iter().all(|change| **change > self.trimmed), "trimmed too early");
        // In order, without holes.
        let newest = self.flights.back().map_or(self.merged, |newest| newest.mark.batch);
        assert_eq!(newest.next(), self.next);
        // Bounded resources.
        let (packed, large, chunks) = self.kept.size();
        assert!(packed <= KEPT_PACKED_MAX && large <= KEPT_TRANSFERS_MAX);
        assert!(chunks <= KEPT_CHUNKS_MAX * large);
        assert!(self.parts.waiting() <= self.wanted);
    }
}

fn object(number: u32) -> ObjectId {
    ObjectId::new(1, &number.to_le_bytes()).unwrap_or_else(|| unreachable!("four bytes fit"))
}
