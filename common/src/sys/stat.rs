//! `statx(2)`.

use std::os::fd::{AsFd, BorrowedFd};

use rustix::fs::{AtFlags, StatxFlags};
use rustix::io::Errno;

use crate::name::Name;
use crate::object::Kind;
use crate::time::Timestamp;

/// What `statx` tells of an object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stat {
    /// What it is.
    pub kind: Kind,
    /// Permission bits with setuid, setgid, sticky.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Entries that refer to it.
    pub nlink: u32,
    /// Bytes.
    pub size: u64,
    /// Blocks of 512 bytes that are allocated.
    pub blocks: u64,
    /// Last modification.
    pub mtime: Timestamp,
    /// Last change.
    pub ctime: Timestamp,
    /// Birth, where the file system keeps it.
    pub btime: Option<Timestamp>,
    /// Device number of a device node (`makedev`), else 0.
    pub rdev: u64,
    /// Device number of the file system.
    pub dev: u64,
    /// Inode number.
    pub ino: u64,
    /// The mount it was reached through (`STATX_MNT_ID`), 0 where not told.
    pub mount_id: u64,
}

/// Of an open descriptor (`O_PATH` will do).
pub fn of_fd(fd: impl AsFd) -> Result<Stat, Errno> {
    convert(rustix::fs::statx(fd.as_fd(), c"", AtFlags::EMPTY_PATH, mask())?)
}

/// Of an entry; a symbolic link's own. Does not trigger automounts.
pub fn of_entry(directory: BorrowedFd<'_>, name: &Name) -> Result<Stat, Errno> {
    let flags = AtFlags::SYMLINK_NOFOLLOW | AtFlags::NO_AUTOMOUNT;
    convert(rustix::fs::statx(directory, name.as_bytes(), flags, mask())?)
}

fn mask() -> StatxFlags {
    StatxFlags::BASIC_STATS | StatxFlags::BTIME | StatxFlags::MNT_ID
}

fn convert(raw: rustix::fs::Statx) -> Result<Stat, Errno> {
    let mode = u32::from(raw.stx_mode);
    let has = |flag: StatxFlags| raw.stx_mask & flag.bits() != 0;
    Ok(Stat {
        kind: Kind::from_mode(mode).ok_or(Errno::IO)?,
        mode: mode & 0o7777,
        uid: raw.stx_uid,
        gid: raw.stx_gid,
        nlink: raw.stx_nlink,
        size: raw.stx_size,
        blocks: raw.stx_blocks,
        mtime: moment(raw.stx_mtime),
        ctime: moment(raw.stx_ctime),
        btime: has(StatxFlags::BTIME).then(|| moment(raw.stx_btime)),
        rdev: libc::makedev(raw.stx_rdev_major, raw.stx_rdev_minor),
        dev: libc::makedev(raw.stx_dev_major, raw.stx_dev_minor),
        ino: raw.stx_ino,
        mount_id: if has(StatxFlags::MNT_ID) { raw.stx_mnt_id } else { 0 },
    })
}

fn moment(time: rustix::fs::StatxTimestamp) -> Timestamp {
    Timestamp(time.tv_sec.saturating_mul(1_000_000_000).saturating_add(i64::from(time.tv_nsec)))
}
