//! The unprivileged watcher: an inotify watch on each directory.
//!
//! Watches are added by the walk, before it lists a directory. Events carry a
//! directory and a name, never an object: what the name refers to is looked up
//! later, when it may refer to something else. So this is what is left where
//! the kernel gives no fanotify marks on directories (see [`super::marks`]).

use std::collections::{HashMap, HashSet, VecDeque};
use std::ffi::OsStr;
use std::io::ErrorKind;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use ::inotify::{EventMask, Events, Inotify as Queue, WatchDescriptor, WatchMask, Watches};
use replicator_common::id::ObjectId;
use replicator_common::name::Name;
use replicator_common::status::{WatcherKind, WatcherReport};
use replicator_common::sys::proc_path;
use rustix::io::Errno;

use super::root::Root;
use super::waker::{Bell, failed};
use super::{Change, DirectoryWatch, Waker, WatchError, Watcher, What};

const NAME: &str = "inotify";

/// Bytes a read: 1,000 events with names of 255 bytes, more with shorter ones.
const BUFFER: usize = 256 << 10;
/// `sizeof(struct inotify_event)`; names are padded with NULs to a multiple.
const EVENT_LEN: usize = 16;
/// Renames of which the second half may still be to come: it follows the first
/// within one system call.
const LEFT: usize = 256;

/// See the module.
pub(super) struct Inotify {
    queue: Queue,
    root: Root,
    directories: Arc<Directories>,
    bell: Bell,
    buffer: Box<[u8]>,
    report: WatcherReport,
    rescan: Duration,
    /// The file system also changes without events.
    blind: bool,
}

impl Inotify {
    /// `rescan` is how often the source is walked when that is needed: when
    /// there are directories without a watch, or when `blind`.
    pub(super) fn new(
        source: BorrowedFd<'_>,
        path: &Path,
        rescan: Duration,
        blind: bool,
        report: WatcherReport,
    ) -> Result<Self, WatchError> {
        let root = Root::new(NAME, source, path)?;
        let queue =
            Queue::init().map_err(|error| root.unsupported(NAME, format!("no queue: {error}")))?;
        let directories = Directories {
            state: Mutex::new(State {
                watches: queue.watches(),
                watched: HashMap::new(),
                descriptors: HashMap::new(),
                left: VecDeque::new(),
                unwatched: HashSet::new(),
                last_error: None,
                found_unwatched: false,
            }),
        };
        let this = Self {
            queue,
            directories: Arc::new(directories),
            bell: Bell::new(NAME)?,
            buffer: vec![0; BUFFER].into(),
            report,
            rescan,
            blind,
            root,
        };
        // The first watch tells at once whether watches can be had at all.
        this.directories.before_listing(this.root.fd(), this.root.id());
        let error = this.directories.state().last_error.take();
        match error {
            Some(error) => Err(this.root.unsupported(NAME, format!("no watch: {error}"))),
            None => Ok(this),
        }
    }

    /// Reads once; the number of bytes, 0 when there were none.
    fn read_queue(&mut self, changes: &mut Vec<Change>) -> Result<usize, WatchError> {
        loop {
            match self.queue.read_events(&mut self.buffer) {
                Ok(events) => return Ok(self.directories.state().take(events, changes)),
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(0),
                // To give up here would break the promise of `take`.
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(source) => {
                    return Err(WatchError::Io { watcher: NAME, action: "read events", source });
                }
            }
        }
    }

    fn complete(&self) -> bool {
        !self.blind && self.directories.state().unwatched.is_empty()
    }
}

impl Watcher for Inotify {
    fn read(&mut self, timeout: Duration, changes: &mut Vec<Change>) -> Result<(), WatchError> {
        if self.read_queue(changes)? == 0 {
            self.bell.wait(Some(self.queue.as_fd()), timeout).map_err(failed(NAME, "wait"))?;
            self.read_queue(changes)?;
        }
        Ok(())
    }

    fn queued(&mut self) -> Result<u64, WatchError> {
        // inotify's FIONREAD counts what a read would give, to the byte.
        rustix::io::ioctl_fionread(&self.queue).map_err(failed(NAME, "count events"))
    }

    fn take(&mut self, changes: &mut Vec<Change>) -> Result<u64, WatchError> {
        self.read_queue(changes).map(|length| length as u64)
    }

    fn proves(&self) -> bool {
        self.complete()
    }

    fn rescan_every(&self) -> Option<Duration> {
        (!self.complete()).then_some(self.rescan)
    }

    fn alive(&mut self) -> Result<(), WatchError> {
        self.root.check(NAME)
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
            "a write is not seen when it goes through a name outside the source, through a file \
             that was opened under a name which is unlinked since (another hard link, O_TMPFILE), \
             or through a hard link that is gone again before it could be looked at"
                .to_owned(),
        );
        let state = self.directories.state();
        if let (missing @ 1.., Some(error)) = (state.unwatched.len(), &state.last_error) {
            report.doubts.push(format!(
                "{missing} directories could not be watched ({error}); they are walked every {} s",
                self.rescan.as_secs_f64()
            ));
        }
        report.watches = Some(state.watched.len() as u64);
        report
    }
}

/// The watches, shared with the walk.
struct Directories {
    state: Mutex<State>,
}

struct State {
    watches: Watches,
    /// By watch descriptor. Held up to date under one lock with the adding of
    /// watches, so that no event is read whose directory is not known.
    watched: HashMap<i32, ObjectId>,
    /// The same by directory, for taking watches away.
    descriptors: HashMap<ObjectId, WatchDescriptor>,
    /// Cookies of the last renames out of a watched directory. A rename into
    /// one without the first half comes from outside.
    left: VecDeque<u32>,
    /// Directories whose changes are not seen.
    unwatched: HashSet<ObjectId>,
    /// Why the last of them could not be watched.
    last_error: Option<String>,
    /// A directory got its watch by being listed since the last walk began.
    found_unwatched: bool,
}

impl State {
    /// Passes events on; gives the number of bytes that they took.
    fn take(&mut self, events: Events<'_>, changes: &mut Vec<Change>) -> usize {
        let mut length = 0;
        for event in events {
            length += EVENT_LEN
                + event.name.map_or(0, |name| (name.len() + 1).next_multiple_of(EVENT_LEN));
            let descriptor = event.wd.get_watch_descriptor_id();
            if event.mask.contains(EventMask::MOVED_FROM) {
                self.left.push_back(event.cookie);
                if self.left.len() > LEFT {
                    self.left.pop_front();
                }
            }
            let arrived =
                event.mask.contains(EventMask::MOVED_TO) && !self.left.contains(&event.cookie);
            translate(event.mask, self.watched.get(&descriptor), event.name, arrived, changes);
            // The last event of a watch; its directory is gone.
            if event.mask.contains(EventMask::IGNORED)
                && let Some(id) = self.watched.remove(&descriptor)
            {
                self.descriptors.remove(&id);
            }
        }
        length
    }
}

impl Directories {
    fn state(&self) -> MutexGuard<'_, State> {
        // Each critical section leaves the state whole, even if it panicked.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl DirectoryWatch for Directories {
    fn before_listing(&self, directory: BorrowedFd<'_>, id: &ObjectId) {
        // Not EXCL_UNLINK: a file may live on under another name.
        let mask = WatchMask::CREATE
            | WatchMask::DELETE
            | WatchMask::MOVE
            | WatchMask::MODIFY
            | WatchMask::CLOSE_WRITE
            | WatchMask::ATTRIB
            | WatchMask::DELETE_SELF
            | WatchMask::ONLYDIR;
        let mut state = self.state();
        match state.watches.add(proc_path(directory), mask) {
            Ok(descriptor) => {
                state.watched.insert(descriptor.get_watch_descriptor_id(), id.clone());
                let before = state.descriptors.insert(id.clone(), descriptor);
                state.found_unwatched |= before.is_none();
                state.unwatched.remove(id);
            }
            Err(error) => {
                state.unwatched.insert(id.clone());
                state.last_error = Some(describe(&error));
            }
        }
    }

    /// It comes to every directory, so what cannot be watched is counted anew.
    fn begin_walk(&self, _again: bool) {
        let mut state = self.state();
        state.unwatched.clear();
        state.last_error = None;
        state.found_unwatched = false;
    }

    fn found_unwatched(&self) -> bool {
        self.state().found_unwatched
    }

    fn forget(&self, id: &ObjectId) {
        let mut state = self.state();
        state.unwatched.remove(id);
        if let Some(descriptor) = state.descriptors.remove(id) {
            state.watched.remove(&descriptor.get_watch_descriptor_id());
            // An error means that the directory died, and its watch with it.
            let _ = state.watches.remove(descriptor);
        }
    }
}

fn describe(error: &std::io::Error) -> String {
    match Errno::from_io_error(error) {
        Some(Errno::NOSPC) => "fs.inotify.max_user_watches is reached".to_owned(),
        _ => error.to_string(),
    }
}

/// What may have changed, by one event. `directory` is `None` for a watch that
/// is not known: the queue as a whole, or one that has ended. `arrived` says
/// that a rename led here from outside, so that all may differ (trap 3).
fn translate(
    mask: EventMask,
    directory: Option<&ObjectId>,
    name: Option<&OsStr>,
    arrived: bool,
    changes: &mut Vec<Change>,
) {
    let gap = |reason: &str| Change::Gap { reason: reason.to_owned() };
    if mask.contains(EventMask::Q_OVERFLOW) {
        changes.push(gap("event queue overflow"));
    } else if mask.contains(EventMask::UNMOUNT) {
        changes.push(gap("watch lost: the file system was unmounted"));
    }
    let Some(directory) = directory else {
        return;
    };
    let what = What {
        content: arrived
            || mask.intersects(EventMask::CREATE | EventMask::MODIFY | EventMask::CLOSE_WRITE),
        attributes: true,
    };
    let entries =
        EventMask::CREATE | EventMask::DELETE | EventMask::MOVED_FROM | EventMask::MOVED_TO;
    // What concerns a watched directory itself. utimensat(2) that sets the time
    // of modification alone counts as MODIFY, also of a directory.
    let own = EventMask::ATTRIB | EventMask::MODIFY | EventMask::DELETE_SELF;
    // After these the name refers to nothing, or to something else.
    let gone = EventMask::DELETE | EventMask::MOVED_FROM;
    match name.map(Name::try_from) {
        Some(Ok(name)) => {
            let directory = directory.clone();
            if mask.intersects(entries) {
                changes.push(Change::Entry { directory: directory.clone(), name: name.clone() });
            }
            if !mask.intersects(gone) {
                changes.push(Change::Named { directory, name, what });
            }
        }
        Some(Err(error)) => changes.push(gap(&error.to_string())),
        None if mask.intersects(own) => {
            changes.push(Change::Object { object: directory.clone(), via: None, what });
        }
        None => {}
    }
}
