//! The journal's records on disk: a few dozen in one row, for sled's cost is by
//! the row.

use std::path::{Path, PathBuf};

use replicator_common::codec;
use replicator_common::fault;
use replicator_common::id::Seq;
use replicator_common::time::Timestamp;

use super::{JournalError, Record};

/// The newest format that this program writes and reads.
pub(super) const VERSION: u32 = 2;

/// Most records in one row: some 4 KB with short names.
pub(super) const BLOCK_MAX: usize = 100;

/// Most removals in one sled batch. What a batch leaves behind is freed when
/// the next ones begin: with records a row each, trimming 200,000 took 220 MiB
/// with batches of 1000, and 20 MiB with 100, in the same time.
const TRIM_MAX: usize = 100;

/// sled's page cache, bytes as sled counts them: what is appended, read and
/// trimmed at the same time takes four to five times as much (measured: 64 MiB
/// more with 16 MiB, 25 MiB more with 2 MiB, whatever the backlog). Records are
/// read once, in order, so a small cache does.
const CACHE_BYTES: u64 = 2 << 20;

/// The open store.
pub(super) struct Store {
    db: sled::Db,
    blocks: sled::Tree,
    path: PathBuf,
}

/// What a store holds: numbers of records.
pub(super) struct Held {
    /// The one before the first.
    pub(super) before: u64,
    /// The last.
    pub(super) last: u64,
}

impl Store {
    /// Opens or makes the store; an older one is upgraded.
    pub(super) fn open(path: &Path) -> Result<Self, JournalError> {
        let failed = |source| JournalError::Store { path: path.to_owned(), source };
        let db = open_database(path).map_err(failed)?;
        let blocks = db.open_tree("blocks").map_err(failed)?;
        let store = Self { db, blocks, path: path.to_owned() };
        let meta = store.db.open_tree("meta").map_err(failed)?;
        let found = match meta.get("version").map_err(failed)? {
            None => VERSION,
            Some(bytes) => {
                let found = bytes.as_ref().try_into().map(u32::from_le_bytes);
                found.map_err(|_| failed(corruption()))?
            }
        };
        match found {
            VERSION => {}
            newer if newer > VERSION => {
                return Err(JournalError::Newer { path: path.to_owned(), found });
            }
            _ => store.upgrade()?,
        }
        meta.insert("version", &VERSION.to_le_bytes()).map_err(failed)?;
        Ok(store)
    }

    /// Version 1 had a row for each record. After a crash in between some are in
    /// both tables, and are read twice, which is no harm.
    fn upgrade(&self) -> Result<(), JournalError> {
        let old = self.db.open_tree("records").map_err(|e| self.failed(e))?;
        loop {
            let mut rows = Vec::with_capacity(BLOCK_MAX);
            for row in old.iter().take(BLOCK_MAX) {
                let (key, value) = row.map_err(|e| self.failed(e))?;
                let seq = seq_of(&key).ok_or_else(|| self.failed(corruption()))?;
                rows.push((seq, codec::decode_record(&value).unwrap_or_else(|e| damaged(seq, &e))));
            }
            let Some((first, _)) = rows.first() else { break };
            let first = first.0;
            // A hole ends the block: numbers within one follow each other.
            let block: Vec<Record> = (first..)
                .zip(&rows)
                .take_while(|(expected, (seq, _))| *expected == seq.0)
                .map(|(_, (_, record))| record.clone())
                .collect();
            self.put(first, &block)?;
            let mut batch = sled::Batch::default();
            for seq in (first..).take(block.len()) {
                batch.remove(&seq.to_be_bytes());
            }
            old.apply_batch(batch).map_err(|e| self.failed(e))?;
        }
        self.db.drop_tree("records").map_err(|e| self.failed(e))?;
        self.flush()
    }

    /// What it holds; `None` when that is nothing.
    pub(super) fn held(&self) -> Result<Option<Held>, JournalError> {
        let ends = (self.blocks.first(), self.blocks.last());
        let ends = (ends.0.map_err(|e| self.failed(e))?, ends.1.map_err(|e| self.failed(e))?);
        let (Some((first, _)), Some((last, value))) = ends else { return Ok(None) };
        let number = |key: &[u8]| seq_of(key).ok_or_else(|| self.failed(corruption()));
        // Of one that cannot be read it is not known how many it held: numbers
        // may be left out, but never given twice.
        let count = codec::decode_record::<Vec<Record>>(&value).map_or(BLOCK_MAX, |all| all.len());
        let last = number(&last)?.0 + (count as u64).max(1) - 1;
        Ok(Some(Held { before: number(&first)?.0 - 1, last }))
    }

    /// Adds records whose numbers begin with `first`, [`BLOCK_MAX`] at most.
    pub(super) fn put(&self, first: u64, records: &[Record]) -> Result<(), JournalError> {
        let value = codec::encode_record(records).map_err(|source| JournalError::Record {
            path: self.path.clone(),
            seq: Seq(first),
            source,
        })?;
        self.blocks.insert(first.to_be_bytes(), value).map_err(|e| self.failed(e))?;
        Ok(())
    }

    /// Up to `most` records after `after`, in order, `last` being the number of
    /// the last one that it holds. A block that cannot be read is a gap.
    pub(super) fn read(
        &self,
        after: u64,
        most: usize,
        last: u64,
    ) -> Result<Vec<(Seq, Record)>, JournalError> {
        let from = after.saturating_add(1).to_be_bytes();
        let within = self.blocks.range(..=from).next_back().transpose();
        let within = within.map_err(|e| self.failed(e))?;
        let within = within.map_or_else(|| sled::IVec::from(&from), |(key, _)| key);
        let mut rows = self.blocks.range(within..).peekable();
        let mut found = Vec::new();
        while let Some(row) = rows.next() {
            let (key, value) = row.map_err(|e| self.failed(e))?;
            let first = seq_of(&key).ok_or_else(|| self.failed(corruption()))?;
            let next = rows.peek().and_then(|row| seq_of(&row.as_ref().ok()?.0));
            // It stands for all of the block, and is passed by as a whole.
            let end = next.map_or(last, |next| next.0 - 1).max(first.0);
            let records = match codec::decode_record::<Vec<Record>>(&value) {
                Ok(records) => (first.0..).map(Seq).zip(records).collect(),
                Err(error) => vec![(Seq(end), damaged(first, &error))],
            };
            found.extend(records.into_iter().filter(|(seq, _)| seq.0 > after));
            if found.len() >= most {
                found.truncate(most);
                break;
            }
        }
        Ok(found)
    }

    /// Forgets blocks of which no record comes after `through`, `last` being the
    /// number of the last one that it holds. Nobody may add any meanwhile.
    pub(super) fn trim(&self, through: u64, last: u64) -> Result<(), JournalError> {
        loop {
            let mut keys = Vec::with_capacity(TRIM_MAX + 1);
            for key in self.blocks.iter().keys().take(TRIM_MAX + 1) {
                let key = key.map_err(|e| self.failed(e))?;
                keys.push(seq_of(&key).ok_or_else(|| self.failed(corruption()))?.0);
            }
            // Each ends where the next begins.
            let ends = keys.iter().skip(1).map(|next| next - 1);
            let ends = ends.chain((keys.len() <= TRIM_MAX).then_some(last));
            let all = keys.iter().zip(ends);
            let gone: Vec<_> = all.take_while(|(_, end)| *end <= through).collect();
            let mut batch = sled::Batch::default();
            for (key, _) in &gone {
                batch.remove(&key.to_be_bytes());
            }
            if !gone.is_empty() {
                self.blocks.apply_batch(batch).map_err(|e| self.failed(e))?;
            }
            if gone.len() < TRIM_MAX {
                return Ok(());
            }
        }
    }

    /// Brings all that was put to stable storage.
    pub(super) fn flush(&self) -> Result<(), JournalError> {
        // The reason for this sync: a record that survives a crash marks
        // what must be read again even where a rescan would see nothing
        // (a store that shares its ctime with an earlier reading).
        self.point("journal-flush")?;
        self.db.flush().map_err(|e| self.failed(e))?;
        // sled's own flush only starts the write (sync_file_range, as
        // strace shows); this makes the drive keep it.
        self.point("journal-fdatasync")?;
        std::fs::File::open(self.path.join("db"))
            .and_then(|file| file.sync_data())
            .map_err(|error| self.failed(error.into()))
    }

    /// Bytes on disk.
    pub(super) fn size(&self) -> u64 {
        self.db.size_on_disk().unwrap_or(0)
    }

    /// A fault point.
    pub(super) fn point(&self, call: &'static str) -> Result<(), JournalError> {
        fault::at(call, self.path.display())
            .map_err(|error| self.failed(std::io::Error::from(error).into()))
    }

    fn failed(&self, source: sled::Error) -> JournalError {
        JournalError::Store { path: self.path.clone(), source }
    }
}

/// What stands for records that cannot be read.
fn damaged(first: Seq, error: &codec::CodecError) -> Record {
    tracing::warn!(seq = %first, %error, "records of the journal cannot be read");
    Record::Gap { reason: format!("record {first} of the journal cannot be read: {error}") }
}

/// Opens the database. sled lets its file lock go a moment after the last handle
/// was dropped, so one that is taken is tried again for a while; that no other
/// process has the journal, the state directory's lock says.
pub(super) fn open_database(path: &Path) -> Result<sled::Db, sled::Error> {
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
pub(super) fn set_aside(path: &Path) -> Result<PathBuf, JournalError> {
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
pub(super) fn is_corrupt(error: &sled::Error) -> bool {
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
    use replicator_common::id::ObjectId;
    use replicator_common::name::Name;

    fn entry(n: u64) -> Record {
        Record::Entry {
            directory: ObjectId::new(1, &[1]).unwrap(),
            name: Name::new(format!("name-{n}").as_bytes()).unwrap(),
        }
    }

    fn entries(numbers: std::ops::RangeInclusive<u64>) -> Vec<Record> {
        numbers.map(entry).collect()
    }

    fn numbers(found: &[(Seq, Record)]) -> Vec<u64> {
        found.iter().map(|(seq, _)| seq.0).collect()
    }

    #[test]
    fn blocks_are_read_and_trimmed_at_any_number() {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::open(&directory.path().join("journal")).unwrap();
        assert!(store.held().unwrap().is_none());
        let ends = [11, 12, 50, 150, 151];
        let mut first = 11;
        for end in ends {
            store.put(first, &entries(first..=end)).unwrap();
            first = end + 1;
        }
        for after in 0..155 {
            for most in [1, 7, 1000] {
                let found = store.read(after, most, 151).unwrap();
                let from = (after + 1).max(11);
                let expected: Vec<_> =
                    (from..=151).take(most).map(|n| (Seq(n), entry(n))).collect();
                assert_eq!(found, expected, "{most} after {after}");
            }
        }
        for (through, first) in [(5, 11), (11, 12), (40, 13), (50, 51), (150, 151)] {
            store.trim(through, 151).unwrap();
            let held = store.held().unwrap().unwrap();
            assert_eq!((held.before + 1, held.last), (first, 151), "through {through}");
        }
        store.trim(151, 151).unwrap();
        assert!(store.held().unwrap().is_none());
    }

    #[test]
    fn a_block_that_cannot_be_read_is_one_gap() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("journal");
        let store = Store::open(&path).unwrap();
        for first in [1, 11, 21] {
            store.put(first, &entries(first..=first + 9)).unwrap();
        }
        let garbage = &b"\xff\xff not a record"[..];
        store.blocks.insert(11u64.to_be_bytes(), garbage).unwrap();
        let found = store.read(8, 3, 30).unwrap();
        assert_eq!(numbers(&found), [9, 10, 20]);
        assert!(matches!(&found[2].1, Record::Gap { reason } if reason.contains("11")));
        assert_eq!(numbers(&store.read(20, 1, 30).unwrap()), [21]);
        store.blocks.insert(21u64.to_be_bytes(), garbage).unwrap();
        let last = store.held().unwrap().unwrap().last;
        assert!(last >= 30, "no number is given twice");
        assert_eq!(numbers(&store.read(20, 9, last).unwrap()), [last]);
        assert!(store.read(last, 9, last).unwrap().is_empty());
    }

    #[test]
    fn a_journal_of_version_1_is_upgraded_and_a_newer_one_refused() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("journal");
        {
            let db = open_database(&path).unwrap();
            db.open_tree("meta").unwrap().insert("version", &1u32.to_le_bytes()).unwrap();
            let records = db.open_tree("records").unwrap();
            for n in (5..=250).filter(|n| *n != 77) {
                let row = codec::encode_record(&entry(n)).unwrap();
                records.insert(n.to_be_bytes(), row).unwrap();
            }
            records.insert(9u64.to_be_bytes(), &b"garbage"[..]).unwrap();
            db.flush().unwrap();
        }
        for _ in 0..2 {
            let store = Store::open(&path).unwrap();
            let held = store.held().unwrap().unwrap();
            assert_eq!((held.before, held.last), (4, 250));
            let found = store.read(0, 1000, 250).unwrap();
            let all = |n: &u64| *n != 77;
            assert_eq!(numbers(&found), (5..=250).filter(all).collect::<Vec<_>>());
            for (seq, record) in found {
                match seq.0 {
                    9 => assert!(matches!(record, Record::Gap { .. })),
                    n => assert_eq!(record, entry(n)),
                }
            }
        }
        {
            let db = open_database(&path).unwrap();
            let newer = (VERSION + 1).to_le_bytes();
            db.open_tree("meta").unwrap().insert("version", &newer).unwrap();
        }
        assert!(matches!(Store::open(&path), Err(JournalError::Newer { .. })));
    }
}
