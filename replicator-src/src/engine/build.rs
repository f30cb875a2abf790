//! How a batch comes about: barrier, absorb, resolve, read, look again,
//! assemble, make durable, commit.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use replicator_common::id::{BatchId, ObjectId, Seq};
use replicator_common::name::Name;
use replicator_common::object::{Attributes, Kind};
use replicator_common::time::Timestamp;
use replicator_common::wire::{BatchHeader, ContentSource, Op, PLAN_OPS_MAX, SourceMessage};

use super::holds::{ReadyFile, Transfer};
use super::{Engine, EngineError, Gap, InFlight, ended};
use crate::index::{Content, Delta, Mark, View};
use crate::journal::Record;
use crate::plan::resolve::Budget;
use crate::plan::{
    Assembly, Dirty, HoldReason, Listing, Need, Outcome, Resolve, Settings, assemble,
};
use crate::read::sink::SinkError;
use crate::read::small::{self, Item};
use crate::session::Session;
use crate::source::Opened;

/// Journal records that one batch absorbs at most (twice, when what it reads
/// changes meanwhile).
const RECORDS: usize = 8192;
/// Objects that are looked for before those found are handed to the readers.
const SLICE: usize = 1024;
/// Objects of a batch at most, when none is under way.
const SOON: usize = 2048;
/// Entries that one batch looks at at most.
const ENTRIES: usize = 50_000;
/// How often a batch follows what changed while it was read, before it is
/// sent as it is (fuzzy).
const ROUNDS: u32 = 3;
/// How long after an object lost its last entry every event that could tell of
/// a new one must have been queued: a rename moves the name and queues its
/// event within one system call, but its thread may be held up in between.
const OUTSIDE_AFTER: Duration = Duration::from_millis(100);

/// What a batch is made from, while it is built.
pub(super) struct Draft {
    batch: BatchId,
    pub(super) resolve: Resolve,
    pub(super) outcomes: HashMap<ObjectId, Outcome>,
    /// Everything that was dirty, to be dirty again if the batch is lost.
    input: Dirty,
    seq: Seq,
    /// Every change before this moment was absorbed.
    time: Timestamp,
    /// The barrier's moment could be taken over (else it was not reached).
    reached: bool,
    version: u32,
    packed: u64,
    /// New content bytes of the large files that it places.
    fresh: u64,
    /// Large files that this batch places.
    placed: BTreeMap<ObjectId, Placed>,
    exact: bool,
    /// The walk had ended, and every event of its time was absorbed, before
    /// this batch began.
    walked: bool,
}

/// A batch ready to be committed.
pub(super) struct Ready {
    pub(super) ops: Vec<Op>,
    pub(super) delta: Delta,
    pub(super) header: BatchHeader,
    pub(super) input: Dirty,
    pub(super) closed: Option<Gap>,
    pub(super) dropped: Vec<ObjectId>,
    pub(super) progress: (u64, u64),
    pub(super) objects: u64,
    /// What was covered before it.
    pub(super) covered: Timestamp,
    /// Every change before this moment is in the replica after it.
    pub(super) reached: Timestamp,
}

struct Placed {
    number: replicator_common::id::TransferId,
    file: ReadyFile,
    took: Duration,
}

impl Engine {
    /// Builds one batch and commits it. A session that ends meanwhile is not an
    /// error: what was dirty stays dirty.
    pub(super) fn build(&mut self) -> Result<(), EngineError> {
        self.last_build = Instant::now();
        self.urgent = false;
        let Some(session) = self.session.take() else { return Ok(()) };
        let mut draft = self.begin()?;
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
        draft.walked &= !recalled;
        draft.resolve.walking = self.gap.is_some();
        let root = self.opener.root();
        draft.resolve.root = (!root.by_handle()).then(|| root.id.clone());
        self.take_records(&mut draft)?;
        if self.cursor >= barrier.seq {
            draft.time = draft.time.max(barrier.time);
            draft.reached = true;
        }
        if !self.root_known()? {
            draft.resolve.begin_at(&self.opener.root().id);
        }
        draft.input = self.dirty.clone();
        Ok(draft)
    }

    fn draft(&self) -> Draft {
        Draft {
            batch: self.next_batch,
            resolve: Resolve::default(),
            outcomes: HashMap::new(),
            input: Dirty::default(),
            seq: self.cursor,
            time: self.covered.max(self.seen),
            reached: false,
            version: 0,
            packed: 0,
            fresh: 0,
            placed: BTreeMap::new(),
            exact: false,
            walked: self.dirty.listings.is_empty(),
        }
    }

    /// Takes in what the journal holds after the cursor, as far as it concerns
    /// the source.
    fn take_records(&mut self, draft: &mut Draft) -> Result<(), EngineError> {
        let mut records = self.journal.read(self.cursor, RECORDS)?;
        let last = records.last().map(|(seq, _)| *seq);
        let mut failure = None;
        records.retain(|(_, record)| match self.concerns(record) {
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
        self.cursor = last.unwrap_or(self.cursor);
        draft.seq = self.cursor;
        Ok(())
    }

    /// Whether a record is of something that the replica has. What is new is
    /// reached through an entry of a directory that it has.
    fn concerns(&self, record: &Record) -> Result<bool, EngineError> {
        let object = match record {
            Record::Gap { .. } | Record::Barrier { .. } => return Ok(true),
            // Its content travels, although the index does not know it yet.
            Record::Object { object, .. } if self.holds.contains_key(object) => return Ok(true),
            Record::Object { object, .. } => object,
            Record::Entry { directory, .. } | Record::Named { directory, .. } => directory,
        };
        Ok(self.index.object(object)?.is_some())
    }

    /// Looks into the journal between batches, so that what turns out to
    /// concern nobody (links removed elsewhere on the file system) makes none.
    pub(super) fn look_ahead(&mut self) -> Result<(), EngineError> {
        if self.cursor < self.journal.last() && self.dirty.len() < RECORDS {
            let mut draft = self.draft();
            self.take_records(&mut draft)?;
            // Barriers in between are covered when the next batch says so.
            self.seen = self.seen.max(draft.time);
        }
        Ok(())
    }

    fn absorb(&mut self, records: &[(Seq, Record)], draft: &mut Draft) -> Result<(), EngineError> {
        for (seq, record) in records {
            match record {
                Record::Gap { reason } => self.open_gap(reason.clone())?,
                // One of a process before this proves nothing: the restart is
                // a gap, and its moments are of another clock.
                Record::Barrier { .. } if *seq <= self.inherited => {}
                Record::Barrier { time } => draft.time = draft.time.max(*time),
                other => {
                    self.touch_holds(other)?;
                    self.dirty.absorb(other);
                }
            }
            self.cursor = *seq;
        }
        draft.seq = self.cursor;
        Ok(())
    }

    /// Resolves and reads until nothing that was read has changed meanwhile,
    /// or patience ends.
    fn fill(&mut self, draft: &mut Draft, session: &Session) -> Result<(), Broken> {
        for round in 0..ROUNDS {
            self.resolve_and_read(draft, session)?;
            if self.gap.is_some()
                || !draft.reached
                || draft.resolve.bindings.is_empty() && draft.resolve.read.is_empty()
            {
                draft.exact = self.gap.is_none() && draft.reached;
                return Ok(());
            }
            let barrier = self.capture.barrier().map_err(EngineError::from)?;
            let records = self.journal.read(self.cursor, RECORDS).map_err(EngineError::from)?;
            let touched = records.iter().any(|(_, record)| draft.resolve.touches(record));
            if !touched {
                // What came meanwhile is the next batch's; this one is of the
                // moment of its barrier.
                draft.exact = records.len() < RECORDS;
                return Ok(());
            }
            if round + 1 == ROUNDS {
                return Ok(());
            }
            self.absorb(&records, draft)?;
            if self.cursor >= barrier.seq {
                draft.time = draft.time.max(barrier.time);
            } else {
                draft.reached = false;
            }
            draft.input.merge(self.dirty.clone());
        }
        Ok(())
    }

    /// Looks at what is dirty, and reads what differs while looking goes on.
    fn resolve_and_read(&mut self, draft: &mut Draft, session: &Session) -> Result<(), Broken> {
        let start = Instant::now();
        let pool = self.pool.clone();
        let mut reading = pool.begin(draft.batch, &session.sink);
        // A destination with nothing to do gets something soon.
        let most = if self.in_flight.is_empty() { SOON } else { usize::MAX };
        let mut left = self.settings.batch_objects.min(most);
        loop {
            self.resolve(draft, left.min(SLICE))?;
            let needs = draft.resolve.take_needs();
            if needs.is_empty() {
                break;
            }
            left = left.saturating_sub(needs.len());
            let items = self.items(draft, needs)?;
            draft.version += 1;
            reading.add(items, draft.version)?;
            if left == 0 || self.dirty.listings.is_empty() || draft.resolve.full(self.budget(left))
            {
                break;
            }
        }
        let looked = start.elapsed();
        // Something useful while the readers work.
        self.index.merge().map_err(EngineError::from)?;
        let report = reading.end()?;
        let waited = start.elapsed() - looked;
        tracing::debug!(batch = %draft.batch, ?looked, ?waited, read = report.outcomes.len(), "read");
        draft.packed += report.packed;
        draft.outcomes.extend(report.outcomes);
        Ok(())
    }

    fn budget(&self, objects: usize) -> Budget {
        Budget {
            objects,
            entries: ENTRIES,
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
        needs: BTreeMap<ObjectId, Need>,
    ) -> Result<Vec<Item>, EngineError> {
        let mut items = Vec::with_capacity(needs.len());
        for (object, need) in needs {
            if self.take_ready(draft, &object, &need)? {
                continue;
            }
            let known = match need.new {
                true => None,
                false => self.index.object(&object)?,
            };
            items.push(Item { object, need, known });
        }
        // On a disk that is not in the cache, this halves the time of reading.
        items.sort_by_key(|item| item.object.locality());
        Ok(items)
    }

    /// Uses a finished transfer for an object whose content is needed.
    fn take_ready(
        &mut self,
        draft: &mut Draft,
        object: &ObjectId,
        need: &Need,
    ) -> Result<bool, EngineError> {
        if need.kind != Kind::File || !need.content {
            return Ok(false);
        }
        if let Some(placed) = draft.placed.get_mut(object) {
            // It changed after its transfer: placed as it is, and held again.
            placed.file.moving = true;
            return Ok(true);
        }
        let Some(held) = self.holds.get_mut(object) else { return Ok(false) };
        if held.transfer.is_under_way() {
            let size = match held.hold.reason {
                HoldReason::Large { size } => size,
                HoldReason::Unreadable { .. } => 0,
            };
            draft.outcomes.insert(object.clone(), Outcome::Large { size });
            // An event told so, perhaps by a name that the hold does not know.
            // A walk asks for all that differs from the index, whatever events
            // told; then change times have to do.
            held.touched |= self.gap.is_none();
            return Ok(true);
        }
        if !matches!(held.transfer, Transfer::Ready { .. }) {
            return Ok(false);
        }
        let touched = held.touched;
        let ready = std::mem::replace(&mut held.transfer, Transfer::Waiting);
        let Transfer::Ready { number, done, took, .. } = ready else { return Ok(false) };
        let mut done = done;
        done.moving |= touched;
        self.renew_attributes(object, need, &mut done);
        let mut known = done.known.clone();
        let content = if number.0 == 0 {
            ContentSource::Unchanged
        } else {
            known.version = draft.batch;
            ContentSource::Transferred { transfer: number }
        };
        let old = self.index.object(object)?;
        let same = number.0 == 0 && old.is_some_and(|old| old.state == known.state);
        let outcome = if same { Outcome::Same { known } } else { Outcome::Ship { known, content } };
        draft.outcomes.insert(object.clone(), outcome);
        draft.placed.insert(object.clone(), Placed { number, file: *done, took });
        Ok(true)
    }

    /// Assembles, makes the delta durable, sends plan and commit.
    fn finish(&mut self, mut draft: Draft) -> Result<(), EngineError> {
        let gap = self.gap.clone();
        let floor = gap.as_ref().map_or(self.covered, |gap| gap.floor);
        let seen = self.looked_at_all(&draft)?;
        let settings = Settings {
            now: self.clock.now(),
            floor,
            outside_before: (gap.is_none() && draft.reached && seen)
                .then(|| draft.time.offset(-(OUTSIDE_AFTER.as_nanos() as i64))),
        };
        let root = self.opener.root().id.clone();
        let (index, tree) = (&self.index, &mut self.tree);
        let mut assembly = assemble(&draft.resolve, &draft.outcomes, &root, settings, index, tree)?;
        self.note_skipped(&draft, &dropped_by(&assembly.delta));
        let placed = self.settle_placed(&mut draft, &assembly);
        self.release_holds(&draft, &assembly.holds, &placed);
        let walking = gap.is_some();
        self.astray.merge(std::mem::take(&mut draft.resolve.astray));
        self.astray.merge(std::mem::take(&mut assembly.astray));
        // What is left for the next batch is not in the replica yet.
        let behind =
            !self.dirty.is_empty() || !assembly.again.is_empty() || !self.astray.is_empty();
        if behind && self.gap.is_none() {
            draft.time = self.covered;
            draft.reached = false;
            draft.exact = false;
        }
        let unreadable = std::mem::take(&mut draft.resolve.unreadable);
        self.retry_unreadable(unreadable, &mut assembly);
        let closed = self.close_gap(draft.walked && draft.reached && assembly.again.is_empty())?;
        let holds = std::mem::take(&mut assembly.holds);
        self.take_holds(holds, floor, walking);
        if walking {
            let orphaned = std::mem::take(&mut assembly.orphaned);
            self.dirty.listings.extend(orphaned.into_iter().map(|one| Listing::new(one, true)));
        }
        for (directory, name) in std::mem::take(&mut assembly.again) {
            self.dirty.entry(directory, name, crate::watcher::What::default());
            draft.exact = false;
        }
        self.commit(draft, assembly, closed)?;
        self.forget_dropped()
    }

    /// A walk that has seen everything closes its gap, unless events were lost
    /// again meanwhile. Only the batch after the walk's end does: its barrier
    /// covers what moved from the unwalked to the walked part at the last
    /// moment (trap 11).
    fn close_gap(&mut self, walked: bool) -> Result<Option<Gap>, EngineError> {
        let through = walked && self.dirty.is_empty() && self.astray.is_empty();
        let closing = self.gap.clone().filter(|_| through);
        let Some(gap) = closing else { return Ok(None) };
        let Some(reason) = &gap.again else {
            self.gap = None;
            self.shared.end_progress();
            return Ok(Some(gap));
        };
        let now = self.clock.now();
        self.gap =
            Some(Gap { reason: reason.clone(), walk_started: now, again: None, ..gap.clone() });
        self.start_walk()?;
        Ok(None)
    }

    /// Files placed by this batch; those that changed while they were read wait
    /// for their next turn.
    fn settle_placed(&mut self, draft: &mut Draft, assembly: &Assembly) -> BTreeSet<ObjectId> {
        let mut all = BTreeSet::new();
        for (object, placed) in std::mem::take(&mut draft.placed) {
            all.insert(object.clone());
            if let Some(held) = self.holds.remove(&object) {
                self.look_at_rest(&draft.resolve, held.hold.entries);
            }
            let put = placed.number.0 == 0
                || assembly
                    .delta
                    .objects
                    .iter()
                    .any(|(id, known)| *id == object && known.is_some());
            if !put {
                self.discard_file(placed.number, &placed.file);
                continue;
            }
            draft.fresh += placed.file.fresh;
            if placed.file.moving {
                self.hold_again(object, &placed.file, placed.took);
                draft.exact = false;
            }
        }
        all
    }

    /// Attributes may have changed, and travelled, while content did: the file
    /// is placed with those of now. A change of content shows in size or mtime,
    /// or in an event that is still to come.
    fn renew_attributes(&self, object: &ObjectId, need: &Need, file: &mut ReadyFile) {
        let flags = rustix::fs::OFlags::PATH | rustix::fs::OFlags::CLOEXEC;
        let fd = match self.opener.open(object, need.hint.as_ref(), flags) {
            Ok(Opened::Here(fd)) => fd,
            Ok(Opened::Away) => {
                // Nobody has looked at them, so it is read once more.
                file.moving = true;
                return;
            }
            Ok(Opened::Gone) | Err(_) => return,
        };
        let Ok(stat) = replicator_common::sys::stat::of_fd(&fd) else { return };
        let Ok(state) = small::state_of(fd.as_fd(), &stat) else { return };
        let old = &mut file.known;
        file.moving |= stat.ctime != old.ctime;
        old.state.attributes = Attributes { mtime: old.state.attributes.mtime, ..state.attributes };
        old.nlink = stat.nlink;
    }

    /// Holds that were looked at and are held no more. Not those of files that
    /// this batch `placed`: they are of what changed since.
    fn release_holds(
        &mut self,
        draft: &Draft,
        left: &BTreeMap<ObjectId, crate::plan::Hold>,
        placed: &BTreeSet<ObjectId>,
    ) {
        let looked: Vec<ObjectId> = self
            .holds
            .iter()
            .filter(|(object, _)| !placed.contains(*object))
            .filter(|(object, held)| {
                let shipped = match draft.outcomes.get(object) {
                    // A directory waits for being listed, or for entries.
                    Some(Outcome::Ship { known, .. } | Outcome::Same { known })
                        if known.state.kind == Kind::Directory =>
                    {
                        held.hold.entries.is_empty() && draft.resolve.listed.contains(*object)
                    }
                    // Attributes alone are not what it waits for.
                    Some(Outcome::Ship { content: ContentSource::Packed { .. }, .. }) => true,
                    Some(Outcome::Ship { .. } | Outcome::Same { .. }) => {
                        draft.resolve.wants_content(object)
                    }
                    Some(Outcome::Gone) => true,
                    _ => draft.resolve.listed.contains(*object) && held.hold.entries.is_empty(),
                };
                let entries = &held.hold.entries;
                let orphaned = !entries.is_empty()
                    && entries.iter().all(|place| {
                        draft
                            .resolve
                            .bindings
                            .get(place)
                            .is_some_and(|binding| binding.new.as_ref() != Some(object))
                    });
                !left.contains_key(object) && (shipped || orphaned)
            })
            .map(|(object, _)| object.clone())
            .collect();
        for object in looked {
            let Some(held) = self.holds.remove(&object) else { continue };
            self.look_at_rest(&draft.resolve, held.hold.entries);
            self.discard(held.transfer);
        }
    }

    /// Entries that waited for an object which waits no more, and that this
    /// batch has not looked at, are looked at in the next.
    fn look_at_rest(&mut self, resolve: &Resolve, entries: BTreeSet<(ObjectId, Name)>) {
        for (directory, name) in entries {
            if !resolve.bindings.contains_key(&(directory.clone(), name.clone())) {
                self.dirty.entry(directory, name, crate::watcher::What::default());
            }
        }
    }

    fn retry_unreadable(
        &mut self,
        places: Vec<((ObjectId, replicator_common::name::Name), String)>,
        assembly: &mut Assembly,
    ) {
        for (object, error) in self.tree.take_doubts() {
            self.shared.unreadable(self.path_of(&object), &error);
        }
        let troubles = self.tree.take_troubles();
        for (directory, error) in troubles {
            self.shared.unreadable(self.path_of(&directory), &error);
            let entries = BTreeSet::new();
            let reason = HoldReason::Unreadable { error };
            assembly.holds.entry(directory).or_insert(crate::plan::Hold { reason, entries });
        }
        for ((directory, name), error) in places {
            let path = self.path_of_entry(&directory, &name);
            self.shared.unreadable(path, &error);
            let reason = HoldReason::Unreadable { error };
            assembly
                .holds
                .entry(directory.clone())
                .or_insert_with(|| crate::plan::Hold { reason, entries: BTreeSet::new() })
                .entries
                .insert((directory, name));
        }
    }

    /// Counts what is passed over now: of what was looked at, and not of what
    /// lies in directories that are `dropped`.
    fn note_skipped(&mut self, draft: &Draft, dropped: &[ObjectId]) {
        if !self.skipped.is_empty() {
            for place in draft.resolve.bindings.keys() {
                self.skipped.remove(place);
            }
            let dropped: HashSet<&ObjectId> = dropped.iter().collect();
            self.skipped.retain(|(directory, _), _| !dropped.contains(directory));
        }
        for (place, skip) in &draft.resolve.skipped {
            if let Some(skip) = skip {
                self.skipped.insert(place.clone(), *skip);
            }
        }
    }

    fn commit(
        &mut self,
        draft: Draft,
        assembly: Assembly,
        closed: Option<Gap>,
    ) -> Result<(), EngineError> {
        let covered = self.covered;
        let (header, reached) = self.header(&draft, &assembly, closed.as_ref());
        let changed = replaced_content(&assembly.delta, draft.batch);
        self.spoil(&changed);
        for object in assembly.linked {
            self.members.add_linked(object);
        }
        let Assembly { ops, delta, .. } = assembly;
        let dropped = dropped_by(&delta);
        let progress = progress_of(&delta, draft.resolve.equal);
        let objects = ops.iter().filter(|op| matches!(op, Op::Put { .. })).count() as u64;
        let input = draft.input;
        self.send_batch(Ready {
            ops,
            delta,
            header,
            input,
            closed,
            dropped,
            progress,
            objects,
            covered,
            reached,
        })
    }

    /// Makes a batch's delta durable, then commits it to the destination.
    ///
    /// INVARIANT (trap 5): the order of these two.
    pub(super) fn send_batch(&mut self, ready: Ready) -> Result<(), EngineError> {
        let Ready { ops, mut delta, header, input, closed, dropped, progress, .. } = ready;
        let batch = self.next_batch;
        let mark = Mark {
            batch,
            seq: header.seq,
            watermark: (header.watermark > Timestamp::NEVER).then_some(header.watermark),
            consistent: header.exact.or(self.totals.consistent),
            bytes_changed: self.totals.bytes_changed + header.bytes_changed,
            bytes_shipped: self.totals.bytes_shipped + header.bytes_shipped,
            objects_shipped: self.totals.objects_shipped + ready.objects,
            exact_batches: self.totals.exact_batches + u64::from(header.exact.is_some()),
        };
        delta.mark = mark;
        delta.dead_lists.append(&mut self.dead_lists);
        metrics::histogram!("replicator_source_batch_operations").record(ops.len() as f64);
        let start = Instant::now();
        self.index.prepare(delta)?;
        tracing::debug!(%batch, operations = ops.len(), took = ?start.elapsed(), "prepared");
        // From here on the destination may have it, whatever becomes of the
        // session: the next greeting must say so.
        self.shared.greeting_pending(batch);
        self.totals = mark;
        self.claimed = self.claimed.max(header.watermark);
        self.next_batch = batch.next();
        self.in_flight.push_back(InFlight {
            mark,
            input,
            closed,
            dropped,
            progress,
            committed_at: Instant::now(),
            exact: header.exact.is_some(),
            durable: false,
            covered: ready.covered,
            reached: ready.reached,
        });
        let sent = match &self.session {
            Some(session) => send_plan(session, batch, ops, header),
            None => Err(SinkError::Closed),
        };
        if let Err(error) = sent {
            // The link tells of the end too; then the batch is settled.
            tracing::debug!(reason = ended(&error), "the session ended at commit");
        }
        Ok(())
    }

    /// What the batch says of itself, and the internal moment that it reaches.
    fn header(
        &mut self,
        draft: &Draft,
        assembly: &Assembly,
        closed: Option<&Gap>,
    ) -> (BatchHeader, Timestamp) {
        let base = match (&self.gap, closed) {
            (Some(gap), _) => gap.floor,
            // Where only a walk proves anything, it proves it for the moment
            // at which it began.
            (None, Some(gap)) if !self.capture.proves() => gap.walk_started,
            (None, None) if !self.capture.proves() => self.covered,
            _ => draft.time,
        };
        self.covered = self.covered.max(base);
        let waiting = self.holds.values().map(|held| held.floor);
        let orphans = self.orphan_floor(assembly);
        let reached = waiting.chain(orphans).fold(base, Timestamp::min);
        // When the clock was set back, the claim stays until it has passed.
        let watermark = self.clock.wall(reached).max(self.claimed);
        let quiet = self.holds.is_empty() && assembly.orphans == 0 && self.gap.is_none();
        let exact =
            (draft.exact && quiet && self.capture.proves() && closed.is_none_or(|_| draft.exact))
                .then(|| self.clock.wall(draft.time));
        let header = BatchHeader {
            seq: draft.seq,
            watermark,
            exact,
            packed: draft.packed,
            ops: assembly.ops.len() as u64,
            complete: watermark > Timestamp::NEVER,
            bytes_changed: draft.fresh + packed_content(&assembly.delta, draft.batch),
            // Not of this batch alone: what travels for later ones, and what
            // was sent in vain, is counted when it is sent.
            bytes_shipped: self.shipped().saturating_sub(self.totals.bytes_shipped),
        };
        (header, reached)
    }

    /// Content bytes shipped since the configuration was made.
    fn shipped(&self) -> u64 {
        let all = self.shipped_before + i128::from(self.wired.content());
        u64::try_from(all).unwrap_or(0)
    }

    /// Where orphans that are left hold the watermark.
    fn orphan_floor(&self, assembly: &Assembly) -> Option<Timestamp> {
        if assembly.orphans == 0 {
            return None;
        }
        let new = assembly.delta.orphans.iter().filter_map(|(_, orphan)| *orphan);
        let old = self.index.orphans().unwrap_or_default();
        let gone: BTreeSet<&ObjectId> = assembly
            .delta
            .orphans
            .iter()
            .filter(|(_, orphan)| orphan.is_none())
            .map(|(object, _)| object)
            .collect();
        let old = old.iter().filter(|(object, _)| !gone.contains(object)).map(|(_, o)| *o);
        new.chain(old).map(|orphan| orphan.floor).min()
    }

    /// The session ended before the batch was committed.
    fn give_up(&mut self, draft: Draft) {
        self.dirty.merge(draft.input);
        for (object, placed) in draft.placed {
            self.discard_file(placed.number, &placed.file);
            if let Some(held) = self.holds.get_mut(&object) {
                held.transfer = Transfer::Waiting;
                held.due = Instant::now();
            } else {
                self.hold_again(object, &placed.file, Duration::ZERO);
            }
        }
    }
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

fn send_plan(
    session: &Session,
    batch: BatchId,
    mut ops: Vec<Op>,
    header: BatchHeader,
) -> Result<(), SinkError> {
    while !ops.is_empty() {
        let rest = ops.split_off(ops.len().min(PLAN_OPS_MAX));
        session.send(&SourceMessage::Plan { batch, ops })?;
        ops = rest;
    }
    session.send(&SourceMessage::Commit { batch, header })
}

/// Objects that go with the batch.
fn dropped_by(delta: &Delta) -> Vec<ObjectId> {
    let gone = delta.objects.iter().filter(|(_, known)| known.is_none());
    gone.map(|(object, _)| object.clone()).collect()
}

/// Objects whose content in the replica changes with the batch, or that go.
fn replaced_content(delta: &Delta, batch: BatchId) -> BTreeSet<ObjectId> {
    delta
        .objects
        .iter()
        .filter(|(_, known)| known.as_ref().is_none_or(|known| known.version == batch))
        .map(|(object, _)| object.clone())
        .collect()
}

/// Content bytes of the small files whose content changes with the batch.
fn packed_content(delta: &Delta, batch: BatchId) -> u64 {
    let fresh = delta.objects.iter().filter_map(|(_, known)| known.as_ref());
    fresh
        .filter(|known| known.version == batch && matches!(known.content, Content::Whole(_)))
        .map(|known| known.state.size)
        .sum()
}

fn progress_of(delta: &Delta, equal: (u64, u64)) -> (u64, u64) {
    let fresh = delta.objects.iter().filter_map(|(_, known)| known.as_ref());
    fresh.fold(equal, |(objects, bytes), known| {
        let size = if matches!(known.content, Content::None) { 0 } else { known.state.size };
        (objects + 1, bytes + size)
    })
}
