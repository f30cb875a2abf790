//! Large files that grow: what was appended travels at once, and the hold stays
//! until a comparison has shown that the rest is as the replica has it.
//!
//! INVARIANT (the watermark tells the truth): what is placed ahead of a comparison
//! moves no floor, no batch with it is exact, and the index keeps the times of the
//! last reading, so that a walk after a crash reads the file. A comparison that
//! began at a moment S and found all chunks at their places proves them for S
//! (what changes later has an event later). What was appended meanwhile, it has not
//! seen: the transfer that follows compares that, brings what is new, and moves the
//! floor to S.

use std::sync::Arc;
use std::time::{Duration, Instant};

use replicator_common::id::{BatchId, ObjectId, TransferId};
use replicator_common::status::DesiredState;

use super::held::{Held, ReadyFile, Transfer};
use super::holds::{PATIENCE, UNSETTLED};
use super::{Engine, EngineError, Event};
use crate::index::{Content, Known, View};
use crate::plan::{Hold, HoldReason};
use crate::read::lane::LaneError;
use crate::read::sink::APPENDED;
use crate::read::tail::{Appended, Carried, Compared, Comparison, Done, Job};

/// Transfers of what was appended that are under way at a time.
const TAILS: usize = 16;
/// A file's next tail begins no sooner than this after the last was placed: each costs
/// a batch, half a kilobyte of headers and acknowledgements. So 64 KiB a second are 1.096
/// bytes of traffic for one (bench/NOTES.md).
const REST: Duration = Duration::from_millis(75);
/// A file that is written to all the time is compared no sooner than this many
/// times as long as the last comparison took: that is a thirty-third of a core.
const BUSY_PATIENCE: u32 = 32;
/// Objects that a batch is put off for, at most.
const AWAITED: usize = 64;

/// What is known of a held file that may have grown.
pub(super) struct Tail {
    /// The batch that placed it last.
    placed: BatchId,
    /// What the index's list lacks since then.
    appended: Option<Arc<Appended>>,
    /// An event came since the last tail was read.
    wanted: bool,
    /// When the next may be read.
    due: Instant,
    /// The comparison under way.
    comparing: Option<u64>,
    /// One is through, and what came after it is still to be sent.
    compared: Option<Compared>,
    /// An event came since the last comparison began.
    changed: bool,
    /// The first event and the last one.
    since: Instant,
    touched: Instant,
    /// It did not just grow: it is read as a whole.
    failed: bool,
}

impl Tail {
    pub(super) fn new(now: Instant) -> Self {
        Self {
            placed: BatchId(0),
            appended: None,
            wanted: true,
            due: now,
            comparing: None,
            compared: None,
            changed: false,
            since: now,
            touched: now,
            failed: false,
        }
    }

    /// An event of its content came.
    pub(super) fn touch(&mut self) {
        (self.wanted, self.changed) = (true, true);
        self.touched = Instant::now();
    }

    /// Whether a file that is about to be placed has changed since it was compared.
    pub(super) fn has_changed(&self, file: &ReadyFile) -> bool {
        self.changed && file.tail.is_some()
    }

    /// What was under way is lost with its session.
    pub(super) fn lose(&mut self) {
        self.wanted = true;
    }

    /// It is to be read as a whole.
    pub(super) fn fail(&mut self) {
        self.failed = true;
    }

    /// Whether it has not been found to have done more than grow.
    pub(super) fn is_alive(&self) -> bool {
        !self.failed
    }

    /// After a transfer of its file was placed by a batch, which changed when
    /// `touched`.
    pub(super) fn after(mut self, file: &ReadyFile, batch: BatchId, touched: bool) -> Self {
        let now = Instant::now();
        (self.placed, self.due) = (batch, now + REST);
        match &file.tail {
            Some(placed) if !placed.proven => {
                (self.appended, self.wanted) = (placed.appended.clone(), touched);
                self
            }
            Some(placed) => {
                let (wanted, touched, due) = (touched || self.changed, self.touched, self.due);
                let appended = placed.appended.clone();
                Self { placed: batch, appended, wanted, touched, due, ..Self::new(now) }
            }
            // Read as a whole.
            None => Self { placed: batch, due: self.due, ..Self::new(now) },
        }
    }

    /// When it is to be compared: some time after its last event, or after the
    /// first, when they do not end; and after a rest.
    fn compare_due(&self, settle: Duration, rest: Option<&Rest>) -> Instant {
        let after = |times| rest.map(|rest| rest.ended + rest.took * times);
        let quiet = (self.touched + settle).max(after(PATIENCE).unwrap_or(self.since));
        let busy =
            (self.since + settle * UNSETTLED).max(after(BUSY_PATIENCE).unwrap_or(self.since));
        quiet.min(busy)
    }
}

/// What of a file that is ready to be placed was appended to it.
pub(super) struct Placing {
    /// What the index's list lacks then.
    appended: Option<Arc<Appended>>,
    /// All else was compared.
    pub(super) proven: bool,
    /// What was appended, if the plan carries it.
    pub(super) carried: Option<Carried>,
}

/// When a large file was last read as a whole, and how long that took.
pub(super) struct Rest {
    ended: Instant,
    took: Duration,
    same: bool,
}

impl Held {
    /// Whether its transfer is one of what was appended, or it waits for one.
    fn tail_is_awaited(&self) -> bool {
        let Some(tail) = self.tail.as_ref().filter(|tail| !tail.failed) else { return false };
        match &self.transfer {
            Transfer::Waiting => tail.wanted,
            transfer => transfer.is_under_way(),
        }
    }
}

impl Engine {
    /// Known large files have events of their content: each waits from now on, and
    /// what was appended to it may travel ahead of a batch.
    pub(super) fn note_growth(&mut self, grown: Vec<(ObjectId, u64)>) {
        if self.gap.is_some() {
            return;
        }
        for (object, size) in grown {
            if self.holds.contains_key(&object) {
                continue;
            }
            let now = Instant::now();
            let hold = Hold { reason: HoldReason::Large { size }, entries: Default::default() };
            let held = Held {
                hold,
                floor: self.covered,
                since: self.clock.now(),
                due: now + self.settings.settle,
                transfer: Transfer::Waiting,
                touched: false,
                whole: false,
                reuses: false,
                tail: Some(Tail::new(now)),
                known: true,
            };
            self.holds.insert(object, held);
        }
    }

    /// Whether all that is dirty are files of which a tail is to be placed: a batch
    /// without it would say nothing, and delay it.
    pub(super) fn awaits_tails(&self) -> bool {
        let dirty = &self.dirty;
        let only_objects = dirty.entries.is_empty() && dirty.listings.is_empty();
        only_objects
            && self.gap.is_none()
            && (1..=AWAITED).contains(&dirty.objects.len())
            && dirty
                .objects
                .keys()
                .all(|object| self.holds.get(object).is_some_and(Held::tail_is_awaited))
    }

    /// How long until a file that grows needs attention.
    pub(super) fn next_tail(&self) -> Option<Duration> {
        if !self.may_tail() {
            return None;
        }
        let now = Instant::now();
        // The end of one is an event.
        let room = self.tails_running() < TAILS;
        let each = self.holds.iter().filter_map(|(object, held)| {
            let tail = held.tail.as_ref().filter(|tail| !tail.failed)?;
            if self.is_in_flight(tail.placed) {
                return None;
            }
            let waits = matches!(held.transfer, Transfer::Waiting);
            let next = match tail.wanted || tail.compared.is_some() {
                true if waits && room => Some(tail.due),
                _ => None,
            };
            let comparison = self.comparison_due(object, tail).filter(|_| waits);
            next.into_iter().chain(comparison).min()
        });
        each.min().map(|due| due.saturating_duration_since(now))
    }

    fn may_tail(&self) -> bool {
        self.session.is_some()
            && self.kept.is_told()
            && self.shared.desired() == DesiredState::Enabled
    }

    /// When a file's comparison may begin, if one may.
    fn comparison_due(&self, object: &ObjectId, tail: &Tail) -> Option<Instant> {
        let may = self.comparing.is_none() && tail.comparing.is_none() && tail.compared.is_none();
        may.then(|| tail.compare_due(self.settings.settle, self.rests.get(object)))
    }

    /// Starts what is due of files that grow.
    pub(super) fn tend_tails(&mut self) -> Result<(), EngineError> {
        if !self.may_tail() {
            return Ok(());
        }
        self.forget_compared();
        let now = Instant::now();
        let mut ship = Vec::new();
        let mut compare: Option<(Instant, ObjectId)> = None;
        for (object, held) in &self.holds {
            let Some(tail) = held.tail.as_ref().filter(|tail| !tail.failed) else { continue };
            if !matches!(held.transfer, Transfer::Waiting) || self.is_in_flight(tail.placed) {
                continue;
            }
            if (tail.wanted || tail.compared.is_some()) && tail.due <= now {
                ship.push((tail.due, object.clone()));
            }
            let due = self.comparison_due(object, tail).filter(|due| *due <= now);
            if let Some(due) = due.filter(|due| compare.as_ref().is_none_or(|(one, _)| due < one)) {
                compare = Some((due, object.clone()));
            }
        }
        // First: of a file that always has something new, none would ever begin.
        if let Some((_, object)) = compare {
            self.start_comparison(object)?;
        }
        // INVARIANT: so none starves, however many others grow all the time.
        ship.sort();
        for (_, object) in ship {
            if self.tails_running() >= TAILS {
                break;
            }
            self.start_tail(object)?;
        }
        Ok(())
    }

    /// Lists of comparisons that lead to nothing are no more.
    ///
    /// INVARIANT: what is under way may bring the list.
    fn forget_compared(&mut self) {
        let (holds, dead) = (&self.holds, &mut self.dead_lists);
        let counts = |held: &Held, list: u64| {
            let tail = held.tail.as_ref().filter(|tail| !tail.failed);
            let compared = tail.and_then(|tail| tail.compared);
            !matches!(held.transfer, Transfer::Waiting)
                || compared.is_some_and(|compared| compared.list == list)
        };
        self.compared_lists.retain(|object, list| {
            let counts = holds.get(object).is_some_and(|held| counts(held, *list));
            if !counts {
                dead.push(*list);
            }
            counts
        });
    }

    /// A batch places a file: if with the list of its comparison, that is the index's now.
    pub(super) fn place_compared(&mut self, object: &ObjectId, file: &ReadyFile) {
        if let Content::Chunks { list, .. } = file.known.content
            && self.compared_lists.get(object) == Some(&list)
        {
            self.compared_lists.remove(object);
        }
    }

    fn tails_running(&self) -> usize {
        self.running.keys().filter(|number| number.0 & APPENDED != 0).count()
    }

    /// A file as the replica has it, if it may just have grown; else it is read as a
    /// whole. `None` also while a batch under way changes it.
    fn growing(&mut self, object: &ObjectId) -> Result<Option<Known>, EngineError> {
        let known = self.index.object(object)?;
        let refused = self.refused.contains_key(object) || self.is_forced(object);
        let Some(held) = self.holds.get_mut(object) else { return Ok(None) };
        let fits = matches!(held.hold.reason, HoldReason::Large { .. })
            && held.hold.entries.is_empty()
            && !held.whole
            && !refused;
        let known = known.filter(|known| fits && matches!(known.content, Content::Chunks { .. }));
        let Some(known) = known else {
            self.read_whole(object);
            return Ok(None);
        };
        if !self.is_in_flight(known.version) {
            return Ok(Some(known));
        }
        if let Some(tail) = self.holds.get_mut(object).and_then(|held| held.tail.as_mut()) {
            tail.placed = known.version;
        }
        Ok(None)
    }

    /// Whether a batch is under way: the destination builds on nothing that it has
    /// not applied.
    fn is_in_flight(&self, batch: BatchId) -> bool {
        self.in_flight.iter().any(|flight| flight.mark.batch == batch)
    }

    /// It did not just grow.
    fn read_whole(&mut self, object: &ObjectId) {
        let Some(held) = self.holds.get_mut(object) else { return };
        if let Some(tail) = &mut held.tail {
            tail.fail();
        }
        if let Some(rest) = self.rests.get(object) {
            held.due = held.due.max(rest.ended + rest.took * PATIENCE);
        }
    }

    fn start_tail(&mut self, object: ObjectId) -> Result<(), EngineError> {
        let Some(known) = self.growing(&object)? else { return Ok(()) };
        let hint = self.hint_of(&object, &known)?;
        let list = self.next_list()?;
        let transfer = TransferId(self.next_transfer.0 | APPENDED);
        self.next_transfer = self.next_transfer.next();
        let (Some(session), Some(held)) = (&self.session, self.holds.get_mut(&object)) else {
            return Ok(());
        };
        let Some(tail) = &mut held.tail else { return Ok(()) };
        let (appended, compared) = (appended_to(tail, &known), tail.compared);
        (tail.wanted, held.touched) = (false, false);
        let basis = Some(object.clone());
        held.transfer = Transfer::Running { number: transfer, basis };
        self.running.insert(transfer, object.clone());
        let clock = self.clock.clone();
        let allowance = self.allowance.clone();
        let job = Job { transfer, object, hint, known, appended, compared, list, allowance, clock };
        let post = self.post.clone();
        self.pool.append(job, &session.sink, move |job, result| {
            // The engine may have stopped meanwhile.
            let _ = post.send(Event::Appended(Box::new(job), result));
        });
        Ok(())
    }

    fn start_comparison(&mut self, object: ObjectId) -> Result<(), EngineError> {
        let Some(known) = self.growing(&object)? else { return Ok(()) };
        let hint = self.hint_of(&object, &known)?;
        let list = self.next_list()?;
        let Some(tail) = self.holds.get_mut(&object).and_then(|held| held.tail.as_mut()) else {
            return Ok(());
        };
        self.comparisons += 1;
        let number = self.comparisons;
        (tail.comparing, tail.changed) = (Some(number), false);
        self.comparing = Some(number);
        let appended = appended_to(tail, &known);
        let job = Comparison { object, hint, known, appended, list, clock: self.clock.clone() };
        let post = self.post.clone();
        self.pool.compare(job, move |job, (result, took)| {
            // The engine may have stopped meanwhile.
            let _ = post.send(Event::Compared { object: job.object, number, result, took });
        });
        Ok(())
    }

    /// What was appended to a file is on its way, or nothing was.
    pub(super) fn tail_done(
        &mut self,
        job: &Job,
        result: Result<Done, LaneError>,
    ) -> Result<(), EngineError> {
        self.running.remove(&job.transfer);
        let arrived = self.arrived.remove(&job.transfer);
        let compared = job.compared;
        let done = match result {
            Ok(done) => done,
            Err(LaneError::Index(error)) => return Err(error.into()),
            Err(LaneError::Sink(_)) => {
                if let Some(held) = self.awaited(job.transfer, &job.object) {
                    held.transfer = Transfer::Waiting;
                    held.tail.iter_mut().for_each(|tail| tail.wanted = true);
                }
                return Ok(());
            }
            Err(LaneError::Read(_)) => Done::Otherwise,
        };
        let proven = compared.is_some();
        let started = compared.map_or(job.known.read_at, |compared| compared.started);
        let ready = |known: Box<Known>, appended, fresh, carried, moving| {
            let tail = Some(Placing { appended, proven, carried });
            let new = |list: &u64| *list == job.list;
            let list = match known.content {
                Content::Chunks { list, .. } => Some(list).filter(new),
                _ => None,
            };
            Box::new(ReadyFile { known: *known, fresh, started, moving, list, tail })
        };
        let (number, done, arrived) = match done {
            Done::Sent { known, appended, fresh, carried, moving } => {
                let arrived = arrived || carried.is_some();
                (job.transfer, ready(known, appended, fresh, carried, moving), arrived)
            }
            Done::Same { known, moving } => {
                (TransferId(0), ready(known, None, 0, None, moving), true)
            }
            // A later event of what was sent already, or a change elsewhere: the
            // comparison tells. Of a file that is not known to grow it need not be
            // tried.
            Done::NotGrown if self.grows(&job.object) => {
                if let Some(held) = self.awaited(job.transfer, &job.object) {
                    held.transfer = Transfer::Waiting;
                    // Others' turn.
                    held.tail.iter_mut().for_each(|tail| tail.due = Instant::now() + REST);
                }
                return Ok(());
            }
            Done::NotGrown | Done::Otherwise => {
                if let Some(held) = self.awaited(job.transfer, &job.object) {
                    held.transfer = Transfer::Waiting;
                    self.read_whole(&job.object);
                }
                return Ok(());
            }
        };
        let Some(held) = self.awaited(job.transfer, &job.object) else {
            self.discard_file(number, &done);
            return Ok(());
        };
        let basis = Some((job.object.clone(), job.known.version));
        held.transfer = Transfer::Ready { number, arrived, basis, done, took: Duration::ZERO };
        if arrived {
            self.redo_hold(&job.object);
        }
        Ok(())
    }

    /// Whether something was appended to a file of late, and nothing else changed.
    fn grows(&self, object: &ObjectId) -> bool {
        let tail = self.holds.get(object).and_then(|held| held.tail.as_ref());
        tail.is_some_and(|tail| tail.appended.is_some())
            || self.rests.get(object).is_some_and(|rest| rest.same)
    }

    fn awaited(&mut self, transfer: TransferId, object: &ObjectId) -> Option<&mut Held> {
        self.holds.get_mut(object).filter(|held| {
            matches!(&held.transfer, Transfer::Running { number, .. } if *number == transfer)
        })
    }

    /// A comparison has ended.
    pub(super) fn compared(
        &mut self,
        object: &ObjectId,
        number: u64,
        result: Result<Option<Compared>, LaneError>,
        took: Duration,
    ) -> Result<(), EngineError> {
        self.comparing = None;
        self.rest(object, took, matches!(result, Ok(Some(_))));
        if let Ok(Some(compared)) = &result {
            self.dead_lists.extend(self.compared_lists.insert(object.clone(), compared.list));
        }
        let held = self.holds.get_mut(object);
        let tail = held.and_then(|held| held.tail.as_mut());
        let Some(tail) = tail.filter(|tail| !tail.failed && tail.comparing == Some(number)) else {
            return Ok(());
        };
        tail.comparing = None;
        match result {
            Ok(Some(compared)) => tail.compared = Some(compared),
            Ok(None) | Err(LaneError::Read(_) | LaneError::Sink(_)) => {
                // At once: it is known to differ.
                tail.fail();
            }
            Err(LaneError::Index(error)) => return Err(error.into()),
        }
        Ok(())
    }

    /// A file was read as a whole, and that `took` so long; it was the `same` but for
    /// its end.
    pub(super) fn rest(&mut self, object: &ObjectId, took: Duration, same: bool) {
        let ended = Instant::now();
        self.rests.retain(|_, rest| rest.ended + rest.took * BUSY_PATIENCE > ended);
        self.rests.insert(object.clone(), Rest { ended, took, same });
    }

    fn hint_of(
        &mut self,
        object: &ObjectId,
        known: &Known,
    ) -> Result<Option<(ObjectId, replicator_common::name::Name)>, EngineError> {
        let hint = self.leading_to(object, &[])?;
        Ok(hint.or_else(|| known.entry.clone()))
    }
}

/// What the index's list of a file lacks, if that is known.
pub(super) fn appended_to(tail: &Tail, known: &Known) -> Option<Arc<Appended>> {
    let appended = tail.appended.as_ref().filter(|_| tail.placed == known.version)?;
    appended.is_of(known).then(|| appended.clone())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A file that is left alone is compared soon, one that is not comes to it all
    /// the same; both after a rest that the last comparison sets.
    #[test]
    fn when_a_file_that_grows_is_compared() {
        let (now, settle) = (Instant::now(), Duration::from_millis(250));
        let mut tail = Tail::new(now);
        assert_eq!(tail.compare_due(settle, None), now + settle);
        let rest = Rest { ended: now, took: Duration::from_secs(1), same: true };
        assert_eq!(tail.compare_due(settle, Some(&rest)), now + Duration::from_secs(4));
        // An event every moment, for ever.
        tail.touched = now + Duration::from_secs(60);
        assert_eq!(tail.compare_due(settle, None), now + settle * 8);
        assert_eq!(tail.compare_due(settle, Some(&rest)), now + Duration::from_secs(32));
    }
}
