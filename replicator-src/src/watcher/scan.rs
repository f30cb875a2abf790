//! The watcher that sees nothing: the periodic walk finds what changed. For
//! file systems that change without events.

use std::os::fd::BorrowedFd;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use replicator_common::id::ObjectId;
use replicator_common::status::{WatcherKind, WatcherReport};

use super::root::Root;
use super::waker::{Bell, failed};
use super::{Change, DirectoryWatch, Waker, WatchError, Watcher};

const NAME: &str = "scan";

/// See the module.
pub(super) struct Scan {
    root: Root,
    bell: Bell,
    interval: Duration,
    reason: String,
}

impl Scan {
    pub(super) fn new(
        source: BorrowedFd<'_>,
        path: &Path,
        interval: Duration,
        reason: String,
    ) -> Result<Self, WatchError> {
        let root = Root::new(NAME, source, path)?;
        Ok(Self { root, bell: Bell::new(NAME)?, interval, reason })
    }
}

impl Watcher for Scan {
    fn read(&mut self, timeout: Duration, _changes: &mut Vec<Change>) -> Result<(), WatchError> {
        self.bell.wait(None, timeout).map_err(failed(NAME, "wait"))
    }

    fn queued(&mut self) -> Result<u64, WatchError> {
        Ok(0)
    }

    fn take(&mut self, _changes: &mut Vec<Change>) -> Result<u64, WatchError> {
        Ok(0)
    }

    fn proves(&self) -> bool {
        false
    }

    fn rescan_every(&self) -> Option<Duration> {
        Some(self.interval)
    }

    fn alive(&mut self) -> Result<(), WatchError> {
        self.root.check(NAME)
    }

    fn waker(&self) -> Waker {
        self.bell.waker()
    }

    fn directories(&self) -> Arc<dyn DirectoryWatch> {
        Arc::new(NothingToDo)
    }

    fn report(&self) -> WatcherReport {
        WatcherReport {
            kind: WatcherKind::Scan,
            reason: self.reason.clone(),
            doubts: vec![format!(
                "changes are found by a walk every {} s; one that leaves size and time of last \
                 change as they were is missed",
                self.interval.as_secs_f64()
            )],
            watches: None,
        }
    }
}

/// For watchers that need nothing a directory.
pub(super) struct NothingToDo;

impl DirectoryWatch for NothingToDo {
    fn before_listing(&self, _directory: BorrowedFd<'_>, _id: &ObjectId) {}
}
