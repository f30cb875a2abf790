//! Reading a tree whole, by directory handles alone: no path is ever built for
//! the kernel, so that depth beyond PATH_MAX and names of any bytes are no
//! special case.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::Once;

use replicator_common::object::Kind;
use rustix::fs::{Advice, AtFlags, Dir, Mode, OFlags, SeekFrom, Statx, StatxFlags};
use rustix::io::Errno;
use rustix::process::{Resource, Rlimit};

/// Bytes of content under one hash.
pub const BLOCK: u64 = 1 << 20;

/// Everything below a root, as it was read.
#[derive(Clone, Debug, Default)]
pub struct Tree {
    /// By path relative to the root, components joined by `/`; the root itself
    /// is the empty path.
    pub nodes: BTreeMap<Vec<u8>, Node>,
    /// Directories that other file systems are mounted on; not entered and not
    /// among the nodes.
    pub nested: BTreeSet<Vec<u8>>,
}

/// One object under one of its names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Node {
    /// What it is.
    pub kind: Kind,
    /// Permissions, setuid, setgid, sticky.
    pub mode: u32,
    /// User.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Nanoseconds since the epoch.
    pub mtime: i128,
    /// Bytes of a file, else 0 (of directories it depends on the file system).
    pub size: u64,
    /// Device number of device nodes, else 0.
    pub rdev: u64,
    /// By full name.
    pub xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
    /// By kind.
    pub content: Content,
    /// Device and inode number: which names are the same object.
    pub identity: (u64, u64),
    /// Names the object has, inside and outside of the tree.
    pub nlink: u64,
}

/// What an object holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Content {
    /// Directories, devices, FIFOs, sockets.
    None,
    /// A regular file.
    File {
        /// A hash for each [`BLOCK`].
        blocks: Vec<blake3::Hash>,
        /// Holes as `SEEK_HOLE` tells; empty for files below a block.
        holes: Vec<Range<u64>>,
    },
    /// Target of a symbolic link.
    Symlink(Vec<u8>),
}

/// A directory on the way down.
struct Level {
    fd: OwnedFd,
    path: Vec<u8>,
    /// Names of directories that are still to be entered.
    pending: Vec<Vec<u8>>,
}

impl Tree {
    /// Reads the tree below `root`; nothing may change in it meanwhile.
    pub fn read(root: &Path) -> io::Result<Self> {
        allow_deep_trees();
        let fd = rustix::fs::open(root, directory_flags(), Mode::empty())?;
        let stat = statx(fd.as_fd(), b"", AtFlags::EMPTY_PATH)?;
        let mut tree = Self::default();
        tree.nodes.insert(Vec::new(), node(fd.as_fd(), &stat, Content::None)?);
        let mut levels = vec![tree.list(fd, Vec::new(), stat.stx_mnt_id)?];
        // A descriptor is held for each level of the present branch only.
        while let Some(level) = levels.last_mut() {
            let Some(name) = level.pending.pop() else {
                levels.pop();
                continue;
            };
            let path = joined(&level.path, &name);
            let fd = rustix::fs::openat(&level.fd, &name[..], directory_flags(), Mode::empty())
                .map_err(|error| at(&path, error))?;
            let next = tree.list(fd, path, stat.stx_mnt_id)?;
            levels.push(next);
        }
        Ok(tree)
    }

    /// Adds the entries of one directory.
    fn list(&mut self, fd: OwnedFd, path: Vec<u8>, mount: u64) -> io::Result<Level> {
        let mut level = Level { fd, path, pending: Vec::new() };
        for entry in Dir::read_from(&level.fd).map_err(|error| at(&level.path, error))? {
            let entry = entry.map_err(|error| at(&level.path, error))?;
            let name = entry.file_name().to_bytes();
            if name == b"." || name == b".." {
                continue;
            }
            let path = joined(&level.path, name);
            let stat = statx(level.fd.as_fd(), name, AtFlags::SYMLINK_NOFOLLOW)
                .map_err(|error| at(&path, error))?;
            if stat.stx_mnt_id != mount {
                self.nested.insert(path);
                continue;
            }
            let node = read_entry(level.fd.as_fd(), name, &stat).map_err(|e| at(&path, e))?;
            // What the engine has in its own directory changes at any time.
            if node.kind == Kind::Directory && !super::is_hidden(&path) {
                level.pending.push(name.to_vec());
            }
            self.nodes.insert(path, node);
        }
        Ok(level)
    }

    /// Whether the path is a directory without entries.
    pub(super) fn is_empty_directory(&self, path: &[u8]) -> bool {
        let below = joined(path, b"");
        let after = self.nodes.range(below.clone()..).next();
        self.nodes.get(path).is_some_and(|node| node.kind == Kind::Directory)
            && after.is_none_or(|(path, _)| !path.starts_with(&below))
    }

    /// The names of each object that may have several.
    pub(super) fn link_groups(&self) -> BTreeMap<(u64, u64), BTreeSet<&[u8]>> {
        let mut groups: BTreeMap<(u64, u64), BTreeSet<&[u8]>> = BTreeMap::new();
        for (path, node) in self.nodes.iter().filter(|(_, node)| node.kind != Kind::Directory) {
            groups.entry(node.identity).or_default().insert(path);
        }
        groups
    }
}

/// A branch of some thousand levels needs as many descriptors.
fn allow_deep_trees() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let limit = rustix::process::getrlimit(Resource::Nofile);
        let raised = Rlimit { current: limit.maximum, maximum: limit.maximum };
        // Shallow trees work without it, and deep ones fail loudly.
        let _ = rustix::process::setrlimit(Resource::Nofile, raised);
    });
}

fn directory_flags() -> OFlags {
    OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC
}

fn joined(directory: &[u8], name: &[u8]) -> Vec<u8> {
    if directory.is_empty() { name.to_vec() } else { [directory, b"/", name].concat() }
}

fn at(path: &[u8], error: impl Into<io::Error>) -> io::Error {
    let error = error.into();
    io::Error::new(error.kind(), format!("{}: {error}", super::shown(path)))
}

fn statx(directory: BorrowedFd<'_>, name: &[u8], flags: AtFlags) -> Result<Statx, Errno> {
    let mask = StatxFlags::BASIC_STATS | StatxFlags::MNT_ID;
    rustix::fs::statx(directory, name, flags | AtFlags::NO_AUTOMOUNT, mask)
}

/// Everything about an entry. Opened by `O_PATH` first, so that a FIFO does not
/// block and a device is not woken.
fn read_entry(directory: BorrowedFd<'_>, name: &[u8], stat: &Statx) -> io::Result<Node> {
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let fd = rustix::fs::openat(directory, name, flags, Mode::empty())?;
    let content = match Kind::from_mode(stat.stx_mode.into()) {
        Some(Kind::File) => {
            let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NOATIME;
            let file = rustix::fs::openat(directory, name, flags, Mode::empty())?;
            read_file(file.as_fd(), stat.stx_size)?
        }
        Some(Kind::Symlink) => {
            Content::Symlink(rustix::fs::readlinkat(directory, name, Vec::new())?.into_bytes())
        }
        _ => Content::None,
    };
    node(fd.as_fd(), stat, content)
}

fn node(fd: BorrowedFd<'_>, stat: &Statx, content: Content) -> io::Result<Node> {
    let mode = u32::from(stat.stx_mode);
    let kind = Kind::from_mode(mode).ok_or_else(|| io::Error::other("unknown kind"))?;
    Ok(Node {
        kind,
        mode: mode & 0o7777,
        uid: stat.stx_uid,
        gid: stat.stx_gid,
        mtime: i128::from(stat.stx_mtime.tv_sec) * 1_000_000_000
            + i128::from(stat.stx_mtime.tv_nsec),
        size: if kind == Kind::File { stat.stx_size } else { 0 },
        rdev: libc::makedev(stat.stx_rdev_major, stat.stx_rdev_minor),
        xattrs: read_xattrs(fd)?,
        content,
        identity: (libc::makedev(stat.stx_dev_major, stat.stx_dev_minor), stat.stx_ino),
        nlink: stat.stx_nlink.into(),
    })
}

/// All xattrs, except that xfs lists each POSIX ACL a second time, in a form of
/// its own. Through `/proc`, the only way that reaches symbolic links and device
/// nodes without a path.
fn read_xattrs(fd: BorrowedFd<'_>) -> io::Result<BTreeMap<Vec<u8>, Vec<u8>>> {
    let path = format!("/proc/self/fd/{}", fd.as_raw_fd());
    let mut names = vec![0; 64 << 10];
    let used = match rustix::fs::listxattr(&path, &mut names[..]) {
        Err(Errno::NOTSUP) => 0,
        other => other?,
    };
    let mut xattrs = BTreeMap::new();
    for name in names[..used].split(|byte| *byte == 0).filter(|name| !name.is_empty()) {
        if name.starts_with(b"trusted.SGI_ACL_") {
            continue;
        }
        let mut value = vec![0; 64 << 10];
        let used = rustix::fs::getxattr(&path, name, &mut value[..])?;
        value.truncate(used);
        xattrs.insert(name.to_vec(), value);
    }
    Ok(xattrs)
}

fn read_file(fd: BorrowedFd<'_>, size: u64) -> io::Result<Content> {
    // First of all: reading fills the page cache, and see `holes`.
    let holes = if size < super::HOLE_MIN { Vec::new() } else { holes(fd, size)? };
    // A byte more than there should be, so that the end is seen at once.
    let mut buffer = vec![0; (size + 1).min(BLOCK) as usize];
    let (mut blocks, mut offset, mut block, mut length) = (Vec::new(), 0, blake3::Hasher::new(), 0);
    loop {
        let wanted = buffer.len().min((BLOCK - length) as usize);
        let used = read_block(fd, &mut buffer[..wanted], offset)?;
        block.update(&buffer[..used]);
        (offset, length) = (offset + used as u64, length + used as u64);
        if length == BLOCK || used == 0 && length > 0 {
            blocks.push(std::mem::take(&mut block).finalize());
            length = 0;
        }
        if used == 0 {
            break;
        }
    }
    Ok(Content::File { blocks, holes })
}

/// Fills the buffer, less only at the end of the file.
fn read_block(fd: BorrowedFd<'_>, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
    let mut used = 0;
    while used < buffer.len() {
        match rustix::io::pread(fd, &mut buffer[used..], offset + used as u64)? {
            0 => break,
            more => used += more,
        }
    }
    Ok(used)
}

/// On ext4 and xfs, unwritten extents count as data while pages of them are
/// cached, because somebody has read there or because they are dirty: so
/// everything is written out and forgotten before the question.
fn holes(fd: BorrowedFd<'_>, size: u64) -> io::Result<Vec<Range<u64>>> {
    rustix::fs::fdatasync(fd)?;
    rustix::fs::fadvise(fd, 0, None, Advice::DontNeed)?;
    let (mut holes, mut offset) = (Vec::new(), 0);
    while offset < size {
        let start = rustix::fs::seek(fd, SeekFrom::Hole(offset))?;
        if start >= size {
            break;
        }
        // No data behind it: the hole reaches to the end.
        let end = match rustix::fs::seek(fd, SeekFrom::Data(start)) {
            Err(Errno::NXIO) => size,
            other => other?,
        };
        holes.push(start..end);
        offset = end;
    }
    Ok(holes)
}
