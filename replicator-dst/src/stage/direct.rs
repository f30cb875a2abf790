//! Writing a large new file past the page cache.
//!
//! What arrives of a first sync is written once and read by nobody here: in the
//! page cache it would only displace what somebody reads, and copying it there, page
//! by page into memory that has to be found first, was a third of what receiving a
//! large file cost (`bench/NOTES.md`).
//!
//! Only on file systems of which it is known that this writes the same file that a
//! write through the cache would (btrfs, for one, would not compress it).

use std::os::fd::{AsFd, OwnedFd};

use replicator_common::sys::place;
use rustix::fs::OFlags;
use rustix::io::Errno;

/// Files from this size on are written so.
pub(super) const DIRECT_MIN: u64 = 4 << 20;
/// What offsets, lengths and addresses are multiples of: enough for any block size
/// of these file systems up to that of a page.
const ALIGNED: usize = 4096;
/// Bytes of one write.
const ROOM: usize = 1 << 20;
/// Fewer go through the page cache: each write past it waits for the disk, and what is
/// made of blocks here and there would wait for each.
const LEAST: usize = 256 << 10;
/// `EXT4_SUPER_MAGIC`, which ext2 and ext3 have too, and `XFS_SUPER_MAGIC`.
const FILE_SYSTEMS: [u64; 2] = [0xef53, 0x5846_5342];

/// A file's bytes on their way past the page cache.
pub(super) struct Direct {
    /// The file, opened for that; `None` when it has turned out not to go.
    file: Option<OwnedFd>,
    /// Room for [`ROOM`] bytes from `from` on, which is aligned.
    room: Vec<u8>,
    from: usize,
    filled: usize,
    /// Where in the file the first of them belongs: aligned.
    at: u64,
}

impl Direct {
    /// For a file that is staged; `None` where it is written as any other.
    pub(super) fn open(file: &OwnedFd) -> Option<Self> {
        let magic = place::file_system_magic(file).ok()?;
        let direct = OFlags::WRONLY | OFlags::DIRECT;
        let opened = FILE_SYSTEMS.contains(&magic).then(|| place::reopen(file.as_fd(), direct));
        let room = vec![0; ROOM + ALIGNED];
        let from = room.as_ptr().align_offset(ALIGNED);
        // (The standard library may decline to say.)
        (from < ALIGNED).then_some(())?;
        Some(Self { file: Some(opened?.ok()?), room, from, filled: 0, at: 0 })
    }

    /// Up to this offset, what was written last is in the file.
    pub(super) fn done(&self) -> u64 {
        if self.filled == 0 { u64::MAX } else { self.at }
    }

    /// Takes bytes for `at`, which is where the last ones ended, or behind that. After
    /// an error the same may be tried again, and no less: what waits of it is given up.
    pub(super) fn write(
        &mut self,
        file: &OwnedFd,
        mut bytes: &[u8],
        mut at: u64,
    ) -> Result<(), Errno> {
        if at < self.at {
            // Again: all that waits is of that attempt.
            self.filled = 0;
        } else if at < self.end() {
            self.filled = usize::try_from(at - self.at).unwrap_or(0);
        } else if at > self.end() {
            self.flush(file)?;
        }
        while !bytes.is_empty() {
            if self.filled == 0 {
                let head = (at.next_multiple_of(ALIGNED as u64) - at).min(bytes.len() as u64);
                let (head, rest) = bytes.split_at(head as usize);
                place::write_at(file, head, at)?;
                (bytes, at) = (rest, at + head.len() as u64);
                self.at = at;
            }
            let part = bytes.len().min(ROOM - self.filled);
            let to = self.from + self.filled;
            self.room[to..to + part].copy_from_slice(&bytes[..part]);
            self.filled += part;
            (bytes, at) = (&bytes[part..], at + part as u64);
            if self.filled == ROOM {
                self.flush(file)?;
            }
        }
        Ok(())
    }

    fn end(&self) -> u64 {
        self.at + self.filled as u64
    }

    /// Writes all that waits. After an error it still waits.
    pub(super) fn flush(&mut self, file: &OwnedFd) -> Result<(), Errno> {
        let waiting = &self.room[self.from..self.from + self.filled];
        let whole = self.filled / ALIGNED * ALIGNED;
        let (whole, rest) = waiting.split_at(whole);
        let written = match &self.file {
            Some(direct) if whole.len() >= LEAST => place::write_at(direct, whole, self.at),
            _ => place::write_at(file, whole, self.at),
        };
        match written {
            // Whatever it is that this file system wants aligned otherwise.
            Err(Errno::INVAL | Errno::NOTSUP) if self.file.take().is_some() => {
                place::write_at(file, whole, self.at)?;
            }
            result => result?,
        }
        place::write_at(file, rest, self.at + whole.len() as u64)?;
        self.at = self.end();
        self.filled = 0;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::rngs::StdRng;
    use rand::{Rng, SeedableRng};
    use replicator_common::name::Name;

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
                    direct.write(&file, &bytes, at as u64).unwrap();
                }
                match &mut direct {
                    Some(direct) => direct.write(&file, &bytes, at as u64).unwrap(),
                    None => place::write_at(&file, &bytes, at as u64).unwrap(),
                }
                wanted.resize(wanted.len().max(at + length), 0);
                wanted[at..at + length].copy_from_slice(&bytes);
                at += length;
            }
            if let Some(direct) = &mut direct {
                direct.flush(&file).unwrap();
            }
            let mut found = vec![0; wanted.len()];
            assert_eq!(place::read_at(&file, &mut found, 0).unwrap(), wanted.len());
            assert!(found == wanted, "round {round}");
        }
    }
}
