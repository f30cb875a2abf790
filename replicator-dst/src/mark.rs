//! The mark in the replica: the last batch whose steps were begun there.
//!
//! The state directory and the replica may stand on different disks, and each
//! of them may be set back without the other: restored from a backup, rolled
//! back to a snapshot. Then both name the same incarnation, and yet what the
//! map says of the replica is not so. The mark tells (traps 14 and 15).
//!
//! INVARIANT: the mark is never ahead of the store, since it is written only
//! when the batch's commit is durable; a mark that is ahead says that the store
//! was set back. And it is never behind what the store says it has seen synced,
//! since the store says so only after a sync that followed the writing of the
//! mark; a mark that is behind says that the replica was set back.

use std::os::fd::BorrowedFd;

use replicator_common::id::{BatchId, Incarnation};
use replicator_common::name::Name;
use replicator_common::sys::place;
use replicator_common::wire::Hash;
use rustix::fs::OFlags;
use rustix::io::Errno;

/// Incarnation, batch, the first bytes of the hash of both. It is written over
/// in place, and so short that a disk writes all of it or nothing.
const LENGTH: usize = 16 + 8 + 8;

/// A mark.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mark {
    /// The life that the batch belongs to.
    pub incarnation: Incarnation,
    /// The last batch whose steps were begun.
    pub batch: BatchId,
}

impl Mark {
    fn encode(&self) -> [u8; LENGTH] {
        let mut record = [0; LENGTH];
        record[..16].copy_from_slice(&self.incarnation.0);
        record[16..24].copy_from_slice(&self.batch.0.to_be_bytes());
        let sum = Hash::of(&record[..24]);
        record[24..].copy_from_slice(&sum.0[..8]);
        record
    }

    fn decode(record: &[u8]) -> Option<Self> {
        let incarnation = Incarnation(record.get(..16)?.try_into().ok()?);
        let batch = BatchId(u64::from_be_bytes(record.get(16..24)?.try_into().ok()?));
        let mark = Self { incarnation, batch };
        (mark.encode() == record).then_some(mark)
    }
}

fn name() -> Name {
    Name::new(b"batch").unwrap_or_else(|_| unreachable!("a valid name"))
}

/// Writes the mark into our hidden directory.
///
/// Durability: none. The next sync of the file system covers it, and only then
/// does the store rely on it.
pub fn write(hidden: BorrowedFd<'_>, mark: &Mark) -> Result<(), Errno> {
    let file = match place::open_file(hidden, &name(), OFlags::RDWR) {
        Err(Errno::NOENT) => place::create_file(hidden, &name())?,
        opened => opened?,
    };
    place::write_at(file, &mark.encode(), 0)
}

/// Reads the mark; `None` when there is none, or a damaged one.
pub fn read(hidden: BorrowedFd<'_>) -> Result<Option<Mark>, Errno> {
    let file = match place::open_file(hidden, &name(), OFlags::RDONLY) {
        Err(Errno::NOENT) => return Ok(None),
        opened => opened?,
    };
    let mut record = [0; LENGTH + 1];
    let read = place::read_at(file, &mut record, 0)?;
    Ok(Mark::decode(&record[..read]))
}

/// See [`set_back`].
pub const STATE_SET_BACK: &str = "the state directory was set back to an earlier time";
/// See [`set_back`].
pub const REPLICA_SET_BACK: &str = "the replica was set back to an earlier time";

/// Which of the two was set back, in words, if one was. `committed` and
/// `covered` are the store's: the last batch that it has, and the mark that it
/// has seen synced.
pub fn set_back(
    found: Option<Mark>,
    incarnation: Incarnation,
    committed: BatchId,
    covered: Option<BatchId>,
) -> Option<&'static str> {
    let found = found.filter(|mark| mark.incarnation == incarnation).map(|mark| mark.batch);
    if found > Some(committed) {
        return Some(STATE_SET_BACK);
    }
    (found < covered).then_some(REPLICA_SET_BACK)
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIFE: Incarnation = Incarnation([3; 16]);

    #[test]
    fn trap_14_who_was_set_back() {
        let mark = |batch| Some(Mark { incarnation: LIFE, batch: BatchId(batch) });
        let told = |found, committed, covered: Option<u64>| {
            set_back(found, LIFE, BatchId(committed), covered.map(BatchId))
        };
        for (found, committed, covered) in [
            (None, 0, None),
            (None, 7, None),
            (mark(7), 7, None),
            (mark(7), 7, Some(7)),
            (mark(7), 9, Some(5)),
        ] {
            assert_eq!(told(found, committed, covered), None, "{found:?} {committed} {covered:?}");
        }
        let other = Some(Mark { incarnation: Incarnation([4; 16]), batch: BatchId(7) });
        for found in [None, mark(6), other] {
            assert_eq!(told(found, 9, Some(7)), Some(REPLICA_SET_BACK), "{found:?}");
        }
        assert_eq!(told(mark(8), 7, Some(7)), Some(STATE_SET_BACK));
        assert_eq!(told(other, 0, None), None, "of a life before this one");
    }

    #[test]
    fn a_mark_is_read_as_written_or_not_at_all() {
        let mark = Mark { incarnation: LIFE, batch: BatchId(u64::MAX - 1) };
        let record = mark.encode();
        assert_eq!(Mark::decode(&record), Some(mark));
        for at in 0..LENGTH {
            let mut damaged = record;
            damaged[at] ^= 1;
            assert_eq!(Mark::decode(&damaged), None);
            assert_eq!(Mark::decode(&record[..at]), None);
        }
    }
}
