//! Doing the operations.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::thread;
use std::time::Duration;

use rand::Rng;
use rand::SeedableRng;
use rand::rngs::SmallRng;
use rustix::fs::{
    AtFlags, FallocateFlags, FileType, Gid, Mode, OFlags, RenameFlags, Timespec, Timestamps, Uid,
    XattrFlags,
};
use rustix::io::Errno;

use super::content;
use super::op::Op;
use super::place::Place;
use super::raw;

/// What an operation came to.
#[derive(Debug)]
pub enum Outcome {
    /// It was done.
    Done,
    /// The object was not there, was of another kind, or something was in the
    /// way: normal where threads meet.
    Refused(Errno),
    /// An error that no program should see.
    Unexpected(io::Error),
}

/// Where one thread works, and what it keeps open.
#[derive(Debug)]
pub struct Arena {
    root: OwnedFd,
    outside: OwnedFd,
    held: Vec<File>,
    link_age: Duration,
}

/// Descriptors that [`Op::HoldOpen`] leaves open, at most.
const HELD: usize = 3;

impl Arena {
    /// Works below `root`, with `outside` on the same file system.
    pub fn new(root: &Path, outside: &Path) -> Self {
        let open = |path: &Path| {
            let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
            rustix::fs::open(path, flags, Mode::empty()).unwrap()
        };
        let (root, outside) = (open(root), open(outside));
        Self { root, outside, held: Vec::new(), link_age: Duration::ZERO }
    }

    /// Waits, before it makes a hard link, until the directory for it is this old.
    pub fn linking_after(self, link_age: Duration) -> Self {
        Self { link_age, ..self }
    }

    pub(super) fn root(&self) -> BorrowedFd<'_> {
        self.root.as_fd()
    }

    /// Does one operation.
    pub fn perform(&mut self, op: &Op) -> Outcome {
        match self.attempt(op) {
            Ok(()) => Outcome::Done,
            Err(error) => match Errno::from_io_error(&error) {
                Some(errno) if is_refusal(errno) => Outcome::Refused(errno),
                _ => Outcome::Unexpected(error),
            },
        }
    }

    /// Does one operation that has to succeed.
    pub fn must(&mut self, op: &Op) {
        let outcome = self.perform(op);
        assert!(matches!(outcome, Outcome::Done), "{op:?}: {outcome:?}");
    }

    fn attempt(&mut self, op: &Op) -> io::Result<()> {
        match op {
            Op::HoldOpen { at, bytes, seed } => self.hold_open(at, &bytes_of(*seed, *bytes)),
            Op::Create { .. }
            | Op::Append { .. }
            | Op::Overwrite { .. }
            | Op::Truncate { .. }
            | Op::Punch { .. }
            | Op::Allocate { .. }
            | Op::Map { .. }
            | Op::CopyRange { .. } => self.change_content(op),
            Op::Replace { .. } | Op::Insert { .. } | Op::TmpFile { .. } | Op::Blink { .. } => {
                self.replace_file(op)
            }
            Op::Rename { .. }
            | Op::Exchange { .. }
            | Op::Rotate { .. }
            | Op::Link { .. }
            | Op::OutsideLink { .. }
            | Op::Unlink { .. }
            | Op::Symlink { .. }
            | Op::Special { .. } => self.change_names(op),
            Op::MakeDirectory { .. }
            | Op::FillDirectory { .. }
            | Op::RemoveTree { .. }
            | Op::MoveIn { .. }
            | Op::MoveOut { .. }
            | Op::OutAndBack { .. }
            | Op::Deep { .. } => self.change_trees(op),
            Op::Mode { .. }
            | Op::Owner { .. }
            | Op::Times { .. }
            | Op::SetXattr { .. }
            | Op::RemoveXattr { .. }
            | Op::Acl { .. }
            | Op::Capability { .. } => self.change_attributes(op),
        }
    }

    /// The directory of a place and the name in it.
    fn parent<'a>(&self, at: &'a Place, make: bool) -> Result<(OwnedFd, &'a [u8]), Errno> {
        let Some((name, path)) = at.0.split_last() else {
            return Err(Errno::INVAL);
        };
        Ok((raw::descend(self.root.as_fd(), path, make)?, name))
    }

    fn open(&self, at: &Place, flags: OFlags, make: bool) -> Result<OwnedFd, Errno> {
        let (directory, name) = self.parent(at, make)?;
        // Without NONBLOCK, a FIFO that took the name would block for ever.
        let flags = flags | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NONBLOCK;
        let fd = rustix::fs::openat(&directory, name, flags, Mode::from_raw_mode(0o644))?;
        match FileType::from_raw_mode(rustix::fs::fstat(&fd)?.st_mode) {
            FileType::RegularFile => Ok(fd),
            _ => Err(Errno::NXIO),
        }
    }

    fn hold_open(&mut self, at: &Place, content: &[u8]) -> io::Result<()> {
        if self.held.len() >= HELD {
            // What is held is written to once more before it is closed.
            let mut oldest = self.held.remove(0);
            oldest.write_all(b"written late")?;
        }
        let mut file = File::from(self.open(at, OFlags::RDWR | OFlags::CREATE, true)?);
        for part in content.chunks(1000) {
            file.write_all(part)?;
        }
        self.held.push(file);
        Ok(())
    }

    fn change_content(&self, op: &Op) -> io::Result<()> {
        match op {
            Op::Create { at, bytes, seed } => {
                let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::TRUNC;
                let mut file = File::from(self.open(at, flags, true)?);
                file.write_all(&bytes_of(*seed, *bytes))
            }
            Op::Append { at, bytes, seed } => {
                let mut file = File::from(self.open(at, OFlags::WRONLY | OFlags::APPEND, false)?);
                file.write_all(&bytes_of(*seed, *bytes))
            }
            Op::Overwrite { at, offset, bytes, seed } => {
                let file = File::from(self.open(at, OFlags::WRONLY, false)?);
                file.write_all_at(&bytes_of(*seed, *bytes), *offset)
            }
            Op::Truncate { at, size } => {
                let (directory, name) = self.parent(at, false)?;
                Ok(raw::truncate_by_path(directory.as_fd(), name, *size)?)
            }
            Op::Punch { at, offset, bytes } => {
                let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
                let file = self.open(at, OFlags::WRONLY, false)?;
                Ok(rustix::fs::fallocate(file, flags, *offset, *bytes)?)
            }
            Op::Allocate { at, offset, bytes } => {
                let file = self.open(at, OFlags::WRONLY, false)?;
                Ok(rustix::fs::fallocate(file, FallocateFlags::empty(), *offset, *bytes)?)
            }
            Op::Map { at, offset, bytes, seed } => {
                let file = self.open(at, OFlags::RDWR, false)?;
                Ok(raw::store_mapped(file, *offset, &bytes_of(*seed, *bytes))?)
            }
            Op::CopyRange { from, to, offset, bytes } => {
                let from = self.open(from, OFlags::RDONLY, false)?;
                let to = self.open(to, OFlags::WRONLY, false)?;
                let (mut read, mut written) = (*offset, *offset / 2);
                let length = *bytes as usize;
                rustix::fs::copy_file_range(from, Some(&mut read), to, Some(&mut written), length)?;
                Ok(())
            }
            _ => unreachable!("{op:?} is not about content"),
        }
    }

    fn replace_file(&self, op: &Op) -> io::Result<()> {
        match op {
            Op::Replace { at, bytes, seed } => {
                self.write_and_rename(at, &bytes_of(*seed, *bytes), *seed)
            }
            Op::Insert { at, bytes, seed } => {
                let mut file = File::from(self.open(at, OFlags::RDONLY, false)?);
                let mut content = Vec::new();
                io::Read::read_to_end(&mut file, &mut content)?;
                let middle = content.len() / 2;
                content.splice(middle..middle, bytes_of(*seed, *bytes));
                self.write_and_rename(at, &content, *seed)
            }
            Op::TmpFile { at, outside, bytes, seed } => {
                let (directory, name) = self.parent(at, true)?;
                let flags = OFlags::TMPFILE | OFlags::WRONLY | OFlags::CLOEXEC;
                let place = if *outside { self.outside.as_fd() } else { directory.as_fd() };
                let fd = rustix::fs::openat(place, c".", flags, Mode::from_raw_mode(0o640))?;
                let mut file = File::from(fd);
                file.write_all(&bytes_of(*seed, *bytes))?;
                link_open(file.as_fd(), directory.as_fd(), name)?;
                file.write_all(b"and more after it got its name")
            }
            Op::Blink { at, bytes, seed } => {
                let (directory, name) = self.parent(at, true)?;
                let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
                let fd = rustix::fs::openat(&directory, name, flags, Mode::from_raw_mode(0o644))?;
                File::from(fd).write_all(&bytes_of(*seed, *bytes))?;
                Ok(rustix::fs::unlinkat(&directory, name, AtFlags::empty())?)
            }
            _ => unreachable!("{op:?} makes no file"),
        }
    }

    fn write_and_rename(&self, at: &Place, content: &[u8], seed: u64) -> io::Result<()> {
        let (directory, name) = self.parent(at, true)?;
        let temporary = format!(".temporary-{seed:x}").into_bytes();
        raw::write_file(directory.as_fd(), &temporary, content)?;
        rustix::fs::renameat(&directory, &temporary[..], &directory, name).map_err(|error| {
            let _ = rustix::fs::unlinkat(&directory, &temporary[..], AtFlags::empty());
            error.into()
        })
    }

    fn change_names(&self, op: &Op) -> io::Result<()> {
        match op {
            Op::Rename { from, to } => Ok(self.rename(from, to, RenameFlags::empty())?),
            Op::Exchange { a, b } => Ok(self.rename(a, b, RenameFlags::EXCHANGE)?),
            Op::Rotate { names } => {
                let mut result = Err(Errno::NOENT);
                for pair in names.windows(2).rev() {
                    result = self.rename(&pair[0], &pair[1], RenameFlags::empty()).or(result);
                }
                Ok(result?)
            }
            Op::Link { from, to } => {
                let (from, old) = self.parent(from, false)?;
                let (to, new) = self.parent(to, true)?;
                if !self.link_age.is_zero() {
                    thread::sleep(self.link_age.saturating_sub(raw::age(to.as_fd())?));
                }
                Ok(rustix::fs::linkat(from, old, to, new, AtFlags::empty())?)
            }
            Op::OutsideLink { at, slot, seed } => self.outside_link(at, *slot, *seed),
            Op::Unlink { at } => {
                let (directory, name) = self.parent(at, false)?;
                Ok(rustix::fs::unlinkat(directory, name, AtFlags::empty())?)
            }
            Op::Symlink { at, target } => {
                let (directory, name) = self.parent(at, true)?;
                Ok(rustix::fs::symlinkat(target.path(), directory, name)?)
            }
            Op::Special { at, which } => {
                let (directory, name) = self.parent(at, true)?;
                let kind = match which % 4 {
                    0 => FileType::Fifo,
                    1 => FileType::Socket,
                    2 => FileType::CharacterDevice,
                    _ => FileType::BlockDevice,
                };
                let device = libc::makedev(1, 3);
                Ok(rustix::fs::mknodat(directory, name, kind, Mode::from_raw_mode(0o644), device)?)
            }
            _ => unreachable!("{op:?} is not about names"),
        }
    }

    fn rename(&self, from: &Place, to: &Place, flags: RenameFlags) -> Result<(), Errno> {
        let (from, old) = self.parent(from, false)?;
        let (to, new) = self.parent(to, flags.is_empty())?;
        rustix::fs::renameat_with(from, old, to, new, flags)
    }

    fn outside_link(&self, at: &Place, slot: u8, seed: u64) -> io::Result<()> {
        let (directory, name) = self.parent(at, false)?;
        // Checks the kind: what is linked is written to.
        drop(self.open(at, OFlags::RDONLY, false)?);
        let thread = rustix::thread::gettid().as_raw_nonzero();
        let link = format!("link-{thread}-{slot}").into_bytes();
        let _ = rustix::fs::unlinkat(&self.outside, &link[..], AtFlags::empty());
        rustix::fs::linkat(&directory, name, &self.outside, &link[..], AtFlags::empty())?;
        let flags = OFlags::WRONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NONBLOCK;
        let file = rustix::fs::openat(&self.outside, &link[..], flags, Mode::empty())?;
        File::from(file).write_all_at(&bytes_of(seed, 100), seed % 5000)
    }

    fn change_trees(&self, op: &Op) -> io::Result<()> {
        match op {
            Op::MakeDirectory { at } => {
                let (directory, name) = self.parent(at, true)?;
                Ok(rustix::fs::mkdirat(directory, name, Mode::from_raw_mode(0o755))?)
            }
            Op::FillDirectory { at, seed } => {
                let (directory, name) = self.parent(at, true)?;
                fill(directory.as_fd(), name, *seed)
            }
            Op::RemoveTree { at } => {
                let (directory, name) = self.parent(at, false)?;
                Ok(raw::remove_tree(directory.as_fd(), name)?)
            }
            Op::MoveIn { at, seed } => {
                let (directory, name) = self.parent(at, true)?;
                let away = away(*seed);
                fill(self.outside.as_fd(), &away, *seed)?;
                rustix::fs::renameat(&self.outside, &away[..], &directory, name).map_err(|error| {
                    let _ = raw::remove_tree(self.outside.as_fd(), &away);
                    error.into()
                })
            }
            Op::MoveOut { at, keep, seed } => {
                let (directory, name) = self.parent(at, false)?;
                let away = away(*seed);
                rustix::fs::renameat(&directory, name, &self.outside, &away[..])?;
                match keep {
                    true => Ok(()),
                    false => Ok(raw::remove_tree(self.outside.as_fd(), &away)?),
                }
            }
            Op::OutAndBack { from, to, seed } => self.out_and_back(from, to, *seed),
            Op::Deep { at, seed } => {
                let directory = raw::descend(self.root.as_fd(), &at.0, true)?;
                let bottom = raw::descend(directory.as_fd(), &vec![vec![b'D'; 255]; 18], true)?;
                raw::write_file(bottom.as_fd(), b"bottom", &bytes_of(*seed, 2000))
            }
            _ => unreachable!("{op:?} is not about trees"),
        }
    }

    fn out_and_back(&self, from: &Place, to: &Place, seed: u64) -> io::Result<()> {
        let (directory, name) = self.parent(from, false)?;
        let away = away(seed);
        rustix::fs::renameat(&directory, name, &self.outside, &away[..])?;
        let flags = OFlags::WRONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NONBLOCK;
        if let Ok(tree) = raw::step(self.outside.as_fd(), &away) {
            raw::write_file(tree.as_fd(), b"f1", &bytes_of(seed, 3000))?;
        } else if let Ok(file) = rustix::fs::openat(&self.outside, &away[..], flags, Mode::empty())
        {
            // Of a FIFO, a socket or a device nothing is written.
            let _ = File::from(file).write_all_at(&bytes_of(seed, 3000), 0);
        }
        let (directory, name) = self.parent(to, true)?;
        rustix::fs::renameat(&self.outside, &away[..], &directory, name).map_err(|error| {
            let _ = raw::remove_tree(self.outside.as_fd(), &away);
            error.into()
        })
    }

    fn change_attributes(&self, op: &Op) -> io::Result<()> {
        match op {
            Op::Mode { at, mode } => {
                let (directory, name) = self.parent(at, false)?;
                let mode = Mode::from_raw_mode(*mode);
                let fd = object(directory.as_fd(), name)?;
                if FileType::from_raw_mode(rustix::fs::fstat(&fd)?.st_mode) == FileType::Symlink {
                    return Err(Errno::LOOP.into());
                }
                Ok(rustix::fs::chmod(proc_path(fd.as_fd()), mode)?)
            }
            Op::Owner { at, uid, gid } => {
                let (directory, name) = self.parent(at, false)?;
                let (uid, gid) = (Uid::from_raw(*uid), Gid::from_raw(*gid));
                let flags = AtFlags::SYMLINK_NOFOLLOW;
                Ok(rustix::fs::chownat(directory, name, Some(uid), Some(gid), flags)?)
            }
            Op::Times { at, seconds, nanoseconds } => {
                let (directory, name) = self.parent(at, false)?;
                let time = Timespec { tv_sec: *seconds, tv_nsec: *nanoseconds };
                let times = Timestamps { last_access: time, last_modification: time };
                let flags = AtFlags::SYMLINK_NOFOLLOW;
                Ok(rustix::fs::utimensat(directory, name, &times, flags)?)
            }
            Op::SetXattr { at, number, bytes, seed } => {
                self.set_xattr(at, &xattr(*number), &bytes_of(*seed, *bytes))
            }
            Op::RemoveXattr { at, number } => {
                let (directory, name) = self.parent(at, false)?;
                let fd = object(directory.as_fd(), name)?;
                Ok(rustix::fs::removexattr(proc_path(fd.as_fd()), xattr(*number))?)
            }
            Op::Acl { at, default, permissions } => {
                let kind = if *default { "default" } else { "access" };
                self.set_xattr(at, &format!("system.posix_acl_{kind}"), &raw::acl(*permissions))
            }
            Op::Capability { at, bits } => {
                self.set_xattr(at, "security.capability", &raw::capability(*bits))
            }
            _ => unreachable!("{op:?} is not about attributes"),
        }
    }

    fn set_xattr(&self, at: &Place, xattr: &str, value: &[u8]) -> io::Result<()> {
        let (directory, name) = self.parent(at, false)?;
        let fd = object(directory.as_fd(), name)?;
        Ok(rustix::fs::setxattr(proc_path(fd.as_fd()), xattr, value, XattrFlags::empty())?)
    }
}

/// Errors that come of an object that is missing, of another kind or in the
/// way. Errors of the device, of the descriptor table and so on are not among
/// them.
fn is_refusal(errno: Errno) -> bool {
    matches!(
        errno,
        Errno::NOENT
            | Errno::EXIST
            | Errno::NOTEMPTY
            | Errno::NOTDIR
            | Errno::ISDIR
            | Errno::LOOP
            | Errno::INVAL
            | Errno::MLINK
            | Errno::NAMETOOLONG
            | Errno::PERM
            | Errno::OPNOTSUPP
            | Errno::NODATA
            | Errno::NXIO
            | Errno::NOSPC
            | Errno::FAULT
            | Errno::BUSY
            | Errno::OVERFLOW
            | Errno::ACCESS
    )
}

/// A directory with files, directories with files, a symbolic link and a hard
/// link, made as fast as it can be made.
fn fill(parent: BorrowedFd<'_>, name: &[u8], seed: u64) -> io::Result<()> {
    let mut rng = SmallRng::seed_from_u64(seed);
    rustix::fs::mkdirat(parent, name, Mode::from_raw_mode(0o755))?;
    let top = raw::step(parent, name)?;
    for number in 0..rng.random_range(1..4) {
        let name = format!("d{number}").into_bytes();
        rustix::fs::mkdirat(&top, &name[..], Mode::from_raw_mode(0o750))?;
        let below = raw::step(top.as_fd(), &name)?;
        for number in 0..rng.random_range(0..5) {
            let content = bytes_of(rng.random(), rng.random_range(0..5000));
            raw::write_file(below.as_fd(), format!("f{number}").as_bytes(), &content)?;
        }
    }
    raw::write_file(top.as_fd(), b"f0", &bytes_of(rng.random(), 100))?;
    rustix::fs::symlinkat("f0", &top, "f1")?;
    Ok(rustix::fs::linkat(&top, "f0", &top, "d0/f9", AtFlags::empty())?)
}

fn bytes_of(seed: u64, bytes: u32) -> Vec<u8> {
    content::bytes(seed, bytes as usize)
}

/// The name of what is being moved, outside of the tree.
fn away(seed: u64) -> Vec<u8> {
    format!("away-{seed:x}").into_bytes()
}

fn xattr(number: u8) -> String {
    if number == 0 { "trusted.replicator-test".into() } else { format!("user.note-{number}") }
}

/// The object itself, whatever it is.
fn object(directory: BorrowedFd<'_>, name: &[u8]) -> Result<OwnedFd, Errno> {
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    rustix::fs::openat(directory, name, flags, Mode::empty())
}

fn proc_path(fd: BorrowedFd<'_>) -> String {
    format!("/proc/self/fd/{}", fd.as_raw_fd())
}

/// Gives an open file without a name one.
fn link_open(file: BorrowedFd<'_>, directory: BorrowedFd<'_>, name: &[u8]) -> Result<(), Errno> {
    let flags = AtFlags::SYMLINK_FOLLOW;
    rustix::fs::linkat(rustix::fs::CWD, proc_path(file), directory, name, flags)
}
