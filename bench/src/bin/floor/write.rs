//! The replica: what arrives is opened, verified and written.

use std::ffi::OsStr;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use anyhow::{Context, Result, ensure};
use replicator_common::wire::Hash;
use rustix::fs::{AtFlags, Gid, Mode, OFlags, Timespec, Timestamps, Uid};

use crate::packet::{Header, Item, Key, Packet, State, What};
use crate::read::PART;

/// Whole pages are written past the page cache.
const PAGE: usize = 4096;

/// Times of directories, which are set when all is in them.
pub type Times = Mutex<Vec<(PathBuf, State)>>;

/// Writes what comes until nothing more does.
pub fn receive(replica: &Path, mut from: UnixStream, times: &Times) -> Result<()> {
    let (key, mut packet) = (Key::new()?, Packet::with_room(3 * PART));
    let mut writer = Writer { replica, times, directory: None, file: None };
    while let Some(header) = packet.receive(&key, &mut from)? {
        let place = || OsStr::from_bytes(&header.directory).to_string_lossy().into_owned();
        writer.write(&header, packet.body()).with_context(place)?;
    }
    Ok(())
}

struct Writer<'a> {
    replica: &'a Path,
    times: &'a Times,
    /// The directory of the packet before.
    directory: Option<(Vec<u8>, OwnedFd)>,
    /// A large file under way, open in both ways.
    file: Option<(OwnedFd, OwnedFd)>,
}

impl Writer<'_> {
    fn write(&mut self, header: &Header, body: &[u8]) -> Result<()> {
        if self.directory.as_ref().is_none_or(|(path, _)| *path != header.directory) {
            self.enter(header)?;
        }
        let mut rest = body;
        for item in &header.items {
            let bytes = match item.what {
                What::File(length) | What::Symlink(length) => {
                    let (bytes, after) = rest.split_at(length as usize);
                    rest = after;
                    bytes
                }
                What::Part { .. } => body,
            };
            self.item(item, bytes)?;
        }
        Ok(())
    }

    fn enter(&mut self, header: &Header) -> Result<()> {
        let path = Path::new(OsStr::from_bytes(&header.directory));
        let full = self.replica.join(path);
        std::fs::create_dir_all(&full)?;
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let directory = rustix::fs::open(&full, flags, Mode::empty())?;
        self.directory = Some((header.directory.clone(), directory));
        let mut times = self.times.lock().unwrap_or_else(PoisonError::into_inner);
        times.push((path.to_owned(), header.state));
        Ok(())
    }

    fn item(&mut self, item: &Item, bytes: &[u8]) -> Result<()> {
        let (_, directory) = self.directory.as_ref().context("a packet of no directory")?;
        if let What::Symlink(_) = item.what {
            rustix::fs::symlinkat(bytes, directory, &item.name[..])?;
            let at = AtFlags::SYMLINK_NOFOLLOW;
            rustix::fs::utimensat(directory, &item.name[..], &times(&item.state), at)?;
            return Ok(());
        }
        ensure!(Hash::of(bytes).0 == item.hash, "wrong bytes");
        match item.what {
            What::Part { offset, last } => {
                let (plain, direct) = match self.file.take() {
                    Some(file) => file,
                    None => {
                        let file = create(directory, item)?;
                        let direct = OFlags::WRONLY | OFlags::DIRECT;
                        let direct = replicator_common::sys::place::reopen(file.as_fd(), direct)?;
                        (file, direct)
                    }
                };
                let (pages, tail) = bytes.split_at(bytes.len() / PAGE * PAGE);
                write_at(&direct, pages, offset)?;
                write_at(&plain, tail, offset + pages.len() as u64)?;
                match last {
                    true => finish(&plain, &item.state)?,
                    false => self.file = Some((plain, direct)),
                }
            }
            _ => {
                let file = create(directory, item)?;
                write_at(&file, bytes, 0)?;
                finish(&file, &item.state)?;
            }
        }
        Ok(())
    }
}

fn create(directory: &OwnedFd, item: &Item) -> Result<OwnedFd> {
    let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::CLOEXEC;
    let mode = Mode::from_bits_truncate(item.state.mode);
    Ok(rustix::fs::openat(directory, &item.name[..], flags, mode)?)
}

fn write_at(file: &OwnedFd, bytes: &[u8], offset: u64) -> Result<()> {
    Ok(replicator_common::sys::place::write_at(file, bytes, offset)?)
}

/// Owner and times of a file; its mode too where making it did not give that.
fn finish(file: impl AsFd, state: &State) -> Result<()> {
    let (owner, group) = state.owner;
    if state.owner != (0, 0) {
        rustix::fs::fchown(&file, Some(Uid::from_raw(owner)), Some(Gid::from_raw(group)))?;
    }
    if state.mode & 0o7022 != 0 {
        rustix::fs::fchmod(&file, Mode::from_bits_truncate(state.mode))?;
    }
    Ok(rustix::fs::futimens(&file, &times(state))?)
}

/// The same of a directory that has all that is in it.
pub fn finish_directory(path: &Path, state: &State) -> Result<()> {
    let directory = std::fs::File::open(path)?;
    rustix::fs::fchmod(&directory, Mode::from_bits_truncate(state.mode))?;
    finish(&directory, state).with_context(|| path.display().to_string())
}

fn times(state: &State) -> Timestamps {
    let (tv_sec, tv_nsec) = state.mtime;
    let last = Timespec { tv_sec, tv_nsec: tv_nsec as _ };
    Timestamps { last_access: last, last_modification: last }
}
