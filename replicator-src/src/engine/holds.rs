//! What waits: large files whose content travels on its own, files that cannot
//! be read. The watermark waits with them, everything else goes on.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use replicator_common::id::{ObjectId, TransferId};
use replicator_common::name::Name;
use replicator_common::pulse;
use replicator_common::status::DesiredState;
use replicator_common::time::Timestamp;

use super::held::{Held, ReadyFile, Transfer};
use super::tails::{Tail, appended_to};
use super::{Engine, EngineError, Event};
use crate::index::{Content, Known, View};
use crate::journal::Record;
use crate::plan::waits::is_touched;
use crate::plan::{Hold, HoldReason, Listing, Lookup, Resolve, Tree};
use crate::read::blocks::Asker;
use crate::read::lane::{Done, Job, LaneError};
use crate::read::sink::APPENDED;
use crate::watcher::What;

/// Transfers under way at a time.
const TRANSFERS: usize = 2;
/// When what could not be read is tried again.
const RETRY: Duration = Duration::from_secs(5);
/// What waits because of its names is looked at again after this for each.
const EACH: Duration = Duration::from_millis(1);
/// When a name that is too long is looked at again, unless an event tells that
/// it was changed.
const RENAMED: Duration = Duration::from_secs(3600);
/// When a transfer of what was not found where it was believed is begun again.
const LOOK_AGAIN: Duration = Duration::from_millis(200);
/// When a file that has arrived and is not placed is looked for again.
const PLACE: Duration = Duration::from_secs(1);
/// A file that is not left alone is sent all the same after this many times as long
/// as one that is.
pub(super) const UNSETTLED: u32 = 8;
/// A file that keeps changing is read again no sooner than this many times
/// as long as the last reading took: so it costs a bounded share of a core.
pub(super) const PATIENCE: u32 = 4;

impl Engine {
    /// How long until a hold needs attention.
    pub(super) fn next_hold(&self) -> Option<Duration> {
        let now = Instant::now();
        let (transfers, more) = (self.may_transfer(), self.may_ask());
        self.holds
            .iter()
            .filter(|(object, held)| match held.hold.reason {
                HoldReason::Large { .. } if self.may_be_astray(held) => true,
                HoldReason::Large { .. } => {
                    let room = transfers && (more || self.kept.is_answered(object));
                    room && self.may_begin(object, held)
                }
                HoldReason::Unreadable { .. } | HoldReason::Refused { .. } => true,
            })
            .map(|(_, held)| held.due.saturating_duration_since(now))
            .min()
    }

    /// Whether one more transfer may begin now, or one whose chunks were asked for.
    fn may_transfer(&self) -> bool {
        self.session.is_some()
            && self.kept.is_told()
            && self.large_running() < TRANSFERS
            && self.shared.desired() == DesiredState::Enabled
    }

    /// Whether one more may begin of which nothing was asked: each that was
    /// takes one of the places.
    fn may_ask(&self) -> bool {
        self.large_running() + self.kept.asked() < TRANSFERS
    }

    /// Transfers of whole files under way.
    fn large_running(&self) -> usize {
        self.running.keys().filter(|number| number.0 & APPENDED == 0).count()
    }

    /// Whether a large file's transfer waits for nothing but its time.
    fn may_begin(&self, object: &ObjectId, held: &Held) -> bool {
        matches!(held.hold.reason, HoldReason::Large { .. })
            && matches!(held.transfer, Transfer::Waiting)
            && !self.kept.is_awaited(object)
            && !held.tail.as_ref().is_some_and(Tail::is_alive)
    }

    /// Takes the holds that a batch left, or renewed.
    pub(super) fn take_holds(
        &mut self,
        holds: BTreeMap<ObjectId, Hold>,
        floor: Timestamp,
        walking: bool,
    ) {
        let (now, limits) = (Instant::now(), self.limits());
        for (object, hold) in holds {
            let delay = match hold.reason {
                HoldReason::Refused { .. }
                    if hold.entries.iter().any(|(_, name)| limits.too_long(name).is_some()) =>
                {
                    RENAMED
                }
                HoldReason::Unreadable { .. } => RETRY,
                HoldReason::Refused { .. } => self
                    .refused
                    .get(&object)
                    .map_or(RETRY, |one| one.due.saturating_duration_since(now))
                    // Looking at names that do not fit costs a bounded share of a core.
                    .max(EACH * hold.entries.len() as u32),
                // A walk finds what was there before; events find what is
                // being written now.
                HoldReason::Large { .. } if walking => Duration::ZERO,
                HoldReason::Large { .. } => self.settings.settle,
            };
            match self.holds.get_mut(&object) {
                Some(held) => {
                    held.hold.reason = hold.reason;
                    held.hold.entries.extend(hold.entries);
                    if matches!(held.transfer, Transfer::Waiting) {
                        // Changed again: settle anew, but not for ever.
                        let bound = Duration::from_nanos(
                            self.clock.now().since(held.since).as_nanos() as u64,
                        );
                        if bound < self.settings.settle * UNSETTLED {
                            held.due = held.due.max(now + delay);
                        }
                    }
                }
                None => {
                    let since = self.clock.now();
                    let transfer = Transfer::Waiting;
                    let due = now + delay;
                    let (touched, whole) = (false, false);
                    let large = matches!(hold.reason, HoldReason::Large { .. });
                    let known = || self.index.object(&object).ok().flatten();
                    let cut = |known: Known| matches!(known.content, Content::Chunks { .. });
                    // What is not known has not grown.
                    let may_have_grown = large && !walking && known().is_some_and(cut);
                    let tail = may_have_grown.then(|| Tail::new(now));
                    let reuses = false;
                    let known = self.index.kind(&object).ok().flatten().is_some();
                    let held = Held {
                        hold,
                        floor,
                        since,
                        due,
                        transfer,
                        touched,
                        whole,
                        reuses,
                        tail,
                        known,
                    };
                    self.holds.insert(object, held);
                }
            }
        }
    }

    /// Holds whose time has come and that need no transfer are looked at again.
    pub(super) fn due_holds(&mut self) {
        let now = Instant::now();
        let due: Vec<ObjectId> = self
            .holds
            .iter()
            .filter(|(_, held)| {
                let waits = !matches!(held.hold.reason, HoldReason::Large { .. });
                (waits || self.may_be_astray(held)) && held.due <= now
            })
            .map(|(object, _)| object.clone())
            .collect();
        for object in due {
            self.redo_hold(&object);
            if let Some(held) = self.holds.get_mut(&object) {
                held.due = now + if held.transfer.has_arrived() { PLACE } else { RETRY };
            }
        }
    }

    /// Whether a file has arrived, and may wait because one of its entries could
    /// not be looked at when it did. By handle, all of them are.
    fn may_be_astray(&self, held: &Held) -> bool {
        held.transfer.has_arrived() && !self.opener.root().by_handle()
    }

    /// Marks all that waits for an object dirty.
    pub(super) fn redo_hold(&mut self, object: &ObjectId) {
        let Some(held) = self.holds.get(object) else { return };
        let what = What { content: true, attributes: true };
        let entries: BTreeSet<(ObjectId, Name)> = held.hold.entries.clone();
        for (directory, name) in entries {
            self.dirty.entry(directory, name, what);
        }
        self.dirty.object(object.clone(), what);
        if held.hold.entries.is_empty() && !matches!(held.hold.reason, HoldReason::Large { .. }) {
            // A directory that could not be listed, or a file: for that, this
            // comes to nothing.
            self.dirty.listings.push_back(Listing::new(object.clone(), true));
        }
    }

    /// Starts transfers of large files that are due, a few at a time.
    pub(super) fn start_transfers(&mut self) -> Result<(), EngineError> {
        let now = Instant::now();
        while self.may_transfer() {
            let due = match self.answered(now) {
                Some(object) => Some(object),
                None if !self.may_ask() => None,
                None => next_due(&self.holds, now, |object, held| self.may_begin(object, held)),
            };
            let Some(object) = due else { break };
            if !self.ask_kept(&object) {
                self.start_transfer(object)?;
            }
        }
        Ok(())
    }

    fn start_transfer(&mut self, object: ObjectId) -> Result<(), EngineError> {
        let whole =
            self.holds.get(&object).is_some_and(|held| held.whole) || self.is_forced(&object);
        let known = self.index.object(&object)?;
        let entries: Vec<_> = self
            .holds
            .get(&object)
            .map(|held| held.hold.entries.iter().cloned().collect())
            .unwrap_or_default();
        // One that was small when the replica got it is as good as new.
        let own = known.as_ref().filter(|it| matches!(it.content, Content::Chunks { .. }));
        let names = entries.iter().chain(known.as_ref().and_then(|known| known.entry.as_ref()));
        let resembles = if whole || own.is_some() { None } else { self.resembling(names)? };
        let number = self.next_transfer;
        self.next_transfer = number.next();
        let hint = self.leading_to(&object, &entries)?;
        let hint = hint.or_else(|| known.as_ref()?.entry.clone());
        let other = resembles.as_ref().map(|(object, _)| object.clone());
        let itself = || known.is_some().then(|| object.clone());
        let basis = if whole { None } else { other.or_else(itself) };
        let list = self.next_list()?;
        let tail = self.holds.get(&object).and_then(|held| held.tail.as_ref());
        let appended = tail.zip(known.as_ref()).and_then(|(tail, known)| appended_to(tail, known));
        let kept = self.kept.begin(&object);
        let reuses = kept.is_some();
        let job = Job {
            transfer: number,
            object: object.clone(),
            hint,
            known,
            appended,
            resembles,
            list,
            whole,
            kept,
            asker: Asker(self.post.clone()),
            clock: self.clock.clone(),
            took: Duration::ZERO,
        };
        let (Some(session), Some(held)) = (&self.session, self.holds.get_mut(&object)) else {
            return Ok(());
        };
        held.touched = false;
        (held.whole, held.reuses) = (whole, reuses);
        held.transfer = Transfer::Running { number, basis };
        self.running.insert(number, object);
        let post = self.post.clone();
        self.pool.transfer(job, &session.sink, move |job, result| {
            // The engine may have stopped meanwhile.
            let _ = post.send(Event::Transfer(Box::new(job), result));
        });
        Ok(())
    }

    /// One of the entries that leads to the object now, where names are all
    /// that does.
    pub(super) fn leading_to(
        &mut self,
        object: &ObjectId,
        entries: &[(ObjectId, Name)],
    ) -> Result<Option<(ObjectId, Name)>, EngineError> {
        if self.opener.root().by_handle() {
            return Ok(entries.first().cloned());
        }
        for (directory, name) in entries {
            let found = self.tree.lookup(directory, name)?;
            if matches!(found, Lookup::Found(seen) if seen.object == *object) {
                return Ok(Some((directory.clone(), name.clone())));
            }
        }
        Ok(None)
    }

    pub(super) fn next_list(&mut self) -> Result<u64, EngineError> {
        const RESERVE: u64 = 1000;
        if self.lists.is_empty() {
            let first = self.index.store().reserve_lists(RESERVE)?;
            self.lists = first..first + RESERVE;
        }
        let list = self.lists.start;
        self.lists.start += 1;
        Ok(list)
    }

    /// A lane is through with a file.
    pub(super) fn transfer_done(
        &mut self,
        job: &Job,
        result: Result<Done, LaneError>,
    ) -> Result<(), EngineError> {
        self.running.remove(&job.transfer);
        if job.kept.is_some()
            && matches!(result, Ok(ref done) if !matches!(done, Done::Sent { .. }))
        {
            self.kept.put_back(job.object.clone());
        }
        let arrived = self.arrived.remove(&job.transfer);
        let awaited = self.holds.get_mut(&job.object).filter(|held| {
            matches!(&held.transfer, Transfer::Running { number, .. } if *number == job.transfer)
        });
        let Some(held) = awaited else {
            // Nobody waits for it any more.
            self.discard_sent(job, &result);
            return Ok(());
        };
        let Transfer::Running { basis: expected, .. } = &held.transfer else {
            return Ok(());
        };
        let (took, spoiled) = (job.took, expected.is_none() && job.known.is_some() && !held.whole);
        if spoiled {
            held.transfer = Transfer::Waiting;
            held.due = Instant::now();
            self.discard_sent(job, &result);
            return Ok(());
        }
        let done = match result {
            Ok(done) => done,
            Err(LaneError::Sink(_)) => {
                held.transfer = Transfer::Waiting;
                held.due = Instant::now();
                return Ok(());
            }
            Err(LaneError::Index(error)) => return Err(error.into()),
            Err(LaneError::Read(error)) => Done::Unreadable(error.to_string()),
        };
        match done {
            Done::Sent { known, basis, fresh, started, moving } => {
                let (list, tail) = (Some(job.list), None);
                let file = ReadyFile { known: *known, fresh, started, moving, list, tail };
                let done = Box::new(file);
                let (number, arrived) = (job.transfer, arrived);
                held.transfer = Transfer::Ready { number, arrived, basis, done, took };
                if !arrived {
                    return Ok(());
                }
            }
            Done::Unchanged { known, started, moving } => {
                self.unchanged(job, &known, started, moving)?;
                return Ok(());
            }
            Done::Gone => {
                // What its entries lead to now is another matter.
                self.redo_hold(&job.object);
                if let Some(held) = self.holds.remove(&job.object) {
                    self.overtake(&held.hold.entries)?;
                    let links = self.index.links(&job.object)?;
                    let places = held.hold.entries.into_iter().chain(links);
                    self.look_at_rest(&Resolve::default(), places.collect(), held.floor);
                }
                return Ok(());
            }
            Done::Away => {
                // Looking again at what is known of it shows where it is, or
                // that it is not in the source any more.
                held.transfer = Transfer::Waiting;
                held.due = Instant::now() + LOOK_AGAIN;
                if !self.is_worth_looking_for(&job.object)? {
                    return Ok(());
                }
            }
            Done::Small => {
                // The next batch reads it; a lane must not be quicker.
                held.transfer = Transfer::Waiting;
                held.due = Instant::now() + RETRY;
            }
            Done::Unreadable(error) => {
                held.transfer = Transfer::Waiting;
                held.hold.reason = HoldReason::Unreadable { error };
                held.due = Instant::now() + RETRY;
                return Ok(());
            }
        }
        self.redo_hold(&job.object);
        Ok(())
    }

    /// A transfer is complete at the destination.
    pub(super) fn transfer_arrived(&mut self, transfer: TransferId) {
        if self.running.contains_key(&transfer) {
            // The lane's own word is still to come.
            if let Some(object) = self.running.get(&transfer) {
                self.refused.remove(object);
            }
            self.arrived.insert(transfer);
            return;
        }
        let mut object = None;
        for (id, held) in &mut self.holds {
            match &mut held.transfer {
                Transfer::Ready { number, arrived, .. } if *number == transfer => {
                    *arrived = true;
                    self.refused.remove(id);
                    object = Some(id.clone());
                }
                _ => {}
            }
        }
        if let Some(object) = object {
            self.redo_hold(&object);
        }
    }

    /// The content of a known file turned out to be what the replica holds.
    fn unchanged(
        &mut self,
        job: &Job,
        known: &Known,
        started: Timestamp,
        moving: bool,
    ) -> Result<(), EngineError> {
        if let Some(held) = self.holds.get_mut(&job.object) {
            held.transfer = Transfer::Ready {
                number: TransferId(0),
                arrived: true,
                basis: None,
                done: Box::new(ReadyFile {
                    known: known.clone(),
                    fresh: 0,
                    started,
                    moving,
                    list: None,
                    tail: None,
                }),
                took: Duration::ZERO,
            };
        }
        self.redo_hold(&job.object);
        Ok(())
    }

    /// Notes that content may have changed while it travels.
    pub(super) fn touch_holds(&mut self, record: &Record) -> Result<(), EngineError> {
        if self.holds.is_empty() {
            return Ok(());
        }
        match record {
            Record::Object { object, .. } => {
                if let Some(held) = self.holds.get_mut(object) {
                    held.touch(is_touched(record, object, &held.hold.entries, None));
                }
            }
            Record::Named { directory, name, .. } => {
                let known = self.index.entry(directory, name)?;
                for (object, held) in &mut self.holds {
                    held.touch(is_touched(record, object, &held.hold.entries, known.as_ref()));
                }
            }
            Record::Entry { .. } | Record::Gap { .. } | Record::Barrier { .. } => {}
        }
        Ok(())
    }

    /// Forgets holds of objects that the replica does not have and that nothing
    /// leads to: they were dropped while they waited (see
    /// [`crate::ledger::Flights::drops`]).
    pub(super) fn forget_dropped(&mut self) -> Result<(), EngineError> {
        let (index, in_flight) = (&self.index, &self.in_flight);
        let ours = |object: &ObjectId| -> Result<bool, EngineError> {
            Ok(index.object(object)?.is_some() || in_flight.drops(object))
        };
        let (mut gone, mut fewer) = (Vec::new(), Vec::new());
        for (object, held) in &mut self.holds {
            // Entries of directories that were dropped lead nowhere.
            let places = std::mem::take(&mut held.hold.entries);
            let before = places.len();
            for place in places {
                if ours(&place.0)? {
                    held.hold.entries.insert(place);
                }
            }
            if held.hold.entries.len() < before {
                fewer.push(object.clone());
            }
        }
        for (object, held) in &self.holds {
            if held.hold.entries.is_empty() && !ours(object)? {
                gone.push(object.clone());
            }
        }
        for object in gone {
            if let Some(held) = self.holds.remove(&object) {
                self.discard(held.transfer);
            }
        }
        // What is left of its entries may have been looked at already, and be
        // through now.
        fewer.iter().for_each(|object| self.redo_hold(object));
        self.forget_owed()
    }

    /// Nothing is owed in directories that the replica does not have. (What
    /// leads to them is dirty, and then all of them is listed.)
    pub(super) fn forget_owed(&mut self) -> Result<(), EngineError> {
        let (index, in_flight) = (&self.index, &self.in_flight);
        let mut failure = None;
        self.owed.forget(|directory| match index.object(directory) {
            Ok(known) => known.is_none() && !in_flight.drops(directory),
            Err(error) => {
                failure = Some(error);
                false
            }
        });
        failure.map_or(Ok(()), |error| Err(error.into()))
    }

    /// Content of `object` changes in the replica, or the object goes: running
    /// transfers that build on it are started again (the destination would
    /// refuse them).
    pub(super) fn spoil(&mut self, changed: &BTreeSet<ObjectId>) {
        let mut void = Vec::new();
        for (object, held) in &mut self.holds {
            let spoiled = match &held.transfer {
                Transfer::Running { basis: Some(basis), .. }
                | Transfer::Ready { basis: Some((basis, _)), .. } => {
                    basis != object && changed.contains(basis)
                }
                _ => false,
            };
            if !spoiled {
                continue;
            }
            void.push(std::mem::replace(&mut held.transfer, Transfer::Waiting));
            held.due = Instant::now();
        }
        void.into_iter().for_each(|transfer| self.discard(transfer));
    }

    /// What was sent is not placed: neither the destination nor the index keeps
    /// anything of it. (A lane that still runs finds its hold gone or renewed.)
    pub(super) fn discard(&mut self, transfer: Transfer) {
        if let Transfer::Ready { number, done, .. } = transfer {
            self.discard_file(number, &done);
        }
    }

    /// The same of a file that was about to be placed.
    pub(super) fn discard_file(&mut self, number: TransferId, file: &ReadyFile) {
        // Nothing was sent of a file that turned out to be as it was.
        let sent = number.0 != 0 && file.carried().is_none();
        if let Some(session) = self.session.as_ref().filter(|_| sent) {
            abort(session, number);
        }
        // (Another list may be the one in use.)
        self.dead_lists.extend(file.list);
    }

    /// The same of a transfer that has just ended.
    fn discard_sent(&mut self, job: &Job, result: &Result<Done, LaneError>) {
        if let Ok(Done::Sent { .. }) = result {
            if let Some(session) = &self.session {
                abort(session, job.transfer);
            }
            self.dead_lists.push(job.list);
        }
    }

    /// After a large file was placed: when it had changed while it was read,
    /// it waits for its next turn; its state as placed is of `started`.
    pub(super) fn hold_again(
        &mut self,
        object: ObjectId,
        file: &ReadyFile,
        took: Duration,
        tail: Option<Tail>,
    ) {
        if file.tail.is_none() && file.list.is_some() {
            self.rest(&object, took, false);
        }
        let reason = HoldReason::Large { size: file.known.state.size };
        let hold = Hold { reason, entries: BTreeSet::new() };
        let held = Held {
            hold,
            floor: file.started,
            since: self.clock.now(),
            due: Instant::now() + self.settings.settle.max(took * PATIENCE),
            transfer: Transfer::Waiting,
            touched: false,
            whole: false,
            reuses: false,
            tail,
            known: true,
        };
        self.holds.insert(object, held);
    }

    /// All transfers are void: the session is gone.
    pub(super) fn reset_transfers(&mut self) {
        self.running.clear();
        self.arrived.clear();
        let mut void = Vec::new();
        for held in self.holds.values_mut() {
            if !matches!(held.transfer, Transfer::Waiting)
                && let Some(tail) = &mut held.tail
            {
                tail.lose();
            }
            void.push(std::mem::replace(&mut held.transfer, Transfer::Waiting));
            held.due = Instant::now();
        }
        void.into_iter().for_each(|transfer| self.discard(transfer));
    }

    /// The destination could not build a transfer from its basis.
    pub(super) fn transfer_refused(&mut self, number: TransferId, reason: &str) {
        tracing::warn!(%number, reason, "the destination refused a transfer; it is sent again");
        self.running.remove(&number);
        let mut void = Vec::new();
        for held in self.holds.values_mut() {
            let this = match &held.transfer {
                Transfer::Running { number: n, .. } | Transfer::Ready { number: n, .. } => *n,
                Transfer::Waiting => continue,
            };
            if this == number {
                void.push(std::mem::replace(&mut held.transfer, Transfer::Waiting));
                held.due = Instant::now() + Duration::from_millis(100);
                // What was kept is offered once: without it, it may be built all the same.
                let reused = std::mem::take(&mut held.reuses);
                held.whole = number.0 & APPENDED == 0 && !reused;
                held.tail = None;
            }
        }
        void.into_iter().for_each(|transfer| self.discard(transfer));
    }
}

/// The large file whose turn it is: the one that has been due for longest.
/// INVARIANT: so none starves, however many others change all the time.
fn next_due(
    holds: &BTreeMap<ObjectId, Held>,
    now: Instant,
    may_begin: impl Fn(&ObjectId, &Held) -> bool,
) -> Option<ObjectId> {
    let due = holds.iter().filter(|(object, held)| held.due <= now && may_begin(object, held));
    due.min_by_key(|(_, held)| held.due).map(|(object, _)| object.clone())
}

/// Tells the destination to forget a transfer. An error means that the session
/// is gone, and the transfer with it.
pub(super) fn abort(session: &crate::session::Session, number: TransferId) {
    // (It waits while the network, or the destination, takes nothing.)
    let _ = pulse::waiting(|| session.sink.abort(number));
}

#[cfg(test)]
mod tests;
