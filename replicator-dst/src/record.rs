//! The record of a transfer: which bytes of its staged file are which chunk, so
//! that a later session can use what had arrived when this one ended.
//!
//! Format: 8 bytes magic `rplrec01`; the size (u64) and time (i64, ns) of the
//! object when the transfer began; a byte that says how long the object's id is,
//! and 167 bytes that begin with it. Then entries of 44 bytes: place in the
//! staged file (u64), length (u32), BLAKE3 hash (32 bytes; zeros: the place was
//! overwritten by what is no chunk). All little-endian. Later entries count more
//! than earlier ones that they overlap.
//!
//! Durability: none. An entry is written after its bytes, so after a crash of
//! the process alone it tells the truth; after a power loss it may name bytes
//! that never reached the disk, be damaged, or be missing. Hence no entry is
//! believed before the bytes were read back and hashed (see [`crate::kept`]).

use std::fs::File;
use std::io::{self, BufReader, Read};
use std::os::fd::{AsFd, OwnedFd};

use replicator_common::chunk::Chunk;
use replicator_common::id::ObjectId;
use replicator_common::sys::place;
use replicator_common::time::Timestamp;
use replicator_common::wire::kept::KEPT_CHUNKS_MAX;
use replicator_common::wire::{Hash, KeptChunk, PIECE_MAX};
use rustix::io::Errno;

const MAGIC: &[u8; 8] = b"rplrec01";
/// Bytes before the first entry.
const HEADER: usize = 192;
/// Where the id's length stands.
const ID_AT: usize = 24;
/// Bytes of an entry.
const ENTRY: usize = 44;
/// Entries are written when there are so many: what a `kill -9` costs is their
/// chunks.
const BUFFERED: usize = 16;
/// No chunk: what stood there was overwritten.
const VOID: Hash = Hash([0; 32]);

/// Of what a record is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// The object.
    pub object: ObjectId,
    /// Its size and time when the transfer began.
    pub was: (u64, Timestamp),
}

impl Header {
    fn encode(&self) -> [u8; HEADER] {
        let mut bytes = [0; HEADER];
        bytes[..8].copy_from_slice(MAGIC);
        bytes[8..16].copy_from_slice(&self.was.0.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.was.1.0.to_le_bytes());
        let id = self.object.as_bytes();
        // INVARIANT: an id is shorter than 168 bytes (`OBJECT_ID_MAX`); one that
        // were not would be read back as none.
        let length = id.len().min(HEADER - ID_AT - 1);
        bytes[ID_AT] = u8::try_from(length).unwrap_or(0);
        bytes[ID_AT + 1..ID_AT + 1 + length].copy_from_slice(&id[..length]);
        bytes
    }

    fn decode(bytes: &[u8; HEADER]) -> Option<Self> {
        let number = |at: usize| bytes[at..at + 8].try_into().map(u64::from_le_bytes).ok();
        if &bytes[..8] != MAGIC {
            return None;
        }
        let length = usize::from(bytes[ID_AT]);
        let object = ObjectId::from_bytes(bytes.get(ID_AT + 1..ID_AT + 1 + length)?)?;
        Some(Self { object, was: (number(8)?, Timestamp(number(16)?.cast_signed())) })
    }
}

/// Writes a record beside the transfer. Dropping it writes what is buffered.
#[derive(Debug)]
pub struct RecordWriter {
    file: OwnedFd,
    end: u64,
    buffer: Vec<u8>,
}

impl RecordWriter {
    /// Begins the record in an empty file.
    pub fn create(file: OwnedFd, header: &Header) -> Result<Self, Errno> {
        place::write_at(&file, &header.encode(), 0)?;
        Ok(Self { file, end: HEADER as u64, buffer: Vec::new() })
    }

    /// Goes on with the record of a transfer before this one, whose staged file
    /// is this one's too.
    pub fn resume(file: OwnedFd, header: &Header) -> Result<Self, Errno> {
        let size = replicator_common::sys::stat::of_fd(&file)?.size;
        let entries = size.saturating_sub(HEADER as u64) / ENTRY as u64;
        place::write_at(&file, &header.encode(), 0)?;
        let end = HEADER as u64 + entries * ENTRY as u64;
        Ok(Self { file, end, buffer: Vec::new() })
    }

    /// A chunk was written at `at`.
    pub fn push(&mut self, at: u64, length: u32, hash: &Hash) -> Result<(), Errno> {
        if self.buffer.len() >= BUFFERED * ENTRY {
            self.flush()?;
        }
        self.buffer.extend_from_slice(&at.to_le_bytes());
        self.buffer.extend_from_slice(&length.to_le_bytes());
        self.buffer.extend_from_slice(&hash.0);
        Ok(())
    }

    /// Something else was written there.
    pub fn void(&mut self, mut at: u64, mut length: u64) -> Result<(), Errno> {
        while length > 0 {
            let part = u32::try_from(length).unwrap_or(u32::MAX);
            self.push(at, part, &VOID)?;
            at += u64::from(part);
            length -= u64::from(part);
        }
        Ok(())
    }

    fn flush(&mut self) -> Result<(), Errno> {
        place::write_at(&self.file, &self.buffer, self.end)?;
        self.end += self.buffer.len() as u64;
        self.buffer.clear();
        Ok(())
    }
}

impl Drop for RecordWriter {
    fn drop(&mut self) {
        // What is not written is not known to have arrived; no more than that.
        let _ = self.flush();
    }
}

/// Reads the header; `None` when it is damaged or none.
pub fn header(file: impl AsFd) -> Option<Header> {
    let mut bytes = [0; HEADER];
    let read = place::read_at(file, &mut bytes, 0).ok()?;
    if read < HEADER { None } else { Header::decode(&bytes) }
}

/// The chunks that a record names, in order of their places and without overlap.
/// Memory: 56 bytes an entry, for at most four times [`KEPT_CHUNKS_MAX`] entries.
pub fn chunks(file: &OwnedFd) -> io::Result<Vec<KeptChunk>> {
    let mut from = BufReader::new(File::from(file.try_clone()?));
    io::Seek::seek(&mut from, io::SeekFrom::Start(HEADER as u64))?;
    let (mut all, mut entry) = (Vec::new(), [0; ENTRY]);
    while all.len() < 4 * KEPT_CHUNKS_MAX {
        match from.read_exact(&mut entry) {
            Ok(()) => all.extend(decode(&entry)),
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => break,
            Err(error) => return Err(error),
        }
    }
    let mut chunks = newest(all);
    chunks.retain(|kept| kept.chunk.hash != VOID && kept.chunk.length as usize <= PIECE_MAX);
    chunks.truncate(KEPT_CHUNKS_MAX);
    Ok(chunks)
}

/// Replaces a record's entries.
pub fn rewrite(file: &OwnedFd, chunks: &[KeptChunk]) -> Result<(), Errno> {
    let mut end = HEADER as u64;
    for part in chunks.chunks(KEPT_CHUNKS_MAX / 64) {
        let mut bytes = Vec::with_capacity(part.len() * ENTRY);
        for kept in part {
            bytes.extend_from_slice(&kept.from.to_le_bytes());
            bytes.extend_from_slice(&kept.chunk.length.to_le_bytes());
            bytes.extend_from_slice(&kept.chunk.hash.0);
        }
        place::write_at(file, &bytes, end)?;
        end += bytes.len() as u64;
    }
    place::set_size(file, end)
}

fn decode(entry: &[u8; ENTRY]) -> Option<KeptChunk> {
    let from = u64::from_le_bytes(entry[..8].try_into().ok()?);
    let length = u32::from_le_bytes(entry[8..12].try_into().ok()?);
    let hash = Hash(entry[12..].try_into().ok()?);
    let whole = length > 0 && from.checked_add(u64::from(length)).is_some();
    whole.then_some(KeptChunk { from, chunk: Chunk { length, hash } })
}

/// Of entries in the order of writing, those that no later one overlaps.
fn newest(all: Vec<KeptChunk>) -> Vec<KeptChunk> {
    let mut numbered: Vec<(usize, KeptChunk)> = all.into_iter().enumerate().collect();
    numbered.sort_unstable_by_key(|(number, kept)| (kept.from, *number));
    let mut left: Vec<(usize, KeptChunk)> = Vec::new();
    for (number, kept) in numbered {
        let overlaps =
            |(_, old): &(usize, KeptChunk)| old.from + u64::from(old.chunk.length) > kept.from;
        while left.pop_if(|old| overlaps(old) && old.0 < number).is_some() {}
        if !left.last().is_some_and(overlaps) {
            left.push((number, kept));
        }
    }
    left.into_iter().map(|(_, kept)| kept).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use replicator_common::name::Name;
    use rustix::fs::OFlags;

    fn kept(from: u64, length: u32, tag: u8) -> KeptChunk {
        KeptChunk { from, chunk: Chunk { length, hash: Hash([tag; 32]) } }
    }

    #[test]
    fn what_is_written_is_read_and_what_was_overwritten_is_not() {
        let directory = tempfile::tempdir().unwrap();
        let fd = place::open_directory_path(directory.path()).unwrap();
        let name = Name::new(b"r").unwrap();
        let file = place::create_file(fd.as_fd(), &name).unwrap();
        let object = ObjectId::new(1, &[7; 60]).unwrap();
        let first = Header { object: object.clone(), was: (99, Timestamp(-5)) };
        let mut writer = RecordWriter::create(file, &first).unwrap();
        for (at, tag) in [(0, 1), (100, 2), (200, 3), (300, 4)] {
            writer.push(at, 100, &Hash([tag; 32])).unwrap();
        }
        drop(writer);
        let open = || place::open_file(fd.as_fd(), &name, OFlags::RDWR).unwrap();
        assert_eq!(header(open()), Some(first));
        // Half an entry, as a crash may leave it.
        place::write_at(open(), &[9; 20], HEADER as u64 + 4 * ENTRY as u64).unwrap();
        let second = Header { object, was: (98, Timestamp(6)) };
        let mut writer = RecordWriter::resume(open(), &second).unwrap();
        writer.push(50, 100, &Hash([5; 32])).unwrap();
        writer.void(250, 10).unwrap();
        drop(writer);
        assert_eq!(header(open()), Some(second));
        assert_eq!(chunks(&open()).unwrap(), [kept(50, 100, 5), kept(300, 100, 4)]);
        rewrite(&open(), &[kept(300, 100, 4)]).unwrap();
        assert_eq!(chunks(&open()).unwrap(), [kept(300, 100, 4)]);
    }

    #[test]
    fn a_damaged_header_is_none() {
        let header = Header { object: ObjectId::new(1, &[7]).unwrap(), was: (0, Timestamp(0)) };
        let mut bytes = header.encode();
        assert_eq!(Header::decode(&bytes), Some(header));
        bytes[ID_AT] = 255;
        assert_eq!(Header::decode(&bytes), None);
        bytes[ID_AT] = 0;
        assert_eq!(Header::decode(&bytes), None);
    }
}
