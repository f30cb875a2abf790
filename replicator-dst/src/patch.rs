//! The list of an in-place patch: what goes where. Stands in a staging file of
//! its own, because it may be longer than a commit record should be.
//!
//! Format: 8 bytes magic `rplpat01`, then records of 24 bytes: three
//! little-endian u64, offset in the object, length, and place in the literals'
//! file (`u64::MAX` for a hole). The last record begins with `u64::MAX`, then the count of the
//! records before it and the first eight bytes of the BLAKE3 hash of their bytes.

use std::io::{self, Read, Write};

use replicator_common::wire::Extent;

const MAGIC: &[u8; 8] = b"rplpat01";
/// Third value of a record that makes a hole.
const HOLE: u64 = u64::MAX;
/// First value of the last record.
const END: u64 = u64::MAX;

/// One piece of a patch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PatchPiece {
    /// Where in the object.
    pub target: Extent,
    /// Where its bytes stand among the literals; `None` for a hole.
    pub literal: Option<u64>,
}

/// Writes a list.
#[derive(Debug)]
pub struct PatchWriter<W: Write> {
    out: W,
    hasher: blake3::Hasher,
    count: u64,
}

impl<W: Write> PatchWriter<W> {
    /// Starts a list.
    pub fn create(mut out: W) -> io::Result<Self> {
        out.write_all(MAGIC)?;
        Ok(Self { out, hasher: blake3::Hasher::new(), count: 0 })
    }

    /// Adds a piece.
    pub fn push(&mut self, piece: &PatchPiece) -> io::Result<()> {
        let values = [piece.target.offset, piece.target.length, piece.literal.unwrap_or(HOLE)];
        let record = record(values);
        self.hasher.update(&record);
        self.count += 1;
        self.out.write_all(&record)
    }

    /// Ends the list; without this it cannot be read.
    pub fn finish(mut self) -> io::Result<()> {
        let sum = checksum(&self.hasher);
        self.out.write_all(&record([END, self.count, sum]))?;
        self.out.flush()
    }
}

fn record(values: [u64; 3]) -> [u8; 24] {
    let mut record = [0; 24];
    for (slot, value) in record.chunks_exact_mut(8).zip(values) {
        slot.copy_from_slice(&value.to_le_bytes());
    }
    record
}

fn checksum(hasher: &blake3::Hasher) -> u64 {
    let mut sum = [0; 8];
    sum.copy_from_slice(&hasher.finalize().as_bytes()[..8]);
    u64::from_le_bytes(sum)
}

/// Reads a list, calling `see` for each piece; the error of a damaged or
/// unfinished list comes at its end at the latest.
pub fn read<R: Read>(
    mut from: R,
    mut see: impl FnMut(PatchPiece) -> io::Result<()>,
) -> io::Result<()> {
    let damaged = || io::Error::new(io::ErrorKind::InvalidData, "patch list is damaged");
    let mut magic = [0; 8];
    from.read_exact(&mut magic)?;
    if magic != *MAGIC {
        return Err(damaged());
    }
    let (mut hasher, mut count) = (blake3::Hasher::new(), 0u64);
    loop {
        let mut bytes = [0; 24];
        from.read_exact(&mut bytes)?;
        let value = |i: usize| {
            let mut word = [0; 8];
            word.copy_from_slice(&bytes[i * 8..i * 8 + 8]);
            u64::from_le_bytes(word)
        };
        let [offset, length, place] = [value(0), value(1), value(2)];
        if offset == END {
            let whole = length == count && place == checksum(&hasher);
            return if whole { Ok(()) } else { Err(damaged()) };
        }
        hasher.update(&bytes);
        count += 1;
        let literal = (place != HOLE).then_some(place);
        see(PatchPiece { target: Extent { offset, length }, literal })?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_damaged_list_is_found() {
        let pieces = [
            PatchPiece { target: Extent { offset: 5, length: 6 }, literal: Some(0) },
            PatchPiece { target: Extent { offset: 50, length: 60 }, literal: None },
        ];
        let mut good = Vec::new();
        let mut writer = PatchWriter::create(&mut good).unwrap();
        pieces.iter().for_each(|piece| writer.push(piece).unwrap());
        writer.finish().unwrap();
        let mut seen = Vec::new();
        read(&good[..], |piece| {
            seen.push(piece);
            Ok(())
        })
        .unwrap();
        assert_eq!(seen, pieces);
        for cut in 0..good.len() {
            assert!(read(&good[..cut], |_| Ok(())).is_err(), "cut at {cut}");
        }
        for i in 0..good.len() {
            let mut bad = good.clone();
            bad[i] ^= 1;
            assert!(read(&bad[..], |_| Ok(())).is_err(), "byte {i}");
        }
    }
}
