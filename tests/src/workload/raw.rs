//! What the standard library has no call for, and steps by directory handle
//! that reach any depth.

use std::ffi::CString;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::time::{Duration, SystemTime};

use rustix::fs::{AtFlags, CWD, Dir, FileType, Mode, OFlags, StatxFlags};
use rustix::io::Errno;

/// Opens a directory that is one of `directory`'s entries.
pub fn step(directory: BorrowedFd<'_>, name: &[u8]) -> Result<OwnedFd, Errno> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    rustix::fs::openat(directory, name, flags, Mode::empty())
}

/// Opens the directory at the end of a path of any length; with `make`, makes
/// what is missing of it.
pub fn descend(root: BorrowedFd<'_>, path: &[Vec<u8>], make: bool) -> Result<OwnedFd, Errno> {
    let mut directory = step(root, b".")?;
    for name in path {
        directory = match step(directory.as_fd(), name) {
            Err(Errno::NOENT) if make => {
                match rustix::fs::mkdirat(&directory, &name[..], Mode::from_raw_mode(0o755)) {
                    Ok(()) | Err(Errno::EXIST) => step(directory.as_fd(), name)?,
                    Err(error) => return Err(error),
                }
            }
            other => other?,
        };
    }
    Ok(directory)
}

/// How long ago a directory was made.
pub fn age(directory: BorrowedFd<'_>) -> Result<Duration, Errno> {
    let made = rustix::fs::statx(directory, c"", AtFlags::EMPTY_PATH, StatxFlags::BTIME)?.stx_btime;
    let seconds = u64::try_from(made.tv_sec).unwrap_or(0);
    let made = SystemTime::UNIX_EPOCH + Duration::new(seconds, made.tv_nsec);
    Ok(made.elapsed().unwrap_or_default())
}

/// Writes a whole file that is one of `directory`'s entries.
pub fn write_file(directory: BorrowedFd<'_>, name: &[u8], content: &[u8]) -> io::Result<()> {
    // Without NONBLOCK, a FIFO that took the name would block for ever.
    let flags = OFlags::WRONLY
        | OFlags::CREATE
        | OFlags::TRUNC
        | OFlags::NOFOLLOW
        | OFlags::NONBLOCK
        | OFlags::CLOEXEC;
    let file = rustix::fs::openat(directory, name, flags, Mode::from_raw_mode(0o644))?;
    io::Write::write_all(&mut File::from(file), content)
}

/// Writes a file at the bottom of `depth` directories with names of `width`
/// bytes each.
pub fn deep_file(root: &Path, depth: usize, width: usize, content: &[u8]) {
    let root = rustix::fs::open(root, OFlags::RDONLY | OFlags::DIRECTORY, Mode::empty()).unwrap();
    let bottom = descend(root.as_fd(), &vec![vec![b'n'; width]; depth], true).unwrap();
    write_file(bottom.as_fd(), b"file", content).unwrap();
}

/// Removes an entry and all below it, at any depth.
pub fn remove_tree(directory: BorrowedFd<'_>, name: &[u8]) -> Result<(), Errno> {
    match rustix::fs::unlinkat(directory, name, AtFlags::empty()) {
        Err(Errno::ISDIR) => {}
        other => return other,
    }
    // Each level: its descriptor and the name it has in the one above.
    let mut levels = vec![(step(directory, name)?, name.to_vec())];
    while let Some((level, _)) = levels.last() {
        if let Some(below) = remove_files(level.as_fd())? {
            let next = step(level.as_fd(), &below)?;
            levels.push((next, below));
            continue;
        }
        let Some((_, name)) = levels.pop() else { break };
        let parent = levels.last().map_or(directory, |(fd, _)| fd.as_fd());
        match rustix::fs::unlinkat(parent, &name[..], AtFlags::REMOVEDIR) {
            Ok(()) | Err(Errno::NOENT) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Removes what is no directory, up to the first directory, which it names.
fn remove_files(directory: BorrowedFd<'_>) -> Result<Option<Vec<u8>>, Errno> {
    for entry in Dir::read_from(directory)? {
        let entry = entry?;
        let name = entry.file_name().to_bytes();
        if name == b"." || name == b".." {
            continue;
        }
        if entry.file_type() == FileType::Directory {
            return Ok(Some(name.to_vec()));
        }
        match rustix::fs::unlinkat(directory, name, AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(None)
}

/// `truncate(2)`: the file changes although no program ever opened it.
pub fn truncate_by_path(directory: BorrowedFd<'_>, name: &[u8], size: u64) -> Result<(), Errno> {
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let file = rustix::fs::openat(directory, name, flags, Mode::empty())?;
    let path = CString::new(format!("/proc/self/fd/{}", file.as_raw_fd())).unwrap();
    // SAFETY: `path` is a C string that lives through the call.
    match unsafe { libc::truncate(path.as_ptr(), size as libc::off_t) } {
        0 => Ok(()),
        _ => Err(last_errno()),
    }
}

/// Stores `content` at `offset` through a shared mapping. The descriptor is
/// closed before the stores, so that only the unmapping can tell of them.
pub fn store_mapped(file: OwnedFd, offset: u64, content: &[u8]) -> Result<(), Errno> {
    if content.is_empty() {
        return Ok(());
    }
    let (start, length) = (offset as usize, offset as usize + content.len());
    if rustix::fs::fstat(&file)?.st_size < length as i64 {
        rustix::fs::ftruncate(&file, length as u64)?;
    }
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: a new mapping at an address of the kernel's choice.
    let address = unsafe {
        libc::mmap(std::ptr::null_mut(), length, protection, libc::MAP_SHARED, file.as_raw_fd(), 0)
    };
    if address == libc::MAP_FAILED {
        return Err(last_errno());
    }
    drop(file);
    // Another thread may truncate the file, and a store beyond its end raises
    // SIGBUS; process_vm_writev stores into our own memory and returns EFAULT
    // instead.
    let result = store(address.wrapping_byte_add(start), content);
    // SAFETY: mapped above with this length, and no reference into it exists.
    unsafe { libc::munmap(address, length) };
    result
}

fn store(target: *mut libc::c_void, content: &[u8]) -> Result<(), Errno> {
    let from = libc::iovec { iov_base: content.as_ptr().cast_mut().cast(), iov_len: content.len() };
    let to = libc::iovec { iov_base: target, iov_len: content.len() };
    // SAFETY: the kernel reads `content` and checks the target before it
    // writes; the target is a mapping of the caller's.
    let stored = unsafe { libc::process_vm_writev(libc::getpid(), &from, 1, &to, 1, 0) };
    match stored {
        -1 => Err(last_errno()),
        _ => Ok(()),
    }
}

fn last_errno() -> Errno {
    Errno::from_io_error(&io::Error::last_os_error()).unwrap_or(Errno::IO)
}

/// An access ACL in the kernel's form: user 1000 has `permissions`.
pub fn acl(permissions: u16) -> Vec<u8> {
    acl_for(1000, permissions)
}

/// The same for another user.
pub fn acl_for(user: u32, permissions: u16) -> Vec<u8> {
    const NOBODY: u32 = u32::MAX;
    // (tag, permissions, id): owner, a user, the group, the mask, others.
    let entries = [
        (1, 6, NOBODY),
        (2, permissions, user),
        (4, 4, NOBODY),
        (0x10, 7, NOBODY),
        (0x20, 4, NOBODY),
    ];
    let mut value = 2u32.to_le_bytes().to_vec();
    for (tag, permissions, id) in entries {
        value.extend(u16::to_le_bytes(tag));
        value.extend(permissions.to_le_bytes());
        value.extend(id.to_le_bytes());
    }
    value
}

/// File capabilities in the kernel's form (`VFS_CAP_REVISION_2`, effective).
pub fn capability(permitted: u32) -> Vec<u8> {
    let words = [0x0200_0001, permitted, 0, 0, 0];
    words.into_iter().flat_map(u32::to_le_bytes).collect()
}

/// A shared mapping of a file's beginning, into which content can be stored at
/// any time. Unmapped when dropped.
#[derive(Debug)]
pub struct Mapping {
    address: *mut libc::c_void,
    length: usize,
}

impl Mapping {
    /// Maps the first `length` bytes, which the file must have.
    pub fn new(file: &OwnedFd, length: usize) -> Result<Self, Errno> {
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let (start, fd) = (std::ptr::null_mut(), file.as_raw_fd());
        // SAFETY: a new mapping at an address of the kernel's choice.
        let address = unsafe { libc::mmap(start, length, protection, libc::MAP_SHARED, fd, 0) };
        if address == libc::MAP_FAILED {
            return Err(last_errno());
        }
        Ok(Self { address, length })
    }

    /// Stores `content` at `offset`, within the mapping.
    pub fn store(&self, offset: usize, content: &[u8]) -> Result<(), Errno> {
        assert!(offset + content.len() <= self.length);
        store(self.address.wrapping_byte_add(offset), content)
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: mapped by `new` with this length, and no reference into it
        // exists.
        unsafe { libc::munmap(self.address, self.length) };
    }
}

/// A file of a directory that is whole before it has a name: of one that is being
/// written, a beginning may be replicated.
pub fn arrives(directory: &Path, name: &str, content: &[u8]) {
    let flags = OFlags::TMPFILE | OFlags::WRONLY;
    let file = rustix::fs::open(directory, flags, Mode::from_raw_mode(0o644)).unwrap();
    let mut file = File::from(file);
    file.write_all(content).unwrap();
    let open = format!("/proc/self/fd/{}", file.as_raw_fd());
    rustix::fs::linkat(CWD, open, CWD, directory.join(name), AtFlags::SYMLINK_FOLLOW).unwrap();
}
