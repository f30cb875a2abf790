//! Space that can be counted on when a disk is full.
//!
//! Failover has to write: what it decided, the manifest, the directory for what
//! is set aside. On a full disk it could not, and nobody could make room on the
//! replica, which is read-only until failover is through. So while there is
//! room, some is taken, in the state directory and in our hidden directory, and
//! failover begins by giving it back.
//!
//! The steps of a batch that is logged have to be taken, and a rename into a
//! directory whose blocks are full needs a new one. Without it, deletions that
//! would make room wait behind that step for ever. [`Slack`] is for those.
//!
//! It is no guarantee: whoever fills the disk may be faster. And on btrfs, which
//! keeps directories apart from data, it helps only while there is room for both.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::FallocateFlags;

/// What is taken in each place, bytes: the record and the manifest of two
/// batches of small files with long names, and what a store needs to take note.
pub const BYTES: u64 = 8 << 20;
/// It is taken only where so many times as much is free.
const SHARE: u64 = 4;
const FILE: &str = "reserve";
const SLACK_FILE: &str = "slack";

/// Takes the space in `directory`, if it is not taken already and there is
/// enough. A failure costs no more than the reserve.
pub fn keep(directory: &Path) {
    let path = directory.join(FILE);
    if let Err(error) = try_keep(&path) {
        tracing::debug!(path = %path.display(), %error, "no space is kept for failover");
        give_back(directory);
    }
}

fn try_keep(path: &Path) -> io::Result<()> {
    if fs::symlink_metadata(path).is_ok_and(|stat| stat.blocks() * 512 >= BYTES) {
        return Ok(());
    }
    take(path, SHARE)
}

/// Takes the space as a file at `path`, where `share` times as much is free.
fn take(path: &Path, share: u64) -> io::Result<()> {
    let file = File::options().write(true).create(true).truncate(true).open(path)?;
    let disk = rustix::fs::fstatvfs(&file)?;
    if disk.f_bavail.saturating_mul(disk.f_frsize) < BYTES * share {
        return Err(io::ErrorKind::StorageFull.into());
    }
    let taken = rustix::fs::fallocate(&file, FallocateFlags::empty(), 0, BYTES);
    if taken.is_err() {
        // What came of it would be missed by others.
        file.set_len(0)?;
    }
    Ok(taken?)
}

/// Space for the steps of a batch that is logged.
///
/// INVARIANT: once it was given to a step, nothing is staged before it is taken
/// again; else what is staged next would use it up, and the next logged batch
/// find none. That it was given is on disk (a file of no length), so a restart
/// does not forget it. Where there never was room for it, there is no such file,
/// and nothing waits for it.
#[derive(Debug)]
pub struct Slack {
    path: PathBuf,
    spent: AtomicBool,
}

impl Slack {
    /// Takes the space in `directory`, if it is not taken already and there is
    /// enough.
    pub fn open(directory: &Path) -> Self {
        let path = directory.join(SLACK_FILE);
        let found = fs::symlink_metadata(&path).ok().map(|stat| stat.blocks() * 512);
        let slack = Self { path, spent: AtomicBool::new(found.is_some_and(|b| b < BYTES)) };
        if found.is_none()
            && let Err(error) = take(&slack.path, SHARE)
        {
            tracing::debug!(path = %slack.path.display(), %error, "no space is kept for steps");
            slack.remove();
        }
        slack
    }

    /// Gives the space to whoever finds the disk full; false when there is none
    /// to give.
    pub fn spend(&self) -> bool {
        let open = File::options().write(true).open(&self.path);
        let Ok(file) = open else { return false };
        let held = file.metadata().is_ok_and(|stat| stat.blocks() > 0);
        self.spent.store(true, Ordering::Release);
        held && file.set_len(0).is_ok()
    }

    /// Whether anything may be staged: takes the space again if it was given.
    ///
    /// # Errors
    /// The disk is still full, or its error.
    pub fn restore(&self) -> io::Result<()> {
        if !self.spent.load(Ordering::Acquire) {
            return Ok(());
        }
        // As much again, so that what is staged next has some room, too.
        take(&self.path, 2)?;
        self.spent.store(false, Ordering::Release);
        Ok(())
    }

    /// The same for steps that take so many `bytes` of their own. Where there never was room
    /// for the space, four times as many have to be free.
    ///
    /// # Errors
    /// As of [`Self::restore`].
    pub fn restore_for(&self, bytes: u64) -> io::Result<()> {
        self.restore()?;
        if fs::symlink_metadata(&self.path).is_ok() {
            return Ok(());
        }
        let directory = self.path.parent().unwrap_or(&self.path);
        let disk = rustix::fs::statvfs(directory)?;
        match disk.f_bavail.saturating_mul(disk.f_frsize) < bytes.saturating_mul(SHARE) {
            true => Err(io::ErrorKind::StorageFull.into()),
            false => Ok(()),
        }
    }

    fn remove(&self) {
        // An empty file would say that it was given to a step.
        if let Err(error) = fs::remove_file(&self.path)
            && error.kind() != io::ErrorKind::NotFound
        {
            tracing::debug!(path = %self.path.display(), %error, "cannot be removed");
        }
    }
}

/// Gives it back.
pub fn give_back(directory: &Path) {
    let path = directory.join(FILE);
    match fs::remove_file(&path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            tracing::debug!(path = %path.display(), %error, "the space kept for failover stays");
        }
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn space_is_taken_once_and_given_back() {
        let directory = tempfile::tempdir_in("/var/tmp").unwrap();
        let path = directory.path().join(FILE);
        keep(directory.path());
        let first = fs::metadata(&path).unwrap();
        assert!(first.blocks() * 512 >= BYTES);
        keep(directory.path());
        assert_eq!(fs::metadata(&path).unwrap().ino(), first.ino());
        give_back(directory.path());
        assert!(!path.exists());
        give_back(directory.path());
    }

    #[test]
    fn slack_that_was_given_is_missed_until_it_is_taken_again() {
        let directory = tempfile::tempdir_in("/var/tmp").unwrap();
        let blocks = || fs::metadata(directory.path().join(SLACK_FILE)).unwrap().blocks() * 512;
        let slack = Slack::open(directory.path());
        assert!(blocks() >= BYTES);
        slack.restore().unwrap();
        assert!(slack.spend());
        assert_eq!(blocks(), 0);
        assert!(!slack.spend(), "given once");
        // A restart does not forget it.
        let slack = Slack::open(directory.path());
        assert_eq!(blocks(), 0);
        slack.restore().unwrap();
        assert!(blocks() >= BYTES);
        assert!(slack.spend());
    }
}
