//! Reading what will not be read again.

use std::os::fd::{BorrowedFd, OwnedFd};

use replicator_common::sys::direct::{self, ALIGNED};
use replicator_common::sys::quiet;
use rustix::fs::OFlags;
use rustix::io::Errno;

/// Fewer bytes are read through the page cache: a read past it waits for the disk.
const LEAST: usize = 64 << 10;

/// Reads a file of which nothing will be needed again: past the page cache, where little of
/// it is there and nobody writes to it. What the disk gives is not copied then, and no pages
/// are found for it and freed (bench/NOTES.md).
pub(super) struct Once<'a> {
    file: BorrowedFd<'a>,
    direct: Option<OwnedFd>,
    /// Reads that passed the cache by.
    #[cfg(test)]
    passed: usize,
}

impl<'a> Once<'a> {
    /// For a regular file that is open to be read. One to which somebody writes is not to be
    /// read past the cache: ext4 has who writes wait for each such read.
    pub(super) fn new(file: BorrowedFd<'a>, is_at_rest: bool) -> Self {
        // Without a trace in the file's access time, or not at all.
        let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOATIME;
        let direct = is_at_rest.then(|| direct::open(file, flags)).flatten();
        Self {
            file,
            direct,
            #[cfg(test)]
            passed: 0,
        }
    }

    /// Reads as [`quiet::read_more`] does, quietly. Passes the cache by where `offset` and the
    /// end of what is in `bytes` are multiples of [`ALIGNED`], and leaves off at such a one if it
    /// can.
    ///
    /// What was written before the call is read either way: the kernel writes out what is
    /// dirty of the range first.
    ///
    /// # Errors
    /// What the system says of a read through the cache.
    pub(super) fn read_more(
        &mut self,
        bytes: &mut Vec<u8>,
        (offset, most): (u64, u64),
    ) -> Result<usize, Errno> {
        let spare = bytes.spare_capacity_mut();
        let fits = (spare.len() as u64).min(most);
        let whole = fits / ALIGNED as u64 * ALIGNED as u64;
        let most = if whole > 0 && offset.is_multiple_of(ALIGNED as u64) { whole } else { fits };
        if most >= LEAST as u64
            && most == whole
            && spare.as_ptr().addr().is_multiple_of(ALIGNED)
            && let Some(past) = &self.direct
        {
            match direct::cached(self.file, offset, whole) {
                // Somebody writes to it.
                Some(cached) if cached.unwritten => self.direct = None,
                // Quietly: some files of these file systems are read through the cache all
                // the same.
                Some(cached) if cached.bytes <= whole / 2 => {
                    match quiet::read_more(past, bytes, (offset, whole), true) {
                        Ok(read) => {
                            #[cfg(test)]
                            (self.passed += 1);
                            return Ok(read);
                        }
                        // What this file system wants aligned otherwise, an error of somebody
                        // else's write that was not told yet, a bad block of which the cache
                        // has a copy: what counts is what the cache says.
                        Err(_) => self.direct = None,
                    }
                }
                _ => {}
            }
        }
        quiet::read_more(self.file, bytes, (offset, most), true)
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::Write;
    use std::os::fd::AsFd;
    use std::os::unix::fs::FileExt;

    use replicator_common::sys::place;

    use super::*;

    /// Whole pages, and some bytes.
    const LENGTH: usize = (1 << 20) + 77;

    /// Not where temporary files are by default: that may be tmpfs.
    fn file() -> (File, Vec<u8>) {
        let bytes: Vec<u8> = (0..LENGTH).map(|at| (at * 31 + at / 509) as u8).collect();
        let mut file = tempfile::tempfile_in("/var/tmp").unwrap();
        file.write_all(&bytes).unwrap();
        (file, bytes)
    }

    fn forget(file: &File) {
        file.sync_all().unwrap();
        place::forget_cached(file);
    }

    /// All of it, `step` bytes at a time, into memory that suits.
    fn read(once: &mut Once<'_>, step: usize) -> Vec<u8> {
        let mut all = Vec::new();
        loop {
            let mut memory = Vec::<u8>::with_capacity(2 * ALIGNED + step);
            memory.resize(memory.as_ptr().align_offset(ALIGNED), 0);
            let from = memory.len();
            let most = step.min(LENGTH - all.len()) as u64;
            if once.read_more(&mut memory, (all.len() as u64, most)).unwrap() == 0 {
                return all;
            }
            all.extend_from_slice(&memory[from..]);
        }
    }

    /// The bytes are the same however they are read, and what was in no cache is in none
    /// afterwards.
    #[test]
    fn a_file_is_read_as_without() {
        let (file, mut bytes) = file();
        for (step, direct) in [(LENGTH, 1), (512 << 10, 2), (100_000, 11), (5000, 0)] {
            forget(&file);
            let mut once = Once::new(file.as_fd(), true);
            assert!(read(&mut once, step) == bytes, "nothing cached, {step} at a time");
            assert_eq!(once.passed, direct);
            assert_eq!(direct::cached(&file, 0, 1 << 20).unwrap().bytes, 0);
            file.read_exact_at(&mut [0; 4096], 300_000).unwrap();
            assert!(read(&mut once, step) == bytes, "some cached, {step} at a time");
            // (What the kernel read ahead of that page may be most of some steps.)
            assert!(once.passed + 3 >= 2 * direct, "{} of {direct}", once.passed);
            file.write_all_at(&[step as u8; 9000], 700_001).unwrap();
            bytes[700_001..709_001].fill(step as u8);
            assert!(read(&mut once, step) == bytes, "some not written yet, {step} at a time");
            // Somebody writes to it.
            assert!(step < LEAST || once.direct.is_none());
            let passed = once.passed;
            assert!(read(&mut once, step) == bytes && once.passed == passed);
        }
    }

    #[test]
    fn what_is_not_at_rest_is_read_as_any_other() {
        let (file, bytes) = file();
        forget(&file);
        let mut once = Once::new(file.as_fd(), false);
        assert!(read(&mut once, 512 << 10) == bytes && once.passed == 0);
    }

    /// Content that is cut off meanwhile ends where the file does.
    #[test]
    fn a_file_that_shrinks_ends() {
        let (file, bytes) = file();
        let mut once = Once::new(file.as_fd(), true);
        forget(&file);
        file.set_len(600_001).unwrap();
        forget(&file);
        assert!(read(&mut once, 512 << 10) == bytes[..600_001]);
        assert!(once.passed > 0);
    }
}
