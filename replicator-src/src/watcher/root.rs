//! The source's root, held for as long as it is watched.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use replicator_common::id::ObjectId;
use replicator_common::sys::{handle, stat};
use rustix::fs::{Mode, OFlags};

use super::WatchError;
use super::waker::failed;

/// The root directory. Holding it open keeps its file system from being
/// unmounted, and with it the marks and watches on it alive.
#[derive(Debug)]
pub(super) struct Root {
    fd: OwnedFd,
    path: PathBuf,
    id: ObjectId,
    /// Roots of two file systems may have equal handles.
    device: u64,
}

impl Root {
    pub(super) fn new(
        watcher: &'static str,
        directory: BorrowedFd<'_>,
        path: &Path,
    ) -> Result<Self, WatchError> {
        let fd = directory.try_clone_to_owned().map_err(|source| WatchError::Io {
            watcher,
            action: "hold the source open",
            source,
        })?;
        let id = handle::identify(directory).map_err(failed(watcher, "identify the source"))?;
        let data = stat::of_fd(directory).map_err(failed(watcher, "look at the source"))?;
        Ok(Self { fd, path: path.to_owned(), id, device: data.dev })
    }

    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    pub(super) fn id(&self) -> &ObjectId {
        &self.id
    }

    /// Whether the path still leads to the directory that is watched.
    pub(super) fn check(&self, watcher: &'static str) -> Result<(), WatchError> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let reason = match rustix::fs::open(&self.path, flags, Mode::empty())
            .and_then(|fd| Ok((handle::identify(fd.as_fd())?, stat::of_fd(&fd)?.dev)))
        {
            Ok((id, device)) if id == self.id && device == self.device => return Ok(()),
            Ok(_) => "the path leads to another directory now".to_owned(),
            Err(error) => format!("the path cannot be opened: {error}"),
        };
        Err(self.lost(watcher, reason))
    }

    pub(super) fn lost(&self, watcher: &'static str, reason: String) -> WatchError {
        WatchError::Lost { watcher, path: self.path.display().to_string(), reason }
    }

    pub(super) fn unsupported(&self, watcher: &'static str, reason: String) -> WatchError {
        WatchError::Unsupported { watcher, path: self.path.display().to_string(), reason }
    }
}
