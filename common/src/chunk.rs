//! Content-defined chunks of larger files.
//!
//! Files above [`crate::wire::PACK_MAX`] are cut by FastCDC where their
//! content says so, and each chunk is known by its BLAKE3 hash. An insertion
//! shifts the bytes behind it but not their chunks, so only the chunks around
//! the change are new.

use std::io::{self, Read};

use serde::{Deserialize, Serialize};

use crate::wire::Hash;

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
/// so that a list stays below some 10 MB up to 64 GiB.
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

/// Cuts a stream into chunks.
pub struct Chunker<R: Read> {
    inner: fastcdc::v2020::StreamCDC<R>,
}

/// A chunk with its place and its bytes.
pub struct ChunkData {
    /// First byte in the stream.
    pub offset: u64,
    /// Length and hash.
    pub chunk: Chunk,
    /// The bytes.
    pub bytes: Vec<u8>,
}

impl<R: Read> Chunker<R> {
    /// `average` is one of those that [`average_for`] gives: minimum a quarter
    /// of it, maximum four times it.
    pub fn new(source: R, average: u32) -> Self {
        let average = average.clamp(AVERAGE_MIN, AVERAGE_MAX);
        Self { inner: fastcdc::v2020::StreamCDC::new(source, average / 4, average, average * 4) }
    }
}

impl<R: Read> Iterator for Chunker<R> {
    type Item = io::Result<ChunkData>;

    fn next(&mut self) -> Option<Self::Item> {
        Some(match self.inner.next()? {
            Ok(data) => Ok(ChunkData {
                offset: data.offset,
                chunk: Chunk { length: data.length as u32, hash: Hash::of(&data.data) },
                bytes: data.data,
            }),
            Err(error) => Err(error.into()),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cut(bytes: &[u8]) -> Vec<Chunk> {
        Chunker::new(bytes, AVERAGE_MIN).map(|c| c.unwrap().chunk).collect()
    }

    #[test]
    fn an_insertion_changes_few_chunks() {
        let mut state = 1u64;
        let mut data: Vec<u8> = (0..2_000_000)
            .map(|_| {
                state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                (state >> 56) as u8
            })
            .collect();
        let before = cut(&data);
        data.splice(1_000_000..1_000_000, *b"inserted");
        let after = cut(&data);
        let known: std::collections::HashSet<_> = before.iter().map(|c| c.hash).collect();
        let fresh = after.iter().filter(|c| !known.contains(&c.hash)).count();
        assert!((1..=3).contains(&fresh), "{fresh} of {} chunks are new", after.len());
        assert_eq!(after.iter().map(|c| u64::from(c.length)).sum::<u64>(), data.len() as u64);
    }
}
