//! The source: directories are shared out, what is in them is read, hashed and sent.

use std::ffi::OsStr;
use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::{Condvar, Mutex, PoisonError};

use anyhow::{Context, Result, bail};
use replicator_common::wire::Hash;
use rustix::fs::{Dir, FileType, Mode, OFlags};

use crate::packet::{Header, Item, Key, Packet, State, What};

/// Bytes of a packet of files, about.
const PACK: usize = 256 << 10;
/// Files of a packet at most.
const ITEMS: usize = 1024;
/// Bytes of a part of a file.
pub const PART: usize = 1 << 20;

/// Directories that are still to be read.
pub struct Tree {
    root: PathBuf,
    /// Those, and how many readers are at one.
    queue: Mutex<(Vec<PathBuf>, usize)>,
    changed: Condvar,
}

impl Tree {
    pub fn new(root: &Path) -> Self {
        let queue = Mutex::new((vec![PathBuf::new()], 0));
        Self { root: root.to_owned(), queue, changed: Condvar::new() }
    }

    /// The next; `None` when there are no more, nor will be.
    fn next(&self) -> Option<PathBuf> {
        let mut queue = self.queue.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            if let Some(directory) = queue.0.pop() {
                queue.1 += 1;
                return Some(directory);
            }
            if queue.1 == 0 {
                return None;
            }
            queue = self.changed.wait(queue).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn done(&self, below: Vec<PathBuf>) {
        let mut queue = self.queue.lock().unwrap_or_else(PoisonError::into_inner);
        queue.0.extend(below);
        queue.1 -= 1;
        self.changed.notify_all();
    }
}

/// Sends directories until there are no more.
pub fn send(tree: &Tree, to: UnixStream) -> Result<()> {
    let (key, packet) = (Key::new()?, Packet::with_room(PACK + PART));
    let mut out = Sender { key, packet, to, body: Vec::with_capacity(2 * PART) };
    while let Some(directory) = tree.next() {
        let mut below = Vec::new();
        let sent = out.directory(tree, &directory, &mut below);
        tree.done(below);
        sent.with_context(|| directory.display().to_string())?;
    }
    Ok(())
}

struct Sender {
    key: Key,
    packet: Packet,
    to: UnixStream,
    body: Vec<u8>,
}

impl Sender {
    fn directory(&mut self, tree: &Tree, path: &Path, below: &mut Vec<PathBuf>) -> Result<()> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let directory = rustix::fs::open(tree.root.join(path), flags, Mode::empty())?;
        let (state, _) = state_of(&directory)?;
        let name = path.as_os_str().as_bytes().to_vec();
        let mut header = Header { directory: name, state, items: Vec::new() };
        for entry in Dir::read_from(&directory)? {
            let entry = entry?;
            let name = entry.file_name().to_bytes();
            match entry.file_type() {
                FileType::Directory if name == b"." || name == b".." => {}
                FileType::Directory => below.push(path.join(OsStr::from_bytes(name))),
                FileType::RegularFile => self.file(&directory, name, &mut header)?,
                FileType::Symlink => self.symlink(&directory, name, &mut header)?,
                FileType::Unknown => bail!("a file system that does not tell kinds"),
                _ => {}
            }
            if self.body.len() >= PACK || header.items.len() == ITEMS {
                self.flush(&mut header)?;
            }
        }
        self.flush(&mut header)
    }

    fn file(&mut self, directory: &OwnedFd, name: &[u8], header: &mut Header) -> Result<()> {
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NOATIME | OFlags::CLOEXEC;
        let file = rustix::fs::openat(directory, name, flags, Mode::empty())?;
        let (state, size) = state_of(&file)?;
        if size as usize > PACK {
            return self.parts(file, (name, state, size), header);
        }
        let from = self.body.len();
        self.body.resize(from + size as usize, 0);
        let read = rustix::io::pread(&file, &mut self.body[from..], 0)?;
        self.body.truncate(from + read);
        let hash = Hash::of(&self.body[from..]).0;
        let what = What::File(read as u32);
        header.items.push(Item { name: name.to_vec(), state, what, hash });
        Ok(())
    }

    /// A large file, part by part.
    fn parts(
        &mut self,
        file: OwnedFd,
        (name, state, size): (&[u8], State, u64),
        header: &mut Header,
    ) -> Result<()> {
        self.flush(header)?;
        let file = File::from(file);
        let mut offset = 0;
        while offset < size {
            self.body.resize(PART.min((size - offset) as usize), 0);
            std::os::unix::fs::FileExt::read_exact_at(&file, &mut self.body, offset)?;
            let hash = Hash::of(&self.body).0;
            let end = offset + self.body.len() as u64;
            let what = What::Part { offset, last: end == size };
            header.items.push(Item { name: name.to_vec(), state, what, hash });
            self.flush(header)?;
            offset = end;
        }
        Ok(())
    }

    fn symlink(&mut self, directory: &OwnedFd, name: &[u8], header: &mut Header) -> Result<()> {
        let target = rustix::fs::readlinkat(directory, name, Vec::new())?;
        let (state, _) = state_of_entry(directory, name)?;
        self.body.extend_from_slice(target.as_bytes());
        let what = What::Symlink(target.as_bytes().len() as u32);
        header.items.push(Item { name: name.to_vec(), state, what, hash: [0; 32] });
        Ok(())
    }

    /// Sends what there is of a directory.
    fn flush(&mut self, header: &mut Header) -> Result<()> {
        self.packet.send((header, &self.body), &self.key, &mut self.to)?;
        header.items.clear();
        self.body.clear();
        Ok(())
    }
}

fn state_of(file: impl AsFd) -> Result<(State, u64)> {
    Ok(state(&rustix::fs::fstat(file)?))
}

fn state_of_entry(directory: &OwnedFd, name: &[u8]) -> Result<(State, u64)> {
    let flags = rustix::fs::AtFlags::SYMLINK_NOFOLLOW;
    Ok(state(&rustix::fs::statat(directory, name, flags)?))
}

fn state(stat: &rustix::fs::Stat) -> (State, u64) {
    let (mode, owner) = (stat.st_mode & 0o7777, (stat.st_uid, stat.st_gid));
    (State { mode, owner, mtime: (stat.st_mtime, stat.st_mtime_nsec as i64) }, stat.st_size as u64)
}
