//! Whether a large file's content is what was shipped, although its chunks are
//! cut differently.
//!
//! Chunks are cut extent by extent, and the kernel's answer to where data lies
//! changes when dirty pages are written back, or preallocated blocks are looked
//! at. That is no change: to send for it would be to send a file again after
//! every restart.

use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicBool, Ordering};

use replicator_common::chunk::Chunk;
use replicator_common::wire::Hash;
use rustix::io::Errno;

use super::runs::HOLE;
use super::small::read_full;

/// Holes that the replica need not be told of.
const HOLE_SLACK: u64 = 512 << 10;
/// Read at once where a hole was.
const BLOCK: u64 = 64 << 10;

/// Whether the file, whose chunks are `now`, holds what `then` says. Only what
/// is cut differently is read again, up to the first difference.
pub(super) fn content(fd: BorrowedFd<'_>, now: &[Chunk], then: &[Chunk]) -> Result<bool, Errno> {
    if length(now, |_| true) != length(then, |_| true) {
        return Ok(false);
    }
    let holes = |chunks| length(chunks, |chunk| chunk.hash == HOLE);
    if holes(now) > holes(then) + HOLE_SLACK {
        // Its content may be the same; the room that it takes is not.
        return Ok(false);
    }
    let now: Vec<(u64, Chunk)> = placed(now).collect();
    let mut first = 0;
    for (at, chunk) in placed(then) {
        let end = at + u64::from(chunk.length);
        while first < now.len() && now[first].0 + u64::from(now[first].1.length) <= at {
            first += 1;
        }
        if now.get(first) == Some(&(at, chunk)) {
            continue;
        }
        let same = if chunk.hash == HOLE {
            let data = now[first..].iter().take_while(|(from, _)| *from < end);
            let data = data.filter(|(_, chunk)| chunk.hash != HOLE);
            all_zero(
                fd,
                data.map(|(from, c)| (*from.max(&at), end.min(from + u64::from(c.length)))),
            )?
        } else {
            let mut bytes = vec![0; chunk.length as usize];
            read_full(fd, &mut bytes, at)?;
            Hash::of(&bytes) == chunk.hash
        };
        if !same {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Read at once of what is compared.
const WINDOW: usize = 1 << 20;

/// Whether a file holds these chunks from `at` on, each at its place. Holes may be
/// data there, of zeros; up to the first difference, or until it is told to `stop`.
pub(super) fn in_place(
    fd: BorrowedFd<'_>,
    mut at: u64,
    chunks: &[Chunk],
    stop: &AtomicBool,
) -> Result<bool, Errno> {
    let mut buffer = vec![0; WINDOW];
    let mut rest = chunks;
    while let Some(first) = rest.first() {
        if first.hash == HOLE {
            let end = at + u64::from(first.length);
            if !is_hole(fd, at, end)? && !all_zero(fd, std::iter::once((at, end)))? {
                return Ok(false);
            }
            (at, rest) = (end, &rest[1..]);
            continue;
        }
        // At least one: the longest chunk fits.
        let mut filled = 0;
        let fits = rest.iter().take_while(|chunk| {
            let fits = chunk.hash != HOLE && filled + chunk.length as usize <= WINDOW;
            filled += if fits { chunk.length as usize } else { 0 };
            fits
        });
        let (these, after) = rest.split_at(fits.count());
        if these.is_empty() {
            return Ok(false);
        }
        let mut bytes = &mut buffer[..filled];
        // (What the buffer held before must not be taken for the file's.)
        if stop.load(Ordering::Relaxed) || read_full(fd, bytes, at)? < filled {
            return Ok(false);
        }
        for chunk in these {
            let (one, others) = bytes.split_at_mut(chunk.length as usize);
            if Hash::of(one) != chunk.hash {
                return Ok(false);
            }
            bytes = others;
        }
        at += filled as u64;
        rest = after;
    }
    Ok(true)
}

/// Whether nothing was written to a part of a file, as far as its file system tells.
fn is_hole(fd: BorrowedFd<'_>, from: u64, to: u64) -> Result<bool, Errno> {
    match rustix::fs::seek(fd, rustix::fs::SeekFrom::Data(from)) {
        Ok(start) => Ok(start >= to),
        Err(Errno::NXIO) => Ok(true),
        Err(Errno::INVAL | Errno::OPNOTSUPP) => Ok(false),
        Err(error) => Err(error),
    }
}

fn length(chunks: &[Chunk], counts: impl Fn(&Chunk) -> bool) -> u64 {
    chunks.iter().filter(|chunk| counts(chunk)).map(|chunk| u64::from(chunk.length)).sum()
}

/// Each chunk with where it begins.
fn placed(chunks: &[Chunk]) -> impl Iterator<Item = (u64, Chunk)> + '_ {
    let mut at = 0;
    chunks.iter().map(move |chunk| {
        let from = at;
        at += u64::from(chunk.length);
        (from, *chunk)
    })
}

fn all_zero(
    fd: BorrowedFd<'_>,
    mut ranges: impl Iterator<Item = (u64, u64)>,
) -> Result<bool, Errno> {
    ranges.try_fold(true, |same, (mut at, end)| {
        let mut bytes = vec![0; BLOCK as usize];
        while same && at < end {
            let part = &mut bytes[..(end - at).min(BLOCK) as usize];
            part.fill(0);
            read_full(fd, part, at)?;
            if part.iter().any(|byte| *byte != 0) {
                return Ok(false);
            }
            at += part.len() as u64;
        }
        Ok(same)
    })
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::fd::AsFd;

    use super::*;

    /// Chunks of `bytes` cut at `cuts`; what is all zeros is a hole.
    fn cut(bytes: &[u8], cuts: &[usize]) -> Vec<Chunk> {
        let ends = cuts.iter().copied().chain([bytes.len()]);
        let mut from = 0;
        ends.map(|end| {
            let part = &bytes[from..end];
            from = end;
            let hash = if part.iter().all(|b| *b == 0) { HOLE } else { Hash::of(part) };
            Chunk { length: part.len() as u32, hash }
        })
        .collect()
    }

    /// Any byte that differs is found, also where a hole was, and a file that is too
    /// short; what follows the chunks does not count.
    #[test]
    fn chunks_at_their_places() {
        let mut bytes: Vec<u8> = (0..3_000_000u32).map(|n| (n % 251) as u8 + 1).collect();
        bytes[1_000_000..1_200_000].fill(0);
        let cuts: Vec<usize> = (1..30).map(|n| n * 100_000).filter(|at| *at != 1_100_000).collect();
        let chunks = cut(&bytes, &cuts);
        let same = |bytes: &[u8], from: usize, first: usize, stop: bool| {
            let mut file = tempfile::tempfile().unwrap();
            file.write_all(bytes).unwrap();
            let stop = AtomicBool::new(stop);
            in_place(file.as_fd(), from as u64, &chunks[first..], &stop).unwrap()
        };
        assert!(same(&bytes, 0, 0, false) && same(&bytes, 200_000, 2, false));
        assert!(same(&[&bytes[..], b"more"].concat(), 0, 0, false));
        for at in [0, 1_000_000, 1_150_000, 1_199_999, 1_200_000, 2_999_999] {
            let mut other = bytes.clone();
            other[at] ^= 0xff;
            assert!(!same(&other, 0, 0, false), "{at}");
        }
        // (The end of the last chunk is still in the buffer, of the chunk before.)
        assert!(!same(&bytes[..2_999_999], 0, 0, false), "shorter");
        assert!(!same(&bytes, 0, 0, true), "stopped");
    }

    #[test]
    fn the_same_content_cut_differently() {
        let mut bytes: Vec<u8> = (0..300_000u32).map(|n| (n % 251) as u8 + 1).collect();
        bytes[100_000..200_000].fill(0);
        let then = cut(&bytes, &[50_000, 100_000, 200_000, 250_000]);
        let same = |bytes: &[u8], cuts: &[usize]| {
            let mut file = tempfile::tempfile().unwrap();
            file.write_all(bytes).unwrap();
            content(file.as_fd(), &cut(bytes, cuts), &then).unwrap()
        };
        for cuts in [
            &[][..],
            &[50_000, 100_000, 200_000, 250_000],
            &[50_000, 99_000, 150_000, 250_000],
            &[10_000, 20_000, 210_000],
        ] {
            assert!(same(&bytes, cuts), "{cuts:?}");
        }
        for at in [0, 49_999, 100_000, 150_000, 199_999, 200_000, 299_999] {
            let mut other = bytes.clone();
            other[at] ^= 0xff;
            assert!(!same(&other, &[60_000, 120_000]), "{at}");
        }
        assert!(!same(&bytes[..299_999], &[60_000]), "shorter");
    }
}
