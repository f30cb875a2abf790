//! The mark in the replica: the last batch whose steps were begun there, and
//! whether they were through.
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
//!
//! INVARIANT: a mark says that a batch is through only after a sync that
//! followed its last step; so a copy of the disk that was taken in the middle
//! of a batch never says so. While batches follow each other the next one's
//! beginning says it; the last one's mark is written when nothing follows.

use std::os::fd::BorrowedFd;

use replicator_common::id::{BatchId, Incarnation};
use replicator_common::name::Name;
use replicator_common::sys::place;
use replicator_common::wire::Hash;
use rustix::fs::OFlags;
use rustix::io::Errno;

/// Incarnation, batch, whether it is through, the first bytes of the hash of
/// all. It is written over in place, and so short that a disk writes all of it
/// or nothing.
const LENGTH: usize = 16 + 8 + 1 + 8;
/// As it was before it said what is through.
const OLD_LENGTH: usize = LENGTH - 1;

/// How far a replica is; of two, the greater is further.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Reached {
    /// The last batch whose steps were begun.
    pub batch: BatchId,
    /// All of them were run, and synced.
    pub through: bool,
}

impl Reached {
    /// The first of the batch's steps is about to be run.
    pub fn begun(batch: BatchId) -> Self {
        Self { batch, through: false }
    }

    /// A sync has followed the last of its steps.
    pub fn through(batch: BatchId) -> Self {
        Self { batch, through: true }
    }
}

/// A mark.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mark {
    /// The life that the batch belongs to.
    pub incarnation: Incarnation,
    /// How far the replica is in it.
    pub reached: Reached,
}

impl Mark {
    fn encode(&self) -> [u8; LENGTH] {
        let mut record = [0; LENGTH];
        let (body, sum) = record.split_at_mut(LENGTH - 8);
        body[..16].copy_from_slice(&self.incarnation.0);
        body[16..24].copy_from_slice(&self.reached.batch.0.to_be_bytes());
        body[24] = u8::from(self.reached.through);
        sum.copy_from_slice(&Hash::of(body).0[..8]);
        record
    }

    fn decode(record: &[u8]) -> Option<Self> {
        let through = match record.len() {
            LENGTH => record[24] == 1,
            OLD_LENGTH => false,
            _ => return None,
        };
        let (body, sum) = record.split_at(record.len() - 8);
        let incarnation = Incarnation(body.get(..16)?.try_into().ok()?);
        let batch = BatchId(u64::from_be_bytes(body.get(16..24)?.try_into().ok()?));
        let is_sound = Hash::of(body).0[..8] == *sum;
        is_sound.then_some(Self { incarnation, reached: Reached { batch, through } })
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
    covered: Option<Reached>,
) -> Option<&'static str> {
    let found = found.filter(|mark| mark.incarnation == incarnation).map(|mark| mark.reached);
    if found.is_some_and(|found| found.batch > committed) {
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
        let (begun, through) =
            (|batch| Reached::begun(BatchId(batch)), |batch| Reached::through(BatchId(batch)));
        let mark = |reached| Some(Mark { incarnation: LIFE, reached });
        let told = |found, committed, covered| set_back(found, LIFE, BatchId(committed), covered);
        for (found, committed, covered) in [
            (None, 0, None),
            (None, 7, None),
            (mark(begun(7)), 7, None),
            (mark(begun(7)), 7, Some(begun(7))),
            (mark(through(7)), 7, Some(begun(7))),
            (mark(through(7)), 7, Some(through(7))),
            (mark(begun(8)), 8, Some(through(7))),
            (mark(begun(7)), 9, Some(begun(5))),
        ] {
            assert_eq!(told(found, committed, covered), None, "{found:?} {committed} {covered:?}");
        }
        let other = Some(Mark { incarnation: Incarnation([4; 16]), reached: begun(7) });
        for found in [None, mark(begun(6)), mark(through(6)), other] {
            assert_eq!(told(found, 9, Some(begun(7))), Some(REPLICA_SET_BACK), "{found:?}");
        }
        // Put back to the middle of the last batch.
        assert_eq!(told(mark(begun(7)), 7, Some(through(7))), Some(REPLICA_SET_BACK));
        assert_eq!(told(mark(begun(8)), 7, Some(begun(7))), Some(STATE_SET_BACK));
        assert_eq!(told(other, 0, None), None, "of a life before this one");
    }

    #[test]
    fn a_mark_is_read_as_written_or_not_at_all() {
        let batch = BatchId(u64::MAX - 1);
        for reached in [Reached::begun(batch), Reached::through(batch)] {
            let mark = Mark { incarnation: LIFE, reached };
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

    #[test]
    fn a_mark_of_before_is_read() {
        let mut record = [0; OLD_LENGTH];
        record[..16].copy_from_slice(&LIFE.0);
        record[23] = 9;
        let sum = Hash::of(&record[..24]);
        record[24..].copy_from_slice(&sum.0[..8]);
        let mark = Mark { incarnation: LIFE, reached: Reached::begun(BatchId(9)) };
        assert_eq!(Mark::decode(&record), Some(mark));
    }
}
