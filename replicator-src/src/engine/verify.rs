//! The engine's part in verification: it passes questions on to the destination,
//! says whether a difference means anything, and has differences put right.
//!
//! Source and replica are looked at without stopping either. A difference means
//! something only when nothing that the engine knows of could explain it: no
//! change that waits, is held, travels or travelled since before the first of the
//! two looks. `Touched` remembers the last part. (That a system call may have
//! had its effect and not its event yet is the asker's to know, from change
//! times.)
//!
//! Repairs use what batches can say anyhow. What is wrong in an object is sent
//! anew, and the index is not believed meanwhile (`forced`). A name that is
//! missing is taken out of index and replica, by a batch of its own, and found to
//! be new by the next. A name too many is adopted as foreign and set aside into
//! lost+found within one batch.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use crossbeam_channel::Sender;
use replicator_common::describe::{Describe, Description, QUESTIONS_MAX};
use replicator_common::id::{BatchNonce, ObjectId, ReplicaHandle};
use replicator_common::name::Name;
use replicator_common::object::Kind;
use replicator_common::time::Timestamp;
use replicator_common::wire::{BatchHeader, ContentSource, Hash, Op, SourceMessage};

use super::commit::Ready;
use super::{Engine, EngineError};
use crate::index::store::dead_list;
use crate::index::{Content, Delta, EntryChange, Known, View};
use crate::journal::Record;
use crate::plan::Dirty;
use crate::watcher::What;

/// Subjects remembered as touched at most.
const TOUCHED_MAX: usize = 200_000;
/// Names that one repair takes out of the index; beyond this the whole replica
/// is reconciled.
const REMOVED_MAX: usize = 50_000;
/// Looks into the journal for one judgement.
const LOOKS: usize = 16;

/// What a comparison is about.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Subject {
    /// An object: its content, its attributes, or, of a directory, its names.
    Object(ObjectId),
    /// A name.
    Entry(ObjectId, Name),
}

/// Something to be put right in the replica.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Repair {
    /// Content and attributes of an object.
    Content(ObjectId),
    /// Attributes of an object.
    Attributes(ObjectId),
    /// A name that does not lead to what it should.
    Missing {
        /// In this directory.
        directory: ObjectId,
        /// The name.
        name: Name,
        /// What it should lead to.
        object: ObjectId,
        /// The replica has that object, under whatever name.
        alive: bool,
    },
    /// A name too many.
    Extra {
        /// In this directory.
        directory: ObjectId,
        /// The name.
        name: Name,
        /// What it leads to.
        handle: ReplicaHandle,
        /// Of what kind that is.
        kind: Kind,
    },
}

/// What a verifier asks of the engine.
pub enum Query {
    /// A pass begins: what the destination has applied becomes part of the stored index,
    /// and does so without delay until the pass has ended.
    Begin {
        /// Answered when it has.
        reply: Sender<()>,
    },
    /// Ask the destination. The answer is dropped with the session.
    Ask {
        /// What.
        question: Box<Describe>,
        /// Where the answer goes.
        reply: Sender<Description>,
    },
    /// Whether nothing known explains a difference.
    Judge {
        /// What was compared.
        subjects: Vec<Subject>,
        /// [`Ticks::now`] before the first look at either side.
        since: u64,
        /// Where the answer goes; `None` when that cannot be told now.
        reply: Sender<Option<bool>>,
    },
    /// Put something right. Answered once it is under way; `false`: not now.
    Repair {
        /// What.
        repair: Repair,
        /// Where the answer goes.
        reply: Sender<bool>,
    },
    /// A pass has ended.
    Ended,
}

/// Moments in the engine's life, shared with the verifier.
#[derive(Debug, Default)]
pub struct Ticks {
    now: AtomicU64,
    /// A pass is under way: touches are remembered.
    active: AtomicBool,
    /// Nobody will ask for what was touched up to here.
    settled: AtomicU64,
}

impl Ticks {
    /// The present moment, at which a look begins.
    pub fn now(&self) -> u64 {
        self.now.load(Ordering::SeqCst)
    }

    /// A pass begins or ends.
    pub fn set_active(&self, active: bool) {
        self.active.store(active, Ordering::SeqCst);
    }

    /// No look that is still open began before this moment.
    pub fn settle(&self, moment: u64) {
        self.settled.store(moment, Ordering::SeqCst);
    }
}

/// When changes of what were seen, sent or applied last.
#[derive(Default)]
pub(super) struct Touched {
    ticks: Arc<Ticks>,
    last: HashMap<Subject, u64>,
    /// Before this moment nothing is remembered: anything may have happened.
    horizon: u64,
}

impl Touched {
    pub(super) fn new(ticks: Arc<Ticks>) -> Self {
        Self { ticks, ..Self::default() }
    }

    pub(super) fn is_active(&self) -> bool {
        self.ticks.active.load(Ordering::SeqCst)
    }

    fn touch(&mut self, subjects: impl IntoIterator<Item = Subject>) {
        let tick = self.ticks.now.fetch_add(1, Ordering::SeqCst) + 1;
        self.last.extend(subjects.into_iter().map(|subject| (subject, tick)));
        if self.last.len() > TOUCHED_MAX {
            let settled = self.ticks.settled.load(Ordering::SeqCst);
            self.last.retain(|_, tick| *tick > settled);
        }
        if self.last.len() > TOUCHED_MAX {
            self.forget();
        }
    }

    /// A change that was absorbed.
    pub(super) fn record(&mut self, record: &Record) {
        if !self.is_active() {
            return;
        }
        match record {
            Record::Entry { directory, name } | Record::Named { directory, name, .. } => {
                self.touch(entry_subjects(directory, name));
            }
            Record::Object { object, .. } => self.touch([Subject::Object(object.clone())]),
            Record::Gap { .. } | Record::Barrier { .. } => {}
        }
    }

    /// A batch is sent; gives what it touches, for when it is applied.
    pub(super) fn sent(&mut self, delta: &Delta) -> Option<Vec<Subject>> {
        if !self.is_active() {
            return None;
        }
        let objects = delta.objects.iter().map(|(object, _)| Subject::Object(object.clone()));
        let entries =
            delta.entries.iter().flat_map(|change| entry_subjects(&change.directory, &change.name));
        let all: Vec<Subject> = objects.chain(entries).collect();
        self.touch(all.iter().cloned());
        Some(all)
    }

    /// A batch was applied.
    pub(super) fn applied(&mut self, subjects: Option<Vec<Subject>>) {
        match subjects {
            Some(subjects) => self.touch(subjects),
            None => self.forget(),
        }
    }

    /// From here on nothing is known of before.
    pub(super) fn forget(&mut self) {
        self.last.clear();
        self.horizon = self.ticks.now.fetch_add(1, Ordering::SeqCst) + 1;
    }

    fn since(&self, subject: &Subject, moment: u64) -> bool {
        moment < self.horizon || self.last.get(subject).is_some_and(|tick| *tick > moment)
    }
}

fn entry_subjects(directory: &ObjectId, name: &Name) -> [Subject; 2] {
    [Subject::Object(directory.clone()), Subject::Entry(directory.clone(), name.clone())]
}

impl Engine {
    pub(super) fn verify(&mut self, query: Query) -> Result<(), EngineError> {
        // Whoever asks may have given up waiting: then the answer is for nobody.
        match query {
            Query::Begin { reply } => {
                self.index.merge()?;
                let _ = reply.send(());
            }
            Query::Ask { question, reply } => {
                if let Some(session) = &self.session
                    && self.asked.len() < QUESTIONS_MAX
                    && session.send(&SourceMessage::Describe(question)).is_ok()
                {
                    self.asked.push_back(reply);
                }
            }
            Query::Judge { subjects, since, reply } => {
                let means = self.nothing_explains(&subjects, since)?;
                let _ = reply.send(means);
            }
            Query::Repair { repair, reply } => {
                let done = self.repair(repair)?;
                let _ = reply.send(done);
            }
            Query::Ended => {
                self.forced.clear();
                self.touched.forget();
            }
        }
        Ok(())
    }

    /// The destination has described something.
    pub(super) fn described(&mut self, description: Description) {
        if let Some(reply) = self.asked.pop_front() {
            // Whoever asked may have given up waiting.
            let _ = reply.send(description);
        }
    }

    /// Whether index and replica are as the engine believes, but for batches.
    fn is_settled(&self) -> bool {
        let reconciled =
            self.reconcile.as_ref().is_none_or(super::reconcile::Reconcile::is_complete);
        self.session.is_some() && self.gap.is_none() && self.failing.is_none() && reconciled
    }

    /// Whether nothing that the engine knows of explains a difference; `None`
    /// when that cannot be told now.
    fn nothing_explains(
        &mut self,
        subjects: &[Subject],
        since: u64,
    ) -> Result<Option<bool>, EngineError> {
        if !self.is_settled() {
            return Ok(None);
        }
        // What was done before the looks ended has its record by now.
        let barrier = self.capture.barrier()?;
        for _ in 0..LOOKS {
            if self.cursor >= barrier.seq {
                break;
            }
            self.look_ahead()?;
        }
        if self.cursor < barrier.seq || !self.is_settled() {
            return Ok(None);
        }
        for subject in subjects {
            if self.explains(subject, since)? {
                return Ok(Some(false));
            }
        }
        Ok(Some(true))
    }

    fn explains(&self, subject: &Subject, since: u64) -> Result<bool, EngineError> {
        if self.touched.since(subject, since) {
            return Ok(true);
        }
        let travels = self.in_flight.iter().any(|batch| match &batch.note.subjects {
            Some(subjects) => subjects.contains(subject),
            None => true,
        });
        if travels {
            return Ok(true);
        }
        let waits = |of: &dyn Fn(&Dirty) -> bool| of(&self.dirty) || of(&self.astray);
        // Where whole directories wait to be looked at, anything in them may be
        // as it is for that reason.
        let listed = |directory: &ObjectId| {
            waits(&|dirty| dirty.listings.iter().any(|one| one.deep || one.directory == *directory))
        };
        match subject {
            Subject::Entry(directory, name) => {
                let place = (directory.clone(), name.clone());
                let held = self.holds.values().any(|held| held.hold.entries.contains(&place));
                let gone = self.index.object(directory)?.is_none();
                let held = held || self.holds.contains_key(directory) || listed(directory);
                Ok(gone || held || waits(&|dirty| dirty.entries.contains_key(&place)))
            }
            Subject::Object(object) => {
                let Some(known) = self.index.object(object)? else { return Ok(true) };
                let orphan = known.entry.is_none() && *object != self.opener.root().id;
                let held = self.holds.contains_key(object) || listed(object);
                if orphan || held || waits(&|dirty| dirty.objects.contains_key(object)) {
                    return Ok(true);
                }
                // Where events tell names only, those are what waits.
                for (directory, name) in self.index.links(object)? {
                    let entry = Subject::Entry(directory.clone(), name.clone());
                    let place = (directory, name);
                    if listed(&place.0)
                        || self.touched.since(&entry, since)
                        || waits(&|dirty| dirty.entries.contains_key(&place))
                    {
                        return Ok(true);
                    }
                }
                Ok(false)
            }
        }
    }

    // -------------------------------------------------------------- repairs

    /// Puts something right, or has it put right by the next batches. `false`
    /// when it cannot be done now.
    fn repair(&mut self, repair: Repair) -> Result<bool, EngineError> {
        if !self.is_settled() || !self.in_flight.have_room(false) {
            return Ok(false);
        }
        match repair {
            Repair::Content(object) => self.force(object, true),
            Repair::Attributes(object) => self.force(object, false),
            Repair::Extra { directory, name, handle, kind } => {
                self.set_aside(directory, name, handle, kind)?;
            }
            Repair::Missing { directory, name, object, alive } => {
                if self.index.entry(&directory, &name)?.as_ref() == Some(&object) {
                    let last = self.index.links(&object)?.len() < 2;
                    let removal = self.removal(&directory, &name, &object, alive && !last)?;
                    let Some(removal) = removal else { return self.give_up_replica() };
                    self.commit_removal(removal)?;
                }
                let what = What { content: true, attributes: true };
                self.dirty.entry(directory, name, what);
            }
        }
        Ok(true)
    }

    /// Has an object sent again, whatever the index says of it. Nothing is built
    /// from what the replica has of its content.
    fn force(&mut self, object: ObjectId, content: bool) {
        let what = What { content, attributes: true };
        if content {
            self.spoil(&BTreeSet::from([object.clone()]));
        }
        let forced = self.forced.entry(object.clone()).or_default();
        crate::plan::dirty::join(forced, what);
        self.dirty.object(object, what);
    }

    /// Whether the replica's content of an object is not to be trusted.
    pub(super) fn is_forced(&self, object: &ObjectId) -> bool {
        self.forced.get(object).is_some_and(|what| what.content)
    }

    /// What reading compares an object with, when the index is not believed.
    pub(super) fn disbelieve(&self, object: &ObjectId, known: Option<Known>) -> Option<Known> {
        let mut known = known?;
        if let Some(what) = self.forced.get(object) {
            // No object has such a state.
            known.state.attributes.mode = u32::MAX;
            if what.content && matches!(known.content, Content::Whole(_)) {
                known.content = Content::Whole(Hash([0; 32]));
            }
        }
        Some(known)
    }

    /// Forced objects that are in a batch now.
    pub(super) fn settle_forced(&mut self, ops: &[Op]) {
        if self.forced.is_empty() {
            return;
        }
        for op in ops {
            let Op::Put { object, content, .. } = op else { continue };
            let whole = *content != ContentSource::Unchanged;
            if whole || !self.is_forced(object) {
                self.forced.remove(object);
            }
        }
    }

    /// A name too many becomes a foreign object and goes to lost+found (what
    /// arrived, by whatever way, is not thrown away). The index never hears of it.
    fn set_aside(
        &mut self,
        directory: ObjectId,
        name: Name,
        handle: ReplicaHandle,
        kind: Kind,
    ) -> Result<(), EngineError> {
        let Some(object) = ObjectId::foreign(&handle) else { return Ok(()) };
        let adopt = Op::Adopt {
            object: object.clone(),
            handle,
            directory: directory.clone(),
            name: name.clone(),
            kind,
        };
        let entry = Op::Entry {
            directory: directory.clone(),
            name: name.clone(),
            old: Some(object.clone()),
            new: None,
        };
        // So that a look at either from before is not believed.
        if self.touched.is_active() {
            self.touched.touch(entry_subjects(&directory, &name));
        }
        self.commit_repair(vec![adopt, entry, Op::SetAside { object }], Delta::default())
    }

    /// What takes a name out of index and replica: with the object and all its
    /// names, and all that is below, unless it `stays` under its others. `None`
    /// when that is too much.
    fn removal(
        &self,
        directory: &ObjectId,
        name: &Name,
        object: &ObjectId,
        stays: bool,
    ) -> Result<Option<Removal>, EngineError> {
        let mut removal = Removal::default();
        removal.take(directory.clone(), name.clone(), object.clone());
        if stays {
            return Ok(Some(removal));
        }
        let mut waiting = vec![object.clone()];
        while let Some(object) = waiting.pop() {
            let links = if removal.places.len() == 1 { self.index.links(&object)? } else { vec![] };
            for (directory, name) in links {
                removal.take(directory, name, object.clone());
            }
            for (name, child) in self.index.children(&object)? {
                removal.take(object.clone(), name, child.clone());
                waiting.push(child);
            }
            if removal.places.len() > REMOVED_MAX {
                return Ok(None);
            }
        }
        Ok(Some(removal))
    }

    fn commit_removal(&mut self, removal: Removal) -> Result<(), EngineError> {
        let (mut ops, mut delta) = (Vec::new(), Delta::default());
        let mut gone = BTreeSet::new();
        for (object, places) in removal.objects() {
            let left: Vec<_> = self
                .index
                .links(&object)?
                .into_iter()
                .filter(|place| !places.contains(place))
                .collect();
            let Some(old) = self.index.object(&object)? else { continue };
            let new = match left.first() {
                Some((directory, name)) => {
                    ops.push(Op::Entry {
                        directory: directory.clone(),
                        name: name.clone(),
                        old: Some(object.clone()),
                        new: Some(object.clone()),
                    });
                    let entry = left.first().cloned();
                    Some(Known { links: left.len() as u32, entry, ..old.clone() })
                }
                None => {
                    ops.push(Op::Drop { object: object.clone() });
                    gone.insert(object.clone());
                    None
                }
            };
            delta.dead_lists.extend(dead_list(Some(&old), new.as_ref()));
            delta.objects.push((object, new));
        }
        let what = What { content: true, attributes: true };
        for ((directory, name), object) in removal.places {
            // Names in what goes itself are found when it comes back.
            if !gone.contains(&directory) {
                self.dirty.entry(directory.clone(), name.clone(), what);
            }
            let (old, new) = (Some(object), None);
            ops.push(Op::Entry {
                directory: directory.clone(),
                name: name.clone(),
                old: old.clone(),
                new: None,
            });
            delta.entries.push(EntryChange { directory, name, old, new });
        }
        self.spoil(&gone);
        self.commit_repair(ops, delta)
    }

    /// A batch of a repair: it says nothing new of the source.
    fn commit_repair(&mut self, ops: Vec<Op>, delta: Delta) -> Result<(), EngineError> {
        let header = BatchHeader {
            nonce: BatchNonce::random(),
            seq: self.totals.seq,
            watermark: self.claimed,
            exact: None,
            packed: 0,
            ops: ops.len() as u64,
            complete: self.claimed > Timestamp::NEVER,
            bytes_changed: 0,
            bytes_shipped: 0,
        };
        self.send_batch(Ready {
            ops,
            delta,
            header,
            input: Dirty::default(),
            closed: None,
            dropped: Vec::new(),
            deletions: 0,
            born: Vec::new(),
            progress: (0, 0),
            objects: 0,
            before: self.reached,
            reached: Timestamp::NEVER,
        })
    }

    /// So much is missing that the replica is compared as a whole.
    fn give_up_replica(&mut self) -> Result<bool, EngineError> {
        if let Some(session) = self.session.take() {
            tracing::warn!("a large part of the replica is missing; it is compared anew");
            self.distrust(session, true)?;
        }
        Ok(true)
    }
}

/// Names that go from index and replica, with what they lead to.
#[derive(Default)]
struct Removal {
    places: BTreeMap<(ObjectId, Name), ObjectId>,
}

impl Removal {
    fn take(&mut self, directory: ObjectId, name: Name, object: ObjectId) {
        self.places.insert((directory, name), object);
    }

    /// Each object, with the names that it loses.
    fn objects(&self) -> BTreeMap<ObjectId, BTreeSet<(ObjectId, Name)>> {
        let mut objects: BTreeMap<ObjectId, BTreeSet<_>> = BTreeMap::new();
        for (place, object) in &self.places {
            objects.entry(object.clone()).or_default().insert(place.clone());
        }
        objects
    }
}
