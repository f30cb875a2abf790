//! What is under way, how far it reaches, and what of it counts when a session
//! breaks. Pure: no clock, no file system, no store, no network; the engine and
//! the simulation (`replicator-simulation`) both keep their books by it.
//!
//! - [`Span`]: which part of the journal, and of time, a batch covers.
//! - [`Gap`]: a stretch of time in which changes may have been missed.
//! - [`Flights`]: batches that were committed and are not acknowledged.
//! - [`Owed`]: what waited and is looked at anew.
//! - [`Claim`]: what a batch may say of itself.
//! - [`Memory`]: whether two sides remember the same history.

use std::collections::{BTreeMap, BTreeSet, HashSet, VecDeque};

use replicator_common::id::{BatchId, Edition, Incarnation, ObjectId, Seq};
use replicator_common::name::Name;
use replicator_common::time::Timestamp;

use crate::index::Mark;
use crate::plan::Dirty;
use crate::replies::Breach;

/// Which part of the journal, and of time, a batch covers while it is built.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    /// The journal is absorbed up to here.
    pub seq: Seq,
    /// Every change before this moment was absorbed.
    pub time: Timestamp,
    /// The barrier's moment could be taken over (else it was not reached).
    pub reached: bool,
    /// Nothing that was looked at has changed since [`Span::time`].
    pub exact: bool,
    /// The walk had ended, and every event of its time was absorbed, before
    /// this batch began.
    pub walked: bool,
}

impl Span {
    /// Of a batch that begins at `seq`, with nothing left of a walk if `walked`.
    pub fn new(seq: Seq, time: Timestamp, walked: bool) -> Self {
        Self { seq, time, reached: false, exact: false, walked }
    }

    /// A barrier was found in the journal at `seq`. One of a process before
    /// this (up to `inherited`) proves nothing: the restart is a gap, and its
    /// moments are of another clock.
    pub fn pass(&mut self, seq: Seq, time: Timestamp, inherited: Seq) {
        if seq > inherited {
            self.time = self.time.max(time);
        }
    }

    /// The barrier that was drawn for this batch stands at `seq`.
    ///
    /// INVARIANT: its moment counts only when the journal was absorbed that far.
    pub fn reach(&mut self, seq: Seq, time: Timestamp) {
        self.reached = self.seq >= seq;
        if self.reached {
            self.time = self.time.max(time);
        }
    }

    /// Something of what was absorbed is left for the next batch: it is not in
    /// the replica yet, so nothing after `covered` is proven.
    pub fn leave_behind(&mut self, covered: Timestamp) {
        self.time = covered;
        self.reached = false;
        self.exact = false;
    }
}

/// A stretch of time in which changes may have been missed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Gap {
    /// Why, in words.
    pub reason: String,
    /// Every change before this is in the replica; the watermark waits here.
    pub floor: Timestamp,
    /// When it opened.
    pub since: Timestamp,
    /// When the walk that is to close it began.
    pub walk_started: Timestamp,
    /// Events were lost again while the walk ran: another walk must follow.
    pub again: Option<String>,
    /// A walk was already repeated for want of watches (see [`Gap::walk_twice`]), and no
    /// event was lost since.
    pub twice: bool,
}

/// What became of a gap.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Closing {
    /// There is none, or its walk is not through.
    No,
    /// Its walk is through, but events were lost meanwhile: walk again.
    Again,
    /// It is closed by the batch that is being built.
    Closed(Gap),
}

impl Gap {
    /// Opens one, or notes that events were lost again. Says whether a walk has
    /// to begin.
    pub fn open(
        gap: &mut Option<Self>,
        reason: String,
        covered: Timestamp,
        now: Timestamp,
    ) -> bool {
        if let Some(gap) = gap {
            gap.again = Some(reason);
            // Which watches are missing after that, only the walk to come can tell.
            gap.twice = false;
            return false;
        }
        let (floor, since, walk_started) = (covered, now, now);
        *gap = Some(Self { reason, floor, since, walk_started, again: None, twice: false });
        true
    }

    /// Its walk came to directories that had no watch until then: only one that
    /// finds a watch everywhere proves anything. Where new directories come all the
    /// time that would never end; so it is once a gap (`status` tells of the rest).
    pub fn walk_twice(&mut self) {
        if self.again.is_none() && !self.twice {
            self.twice = true;
            self.again = Some("some directories had no watch until they were walked".to_owned());
        }
    }

    /// Closes one whose walk is `through`.
    pub fn close(gap: &mut Option<Self>, through: bool, now: Timestamp) -> Closing {
        let Some(open) = gap.as_mut().filter(|_| through) else { return Closing::No };
        if let Some(reason) = open.again.take() {
            open.reason = reason;
            open.walk_started = now;
            return Closing::Again;
        }
        gap.take().map_or(Closing::No, Closing::Closed)
    }
}

/// A batch that was committed and is not acknowledged.
#[derive(Clone, Debug)]
pub struct Flight<T> {
    /// Where it leaves the source.
    pub mark: Mark,
    /// Everything that was dirty when it was built: dirty again when it is lost.
    pub input: Dirty,
    /// The gap that it closed.
    pub closed: Option<Gap>,
    /// Objects that it drops.
    pub dropped: HashSet<ObjectId>,
    /// Operations of its plan.
    pub ops: u64,
    /// The destination said that it is durable.
    pub durable: bool,
    /// Every change before this moment was in the replica before it: what holds
    /// again when it is lost. (What was covered then may be later: something
    /// waited, and what was sent to end that is lost, too.)
    pub before: Timestamp,
    /// Every change before this moment is in the replica after it.
    pub reached: Timestamp,
    /// What the keeper wants to know of it beside.
    pub note: T,
}

/// What broke a [`Flights::settle`] left.
#[derive(Clone, Debug)]
pub struct Settled<T> {
    /// Batches that took effect, oldest first.
    pub done: Vec<Flight<T>>,
    /// Batches that did not.
    pub lost: Vec<Flight<T>>,
}

/// Batches that are under way, oldest first.
#[derive(Clone, Debug)]
pub struct Flights<T> {
    queue: VecDeque<Flight<T>>,
    /// Objects that the destination named of the oldest, which it gives back.
    named: u64,
}

impl<T> Default for Flights<T> {
    fn default() -> Self {
        Self { queue: VecDeque::new(), named: 0 }
    }
}

impl<T> std::ops::Deref for Flights<T> {
    type Target = VecDeque<Flight<T>>;

    fn deref(&self) -> &Self::Target {
        &self.queue
    }
}

/// Batches that may be under way: one that the destination makes durable while
/// the next is built and staged.
const MOST: usize = 2;
/// The same while the last of them is a large one. Making one durable may take
/// longer than the next takes on the line: with two, both are then there, and the
/// line is empty for a round trip and the building of a third. A third *small*
/// one would wait for those before it, and make changes travel in smaller parts.
const MOST_LARGE: usize = 3;
/// Operations of a large one: half of what a batch of new files has.
const LARGE: u64 = 8192;

impl<T> Flights<T> {
    /// Whether one more may be; behind the `last` of many nothing is to come.
    pub fn have_room(&self, last: bool) -> bool {
        let large = self.queue.back().is_some_and(|last| last.ops >= LARGE);
        self.queue.len() < if large || last { MOST_LARGE } else { MOST }
    }

    /// One more is committed.
    pub fn push(&mut self, flight: Flight<T>) {
        self.queue.push_back(flight);
    }

    /// None of them counts any more.
    pub fn clear(&mut self) {
        self.queue.clear();
        self.named = 0;
    }

    /// Whether one of them drops this object.
    ///
    /// INVARIANT (the watermark tells the truth): what a batch drops stays ours
    /// until the batch took effect, though the index says that it is gone: its
    /// events count, and what of it waits goes on waiting. For when the batch is
    /// lost, the replica has the object as before, and nobody would look at what
    /// happened to it meanwhile.
    pub fn drops(&self, object: &ObjectId) -> bool {
        self.queue.iter().any(|flight| flight.dropped.contains(object))
    }

    /// The destination says that those up to `batch` are durable, or in the
    /// replica; `next` is the one that will be sent next.
    ///
    /// INVARIANT (acknowledged means durable): what was not sent cannot have
    /// arrived. Else the acknowledgement of a batch to come would trim the
    /// journal of what is in no batch yet.
    pub fn may_acknowledge(&self, batch: BatchId, next: BatchId) -> Result<(), Breach> {
        if batch < next { Ok(()) } else { Err(Breach::NotSent { batch, next }) }
    }

    /// The destination gives `batch` back, and names `objects` of it that find
    /// no place.
    ///
    /// INVARIANT: only the oldest under way can be given back, since all before
    /// it are in the replica. So giving back acknowledges nothing, and batches
    /// are numbered on from where they are, not from where a liar says.
    ///
    /// INVARIANT (bounded resources): it names no more objects than the batch
    /// has operations, in however many messages.
    pub fn may_return(&mut self, batch: BatchId, objects: usize) -> Result<(), Breach> {
        let oldest = self.queue.front().filter(|oldest| oldest.mark.batch == batch);
        let Some(oldest) = oldest else { return Err(Breach::NotOldest { batch }) };
        self.named = self.named.saturating_add(objects as u64);
        if self.named > oldest.ops { Err(Breach::TooManyNamed { batch }) } else { Ok(()) }
    }

    /// The destination says that those up to `batch` are durable.
    pub fn durable(&mut self, batch: BatchId) {
        for flight in &mut self.queue {
            flight.durable |= flight.mark.batch <= batch;
        }
    }

    /// The destination says that those up to `batch` are in the replica: takes
    /// them out, oldest first.
    ///
    /// INVARIANT (acknowledged means durable): the journal is trimmed up to the
    /// marks of what this returns, or [`Flights::settle`] does, and no further.
    pub fn applied(&mut self, batch: BatchId) -> Vec<Flight<T>> {
        let count = self.queue.iter().take_while(|flight| flight.mark.batch <= batch).count();
        if count > 0 {
            self.named = 0;
        }
        self.queue.drain(..count).collect()
    }

    /// A new session begins: batches up to `committed` took effect, later ones
    /// are built anew.
    pub fn settle(&mut self, committed: BatchId) -> Settled<T> {
        let done = self.applied(committed);
        self.named = 0;
        Settled { done, lost: self.queue.drain(..).collect() }
    }
}

/// What a lost batch takes back: what it had brought is not in the replica.
///
/// INVARIANT (the watermark tells the truth): what the batch had brought may have
/// waited for long, and holds nothing any more by itself. So whatever bounds a
/// claim from now on is put back to the moment before it: what is covered, what
/// waits, and the gap, also one that the batch had closed.
///
/// `floors` are where things that wait hold the watermark. Says whether the gap
/// that it had closed is open again.
pub fn take_back<'a, T>(
    lost: &mut Flight<T>,
    covered: &mut Timestamp,
    gap: &mut Option<Gap>,
    floors: impl Iterator<Item = &'a mut Timestamp>,
) -> bool {
    *covered = (*covered).min(lost.before);
    for floor in floors {
        *floor = (*floor).min(lost.before);
    }
    match (gap.as_mut(), lost.closed.take()) {
        (Some(gap), _) => {
            gap.floor = gap.floor.min(lost.before);
            false
        }
        (None, Some(mut closed)) => {
            // By now that is before all that were lost: others may have been sent
            // before this gap was opened.
            closed.floor = closed.floor.min(*covered);
            *gap = Some(closed);
            true
        }
        (None, None) => false,
    }
}

/// An entry.
pub type Place = (ObjectId, Name);

/// Entries that waited for an object which waits no more, and that are still
/// not as they are on the source: another object may wait under the same name
/// now, or nobody has looked at them yet.
///
/// INVARIANT (the watermark tells the truth): while an entry is not what it is
/// on the source, the moment since when it is not so holds the watermark,
/// whatever it waits for by then.
#[derive(Clone, Debug, Default)]
pub struct Owed(BTreeMap<Place, Timestamp>);

impl Owed {
    /// These waited since `floor`, and are dirty, or looked at by the batch that
    /// is being built.
    pub fn release(&mut self, places: impl IntoIterator<Item = Place>, floor: Timestamp) {
        for place in places {
            let owed = self.0.entry(place).or_insert(floor);
            *owed = (*owed).min(floor);
        }
    }

    /// A batch has looked at `seen`, all but what it looks at `again` in the
    /// next; `holds` are what waits after it, with their floors.
    pub fn settle<'a>(
        &mut self,
        seen: impl Fn(&Place) -> bool,
        again: &BTreeSet<Place>,
        holds: impl Iterator<Item = (&'a BTreeSet<Place>, &'a mut Timestamp)>,
    ) {
        if self.0.is_empty() {
            return;
        }
        for (places, floor) in holds {
            let owed = places.iter().filter_map(|place| self.0.get(place));
            *floor = owed.fold(*floor, |floor, owed| floor.min(*owed));
        }
        self.0.retain(|place, _| again.contains(place) || !seen(place));
    }

    /// Nothing is in directories that are gone.
    pub fn forget(&mut self, mut gone: impl FnMut(&ObjectId) -> bool) {
        self.0.retain(|(directory, _), _| !gone(directory));
    }

    /// The entries.
    pub fn places(&self) -> impl Iterator<Item = &Place> {
        self.0.keys()
    }

    /// Where it holds the watermark.
    pub fn floor(&self) -> Option<Timestamp> {
        self.0.values().min().copied()
    }
}

/// What bears on a batch's claim.
#[derive(Clone, Copy, Debug)]
pub struct Claim<'a> {
    /// What the batch covers.
    pub span: Span,
    /// What was covered before it.
    pub covered: Timestamp,
    /// The gap that is open after it.
    pub gap: Option<&'a Gap>,
    /// The gap that it closes.
    pub closed: Option<&'a Gap>,
    /// Barriers prove that every event before them was seen.
    pub proves: bool,
    /// The earliest moment at which something that waits holds the watermark:
    /// large files, orphans.
    pub waiting: Option<Timestamp>,
}

/// How far a batch reaches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reach {
    /// What is covered from now on.
    pub covered: Timestamp,
    /// Every change before this moment is in the replica after the batch.
    pub reached: Timestamp,
    /// The replica equals the source at [`Span::time`].
    pub exact: bool,
}

impl Claim<'_> {
    /// The rule (ARCHITECTURE.md "Watermark").
    ///
    /// INVARIANT (the watermark tells the truth): it does not pass an open gap,
    /// nor anything that waits.
    pub fn reach(&self) -> Reach {
        let base = match (self.gap, self.closed) {
            (Some(gap), _) => gap.floor,
            // Where only a walk proves anything, it proves it for the moment
            // at which it began.
            (None, Some(gap)) if !self.proves => gap.walk_started,
            (None, None) if !self.proves => self.covered,
            _ => self.span.time,
        };
        let reached = self.waiting.map_or(base, |waiting| waiting.min(base));
        let quiet = self.waiting.is_none() && self.gap.is_none();
        Reach {
            covered: self.covered.max(base),
            reached,
            exact: self.span.exact && quiet && self.proves,
        }
    }
}

/// What the source remembers when a session begins.
#[derive(Clone, Debug)]
pub struct Memory {
    /// The destination's life that the index describes.
    pub peer: Option<Incarnation>,
    /// The last batch that is known to have taken effect.
    ///
    /// INVARIANT (trap 14): that is also the last one that was acknowledged to this
    /// process, before its delta is merged into the index. The journal is trimmed
    /// by then; a destination that has forgotten the batch since must not be taken
    /// for one that never had it.
    pub merged: Edition,
    /// Batches whose deltas are durable, acknowledged or not.
    pub pending: Vec<Edition>,
}

impl Memory {
    /// Whether the index describes the replica of a destination that is of this
    /// `incarnation` and whose last batch is `committed` (trap 14).
    ///
    /// INVARIANT: numbers alone do not agree. A batch that was lost is built anew
    /// under its number; a state that was saved before, and put back, still
    /// remembers the first, and the replica has the second.
    pub fn agrees(&self, incarnation: Incarnation, committed: Edition) -> bool {
        let pending = self.pending.iter().filter(|pending| pending.batch > self.merged.batch);
        let mut known = std::iter::once(&self.merged).chain(pending);
        if committed.batch == BatchId(0) && known.clone().all(|known| known.batch == BatchId(0)) {
            return true;
        }
        self.peer == Some(incarnation) && known.any(|known| known.is(&committed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use replicator_common::id::BatchNonce;

    fn edition(batch: u64, nonce: u64) -> Edition {
        Edition { batch: BatchId(batch), nonce: BatchNonce(nonce) }
    }

    #[test]
    fn a_third_is_under_way_behind_a_large_one_only() {
        let room = |ops: &[u64], last| {
            let mut flights = Flights::default();
            for &ops in ops {
                flights.push(Flight {
                    mark: Mark::default(),
                    input: Dirty::default(),
                    closed: None,
                    dropped: HashSet::new(),
                    ops,
                    durable: false,
                    before: Timestamp::NEVER,
                    reached: Timestamp::NEVER,
                    note: (),
                });
            }
            flights.have_room(last)
        };
        let rooms = |ops: &[u64]| room(ops, false);
        assert!(rooms(&[]) && rooms(&[1]) && rooms(&[LARGE]));
        assert!(!rooms(&[1, 1]) && !rooms(&[LARGE, LARGE - 1]));
        assert!(rooms(&[1, LARGE]) && rooms(&[LARGE, LARGE]));
        assert!(!rooms(&[LARGE, LARGE, LARGE]));
        assert!(room(&[LARGE, 1], true) && !room(&[LARGE, 1, 1], true));
    }

    #[test]
    fn a_gap_without_watches_is_walked_once_more_and_not_for_ever() {
        let at = Timestamp;
        let mut gap = None;
        assert!(Gap::open(&mut gap, "initial sync".to_owned(), at(1), at(2)));
        // Lost events ask for another walk by themselves; that one has to find watches.
        assert!(!Gap::open(&mut gap, "overflow".to_owned(), at(3), at(3)));
        gap.as_mut().unwrap().walk_twice();
        assert_eq!(Gap::close(&mut gap, true, at(4)), Closing::Again);
        let open = gap.as_ref().unwrap();
        assert_eq!(
            (open.reason.as_str(), open.floor, open.walk_started),
            ("overflow", at(1), at(4))
        );
        gap.as_mut().unwrap().walk_twice();
        assert_eq!(Gap::close(&mut gap, false, at(5)), Closing::No);
        assert_eq!(Gap::close(&mut gap, true, at(5)), Closing::Again);
        gap.as_mut().unwrap().walk_twice();
        let Closing::Closed(closed) = Gap::close(&mut gap, true, at(6)) else { panic!() };
        assert_eq!((closed.floor, closed.walk_started), (at(1), at(5)));
    }

    #[test]
    fn trap_14_what_does_not_fit_the_memory_is_not_agreed_to() {
        let (one, other) = (Incarnation([1; 16]), Incarnation([2; 16]));
        let memory = |merged: u64, pending: &[u64]| Memory {
            peer: Some(one),
            merged: edition(merged, merged),
            pending: pending.iter().map(|batch| edition(*batch, *batch)).collect(),
        };
        for (memory, committed, agreed) in [
            (memory(0, &[]), 0, true),
            (memory(3, &[]), 3, true),
            (memory(3, &[4, 5]), 4, true),
            (memory(3, &[4, 5]), 5, true),
            (memory(3, &[4, 5]), 6, false),
            (memory(3, &[4, 5]), 2, false),
            (memory(3, &[2, 3, 4]), 2, false),
            (memory(3, &[]), 0, false),
            (memory(0, &[]), 1, false),
        ] {
            let agrees = memory.agrees(one, edition(committed, committed));
            assert_eq!(agrees, agreed, "{memory:?} {committed}");
        }
        assert!(!memory(3, &[]).agrees(other, edition(3, 3)));
        assert!(memory(0, &[]).agrees(other, edition(0, 0)), "nothing was ever replicated");
    }

    #[test]
    fn a_lost_batch_puts_back_the_floor_of_the_gap_that_it_had_closed() {
        let moment = Timestamp(30);
        let mut gap = None;
        assert!(Gap::open(&mut gap, "overflow".to_owned(), moment, moment));
        let mut lost = Flight {
            mark: Mark::default(),
            input: Dirty::default(),
            closed: gap.take(),
            dropped: HashSet::new(),
            ops: 0,
            durable: false,
            // A large file had been waiting since.
            before: Timestamp(10),
            reached: moment,
            note: (),
        };
        let mut covered = moment;
        assert!(take_back(&mut lost, &mut covered, &mut gap, std::iter::empty()));
        let floor = gap.as_ref().map(|gap| gap.floor);
        assert_eq!((covered, floor), (Timestamp(10), Some(Timestamp(10))));

        // The batch before was lost, too: the gap was opened behind it.
        let mut first = Flight { before: Timestamp(10), ..lost.clone() };
        let mut second = Flight { before: moment, closed: gap.take(), ..lost };
        second.closed.as_mut().unwrap().floor = moment;
        let mut covered = moment;
        assert!(!take_back(&mut first, &mut covered, &mut gap, std::iter::empty()));
        assert!(take_back(&mut second, &mut covered, &mut gap, std::iter::empty()));
        assert_eq!(gap.map(|gap| gap.floor), Some(Timestamp(10)));
    }

    #[test]
    fn trap_14_another_batch_of_the_same_number_is_not_agreed_to() {
        let peer = Incarnation([1; 16]);
        let memory =
            Memory { peer: Some(peer), merged: edition(3, 9), pending: vec![edition(4, 8)] };
        assert!(memory.agrees(peer, edition(4, 8)) && memory.agrees(peer, edition(3, 9)));
        assert!(!memory.agrees(peer, edition(4, 7)) && !memory.agrees(peer, edition(3, 8)));
        assert!(memory.agrees(peer, edition(4, 0)), "of a program without nonces");
    }
}
