//! The default watcher: one fanotify mark on the whole file system, with the
//! handles of directory and object in every event.
//!
//! The mark sees all changes of the file system, through any mount, name or
//! namespace, also those outside the source: who reads drops them by handle.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use replicator_common::id::ObjectId;
use replicator_common::status::{WatcherKind, WatcherReport};
use replicator_common::sys::fanotify::{self, Detail, Event, Group, Place, Queue, bits};
use replicator_common::sys::mount;
use rustix::io::Errno;

use super::root::Root;
use super::scan::NothingToDo;
use super::waker::{Bell, failed};
use super::{Change, DirectoryWatch, Waker, WatchError, Watcher, What};

const NAME: &str = "fanotify";

/// Bytes a read: some 3,000 events.
const BUFFER: usize = 256 << 10;

/// Changes of entries, as the kernel before 5.17 reports them too.
const ENTRIES: u64 = bits::CREATE | bits::DELETE;
/// A rename in two halves, where it cannot be had as one event.
const MOVES: u64 = bits::MOVED_FROM | bits::MOVED_TO;
pub(super) const CONTENT: u64 = bits::MODIFY | bits::CLOSE_WRITE;
/// What must be told, in full detail.
pub(super) const CHANGES: u64 = ENTRIES | CONTENT | bits::RENAME | bits::ATTRIB | bits::ONDIR;

/// See the module.
#[derive(Debug)]
pub(super) struct Fanotify {
    group: Group,
    root: Root,
    /// The top level of a btrfs, where the mark is when the source is in a
    /// subvolume: pinned, as the mark dies with the last mount.
    _top: Option<OwnedFd>,
    bell: Bell,
    buffer: Box<[u8]>,
    report: WatcherReport,
    rescan: Option<Duration>,
}

impl Fanotify {
    /// `rescan` says that the file system also changes without events, and how
    /// often it is to be walked therefore; the report's doubts say it in words.
    pub(super) fn new(
        source: BorrowedFd<'_>,
        path: &Path,
        rescan: Option<Duration>,
        report: WatcherReport,
    ) -> Result<Self, WatchError> {
        let root = Root::new(NAME, source, path)?;
        let (group, detail) =
            open_group().map_err(|e| root.unsupported(NAME, format!("no group: {e}")))?;
        Self::with_group(group, detail, root, rescan, report)
    }

    pub(super) fn with_group(
        group: Group,
        detail: Detail,
        root: Root,
        rescan: Option<Duration>,
        report: WatcherReport,
    ) -> Result<Self, WatchError> {
        let top = mark(&group, detail, &root)?;
        let bell = Bell::new(NAME)?;
        let buffer = vec![0; BUFFER].into();
        Ok(Self { group, root, _top: top, bell, buffer, report, rescan })
    }

    /// Goes on with a queue that a process before this one filled.
    ///
    /// INVARIANT: it is what this program would have opened and marked itself,
    /// at the time of the description as now: a mark that is gone, is of another
    /// file system or leaves something out has missed changes.
    pub(super) fn resume(
        source: BorrowedFd<'_>,
        path: &Path,
        queue: super::Queue,
        report: WatcherReport,
    ) -> Result<Self, WatchError> {
        let root = Root::new(NAME, source, path)?;
        let unfit = |reason: &str| root.unsupported(NAME, reason.to_owned());
        let group = Group::from_fd(queue.descriptor)
            .map_err(|_| unfit("what was kept is no fanotify queue"))?;
        let describe = |group: &Group| group.description().map_err(failed(NAME, "describe"));
        let (fresh, detail) =
            open_group().map_err(|e| root.unsupported(NAME, format!("no group: {e}")))?;
        let found = describe(&group)?;
        if found != queue.description || found.len() != 2 {
            return Err(unfit("its mark is not what it was: the file system was unmounted"));
        }
        if found.first() != describe(&fresh)?.first() {
            return Err(unfit("it was not opened as this program would"));
        }
        // Adds to the mark what it lacks, or makes one of another file system.
        let top = mark(&group, detail, &root)?;
        if describe(&group)? != found {
            return Err(unfit("its mark is of another file system, or of fewer events"));
        }
        let bell = Bell::new(NAME)?;
        let buffer = vec![0; BUFFER].into();
        Ok(Self { group, root, _top: top, bell, buffer, report, rescan: None })
    }

    /// Reads once; the number of events, 0 when there was none.
    fn read_queue(&mut self, changes: &mut Vec<Change>) -> Result<u64, WatchError> {
        let length = match self.group.read(&mut self.buffer) {
            Ok(length) => length,
            Err(Errno::AGAIN) => return Ok(0),
            Err(error) => return Err(failed(NAME, "read events")(error)),
        };
        let mut count = 0;
        for event in fanotify::parse(self.buffer.get(..length).unwrap_or_default()) {
            count += 1;
            match event {
                Ok(event) => translate(event, changes),
                Err(malformed) => changes.push(Change::Gap { reason: malformed.to_string() }),
            }
        }
        Ok(count)
    }
}

impl Watcher for Fanotify {
    fn read(&mut self, timeout: Duration, changes: &mut Vec<Change>) -> Result<(), WatchError> {
        if self.read_queue(changes)? == 0 {
            self.bell.wait(Some(self.group.as_fd()), timeout).map_err(failed(NAME, "wait"))?;
            self.read_queue(changes)?;
        }
        Ok(())
    }

    fn queued(&mut self) -> Result<u64, WatchError> {
        self.group.queued().map_err(failed(NAME, "count events"))
    }

    fn take(&mut self, changes: &mut Vec<Change>) -> Result<u64, WatchError> {
        self.read_queue(changes)
    }

    fn proves(&self) -> bool {
        self.rescan.is_none()
    }

    fn rescan_every(&self) -> Option<Duration> {
        self.rescan
    }

    fn alive(&mut self) -> Result<(), WatchError> {
        if self.group.marks().map_err(failed(NAME, "count marks"))? == 0 {
            let reason = "the mark is gone, the file system was unmounted".to_owned();
            return Err(self.root.lost(NAME, reason));
        }
        self.root.check(NAME)
    }

    fn waker(&self) -> Waker {
        self.bell.waker()
    }

    fn directories(&self) -> Arc<dyn DirectoryWatch> {
        Arc::new(NothingToDo)
    }

    fn report(&self) -> WatcherReport {
        WatcherReport { kind: WatcherKind::Fanotify, ..self.report.clone() }
    }

    fn hand_over(self: Box<Self>) -> Option<super::Queue> {
        let description = self.group.description().ok()?;
        Some(super::Queue { descriptor: self.group.into_fd(), description })
    }
}

/// A group with as much detail as the kernel gives.
fn open_group() -> Result<(Group, Detail), Errno> {
    match Group::new(Detail::Target, Queue::Unlimited) {
        // Before Linux 5.17.
        Err(Errno::INVAL) => Ok((Group::new(Detail::Name, Queue::Unlimited)?, Detail::Name)),
        result => Ok((result?, Detail::Target)),
    }
}

/// Marks the source's file system. Gives what else must be held open for it.
fn mark(group: &Group, detail: Detail, root: &Root) -> Result<Option<OwnedFd>, WatchError> {
    let unsupported =
        |action: &str, error: Errno| root.unsupported(NAME, format!("{action}: {error}"));
    let renames = match detail {
        Detail::Target => bits::RENAME,
        Detail::Name => MOVES,
    };
    let mask = ENTRIES | CONTENT | renames | bits::ATTRIB | bits::ONDIR;
    let add = |directory: BorrowedFd<'_>| {
        match group.mark_file_system(directory, mask | bits::FS_ERROR) {
            // Not every kernel and file system reports its errors.
            Err(Errno::INVAL | Errno::OPNOTSUPP) => group.mark_file_system(directory, mask),
            result => result,
        }
    };
    match add(root.fd()) {
        Ok(()) => Ok(None),
        Err(Errno::XDEV) => {
            let top =
                btrfs_top(root).map_err(|e| unsupported("no mount of btrfs' top level", e))?;
            add(top.as_fd()).map_err(|e| unsupported("no mark on btrfs' top level", e))?;
            Ok(Some(top))
        }
        Err(error) => Err(unsupported("no mark on the file system", error)),
    }
}

/// A mark in a subvolume is refused; one on the top level sees all of them.
fn btrfs_top(root: &Root) -> Result<OwnedFd, Errno> {
    let mount = mount::of_fd(root.fd())?;
    mount::btrfs_top(&mount.source, mount.file_system_read_only)
}

/// What may have changed, by one event. Names are hints, handles are the truth.
pub(super) fn translate(event: Event, changes: &mut Vec<Change>) {
    if event.is_overflow() {
        changes.push(Change::Gap { reason: "event queue overflow".to_owned() });
        return;
    }
    if event.is(bits::FS_ERROR) {
        let error = Errno::from_raw_os_error(event.error.unwrap_or(Errno::IO.raw_os_error()));
        changes.push(Change::Gap { reason: format!("the file system reports an error: {error}") });
        return;
    }
    let before = changes.len();
    let what = What {
        // Halves of a rename do not tell where it comes from (trap 3).
        content: event.is(CONTENT | bits::CREATE | bits::MOVED_TO),
        // The size and the times change with the content, the number of links
        // with the entries.
        attributes: true,
    };
    if event.is(ENTRIES | MOVES) {
        push_entry(event.place.as_ref(), changes);
    }
    push_entry(event.old.as_ref(), changes);
    push_entry(event.new.as_ref(), changes);
    if let (Some(object), Some(new)) = (&event.target, &event.new) {
        let from = event.old.as_ref().map(|old| old.directory.clone());
        let (object, to) = (object.clone(), new.directory.clone());
        changes.push(Change::Arrived { object, from, to });
    }
    push_object(event.target, event.place.or(event.new), what, changes);
    if changes.len() == before {
        // The kernel never does this; if it did, a change would be lost.
        let reason = format!("an event that names nothing (mask {:#x})", event.mask);
        changes.push(Change::Gap { reason });
    }
}

fn push_entry(place: Option<&Place>, changes: &mut Vec<Change>) {
    if let Some(Place { directory, name: Some(name) }) = place {
        changes.push(Change::Entry { directory: directory.clone(), name: name.clone() });
    }
}

fn push_object(
    target: Option<ObjectId>,
    place: Option<Place>,
    what: What,
    changes: &mut Vec<Change>,
) {
    changes.push(match (target, place) {
        (Some(object), place) => {
            let via = place.map(|place| place.directory).filter(|directory| *directory != object);
            Change::Object { object, via, what }
        }
        (None, Some(Place { directory, name: Some(name) })) => {
            Change::Named { directory, name, what }
        }
        // What happened to a directory itself.
        (None, Some(Place { directory, name: None })) => {
            Change::Object { object: directory, via: None, what }
        }
        (None, None) => return,
    });
}
