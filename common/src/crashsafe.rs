//! Durable files: the only place where small state files are written.
//!
//! Each fsync has its reason beside it; there are no others in the project
//! outside of the stores and the destination's commit.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::fault;

/// Why a state file could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum StateFileError {
    /// The file system said no.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// On which file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The file's content is not what this program writes.
    #[error("{} is damaged or not a state file of replicator: {reason}", path.display())]
    Damaged {
        /// Which file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// The file was written by a newer program.
    #[error(
        "{} has format version {found}, this program knows up to {known}: run the newer replicator that wrote it",
        path.display()
    )]
    Newer {
        /// Which file.
        path: PathBuf,
        /// Version found.
        found: u32,
        /// Newest version known.
        known: u32,
    },
}

impl StateFileError {
    /// Wraps an I/O error with what was tried and where.
    pub fn io(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io { action, path, source }
    }
}

/// The first line of a state file is `replicator NAME VERSION CHECKSUM`, the
/// rest is JSON, which the checksum (BLAKE3, 16 hexadecimal digits) covers.
pub struct Format {
    /// What the file holds, one word.
    pub name: &'static str,
    /// The version written, and the newest that is read.
    pub version: u32,
}

/// Writes `value` so that after a crash either the old or the new file is there.
pub fn write<T: Serialize>(path: &Path, format: &Format, value: &T) -> Result<(), StateFileError> {
    let mut body = serde_json::to_vec_pretty(value).map_err(|error| StateFileError::Damaged {
        path: path.to_owned(),
        reason: error.to_string(),
    })?;
    body.push(b'\n');
    let mut text = header(format, &body).into_bytes();
    text.extend_from_slice(&body);
    replace(path, &text)
}

/// Reads what [`write()`] wrote; `None` when there is no such file.
pub fn read<T: DeserializeOwned>(
    path: &Path,
    format: &Format,
) -> Result<Option<T>, StateFileError> {
    let mut text = Vec::new();
    match File::open(path) {
        Ok(mut file) => {
            file.read_to_end(&mut text).map_err(StateFileError::io("read", path))?;
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(StateFileError::io("open", path)(error)),
    }
    let damaged =
        |reason: &str| StateFileError::Damaged { path: path.to_owned(), reason: reason.to_owned() };
    let end = text.iter().position(|b| *b == b'\n').ok_or_else(|| damaged("no header"))?;
    let (head, body) = (&text[..end], &text[end + 1..]);
    let words: Vec<&str> =
        std::str::from_utf8(head).map_err(|_| damaged("header is not text"))?.split(' ').collect();
    let ["replicator", name, version, _] = words[..] else {
        return Err(damaged("not a header of replicator"));
    };
    if name != format.name {
        return Err(damaged(&format!("holds {name}, expected {}", format.name)));
    }
    let found: u32 = version.parse().map_err(|_| damaged("version is not a number"))?;
    if found > format.version {
        return Err(StateFileError::Newer { path: path.to_owned(), found, known: format.version });
    }
    let written = Format { name: format.name, version: found };
    if header(&written, body).trim_end().as_bytes() != head {
        return Err(damaged("checksum does not match"));
    }
    serde_json::from_slice(body).map(Some).map_err(|error| damaged(&error.to_string()))
}

fn header(format: &Format, body: &[u8]) -> String {
    let sum = blake3::hash(body).to_hex();
    format!("replicator {} {} {}\n", format.name, format.version, &sum[..16])
}

/// Puts `bytes` under `path`, mode 0600, atomically and durably.
pub fn replace(path: &Path, bytes: &[u8]) -> Result<(), StateFileError> {
    let temporary = path.with_extension("new");
    point("state-create", &temporary)?;
    let mut file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(&temporary)
        .map_err(StateFileError::io("create", &temporary))?;
    point("state-write", &temporary)?;
    file.write_all(bytes).map_err(StateFileError::io("write", &temporary))?;
    // The content must be on disk before the name is: else a crash can leave
    // an empty file under the final name.
    fsync(&file, &temporary)?;
    drop(file);
    install(&temporary, path)
}

/// Renames a file that is complete and on disk to `path`, durably.
pub fn install(temporary: &Path, path: &Path) -> Result<(), StateFileError> {
    point("state-rename", path)?;
    fs::rename(temporary, path).map_err(StateFileError::io("rename into place", path))?;
    sync_parent(path)
}

/// Removes a file durably; it is no error when there is none.
pub fn remove(path: &Path) -> Result<(), StateFileError> {
    point("state-remove", path)?;
    match fs::remove_file(path) {
        Ok(()) => sync_parent(path),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(StateFileError::io("remove", path)(error)),
    }
}

/// Brings a file's content to stable storage.
fn fsync(file: &File, path: &Path) -> Result<(), StateFileError> {
    point("state-fsync", path)?;
    file.sync_all().map_err(StateFileError::io("sync", path))
}

/// A fault point, named as [`crate::fault`] says.
fn point(call: &'static str, path: &Path) -> Result<(), StateFileError> {
    fault::at(call, path.display()).map_err(|error| StateFileError::io(call, path)(error.into()))
}

/// A rename or removal is durable only when its directory is.
fn sync_parent(path: &Path) -> Result<(), StateFileError> {
    let parent = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    point("state-fsync-directory", parent)?;
    File::open(parent)
        .and_then(|directory| directory.sync_all())
        .map_err(StateFileError::io("sync directory", parent))
}

/// Makes a directory (and its parents) with mode 0700, durably.
pub fn create_directory(path: &Path) -> Result<(), StateFileError> {
    use std::os::unix::fs::DirBuilderExt;
    if path.is_dir() {
        return Ok(());
    }
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
        .map_err(StateFileError::io("create directory", path))?;
    sync_parent(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    const FORMAT: Format = Format { name: "test", version: 2 };

    #[test]
    fn round_trip_and_damage() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("state");
        assert!(read::<Vec<u32>>(&path, &FORMAT).unwrap().is_none());
        write(&path, &FORMAT, &vec![1, 2, 3]).unwrap();
        assert_eq!(read::<Vec<u32>>(&path, &FORMAT).unwrap(), Some(vec![1, 2, 3]));

        let good = fs::read(&path).unwrap();
        for i in 0..good.len() {
            let mut bad = good.clone();
            bad[i] ^= 1;
            fs::write(&path, &bad).unwrap();
            assert!(read::<Vec<u32>>(&path, &FORMAT).is_err(), "byte {i}");
        }
        for cut in 0..good.len() {
            fs::write(&path, &good[..cut]).unwrap();
            assert!(read::<Vec<u32>>(&path, &FORMAT).is_err(), "cut at {cut}");
        }
    }

    #[test]
    fn newer_is_refused_older_is_read() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("state");
        write(&path, &Format { name: "test", version: 3 }, &7u32).unwrap();
        let error = read::<u32>(&path, &FORMAT).unwrap_err();
        assert!(matches!(error, StateFileError::Newer { found: 3, known: 2, .. }), "{error}");
        write(&path, &Format { name: "test", version: 1 }, &7u32).unwrap();
        assert_eq!(read::<u32>(&path, &FORMAT).unwrap(), Some(7));
    }
}
