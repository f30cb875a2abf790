//! Content that passes the page cache by.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use rustix::fs::OFlags;

use super::place;

/// What offsets, lengths and addresses are multiples of: enough for any block size of ext4 and
/// xfs up to that of a page.
pub const ALIGNED: usize = 4096;
/// `EXT4_SUPER_MAGIC`, which ext2 and ext3 have too, and `XFS_SUPER_MAGIC`.
const FILE_SYSTEMS: [u64; 2] = [0xef53, 0x5846_5342];

/// Opens a regular file once more, past the page cache; `None` where it is read and written
/// as any other.
pub fn open(file: BorrowedFd<'_>, flags: OFlags) -> Option<OwnedFd> {
    let magic = place::file_system_magic(file).ok()?;
    if !FILE_SYSTEMS.contains(&magic) {
        return None;
    }
    place::reopen(file, flags | OFlags::DIRECT).ok()
}

/// Memory in which `first` is followed by room for `more` bytes, which begins at a multiple
/// of [`ALIGNED`] wherever that can be had; and where in it `first` begins.
///
/// It never needs to grow for so many bytes, which would take it elsewhere.
pub fn room_behind(first: &[u8], more: usize) -> (Vec<u8>, usize) {
    let mut memory = Vec::<u8>::with_capacity(ALIGNED + first.len() + more);
    let to = memory.as_ptr().wrapping_add(first.len()).align_offset(ALIGNED);
    // (The standard library may decline to say.)
    let from = if to < ALIGNED { to } else { 0 };
    memory.resize(from, 0);
    memory.extend_from_slice(first);
    (memory, from)
}

/// What the page cache has of a part of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cached {
    /// Bytes, in whole pages.
    pub bytes: u64,
    /// Whether some of them are not on the disk yet.
    pub unwritten: bool,
}

/// What the page cache has of a part of a file; `None` where the kernel does not tell
/// (before Linux 6.5, or not to us).
pub fn cached(file: impl AsFd, offset: u64, length: u64) -> Option<Cached> {
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
    told.then(|| Cached {
        bytes: pages.cached.saturating_mul(rustix::param::page_size() as u64),
        unwritten: pages.dirty > 0 || pages.written_back > 0,
    })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;

    #[test]
    fn what_is_cached_is_told() {
        const LENGTH: u64 = 1 << 20;
        // Not where temporary files are by default: that may be tmpfs.
        let file = tempfile::tempfile_in("/var/tmp").unwrap();
        file.write_all_at(&[1; LENGTH as usize], 0).unwrap();
        let told = |offset, length| cached(&file, offset, length).unwrap();
        assert_eq!(told(0, LENGTH), Cached { bytes: LENGTH, unwritten: true });
        file.sync_all().unwrap();
        assert_eq!(told(0, LENGTH), Cached { bytes: LENGTH, unwritten: false });
        place::forget_cached(&file);
        assert_eq!(told(0, LENGTH), Cached { bytes: 0, unwritten: false });
        file.write_all_at(&[2; 4096], 5 << 12).unwrap();
        assert_eq!(told(0, LENGTH / 2), Cached { bytes: 4096, unwritten: true });
        assert_eq!(told(LENGTH / 2, LENGTH / 2), Cached { bytes: 0, unwritten: false });
    }

    #[test]
    fn room_begins_where_it_should_and_stays_there() {
        for (length, more) in [(0, 4096), (1, 5), (4095, 100_000), (4096, 512 << 10), (70_001, 1)] {
            let first = vec![7; length];
            let (mut memory, from) = room_behind(&first, more);
            assert_eq!(memory[from..], first);
            let room = memory.spare_capacity_mut().as_ptr().addr();
            assert!(room.is_multiple_of(ALIGNED), "behind {length}");
            let at = memory.as_ptr();
            memory.resize(memory.len() + more, 1);
            assert_eq!(memory.as_ptr(), at, "it moved");
        }
    }
}
