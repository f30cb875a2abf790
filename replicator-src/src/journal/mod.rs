//! The journal: what may have changed, in order, on disk (sled).
//!
//! The capture thread appends, the engine reads and trims. A record says that
//! something is dirty, never what became of it, so reading one twice or
//! keeping it too long costs time and nothing else. The journal is what bounds
//! memory: while the destination is slow or gone, records wait here.
//!
//! Records are appended in memory (`tail`), and go to disk with the next flush,
//! which is as soon as the one before is through and a few milliseconds have
//! passed; or at once, when too many wait. What is trimmed by then is spared it. A
//! crash loses what was not flushed, as it would have in a buffer of sled's.
//!
//! # Format
//! Tree `blocks`: key = number of the first record, 8 bytes big endian; value =
//! [`codec::encode_record`] of up to 100 [`Record`]s, whose numbers follow each
//! other. Tree `meta`: `version` → 4 bytes little endian. Versions: 1, a row for
//! each record, in a tree `records`; 2, blocks. An older one is upgraded when it is
//! opened.
//!
//! # Damage
//! What is lost here is a gap, which a walk closes; so damage never ends a
//! replication. A block that cannot be read is given as [`Record::Gap`]. A
//! store that cannot be opened because it is corrupt is set aside beside the
//! new one, as `journal.corrupt-<time>`, for whoever wants to know why.
//!
//! [`codec::encode_record`]: replicator_common::codec::encode_record

mod store;
mod tail;

use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use replicator_common::codec::CodecError;
use replicator_common::id::{ObjectId, Seq};
use replicator_common::name::Name;
use replicator_common::time::Timestamp;
use serde::{Deserialize, Serialize};

use crate::watcher::What;
use store::{BLOCK_MAX, Held, Store, VERSION};
use tail::Tail;

/// One record of the journal.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Record {
    /// See [`crate::watcher::Change::Entry`].
    Entry {
        /// The directory.
        directory: ObjectId,
        /// The name.
        name: Name,
    },
    /// See [`crate::watcher::Change::Object`].
    Object {
        /// The object.
        object: ObjectId,
        /// What may have changed.
        what: What,
    },
    /// See [`crate::watcher::Change::Named`].
    Named {
        /// The directory.
        directory: ObjectId,
        /// The name.
        name: Name,
        /// What may have changed.
        what: What,
    },
    /// Changes may have been lost before this record.
    Gap {
        /// Why.
        reason: String,
    },
    /// The event queue was drained: every change whose system call returned
    /// before `time` stands before this record.
    Barrier {
        /// The moment at which the drain began: an internal one (see
        /// [`crate::clock`]) of the process that drew the barrier.
        time: Timestamp,
    },
}

/// Why the journal cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum JournalError {
    /// The store says no.
    #[error("journal {}: {source}", path.display())]
    Store {
        /// The journal's directory.
        path: PathBuf,
        /// What the store said.
        source: sled::Error,
    },
    /// A record cannot be encoded.
    #[error("journal {}: record {seq}: {source}", path.display())]
    Record {
        /// The journal's directory.
        path: PathBuf,
        /// Which record.
        seq: Seq,
        /// What is wrong with it.
        source: CodecError,
    },
    /// Written by a newer program.
    #[error("journal {} has format version {found}, this program knows up to {VERSION}: run the newer replicator that wrote it", path.display())]
    Newer {
        /// The journal's directory.
        path: PathBuf,
        /// Version found.
        found: u32,
    },
}

/// The open journal, shared by the capture thread (append), the thread that flushes
/// it and the engine (read, trim).
pub struct Journal {
    /// What was wrong with the journal that was set aside for this one.
    damage: Option<String>,
    store: Store,
    tail: Mutex<Tail>,
    /// Who adds blocks, or takes them away, holds this: one after the other.
    blocks: Mutex<()>,
    /// Who flushes holds this: nobody is through before all of it is on disk.
    flushing: Mutex<()>,
    /// Blocks were added since the last flush.
    unflushed: AtomicBool,
    /// Records are trimmed up to and including this.
    trimmed: AtomicU64,
    /// Records are flushed up to and including this.
    flushed: AtomicU64,
    /// Those of this process' records that are barriers and not trimmed: they tell
    /// of no change.
    barriers: Mutex<VecDeque<u64>>,
}

impl Journal {
    /// Opens or makes the journal in the directory `path`. `floor` is the
    /// highest sequence number that was ever used as far as the index knows,
    /// so that numbers are not reused after the journal was emptied.
    pub fn open(path: &Path, floor: Seq) -> Result<Self, JournalError> {
        let error = match Self::open_as_it_is(path, floor) {
            Err(JournalError::Store { source, .. }) if store::is_corrupt(&source) => source,
            result => return result,
        };
        let aside = store::set_aside(path)?;
        let damage = format!("the journal was corrupt ({error})");
        tracing::warn!(%error, aside = %aside.display(), "the journal is corrupt; a new one begins");
        let new = Self::open_as_it_is(path, floor)?;
        Ok(Self { damage: Some(damage), ..new })
    }

    fn open_as_it_is(path: &Path, floor: Seq) -> Result<Self, JournalError> {
        let store = Store::open(path)?;
        let held = store.held()?.unwrap_or(Held { before: floor.0, last: floor.0 });
        let last = held.last.max(floor.0);
        Ok(Self {
            damage: None,
            store,
            tail: Mutex::new(Tail::new(last)),
            blocks: Mutex::new(()),
            flushing: Mutex::new(()),
            unflushed: AtomicBool::new(false),
            trimmed: AtomicU64::new(held.before),
            flushed: AtomicU64::new(held.last),
            barriers: Mutex::default(),
        })
    }

    /// What was wrong with the journal that was found and set aside: what it
    /// held is lost, a gap.
    pub fn damage(&self) -> Option<&str> {
        self.damage.as_deref()
    }

    /// Appends records in order and returns the number of the last one.
    /// Called by the capture thread alone.
    pub fn append(&self, new: &[Record]) -> Result<Seq, JournalError> {
        self.store.point("journal-append")?;
        let (last, full) = {
            let mut tail = self.tail();
            (tail.append(new), tail.is_full())
        };
        let numbers = last + 1 - new.len() as u64..=last;
        let barriers = numbers.zip(new).filter(|(_, new)| matches!(new, Record::Barrier { .. }));
        self.barriers().extend(barriers.map(|(number, _)| number));
        if full {
            self.write_out()?;
        }
        Ok(Seq(last))
    }

    /// Puts into the store what is in memory alone.
    fn write_out(&self) -> Result<(), JournalError> {
        loop {
            let _alone = self.blocks.lock().unwrap_or_else(PoisonError::into_inner);
            let Some((first, records)) = self.tail().unwritten(BLOCK_MAX) else { return Ok(()) };
            self.store.put(first, &records)?;
            self.unflushed.store(true, Ordering::Release);
            self.tail().wrote(first + records.len() as u64 - 1);
        }
    }

    /// Makes all that was appended durable.
    pub fn flush(&self) -> Result<Seq, JournalError> {
        let _alone = self.flushing.lock().unwrap_or_else(PoisonError::into_inner);
        let last = self.last();
        self.write_out()?;
        if self.unflushed.swap(false, Ordering::AcqRel)
            && let Err(error) = self.store.flush()
        {
            self.unflushed.store(true, Ordering::Release);
            return Err(error);
        }
        self.flushed.fetch_max(last.0, Ordering::AcqRel);
        Ok(last)
    }

    /// Up to `most` records after `after`, in order. What cannot be read is
    /// a gap.
    pub fn read(&self, after: Seq, most: usize) -> Result<Vec<(Seq, Record)>, JournalError> {
        let mut found = Vec::new();
        let mut after = after.0;
        while found.len() < most {
            let (before, written) = {
                let tail = self.tail();
                if let Some(rest) = tail.read(after, most - found.len()) {
                    found.extend(rest);
                    break;
                }
                (tail.before(), tail.written())
            };
            let part = self.store.read(after, most - found.len(), written)?;
            // Where the store has none, what it had is trimmed or lost.
            after = part.last().map_or(before, |(seq, _)| seq.0);
            found.extend(part);
        }
        Ok(found)
    }

    /// Forgets records up to and including `through`.
    ///
    /// INVARIANT (acknowledged means durable): called only with positions that
    /// a batch carried which the destination has acknowledged.
    pub fn trim(&self, through: Seq) -> Result<(), JournalError> {
        if self.trimmed.fetch_max(through.0, Ordering::AcqRel) >= through.0 {
            return Ok(());
        }
        {
            let mut barriers = self.barriers();
            while barriers.pop_front_if(|number| *number <= through.0).is_some() {}
        }
        let _alone = self.blocks.lock().unwrap_or_else(PoisonError::into_inner);
        let written = {
            let mut tail = self.tail();
            let written = tail.written();
            tail.trim(through.0);
            written
        };
        self.store.trim(through.0, written)
    }

    /// Number of the last record appended.
    pub fn last(&self) -> Seq {
        Seq(self.tail().last())
    }

    /// Up to this number no record waits to be on disk.
    pub fn flushed(&self) -> Seq {
        Seq(self.flushed.load(Ordering::Acquire))
    }

    /// Records up to and including this are forgotten.
    pub fn trimmed(&self) -> Seq {
        Seq(self.trimmed.load(Ordering::Acquire))
    }

    /// Records of changes that are not trimmed: all but barriers. (Those of a process
    /// before this one count as changes.)
    pub fn changes(&self) -> u64 {
        let barriers = self.barriers();
        let (last, trimmed) = (self.last(), self.trimmed());
        let after = barriers.iter().filter(|number| **number > trimmed.0).count();
        last.0.saturating_sub(trimmed.0).saturating_sub(after as u64)
    }

    fn barriers(&self) -> MutexGuard<'_, VecDeque<u64>> {
        self.barriers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Bytes on disk.
    pub fn size(&self) -> u64 {
        self.store.size()
    }

    fn tail(&self) -> MutexGuard<'_, Tail> {
        self.tail.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(n: u64) -> Record {
        Record::Entry {
            directory: ObjectId::new(1, &[1]).unwrap(),
            name: Name::new(format!("name-{n}").as_bytes()).unwrap(),
        }
    }

    /// What an idle source's heartbeats leave is no change that waits.
    #[test]
    fn barriers_are_no_changes() {
        let directory = tempfile::tempdir().unwrap();
        let journal = Journal::open(&directory.path().join("journal"), Seq(0)).unwrap();
        let barrier = || Record::Barrier { time: Timestamp(1) };
        journal.append(&[entry(1), barrier(), entry(2), barrier()]).unwrap();
        assert_eq!(journal.changes(), 2);
        journal.trim(Seq(2)).unwrap();
        assert_eq!(journal.changes(), 1);
        journal.trim(Seq(4)).unwrap();
        journal.append(&[barrier()]).unwrap();
        assert_eq!(journal.changes(), 0);
    }

    #[test]
    fn order_trim_and_reopen() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("journal");
        {
            let journal = Journal::open(&path, Seq(0)).unwrap();
            let all: Vec<_> = (1..=2500).map(entry).collect();
            assert_eq!(journal.append(&all).unwrap(), Seq(2500));
            journal.trim(Seq(1200)).unwrap();
            journal.flush().unwrap();
        }
        let journal = Journal::open(&path, Seq(0)).unwrap();
        assert_eq!((journal.trimmed(), journal.last()), (Seq(1200), Seq(2500)));
        let read = journal.read(Seq(2000), 3).unwrap();
        assert_eq!(read, [2001, 2002, 2003].map(|n| (Seq(n), entry(n))));
        journal.trim(Seq(2500)).unwrap();
        assert!(journal.read(Seq(0), 10).unwrap().is_empty());
        assert_eq!(journal.append(&[entry(1)]).unwrap(), Seq(2501));
    }

    #[test]
    fn numbers_are_not_reused_after_the_journal_was_emptied() {
        let directory = tempfile::tempdir().unwrap();
        let journal = Journal::open(&directory.path().join("journal"), Seq(77)).unwrap();
        assert_eq!(journal.append(&[entry(1)]).unwrap(), Seq(78));
    }

    fn all(journal: &Journal) -> Vec<Record> {
        journal.read(Seq(0), 10_000).unwrap().into_iter().map(|(_, record)| record).collect()
    }

    /// Reading goes from the store to memory without a record left out or given
    /// twice, whatever was flushed and trimmed by then.
    #[test]
    fn what_is_read_is_what_was_appended_and_not_trimmed() {
        let directory = tempfile::tempdir().unwrap();
        let journal = Journal::open(&directory.path().join("journal"), Seq(0)).unwrap();
        let mut last = 0;
        for (count, flush, trim) in [
            (10_000, false, 0),
            (1, true, 0),
            (9_000, true, 5),
            (30_000, false, 12_345),
            (7, true, 48_999),
        ] {
            let new: Vec<_> = (last + 1..=last + count).map(entry).collect();
            last += count;
            assert_eq!(journal.append(&new).unwrap(), Seq(last));
            if flush {
                assert_eq!(journal.flush().unwrap(), Seq(last));
            }
            journal.trim(Seq(trim)).unwrap();
            let mut after = journal.trimmed();
            loop {
                let part = journal.read(after, 777).unwrap();
                for (seq, record) in &part {
                    after = after.next();
                    assert_eq!((*seq, record), (after, &entry(after.0)));
                }
                if part.is_empty() {
                    break;
                }
            }
            assert_eq!(after, Seq(last));
        }
    }

    /// What is acknowledged before it was written costs the store nothing.
    #[test]
    fn what_is_trimmed_first_is_never_written() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("journal");
        let journal = Journal::open(&path, Seq(0)).unwrap();
        journal.append(&[entry(1), entry(2), entry(3)]).unwrap();
        journal.trim(Seq(2)).unwrap();
        journal.flush().unwrap();
        drop(journal);
        let journal = Journal::open(&path, Seq(0)).unwrap();
        assert_eq!(all(&journal), [entry(3)]);
        assert_eq!((journal.trimmed(), journal.last()), (Seq(2), Seq(3)));
    }

    /// Each way to damage the files, and the journal opens all the same: with
    /// its records, or anew with the damage said and the old files kept.
    #[test]
    fn a_corrupt_store_is_set_aside_and_said() {
        type Damage = fn(&Path);
        let damages: [(&str, Damage); 6] = [
            ("garbage for db", |path| std::fs::write(path.join("db"), [0x5a; 300_000]).unwrap()),
            ("garbage for conf", |path| std::fs::write(path.join("conf"), [0x5a; 64]).unwrap()),
            ("empty conf", |path| std::fs::write(path.join("conf"), "").unwrap()),
            ("db cut", |path| truncate(&path.join("db"), 1000)),
            ("db with a hole", |path| overwrite(&path.join("db"), 4096, &[0xa5; 20_000])),
            ("version of three bytes", |path| {
                let db = store::open_database(path).unwrap();
                db.open_tree("meta").unwrap().insert("version", &[1, 0, 0][..]).unwrap();
                db.flush().unwrap();
            }),
        ];
        let mut set_aside = 0;
        for (what, damage) in damages {
            let directory = tempfile::tempdir().unwrap();
            let path = directory.path().join("journal");
            {
                let journal = Journal::open(&path, Seq(0)).unwrap();
                let records: Vec<_> = (0..3000).map(entry).collect();
                journal.append(&records).unwrap();
                journal.flush().unwrap();
            }
            damage(&path);
            let journal = Journal::open(&path, Seq(5000)).unwrap_or_else(|e| panic!("{what}: {e}"));
            let kept = std::fs::read_dir(directory.path()).unwrap().count() - 1;
            assert_eq!(kept, usize::from(journal.damage().is_some()), "{what}");
            set_aside += kept;
            // A store that lost its tail by itself looks whole to sled; a start
            // is a gap in any case.
            assert_eq!(journal.append(&[entry(7)]).unwrap(), Seq(5001), "{what}");
            assert_eq!(all(&journal).last(), Some(&entry(7)), "{what}");
        }
        assert!(set_aside >= 2, "the damage was none: {set_aside}");
    }

    #[test]
    fn a_store_that_cannot_be_reached_is_not_taken_for_corrupt() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("file");
        std::fs::write(&path, "in the way").unwrap();
        assert!(Journal::open(&path, Seq(0)).is_err());
        assert_eq!(std::fs::read(&path).unwrap(), b"in the way");
    }

    fn truncate(path: &Path, length: u64) {
        std::fs::File::options().write(true).open(path).unwrap().set_len(length).unwrap();
    }

    fn overwrite(path: &Path, offset: u64, bytes: &[u8]) {
        use std::os::unix::fs::FileExt;
        let file = std::fs::File::options().write(true).open(path).unwrap();
        file.write_all_at(bytes, offset).unwrap();
    }
}
