//! Working where the replica's own modes do not let us: an applier that is not
//! root owns what it makes, and is bound by the modes that the source gave it
//! (a directory of mode 0500 takes no names).
//!
//! The owner's bits are widened for one system call and put back. Who may write
//! is nobody's matter but the applier's meanwhile: the bits are the owner's.
//!
//! RACE: a crash in between leaves them wide. For a directory whose entries
//! change, and for a file that is rewritten, the batch sets its attributes at
//! the end, also when it is redone. A directory that is only passed through
//! (it lacks search permission), moved itself, or a file that is only read
//! (it lacks read permission) keeps its owner's bits wide until its next change.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use replicator_common::object::Kind;
use replicator_common::sys::{place, stat};
use rustix::io::Errno;

/// Does `action`; when it is not permitted, once more with the owner's bits of
/// `objects` widened. Descriptors may be `O_PATH`.
pub fn with<T>(
    objects: &[BorrowedFd<'_>],
    action: impl Fn() -> Result<T, Errno>,
) -> Result<T, Errno> {
    match action() {
        Err(Errno::ACCESS) => {}
        result => return result,
    }
    let mut widened = Vec::new();
    for object in objects {
        widened.extend(Widened::new(*object)?);
    }
    if widened.is_empty() {
        return Err(Errno::ACCESS);
    }
    action()
}

/// An object's mode is wider while this lives.
struct Widened {
    object: OwnedFd,
    mode: u32,
}

impl Widened {
    /// `None` when the bits are set already, or are not ours to set.
    fn new(object: BorrowedFd<'_>) -> Result<Option<Self>, Errno> {
        let found = stat::of_fd(object)?;
        let bits = match found.kind {
            Kind::Directory => 0o700,
            Kind::File => 0o600,
            _ => return Ok(None),
        };
        if found.mode & bits == bits {
            return Ok(None);
        }
        let object = object.try_clone_to_owned().map_err(|_| Errno::MFILE)?;
        match place::set_mode(object.as_fd(), found.mode | bits) {
            Ok(()) => Ok(Some(Self { object, mode: found.mode })),
            Err(Errno::PERM | Errno::ACCESS) => Ok(None),
            Err(error) => Err(error),
        }
    }
}

impl Drop for Widened {
    fn drop(&mut self) {
        if let Err(error) = place::set_mode(self.object.as_fd(), self.mode) {
            tracing::warn!(%error, mode = format!("{:o}", self.mode), "cannot put a mode back");
        }
    }
}
