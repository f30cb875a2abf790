//! File handles: `name_to_handle_at(2)` and `open_by_handle_at(2)`.

use std::ffi::CString;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use rustix::fs::OFlags;
use rustix::io::Errno;

use crate::id::{OBJECT_ID_MAX, ObjectId};
use crate::name::Name;
use crate::sys::last_errno;
use crate::sys::stat::{self, Stat};

/// `struct file_handle` with room for the largest handle (`MAX_HANDLE_SZ`).
#[repr(C)]
struct RawHandle {
    bytes: libc::c_uint,
    kind: libc::c_int,
    body: [u8; OBJECT_ID_MAX - 1],
}

/// The handle of the object that an open descriptor (`O_PATH` will do) refers to.
///
/// # Errors
/// `EOPNOTSUPP` where the file system has no handles; see [`identify`].
pub fn of_fd(fd: BorrowedFd<'_>) -> Result<ObjectId, Errno> {
    raw(fd, c"", libc::AT_EMPTY_PATH)
}

/// The handle of `name` in `directory`; a symbolic link's own, not its target's.
pub fn of_entry(directory: BorrowedFd<'_>, name: &Name) -> Result<ObjectId, Errno> {
    let name = CString::new(name.as_bytes()).map_err(|_| Errno::INVAL)?;
    raw(directory, &name, 0)
}

fn raw(directory: BorrowedFd<'_>, name: &std::ffi::CStr, flags: i32) -> Result<ObjectId, Errno> {
    let mut handle = RawHandle {
        bytes: (OBJECT_ID_MAX - 1) as libc::c_uint,
        kind: 0,
        body: [0; OBJECT_ID_MAX - 1],
    };
    let mut mount_id = 0;
    // SAFETY: the name is NUL-terminated; `handle` has the layout of struct
    // file_handle with `bytes` bytes of room behind it; both outlive the call.
    let result = unsafe {
        libc::syscall(
            libc::SYS_name_to_handle_at,
            directory.as_raw_fd(),
            name.as_ptr(),
            &raw mut handle,
            &raw mut mount_id,
            flags,
        )
    };
    if result != 0 {
        return Err(last_errno());
    }
    from_kernel(handle.kind, &handle.body[..handle.bytes as usize]).ok_or(Errno::OVERFLOW)
}

/// An [`ObjectId`] from a handle as the kernel writes it, in
/// `name_to_handle_at` and in fanotify's records alike. `None` for a type that
/// does not fit a byte (none exists without `AT_HANDLE_CONNECTABLE`).
pub fn from_kernel(kind: i32, body: &[u8]) -> Option<ObjectId> {
    ObjectId::new(u8::try_from(kind).ok()?, body)
}

/// How often an open that fails with `ENOMEM` is tried again, each time after
/// another thread had its turn. The new inode that causes it is done within
/// microseconds, and never took a second try on a machine with an idle core.
const TRIES_WHILE_CREATED: u32 = 1000;

/// Opens an object by its handle, on the file system of `mount`.
///
/// ext4 answers `ENOMEM`, not `ESTALE`, for an object that is gone and whose
/// inode number is being given to a new one at this moment (`iget_locked`
/// finds an inode that is `I_CREATING`). It is tried again here, so that a file
/// that is replaced in a loop is no error.
///
/// # Errors
/// `ESTALE` when the object is gone, `EPERM` without `CAP_DAC_READ_SEARCH`,
/// `EINVAL` for an id that is not a kernel handle. `ELOOP` when a symbolic
/// link is opened without `O_PATH`.
pub fn open(mount: BorrowedFd<'_>, object: &ObjectId, flags: OFlags) -> Result<OwnedFd, Errno> {
    for _ in 0..TRIES_WHILE_CREATED {
        match open_once(mount, object, flags) {
            Err(Errno::NOMEM) => std::thread::yield_now(),
            result => return result,
        }
    }
    open_once(mount, object, flags)
}

fn open_once(mount: BorrowedFd<'_>, object: &ObjectId, flags: OFlags) -> Result<OwnedFd, Errno> {
    if matches!(object.tag(), ObjectId::TAG_INODE | ObjectId::TAG_FOREIGN) {
        return Err(Errno::INVAL);
    }
    let mut handle = RawHandle {
        bytes: object.body().len() as libc::c_uint,
        kind: libc::c_int::from(object.tag()),
        body: [0; OBJECT_ID_MAX - 1],
    };
    handle.body[..object.body().len()].copy_from_slice(object.body());
    let flags = flags | OFlags::CLOEXEC;
    // SAFETY: `handle` is a struct file_handle whose `bytes` says how many
    // bytes of `body` count; it outlives the call.
    let fd = unsafe {
        libc::syscall(
            libc::SYS_open_by_handle_at,
            mount.as_raw_fd(),
            &raw mut handle,
            flags.bits() as libc::c_int,
        )
    };
    if fd < 0 {
        return Err(last_errno());
    }
    // SAFETY: the call succeeded, so `fd` is a new descriptor that nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as libc::c_int) })
}

/// The id of an open object: its handle, or inode number and birth time where
/// the file system has no handles (then [`ObjectId::tag`] is
/// [`ObjectId::TAG_INODE`], and an id may in principle be reused).
pub fn identify(fd: BorrowedFd<'_>) -> Result<ObjectId, Errno> {
    match of_fd(fd) {
        Err(Errno::OPNOTSUPP | Errno::OVERFLOW) => Ok(from_stat(&stat::of_fd(fd)?)),
        result => result,
    }
}

/// [`identify`] for an entry, without opening it.
pub fn identify_entry(directory: BorrowedFd<'_>, name: &Name) -> Result<ObjectId, Errno> {
    match of_entry(directory, name) {
        Err(Errno::OPNOTSUPP | Errno::OVERFLOW) => Ok(from_stat(&stat::of_entry(directory, name)?)),
        result => result,
    }
}

fn from_stat(stat: &Stat) -> ObjectId {
    let mut body = [0; 24];
    body[..8].copy_from_slice(&stat.dev.to_le_bytes());
    body[8..16].copy_from_slice(&stat.ino.to_le_bytes());
    body[16..].copy_from_slice(&stat.btime.map_or(0, |t| t.0).to_le_bytes());
    ObjectId::new(ObjectId::TAG_INODE, &body).unwrap_or_else(|| unreachable!("25 bytes fit"))
}
