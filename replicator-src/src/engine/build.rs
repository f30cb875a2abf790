//! How a batch comes about: barrier, absorb, resolve, read, look again,
//! assemble, make durable, commit.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use foldhash::{HashMap, HashMapExt, HashSet};
use replicator_common::id::{BatchId, ObjectId, Seq, TransferId};
use replicator_common::name::Name;
use replicator_common::pulse;

use super::commit::dropped_by;
use super::halt::Leaving;
use super::held::{Held, ReadyFile, Transfer};
use super::tails::Tail;
use super::{Engine, EngineError, ended};
use crate::index::{Content, Known, View};
use crate::journal::Record;
use crate::ledger::Span;
use crate::plan::resolve::Budget;
use crate::plan::{
    Dirty, HoldReason, Limits, Listing, Meanwhile, Need, Outcome, Resolve, Settings, assemble,
};
use crate::read::sink::SinkError;
use crate::read::small::Item;
use crate::session::Session;

/// Journal records that one batch absorbs at most (twice, when what it reads
/// changes meanwhile).
const RECORDS: usize = 8192;
/// Objects that are looked for before those found are handed to the readers.
const SLICE: usize = 1024;
/// Objects of a batch at most, when none is under way.
const SOON: usize = 2048;
/// Entries that one batch looks at at most. Each that changes takes about a
/// kilobyte until the batch is acknowledged (new names of hard links need no
/// reading, so it is this that bounds them). As many are dropped at most of
/// trees that ended as a whole.
const ENTRIES: usize = 16_384;
/// Entries that a batch of a walk compares with the index and finds equal, at
/// most: they cost it nothing more, but the engine should look up now and then.
const COMPARED: usize = 131_072;
/// How often a batch follows what changed while it was read, before it is
/// sent as it is (fuzzy).
const ROUNDS: u32 = 3;
/// How long after an object lost its last entry every event that could tell of
/// a new one must have been queued: a rename moves the name and queues its
/// event within one system call, but its thread may be held up in between.
const OUTSIDE_AFTER: Duration = Duration::from_millis(100);

/// After so many files in a row that were replaced before their content had come, the
/// next gets its name without.
const OVERTAKEN: u32 = 3;

/// What a batch is made from, while it is built.
pub(super) struct Draft {
    pub(super) batch: BatchId,
    pub(super) resolve: Resolve,
    pub(super) outcomes: HashMap<ObjectId, Outcome>,
    /// Everything that was dirty, to be dirty again if the batch is lost.
    pub(super) input: Dirty,
    /// What it covers.
    pub(super) span: Span,
    pub(super) packed: u64,
    /// New content bytes of the large files that it places.
    pub(super) fresh: u64,
    /// Large files that this batch places.
    pub(super) placed: BTreeMap<ObjectId, Placed>,
    /// How many objects it deletes, as the guard counts them.
    pub(super) deletions: u64,
    /// Objects of trees that leave with it.
    pub(super) left: Leaving,
    /// What names the replica takes.
    limits: Limits,
}

pub(super) struct Placed {
    pub(super) number: TransferId,
    pub(super) file: ReadyFile,
    pub(super) took: Duration,
}

impl Engine {
    /// Builds one batch and commits it. A session that ends meanwhile is not an
    /// error: what was dirty stays dirty.
    pub(super) fn build(&mut self) -> Result<(), EngineError> {
        self.last_build = Instant::now();
        self.urgent = false;
        if self.session.is_none() {
            return Ok(());
        }
        // First: when the source is not there any more, the session is needed
        // to say so.
        let mut draft = self.begin()?;
        let Some(session) = self.session.take() else {
            self.give_up(draft);
            return Ok(());
        };
        let result = self.fill(&mut draft, &session);
        self.session = Some(session);
        match result {
            Ok(()) => self.finish(draft),
            Err(Broken::Session(reason)) => {
                tracing::debug!(reason, "the session ended while a batch was built");
                self.give_up(draft);
                Ok(())
            }
            Err(Broken::Engine(error)) => Err(error),
        }
    }

    /// Draws a barrier and takes in the journal.
    fn begin(&mut self) -> Result<Draft, EngineError> {
        let barrier = self.capture.barrier()?;
        let recalled = self.recall()?;
        let mut draft = self.draft();
        draft.span.walked &= !recalled;
        draft.resolve.walking = self.gap.is_some();
        draft.resolve.unproven = self.unproven;
        let root = self.opener.root();
        // What is below a tree that left is not looked at there by handle either.
        let leaves = self.index.orphans()?.iter().any(|(_, orphan)| orphan.left);
        draft.resolve.root = (leaves || !root.by_handle()).then(|| root.id.clone());
        self.take_records(&mut draft)?;
        draft.resolve.waiting = self.gap.is_some().then(|| self.waiting());
        self.note_under_way(&mut draft.resolve)?;
        let overtaken = self.overtaken.iter().filter(|(_, times)| **times >= OVERTAKEN);
        draft.resolve.overtaken = overtaken.map(|(place, _)| place.clone()).collect();
        self.look_at_waiting()?;
        draft.span.reach(barrier.seq, barrier.time);
        if !self.root_known()? {
            draft.resolve.begin_at(&self.opener.root().id);
        }
        draft.input = self.dirty.clone();
        Ok(draft)
    }

    /// The entries that wait for something, and are to be looked at however
    /// equal they are.
    fn waiting(&self) -> HashSet<(ObjectId, Name)> {
        let held = self.holds.values().flat_map(|held| &held.hold.entries);
        held.chain(self.owed.places()).cloned().collect()
    }

    /// Tells the batch of what the replica has and of which something waits.
    fn note_under_way(&self, resolve: &mut Resolve) -> Result<(), EngineError> {
        for (object, held) in self.holds.iter().filter(|(_, held)| held.known) {
            let (reason, entries) = (&held.hold.reason, &held.hold.entries);
            // (Others may wait with names alone: too many of them, or too long ones.)
            if !matches!(reason, HoldReason::Large { .. }) {
                continue;
            }
            resolve.under_way.insert(object.clone(), reason.clone());
            for (directory, name) in entries {
                if self.index.entry(directory, name)?.as_ref() != Some(object) {
                    resolve.named.insert(object.clone());
                    break;
                }
            }
        }
        Ok(())
    }

    /// What waited for these names is gone. (Names under which the replica has nothing
    /// are nobody's.)
    pub(super) fn overtake(
        &mut self,
        entries: &BTreeSet<(ObjectId, Name)>,
    ) -> Result<(), EngineError> {
        for place in entries {
            if self.index.entry(&place.0, &place.1)?.is_some() {
                *self.overtaken.entry(place.clone()).or_default() += 1;
            }
        }
        Ok(())
    }

    /// A name that waits is looked at with those that its file has: whether the file can
    /// wait any longer depends on them.
    fn look_at_waiting(&mut self) -> Result<(), EngineError> {
        let waits = |held: &Held| {
            let large = matches!(held.hold.reason, HoldReason::Large { .. });
            large && held.known && !held.hold.entries.is_empty()
        };
        if !self.holds.values().any(waits) {
            return Ok(());
        }
        let mut touched = BTreeSet::new();
        for (directory, name) in self.dirty.entries.keys() {
            touched.extend(self.index.entry(directory, name)?);
        }
        touched.retain(|object| self.holds.get(object).is_some_and(waits));
        touched.iter().for_each(|object| self.redo_hold(object));
        Ok(())
    }

    fn draft(&self) -> Draft {
        Draft {
            batch: self.next_batch,
            resolve: Resolve::default(),
            outcomes: HashMap::new(),
            input: Dirty::default(),
            span: Span::new(
                self.cursor,
                self.covered.max(self.seen),
                self.dirty.listings.is_empty(),
            ),
            packed: 0,
            fresh: 0,
            placed: BTreeMap::new(),
            deletions: 0,
            left: Leaving::default(),
            limits: self.limits(),
        }
    }

    /// Takes in what the journal holds after the cursor, as far as it concerns
    /// the source.
    fn take_records(&mut self, draft: &mut Draft) -> Result<(), EngineError> {
        let mut records = self.journal.read(self.cursor, RECORDS)?;
        let last = records.last().map(|(seq, _)| *seq);
        self.index.expect(records.iter().filter_map(|(_, record)| subject(record)))?;
        let (mut failure, mut grown) = (None, Vec::new());
        records.retain(|(_, record)| match self.concerns(record, &mut grown) {
            Ok(concerns) => concerns,
            Err(error) => {
                failure.get_or_insert(error);
                true
            }
        });
        if let Some(error) = failure {
            return Err(error);
        }
        self.absorb(&records, draft)?;
        self.note_growth(grown);
        self.cursor = last.unwrap_or(self.cursor);
        draft.span.seq = self.cursor;
        Ok(())
    }

    /// Whether a record is of something that the replica has. What is new is
    /// reached through an entry of a directory that it has. Large files whose content
    /// may have changed are added to `grown`.
    fn concerns(
        &self,
        record: &Record,
        grown: &mut Vec<(ObjectId, u64)>,
    ) -> Result<bool, EngineError> {
        let Some(object) = subject(record) else { return Ok(true) };
        if let Record::Object { what, .. } = record {
            if self.holds.contains_key(object) {
                // Its content travels, although the index does not know it yet.
                return Ok(true);
            }
            let cut = |known: &Known| matches!(known.content, Content::Chunks { .. });
            let size = self.index.with_object(object, |known| {
                known.filter(|known| what.content && cut(known)).map(|known| known.state.size)
            })?;
            grown.extend(size.map(|size| (object.clone(), size)));
        }
        Ok(self.index.has(object)? || self.in_flight.drops(object))
    }

    /// Looks into the journal between batches, so that what turns out to
    /// concern nobody (links removed elsewhere on the file system) makes none.
    pub(super) fn look_ahead(&mut self) -> Result<(), EngineError> {
        if !self.unsettled && self.cursor < self.journal.last() && self.dirty.len() < RECORDS {
            let mut draft = self.draft();
            self.take_records(&mut draft)?;
            // Barriers in between are covered when the next batch says so.
            self.seen = self.seen.max(draft.span.time);
        }
        Ok(())
    }

    fn absorb(&mut self, records: &[(Seq, Record)], draft: &mut Draft) -> Result<(), EngineError> {
        for (seq, record) in records {
            match record {
                Record::Gap { reason } => self.open_gap(reason.clone())?,
                Record::Barrier { time } => draft.span.pass(*seq, *time, self.inherited),
                other => {
                    self.touched.record(other);
                    self.touch_holds(other)?;
                    self.dirty.absorb(other);
                }
            }
            self.cursor = *seq;
        }
        draft.span.seq = self.cursor;
        Ok(())
    }

    /// Resolves and reads until nothing that was read has changed meanwhile,
    /// or patience ends.
    fn fill(&mut self, draft: &mut Draft, session: &Session) -> Result<(), Broken> {
        for round in 0..ROUNDS {
            self.resolve_and_read(draft, session)?;
            if self.gap.is_some()
                || !draft.span.reached
                || draft.resolve.bindings.is_empty() && draft.resolve.asked.is_empty()
            {
                draft.span.exact = self.gap.is_none() && draft.span.reached;
                return Ok(());
            }
            let barrier = self.capture.barrier().map_err(EngineError::from)?;
            let records = self.journal.read(self.cursor, RECORDS).map_err(EngineError::from)?;
            match draft.resolve.meanwhile(records.iter().map(|(_, record)| record)) {
                // What came meanwhile is the next batch's; this one is of the
                // moment of its barrier.
                Meanwhile::Untouched => {
                    draft.span.exact = records.len() < RECORDS;
                    return Ok(());
                }
                Meanwhile::Touched if round + 1 < ROUNDS => {}
                Meanwhile::Touched | Meanwhile::Lost => return Ok(()),
            }
            self.absorb(&records, draft)?;
            self.look_at_waiting()?;
            draft.span.reach(barrier.seq, barrier.time);
            draft.input.merge(self.dirty.clone());
        }
        Ok(())
    }

    /// Looks at what is dirty, and reads what differs while looking goes on.
    fn resolve_and_read(&mut self, draft: &mut Draft, session: &Session) -> Result<(), Broken> {
        let start = Instant::now();
        let pool = self.pool.clone();
        let mut reading = pool.begin(draft.batch, &session.sink, self.kept.packed());
        // A destination with nothing to do gets something soon.
        let most = if self.in_flight.is_empty() { SOON } else { usize::MAX };
        let mut left = self.settings.batch_objects.min(most);
        loop {
            pulse::beat();
            self.resolve(draft, left.min(SLICE))?;
            let needs = draft.resolve.asked.take();
            if needs.is_empty() {
                break;
            }
            left = left.saturating_sub(needs.len());
            let items = self.items(draft, needs)?;
            self.readings = self.readings.wrapping_add(1);
            reading.add(items, self.readings)?;
            if left == 0 || self.dirty.listings.is_empty() || draft.resolve.full(self.budget(left))
            {
                break;
            }
        }
        let looked = start.elapsed();
        // Something useful while the readers work.
        self.index.merge_many().map_err(EngineError::from)?;
        let report = reading.end()?;
        let waited = start.elapsed() - looked;
        tracing::debug!(batch = %draft.batch, ?looked, ?waited, read = report.outcomes.len(), "read");
        if tracing::enabled!(tracing::Level::TRACE) {
            for (object, outcome) in &report.outcomes {
                let need = draft.resolve.asked.get(object);
                tracing::trace!(batch = %draft.batch, %object, ?need, ?outcome, "looked at");
            }
        }
        draft.packed += report.packed;
        draft.outcomes.extend(report.outcomes);
        Ok(())
    }

    fn budget(&self, objects: usize) -> Budget {
        Budget {
            objects,
            entries: ENTRIES,
            compared: COMPARED,
            bytes: self.settings.batch_bytes,
            large: replicator_common::wire::PACK_MAX,
        }
    }

    fn resolve(&mut self, draft: &mut Draft, objects: usize) -> Result<(), EngineError> {
        let budget = self.budget(objects);
        let (index, tree) = (&self.index, &mut self.tree);
        Ok(draft.resolve.feed(&mut self.dirty, budget, index, tree)?)
    }

    /// What is to be read of what resolving asked for.
    fn items(
        &mut self,
        draft: &mut Draft,
        needs: Vec<(ObjectId, Need)>,
    ) -> Result<Vec<Item>, EngineError> {
        let mut items = Vec::with_capacity(needs.len());
        for (object, need) in needs {
            if let Some(outcome) = self.still_refused(&object) {
                draft.outcomes.insert(object, outcome);
                continue;
            }
            if let Some(error) = has_no_name(draft, &object, &need) {
                draft.outcomes.insert(object, Outcome::Refused { error });
                continue;
            }
            if self.take_ready(draft, &object, &need)? {
                continue;
            }
            let known = match need.new {
                true => None,
                false => self.disbelieve(&object, self.index.object(&object)?),
            };
            let nested = is_nested(draft, &need);
            items.push(Item { object, need, known, nested });
        }
        // On a disk that is not in the cache, this halves the time of reading.
        items.sort_by_key(|item| item.object.locality());
        Ok(items)
    }

    /// Assembles, makes the delta durable, sends plan and commit.
    fn finish(&mut self, mut draft: Draft) -> Result<(), EngineError> {
        let gap = self.gap.clone();
        let floor = gap.as_ref().map_or(self.covered, |gap| gap.floor);
        let seen = self.looked_at_all(&draft)?;
        let settings = Settings {
            now: self.clock.now(),
            // A failover puts an orphan back where it was before this batch, and
            // what waited then was not as on the source.
            floor: floor.min(self.reached),
            outside_before: (gap.is_none() && draft.span.reached && seen)
                .then(|| draft.span.time.offset(-(OUTSIDE_AFTER.as_nanos() as i64))),
            limits: draft.limits,
            apart: ENTRIES,
        };
        for ((directory, name), binding) in &draft.resolve.bindings {
            tracing::trace!(batch = %draft.batch, %directory, ?name, ?binding, "bound");
        }
        let root = self.opener.root().id.clone();
        let (index, tree) = (&self.index, &mut self.tree);
        let mut assembly = assemble(&draft.resolve, &draft.outcomes, &root, settings, index, tree)?;
        for change in &assembly.delta.entries {
            self.overtaken.remove(&(change.directory.clone(), change.name.clone()));
        }
        let Some(checked) = self.check_deletions(draft, &assembly)? else { return Ok(()) };
        draft = checked;
        self.note_skipped(&draft, &dropped_by(&assembly.delta));
        let placed = self.settle_placed(&mut draft, &assembly);
        self.release_holds(&draft, &assembly.holds, &placed)?;
        let walking = gap.is_some();
        self.astray.merge(std::mem::take(&mut draft.resolve.astray));
        self.astray.merge(std::mem::take(&mut assembly.astray));
        // What is left for the next batch is not in the replica yet.
        let behind =
            !self.dirty.is_empty() || !assembly.again.is_empty() || !self.astray.is_empty();
        if behind && self.gap.is_none() {
            draft.span.leave_behind(self.covered);
        }
        let unreadable = std::mem::take(&mut draft.resolve.unreadable);
        self.retry_unreadable(unreadable, &mut assembly);
        let closed =
            self.close_gap(draft.span.walked && draft.span.reached && assembly.again.is_empty())?;
        let holds = std::mem::take(&mut assembly.holds);
        self.take_holds(holds, floor, walking);
        self.settle_owed(&draft, &assembly.again);
        if walking {
            let orphaned = std::mem::take(&mut assembly.orphaned);
            self.dirty.listings.extend(orphaned.into_iter().map(|one| Listing::new(one, true)));
        }
        for (directory, name) in std::mem::take(&mut assembly.again) {
            self.dirty.entry(directory, name, crate::watcher::What::default());
            draft.span.exact = false;
        }
        let through = !behind && self.dirty.is_empty() && self.gap.is_none();
        let last =
            self.accepts_deletions() && draft.span.reached && through && assembly.orphans == 0;
        self.leaving = assembly.left > 0;
        self.commit(draft, assembly, closed)?;
        if last {
            self.end_acceptance()?;
        }
        self.forget_dropped()
    }

    /// What names the replica takes.
    pub(super) fn limits(&self) -> Limits {
        let session = self.session.as_ref();
        session.map_or(Limits::default(), |session| {
            let abilities = &session.hello.abilities;
            Limits { links: abilities.links_max, name: abilities.name_max }
        })
    }

    /// The batch is not committed: the session ended, or it deletes too much.
    pub(super) fn give_up(&mut self, draft: Draft) {
        self.dirty.merge(draft.input);
        for (object, placed) in draft.placed {
            self.discard_file(placed.number, &placed.file);
            if let Some(held) = self.holds.get_mut(&object) {
                held.tail.iter_mut().for_each(Tail::lose);
                held.transfer = Transfer::Waiting;
                held.due = Instant::now();
            } else {
                self.hold_again(object, &placed.file, Duration::ZERO, None);
            }
        }
    }
}

/// What the index has to know for a record to concern the source; `None` where it
/// always does.
fn subject(record: &Record) -> Option<&ObjectId> {
    match record {
        Record::Gap { .. } | Record::Barrier { .. } => None,
        Record::Object { object, .. } => Some(object),
        Record::Entry { directory, .. } | Record::Named { directory, .. } => Some(directory),
    }
}

/// Whether an object is new in a directory that is new too. (The root, which has no
/// name, was there before.)
fn is_nested(draft: &Draft, need: &Need) -> bool {
    let directory = need.hint.as_ref().and_then(|(at, _)| draft.resolve.asked.get(at));
    need.new && need.content && directory.is_some_and(|it| it.new && it.hint.is_some())
}

/// Why none of a new object's names fits, if so: then it is not read, since it
/// would travel in vain.
fn has_no_name(draft: &Draft, object: &ObjectId, need: &Need) -> Option<String> {
    let (_, name) = need.hint.as_ref().filter(|_| need.new)?;
    let error = draft.limits.too_long(name)?;
    let fits = draft.resolve.bindings.iter().any(|((_, name), binding)| {
        binding.new.as_ref() == Some(object) && draft.limits.too_long(name).is_none()
    });
    (!fits).then_some(error)
}

/// Why a batch was not built to its end.
enum Broken {
    Session(String),
    Engine(EngineError),
}

impl From<EngineError> for Broken {
    fn from(error: EngineError) -> Self {
        Self::Engine(error)
    }
}

impl From<SinkError> for Broken {
    fn from(error: SinkError) -> Self {
        Self::Session(ended(&error))
    }
}
