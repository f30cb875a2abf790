//! A large file, chunk by chunk.
//!
//! Of one thread's time for a file that is sent as it is read, reading and cutting are more
//! than half, hashing and sending the rest: two threads share it (bench/NOTES.md).
//!
//! Memory: two windows that wait and one in the hands of each thread, of 512 KiB, or of 2 MiB
//! where chunks are of the largest kind.

use std::io;
use std::ops::Range;
use std::os::fd::BorrowedFd;
use std::sync::mpsc::sync_channel;
use std::thread;
use std::time::Duration;

use bytes::Bytes;
use replicator_common::chunk::{Chunk, Chunker, Window};
use replicator_common::sys::quiet;
use replicator_common::sys::stat::Stat;
use replicator_common::time::Timestamp;
use replicator_common::wire::Extent;
use rustix::io::Errno;

use super::extents;
use super::lane::LaneError;
use super::once::Once;
use super::runs::HOLE;

/// From so many bytes on, a second thread is worth its start.
const SHARED: u64 = 4 << 20;
/// From so many bytes on, a part of a file is worth being opened once more.
const DIRECT_MIN: u64 = 512 << 10;
/// How long nobody has written to a file that is read past the page cache.
const REST: Duration = Duration::from_secs(10);
/// Bytes that a file may have: holes take an entry of the chunk list for each GiB (36 MB for
/// all of this), and whoever may make files could name any size.
const SIZE_MAX: u64 = 1 << 50;
/// Windows that are cut and wait to be hashed.
const AHEAD: usize = 2;

/// A part of a file.
pub(super) enum Part {
    /// So many bytes that are nothing, 1 GiB at most.
    Hole(u32),
    /// Data.
    Data(Extent),
}

/// Calls `each` with the parts of a file in order; it gives the bytes that it found of one.
///
/// # Errors
/// Those of `each`, and `EFBIG` of a file of more than 1 PiB.
pub(super) fn each_part(
    (fd, stat): (BorrowedFd<'_>, &Stat),
    mut each: impl FnMut(Part) -> Result<u64, LaneError>,
) -> Result<(), LaneError> {
    if stat.size > SIZE_MAX {
        return Err(Errno::FBIG.into());
    }
    let mut at = 0;
    let mut extents = extents::of(fd, stat)?;
    extents.push(Extent { offset: stat.size, length: 0 });
    for extent in extents {
        while at < extent.offset {
            at += each(Part::Hole((extent.offset - at).min(1 << 30) as u32))?;
        }
        if extent.length > 0 {
            at += each(Part::Data(extent))?;
        }
    }
    Ok(())
}

/// Calls `each` with every chunk of a file in order, and with where its bytes
/// stand; holes come without. Where it is read but `once`, it leaves no trace in the
/// page cache.
pub(super) fn each_chunk(
    (fd, stat): (BorrowedFd<'_>, &Stat),
    average: u32,
    once: bool,
    mut each: impl FnMut(Chunk, Option<(&Bytes, Range<usize>)>) -> Result<(), LaneError>,
) -> Result<(), LaneError> {
    each_part((fd, stat), |part| {
        let extent = match part {
            Part::Hole(length) => {
                each(Chunk { length, hash: HOLE }, None)?;
                return Ok(u64::from(length));
            }
            Part::Data(extent) => extent,
        };
        let direct = extent.length >= DIRECT_MIN && is_at_rest(stat);
        let once = once.then(|| Once::new(fd, direct));
        let chunker = Chunker::new(reader(fd, extent, once), average);
        let mut found = 0;
        let each = |window: Window| {
            found += window.bytes.len() as u64;
            each_of(&window, &mut each)
        };
        if extent.length >= SHARED {
            each_shared(chunker, each)?;
        } else {
            each_window(chunker, each)?;
        }
        Ok(found)
    })
}

fn each_of(
    window: &Window,
    mut each: impl FnMut(Chunk, Option<(&Bytes, Range<usize>)>) -> Result<(), LaneError>,
) -> Result<(), LaneError> {
    let mut end = 0;
    for chunk in &window.chunks {
        let range = end..end + chunk.length as usize;
        end = range.end;
        if is_zero(&window.bytes[range.clone()]) {
            each(Chunk { hash: HOLE, ..*chunk }, None)?;
        } else {
            each(*chunk, Some((&window.bytes, range)))?;
        }
    }
    Ok(())
}

/// Whether data is a hole for us. Preallocated blocks that were looked at count as data,
/// though nothing was ever written there. Zeros need no room anyway.
pub(super) fn is_zero(bytes: &[u8]) -> bool {
    bytes.iter().all(|byte| *byte == 0)
}

fn each_window<R: FnMut(&mut Vec<u8>) -> io::Result<usize>>(
    chunker: Chunker<'_, R>,
    mut each: impl FnMut(Window) -> Result<(), LaneError>,
) -> Result<(), LaneError> {
    for window in chunker {
        each(window.map_err(unreadable)?)?;
    }
    Ok(())
}

/// [`each_window`], with a thread that reads and cuts while the windows before are
/// hashed, and sent.
fn each_shared<R: FnMut(&mut Vec<u8>) -> io::Result<usize> + Send>(
    mut chunker: Chunker<'_, R>,
    mut each: impl FnMut(Window) -> Result<(), LaneError>,
) -> Result<(), LaneError> {
    let shared = thread::scope(|scope| {
        let (cut, windows) = sync_channel(AHEAD);
        let ahead = || {
            while let Some(next) = chunker.cuts().transpose() {
                let failed = next.is_err();
                // Nobody wants it where the session has ended.
                if cut.send(next).is_err() || failed {
                    break;
                }
            }
            drop(cut);
        };
        if thread::Builder::new().name("lane-ahead".to_owned()).spawn_scoped(scope, ahead).is_err()
        {
            return Ok(false);
        }
        for next in windows {
            each(next.map_err(unreadable)?.hash())?;
        }
        Ok::<_, LaneError>(true)
    })?;
    // Too many threads on this host: one does both.
    if shared { Ok(()) } else { each_window(chunker, each) }
}

pub(super) fn unreadable(error: io::Error) -> LaneError {
    LaneError::Read(Errno::from_io_error(&error).unwrap_or(Errno::IO))
}

/// Whether nobody has written to a file for a while.
fn is_at_rest(stat: &Stat) -> bool {
    Timestamp::now().0.saturating_sub(stat.mtime.0) > REST.as_nanos() as i64
}

/// Reads a part of a file as [`Chunker`] wants it, and no byte behind the part: there
/// another begins, or a hole. Where it is read `once`, it leaves no trace in the page cache.
pub(super) fn reader<'a>(
    fd: BorrowedFd<'a>,
    part: Extent,
    mut once: Option<Once<'a>>,
) -> impl FnMut(&mut Vec<u8>) -> io::Result<usize> + Send + use<'a> {
    let (mut at, end) = (part.offset, part.offset + part.length);
    move |bytes| {
        let read = match &mut once {
            Some(once) => once.read_more(bytes, (at, end - at))?,
            None => quiet::read_more(fd, bytes, (at, end - at), false)?,
        };
        at += read as u64;
        Ok(read)
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::fd::AsFd;
    use std::os::unix::fs::FileExt;
    use std::time::SystemTime;

    use replicator_common::chunk::AVERAGE_MIN;
    use replicator_common::sys::{place, stat};
    use replicator_common::wire::Hash;

    use super::super::sink::SinkError;
    use super::*;

    /// Content, a hole, and content again, of which the two threads share the first.
    const FIRST: usize = 2 * SHARED as usize + 12_345;
    const HOLE_TO: usize = FIRST + (3 << 20);
    const END: usize = HOLE_TO + 600_000;

    fn sparse() -> (File, Vec<u8>) {
        let mut state = 1u64;
        let mut bytes: Vec<u8> = (0..END)
            .map(|_| {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                (state >> 56) as u8
            })
            .collect();
        bytes[FIRST..HOLE_TO].fill(0);
        // Not where temporary files are by default: that may be tmpfs.
        let file = tempfile::tempfile_in("/var/tmp").unwrap();
        file.write_all_at(&bytes[..FIRST], 0).unwrap();
        file.write_all_at(&bytes[HOLE_TO..], HOLE_TO as u64).unwrap();
        // At rest, and in no cache: it is read past the page cache.
        file.sync_all().unwrap();
        file.set_modified(SystemTime::now() - 2 * REST).unwrap();
        place::forget_cached(&file);
        (file, bytes)
    }

    /// Every byte comes once and in order, with its hash; a whole file by two threads
    /// has the chunks that one finds.
    #[test]
    fn two_threads_find_what_one_finds() {
        let (file, bytes) = sparse();
        let stat = stat::of_fd(file.as_fd()).unwrap();
        let (mut chunks, mut at) = (Vec::new(), 0);
        each_chunk((file.as_fd(), &stat), AVERAGE_MIN, true, |chunk, data| {
            let is = &bytes[at..at + chunk.length as usize];
            match data {
                None => assert!(is.iter().all(|byte| *byte == 0), "no hole at {at}"),
                Some((window, range)) => {
                    assert_eq!(&window[range], is, "at {at}");
                    assert_eq!(chunk.hash, Hash::of(is), "at {at}");
                }
            }
            at += is.len();
            chunks.push(chunk);
            Ok(())
        })
        .unwrap();
        assert_eq!(at, END);
        let mut one = Vec::new();
        each_part((file.as_fd(), &stat), |part| match part {
            Part::Hole(length) => {
                one.push(Chunk { length, hash: HOLE });
                Ok(u64::from(length))
            }
            Part::Data(part) => {
                let chunker = Chunker::new(reader(file.as_fd(), part, None), AVERAGE_MIN);
                each_window(chunker, |window| {
                    each_of(&window, |chunk, _| {
                        one.push(chunk);
                        Ok(())
                    })
                })?;
                Ok(part.length)
            }
        })
        .unwrap();
        assert_eq!(chunks, one);
    }

    /// Of a file of any size that somebody could name there is no list that fills the memory.
    #[test]
    fn a_file_too_large_is_refused() {
        let file = tempfile::tempfile().unwrap();
        let stat = stat::of_fd(file.as_fd()).unwrap();
        let holes = |size: u64| {
            let mut holes = 0;
            let stat = Stat { size, ..stat.clone() };
            each_part((file.as_fd(), &stat), |part| match part {
                Part::Hole(length) => {
                    holes += 1;
                    Ok(u64::from(length))
                }
                Part::Data(_) => unreachable!("it is empty"),
            })
            .map(|()| holes)
        };
        assert_eq!(holes(SIZE_MAX).unwrap(), 1 << 20);
        let refused = holes(SIZE_MAX + 1);
        assert!(matches!(refused, Err(LaneError::Read(Errno::FBIG))), "{refused:?}");
    }

    /// What the other thread could not read is told.
    #[test]
    fn what_cannot_be_read_is_an_error() {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().write_all_at(&[1; FIRST], 0).unwrap();
        let closed = File::options().write(true).open(file.path()).unwrap();
        let stat = stat::of_fd(closed.as_fd()).unwrap();
        let ended = each_chunk((closed.as_fd(), &stat), AVERAGE_MIN, true, |_, _| Ok(()));
        assert!(matches!(ended, Err(LaneError::Read(Errno::BADF))), "{ended:?}");
    }

    /// The first error ends it, although windows wait.
    #[test]
    fn an_error_ends_both_threads() {
        let (file, _) = sparse();
        let stat = stat::of_fd(file.as_fd()).unwrap();
        let mut met = 0;
        let ended = each_chunk((file.as_fd(), &stat), AVERAGE_MIN, true, |_, _| {
            met += 1;
            if met < 3 { Ok(()) } else { Err(SinkError::Closed.into()) }
        });
        assert!(matches!(ended, Err(LaneError::Sink(SinkError::Closed))), "{ended:?}");
        assert_eq!(met, 3);
    }
}
