//! Making, moving and filling objects below directory descriptors.
//!
//! Every call takes a directory descriptor and one [`Name`], or a descriptor of
//! the very object (`O_PATH` will do unless a function says otherwise), and
//! none follows a symbolic link. So nothing here can leave the directory that
//! the caller has opened.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::fs::{
    AtFlags, FallocateFlags, FileType, Gid, Mode, OFlags, RenameFlags, SeekFrom, Timespec,
    Timestamps, Uid,
};
use rustix::io::Errno;

use crate::fault;
use crate::name::Name;
use crate::object::Kind;
use crate::pulse;
use crate::sys::proc_path;
use crate::time::Timestamp;

/// A descriptor of `name` in `directory` that stands for the object alone
/// (`O_PATH`), a symbolic link's own included.
pub fn open_path(directory: BorrowedFd<'_>, name: &Name) -> Result<OwnedFd, Errno> {
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    rustix::fs::openat(directory, name.as_bytes(), flags, Mode::empty())
}

/// A directory, for at-calls and listing alike.
pub fn open_directory(directory: BorrowedFd<'_>, name: &Name) -> Result<OwnedFd, Errno> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    rustix::fs::openat(directory, name.as_bytes(), flags, Mode::empty())
}

/// A directory by path, links followed: only for paths that the operator gave.
pub fn open_directory_path(path: &Path) -> Result<OwnedFd, Errno> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    rustix::fs::open(path, flags, Mode::empty())
}

/// The directory that holds `directory`; at the root of a mount (or of a
/// detached clone of one) the directory itself.
pub fn open_parent(directory: BorrowedFd<'_>) -> Result<OwnedFd, Errno> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    rustix::fs::openat(directory, c"..", flags, Mode::empty())
}

/// Opens an existing regular file. `O_NONBLOCK` keeps a FIFO that stands there
/// by mistake from blocking.
pub fn open_file(directory: BorrowedFd<'_>, name: &Name, flags: OFlags) -> Result<OwnedFd, Errno> {
    fault::at("open", name)?;
    let flags = flags | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    rustix::fs::openat(directory, name.as_bytes(), flags, Mode::empty())
}

/// Makes a regular file, mode 0600, that did not exist, open for reading and
/// writing.
pub fn create_file(directory: BorrowedFd<'_>, name: &Name) -> Result<OwnedFd, Errno> {
    create_file_with(directory, name, 0o600)
}

/// [`create_file`] with the permission bits of `mode`, less the process' umask:
/// mostly saves setting them afterwards. Only for directories that nobody else
/// can enter. The descriptor can write whatever the mode.
pub fn create_file_with(
    directory: BorrowedFd<'_>,
    name: &Name,
    mode: u32,
) -> Result<OwnedFd, Errno> {
    fault::at("create", name)?;
    let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    rustix::fs::openat(directory, name.as_bytes(), flags, Mode::from_raw_mode(mode & 0o777))
}

/// A real descriptor from any descriptor of the object: what `O_PATH` lacks.
pub fn reopen(fd: BorrowedFd<'_>, flags: OFlags) -> Result<OwnedFd, Errno> {
    fault::at("open", "")?;
    rustix::fs::open(proc_path(fd), flags | OFlags::CLOEXEC, Mode::empty())
}

/// Makes a directory, mode 0700.
pub fn make_directory(directory: BorrowedFd<'_>, name: &Name) -> Result<(), Errno> {
    fault::at("mkdir", name)?;
    rustix::fs::mkdirat(directory, name.as_bytes(), Mode::RWXU)
}

/// Makes a symbolic link. The target is stored, never followed.
pub fn make_symlink(target: &[u8], directory: BorrowedFd<'_>, name: &Name) -> Result<(), Errno> {
    fault::at("symlink", name)?;
    rustix::fs::symlinkat(target, directory, name.as_bytes())
}

/// Makes a device node, mode 0600; other kinds give `EINVAL`.
pub fn make_device(
    directory: BorrowedFd<'_>,
    name: &Name,
    kind: Kind,
    rdev: u64,
) -> Result<(), Errno> {
    fault::at("mknod", name)?;
    let kind = match kind {
        Kind::BlockDevice => FileType::BlockDevice,
        Kind::CharDevice => FileType::CharacterDevice,
        _ => return Err(Errno::INVAL),
    };
    rustix::fs::mknodat(directory, name.as_bytes(), kind, Mode::RUSR | Mode::WUSR, rdev)
}

/// A symbolic link's target.
pub fn read_link(directory: BorrowedFd<'_>, name: &Name) -> Result<Vec<u8>, Errno> {
    rustix::fs::readlinkat(directory, name.as_bytes(), Vec::new()).map(|t| t.into_bytes())
}

/// Renames, replacing what stands at the new place if it may be replaced.
pub fn rename(
    from: BorrowedFd<'_>,
    name: &Name,
    to: BorrowedFd<'_>,
    new: &Name,
) -> Result<(), Errno> {
    fault::at("rename", new)?;
    rustix::fs::renameat(from, name.as_bytes(), to, new.as_bytes())
}

/// Renames only to a free place: else `EEXIST`. `EINVAL` where the file system
/// cannot promise that.
pub fn rename_no_replace(
    from: BorrowedFd<'_>,
    name: &Name,
    to: BorrowedFd<'_>,
    new: &Name,
) -> Result<(), Errno> {
    fault::at("rename", new)?;
    rustix::fs::renameat_with(from, name.as_bytes(), to, new.as_bytes(), RenameFlags::NOREPLACE)
}

/// Gives the object behind a descriptor one more name. Goes through
/// `/proc/self/fd`, for which no capability is needed.
pub fn link(object: BorrowedFd<'_>, to: BorrowedFd<'_>, new: &Name) -> Result<(), Errno> {
    fault::at("link", new)?;
    let from = proc_path(object);
    rustix::fs::linkat(rustix::fs::CWD, from, to, new.as_bytes(), AtFlags::SYMLINK_FOLLOW)
}

/// Removes a name of anything but a directory.
pub fn unlink(directory: BorrowedFd<'_>, name: &Name) -> Result<(), Errno> {
    fault::at("unlink", name)?;
    rustix::fs::unlinkat(directory, name.as_bytes(), AtFlags::empty())
}

/// Removes an empty directory.
pub fn remove_directory(directory: BorrowedFd<'_>, name: &Name) -> Result<(), Errno> {
    fault::at("rmdir", name)?;
    rustix::fs::unlinkat(directory, name.as_bytes(), AtFlags::REMOVEDIR)
}

/// Names in a directory (a real descriptor), without `.` and `..`, with the
/// kind where the file system tells it in passing. Starts over at each call.
pub fn list(directory: BorrowedFd<'_>) -> Result<Vec<(Name, Option<Kind>)>, Errno> {
    // A new descriptor: the read position belongs to the open description.
    let own = rustix::fs::openat(
        directory,
        c".",
        OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
    )?;
    let mut names = Vec::new();
    for entry in rustix::fs::Dir::new(own)? {
        let entry = entry?;
        if let Ok(name) = Name::new(entry.file_name().to_bytes()) {
            names.push((name, Kind::from_mode(entry.file_type().as_raw_mode())));
        }
    }
    Ok(names)
}

/// Sets owner and group. `EINVAL` for the id that nobody has: the kernel would
/// take it for "leave it as it is".
pub fn set_owner(fd: BorrowedFd<'_>, uid: u32, gid: u32) -> Result<(), Errno> {
    fault::at("chown", "")?;
    if uid == u32::MAX || gid == u32::MAX {
        return Err(Errno::INVAL);
    }
    let (uid, gid) = (Uid::from_raw(uid), Gid::from_raw(gid));
    rustix::fs::chownat(fd, c"", Some(uid), Some(gid), AtFlags::EMPTY_PATH)
}

/// Sets permission bits (`07777`). Symbolic links have none: `EOPNOTSUPP`.
pub fn set_mode(fd: BorrowedFd<'_>, mode: u32) -> Result<(), Errno> {
    fault::at("chmod", "")?;
    let mode = Mode::from_raw_mode(mode & 0o7777);
    match rustix::fs::fchmod(fd, mode) {
        // `O_PATH`.
        Err(Errno::BADF) => rustix::fs::chmod(proc_path(fd), mode),
        result => result,
    }
}

/// Sets the time of last modification; the time of last access stays.
pub fn set_mtime(fd: BorrowedFd<'_>, mtime: Timestamp) -> Result<(), Errno> {
    fault::at("utimens", "")?;
    let times = Timestamps {
        last_access: Timespec { tv_sec: 0, tv_nsec: rustix::fs::UTIME_OMIT },
        last_modification: Timespec {
            tv_sec: mtime.0.div_euclid(1_000_000_000),
            tv_nsec: mtime.0.rem_euclid(1_000_000_000) as _,
        },
    };
    rustix::fs::utimensat(fd, c"", &times, AtFlags::EMPTY_PATH)
}

/// Writes all of `bytes` at `offset` of a file open for writing.
pub fn write_at(fd: impl AsFd, mut bytes: &[u8], mut offset: u64) -> Result<(), Errno> {
    fault::at("write", "")?;
    while !bytes.is_empty() {
        match rustix::io::pwrite(fd.as_fd(), bytes, offset) {
            Ok(0) => return Err(Errno::IO),
            Ok(written) => {
                bytes = &bytes[written..];
                offset += written as u64;
            }
            Err(Errno::INTR) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Reads at `offset` until `buffer` is full or the file ends.
pub fn read_at(fd: impl AsFd, buffer: &mut [u8], offset: u64) -> Result<usize, Errno> {
    let mut filled = 0;
    while filled < buffer.len() {
        match rustix::io::pread(fd.as_fd(), &mut buffer[filled..], offset + filled as u64) {
            Ok(0) => break,
            Ok(read) => filled += read,
            Err(Errno::INTR) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(filled)
}

/// Copies a run of bytes between two files of one file system, by reference
/// where that works. Returns the bytes copied: fewer when the source ends.
pub fn copy_range(
    from: impl AsFd,
    mut from_offset: u64,
    to: impl AsFd,
    mut to_offset: u64,
    length: u64,
) -> Result<u64, Errno> {
    fault::at("copy", "")?;
    let mut left = length;
    let mut by_hand = false;
    while left > 0 {
        pulse::beat();
        let want = usize::try_from(left.min(1 << 30)).unwrap_or(1 << 30);
        let copied = if by_hand {
            let mut buffer = vec![0; want.min(1 << 20)];
            let read = read_at(from.as_fd(), &mut buffer, from_offset)?;
            write_at(to.as_fd(), &buffer[..read], to_offset)?;
            from_offset += read as u64;
            to_offset += read as u64;
            read
        } else {
            let (from, to) = (from.as_fd(), to.as_fd());
            match rustix::fs::copy_file_range(
                from,
                Some(&mut from_offset),
                to,
                Some(&mut to_offset),
                want,
            ) {
                Ok(copied) => copied,
                Err(Errno::INTR) => continue,
                Err(Errno::OPNOTSUPP | Errno::XDEV | Errno::INVAL | Errno::NOSYS) => {
                    by_hand = true;
                    continue;
                }
                Err(error) => return Err(error),
            }
        };
        if copied == 0 {
            break;
        }
        left -= copied as u64;
    }
    Ok(length - left)
}

/// Makes a run of a file a hole; its size stays. Where the file system has no
/// holes, zeros are written instead.
pub fn punch(fd: impl AsFd, offset: u64, length: u64) -> Result<(), Errno> {
    fault::at("punch", "")?;
    let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    match rustix::fs::fallocate(fd.as_fd(), flags, offset, length) {
        Err(Errno::OPNOTSUPP | Errno::NOSYS) => {
            let zeros = vec![0; 1 << 20];
            let mut done = 0;
            while done < length {
                let run = (length - done).min(zeros.len() as u64);
                write_at(fd.as_fd(), &zeros[..run as usize], offset + done)?;
                done += run;
            }
            Ok(())
        }
        result => result,
    }
}

/// Sets a file's size; what is added is a hole.
pub fn set_size(fd: impl AsFd, size: u64) -> Result<(), Errno> {
    fault::at("truncate", "")?;
    rustix::fs::ftruncate(fd, size)
}

/// The next run of data at or after `offset`: (first byte, byte behind).
/// `None` when only a hole (or nothing) follows.
pub fn next_data(fd: impl AsFd, offset: u64) -> Result<Option<(u64, u64)>, Errno> {
    match rustix::fs::seek(fd.as_fd(), SeekFrom::Data(offset)) {
        Ok(start) => {
            let end = rustix::fs::seek(fd.as_fd(), SeekFrom::Hole(start))?;
            Ok(Some((start, end)))
        }
        Err(Errno::NXIO) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Brings all that was written to the file system of `fd` (a real descriptor,
/// not `O_PATH`) to stable storage. An error of writeback is told once to each
/// descriptor that was open when it happened.
pub fn sync_file_system(fd: impl AsFd) -> Result<(), Errno> {
    fault::at("syncfs", "")?;
    rustix::fs::syncfs(fd)
}

/// Lets go of what memory holds of a file, as far as it is on disk: what is
/// read next comes from there. A hint that no kernel has to follow.
pub fn forget_cached(fd: impl AsFd) {
    let _ = rustix::fs::fadvise(fd, 0, None, rustix::fs::Advice::DontNeed);
}

/// The magic number of the file system (`statfs.f_type`).
pub fn file_system_magic(fd: impl AsFd) -> Result<u64, Errno> {
    Ok(rustix::fs::fstatfs(fd)?.f_type as u64)
}

/// Names that a file may have at most on the file system of `fd`; `None` where no
/// bound is known. (The kernel does not tell, and the C library guesses by the
/// same means.)
pub fn links_max(fd: impl AsFd) -> Result<Option<u32>, Errno> {
    const EXT: u64 = 0xef53;
    const BTRFS: u64 = 0x9123_683e;
    Ok(match file_system_magic(fd)? {
        // ext2, 3 and 4, by the one driver that is left.
        EXT => Some(65_000),
        BTRFS => Some(65_535),
        _ => None,
    })
}

/// Bytes that a name may have at most on the file system of `fd`.
pub fn name_max(fd: impl AsFd) -> Result<Option<u32>, Errno> {
    let told = rustix::fs::fstatvfs(fd)?.f_namemax;
    Ok(u32::try_from(told).ok().filter(|bytes| *bytes > 0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn link_reaches_symlinks_themselves() {
        let directory = tempfile::tempdir_in("/var/tmp").unwrap();
        let fd = open_directory_path(directory.path()).unwrap();
        let (a, b) = (Name::new(b"a").unwrap(), Name::new(b"b").unwrap());
        make_symlink(b"nowhere", fd.as_fd(), &a).unwrap();
        let link_fd = open_path(fd.as_fd(), &a).unwrap();
        link(link_fd.as_fd(), fd.as_fd(), &b).unwrap();
        assert_eq!(read_link(fd.as_fd(), &b).unwrap(), b"nowhere");
        set_mtime(link_fd.as_fd(), Timestamp(-1)).unwrap();
        let stat = crate::sys::stat::of_entry(fd.as_fd(), &b).unwrap();
        assert_eq!((stat.nlink, stat.mtime), (2, Timestamp(-1)));
        assert_eq!(rename_no_replace(fd.as_fd(), &a, fd.as_fd(), &b), Err(Errno::EXIST));
        assert_eq!(list(fd.as_fd()).unwrap().len(), 2);
    }

    #[test]
    fn holes_are_punched_and_found() {
        let directory = tempfile::tempdir_in("/var/tmp").unwrap();
        let fd = open_directory_path(directory.path()).unwrap();
        let file = create_file(fd.as_fd(), &Name::new(b"f").unwrap()).unwrap();
        write_at(&file, &[7; 65536], 0).unwrap();
        punch(&file, 4096, 8192).unwrap();
        set_size(&file, 100_000).unwrap();
        let mut buffer = vec![1; 100_001];
        assert_eq!(read_at(&file, &mut buffer, 0).unwrap(), 100_000);
        assert!(buffer[4096..12288].iter().all(|b| *b == 0) && buffer[12288] == 7);
        assert_eq!(copy_range(&file, 0, &file, 200_000, 10).unwrap(), 10);
        assert_eq!(next_data(&file, 300_000).unwrap(), None);
    }
}
