//! Mounts: private clones, read-only binds, `/proc/thread-self/mountinfo`, the
//! kind of file system, capabilities.

use std::borrow::Cow;
use std::ffi::OsString;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::fs::{CWD, Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags, OpenTreeFlags, UnmountFlags,
};
pub use rustix::thread::CapabilitySet;

use crate::sys::stat;

/// A private copy of the mount that `path` stands on, rooted at `path` and
/// attached nowhere: nobody but the holder of the descriptor can reach it. It
/// lives as long as the descriptor (or one opened through it). Mounts below
/// `path` are not copied.
///
/// The copy is taken out of its peer group, so that later mounts over the
/// original do not propagate into it.
///
/// # Errors
/// `EPERM` without `CAP_SYS_ADMIN`, `ENOSYS` before Linux 5.12.
pub fn clone_tree(path: &Path) -> Result<OwnedFd, Errno> {
    crate::fault::at("mount", "clone_tree")?;
    clone(CWD, path, OpenTreeFlags::empty())
}

/// [`clone_tree`] for a directory that is open (`O_PATH` will do).
///
/// # Errors
/// As [`clone_tree`].
pub fn clone_tree_at(directory: BorrowedFd<'_>) -> Result<OwnedFd, Errno> {
    clone(directory, Path::new(""), OpenTreeFlags::AT_EMPTY_PATH)
}

fn clone(at: BorrowedFd<'_>, path: &Path, flags: OpenTreeFlags) -> Result<OwnedFd, Errno> {
    let flags = flags | OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    let tree = rustix::mount::open_tree(at, path, flags)?;
    set_attributes(tree.as_fd(), &attributes(0, 0, libc::MS_PRIVATE))?;
    Ok(tree)
}

/// The top level (`subvolid=5`) of the btrfs on `device`, mounted read-only and
/// attached nowhere, as an open directory. All subvolumes are below it.
///
/// `read_only_device` must say whether the file system is read-only as a whole:
/// btrfs would try to change that to what this mount asks for.
///
/// # Errors
/// `EPERM` without `CAP_SYS_ADMIN`, `ENOENT` when the device cannot be reached
/// from here, `ENOSYS` before Linux 5.2.
pub fn btrfs_top(device: &Path, read_only_device: bool) -> Result<OwnedFd, Errno> {
    let context = rustix::mount::fsopen("btrfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
    rustix::mount::fsconfig_set_string(context.as_fd(), "source", device)?;
    rustix::mount::fsconfig_set_string(context.as_fd(), "subvolid", "5")?;
    if read_only_device {
        rustix::mount::fsconfig_set_flag(context.as_fd(), "ro")?;
    }
    rustix::mount::fsconfig_create(context.as_fd())?;
    let attributes = MountAttrFlags::MOUNT_ATTR_RDONLY;
    let mount = rustix::mount::fsmount(context.as_fd(), FsMountFlags::FSMOUNT_CLOEXEC, attributes)?;
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    rustix::fs::openat(mount, ".", flags, Mode::empty())
}

/// Makes the mount whose root `mount` refers to (a clone, or a mount point's
/// top mount; `O_PATH` will do) read-only or writable. Concerns this mount
/// alone: other mounts of the same file system stay as they are.
///
/// # Errors
/// `EBUSY` when it is to become read-only and has files open for writing,
/// `EINVAL` when `mount` is not the root of a mount, `EPERM` without
/// `CAP_SYS_ADMIN`.
pub fn set_read_only(mount: BorrowedFd<'_>, read_only: bool) -> Result<(), Errno> {
    crate::fault::at("mount", "set_read_only")?;
    let flag = libc::MOUNT_ATTR_RDONLY;
    let (set, clear) = if read_only { (flag, 0) } else { (0, flag) };
    set_attributes(mount, &attributes(set, clear, 0))
}

/// `propagation` 0 leaves it as it is.
fn attributes(set: u64, clear: u64, propagation: u64) -> libc::mount_attr {
    libc::mount_attr { attr_set: set, attr_clr: clear, propagation, userns_fd: 0 }
}

fn set_attributes(mount: BorrowedFd<'_>, attributes: &libc::mount_attr) -> Result<(), Errno> {
    // SAFETY: the path is an empty, NUL-terminated string; `attributes` is a
    // struct mount_attr whose size is passed with it; both outlive the call,
    // which only reads them.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            std::ptr::from_ref(attributes),
            size_of::<libc::mount_attr>(),
        )
    };
    if result == 0 { Ok(()) } else { Err(super::last_errno()) }
}

/// Attaches a clone on top of `path`, where everybody sees it.
///
/// # Errors
/// `EPERM` without `CAP_SYS_ADMIN`, `ENOENT` when there is no such path.
pub fn move_mount(clone: BorrowedFd<'_>, path: &Path) -> Result<(), Errno> {
    crate::fault::at("mount", "move_mount")?;
    rustix::mount::move_mount(clone, c"", CWD, path, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)
}

/// Removes the top mount of `path`, if nobody uses it and nothing is mounted
/// below it. A symbolic link is not followed.
///
/// # Errors
/// `EBUSY` when it is in use, `EINVAL` when `path` is not a mount point.
pub fn unmount(path: &Path) -> Result<(), Errno> {
    crate::fault::at("mount", "unmount")?;
    rustix::mount::unmount(path, UnmountFlags::NOFOLLOW)
}

/// Removes the top mount of `path`, and whatever is mounted below it, from
/// sight at once (`MNT_DETACH`). Who has a file or a directory of it open keeps
/// it until then.
///
/// # Errors
/// `EINVAL` when `path` is not a mount point.
pub fn detach(path: &Path) -> Result<(), Errno> {
    rustix::mount::unmount(path, UnmountFlags::NOFOLLOW | UnmountFlags::DETACH)
}

/// One line of mountinfo, see `proc_pid_mountinfo(5)`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mount {
    /// Its id, unique among the mounts of the moment.
    pub id: u64,
    /// The mount it stands on.
    pub parent: u64,
    /// Device number of the file system, major and minor. Those of btrfs do
    /// not agree with `st_dev`.
    pub device: (u32, u32),
    /// Which directory of the file system is the mount's root.
    pub root: PathBuf,
    /// Where it is mounted, as seen from the process's root.
    pub mount_point: PathBuf,
    /// The mount is read-only (the file system may not be).
    pub read_only: bool,
    /// The file system as a whole is read-only.
    pub file_system_read_only: bool,
    /// The file system's type as the kernel calls it.
    pub kind: String,
    /// What was mounted: a device, a server …
    pub source: PathBuf,
}

/// All mounts of the calling thread's mount namespace; those stacked on one
/// mount point in the order of mounting.
///
/// # Errors
/// Those of opening and reading the file under `/proc`.
pub fn list() -> Result<Vec<Mount>, Errno> {
    // Not /proc/self: that is the namespace of the process's first thread.
    list_from("/proc/thread-self/mountinfo")
}

/// [`list`] for the namespace of process 1: what the rest of the host (or of
/// the container) sees.
///
/// # Errors
/// As [`list`], and `EACCES` without the right to look at that process.
pub fn list_of_init() -> Result<Vec<Mount>, Errno> {
    list_from("/proc/1/mountinfo")
}

fn list_from(path: &str) -> Result<Vec<Mount>, Errno> {
    let text =
        std::fs::read(path).map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO))?;
    Ok(parse(&text))
}

/// Tells whether mounts have changed, for the price of one system call.
#[derive(Debug)]
pub struct Changes(Vec<OwnedFd>);

impl Changes {
    /// From now on: those of the calling thread's mount namespace, and of process 1's as
    /// far as this process may look at them.
    ///
    /// # Errors
    /// Those of opening the file under `/proc`.
    pub fn watch() -> Result<Self, Errno> {
        let open = |path| rustix::fs::open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty());
        let own = open("/proc/thread-self/mountinfo")?;
        Ok(Self([own].into_iter().chain(open("/proc/1/mountinfo").ok()).collect()))
    }

    /// Whether something was mounted, unmounted or set otherwise since; says so once.
    ///
    /// # Errors
    /// Those of `poll(2)`.
    pub fn any(&self) -> Result<bool, Errno> {
        let mut files: Vec<_> =
            self.0.iter().map(|file| PollFd::new(file, PollFlags::PRI)).collect();
        let at_once = Timespec { tv_sec: 0, tv_nsec: 0 };
        Ok(rustix::event::poll(&mut files, Some(&at_once))? > 0)
    }
}

/// Whether the calling thread has the mount namespace of process 1.
///
/// # Errors
/// `EACCES` without the right to look at that process.
pub fn in_namespace_of_init() -> Result<bool, Errno> {
    let namespace = |path| rustix::fs::readlink(path, Vec::new());
    Ok(namespace("/proc/thread-self/ns/mnt")? == namespace("/proc/1/ns/mnt")?)
}

/// The mount through which `fd` was opened (`O_PATH` will do).
///
/// # Errors
/// `ENOENT` for a mount that is attached nowhere, or in another namespace.
pub fn of_fd(fd: impl AsFd) -> Result<Mount, Errno> {
    let id = stat::of_fd(fd)?.mount_id;
    list()?.into_iter().find(|mount| mount.id == id).ok_or(Errno::NOENT)
}

/// Lines that do not look as expected are left out.
fn parse(text: &[u8]) -> Vec<Mount> {
    text.split(|b| *b == b'\n').filter_map(parse_line).collect()
}

fn parse_line(line: &[u8]) -> Option<Mount> {
    let mut fields = line.split(|b| *b == b' ');
    let id = number(fields.next()?)?;
    let parent = number(fields.next()?)?;
    let mut device = fields.next()?.splitn(2, |b| *b == b':');
    let device = (number(device.next()?)?, number(device.next()?)?);
    let root = path(fields.next()?);
    let mount_point = path(fields.next()?);
    let read_only = has_option(fields.next()?, b"ro");
    // Optional fields, any number, end with a lone hyphen.
    fields.by_ref().find(|field| *field == b"-")?;
    let kind = String::from_utf8_lossy(&unescape(fields.next()?)).into_owned();
    let source = path(fields.next()?);
    let file_system_read_only = has_option(fields.next()?, b"ro");
    Some(Mount {
        id,
        parent,
        device,
        root,
        mount_point,
        read_only,
        file_system_read_only,
        kind,
        source,
    })
}

fn number<T: std::str::FromStr>(field: &[u8]) -> Option<T> {
    std::str::from_utf8(field).ok()?.parse().ok()
}

fn has_option(options: &[u8], wanted: &[u8]) -> bool {
    options.split(|b| *b == b',').any(|option| option == wanted)
}

fn path(field: &[u8]) -> PathBuf {
    OsString::from_vec(unescape(field)).into()
}

/// The kernel writes space, tab, newline, backslash and `#` as `\` and three
/// octal digits.
fn unescape(field: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&first, tail)) = rest.split_first() {
        match (first, tail) {
            (b'\\', &[a @ b'0'..=b'3', b @ b'0'..=b'7', c @ b'0'..=b'7', ref after @ ..]) => {
                out.push((a - b'0') << 6 | (b - b'0') << 3 | (c - b'0'));
                rest = after;
            }
            _ => {
                out.push(first);
                rest = tail;
            }
        }
    }
    out
}

/// The kind of file system of an open descriptor, by `statfs`: `ext4` (which
/// stands for ext2 and ext3 too: they share a number), `xfs`, `btrfs`, `tmpfs`,
/// `nfs`, `cifs`, `fuse`, `overlay` …, or the number in hexadecimal.
///
/// # Errors
/// Those of `fstatfs(2)`.
pub fn file_system_kind(fd: impl AsFd) -> Result<Cow<'static, str>, Errno> {
    // Some architectures sign-extend the number.
    let magic = rustix::fs::fstatfs(fd)?.f_type as u32;
    Ok(match magic {
        0xef53 => "ext4".into(),
        0x5846_5342 => "xfs".into(),
        0x9123_683e => "btrfs".into(),
        0x0102_1994 => "tmpfs".into(),
        0x8584_58f6 => "ramfs".into(),
        0xf2f5_2010 => "f2fs".into(),
        0xca45_1a4e => "bcachefs".into(),
        0x2fc1_2fc1 => "zfs".into(),
        0x6969 => "nfs".into(),
        0xff53_4d42 => "cifs".into(),
        0xfe53_4d42 => "smb2".into(),
        0x517b => "smb".into(),
        0x6573_5546 => "fuse".into(),
        0x794c_7630 => "overlay".into(),
        0x0102_1997 => "9p".into(),
        0x00c3_6400 => "ceph".into(),
        0x5346_414f | 0x6b41_4653 => "afs".into(),
        0x7375_7245 => "coda".into(),
        0x0116_1970 => "gfs2".into(),
        0x7461_636f => "ocfs2".into(),
        0x0bd0_0bd0 => "lustre".into(),
        0x4750_4653 => "gpfs".into(),
        0xaad7_aaea => "panfs".into(),
        0x786f_4256 => "vboxsf".into(),
        0xf15f => "ecryptfs".into(),
        0x4d44 => "vfat".into(),
        0x2011_bab0 => "exfat".into(),
        0x7366_746e => "ntfs3".into(),
        0x7371_7368 => "squashfs".into(),
        0xe0f5_e1e2 => "erofs".into(),
        0x9660 => "iso9660".into(),
        other => format!("{other:#x}").into(),
    })
}

/// Whether the calling thread has a capability in effect.
///
/// # Errors
/// Those of `capget(2)`; none in practice.
pub fn has_capability(capability: CapabilitySet) -> Result<bool, Errno> {
    Ok(rustix::thread::capabilities(None)?.effective.contains(capability))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn mountinfo_is_read_as_documented() {
        let text = b"36 35 98:0 /mnt1 /mnt\\0402\\134x rw,noatime master:1 shared:2 - ext3 /dev/root ro,errors=continue\n\
            rubbish\n\
            37 36 0:30 / /a ro,nosuid - fuse.sshfs user@host:/ rw\n";
        let mounts = parse(text);
        assert_eq!(mounts.len(), 2);
        assert_eq!(mounts[0].mount_point, Path::new("/mnt 2\\x"));
        assert_eq!((mounts[0].id, mounts[0].parent, mounts[0].device), (36, 35, (98, 0)));
        assert!(!mounts[0].read_only && mounts[0].file_system_read_only);
        assert_eq!(mounts[0].root, Path::new("/mnt1"));
        assert!(mounts[1].read_only && !mounts[1].file_system_read_only);
        assert_eq!(mounts[1].kind, "fuse.sshfs");
    }

    proptest! {
        #[test]
        fn mountinfo_of_any_bytes_does_not_panic(bytes: Vec<u8>) {
            parse(&bytes);
            unescape(&bytes);
        }
    }

    #[test]
    fn the_root_is_a_mount_of_a_known_kind() {
        let proc = rustix::fs::open("/proc", OFlags::PATH, Mode::empty()).unwrap();
        let mount = of_fd(&proc).unwrap();
        assert_eq!(
            (mount.mount_point.as_path(), mount.kind.as_str()),
            (Path::new("/proc"), "proc")
        );
        let shm = rustix::fs::open("/dev/shm", OFlags::PATH, Mode::empty()).unwrap();
        assert_eq!(file_system_kind(&shm).unwrap(), "tmpfs");
    }

    #[test]
    fn a_clone_is_changed_alone() {
        if !has_capability(CapabilitySet::SYS_ADMIN).unwrap() {
            return;
        }
        let directory = tempfile::tempdir().unwrap();
        let clone = clone_tree(directory.path()).unwrap();
        set_read_only(clone.as_fd(), true).unwrap();
        let flags = OFlags::CREATE | OFlags::WRONLY;
        let create = |at: BorrowedFd<'_>| rustix::fs::openat(at, "f", flags, Mode::RUSR);
        assert_eq!(create(clone.as_fd()).unwrap_err(), Errno::ROFS);
        std::fs::write(directory.path().join("seen"), "").unwrap();
        assert!(rustix::fs::statat(&clone, "seen", rustix::fs::AtFlags::empty()).is_ok());
        set_read_only(clone.as_fd(), false).unwrap();
        assert!(create(clone.as_fd()).is_ok());
        assert_eq!(of_fd(&clone).unwrap_err(), Errno::NOENT);
    }
}
