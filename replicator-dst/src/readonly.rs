//! Keeps the replica read-only for everybody but the applier.
//!
//! A read-only bind mount of the replica's directory is stacked over the
//! directory itself; the applier writes beneath it through a private clone of
//! the mount that nobody else can reach. The bind mount belongs to the kernel
//! and not to this process, so it outlives a crash: the next start finds it in
//! mountinfo, and clones it instead of stacking a second one.
//!
//! What is known of ours is what mountinfo shows: a read-only bind of a
//! directory over that same directory. Who makes such a mount by hand over a
//! replica gets it removed at failover.
//!
//! It guards against accidents, not against a hostile root, who may remount.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use replicator_common::status::{Enforcement, EnforcementKind};
use replicator_common::sys::mount::{self, CapabilitySet, Mount};
use rustix::fs::{CWD, Mode, OFlags, StatVfsMountFlags};
use rustix::io::Errno;

/// What the bind mount does, and what it does not cover.
const MOUNT_LIMITS: &str = "a read-only bind mount covers the replica: even root gets EROFS. \
    Not covered: files that were open for writing before it was made, mount namespaces that it \
    does not propagate to, other mounts of the same file system, and root undoing it";

/// Why the replica cannot be protected, or be made writable.
#[derive(Debug, thiserror::Error)]
pub enum ReadOnlyError {
    /// A system call failed.
    #[error("cannot {action} {}: {source}", .path.display())]
    System {
        /// What was tried.
        action: &'static str,
        /// The replica.
        path: PathBuf,
        /// What the kernel said.
        source: Errno,
    },
    /// The replica is on a mount that is read-only by the operator's doing.
    /// Failover could not make it writable.
    #[error("{} is on a read-only mount ({}); remount it writable first", .path.display(), .mount_point.display())]
    MountedReadOnly {
        /// The replica.
        path: PathBuf,
        /// Where the mount is.
        mount_point: PathBuf,
    },
    /// Something is mounted below the replica; a bind mount over it would hide
    /// that, and replicated files would land underneath.
    #[error("{} has another file system mounted below it ({}); unmount that first", .path.display(), .nested.display())]
    NestedMount {
        /// The replica.
        path: PathBuf,
        /// Where the other mount is.
        nested: PathBuf,
    },
    /// An earlier run protected the replica, and this one may not write beneath
    /// that mount.
    #[error("{} is under the read-only mount of an earlier run, and this process cannot reach beneath it: {reason}", .path.display())]
    Unreachable {
        /// The replica.
        path: PathBuf,
        /// What is missing.
        reason: String,
    },
}

/// What [`Protection::release`] found and did. The path is writable in each case.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Released {
    /// No mount of ours was there.
    NothingToDo,
    /// The mount is gone.
    Unmounted,
    /// The mount had users. It was made writable, so that processes with their
    /// working directory in it can write, and taken out of sight; it goes when
    /// the last of them leaves.
    Detached,
    /// Others have mounted something on top of it since: it was made writable
    /// and left in place, because removing it would remove theirs too.
    LeftInPlace {
        /// Where theirs are.
        nested: Vec<PathBuf>,
    },
}

/// The replica's protection, and the only way to write to it. Dropping it
/// leaves the replica read-only; only [`Protection::release`] ends that.
#[derive(Debug)]
pub struct Protection {
    path: PathBuf,
    root: OwnedFd,
    /// Keeps the clone whole: when the descriptor that made it is closed, the
    /// kernel takes the clone apart.
    _clone: Option<OwnedFd>,
    /// What holds strangers back in place of a mount; `None` with a mount, of
    /// which [`Self::enforcement`] tells.
    without_mount: Option<Enforcement>,
    /// What the last look found.
    seen: Mutex<Option<Seen>>,
}

/// What a look at the mounts found.
#[derive(Debug)]
struct Seen {
    enforcement: Enforcement,
    since: Instant,
    changes: mount::Changes,
}

impl Seen {
    /// It is good while no mount changes, and not for ever: directories above the
    /// replica can be renamed, too.
    const LIFE: Duration = Duration::from_secs(10);

    fn is_good(&self) -> bool {
        self.since.elapsed() < Self::LIFE && self.changes.any() == Ok(false)
    }
}

impl Protection {
    /// Makes the replica at `path` (an existing directory or mount point)
    /// read-only, or takes up the protection that an earlier run left.
    ///
    /// Without the right to mount it falls back to what permissions do by
    /// themselves, and [`Self::enforcement`] says so. No mode is changed for
    /// that: the modes of the tree, its root included, are the source's and
    /// are replicated.
    ///
    /// # Errors
    /// See [`ReadOnlyError`]. Nothing is mounted then.
    pub fn establish(path: &Path) -> Result<Self, ReadOnlyError> {
        let path = canonical(path)?;
        match mount::has_capability(CapabilitySet::SYS_ADMIN) {
            Ok(true) => {}
            _ => return Self::without_mount(path, "no CAP_SYS_ADMIN".to_owned()),
        }
        let clone = match mount::clone_tree(&path) {
            Ok(clone) => clone,
            Err(error) => {
                return Self::without_mount(path, format!("mounts cannot be cloned: {error}"));
            }
        };
        if cover_of(&path)?.is_some() {
            // On the clone alone: the public mount stays as it is.
            mount::set_read_only(clone.as_fd(), false)
                .map_err(failed("make a writable clone of", &path))?;
        } else {
            refuse_unsuitable(&path)?;
            cover(&path)?;
        }
        let root = open_root(clone.as_fd(), Path::new("."), &path)?;
        Ok(Self { path, root, _clone: Some(clone), without_mount: None, seen: Mutex::new(None) })
    }

    fn without_mount(path: PathBuf, why: String) -> Result<Self, ReadOnlyError> {
        if cover_of(&path)?.is_some() {
            return Err(ReadOnlyError::Unreachable { path, reason: why });
        }
        let root = open_root(CWD, &path, &path)?;
        refuse_read_only(root.as_fd(), &path)?;
        let enforcement = permissions(&path, why)?;
        Ok(Self {
            path,
            root,
            _clone: None,
            without_mount: Some(enforcement),
            seen: Mutex::new(None),
        })
    }

    /// The replica's root directory, open (not `O_PATH`) on the writable side.
    /// The same descriptor for the whole life of this value, so that a failed
    /// write-back is reported to its `syncfs`. Good for *at() calls and for
    /// `open_by_handle_at`.
    pub fn root(&self) -> BorrowedFd<'_> {
        self.root.as_fd()
    }

    /// How strangers are held back, and what that does not cover. With a mount
    /// this looks whether it is still there: it reads mountinfo if any mount has
    /// changed, or every ten seconds.
    pub fn enforcement(&self) -> Enforcement {
        if let Some(enforcement) = &self.without_mount {
            return enforcement.clone();
        }
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(seen) = seen.as_ref().filter(|seen| seen.is_good()) {
            return seen.enforcement.clone();
        }
        // Watched before it is looked at: what changes meanwhile is seen at the next look.
        let (changes, since) = (mount::Changes::watch().ok(), Instant::now());
        let enforcement = self.look();
        *seen = changes.map(|changes| Seen { enforcement: enforcement.clone(), since, changes });
        enforcement
    }

    fn look(&self) -> Enforcement {
        match cover_of(&self.path) {
            Ok(Some(cover)) => Enforcement {
                kind: EnforcementKind::Mount,
                reason: format!("{MOUNT_LIMITS}{}", reach(&cover)),
            },
            Ok(None) => Enforcement {
                kind: EnforcementKind::None,
                reason: "the read-only mount over the replica is gone: it was released, \
                    unmounted, or made writable"
                    .to_owned(),
            },
            Err(error) => Enforcement { kind: EnforcementKind::None, reason: error.to_string() },
        }
    }

    /// The replica's path, with symbolic links resolved.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Ends the protection: the public path is writable afterwards. May be
    /// called again. [`Self::root`] stays usable, and keeps the file system
    /// from being unmounted until `self` is dropped.
    ///
    /// # Errors
    /// Those of [`release_path`].
    pub fn release(&self) -> Result<Released, ReadOnlyError> {
        release_path(&self.path)
    }
}

/// Makes a replica's path writable, whether or not anything runs: removes the
/// read-only mount that [`Protection::establish`] stacked over it. A mount that
/// was there before shows again as it was. Does nothing to a path that is not
/// protected.
///
/// # Errors
/// `EPERM` without `CAP_SYS_ADMIN` when there is a mount to remove;
/// [`ReadOnlyError::MountedReadOnly`] when what comes to light is read-only
/// itself.
pub fn release_path(path: &Path) -> Result<Released, ReadOnlyError> {
    let path = canonical(path)?;
    let mut released = Released::NothingToDo;
    // More than one only if somebody copied ours; each round removes one or
    // makes it writable, and a writable one does not count as a cover.
    while let Some(cover) = cover_of(&path)? {
        released = uncover(&path, &cover)?;
    }
    let root = open_root(CWD, &path, &path)?;
    refuse_read_only(root.as_fd(), &path)?;
    Ok(released)
}

/// Stacks the read-only mount. It is read-only before anyone can see it.
fn cover(path: &Path) -> Result<(), ReadOnlyError> {
    let public = mount::clone_tree(path).map_err(failed("clone the mount of", path))?;
    mount::set_read_only(public.as_fd(), true)
        .and_then(|()| mount::move_mount(public.as_fd(), path))
        .map_err(failed("mount read-only over", path))
}

fn uncover(path: &Path, cover: &Mount) -> Result<Released, ReadOnlyError> {
    let nested: Vec<PathBuf> = list(path)?
        .into_iter()
        .filter(|mount| mount.parent == cover.id)
        .map(|mount| mount.mount_point)
        .collect();
    if nested.is_empty() {
        match mount::unmount(path) {
            Ok(()) => return Ok(Released::Unmounted),
            Err(Errno::BUSY) => {}
            Err(error) => return Err(failed("unmount the cover of", path)(error)),
        }
    }
    let top = open_path(path)?;
    mount::set_read_only(top.as_fd(), false).map_err(failed("make writable", path))?;
    drop(top);
    if !nested.is_empty() {
        return Ok(Released::LeftInPlace { nested });
    }
    // RACE: killed here, the bind mount stays, writable, and is no longer known
    // as ours. Worst outcome: a harmless line in mountinfo until it is
    // unmounted by hand.
    mount::detach(path).map_err(failed("detach the cover of", path))?;
    Ok(Released::Detached)
}

/// The mount of ours that covers `path`, if there is one.
fn cover_of(path: &Path) -> Result<Option<Mount>, ReadOnlyError> {
    let top = top_mount(path)?;
    let mounts = list(path)?;
    let below = mounts.iter().find(|mount| mount.id == top.parent);
    Ok(below.is_some_and(|below| covers_itself(path, &top, below)).then_some(top))
}

/// Whether `top` is a read-only bind over the very directory it shows.
fn covers_itself(path: &Path, top: &Mount, below: &Mount) -> bool {
    let Ok(inside) = path.strip_prefix(&below.mount_point) else {
        return false;
    };
    // Joining an empty path would add a slash.
    let same_root = if inside.as_os_str().is_empty() {
        top.root == below.root
    } else {
        top.root == below.root.join(inside)
    };
    top.mount_point == path && top.read_only && top.device == below.device && same_root
}

/// Whom the cover does not reach, in words, where that is known: a service
/// manager may have given this process mounts of its own, and then nobody else
/// sees ours.
fn reach(cover: &Mount) -> &'static str {
    if mount::in_namespace_of_init() == Ok(true) {
        return "";
    }
    let same = |mount: &Mount| {
        mount.mount_point == cover.mount_point
            && mount.root == cover.root
            && mount.device == cover.device
            && mount.read_only
    };
    match mount::list_of_init() {
        Ok(mounts) if mounts.iter().any(same) => "",
        Ok(_) => {
            ". THIS PROCESS HAS A MOUNT NAMESPACE OF ITS OWN: process 1 and what it started do \
             not see the mount and are not held back"
        }
        Err(_) => {
            ". This process may have a mount namespace of its own; whether others see the mount \
             cannot be told"
        }
    }
}

fn refuse_unsuitable(path: &Path) -> Result<(), ReadOnlyError> {
    let top = top_mount(path)?;
    if top.read_only || top.file_system_read_only {
        let mount_point = top.mount_point;
        return Err(ReadOnlyError::MountedReadOnly { path: path.to_owned(), mount_point });
    }
    let below = |mount: &Mount| mount.mount_point != path && mount.mount_point.starts_with(path);
    match list(path)?.into_iter().find(below) {
        Some(nested) => {
            Err(ReadOnlyError::NestedMount { path: path.to_owned(), nested: nested.mount_point })
        }
        None => Ok(()),
    }
}

fn refuse_read_only(root: BorrowedFd<'_>, path: &Path) -> Result<(), ReadOnlyError> {
    let flags = rustix::fs::fstatvfs(root).map_err(failed("query", path))?.f_flag;
    if !flags.contains(StatVfsMountFlags::RDONLY) {
        return Ok(());
    }
    let mount_point = top_mount(path)?.mount_point;
    Err(ReadOnlyError::MountedReadOnly { path: path.to_owned(), mount_point })
}

/// What permissions do by themselves, in words.
fn permissions(path: &Path, why: String) -> Result<Enforcement, ReadOnlyError> {
    let stat = std::fs::metadata(path).map_err(|error| failed("stat", path)(errno(&error)))?;
    let mode = stat.mode() & 0o7777;
    let own = stat.uid() == rustix::process::geteuid().as_raw();
    Ok(if own && mode & 0o022 == 0 {
        Enforcement {
            kind: EnforcementKind::Permissions,
            reason: format!(
                "no read-only mount ({why}); the mode of the replica's directory ({mode:04o}) \
                 keeps other users from changing its entries. Below it the modes are the \
                 source's: what others may write there, they may write here. Processes of the \
                 applier's user and root are not held back"
            ),
        }
    } else {
        Enforcement {
            kind: EnforcementKind::None,
            reason: format!(
                "no read-only mount ({why}), and others may write to the replica's directory \
                 (mode {mode:04o}, owner {}): nothing holds them back",
                stat.uid()
            ),
        }
    })
}

fn canonical(path: &Path) -> Result<PathBuf, ReadOnlyError> {
    path.canonicalize().map_err(|error| failed("resolve", path)(errno(&error)))
}

fn list(path: &Path) -> Result<Vec<Mount>, ReadOnlyError> {
    mount::list().map_err(failed("read the mounts for", path))
}

fn top_mount(path: &Path) -> Result<Mount, ReadOnlyError> {
    mount::of_fd(open_path(path)?).map_err(failed("find the mount of", path))
}

fn open_path(path: &Path) -> Result<OwnedFd, ReadOnlyError> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    rustix::fs::open(path, flags, Mode::empty()).map_err(failed("open", path))
}

/// A real descriptor of a directory: the `.` of a clone, or a path.
fn open_root(at: BorrowedFd<'_>, name: &Path, path: &Path) -> Result<OwnedFd, ReadOnlyError> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    rustix::fs::openat(at, name, flags, Mode::empty()).map_err(failed("open", path))
}

fn failed<'a>(action: &'static str, path: &'a Path) -> impl Fn(Errno) -> ReadOnlyError + 'a {
    move |source| ReadOnlyError::System { action, path: path.to_owned(), source }
}

fn errno(error: &std::io::Error) -> Errno {
    Errno::from_io_error(error).unwrap_or(Errno::IO)
}

#[cfg(test)]
mod tests;
