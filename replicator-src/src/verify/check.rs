//! Compares one thing: looks at the source, has the replica described, and has
//! the engine judge what differs.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, bounded};
use replicator_common::describe::{
    Describe, Described, Description, EntriesSeen, EntrySeen, Expected, ExtraSeen, RANGE_MAX,
    RangeSeen,
};
use replicator_common::id::ObjectId;
use replicator_common::name::Name;
use replicator_common::object::Kind;
use replicator_common::status::Abilities;
use replicator_common::verification::DifferenceKind;
use replicator_common::wire::{Hash, PACK_MAX};

use super::compare;
use super::look::{Look, Seen};
use crate::engine::Event;
use crate::engine::state::Shared;
use crate::engine::verify::{Query, Repair, Subject, Ticks};
use crate::index::{Known, Snapshot, Store};
use crate::plan::{Listed, Lookup, Tree};
use crate::source::SourceTree;

/// How long a change time must lie before the watermark: a system call has its
/// effect first, and its event when it returns. Calls that take longer are
/// uncommon, and then two looks must still show the same.
const GRACE: Duration = Duration::from_secs(5);
/// How long the destination, or the engine, may take to answer: it may be busy
/// with a batch. Only a session's end tells sooner.
const ANSWER: Duration = Duration::from_secs(120);
/// Between two looks at whether to stop.
const POLL: Duration = Duration::from_millis(100);
/// The deepest path that is spelt out.
const DEPTH: usize = 4096;

/// Something to be compared.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) enum Item {
    /// An object's state, and the content of a small file.
    Object(ObjectId),
    /// A large file's content, from this byte on.
    Content(ObjectId, u64),
    /// A name.
    Entry(ObjectId, Name),
}

/// What a comparison gave.
#[derive(Debug)]
pub(super) enum Verdict {
    /// Both sides are the same, or there is nothing to compare.
    Equal,
    /// It cannot be said now, and the item is not to blame: no session, a walk.
    NotNow,
    /// What differs is explained by a change, or may be. `fresh`: it changed
    /// since the pass began.
    Changing {
        /// See there.
        fresh: bool,
    },
    /// One of the sides cannot be read.
    Unreadable(String),
    /// They differ.
    Different(Box<Found>),
}

/// A difference.
#[derive(Clone, Debug)]
pub(super) struct Found {
    pub(super) kind: DifferenceKind,
    pub(super) source: String,
    pub(super) replica: String,
    pub(super) repair: Repair,
    /// It is of our own making (the time of a root that got a lost+found), and
    /// put right without a word.
    pub(super) silent: bool,
    subjects: Vec<Subject>,
    /// The newest change time on the source of what it is about.
    ctime: replicator_common::time::Timestamp,
}

/// What it is compared with.
pub(super) struct Checker {
    pub(super) look: Look,
    pub(super) tree: SourceTree,
    pub(super) store: Arc<Store>,
    pub(super) post: Sender<Event>,
    pub(super) ticks: Arc<Ticks>,
    pub(super) shared: Arc<Shared>,
    pub(super) stop: Arc<AtomicBool>,
    /// Content bytes read of the source since they were last asked for.
    pub(super) read: u64,
}

impl Checker {
    /// Compares an item; `started` is when the pass began.
    pub(super) fn check(
        &mut self,
        item: &Item,
        started: replicator_common::time::Timestamp,
    ) -> Verdict {
        let since = self.ticks.now();
        let Some(abilities) = self.abilities() else { return Verdict::NotNow };
        let verdict = match item {
            Item::Object(object) => self.object(object, &abilities),
            Item::Content(object, from) => self.content(object, *from),
            Item::Entry(directory, name) => self.entry(directory, name),
        };
        let Verdict::Different(found) = verdict else { return verdict };
        // Newer than the watermark is what may have an event to come.
        let watermark = self.shared.report().watermark;
        let settled = found.ctime.offset(GRACE.as_nanos() as i64);
        let fresh = found.ctime >= started;
        if settled > watermark {
            return Verdict::Changing { fresh };
        }
        match self.judge(found.subjects.clone(), since) {
            Some(true) => Verdict::Different(found),
            Some(false) => Verdict::Changing { fresh },
            None => Verdict::NotNow,
        }
    }

    pub(super) fn abilities(&self) -> Option<Abilities> {
        self.shared.destination().map(|(report, _)| report.abilities)
    }

    pub(super) fn known(&self, object: &ObjectId) -> Option<Known> {
        self.snapshot()?.object(object).ok().flatten()
    }

    pub(super) fn snapshot(&self) -> Option<Snapshot> {
        let snapshot = self.store.snapshot();
        snapshot.inspect_err(|error| tracing::warn!(%error, "verification waits")).ok()
    }

    // -------------------------------------------------------------- objects

    fn object(&mut self, object: &ObjectId, abilities: &Abilities) -> Verdict {
        // Gone from the index: it is gone, and its name is looked at by itself.
        let Some(known) = self.known(object) else { return Verdict::Equal };
        let hint = known.entry.as_ref();
        let seen = match self.look.state(object, hint) {
            Ok(Some(seen)) => seen,
            Ok(None) => return Verdict::Equal,
            Err(error) => return Verdict::Unreadable(error.to_string()),
        };
        let small = seen.state.kind == Kind::File && seen.state.size <= PACK_MAX;
        let question = Describe::Objects(vec![(object.clone(), small)]);
        let Some(answer) = self.ask(question) else { return Verdict::NotNow };
        let hash = if small {
            match self.look.hash(object, hint, &seen) {
                Ok(Some(hash)) => Some(hash),
                Ok(None) => return Verdict::Changing { fresh: true },
                Err(error) => return Verdict::Unreadable(error.to_string()),
            }
        } else {
            None
        };
        let Some(Description::Objects(described)) = self.answer(&answer) else {
            return Verdict::NotNow;
        };
        let Some(described) = described.into_iter().next() else { return Verdict::NotNow };
        let verdict = self.compare(object, &seen, hash, described, abilities);
        let large = seen.state.kind == Kind::File && !small;
        match &verdict {
            // What is wrong with its time may be wrong with its content.
            Verdict::Different(found) if large && found.kind == DifferenceKind::Attributes => {
                match self.content(object, 0) {
                    Verdict::Equal => verdict,
                    other => other,
                }
            }
            _ => verdict,
        }
    }

    /// Compares an object that both sides have described.
    pub(super) fn compare(
        &self,
        object: &ObjectId,
        seen: &Seen,
        hash: Option<Hash>,
        described: Described,
        abilities: &Abilities,
    ) -> Verdict {
        let (state, theirs) = match described {
            Described::Found { state, hash, .. } => (state, hash),
            Described::Unreadable(error) => {
                return Verdict::Unreadable(format!("in the replica: {error}"));
            }
            // Its names tell.
            Described::Unknown | Described::Unmade | Described::Missing => return Verdict::Equal,
        };
        let different = |kind, source, replica, repair, silent| {
            Verdict::Different(Box::new(Found {
                kind,
                source,
                replica,
                repair,
                silent,
                subjects: vec![Subject::Object(object.clone())],
                ctime: seen.ctime,
            }))
        };
        let file = seen.state.kind == Kind::File;
        if file && (seen.state.size != state.size || hash.is_some() && hash != theirs) {
            let words = |size: u64, hash: Option<Hash>| match hash {
                Some(hash) => format!("{size} bytes, hash {hash:?}"),
                None => format!("{size} bytes"),
            };
            let repair = Repair::Content(object.clone());
            let (a, b) = (words(seen.state.size, hash), words(state.size, theirs));
            return different(DifferenceKind::Content, a, b, repair, false);
        }
        match compare::attributes(&seen.state, &state, abilities) {
            None => Verdict::Equal,
            Some((source, replica)) => {
                let root = object == self.look.root();
                let silent = root && compare::only_time(&seen.state, &state, abilities);
                let repair = Repair::Attributes(object.clone());
                different(DifferenceKind::Attributes, source, replica, repair, silent)
            }
        }
    }

    /// A large file's content, up to the first range that differs.
    fn content(&mut self, object: &ObjectId, from: u64) -> Verdict {
        let Some(known) = self.known(object) else { return Verdict::Equal };
        let mut offset = from;
        loop {
            match self.range(object, &known, offset) {
                Ok(Some(next)) => offset = next,
                Ok(None) => return Verdict::Equal,
                Err(verdict) => return verdict,
            }
        }
    }

    /// Compares one range; gives where the next begins, if there is one.
    pub(super) fn range(
        &mut self,
        object: &ObjectId,
        known: &Known,
        offset: u64,
    ) -> Result<Option<u64>, Verdict> {
        let length = RANGE_MAX;
        let question = Describe::Range { object: object.clone(), offset, length };
        let answer = self.ask(question).ok_or(Verdict::NotNow)?;
        let ours = self.look.range(object, known.entry.as_ref(), offset, length);
        let answer = self.answer(&answer).ok_or(Verdict::NotNow)?;
        let (read, seen, hash) = match ours {
            Ok(Some(read)) => read,
            Ok(None) => return Err(Verdict::Changing { fresh: true }),
            Err(error) => return Err(Verdict::Unreadable(error.to_string())),
        };
        self.read += read;
        let (length, theirs) = match answer {
            Description::Range(RangeSeen::Read { length, hash }) => (length, hash),
            Description::Range(RangeSeen::Missing) => return Ok(None),
            Description::Range(RangeSeen::Unreadable(error)) => {
                return Err(Verdict::Unreadable(format!("in the replica: {error}")));
            }
            _ => return Err(Verdict::NotNow),
        };
        if (read, hash) == (length, theirs) {
            let next = offset + read;
            return Ok((read == RANGE_MAX && next < seen.state.size).then_some(next));
        }
        let words = |length, hash| format!("{length} bytes from {offset}, hash {hash:?}");
        Err(Verdict::Different(Box::new(Found {
            kind: DifferenceKind::Content,
            source: words(read, hash),
            replica: words(length, theirs),
            repair: Repair::Content(object.clone()),
            silent: false,
            subjects: vec![Subject::Object(object.clone())],
            ctime: seen.ctime,
        })))
    }

    // ---------------------------------------------------------------- names

    fn entry(&mut self, directory: &ObjectId, name: &Name) -> Verdict {
        let Some(known) = self.known(directory) else { return Verdict::Equal };
        let parent = match self.look.state(directory, known.entry.as_ref()) {
            Ok(Some(seen)) => seen,
            Ok(None) => return Verdict::Equal,
            Err(error) => return Verdict::Unreadable(error.to_string()),
        };
        let (expected, ctime) = match self.tree.lookup(directory, name) {
            Ok(Lookup::Found(seen)) => (Expected::Object(seen.object), seen.stat.ctime),
            Ok(Lookup::Absent) => (Expected::Nothing, parent.ctime),
            Ok(Lookup::Skipped(_) | Lookup::Away) => return Verdict::Equal,
            Ok(Lookup::Unreadable(error)) => return Verdict::Unreadable(error),
            Err(error) => return Verdict::Unreadable(error.to_string()),
        };
        let question = Describe::Entries {
            directory: directory.clone(),
            after: None,
            until: None,
            expected: vec![(name.clone(), expected.clone())],
            list: false,
        };
        let seen = match self.ask(question).and_then(|answer| self.answer(&answer)) {
            Some(Description::Entries(EntriesSeen::Read { wrong, .. })) => wrong,
            // Its own name tells.
            Some(Description::Entries(EntriesSeen::Missing)) => return Verdict::Equal,
            Some(Description::Entries(EntriesSeen::Unreadable(error))) => {
                return Verdict::Unreadable(format!("in the replica: {error}"));
            }
            _ => return Verdict::NotNow,
        };
        let Some((_, seen)) = seen.into_iter().next() else { return Verdict::Equal };
        let place = (directory.clone(), name.clone());
        self.wrong_entry(place, expected, seen, parent.ctime.max(ctime))
    }

    fn wrong_entry(
        &mut self,
        (directory, name): (ObjectId, Name),
        expected: Expected,
        seen: EntrySeen,
        ctime: replicator_common::time::Timestamp,
    ) -> Verdict {
        let mut subjects = vec![Subject::Entry(directory.clone(), name.clone())];
        let (kind, source, replica, repair) = match (expected, seen) {
            (_, EntrySeen::Unreadable(error)) => {
                return Verdict::Unreadable(format!("in the replica: {error}"));
            }
            (Expected::Object(object), seen) => {
                let known = self.known(&object);
                let source = known.map_or("an object".to_owned(), |k| described(k.state.kind));
                let replica = match seen {
                    EntrySeen::Other(other) => format!("another object: {}", words(&other)),
                    _ => "nothing".to_owned(),
                };
                let Some(alive) = self.is_alive(&object) else { return Verdict::NotNow };
                if self.known(&object).is_some() {
                    subjects.push(Subject::Object(object.clone()));
                }
                let repair = Repair::Missing { directory, name, object, alive };
                (DifferenceKind::Missing, source, replica, repair)
            }
            (_, EntrySeen::Other(other)) => {
                let replica = words(&other);
                let ExtraSeen { handle, kind, .. } = other;
                let repair = Repair::Extra { directory, name, handle, kind };
                (DifferenceKind::Extra, "nothing".to_owned(), replica, repair)
            }
            _ => return Verdict::Equal,
        };
        let silent = false;
        Verdict::Different(Box::new(Found {
            kind,
            source,
            replica,
            repair,
            silent,
            subjects,
            ctime,
        }))
    }

    /// Whether the replica has an object under any name; `None` when that cannot
    /// be told now.
    fn is_alive(&self, object: &ObjectId) -> Option<bool> {
        let answer = self.ask(Describe::Objects(vec![(object.clone(), false)]))?;
        match self.answer(&answer)? {
            Description::Objects(all) => Some(matches!(all.first()?, Described::Found { .. })),
            _ => None,
        }
    }

    /// The names of a directory on the source, in order; `None` when there is
    /// nothing to compare.
    pub(super) fn names(&mut self, directory: &ObjectId) -> Result<Option<Vec<Name>>, String> {
        let listed = self.tree.list(directory, usize::MAX);
        if let Some((_, error)) = self.tree.take_troubles().pop() {
            return Err(error);
        }
        match listed {
            Ok(Listed::Names(mut names)) => {
                names.sort();
                Ok(Some(names))
            }
            // (Nothing is more than all.)
            Ok(Listed::Gone | Listed::Away | Listed::Many) => Ok(None),
            Err(error) => Err(error.to_string()),
        }
    }

    /// What should be under a name of the replica, as far as that can be told
    /// at once.
    pub(super) fn expected(&mut self, directory: &ObjectId, name: &Name) -> Expected {
        match self.tree.lookup(directory, name) {
            Ok(Lookup::Found(seen)) => Expected::Object(seen.object),
            _ => Expected::Anything,
        }
    }

    /// Closes what was kept open.
    pub(super) fn rest(&mut self) {
        self.tree.forget_open();
    }

    /// The path of an item relative to the source, as the index knows it.
    pub(super) fn path(&self, item: &Item) -> String {
        let Some(snapshot) = self.snapshot() else { return String::new() };
        let (mut at, mut parts) = match item {
            Item::Object(object) | Item::Content(object, _) => (object.clone(), Vec::new()),
            Item::Entry(directory, name) => (directory.clone(), vec![name.to_string()]),
        };
        while at != *self.look.root() && parts.len() < DEPTH {
            let known = snapshot.object(&at).ok().flatten();
            let Some((directory, name)) = known.and_then(|known| known.entry) else {
                parts.push(format!("(object {at})"));
                break;
            };
            parts.push(name.to_string());
            at = directory;
        }
        parts.reverse();
        parts.join("/")
    }

    // ----------------------------------------------------------- the engine

    /// Asks the destination; the answer comes later. `None` without an engine.
    pub(super) fn ask(&self, question: Describe) -> Option<Receiver<Description>> {
        let (reply, answer) = bounded(1);
        let question = Box::new(question);
        self.post.send(Event::Verify(Query::Ask { question, reply })).ok()?;
        Some(answer)
    }

    /// Waits for an answer; `None` when there is none: no session, or the end.
    pub(super) fn answer<T>(&self, answer: &Receiver<T>) -> Option<T> {
        let until = Instant::now() + ANSWER;
        while Instant::now() < until && !self.stop.load(Ordering::Acquire) {
            match answer.recv_timeout(POLL) {
                Ok(answer) => return Some(answer),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return None,
            }
        }
        None
    }

    fn judge(&self, subjects: Vec<Subject>, since: u64) -> Option<bool> {
        let (reply, answer) = bounded(1);
        self.post.send(Event::Verify(Query::Judge { subjects, since, reply })).ok()?;
        self.answer(&answer).flatten()
    }

    /// Has the engine bring the stored index up to what the destination has applied: what
    /// a pass looks at are its rows. Whether that was done.
    pub(super) fn begin(&self) -> bool {
        let (reply, answer) = bounded(1);
        let sent = self.post.send(Event::Verify(Query::Begin { reply }));
        sent.is_ok() && self.answer(&answer).is_some()
    }

    /// Has something put right; whether it is under way.
    pub(super) fn repair(&self, repair: Repair) -> bool {
        let (reply, answer) = bounded(1);
        let sent = self.post.send(Event::Verify(Query::Repair { repair, reply }));
        sent.is_ok() && self.answer(&answer) == Some(true)
    }
}

fn described(kind: Kind) -> String {
    match kind {
        Kind::File => "a file",
        Kind::Directory => "a directory",
        Kind::Symlink => "a symbolic link",
        Kind::BlockDevice | Kind::CharDevice => "a device node",
        Kind::Fifo => "a FIFO",
        Kind::Socket => "a socket",
    }
    .to_owned()
}

fn words(seen: &ExtraSeen) -> String {
    match seen.kind {
        Kind::File => format!("a file of {} bytes", seen.size),
        kind => described(kind),
    }
}
