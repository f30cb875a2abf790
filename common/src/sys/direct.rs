//! Content that passes the page cache by.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use rustix::fs::OFlags;
use rustix::io::Errno;

use super::{place, quiet};

/// What offsets, lengths and addresses are multiples of: enough for any block size of
/// [`FILE_SYSTEMS`] up to that of a page.
pub const ALIGNED: usize = 4096;
/// `EXT4_SUPER_MAGIC`, which ext2 and ext3 have too, and `XFS_SUPER_MAGIC`.
const FILE_SYSTEMS: [u64; 2] = [0xef53, 0x5846_5342];
/// Fewer bytes are read through the page cache: a read past it waits for the disk.
const LEAST: usize = 64 << 10;

/// Opens a regular file once more, past the page cache; `None` where it is read and written
/// as any other.
pub fn open(file: BorrowedFd<'_>, flags: OFlags) -> Option<OwnedFd> {
    let magic = place::file_system_magic(file).ok()?;
    if !FILE_SYSTEMS.contains(&magic) {
        return None;
    }
    place::reopen(file, flags | OFlags::DIRECT).ok()
}

/// Reads a file of which nothing will be needed again: past the page cache, where little of
/// it is there. What the disk gives is not copied, and no pages are found for it and
/// freed, which is half of what a read costs (bench/NOTES.md).
pub struct Once<'a> {
    file: BorrowedFd<'a>,
    direct: Option<OwnedFd>,
}

impl<'a> Once<'a> {
    /// For a regular file that is open to be read.
    pub fn new(file: BorrowedFd<'a>) -> Self {
        // Without a trace in the file's access time, or not at all.
        Self { file, direct: open(file, OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOATIME) }
    }

    /// Reads as [`quiet::read_more`] does, quietly. Passes the cache by where `offset` and the end of
    /// what is in `bytes` are multiples of [`ALIGNED`], and leaves off at such a one if it can.
    ///
    /// What was written before the call is read either way: the kernel writes out what is
    /// dirty of the range first.
    ///
    /// # Errors
    /// What the system says.
    pub fn read_more(
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
            && let Some(direct) = &self.direct
            && !is_cached(self.file, offset, whole)
        {
            match quiet::read_more(direct, bytes, (offset, whole), false) {
                // Whatever it is that this file system wants aligned otherwise.
                Err(Errno::INVAL | Errno::NOTSUP) => self.direct = None,
                result => return result,
            }
        }
        quiet::read_more(self.file, bytes, (offset, most), true)
    }
}

/// Whether more than half of a part of a file is in the page cache, or anything is that
/// would have to be written first. True where the kernel does not tell (before Linux 6.5,
/// or not to us).
fn is_cached(file: impl AsFd, offset: u64, length: u64) -> bool {
    /// `cachestat(2)`: its number is the same on all architectures but Alpha.
    const CACHESTAT: libc::c_long = 451;
    #[repr(C)]
    struct Range {
        offset: u64,
        length: u64,
    }
    #[repr(C)]
    #[derive(Default)]
    struct Pages {
        cached: u64,
        dirty: u64,
        written_back: u64,
        evicted: u64,
        recently_evicted: u64,
    }
    let (range, mut pages) = (Range { offset, length }, Pages::default());
    let fd = file.as_fd().as_raw_fd();
    // SAFETY: reads the range and writes the counts, which both live until it returns and
    // are laid out as the kernel's `cachestat_range` and `cachestat`; flags are 0.
    let told = unsafe { libc::syscall(CACHESTAT, fd, &raw const range, &raw mut pages, 0) } == 0;
    let cached = pages.cached.saturating_mul(rustix::param::page_size() as u64);
    !told || cached > length / 2 || pages.dirty > 0 || pages.written_back > 0
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::Write;
    use std::os::unix::fs::FileExt;

    use rustix::fs::Advice;

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
        rustix::fs::fadvise(file, 0, None, Advice::DontNeed).unwrap();
    }

    /// All of it, `step` bytes at a time, into memory that suits.
    fn read(once: &mut Once<'_>, step: usize) -> Vec<u8> {
        let mut all = Vec::new();
        loop {
            let mut memory = Vec::<u8>::with_capacity(2 * ALIGNED + step);
            memory.resize(memory.as_ptr().align_offset(ALIGNED), 0);
            let from = memory.len();
            if once.read_more(&mut memory, (all.len() as u64, step as u64)).unwrap() == 0 {
                return all;
            }
            all.extend_from_slice(&memory[from..]);
        }
    }

    #[test]
    fn what_is_cached_is_told() {
        let (file, _) = file();
        assert!(is_cached(&file, 0, 64 << 10), "what was written a moment ago");
        forget(&file);
        assert!(!is_cached(&file, 0, 1 << 20));
        file.write_all_at(b"x", 5 << 12).unwrap();
        assert!(is_cached(&file, 0, 1 << 20), "what waits to be written");
        assert!(!is_cached(&file, 512 << 10, 512 << 10));
    }

    /// The bytes are the same however they are read, and what was in no cache is in none
    /// afterwards.
    #[test]
    fn a_file_is_read_as_without() {
        let (file, mut bytes) = file();
        let mut once = Once::new(file.as_fd());
        for step in [LENGTH, 512 << 10, 100_000, 5000] {
            forget(&file);
            assert!(read(&mut once, step) == bytes, "nothing cached, {step} at a time");
            file.read_exact_at(&mut [0; 4096], 300_000).unwrap();
            assert!(read(&mut once, step) == bytes, "some cached, {step} at a time");
            file.write_all_at(&[step as u8; 9000], 700_001).unwrap();
            bytes[700_001..709_001].fill(step as u8);
            assert!(read(&mut once, step) == bytes, "some not written yet, {step} at a time");
        }
        forget(&file);
        read(&mut once, 512 << 10);
        assert!(once.direct.is_some(), "the file system of /var/tmp is read as any other");
        assert!(!is_cached(&file, 0, 1 << 20));
    }

    /// Content that is cut off meanwhile ends where the file does.
    #[test]
    fn a_file_that_shrinks_ends() {
        let (file, bytes) = file();
        let mut once = Once::new(file.as_fd());
        forget(&file);
        file.set_len(600_001).unwrap();
        assert!(read(&mut once, 512 << 10) == bytes[..600_001]);
    }
}
