//! Large files are brought to disk while they arrive. Else all of it would be left
//! to the sync of the batch that places the file, and the disk be idle until then;
//! and each small batch's sync meanwhile would have to wait for what is there of it.

use std::os::fd::OwnedFd;
use std::thread::JoinHandle;

use crossbeam_channel::{Sender, bounded};

/// Bytes of a file that arrive before it is synced again.
pub(super) const EARLY: u64 = 64 << 20;

/// A thread that syncs what one stager writes.
#[derive(Default)]
pub(super) struct Early {
    thread: Option<(Sender<OwnedFd>, JoinHandle<()>)>,
}

impl Early {
    /// Begins to bring a file to disk; `false` when the thread is still at the one
    /// before.
    pub(super) fn sync(&mut self, file: &OwnedFd) -> bool {
        if self.thread.is_none() {
            let (files, queue) = bounded::<OwnedFd>(0);
            let thread = std::thread::Builder::new().name("sync-early".to_owned());
            let thread = thread.spawn(move || {
                for file in queue {
                    // INVARIANT (trap 16): an error of this says nothing. Errors count
                    // where `syncfs` tells them, to a descriptor that is not this one.
                    let _ = rustix::fs::fdatasync(&file);
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
