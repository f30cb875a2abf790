//! Setting attributes, exactly: nothing that the state does not have stays.
//!
//! What the replica cannot hold (no right to chown, no xattrs) is counted in
//! [`Shortfalls`] and shown; it never fails a batch, and never passes silently.

use std::os::fd::BorrowedFd;

use replicator_common::object::{Kind, ObjectState};
use replicator_common::status::{PathError, Shortfalls};
use replicator_common::sys::{place, stat, xattr};
use rustix::io::Errno;

/// The most examples kept.
const EXAMPLES_MAX: usize = 100;

/// Bytes of names and values that every file system with xattrs can hold of one
/// object: ext4 has one block for them.
const XATTRS_SURE: usize = 3 << 10;

/// Attributes that the kernel or its security modules keep by themselves:
/// never removed from the replica (setting them is tried).
const KERNEL_OWNED: [&[u8]; 4] =
    [b"security.selinux", b"security.ima", b"security.evm", b"security.apparmor"];

/// Whether an error says that the replica cannot hold something, rather than
/// that it cannot be reached now.
fn is_shortfall(error: Errno) -> bool {
    matches!(
        error,
        Errno::PERM
            | Errno::ACCESS
            | Errno::NOTSUP
            | Errno::INVAL
            | Errno::TOOBIG
            | Errno::RANGE
            | Errno::NOSYS
    )
}

/// Where an object comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    /// Just made by us in our own directories, which hold no default ACL
    /// (see [`crate::area`]): it has no xattrs, and need not be asked.
    Ours,
    /// From anywhere: it may have any.
    Any,
}

/// Brings owner, xattrs, mode and time of an object (any descriptor of it,
/// `O_PATH` included) to those of `state`. `name` is for the examples.
///
/// Order: owner first, since chown clears setuid and capabilities; then xattrs,
/// since an inherited default ACL changes what mode bits mean; then mode; the
/// time last, since nothing may come after it.
pub fn apply(
    fd: BorrowedFd<'_>,
    state: &ObjectState,
    origin: Origin,
    shortfalls: &mut Shortfalls,
    name: &dyn Fn() -> String,
) -> Result<(), Errno> {
    let wanted = &state.attributes;
    let now = stat::of_fd(fd)?;
    if (now.uid, now.gid) != (wanted.uid, wanted.gid) {
        let result = place::set_owner(fd, wanted.uid, wanted.gid);
        note(result, &mut shortfalls.ownership, &mut shortfalls.examples, "owner", name)?;
    }
    let xattrs_changed = set_xattrs(fd, state, origin, shortfalls, name)?;
    if state.kind != Kind::Symlink {
        // chown and ACLs may have changed it.
        let stands = (now.uid, now.gid) == (wanted.uid, wanted.gid) && !xattrs_changed;
        let mode = if stands { now.mode } else { stat::of_fd(fd)?.mode };
        let result = if mode == wanted.mode { Ok(()) } else { place::set_mode(fd, wanted.mode) };
        note(result, &mut shortfalls.mode, &mut shortfalls.examples, "mode", name)?;
    }
    let result = place::set_mtime(fd, wanted.mtime);
    note(result, &mut shortfalls.times, &mut shortfalls.examples, "time", name)
}

/// Says whether any was changed.
fn set_xattrs(
    fd: BorrowedFd<'_>,
    state: &ObjectState,
    origin: Origin,
    shortfalls: &mut Shortfalls,
    name: &dyn Fn() -> String,
) -> Result<bool, Errno> {
    let wanted = &state.attributes.xattrs;
    let present = match origin {
        Origin::Ours => Vec::new(),
        Origin::Any => xattr::read(fd)?,
    };
    if present == *wanted {
        return Ok(false);
    }
    // Xattrs that fit into no block are refused with the error of a full disk,
    // and would be for ever.
    let bytes: usize = wanted.iter().map(|xattr| xattr.name.len() + xattr.value.len()).sum();
    let of_size =
        |error| if error == Errno::NOSPC && bytes > XATTRS_SURE { Errno::TOOBIG } else { error };
    let mut failure = None;
    for old in &present {
        let stays = wanted.iter().any(|new| new.name == old.name);
        if !stays && !KERNEL_OWNED.contains(&old.name.as_slice()) {
            failure = xattr::remove(fd, &old.name).err().or(failure);
        }
    }
    for new in wanted {
        if !present.contains(new) {
            failure = xattr::set(fd, new).err().map(of_size).or(failure);
        }
    }
    let result = failure.map_or(Ok(()), Err);
    note(result, &mut shortfalls.xattrs, &mut shortfalls.examples, "xattrs", name)?;
    Ok(true)
}

fn note(
    result: Result<(), Errno>,
    count: &mut u64,
    examples: &mut Vec<PathError>,
    what: &str,
    name: &dyn Fn() -> String,
) -> Result<(), Errno> {
    match result {
        Err(error) if is_shortfall(error) => {
            *count += 1;
            example(examples, name(), format!("{what}: {error}"));
            Ok(())
        }
        result => result,
    }
}

/// Keeps an example, the newest last.
pub fn example(examples: &mut Vec<PathError>, path: String, error: String) {
    if examples.len() >= EXAMPLES_MAX {
        examples.remove(0);
    }
    examples.push(PathError { path, error });
}

/// Adds what one piece of work could not do to the total.
pub fn merge(total: &mut Shortfalls, part: Shortfalls) {
    total.ownership += part.ownership;
    total.mode += part.mode;
    total.xattrs += part.xattrs;
    total.devices += part.devices;
    total.times += part.times;
    for item in part.examples {
        example(&mut total.examples, item.path, item.error);
    }
}
