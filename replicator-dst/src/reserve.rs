//! Space that failover can count on when a disk is full.
//!
//! Failover has to write: what it decided, the manifest, the directory for what
//! is set aside. On a full disk it could not, and nobody could make room on the
//! replica, which is read-only until failover is through. So while there is
//! room, some is taken, in the state directory and in our hidden directory, and
//! failover begins by giving it back.
//!
//! It is no guarantee: whoever fills the disk may be faster.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use rustix::fs::FallocateFlags;

/// What is taken in each place, bytes: the record and the manifest of two
/// batches of small files with long names, and what a store needs to take note.
pub const BYTES: u64 = 8 << 20;
/// It is taken only where so many times as much is free.
const SHARE: u64 = 4;
const FILE: &str = "reserve";

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
    let file = File::options().write(true).create(true).truncate(true).open(path)?;
    let disk = rustix::fs::fstatvfs(&file)?;
    if disk.f_bavail.saturating_mul(disk.f_frsize) < BYTES * SHARE {
        return Err(io::ErrorKind::StorageFull.into());
    }
    Ok(rustix::fs::fallocate(&file, FallocateFlags::empty(), 0, BYTES)?)
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
}
