//! Large files are brought to disk while they arrive. Else all of it would be left
//! to the sync of the batch that places the file, and the disk be idle until then;
//! and each small batch's sync meanwhile would have to wait for what is there of it.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use crossbeam_channel::{Sender, bounded};

/// Bytes of a file that arrive before it is synced again: 0.1 s of a fast disk. (16 MiB
/// were as fast, 64 slower: `bench/NOTES.md`.)
pub(super) const EARLY: u64 = 32 << 20;

/// A thread that syncs what one stager writes.
pub(super) struct Early {
    thread: Option<(Sender<OwnedFd>, JoinHandle<()>)>,
    /// See [`crate::replica::Replica::sync_failed`].
    failed: Arc<AtomicBool>,
}

impl Early {
    /// Whose failures are told there.
    pub(super) fn new(failed: Arc<AtomicBool>) -> Self {
        Self { thread: None, failed }
    }

    /// Begins to bring a file to disk; `false` when the thread is still at the one
    /// before.
    pub(super) fn sync(&mut self, file: &OwnedFd) -> bool {
        if self.thread.is_none() {
            let (files, queue) = bounded::<OwnedFd>(0);
            let thread = std::thread::Builder::new().name("sync-early".to_owned());
            let failed = self.failed.clone();
            let thread = thread.spawn(move || {
                for file in queue {
                    // INVARIANT (trap 16): what a disk says of its own cache is told
                    // here, and not again to `syncfs`.
                    if rustix::fs::fdatasync(&file).is_err() {
                        failed.store(true, Ordering::Release);
                    }
                }
            });
            self.thread = thread.ok().map(|thread| (files, thread));
        }
        let Some((files, _)) = &self.thread else { return false };
        file.try_clone().is_ok_and(|file| files.try_send(file).is_ok())
    }
}

impl Drop for Early {
    /// Waits: whoever waits for the stager to end wants nobody at its files.
    fn drop(&mut self) {
        if let Some((files, thread)) = self.thread.take() {
            drop(files);
            let _ = thread.join();
        }
    }
}
