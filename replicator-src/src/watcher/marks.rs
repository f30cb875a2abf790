//! The unprivileged watcher where the kernel allows it (Linux 5.17): a fanotify
//! mark on each directory.
//!
//! It sees what an inotify watch on each directory sees, and is told of each
//! change which object it concerns. By a name alone that cannot be known: a
//! file that gets a second name, is changed through it and loses it again
//! before anybody looks was changed under a name that leads nowhere.
//!
//! Marks are added by the walk, before it lists a directory, and to a new
//! directory as soon as its event is read (see `early`). A file that has several
//! names gets a mark of its own, for some of them may be outside.

mod early;

use std::collections::HashSet;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use replicator_common::id::ObjectId;
use replicator_common::name::Name;
use replicator_common::status::{WatcherKind, WatcherReport};
use replicator_common::sys::fanotify::{self, Detail, Event, Group, Queue, bits};
use replicator_common::sys::{handle, stat};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;

use super::fanotify::{CHANGES, CONTENT, translate};
use super::root::Root;
use super::waker::{Bell, failed};
use super::{Change, DirectoryWatch, Waker, WatchError, Watcher};
use crate::places::Places;

/// The operator knows it as the watcher with a watch on each directory.
const NAME: &str = "inotify";

/// Bytes a read: some 3,000 events.
const BUFFER: usize = 256 << 10;

/// Of a directory and its entries. `DELETE_SELF` is the last of a mark.
const MASK: u64 = CHANGES | bits::EVENT_ON_CHILD | bits::DELETE_SELF;
/// Of a file with several names.
const LINKED: u64 = CONTENT | bits::ATTRIB | bits::DELETE_SELF;
/// The part of a user's marks that such files may have: directories come first.
const LINKED_SHARE: usize = 4;

/// See the module.
pub(super) struct Marks {
    directories: Arc<Directories>,
    bell: Bell,
    buffer: Box<[u8]>,
    report: WatcherReport,
    rescan: Duration,
    /// The file system also changes without events.
    blind: bool,
}

impl Marks {
    /// `rescan` is how often the source is walked when that is needed: when
    /// there are directories without a mark, or when `blind`. `places` says where
    /// directories stand, where they cannot be opened by handle.
    pub(super) fn new(
        source: BorrowedFd<'_>,
        path: &Path,
        rescan: Duration,
        blind: bool,
        places: Arc<Places>,
        report: WatcherReport,
    ) -> Result<Self, WatchError> {
        let root = Root::new(NAME, source, path)?;
        let unsupported =
            |what: &str, error: Errno| root.unsupported(NAME, format!("{what}: {error}"));
        // Events name objects by handles: ours must be handles too.
        handle::of_fd(root.fd()).map_err(|error| unsupported("no handles", error))?;
        // The queue is as short for root as for others: who chooses this
        // watcher gets the same everywhere.
        let group = Group::new(Detail::Target, Queue::Limited)
            .map_err(|error| unsupported("no group", error))?;
        group.mark_directory(root.fd(), MASK).map_err(|error| unsupported("no mark", error))?;
        let marked = HashSet::from([root.id().clone()]);
        let linked_most = marks_allowed() / LINKED_SHARE;
        let state = Mutex::new(State { marked, linked_most, ..State::default() });
        Ok(Self {
            directories: Arc::new(Directories { group, root, places, state }),
            bell: Bell::new(NAME)?,
            buffer: vec![0; BUFFER].into(),
            report,
            rescan,
            blind,
        })
    }

    /// Reads once; the number of events, 0 when there was none.
    fn read_queue(&mut self, changes: &mut Vec<Change>) -> Result<u64, WatchError> {
        let length = match self.directories.group.read(&mut self.buffer) {
            Ok(length) => length,
            Err(Errno::AGAIN) => return Ok(0),
            Err(error) => return Err(failed(NAME, "read events")(error)),
        };
        let mut count = 0;
        for event in fanotify::parse(self.buffer.get(..length).unwrap_or_default()) {
            count += 1;
            match event {
                Ok(event) => {
                    if event.is(bits::DELETE_SELF) {
                        self.directories.gone(&event);
                    }
                    self.directories.follow(&event);
                    translate(event, changes);
                }
                Err(malformed) => changes.push(Change::Gap { reason: malformed.to_string() }),
            }
        }
        Ok(count)
    }

    fn complete(&self) -> bool {
        !self.blind && self.directories.state().unmarked.is_empty()
    }
}

impl Watcher for Marks {
    fn read(&mut self, timeout: Duration, changes: &mut Vec<Change>) -> Result<(), WatchError> {
        if self.read_queue(changes)? == 0 {
            let group = self.directories.group.as_fd();
            self.bell.wait(Some(group), timeout).map_err(failed(NAME, "wait"))?;
            self.read_queue(changes)?;
        }
        Ok(())
    }

    fn queued(&mut self) -> Result<u64, WatchError> {
        self.directories.group.queued().map_err(failed(NAME, "count events"))
    }

    fn take(&mut self, changes: &mut Vec<Change>) -> Result<u64, WatchError> {
        self.read_queue(changes)
    }

    fn proves(&self) -> bool {
        self.complete()
    }

    fn rescan_every(&self) -> Option<Duration> {
        (!self.complete()).then_some(self.rescan)
    }

    /// The root is held open, so its file system cannot be unmounted and the
    /// marks live for as long as their directories.
    fn alive(&mut self) -> Result<(), WatchError> {
        self.directories.root.check(NAME)
    }

    fn waker(&self) -> Waker {
        self.bell.waker()
    }

    fn directories(&self) -> Arc<dyn DirectoryWatch> {
        Arc::clone(&self.directories) as Arc<dyn DirectoryWatch>
    }

    fn report(&self) -> WatcherReport {
        let mut report = self.report.clone();
        report.kind = WatcherKind::Inotify;
        report.doubts.push(
            "a write is not seen when it goes through a hard link that is newer than the last \
             look at the file and lies outside the source, or in a directory that is so new that \
             it has no watch yet, or through a file that was opened by handle or, before it had \
             a name, outside the source (O_TMPFILE)"
                .to_owned(),
        );
        let state = self.directories.state();
        if let (missing @ 1.., Some(error)) = (state.unmarked.len(), state.last_error) {
            report.doubts.push(format!(
                "{missing} directories could not be watched ({}); they are walked every {} s",
                describe(error),
                self.rescan.as_secs_f64()
            ));
        }
        if let missing @ 1.. = state.crowded.len() {
            report.doubts.push(format!(
                "{missing} files with several names have no watch of their own: a write is not \
                 seen when it goes through a name outside the source"
            ));
        }
        report.watches = Some((state.marked.len() + state.linked.len()) as u64);
        report
    }
}

/// The marks, shared with the walk.
struct Directories {
    group: Group,
    root: Root,
    places: Arc<Places>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// Directories with a mark.
    marked: HashSet<ObjectId>,
    /// Those of them that nobody has listed yet.
    early: HashSet<ObjectId>,
    /// Those that were early already when the last walk began: by its end somebody
    /// has listed them, or nobody will.
    passed: Vec<ObjectId>,
    /// A directory got its mark by being listed since the last walk began.
    found_unmarked: bool,
    /// Files with several names that have a mark of their own.
    linked: HashSet<ObjectId>,
    /// Most of them.
    linked_most: usize,
    /// Such files without a mark: one more doubt, but not a reason to walk.
    crowded: HashSet<ObjectId>,
    /// Directories whose changes are not seen.
    unmarked: HashSet<ObjectId>,
    /// Why the last of them could not be marked.
    last_error: Option<Errno>,
    /// What left the source keeps marks that could not be taken away: without
    /// privilege nothing leads to it any more.
    strays: bool,
}

impl Directories {
    fn state(&self) -> MutexGuard<'_, State> {
        // Each critical section leaves the state whole, even if it panicked.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What had a mark was removed, and its mark with it.
    fn gone(&self, event: &Event) {
        let place = event.place.as_ref().map(|place| &place.directory);
        if let Some(id) = event.target.as_ref().or(place) {
            let mut state = self.state();
            state.marked.remove(id);
            state.early.remove(id);
            state.linked.remove(id);
        }
    }

    /// What is dead keeps its mark for as long as a program has something open
    /// in it: that may have a name elsewhere.
    fn unmark(&self, id: &ObjectId, mask: u64) -> Result<(), Errno> {
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let object = match handle::open(self.root.fd(), id, flags) {
            Ok(object) => object,
            Err(Errno::STALE) => return Ok(()),
            Err(error) => return Err(error),
        };
        if stat::of_fd(&object)?.nlink == 0 {
            return Ok(());
        }
        match self.group.unmark_object(object.as_fd(), mask) {
            Err(Errno::NOENT) => Ok(()),
            result => result,
        }
    }

    /// `NOENT` when the name leads elsewhere by now.
    fn mark_linked(
        &self,
        directory: BorrowedFd<'_>,
        name: &Name,
        id: &ObjectId,
    ) -> Result<(), Errno> {
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let object = rustix::fs::openat(directory, name.as_bytes(), flags, Mode::empty())?;
        if handle::of_fd(object.as_fd())? != *id {
            return Err(Errno::NOENT);
        }
        self.group.mark_object(object.as_fd(), LINKED)
    }
}

impl DirectoryWatch for Directories {
    fn before_listing(&self, directory: BorrowedFd<'_>, id: &ObjectId) {
        let mut state = self.state();
        match self.group.mark_directory(directory, MASK) {
            Ok(()) => {
                state.found_unmarked |= state.marked.insert(id.clone());
                state.early.remove(id);
                state.unmarked.remove(id);
            }
            Err(error) => {
                state.unmarked.insert(id.clone());
                state.last_error = Some(error);
            }
        }
    }

    /// The walk comes to every directory, so what cannot be marked is counted
    /// anew. It also compares every object after marking the directory that holds
    /// it, so that all marks may be taken away now where that is the only way to
    /// get rid of strays: what goes unseen until then, the walk finds, or the
    /// second one that follows it for that reason. That one takes nothing away.
    fn begin_walk(&self, again: bool) {
        let mut state = self.state();
        state.unmarked.clear();
        state.crowded.clear();
        state.last_error = None;
        state.found_unmarked = false;
        // What was marked early, and not listed by a whole walk since, has left unnoticed.
        // (If it has not, the walk to come lists it, and marks it again.)
        let passed = std::mem::take(&mut state.passed);
        for id in passed {
            if state.early.remove(&id) {
                state.marked.remove(&id);
                state.strays |= self.unmark(&id, MASK).is_err();
            }
        }
        // Strays that come about during the first of two walks stay until the next gap.
        state.passed = state.early.iter().cloned().collect();
        if state.strays && !again && self.group.unmark_all(self.root.fd()).is_ok() {
            state.marked.clear();
            state.early.clear();
            state.passed.clear();
            state.linked.clear();
            state.strays = false;
        }
    }

    fn found_unwatched(&self) -> bool {
        self.state().found_unmarked
    }

    fn linked(&self, directory: BorrowedFd<'_>, name: &Name, id: &ObjectId) {
        let mut state = self.state();
        if state.linked.contains(id) {
            return;
        }
        let room = state.linked.len() < state.linked_most;
        match room.then(|| self.mark_linked(directory, name, id)) {
            Some(Ok(())) => {
                state.linked.insert(id.clone());
                state.crowded.remove(id);
            }
            // It is looked at again, for its name changed.
            Some(Err(Errno::NOENT | Errno::NOTDIR)) => {}
            Some(Err(_)) | None => drop(state.crowded.insert(id.clone())),
        }
    }

    fn forget(&self, id: &ObjectId) {
        let mut state = self.state();
        state.unmarked.remove(id);
        state.crowded.remove(id);
        state.early.remove(id);
        let directory = state.marked.remove(id) && self.unmark(id, MASK).is_err();
        let linked = state.linked.remove(id) && self.unmark(id, LINKED).is_err();
        state.strays |= directory || linked;
    }
}

/// How many marks the user may have, over all processes; the kernel's least
/// where it does not say.
fn marks_allowed() -> usize {
    let text = std::fs::read_to_string("/proc/sys/fs/fanotify/max_user_marks");
    text.ok().and_then(|text| text.trim().parse().ok()).unwrap_or(8192)
}

fn describe(error: Errno) -> String {
    match error {
        Errno::NOSPC => "fs.fanotify.max_user_marks is reached".to_owned(),
        _ => error.to_string(),
    }
}
