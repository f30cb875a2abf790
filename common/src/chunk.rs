//! Content-defined chunks of larger files.
//!
//! Files above [`crate::wire::PACK_MAX`] are cut by FastCDC where their
//! content says so, and each chunk is known by its BLAKE3 hash. An insertion
//! shifts the bytes behind it but not their chunks, so only the chunks around
//! the change are new.

mod cut;
mod expected;

use std::io;

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use crate::sys::direct::{ALIGNED, room_behind};
use crate::wire::Hash;
use cut::Cutter;
pub use expected::Expected;

/// In chunk lists, the hash of a hole.
pub const NONE: Hash = Hash([0; 32]);

/// One chunk; its offset is the sum of the lengths before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Chunk {
    /// Bytes; never 0.
    pub length: u32,
    /// Hash of the bytes.
    pub hash: Hash,
}

/// Smallest average size of chunks, bytes.
pub const AVERAGE_MIN: u32 = 16 << 10;
/// Largest average size of chunks, bytes. Four times it is the longest chunk,
/// which must fit a [`crate::wire::Piece`].
pub const AVERAGE_MAX: u32 = 256 << 10;

/// The average chunk size for a file of `size` bytes: it grows with the file
/// so that a list stays below some 40 MB up to 64 GiB.
pub fn average_for(size: u64) -> u32 {
    match size >> 30 {
        0..4 => AVERAGE_MIN,
        4..64 => 64 << 10,
        _ => AVERAGE_MAX,
    }
}

/// Whether chunks of `average` still suit a file of `size` bytes. Generous, so
/// that a file which grows slowly past a border is not cut anew each time.
pub fn average_suits(average: u32, size: u64) -> bool {
    let ideal = average_for(size);
    (AVERAGE_MIN..=AVERAGE_MAX).contains(&average)
        && average <= ideal.saturating_mul(4)
        && average >= ideal / 4
}

/// Chunks shorter than the average by this factor were cut short by the end of the data. Lists of
/// earlier versions have longer ones that are below today's minimum, and are to be met again.
const SHORT: u32 = 4;

/// Bytes that are read at once: few enough that some of them stay in the processor's
/// cache until they are cut, hashed and sent; and at least twice the longest chunk
/// that [`AVERAGE_MIN`] makes.
const WINDOW: usize = 512 << 10;

/// Cuts a stream into chunks, window by window: bytes are read to where they are
/// sent from, and not copied but for the end of a window, which may be the
/// beginning of a chunk.
pub struct Chunker<'a, R> {
    read: R,
    average: u32,
    cutter: Cutter,
    /// What was there before, and the last of its chunks that was met again.
    expected: Option<&'a Expected<'a>>,
    last: Option<usize>,
    /// Where the next chunk begins.
    at: u64,
    /// Of the window before: what is not cut yet.
    rest: Vec<u8>,
    ended: bool,
}

/// Some bytes of a stream, and where they are cut.
pub struct Cuts {
    bytes: Bytes,
    /// Lengths, and hashes where the search needed them.
    chunks: Vec<(u32, Option<Hash>)>,
}

impl Cuts {
    /// Hashes what is not hashed yet.
    pub fn hash(self) -> Window {
        let mut end = 0;
        let chunks = self.chunks.into_iter().map(|(length, hash)| {
            let from = end;
            end += length as usize;
            Chunk { length, hash: hash.unwrap_or_else(|| Hash::of(&self.bytes[from..end])) }
        });
        Window { chunks: chunks.collect(), bytes: self.bytes }
    }
}

/// Some bytes of a stream, and the chunks that they consist of.
pub struct Window {
    /// The bytes.
    pub bytes: Bytes,
    /// The chunks, which cover them.
    pub chunks: Vec<Chunk>,
}

impl<'a, R: FnMut(&mut Vec<u8>) -> io::Result<usize>> Chunker<'a, R> {
    /// `read` appends the next bytes of the stream, as many as fit into the
    /// spare capacity or fewer; 0 says that the stream ended. What it appends first to some
    /// bytes stands at a multiple of [`ALIGNED`], so that it may pass the page cache by.
    /// `average` is one of those
    /// that [`average_for`] gives: minimum three quarters of it, maximum four times it.
    pub fn new(read: R, average: u32) -> Self {
        let average = average.clamp(AVERAGE_MIN, AVERAGE_MAX);
        let cutter = Cutter::new(average);
        let (expected, last, at, rest) = (None, None, 0, Vec::new());
        Self { read, average, cutter, expected, last, at, rest, ended: false }
    }

    /// The stream begins at `at` of what probably consists of these chunks, cut with
    /// the same average. It is cut where it would be without them, but for chunks that are
    /// met again although they had been cut short where the data ended, or by an earlier
    /// version elsewhere.
    pub fn expecting(self, expected: &'a Expected<'a>, at: u64) -> Self {
        Self { expected: Some(expected), at, ..self }
    }

    /// The next window, which is left to be hashed by another thread; `None` at the
    /// end of the stream.
    ///
    /// # Errors
    /// Those of reading.
    pub fn cuts(&mut self) -> io::Result<Option<Cuts>> {
        let longest = self.average as usize * 4;
        let more = (WINDOW.max(2 * longest) - self.rest.len()) / ALIGNED * ALIGNED;
        let (mut memory, from) = room_behind(&self.rest, more);
        self.rest.clear();
        let full = memory.len() + more;
        while !self.ended && memory.len() < full {
            self.ended = (self.read)(&mut memory)? == 0;
        }
        let bytes = &memory[from..];
        if bytes.is_empty() {
            return Ok(None);
        }
        let (mut chunks, mut at) = (Vec::new(), 0);
        // A cut means something only if the longest chunk would have fitted.
        while at < bytes.len() && (self.ended || bytes.len() - at >= longest) {
            let (length, hash) = match self.expected {
                Some(expected) => self.met_or_cut(expected, &bytes[at..]),
                None => (self.cutter.cut(&bytes[at..]) as u32, None),
            };
            chunks.push((length, hash));
            at += length as usize;
            self.at += u64::from(length);
        }
        self.rest.extend_from_slice(&bytes[at..]);
        memory.truncate(from + at);
        Ok(Some(Cuts { bytes: Bytes::from(memory).slice(from..), chunks }))
    }

    /// The chunk that begins where the bytes do, with its hash.
    fn met_or_cut(&mut self, expected: &Expected<'_>, bytes: &[u8]) -> (u32, Option<Hash>) {
        let met = expected.chunk(&mut self.last, self.at, bytes, self.average / SHORT);
        let Chunk { length, hash } = met.unwrap_or_else(|| {
            let length = self.cutter.cut(bytes);
            let chunk = Chunk { length: length as u32, hash: Hash::of(&bytes[..length]) };
            self.last = expected.find(&chunk);
            chunk
        });
        (length, Some(hash))
    }
}

impl<R: FnMut(&mut Vec<u8>) -> io::Result<usize>> Iterator for Chunker<'_, R> {
    type Item = io::Result<Window>;

    fn next(&mut self) -> Option<Self::Item> {
        self.cuts().transpose().map(|cuts| cuts.map(Cuts::hash))
    }
}

#[cfg(test)]
mod tests {
    use fastcdc::v2020::{FastCDC, Normalization};

    use super::*;

    /// Reads `bytes`, at most `step` at once.
    fn reader(bytes: &[u8], step: usize) -> impl FnMut(&mut Vec<u8>) -> io::Result<usize> + '_ {
        let mut rest = bytes;
        move |out| {
            let room = (out.capacity() - out.len()).min(step);
            let (part, after) = rest.split_at(room.min(rest.len()));
            out.extend_from_slice(part);
            rest = after;
            Ok(part.len())
        }
    }

    fn cut(bytes: &[u8]) -> Vec<Chunk> {
        let windows = Chunker::new(reader(bytes, usize::MAX), AVERAGE_MIN);
        windows.flat_map(|window| window.unwrap().chunks).collect()
    }

    fn noise(length: usize) -> Vec<u8> {
        let mut state = 1u64;
        let mut step = || {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (state >> 56) as u8
        };
        (0..length).map(|_| step()).collect()
    }

    /// What the crate makes of our parameters: its average is what it adds to the minimum.
    fn crates(bytes: &[u8], average: u32) -> FastCDC<'_> {
        let (min, max) = (average / 4 * 3, average * 4);
        FastCDC::with_level(bytes, min, average / 2, max, Normalization::Level0)
    }

    #[test]
    fn windows_do_not_show() {
        let data = noise(3_000_000);
        for average in [AVERAGE_MIN, 64 << 10, AVERAGE_MAX] {
            let expected: Vec<_> =
                crates(&data, average).map(|chunk| chunk.length as u32).collect();
            for step in [usize::MAX, 4096, 100_003] {
                let mut at = 0;
                let mut lengths = Vec::new();
                for window in Chunker::new(reader(&data, step), average) {
                    let window = window.unwrap();
                    assert_eq!(window.bytes, data[at..at + window.bytes.len()]);
                    for chunk in window.chunks {
                        let end = at + chunk.length as usize;
                        assert_eq!(chunk.hash, Hash::of(&data[at..end]));
                        lengths.push(chunk.length);
                        at = end;
                    }
                }
                assert_eq!(at, data.len());
                assert_eq!(lengths, expected, "average {average}, step {step}");
            }
        }
    }

    /// Cuts of all lengths of data, random and not, are those of the crate.
    #[test]
    fn cuts_are_those_of_fastcdc() {
        let mut data = noise(800_000);
        data[100_000..400_000].fill(7);
        data[400_000..500_000].iter_mut().for_each(|byte| *byte &= 3);
        for average in [AVERAGE_MIN, 64 << 10] {
            let cutter = Cutter::new(average);
            let min = average as usize / 4 * 3;
            let about = |length: usize| [length - 1, length, length + 1, length + 2, length + 3];
            // Where all bytes are the same, only the maximum cuts.
            let edges = about(min).into_iter().chain(about(4 * average as usize));
            let each = (0..60).map(|n| (n * 9_973, 1_000 * n + n * n * 101 + n % 2));
            for (start, length) in each.chain(edges.map(|length| (120_000, length))) {
                let bytes = &data[start..data.len().min(start + length)];
                let theirs = crates(bytes, average);
                let end = if bytes.is_empty() { 0 } else { theirs.cut(0, bytes.len()).1 };
                assert_eq!(cutter.cut(bytes), end, "{start} {length} {average}");
            }
        }
    }

    /// With what was there before, and however it changed, the chunks are the same
    /// as without.
    #[test]
    fn what_is_expected_changes_nothing_but_the_time() {
        let before = noise(2_000_000);
        let list = cut(&before);
        let expected = Expected::new(&list);
        let mut overwritten = before.clone();
        for at in (10_000..2_000_000).step_by(150_000) {
            overwritten[at..at + 4096].copy_from_slice(&noise(8192)[4096..]);
        }
        let mut shifted = before.clone();
        shifted.splice(700_000..700_000, *b"inserted");
        shifted.drain(1_500_000..1_500_100);
        let appended = [&before[..], &noise(50_000)[..]].concat();
        let shorter = before[..1_234_567].to_vec();
        for now in [&before, &overwritten, &shifted, &appended, &shorter, &noise(300_000)] {
            let windows = Chunker::new(reader(now, 100_003), AVERAGE_MIN).expecting(&expected, 0);
            let found: Vec<_> = windows.flat_map(|window| window.unwrap().chunks).collect();
            assert!(found == cut(now), "of {} bytes", now.len());
        }
    }

    /// A list of an earlier version, whose chunks end elsewhere and could be shorter: where the
    /// content is the same it stays as it is, and only around a change it is cut as today.
    #[test]
    fn a_list_cut_otherwise_is_met_again() {
        let mut data = noise(2_000_000);
        let earlier = FastCDC::new(&data, AVERAGE_MIN / 4, AVERAGE_MIN, AVERAGE_MIN * 4);
        let list: Vec<_> = earlier
            .map(|cut| Chunk {
                length: cut.length as u32,
                hash: Hash::of(&data[cut.offset..cut.offset + cut.length]),
            })
            .collect();
        assert!(list != cut(&data), "the cuts are the same");
        let expected = Expected::new(&list);
        let now = |data: &[u8]| -> Vec<Chunk> {
            let windows = Chunker::new(reader(data, 100_003), AVERAGE_MIN).expecting(&expected, 0);
            windows.flat_map(|window| window.unwrap().chunks).collect()
        };
        assert!(now(&data) == list, "what did not change was cut anew");

        data[1_000_000] ^= 1;
        let known: std::collections::HashSet<_> = list.iter().map(|chunk| chunk.hash).collect();
        let fresh = now(&data).into_iter().filter(|chunk| !known.contains(&chunk.hash)).count();
        assert!((1..=8).contains(&fresh), "{fresh} of {} chunks are new", list.len());
    }

    #[test]
    fn an_insertion_changes_few_chunks() {
        let mut data = noise(2_000_000);
        let before = cut(&data);
        data.splice(1_000_000..1_000_000, *b"inserted");
        let after = cut(&data);
        let known: std::collections::HashSet<_> = before.iter().map(|c| c.hash).collect();
        let fresh = after.iter().filter(|c| !known.contains(&c.hash)).count();
        assert!((1..=3).contains(&fresh), "{fresh} of {} chunks are new", after.len());
        assert_eq!(after.iter().map(|c| u64::from(c.length)).sum::<u64>(), data.len() as u64);
    }
}
