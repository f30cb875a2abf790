//! The mark in the replica: the last batch whose steps were begun there, whether
//! they were through, and which batch was staged there to come next.
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
//!
//! INVARIANT: a batch in the log was begun in the replica, or the mark names it as
//! the next, by its nonce: it is written after all else that the sync before the
//! commit covers. So a replica without either is of before that batch, whatever
//! an earlier attempt at it has left in staging there. (Not told apart is a copy of
//! the disk that was taken during that very sync.)

use std::os::fd::BorrowedFd;

use replicator_common::id::{BatchId, BatchNonce, Edition, Incarnation};
use replicator_common::name::Name;
use replicator_common::sys::place;
use replicator_common::wire::Hash;
use rustix::fs::OFlags;
use rustix::io::Errno;

/// Incarnation, batch, whether it is through, the next one and its nonce, the
/// first bytes of the hash of all. It is written over in place, and so short that
/// a disk writes all of it or nothing.
const LENGTH: usize = 16 + 8 + 1 + 8 + 8 + SUM;
const SUM: usize = 8;
/// As it was before it named the next batch, and before it said what is through.
const OLD_LENGTHS: [usize; 2] = [16 + 8 + 1 + SUM, 16 + 8 + SUM];

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
    /// The batch that was staged to come next, until it begins.
    pub next: Option<Edition>,
}

impl Mark {
    fn encode(&self) -> [u8; LENGTH] {
        // No batch has number 0.
        let next = self.next.unwrap_or(Edition { batch: BatchId(0), nonce: BatchNonce(0) });
        let mut record = [0; LENGTH];
        let (body, sum) = record.split_at_mut(LENGTH - SUM);
        body[..16].copy_from_slice(&self.incarnation.0);
        body[16..24].copy_from_slice(&self.reached.batch.0.to_be_bytes());
        body[24] = u8::from(self.reached.through);
        body[25..33].copy_from_slice(&next.batch.0.to_be_bytes());
        body[33..41].copy_from_slice(&next.nonce.0.to_be_bytes());
        sum.copy_from_slice(&Hash::of(body).0[..SUM]);
        record
    }

    fn decode(record: &[u8]) -> Option<Self> {
        if record.len() != LENGTH && !OLD_LENGTHS.contains(&record.len()) {
            return None;
        }
        let (body, sum) = record.split_at(record.len() - SUM);
        let number = |at: usize| Some(u64::from_be_bytes(body.get(at..at + 8)?.try_into().ok()?));
        let incarnation = Incarnation(body.get(..16)?.try_into().ok()?);
        let through = body.get(24) == Some(&1);
        let reached = Reached { batch: BatchId(number(16)?), through };
        let next = number(25).zip(number(33)).filter(|(batch, _)| *batch != 0);
        let next =
            next.map(|(batch, nonce)| Edition { batch: BatchId(batch), nonce: BatchNonce(nonce) });
        (Hash::of(body).0[..SUM] == *sum).then_some(Self { incarnation, reached, next })
    }

    /// Whether a logged batch was begun, or staged, in the replica.
    fn knows(&self, logged: &Edition) -> bool {
        self.reached.batch >= logged.batch || self.next.is_some_and(|next| next.is(logged))
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

/// What the store knows of the replica.
#[derive(Clone, Copy, Debug, Default)]
pub struct Remembered {
    /// The last batch that it has.
    pub committed: BatchId,
    /// The mark that it has seen synced.
    pub covered: Option<Reached>,
    /// The batch in the log.
    pub logged: Option<Edition>,
}

/// Which of the two was set back, in words, if one was.
pub fn set_back(
    found: Option<Mark>,
    incarnation: Incarnation,
    store: &Remembered,
) -> Option<&'static str> {
    let found = found.filter(|mark| mark.incarnation == incarnation);
    if found.is_some_and(|found| found.reached.batch > store.committed) {
        return Some(STATE_SET_BACK);
    }
    let knows = |logged| found.is_some_and(|found| found.knows(logged));
    let fits = found.map(|found| found.reached) >= store.covered
        && store.logged.as_ref().is_none_or(knows);
    (!fits).then_some(REPLICA_SET_BACK)
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIFE: Incarnation = Incarnation([3; 16]);

    #[test]
    fn trap_14_who_was_set_back() {
        let (begun, through) =
            (|batch| Reached::begun(BatchId(batch)), |batch| Reached::through(BatchId(batch)));
        let mark = |reached| Some(Mark { incarnation: LIFE, reached, next: None });
        let told = |found, committed, covered| {
            set_back(
                found,
                LIFE,
                &Remembered { committed: BatchId(committed), covered, logged: None },
            )
        };
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
        let other = Some(Mark { incarnation: Incarnation([4; 16]), reached: begun(7), next: None });
        for found in [None, mark(begun(6)), mark(through(6)), other] {
            assert_eq!(told(found, 9, Some(begun(7))), Some(REPLICA_SET_BACK), "{found:?}");
        }
        // Put back to the middle of the last batch.
        assert_eq!(told(mark(begun(7)), 7, Some(through(7))), Some(REPLICA_SET_BACK));
        assert_eq!(told(mark(begun(8)), 7, Some(begun(7))), Some(STATE_SET_BACK));
        assert_eq!(told(other, 0, None), None, "of a life before this one");
    }

    #[test]
    fn trap_14_a_batch_in_the_log_was_staged_in_this_replica() {
        let edition = |batch, nonce| Edition { batch: BatchId(batch), nonce: BatchNonce(nonce) };
        let told = |batch, next| {
            let reached = Reached::begun(BatchId(batch));
            let covered = Some(Reached::begun(BatchId(7)));
            // A heartbeat may have been committed after it.
            let store = Remembered { committed: BatchId(9), covered, logged: Some(edition(8, 1)) };
            set_back(Some(Mark { incarnation: LIFE, reached, next }), LIFE, &store)
        };
        assert_eq!(told(8, None), None, "begun");
        assert_eq!(told(7, Some(edition(8, 1))), None, "staged");
        for next in [None, Some(edition(8, 2)), Some(edition(7, 1))] {
            assert_eq!(told(7, next), Some(REPLICA_SET_BACK), "{next:?}");
        }
        let store = Remembered { logged: Some(edition(1, 1)), ..Remembered::default() };
        let store = Remembered { committed: BatchId(1), ..store };
        assert_eq!(set_back(None, LIFE, &store), Some(REPLICA_SET_BACK), "the first");
    }

    #[test]
    fn a_mark_is_read_as_written_or_not_at_all() {
        let batch = BatchId(u64::MAX - 1);
        let next = Edition { batch: BatchId(u64::MAX), nonce: BatchNonce(u64::MAX - 2) };
        for (reached, next) in
            [(Reached::begun(batch), None), (Reached::through(batch), Some(next))]
        {
            let mark = Mark { incarnation: LIFE, reached, next };
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
    fn marks_of_before_are_read() {
        for (length, through) in OLD_LENGTHS.into_iter().zip([true, false]) {
            let mut record = vec![0; length];
            record[..16].copy_from_slice(&LIFE.0);
            record[23] = 9;
            let body = length - SUM;
            if through {
                record[24] = 1;
            }
            let sum = Hash::of(&record[..body]);
            record[body..].copy_from_slice(&sum.0[..SUM]);
            let reached = Reached { batch: BatchId(9), through };
            let mark = Mark { incarnation: LIFE, reached, next: None };
            assert_eq!(Mark::decode(&record), Some(mark));
        }
    }
}
