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
//!
//! # Damage
//! What is lost here is a gap, which a walk closes; so damage never ends a
//! replication. A record that cannot be read is given as [`Record::Gap`]. A
//! store that cannot be opened because it is corrupt is set aside beside the
//! new one, as `journal.corrupt-<time>`, for whoever wants to know why.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use replicator_common::codec::{self, CodecError};
use replicator_common::fault;
use replicator_common::id::{ObjectId, Seq};
use replicator_common::name::Name;
use replicator_common::time::Timestamp;
use serde::{Deserialize, Serialize};

use crate::watcher::What;

/// The newest format that this program writes and reads.
const VERSION: u32 = 1;

/// Most records in one sled batch: larger ones leak memory and disk (KERNEL
/// measurements: 9.8 GB after 6 M records with batches of 1000, flat with 100).
const APPEND_MAX: usize = 100;

/// Most removals in one sled batch. What a batch leaves behind is freed when
/// the next ones begin: trimming 200,000 records took 220 MiB with batches of
/// 1000 and takes 20 MiB with 100, in the same time.
const TRIM_MAX: usize = 100;

/// sled's page cache, bytes as sled counts them: what is appended, read and
/// trimmed at the same time takes four to five times as much (measured: 64 MiB
/// more with 16 MiB, 25 MiB more with 2 MiB, whatever the backlog). Records are
/// read once, in order, so a small cache does.
const CACHE_BYTES: u64 = 2 << 20;

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

/// The open journal, shared by the capture thread (append) and the engine
/// (read, trim).
pub struct Journal {
    /// What was wrong with the journal that was set aside for this one.
    damage: Option<String>,
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
        let error = match Self::open_as_it_is(path, floor) {
            Err(JournalError::Store { source, .. }) if is_corrupt(&source) => source,
            result => return result,
        };
        let aside = set_aside(path)?;
        let damage = format!("the journal was corrupt ({error})");
        tracing::warn!(%error, aside = %aside.display(), "the journal is corrupt; a new one begins");
        let new = Self::open_as_it_is(path, floor)?;
        Ok(Self { damage: Some(damage), ..new })
    }

    fn open_as_it_is(path: &Path, floor: Seq) -> Result<Self, JournalError> {
        let store = |source| JournalError::Store { path: path.to_owned(), source };
        let db = open_store(path).map_err(store)?;
        let meta = db.open_tree("meta").map_err(store)?;
        match meta.get("version").map_err(store)? {
            None => {
                meta.insert("version", &VERSION.to_le_bytes()).map_err(store)?;
            }
            Some(bytes) => {
                let found = bytes.as_ref().try_into().map(u32::from_le_bytes);
                let found = found.map_err(|_| store(corruption()))?;
                if found > VERSION {
                    return Err(JournalError::Newer { path: path.to_owned(), found });
                }
            }
        }
        let records = db.open_tree("records").map_err(store)?;
        let ends = (records.first().map_err(store)?, records.last().map_err(store)?);
        let (trimmed, last) = match ends {
            (Some((first, _)), Some((last, _))) => {
                let ends = seq_of(&first).zip(seq_of(&last));
                let (first, last) = ends.ok_or_else(|| store(corruption()))?;
                (first.0.saturating_sub(1), last.0)
            }
            _ => (floor.0, floor.0),
        };
        Ok(Self {
            damage: None,
            db,
            records,
            path: path.to_owned(),
            last: AtomicU64::new(last.max(floor.0)),
            trimmed: AtomicU64::new(trimmed),
            flushed: AtomicU64::new(last),
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
        let mut seq = self.last.load(Ordering::Relaxed);
        self.point("journal-append")?;
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
            self.point("journal-flush")?;
            self.db.flush().map_err(|e| self.store(e))?;
            // sled's own flush only starts the write (sync_file_range, as
            // strace shows); this makes the drive keep it.
            self.fdatasync()?;
            self.flushed.store(last, Ordering::Release);
        }
        Ok(Seq(last))
    }

    /// Up to `most` records after `after`, in order. One that cannot be read is
    /// a gap.
    pub fn read(&self, after: Seq, most: usize) -> Result<Vec<(Seq, Record)>, JournalError> {
        let mut found = Vec::new();
        for row in self.records.range(after.0.saturating_add(1).to_be_bytes()..).take(most) {
            let (key, value) = row.map_err(|e| self.store(e))?;
            let seq = seq_of(&key).ok_or_else(|| self.store(corruption()))?;
            let record = codec::decode_record(&value).unwrap_or_else(|error| {
                tracing::warn!(%seq, %error, "a record of the journal cannot be read");
                Record::Gap {
                    reason: format!("record {seq} of the journal cannot be read: {error}"),
                }
            });
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

    /// Brings sled's file to stable storage.
    fn fdatasync(&self) -> Result<(), JournalError> {
        self.point("journal-fdatasync")?;
        std::fs::File::open(self.path.join("db"))
            .and_then(|file| file.sync_data())
            .map_err(|error| self.store(error.into()))
    }

    /// A fault point.
    fn point(&self, call: &'static str) -> Result<(), JournalError> {
        fault::at(call, self.path.display())
            .map_err(|error| self.store(std::io::Error::from(error).into()))
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
            Err(sled::Error::Io(error)) if tries > 0 && is_locked(&error) => {
                tries -= 1;
                std::thread::sleep(std::time::Duration::from_millis(20));
            }
            result => return result,
        }
    }
}

/// Moves a corrupt store out of the way.
fn set_aside(path: &Path) -> Result<PathBuf, JournalError> {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(format!(".corrupt-{}", Timestamp::now().to_compact()));
    let aside = path.with_file_name(name);
    // Not made durable: should the old one stand here again after a crash, it
    // is set aside again.
    std::fs::rename(path, &aside)
        .map_err(|error| JournalError::Store { path: path.to_owned(), source: error.into() })?;
    Ok(aside)
}

/// Whether the store's files are damaged, as against unreadable for now (no
/// permission, a failing or full disk).
fn is_corrupt(error: &sled::Error) -> bool {
    match error {
        sled::Error::Corruption { .. }
        | sled::Error::Unsupported(_)
        | sled::Error::ReportableBug(_)
        | sled::Error::CollectionNotFound(_) => true,
        sled::Error::Io(error) => {
            matches!(
                error.kind(),
                std::io::ErrorKind::InvalidData
                    | std::io::ErrorKind::InvalidInput
                    | std::io::ErrorKind::UnexpectedEof
                    | std::io::ErrorKind::Other
            ) && error.raw_os_error().is_none()
                && !is_locked(error)
        }
    }
}

fn is_locked(error: &std::io::Error) -> bool {
    error.to_string().contains("could not acquire lock")
}

/// For what the store gives back and this program never wrote.
fn corruption() -> sled::Error {
    sled::Error::Corruption { at: None, bt: () }
}

/// Numbers begin at 1.
fn seq_of(key: &[u8]) -> Option<Seq> {
    key.try_into().ok().map(u64::from_be_bytes).filter(|seq| *seq > 0).map(Seq)
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

    fn all(journal: &Journal) -> Vec<Record> {
        journal.read(Seq(0), 10_000).unwrap().into_iter().map(|(_, record)| record).collect()
    }

    #[test]
    fn a_record_that_cannot_be_read_is_a_gap() {
        let directory = tempfile::tempdir().unwrap();
        let journal = Journal::open(&directory.path().join("journal"), Seq(0)).unwrap();
        journal.append(&[entry(1), entry(2), entry(3)]).unwrap();
        journal.records.insert(2u64.to_be_bytes(), &b"\xff\xff not a record"[..]).unwrap();
        let found = all(&journal);
        assert_eq!((&found[0], &found[2]), (&entry(1), &entry(3)));
        assert!(matches!(&found[1], Record::Gap { reason } if reason.contains('2')), "{found:?}");
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
                let db = open_store(path).unwrap();
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
