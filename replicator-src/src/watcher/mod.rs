//! Change capture: three watchers behind one interface.
//!
//! [`open`] picks one. A watcher never decides what a change means or whether
//! it concerns the source: it passes on what the kernel says, and says what it
//! cannot see.

mod choose;
mod fanotify;
mod inotify;
mod marks;
mod root;
mod scan;
#[cfg(test)]
mod tests;
mod waker;

pub use choose::{Settings, open, resume};
pub use waker::Waker;

use std::os::fd::{BorrowedFd, OwnedFd};
use std::time::Duration;

use replicator_common::id::ObjectId;
use replicator_common::name::Name;
use replicator_common::status::WatcherReport;
use serde::{Deserialize, Serialize};

/// Which parts of an object may have changed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct What {
    /// Its content.
    pub content: bool,
    /// Its attributes (owner, mode, times, xattrs, number of links).
    pub attributes: bool,
}

/// Something may have changed: look again. Never more than a hint of what.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// The entry may now refer to another object, or to none.
    Entry {
        /// The directory.
        directory: ObjectId,
        /// The name.
        name: Name,
    },
    /// The object itself, known by its handle.
    Object {
        /// The object.
        object: ObjectId,
        /// The directory through which it was reached, where the kernel says.
        /// Serves to drop what lies outside the source cheaply; it may be
        /// wrong about where the object stands now.
        via: Option<ObjectId>,
        /// What may have changed.
        what: What,
    },
    /// Whatever stood under the name at that moment.
    Named {
        /// The directory.
        directory: ObjectId,
        /// The name.
        name: Name,
        /// What may have changed.
        what: What,
    },
    /// A rename gave an object a name in a directory. When it comes from
    /// outside the source, what was done to it there was not told, or dropped
    /// (trap 3).
    Arrived {
        /// The object.
        object: ObjectId,
        /// The directory that it was in; `None` for one that is not watched.
        from: Option<ObjectId>,
        /// The directory that it is in.
        to: ObjectId,
    },
    /// Changes may have been lost; all that happened since the last complete
    /// drain is in doubt.
    Gap {
        /// Why, in words: `event queue overflow`, `watch lost` …
        reason: String,
    },
}

/// Why a watcher cannot be made or cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum WatchError {
    /// This watcher does not work here; `auto` tries the next.
    #[error("{watcher} cannot watch {path}: {reason}")]
    Unsupported {
        /// Which watcher.
        watcher: &'static str,
        /// The source.
        path: String,
        /// Why, in words.
        reason: String,
    },
    /// The watcher sees the source no longer, or the source is not where it
    /// was. What changed since the last drain is in doubt.
    #[error("{watcher} lost sight of {path}: {reason}")]
    Lost {
        /// Which watcher.
        watcher: &'static str,
        /// The source.
        path: String,
        /// Why, in words.
        reason: String,
    },
    /// The watcher broke.
    #[error("{watcher} failed: {action}: {source}")]
    Io {
        /// Which watcher.
        watcher: &'static str,
        /// What was tried.
        action: &'static str,
        /// What the system said.
        source: std::io::Error,
    },
}

/// Reads changes of one source tree from the kernel. Owned by the capture
/// thread.
pub trait Watcher: Send {
    /// Waits up to `timeout` for changes and appends what is there (bounded to
    /// some thousands a call). Returns with nothing appended when time is up,
    /// when a signal came, or when [`Self::waker`] was used.
    fn read(&mut self, timeout: Duration, changes: &mut Vec<Change>) -> Result<(), WatchError>;

    /// How much is queued now (FIONREAD), in a unit of the watcher's own. For a
    /// barrier: once [`Self::take`] has given that much, everything whose system
    /// call returned before this call was read, and a source under constant load
    /// cannot hold that up.
    fn queued(&mut self) -> Result<u64, WatchError>;

    /// Appends what is there without waiting, bounded as [`Self::read`] is, and
    /// says how much of what was [`Self::queued`] that is; 0 when there was
    /// nothing.
    fn take(&mut self, changes: &mut Vec<Change>) -> Result<u64, WatchError>;

    /// Whether a drain proves that all changes before it were seen. The `scan`
    /// watcher says no: only a complete walk proves anything.
    fn proves(&self) -> bool;

    /// How often the whole tree must be walked because events alone do not
    /// suffice; `None` for never.
    fn rescan_every(&self) -> Option<Duration>;

    /// Proves that the watcher is alive: an unmount takes a mark away without a
    /// word, and the queue merely stays empty. Also that the source's path still
    /// leads to the source. Writes nothing to it, and is cheap enough for every
    /// heartbeat.
    ///
    /// # Errors
    /// [`WatchError::Lost`]: this watcher is of no more use; what it has not
    /// delivered is a gap.
    fn alive(&mut self) -> Result<(), WatchError>;

    /// Interrupts a [`Self::read`] from another thread.
    fn waker(&self) -> Waker;

    /// What the walk must call for each directory before it reads it.
    fn directories(&self) -> std::sync::Arc<dyn DirectoryWatch>;

    /// For status.
    fn report(&self) -> WatcherReport;

    /// Gives the queue up, for a process after this one to go on with: what it
    /// holds then was read by nobody. `None` where that cannot be.
    fn hand_over(self: Box<Self>) -> Option<Queue> {
        None
    }
}

/// A watcher's queue between two processes: it fills while nobody reads it.
#[derive(Debug)]
pub struct Queue {
    /// The kernel's.
    pub descriptor: OwnedFd,
    /// What the kernel says of it, see
    /// [`Group::description`](replicator_common::sys::fanotify::Group::description).
    pub description: Vec<String>,
}

/// The part of a watcher that the walk needs, shared between threads.
pub trait DirectoryWatch: Send + Sync {
    /// Called with each directory before it is listed, so that nothing slips
    /// between listing and watching. fanotify does nothing here; inotify adds
    /// a watch. An error makes the directory's changes invisible; the watcher
    /// counts it and says so in its report.
    fn before_listing(&self, directory: BorrowedFd<'_>, id: &ObjectId);

    /// A complete walk begins, which comes to every directory and compares every
    /// object; `again` when it is the second that [`DirectoryWatch::found_unwatched`]
    /// asked for, which proves something only if no watch is taken away. Called when no
    /// batch is looking at anything: a directory that a batch has listed is not listed
    /// by it again. Watchers need not care.
    fn begin_walk(&self, _again: bool) {}

    /// Whether the walk has come to directories that had no watch when it did.
    /// Then what was changed through a hard link in one of them, and lost that
    /// link before the walk came, went unseen, if the walk had compared the object
    /// before: only a second walk finds it. Watchers need not care.
    fn found_unwatched(&self) -> bool {
        false
    }

    /// Called with each directory or object that is no longer part of the
    /// source: it needs no watch any more. Should it come back, it is listed or
    /// looked at anew. Watchers need not care.
    fn forget(&self, _id: &ObjectId) {}

    /// Called with each directory that was found, before it is read: events of
    /// the directory itself count from now on. Watchers need not care.
    fn found(&self, _id: &ObjectId) {}

    /// Called with each object that has several names, before it is read: some
    /// of them may lie outside the source. `name` in `directory` is the one by
    /// which it was found. Watchers need not care.
    fn linked(&self, _directory: BorrowedFd<'_>, _name: &Name, _id: &ObjectId) {}
}
