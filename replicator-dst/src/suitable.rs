//! Whether a directory may become a replica.

use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use replicator_common::sys::place;
use rustix::io::Errno;

use crate::reconcile::is_file_systems_own;
use crate::service::same;

/// Why a directory may not become a replica.
#[derive(Debug, thiserror::Error)]
pub enum Unsuitable {
    /// A system call failed.
    #[error("cannot {action} {}: {source}", path.display())]
    System {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// It is something else.
    #[error("{} is not a directory", path.display())]
    NotDirectory {
        /// The path.
        path: PathBuf,
    },
    /// It holds something.
    #[error("{} is not empty ({} is in it): use an empty directory, or allow reconciling", path.display(), example)]
    NotEmpty {
        /// The path.
        path: PathBuf,
        /// One of its names.
        example: String,
    },
    /// It and another directory that matters are one inside the other.
    #[error("{} and {} ({what}) are the same or one inside the other", path.display(), other.display())]
    Overlaps {
        /// The path.
        path: PathBuf,
        /// The other.
        other: PathBuf,
        /// What the other is.
        what: &'static str,
    },
}

fn failed(action: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> Unsuitable {
    let path = path.to_owned();
    move |source| Unsuitable::System { action, path, source }
}

fn open(path: &Path) -> Result<OwnedFd, Unsuitable> {
    place::open_directory_path(path).map_err(|error| match error {
        Errno::NOTDIR => Unsuitable::NotDirectory { path: path.to_owned() },
        error => failed("open", path)(error.into()),
    })
}

/// Makes the directory if it is missing; its path without links.
pub fn prepare(path: &Path) -> Result<PathBuf, Unsuitable> {
    match std::fs::create_dir(path) {
        Ok(()) => {}
        Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {}
        Err(error) => return Err(failed("create", path)(error)),
    }
    open(path)?;
    path.canonicalize().map_err(failed("resolve", path))
}

/// Checks a prepared directory against the state directory, other replicas, and
/// for emptiness.
pub fn check(
    path: &Path,
    state: &Path,
    others: &[PathBuf],
    reconcile: bool,
) -> Result<(), Unsuitable> {
    overlap(path, state, "the state directory")?;
    for other in others {
        match overlap(path, other, "a replica") {
            // One whose directory is gone stands in nobody's way but its own.
            Err(Unsuitable::System { .. } | Unsuitable::NotDirectory { .. })
                if open(path).is_ok() && !related(path, other) => {}
            result => result?,
        }
    }
    match first_name(path)? {
        Some(example) if !reconcile => Err(Unsuitable::NotEmpty { path: path.to_owned(), example }),
        _ => Ok(()),
    }
}

/// Whether nothing is in it that counts.
pub fn is_empty(path: &Path) -> Result<bool, Unsuitable> {
    Ok(first_name(path)?.is_none())
}

fn first_name(path: &Path) -> Result<Option<String>, Unsuitable> {
    let directory = open(path)?;
    let names = place::list(directory.as_fd()).map_err(|e| failed("list", path)(e.into()))?;
    let counts = |name: &_| !is_file_systems_own(directory.as_fd(), name);
    Ok(names.into_iter().map(|(name, _)| name).find(counts).map(|name| name.to_string()))
}

/// Whether one path names the other or something below it.
fn related(a: &Path, b: &Path) -> bool {
    a.starts_with(b) || b.starts_with(a)
}

/// By what the paths lead to, not by their text: mounts and links do not
/// deceive it.
fn overlap(path: &Path, other: &Path, what: &'static str) -> Result<(), Unsuitable> {
    let (a, b) = (open(path)?, open(other)?);
    if inside(&a, &b).map_err(|e| failed("look above", path)(e.into()))?
        || inside(&b, &a).map_err(|e| failed("look above", other)(e.into()))?
    {
        return Err(Unsuitable::Overlaps { path: path.to_owned(), other: other.to_owned(), what });
    }
    Ok(())
}

/// Whether `ancestor` is `directory` or above it.
fn inside(directory: &OwnedFd, ancestor: &OwnedFd) -> Result<bool, Errno> {
    let mut at = place::open_parent(directory.as_fd())?;
    if same(directory, ancestor) {
        return Ok(true);
    }
    let mut below = directory.try_clone().map_err(|_| Errno::MFILE)?;
    while !same(&at, &below) {
        if same(&at, ancestor) {
            return Ok(true);
        }
        let above = place::open_parent(at.as_fd())?;
        below = std::mem::replace(&mut at, above);
    }
    Ok(same(&at, ancestor))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn trap_18_overlap_is_found_by_what_paths_lead_to() {
        let base = tempfile::tempdir().unwrap();
        let (state, replica) = (base.path().join("state"), base.path().join("replica"));
        std::fs::create_dir(&state).unwrap();
        let replica = prepare(&replica).unwrap();
        check(&replica, &state, &[], false).unwrap();
        std::os::unix::fs::symlink(&state, base.path().join("link")).unwrap();
        let inside = prepare(&base.path().join("link/inside")).unwrap();
        assert!(matches!(check(&inside, &state, &[], false), Err(Unsuitable::Overlaps { .. })));
        assert!(check(base.path(), &state, &[], true).is_err());
        assert!(check(&replica, &state, std::slice::from_ref(&replica), true).is_err());
        std::fs::write(replica.join("x"), "").unwrap();
        assert!(matches!(check(&replica, &state, &[], false), Err(Unsuitable::NotEmpty { .. })));
        check(&replica, &state, &[], true).unwrap();
        assert!(prepare(&replica.join("x")).is_err());
    }
}
