//! Writing a large new file past the page cache.
//!
//! What arrives of a first sync is written once and read by nobody here: in the
//! page cache it would only displace what somebody reads, and copying it there, page
//! by page into memory that has to be found first, was a third of what receiving a
//! large file cost (`bench/NOTES.md`).
//!
//! Each such write waits for the disk, so a thread does it ([`super::behind`]), while
//! more is received.
//!
//! Only on file systems of which it is known that this writes the same file that a
//! write through the cache would (btrfs, for one, would not compress it).

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use replicator_common::sys::direct::{self, ALIGNED};
use replicator_common::sys::place;
use rustix::fs::OFlags;
use rustix::io::Errno;

use super::behind::Behind;

/// Files from this size on are written so.
pub(super) const DIRECT_MIN: u64 = 512 << 10;
/// Bytes of one write.
const ROOM: usize = 1 << 20;
/// Such writes that a file may have waiting in any case, one of them being filled.
const ROOMS: usize = 3;
/// How many more may wait of all files of the process together: while the disk empties
/// its cache (for an early sync, or of its own accord) it takes nothing, and what arrives
/// meanwhile would stop at the third.
const MORE_ROOMS: usize = 29;
/// Fewer go through the page cache: each write past it waits for the disk, and what is
/// made of blocks here and there would wait for each.
const LEAST: usize = 256 << 10;

/// A file, open in both ways.
pub(super) struct Files {
    plain: OwnedFd,
    direct: OwnedFd,
    /// It has turned out not to go.
    refused: AtomicBool,
}

impl Files {
    fn open(file: &OwnedFd) -> Option<Self> {
        let direct = direct::open(file.as_fd(), OFlags::WRONLY)?;
        Some(Self { plain: file.try_clone().ok()?, direct, refused: AtomicBool::new(false) })
    }

    /// Writes what a room holds.
    pub(super) fn write(&self, room: &Room) -> Result<(), Errno> {
        let bytes = room.bytes();
        let (whole, rest) = bytes.split_at(bytes.len() / ALIGNED * ALIGNED);
        if whole.len() < LEAST || self.refused.load(Ordering::Relaxed) {
            return place::write_at(&self.plain, bytes, room.at);
        }
        match place::write_at(&self.direct, whole, room.at) {
            // Whatever it is that this file system wants aligned otherwise.
            Err(Errno::INVAL | Errno::NOTSUP) => {
                self.refused.store(true, Ordering::Relaxed);
                place::write_at(&self.plain, whole, room.at)?;
            }
            result => result?,
        }
        place::write_at(&self.plain, rest, room.at + whole.len() as u64)
    }
}

/// How many of [`MORE_ROOMS`] nobody has.
static LEFT: AtomicUsize = AtomicUsize::new(MORE_ROOMS);

/// One of [`MORE_ROOMS`]; when dropped, somebody else may have it.
struct More;

impl More {
    fn take() -> Option<Self> {
        let less = |left: usize| left.checked_sub(1);
        LEFT.fetch_update(Ordering::Relaxed, Ordering::Relaxed, less).ok().map(|_| Self)
    }
}

impl Drop for More {
    fn drop(&mut self) {
        LEFT.fetch_add(1, Ordering::Relaxed);
    }
}

/// Bytes that belong side by side in a file.
pub(super) struct Room {
    /// INVARIANT: never grows above its first capacity, for its address is aligned.
    memory: Vec<u8>,
    /// Where in it the bytes begin.
    from: usize,
    /// Where in the file the first of them belongs: aligned.
    at: u64,
    /// Unless it is one of the file's own [`ROOMS`].
    more: Option<More>,
}

impl Room {
    fn new(more: Option<More>) -> Self {
        let (memory, from) = direct::room_behind(&[], ROOM);
        Self { memory, from, at: 0, more }
    }

    fn bytes(&self) -> &[u8] {
        &self.memory[self.from..]
    }

    fn is_empty(&self) -> bool {
        self.bytes().is_empty()
    }

    fn is_full(&self) -> bool {
        self.bytes().len() == ROOM
    }

    /// Where in the file it begins.
    pub(super) fn at(&self) -> u64 {
        self.at
    }

    fn end(&self) -> u64 {
        self.at + self.bytes().len() as u64
    }

    /// Takes as many of the bytes as fit, and says how many those are.
    fn take(&mut self, bytes: &[u8]) -> usize {
        let part = bytes.len().min(ROOM - self.bytes().len());
        self.memory.extend_from_slice(&bytes[..part]);
        part
    }

    /// Forgets its bytes; those to come belong there.
    fn begin(&mut self, at: u64) {
        self.memory.truncate(self.from);
        self.at = at;
    }
}

/// A file's bytes on their way past the page cache.
pub(super) struct Direct {
    files: Arc<Files>,
    behind: Behind,
    /// What came last.
    room: Room,
    /// Rooms with nothing in them, and how many of its own are not made yet.
    spare: Vec<Room>,
    unmade: usize,
    /// What could not be written.
    failed: Vec<Room>,
}

impl Direct {
    /// For a file that is staged; `None` where it is written as any other.
    pub(super) fn open(file: &OwnedFd) -> Option<Self> {
        let files = Arc::new(Files::open(file)?);
        let behind = Behind::start(files.clone()).ok()?;
        let (spare, failed) = (Vec::new(), Vec::new());
        Some(Self { files, behind, room: Room::new(None), spare, unmade: ROOMS - 1, failed })
    }

    /// Whether anything that was taken may not be in the file yet.
    pub(super) fn is_waiting(&self) -> bool {
        self.done() < u64::MAX
    }

    /// Up to this offset, what was taken is in the file.
    pub(super) fn done(&self) -> u64 {
        let taken = (!self.room.is_empty()).then_some(self.room.at);
        let failed = self.failed.iter().map(Room::at);
        self.behind.first().into_iter().chain(failed).chain(taken).min().unwrap_or(u64::MAX)
    }

    /// Takes bytes for `at`, which is where the last ones ended, or behind that. After
    /// an error the same may be tried again, and no less; what was taken of it the
    /// first time is not taken again.
    pub(super) fn write(&mut self, mut bytes: &[u8], mut at: u64) -> Result<(), Errno> {
        self.collect()?;
        let end = self.room.end();
        if at < end {
            let taken = (end - at).min(bytes.len() as u64);
            (bytes, at) = (&bytes[taken as usize..], at + taken);
        } else if at > end {
            self.hand_over()?;
            self.room.begin(at);
        }
        while !bytes.is_empty() {
            if self.room.is_full() {
                self.hand_over()?;
            }
            if self.room.is_empty() {
                let head = (at.next_multiple_of(ALIGNED as u64) - at).min(bytes.len() as u64);
                let (head, rest) = bytes.split_at(head as usize);
                place::write_at(&self.files.plain, head, at)?;
                (bytes, at) = (rest, at + head.len() as u64);
                self.room.begin(at);
            }
            let part = self.room.take(bytes);
            (bytes, at) = (&bytes[part..], at + part as u64);
        }
        if self.room.is_full() {
            self.hand_over()?;
        }
        Ok(())
    }

    /// Writes all that waits. After an error it still waits.
    pub(super) fn flush(&mut self) -> Result<(), Errno> {
        while self.behind.is_busy() {
            self.wait()?;
        }
        self.retry()?;
        self.files.write(&self.room)?;
        self.room.begin(self.room.end());
        Ok(())
    }

    /// Has the room written that is being filled, and begins another.
    fn hand_over(&mut self) -> Result<(), Errno> {
        if self.room.is_empty() {
            return Ok(());
        }
        let mut next = loop {
            if let Some(room) = self.spare.pop().or_else(|| self.make()) {
                break room;
            }
            if !self.behind.is_busy() {
                return Err(Errno::NOMEM);
            }
            self.wait()?;
            self.retry()?;
        };
        next.begin(self.room.end());
        let full = std::mem::replace(&mut self.room, next);
        self.failed.extend(self.behind.write(full));
        Ok(())
    }

    /// One more room, if it may have one.
    fn make(&mut self) -> Option<Room> {
        if self.unmade == 0 {
            return Some(Room::new(Some(More::take()?)));
        }
        self.unmade -= 1;
        Some(Room::new(None))
    }

    /// Sees what has been written.
    fn collect(&mut self) -> Result<(), Errno> {
        while let Some((room, written)) = self.behind.written() {
            self.returned(room, written);
        }
        self.retry()
    }

    /// Waits for a write.
    fn wait(&mut self) -> Result<(), Errno> {
        let (room, written) = self.behind.wait()?;
        self.returned(room, written);
        Ok(())
    }

    fn returned(&mut self, room: Room, written: Result<(), Errno>) {
        match written {
            Ok(()) => self.keep(room),
            Err(_) => self.failed.push(room),
        }
    }

    /// Keeps a room for what follows; one that all files share only while the disk does
    /// not keep up.
    fn keep(&mut self, room: Room) {
        if room.more.is_none() || self.spare.is_empty() {
            self.spare.push(room);
        }
    }

    /// Writes what could not be written.
    fn retry(&mut self) -> Result<(), Errno> {
        while let Some(room) = self.failed.last() {
            self.files.write(room)?;
            if let Some(room) = self.failed.pop() {
                self.keep(room);
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::rngs::StdRng;
    use rand::{Rng, SeedableRng};
    use replicator_common::name::Name;

    /// What a process may have waiting is bounded, and free again afterwards.
    #[test]
    fn rooms_are_shared_and_given_back() {
        let all: Vec<More> = std::iter::from_fn(More::take).collect();
        assert!((1..=MORE_ROOMS).contains(&all.len()));
        drop(all);
        assert!(More::take().is_some());
    }

    /// Parts of any length, with gaps, some of them again, give the file that
    /// plain writes give.
    #[test]
    fn a_file_is_written_as_without() {
        let seed = std::env::var("REPLICATOR_SEED").ok().and_then(|seed| seed.parse().ok());
        let seed = seed.unwrap_or_else(rand::random::<u64>);
        println!("REPLICATOR_SEED={seed}");
        let mut random = StdRng::seed_from_u64(seed);
        // Not where temporary files are by default: that may be tmpfs.
        let base = tempfile::tempdir_in("/var/tmp").unwrap();
        let directory = place::open_directory_path(base.path()).unwrap();
        for round in 0..20 {
            let name = Name::new(format!("f{round}").as_bytes()).unwrap();
            let file = place::create_file(directory.as_fd(), &name).unwrap();
            let mut direct = Direct::open(&file);
            let mut wanted: Vec<u8> = Vec::new();
            let mut at = 0usize;
            for _ in 0..random.random_range(1..30) {
                if random.random_ratio(1, 6) {
                    at += random.random_range(0..100_000);
                }
                let length = random.random_range(1..700_000);
                let bytes: Vec<u8> = (0..length).map(|_| random.random()).collect();
                // As after an error: the same once more.
                if let Some(direct) = direct.as_mut().filter(|_| random.random_ratio(1, 6)) {
                    direct.write(&bytes, at as u64).unwrap();
                }
                match &mut direct {
                    Some(direct) => direct.write(&bytes, at as u64).unwrap(),
                    None => place::write_at(&file, &bytes, at as u64).unwrap(),
                }
                wanted.resize(wanted.len().max(at + length), 0);
                wanted[at..at + length].copy_from_slice(&bytes);
                at += length;
            }
            if let Some(direct) = &mut direct {
                direct.flush().unwrap();
            }
            let mut found = vec![0; wanted.len()];
            assert_eq!(place::read_at(&file, &mut found, 0).unwrap(), wanted.len());
            assert!(found == wanted, "round {round}");
        }
    }
}
