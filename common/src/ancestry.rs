//! Whether one directory lies inside another: by the identity of directories,
//! not by the text of paths, which bind mounts and links make worthless.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use crate::id::ObjectId;
use crate::sys::{handle, stat};
use rustix::fs::{CWD, Mode, OFlags, openat};
use rustix::io::Errno;

const DIRECTORY: OFlags = OFlags::PATH.union(OFlags::DIRECTORY).union(OFlags::CLOEXEC);
/// The deepest tree that is climbed. PATH_MAX does not bound depth, but
/// something must end a loop that a broken network file system makes.
const DEPTH_MAX: usize = 100_000;

/// A directory by file system and handle.
type Identity = (u64, ObjectId);

/// Whether `inner` is `outer` or lies somewhere below it. Both must exist.
///
/// # Errors
/// When one of them cannot be opened, or a parent cannot be looked at.
pub fn is_within(inner: &Path, outer: &Path) -> io::Result<bool> {
    let inner = openat(CWD, inner, DIRECTORY, Mode::empty())?;
    let outer = openat(CWD, outer, DIRECTORY, Mode::empty())?;
    let sought = identity(outer.as_fd())?;
    let (device, object) = identity(inner.as_fd())?;
    // `..` of a bind mount's root leads to where it is mounted, not to where
    // the tree really lies. The same directory seen through the other's mount
    // has its real parents.
    if device == sought.0
        && let Some(seen) = seen_through(outer.as_fd(), &object)
        && climb(seen, &sought)?
    {
        return Ok(true);
    }
    climb(inner, &sought)
}

/// A directory as the mount of `outer` shows it. `None` without
/// CAP_DAC_READ_SEARCH, and where the file system has no handles.
fn seen_through(outer: BorrowedFd<'_>, object: &ObjectId) -> Option<OwnedFd> {
    // The kernel takes no O_PATH descriptor for the mount.
    let mount = openat(outer, c".", OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty()).ok()?;
    handle::open(mount.as_fd(), object, DIRECTORY).ok()
}

fn climb(mut directory: OwnedFd, sought: &Identity) -> io::Result<bool> {
    let mut current = identity(directory.as_fd())?;
    for _ in 0..DEPTH_MAX {
        if current == *sought {
            return Ok(true);
        }
        directory = match openat(&directory, c"..", DIRECTORY, Mode::empty()) {
            Ok(parent) => parent,
            // What was opened by handle may have parents that only its
            // owner may search.
            Err(Errno::ACCESS | Errno::STALE | Errno::NOENT) => return Ok(false),
            Err(error) => return Err(error.into()),
        };
        let parent = identity(directory.as_fd())?;
        if parent == current {
            return Ok(false);
        }
        current = parent;
    }
    Err(io::Error::other("the directory lies too deep"))
}

fn identity(directory: BorrowedFd<'_>) -> io::Result<Identity> {
    Ok((stat::of_fd(directory)?.dev, handle::identify(directory)?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn by_identity_not_by_text() {
        let base = tempfile::tempdir().unwrap();
        let (a, ab) = (base.path().join("a"), base.path().join("ab"));
        fs::create_dir_all(a.join("deep/er")).unwrap();
        fs::create_dir(&ab).unwrap();
        std::os::unix::fs::symlink(a.join("deep"), base.path().join("link")).unwrap();
        let within = |inner: &Path, outer: &Path| is_within(inner, outer).unwrap();
        assert!(within(&a, &a));
        assert!(within(&a.join("deep/er"), &a));
        assert!(within(&base.path().join("link"), &a));
        assert!(within(&a, &base.path().join("link/..")));
        assert!(within(&a, Path::new("/")));
        assert!(!within(&ab, &a));
        assert!(!within(&a, &ab));
        assert!(!within(&a, &a.join("deep")));
        assert!(is_within(&a.join("none"), &a).is_err());
    }

    /// Mounts need root; without it there is nothing to see through.
    #[test]
    fn through_a_bind_mount() {
        let base = tempfile::tempdir().unwrap();
        let (tree, bind) = (base.path().join("tree"), base.path().join("bind"));
        fs::create_dir_all(tree.join("sub")).unwrap();
        fs::create_dir(&bind).unwrap();
        let mounted = std::process::Command::new("mount")
            .arg("--bind")
            .args([&tree.join("sub"), &bind])
            .output()
            .is_ok_and(|output| output.status.success());
        if !mounted {
            eprintln!("skipped: no right to mount");
            return;
        }
        fs::create_dir(bind.join("below")).unwrap();
        let result = [is_within(&bind, &tree), is_within(&bind.join("below"), &tree)];
        let other_way = is_within(&tree, &bind);
        let unmounted = std::process::Command::new("umount").arg(&bind).status().unwrap();
        assert!(unmounted.success());
        assert!(result.into_iter().all(|within| within.unwrap()));
        assert!(!other_way.unwrap());
    }
}
