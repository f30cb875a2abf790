//! One process at a time in a state directory.

use std::fs::File;
use std::io::{self, Read, Seek, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;

/// Why a state directory could not be locked.
#[derive(Debug, thiserror::Error)]
pub enum LockError {
    /// A running process has it.
    #[error("state directory {} is in use by {owner}", directory.display())]
    InUse {
        /// Which.
        directory: PathBuf,
        /// `process 1234`, or `another process` where its id is not known.
        owner: String,
    },
    /// The lock file cannot be made or written.
    #[error("cannot lock {}: {source}", path.display())]
    Io {
        /// The lock file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

/// A locked state directory; unlocked when this is dropped or the process
/// ends, however it ends. The file `lock` in it holds the owner's process id.
#[derive(Debug)]
pub struct StateLock {
    _file: File,
}

impl StateLock {
    /// Locks `directory`, which must exist.
    pub fn acquire(directory: &Path) -> Result<Self, LockError> {
        let path = directory.join("lock");
        let failed = |source| LockError::Io { path: path.clone(), source };
        let mut file = File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&path)
            .map_err(failed)?;
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(Errno::WOULDBLOCK) => {
                let directory = directory.to_owned();
                return Err(LockError::InUse { directory, owner: owner(&mut file) });
            }
            Err(error) => return Err(failed(error.into())),
        }
        let written = file
            .set_len(0)
            .and_then(|()| file.rewind())
            .and_then(|()| writeln!(file, "{}", std::process::id()));
        match written {
            // The lock is held all the same; the id is for people. A full disk
            // must not keep anybody from failing over.
            Err(error) if is_full(&error) => {}
            written => written.map_err(failed)?,
        }
        Ok(Self { _file: file })
    }
}

fn is_full(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}

fn owner(file: &mut File) -> String {
    let mut text = String::new();
    // RACE: the owner may not have written its id yet; then the message lacks it.
    let _ = file.read_to_string(&mut text);
    match text.trim() {
        "" => "another process".to_owned(),
        pid => format!("process {pid}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_at_a_time_and_the_owner_is_named() {
        let directory = tempfile::tempdir().unwrap();
        let held = StateLock::acquire(directory.path()).unwrap();
        let error = StateLock::acquire(directory.path()).unwrap_err().to_string();
        assert!(error.ends_with(&format!("in use by process {}", std::process::id())), "{error}");
        drop(held);
        StateLock::acquire(directory.path()).unwrap();
    }
}
