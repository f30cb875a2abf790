//! The journal: what may have changed, in order, on disk (sled).
//!
//! The capture thread appends, the engine reads and trims. A record says that
//! something is dirty, never what became of it, so reading one twice or
//! keeping it too long costs time and nothing else. The journal is what bounds
//! memory: while the destination is slow or gone, records wait here.
//!
//! # Format
//! Tree `records`: key = sequence number, 8 bytes big endian; value =
//! [`codec::encode_record`] of [`Record`]. Tree `meta`: `version` → 4 bytes
//! little endian. Versions: 1, the first.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use replicator_common::codec::{self, CodecError};
use replicator_common::id::{ObjectId, Seq};
use replicator_common::name::Name;
use replicator_common::time::Timestamp;
use serde::{Deserialize, Serialize};

use crate::watcher::{Change, What};

/// The newest format that this program writes and reads.
const VERSION: u32 = 1;

/// Most records in one sled batch: larger ones leak memory and disk (KERNEL
/// measurements: 9.8 GB after 6 M records with batches of 1000, flat with 100).
const APPEND_MAX: usize = 100;

/// Most removals in one sled batch.
const TRIM_MAX: usize = 1000;

/// sled's page cache, bytes. Records are read once, soon after they were
/// written, so a small cache does.
const CACHE_BYTES: u64 = 16 << 20;

/// One record of the journal.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Record {
    /// See [`Change::Entry`].
    Entry {
        /// The directory.
        directory: ObjectId,
        /// The name.
        name: Name,
    },
    /// See [`Change::Object`].
    Object {
        /// The object.
        object: ObjectId,
        /// What may have changed.
        what: What,
    },
    /// See [`Change::Named`].
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

impl From<Change> for Record {
    fn from(change: Change) -> Self {
        match change {
            Change::Entry { directory, name } => Self::Entry { directory, name },
            Change::Object { object, what, via: _ } => Self::Object { object, what },
            Change::Named { directory, name, what } => Self::Named { directory, name, what },
            Change::Gap { reason } => Self::Gap { reason },
        }
    }
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
    /// A record cannot be read.
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

/// The open journal, shared by the capture thread (append) and the engine
/// (read, trim).
pub struct Journal {
    db: sled::Db,
    records: sled::Tree,
    path: PathBuf,
    /// Sequence number of the last record appended.
    last: AtomicU64,
    /// Records are trimmed up to and including this.
    trimmed: AtomicU64,
    /// Records are flushed up to and including this.
    flushed: AtomicU64,
}

impl Journal {
    /// Opens or makes the journal in the directory `path`. `floor` is the
    /// highest sequence number that was ever used as far as the index knows,
    /// so that numbers are not reused after the journal was emptied.
    pub fn open(path: &Path, floor: Seq) -> Result<Self, JournalError> {
        let store = |source| JournalError::Store { path: path.to_owned(), source };
        let db = open_store(path).map_err(store)?;
        let meta = db.open_tree("meta").map_err(store)?;
        match meta.get("version").map_err(store)? {
            None => {
                meta.insert("version", &VERSION.to_le_bytes()).map_err(store)?;
            }
            Some(bytes) => {
                let found = bytes.as_ref().try_into().map_or(u32::MAX, u32::from_le_bytes);
                if found > VERSION {
                    return Err(JournalError::Newer { path: path.to_owned(), found });
                }
            }
        }
        let records = db.open_tree("records").map_err(store)?;
        let ends = (records.first().map_err(store)?, records.last().map_err(store)?);
        let (trimmed, last) = match ends {
            (Some((first, _)), Some((last, _))) => (seq_of(&first).0 - 1, seq_of(&last).0),
            _ => (floor.0, floor.0),
        };
        Ok(Self {
            db,
            records,
            path: path.to_owned(),
            last: AtomicU64::new(last.max(floor.0)),
            trimmed: AtomicU64::new(trimmed),
            flushed: AtomicU64::new(last),
        })
    }

    /// Appends records in order and returns the number of the last one.
    /// Called by the capture thread alone.
    pub fn append(&self, new: &[Record]) -> Result<Seq, JournalError> {
        let mut seq = self.last.load(Ordering::Relaxed);
        for part in new.chunks(APPEND_MAX) {
            let mut batch = sled::Batch::default();
            for record in part {
                seq += 1;
                let value = codec::encode_record(record).map_err(|source| {
                    JournalError::Record { path: self.path.clone(), seq: Seq(seq), source }
                })?;
                batch.insert(&seq.to_be_bytes(), value);
            }
            self.records.apply_batch(batch).map_err(|e| self.store(e))?;
            self.last.store(seq, Ordering::Release);
        }
        Ok(Seq(seq))
    }

    /// Makes all that was appended durable.
    pub fn flush(&self) -> Result<Seq, JournalError> {
        let last = self.last.load(Ordering::Acquire);
        if self.flushed.load(Ordering::Relaxed) < last {
            // The reason for this sync: a record that survives a crash marks
            // what must be read again even where a rescan would see nothing
            // (a store that shares its ctime with an earlier reading).
            self.db.flush().map_err(|e| self.store(e))?;
            // sled's own flush only starts the write (sync_file_range, as
            // strace shows); this makes the drive keep it.
            let data = self.path.join("db");
            std::fs::File::open(data)
                .and_then(|file| file.sync_data())
                .map_err(|error| self.store(error.into()))?;
            self.flushed.store(last, Ordering::Release);
        }
        Ok(Seq(last))
    }

    /// Up to `most` records after `after`, in order.
    pub fn read(&self, after: Seq, most: usize) -> Result<Vec<(Seq, Record)>, JournalError> {
        let mut found = Vec::new();
        for row in self.records.range((after.0 + 1).to_be_bytes()..).take(most) {
            let (key, value) = row.map_err(|e| self.store(e))?;
            let seq = seq_of(&key);
            let record = codec::decode_record(&value).map_err(|source| JournalError::Record {
                path: self.path.clone(),
                seq,
                source,
            })?;
            found.push((seq, record));
        }
        Ok(found)
    }

    /// Forgets records up to and including `through`.
    ///
    /// INVARIANT (acknowledged means durable): called only with positions that
    /// a batch carried which the destination has acknowledged.
    pub fn trim(&self, through: Seq) -> Result<(), JournalError> {
        let mut from = self.trimmed.load(Ordering::Relaxed);
        while from < through.0 {
            let to = through.0.min(from + TRIM_MAX as u64);
            let mut batch = sled::Batch::default();
            for seq in from + 1..=to {
                batch.remove(&seq.to_be_bytes());
            }
            self.records.apply_batch(batch).map_err(|e| self.store(e))?;
            self.trimmed.store(to, Ordering::Relaxed);
            from = to;
        }
        Ok(())
    }

    /// Number of the last record appended.
    pub fn last(&self) -> Seq {
        Seq(self.last.load(Ordering::Acquire))
    }

    /// Number of the last record that is on disk.
    pub fn flushed(&self) -> Seq {
        Seq(self.flushed.load(Ordering::Acquire))
    }

    /// Records up to and including this are forgotten.
    pub fn trimmed(&self) -> Seq {
        Seq(self.trimmed.load(Ordering::Relaxed))
    }

    /// Bytes on disk.
    pub fn size(&self) -> u64 {
        self.db.size_on_disk().unwrap_or(0)
    }

    fn store(&self, source: sled::Error) -> JournalError {
        JournalError::Store { path: self.path.clone(), source }
    }
}

/// Opens the store. sled lets its file lock go a moment after the last handle
/// was dropped, so one that is taken is tried again for a while; that no other
/// process has the journal, the state directory's lock says.
fn open_store(path: &Path) -> Result<sled::Db, sled::Error> {
    let mut tries = 100;
    loop {
        let opened = sled::Config::new()
            .path(path)
            .cache_capacity(CACHE_BYTES)
            .flush_every_ms(None)
            .mode(sled::Mode::HighThroughput)
            .open();
        match opened {
            Err(sled::Error::Io(error))
                if tries > 0 && error.to_string().contains("could not acquire lock") =>
            {
                tries -= 1;
                std::thread::sleep(std::time::Duration::from_millis(20));
            }
            result => return result,
        }
    }
}

fn seq_of(key: &[u8]) -> Seq {
    Seq(key.try_into().map_or(0, u64::from_be_bytes))
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
}
