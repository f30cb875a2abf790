//! fanotify with file handles: a group, its marks, and a reader of its events.
//!
//! Init and mark are fanotify-rs's; its reader knows only the bare 24-byte
//! event of old, so events are parsed here. See `fanotify(7)`.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use ::fanotify::low_level;
use rustix::io::Errno;

use crate::id::ObjectId;
use crate::name::Name;
use crate::sys::{handle, proc_path};

/// `sizeof(struct fanotify_event_metadata)`.
const METADATA_LEN: usize = 24;
/// `FANOTIFY_METADATA_VERSION`.
const METADATA_VERSION: u8 = 3;
/// `sizeof(struct fanotify_event_info_header)`.
const INFO_HEADER_LEN: usize = 4;
/// `sizeof(__kernel_fsid_t)`.
const FSID_LEN: usize = 8;
/// `FILEID_INVALID`: what the kernel writes where it has no handle.
const HANDLE_INVALID: i32 = 0xff;

/// The bits of an event's mask, see `fanotify_mark(2)`.
pub mod bits {
    pub use libc::{
        FAN_ATTRIB as ATTRIB, FAN_CLOSE_WRITE as CLOSE_WRITE, FAN_CREATE as CREATE,
        FAN_DELETE as DELETE, FAN_DELETE_SELF as DELETE_SELF, FAN_EVENT_ON_CHILD as EVENT_ON_CHILD,
        FAN_FS_ERROR as FS_ERROR, FAN_MODIFY as MODIFY, FAN_MOVED_FROM as MOVED_FROM,
        FAN_MOVED_TO as MOVED_TO, FAN_ONDIR as ONDIR, FAN_Q_OVERFLOW as Q_OVERFLOW,
        FAN_RENAME as RENAME,
    };
}

/// How much of an event the kernel reports.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Detail {
    /// Directory, name and the entry's object for every event, both sides of a
    /// rename in one (since Linux 5.17).
    Target,
    /// Directory and name; the object for events on it, but not for changes of
    /// entries (since Linux 5.9).
    Name,
}

/// How many events may wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Queue {
    /// As many as memory holds.
    Unlimited,
    /// `fs.fanotify.max_queued_events`, by default 16,384; past it events are
    /// lost and one overflow event tells so.
    Limited,
}

/// A fanotify group: a queue of events and the marks that fill it.
#[derive(Debug)]
pub struct Group {
    fd: OwnedFd,
}

impl Group {
    /// A group without marks, not blocking.
    ///
    /// # Errors
    /// `EPERM` without `CAP_SYS_ADMIN` (for a limited queue only before Linux
    /// 5.13), `EINVAL` where the kernel is too old for `detail`, `ENOSYS` where
    /// it has no fanotify, `EMFILE` when the user has too many groups.
    pub fn new(detail: Detail, queue: Queue) -> Result<Self, Errno> {
        let detail = match detail {
            Detail::Target => libc::FAN_REPORT_DFID_NAME_TARGET,
            Detail::Name => libc::FAN_REPORT_DFID_NAME | libc::FAN_REPORT_FID,
        };
        let queue = match queue {
            Queue::Unlimited => libc::FAN_UNLIMITED_QUEUE,
            Queue::Limited => 0,
        };
        let behaviour = libc::FAN_CLASS_NOTIF | libc::FAN_CLOEXEC | libc::FAN_NONBLOCK;
        let flags = detail | queue | behaviour;
        let fd = low_level::fanotify_init(flags, libc::O_RDONLY as u32).map_err(errno)?;
        // SAFETY: the call succeeded, so `fd` is a new descriptor that nobody
        // else owns.
        Ok(Self { fd: unsafe { OwnedFd::from_raw_fd(fd) } })
    }

    /// Marks the whole file system that `directory` is on: `mask` ([`bits`]) of
    /// events anywhere in it, through whatever mount or namespace.
    ///
    /// # Errors
    /// `EXDEV` inside a btrfs subvolume, `EOPNOTSUPP` or `ENODEV` where the
    /// file system has no usable handles or id, `EINVAL` for events that the
    /// kernel does not know, `EPERM` without `CAP_SYS_ADMIN`.
    pub fn mark_file_system(&self, directory: BorrowedFd<'_>, mask: u64) -> Result<(), Errno> {
        let flags = libc::FAN_MARK_ADD | libc::FAN_MARK_FILESYSTEM | libc::FAN_MARK_ONLYDIR;
        low_level::fanotify_mark(self.fd.as_raw_fd(), flags, mask, directory.as_raw_fd(), ".")
            .map_err(errno)
    }

    /// Marks one directory: `mask` ([`bits`]) of events of it and of its
    /// entries. Needs no privilege (since Linux 5.13), only the right to read
    /// the directory. The mark follows the directory, and dies with it.
    ///
    /// # Errors
    /// `ENOSPC` when the user has too many marks (`fs.fanotify.max_user_marks`),
    /// `EXDEV`, `EOPNOTSUPP` or `ENODEV` where the file system has no usable
    /// handles or id, `EACCES` where the directory may not be read.
    pub fn mark_directory(&self, directory: BorrowedFd<'_>, mask: u64) -> Result<(), Errno> {
        let flags = libc::FAN_MARK_ADD | libc::FAN_MARK_ONLYDIR;
        low_level::fanotify_mark(self.fd.as_raw_fd(), flags, mask, directory.as_raw_fd(), ".")
            .map_err(errno)
    }

    /// Marks an object itself, by a descriptor (`O_PATH` will do): what is done
    /// to it under whatever name. Else as [`Self::mark_directory`].
    ///
    /// # Errors
    /// Those of [`Self::mark_directory`].
    pub fn mark_object(&self, object: BorrowedFd<'_>, mask: u64) -> Result<(), Errno> {
        let path = proc_path(object);
        let here = libc::AT_FDCWD;
        low_level::fanotify_mark(self.fd.as_raw_fd(), libc::FAN_MARK_ADD, mask, here, &path)
            .map_err(errno)
    }

    /// Takes the mark of a directory or an object away; `mask` as it was given.
    ///
    /// # Errors
    /// `ENOENT` when there is none.
    pub fn unmark_object(&self, object: BorrowedFd<'_>, mask: u64) -> Result<(), Errno> {
        let path = proc_path(object);
        let here = libc::AT_FDCWD;
        low_level::fanotify_mark(self.fd.as_raw_fd(), libc::FAN_MARK_REMOVE, mask, here, &path)
            .map_err(errno)
    }

    /// Takes all marks on directories and objects away. `directory` is any that
    /// can be opened.
    ///
    /// # Errors
    /// None in practice.
    pub fn unmark_all(&self, directory: BorrowedFd<'_>) -> Result<(), Errno> {
        let flags = libc::FAN_MARK_FLUSH;
        low_level::fanotify_mark(self.fd.as_raw_fd(), flags, 0, directory.as_raw_fd(), ".")
            .map_err(errno)
    }

    /// The number of marks that are alive. An unmount takes a mark away without
    /// an event; here it shows. Costs a small read under `/proc`.
    ///
    /// # Errors
    /// Those of reading `/proc/self/fdinfo`.
    pub fn marks(&self) -> Result<usize, Errno> {
        let path = proc_path(self.fd.as_fd()).replace("/fd/", "/fdinfo/");
        let text = std::fs::read_to_string(path).map_err(errno)?;
        Ok(text.lines().filter(|line| line.starts_with("fanotify sdev:")).count())
    }

    /// Takes a group over that was opened by a process before this one. Its
    /// flags and marks are what they were: see [`Self::description`].
    ///
    /// # Errors
    /// `EINVAL` when the descriptor is of something else; those of reading
    /// `/proc/self/fd`.
    pub fn from_fd(fd: OwnedFd) -> Result<Self, Errno> {
        let kind = std::fs::read_link(proc_path(fd.as_fd())).map_err(errno)?;
        if kind.as_os_str() != "anon_inode:[fanotify]" {
            return Err(Errno::INVAL);
        }
        Ok(Self { fd })
    }

    /// The descriptor alone: the group and its queue live for as long as it does.
    pub fn into_fd(self) -> OwnedFd {
        self.fd
    }

    /// What the kernel says of the group: a line of its flags, and one for each
    /// mark with the file system and the mask. Equal texts are equal groups, up
    /// to what is in the queue.
    ///
    /// # Errors
    /// Those of reading `/proc/self/fdinfo`.
    pub fn description(&self) -> Result<Vec<String>, Errno> {
        let path = proc_path(self.fd.as_fd()).replace("/fd/", "/fdinfo/");
        let text = std::fs::read_to_string(path).map_err(errno)?;
        let lines = text.lines().filter(|line| line.starts_with("fanotify "));
        Ok(lines.map(str::to_owned).collect())
    }

    /// The number of events in the queue, or somewhat more.
    ///
    /// `FIONREAD` counts 24 bytes an event, whatever its real length.
    ///
    /// # Errors
    /// None in practice.
    pub fn queued(&self) -> Result<u64, Errno> {
        Ok(rustix::io::ioctl_fionread(&self.fd)?.div_ceil(METADATA_LEN as u64))
    }

    /// Reads whole events, as many as are there and fit; hand the part of
    /// `buffer` that was filled to [`parse`]. 4 KiB hold any single event.
    ///
    /// # Errors
    /// `EAGAIN` when there is none.
    pub fn read(&self, buffer: &mut [u8]) -> Result<usize, Errno> {
        rustix::io::retry_on_intr(|| rustix::io::read(&self.fd, &mut *buffer))
    }
}

impl AsFd for Group {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

fn errno(error: std::io::Error) -> Errno {
    Errno::from_io_error(&error).unwrap_or(Errno::IO)
}

/// A directory and a name in it. The name is absent for what happened to the
/// directory itself (the kernel writes `.`), and for one that no entry can have.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// The directory.
    pub directory: ObjectId,
    /// The name.
    pub name: Option<Name>,
}

/// One event, perhaps several merged into one.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Event {
    /// What happened, [`bits`].
    pub mask: u64,
    /// Who did it, as this process's PID namespace knows it; else 0.
    pub pid: i32,
    /// Where it happened, or was reached through; not for renames.
    pub place: Option<Place>,
    /// Of a rename: where it was.
    pub old: Option<Place>,
    /// Of a rename: where it is now.
    pub new: Option<Place>,
    /// The object concerned.
    pub target: Option<ObjectId>,
    /// Of [`bits::FS_ERROR`]: the file system's error number.
    pub error: Option<i32>,
}

impl Event {
    /// Whether any of these [`bits`] are set.
    pub fn is(&self, mask: u64) -> bool {
        self.mask & mask != 0
    }

    /// Whether events were lost at this place of the queue.
    pub fn is_overflow(&self) -> bool {
        self.is(bits::Q_OVERFLOW)
    }
}

/// The bytes are not what `fanotify(7)` describes. The kernel never writes
/// such; should it, then events are lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("unreadable fanotify event: {0}")]
pub struct Malformed(pub &'static str);

/// The events in what [`Group::read`] gave. The first malformed one ends the
/// iteration.
pub fn parse(bytes: &[u8]) -> Events<'_> {
    Events { bytes }
}

/// See [`parse`].
#[derive(Clone, Debug)]
pub struct Events<'a> {
    bytes: &'a [u8],
}

impl Iterator for Events<'_> {
    type Item = Result<Event, Malformed>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.bytes.is_empty() {
            return None;
        }
        let result = take_event(&mut self.bytes);
        if result.is_err() {
            self.bytes = &[];
        }
        Some(result)
    }
}

fn take_event(bytes: &mut &[u8]) -> Result<Event, Malformed> {
    let mut head = Fields(bytes);
    let length = head.u32()? as usize;
    let [version, _reserved] = head.array()?;
    let metadata_length = usize::from(u16::from_ne_bytes(head.array()?));
    if version != METADATA_VERSION {
        return Err(Malformed("unknown version"));
    }
    if metadata_length < METADATA_LEN || length < metadata_length {
        return Err(Malformed("wrong length"));
    }
    let (event, rest) = bytes.split_at_checked(length).ok_or(Malformed("cut short"))?;
    let mask = u64::from_ne_bytes(head.array()?);
    let _fd: [u8; 4] = head.array()?;
    let pid = head.i32()?;
    *bytes = rest;
    let mut event_out = Event { mask, pid, ..Event::default() };
    let mut records = event.get(metadata_length..).ok_or(Malformed("wrong length"))?;
    while !records.is_empty() {
        take_record(&mut records, &mut event_out)?;
    }
    Ok(event_out)
}

/// One information record. Kinds that are not known are passed over.
fn take_record(bytes: &mut &[u8], event: &mut Event) -> Result<(), Malformed> {
    let mut head = Fields(bytes);
    let [kind, _pad] = head.array()?;
    let length = usize::from(u16::from_ne_bytes(head.array()?));
    if length < INFO_HEADER_LEN {
        return Err(Malformed("wrong record length"));
    }
    let (record, rest) = bytes.split_at_checked(length).ok_or(Malformed("record cut short"))?;
    *bytes = rest;
    let mut body = Fields(record.get(INFO_HEADER_LEN..).unwrap_or_default());
    match kind {
        libc::FAN_EVENT_INFO_TYPE_FID => event.target = body.handle()?,
        libc::FAN_EVENT_INFO_TYPE_DFID | libc::FAN_EVENT_INFO_TYPE_DFID_NAME => {
            event.place = body.place()?;
        }
        libc::FAN_EVENT_INFO_TYPE_OLD_DFID_NAME => event.old = body.place()?,
        libc::FAN_EVENT_INFO_TYPE_NEW_DFID_NAME => event.new = body.place()?,
        libc::FAN_EVENT_INFO_TYPE_ERROR => event.error = Some(body.i32()?),
        _ => {}
    }
    Ok(())
}

/// Takes fields off the front of a record, in the machine's byte order.
struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    fn bytes(&mut self, count: usize) -> Result<&[u8], Malformed> {
        let (taken, rest) = self.0.split_at_checked(count).ok_or(Malformed("field cut short"))?;
        self.0 = rest;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], Malformed> {
        let (taken, rest) = self.0.split_first_chunk().ok_or(Malformed("field cut short"))?;
        self.0 = rest;
        Ok(*taken)
    }

    fn u32(&mut self) -> Result<u32, Malformed> {
        Ok(u32::from_ne_bytes(self.array()?))
    }

    fn i32(&mut self) -> Result<i32, Malformed> {
        Ok(i32::from_ne_bytes(self.array()?))
    }

    /// `fsid`, then `struct file_handle`. `None` where the kernel had none.
    fn handle(&mut self) -> Result<Option<ObjectId>, Malformed> {
        let [..] = self.array::<FSID_LEN>()?;
        let length = self.u32()? as usize;
        let kind = self.i32()?;
        let body = self.bytes(length)?;
        if kind == HANDLE_INVALID || body.is_empty() {
            return Ok(None);
        }
        handle::from_kernel(kind, body).map(Some).ok_or(Malformed("handle too long"))
    }

    /// A handle, then a name that ends with NUL and is padded with more.
    fn place(&mut self) -> Result<Option<Place>, Malformed> {
        let Some(directory) = self.handle()? else {
            return Ok(None);
        };
        let name = self.0.split(|b| *b == 0).next().unwrap_or_default();
        Ok(Some(Place { directory, name: Name::new(name).ok() }))
    }
}

#[cfg(test)]
mod tests;
