//! The stores behind one face, and the rows they are given.

use std::fmt;
use std::fs::File;
use std::path::Path;
use std::str::FromStr;

use anyhow::bail;
use redb::{Database, Durability, ReadableDatabase, ReadableTable, TableDefinition};
use sled::Transactional;
use sled::transaction::ConflictableTransactionError;

/// Objects in a transaction; it holds as many entries besides.
pub const HALF: usize = 500;
/// Cache given to each store, bytes: what a daemon could spare.
const CACHE: usize = 64 << 20;

/// A store with its settings.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// redb; after a crash it walks the whole file.
    Redb,
    /// redb that keeps what spares it the walk, at each commit.
    RedbQuick,
    /// sled; a transaction over two trees, then `flush`. Does not survive
    /// power loss: on Linux, `flush` calls sync_file_range(2) and nothing else,
    /// which neither writes the file's size and extents nor empties the disk's
    /// cache.
    Sled,
    /// The same, then fdatasync(2) on sled's file: what `flush` promises.
    SledSync,
}

impl Kind {
    /// In the table's order.
    pub const ALL: [Self; 4] = [Self::Redb, Self::RedbQuick, Self::Sled, Self::SledSync];

    /// As a command-line word.
    pub fn word(self) -> &'static str {
        match self {
            Self::Redb => "redb",
            Self::RedbQuick => "redb-quick",
            Self::Sled => "sled",
            Self::SledSync => "sled-sync",
        }
    }

    /// Opens the store, or makes it.
    pub fn open(self, path: &Path) -> anyhow::Result<Box<dyn Store>> {
        Ok(match self {
            Self::Redb => Box::new(Redb::open(path, false)?),
            Self::RedbQuick => Box::new(Redb::open(path, true)?),
            Self::Sled => Box::new(Sled::open(path, false)?),
            Self::SledSync => Box::new(Sled::open(path, true)?),
        })
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Redb => "redb 3.1.0",
            Self::RedbQuick => "redb 3.1.0, quick repair",
            Self::Sled => "sled 0.34.7, flush",
            Self::SledSync => "sled 0.34.7, flush + fdatasync",
        })
    }
}

impl FromStr for Kind {
    type Err = anyhow::Error;

    fn from_str(word: &str) -> anyhow::Result<Self> {
        match Self::ALL.into_iter().find(|kind| kind.word() == word) {
            Some(kind) => Ok(kind),
            None => bail!("no store {word:?}"),
        }
    }
}

/// What one transaction writes.
#[derive(Default)]
pub struct Rows {
    /// Object id → state.
    pub objects: Vec<(Vec<u8>, Vec<u8>)>,
    /// Directory id and name → object id.
    pub entries: Vec<(Vec<u8>, Vec<u8>)>,
}

impl Rows {
    /// The rows of some objects, in their `version`.
    pub fn of(numbers: impl IntoIterator<Item = u64>, version: u8) -> Self {
        let mut rows = Self::default();
        for number in numbers {
            rows.objects.push((object_key(number), object_value(number, version)));
            rows.entries.push((entry_key(number), object_key(number)));
        }
        rows
    }
}

/// An object's key, 13 bytes: tag, inode number and generation, as xfs's file
/// handles are. Little endian scatters neighbours, as it really does.
pub fn object_key(number: u64) -> Vec<u8> {
    let mut key = vec![0x81];
    key.extend_from_slice(&(number + 128).to_le_bytes());
    key.extend_from_slice(&(number as u32).wrapping_mul(2_654_435_769).to_le_bytes());
    key
}

/// An object's state, 120 bytes of which the half looks random.
fn object_value(number: u64, version: u8) -> Vec<u8> {
    let mut value = vec![version; 120];
    let mut state = number.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ u64::from(version);
    for chunk in value[..60].chunks_mut(8) {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        let length = chunk.len();
        chunk.copy_from_slice(&state.to_le_bytes()[..length]);
    }
    value
}

/// An entry's key, 30 bytes: directory and name, 100 to a directory.
fn entry_key(number: u64) -> Vec<u8> {
    let mut key = object_key(number / 100);
    key.extend_from_slice(format!("file-{number:012}").as_bytes());
    key
}

/// What is asked of a store.
pub trait Store {
    /// Writes rows in one transaction; on return they survive power loss.
    fn commit(&mut self, rows: &Rows) -> anyhow::Result<()>;
    /// One object's state.
    fn object(&self, key: &[u8]) -> anyhow::Result<Option<Vec<u8>>>;
    /// Walks objects, then entries, each in the order of their keys, and tells
    /// how many there are.
    fn scan(&self) -> anyhow::Result<(u64, u64)>;
}

// ---------------------------------------------------------------- redb

const OBJECTS: TableDefinition<'_, &[u8], &[u8]> = TableDefinition::new("objects");
const ENTRIES: TableDefinition<'_, &[u8], &[u8]> = TableDefinition::new("entries");

struct Redb {
    database: Database,
    quick_repair: bool,
}

impl Redb {
    fn open(path: &Path, quick_repair: bool) -> anyhow::Result<Self> {
        let database = Database::builder().set_cache_size(CACHE).create(path)?;
        Ok(Self { database, quick_repair })
    }
}

impl Store for Redb {
    fn commit(&mut self, rows: &Rows) -> anyhow::Result<()> {
        let mut transaction = self.database.begin_write()?;
        transaction.set_durability(Durability::Immediate)?;
        transaction.set_quick_repair(self.quick_repair);
        {
            let mut objects = transaction.open_table(OBJECTS)?;
            for (key, value) in &rows.objects {
                objects.insert(&key[..], &value[..])?;
            }
            let mut entries = transaction.open_table(ENTRIES)?;
            for (key, value) in &rows.entries {
                entries.insert(&key[..], &value[..])?;
            }
        }
        transaction.commit()?;
        Ok(())
    }

    fn object(&self, key: &[u8]) -> anyhow::Result<Option<Vec<u8>>> {
        let objects = self.database.begin_read()?.open_table(OBJECTS)?;
        Ok(objects.get(key)?.map(|value| value.value().to_vec()))
    }

    fn scan(&self) -> anyhow::Result<(u64, u64)> {
        let transaction = self.database.begin_read()?;
        let mut counts = [0; 2];
        for (count, table) in counts.iter_mut().zip([OBJECTS, ENTRIES]) {
            for row in transaction.open_table(table)?.iter()? {
                row?;
                *count += 1;
            }
        }
        Ok(counts.into())
    }
}

// ---------------------------------------------------------------- sled

struct Sled {
    database: sled::Db,
    objects: sled::Tree,
    entries: sled::Tree,
    /// sled's one data file, to be synced after each flush.
    file: Option<File>,
}

impl Sled {
    fn open(path: &Path, sync: bool) -> anyhow::Result<Self> {
        let database = sled::Config::new()
            .path(path)
            .cache_capacity(CACHE as u64)
            .flush_every_ms(None)
            .open()?;
        let (objects, entries) = (database.open_tree("objects")?, database.open_tree("entries")?);
        let file = sync.then(|| File::open(path.join("db"))).transpose()?;
        Ok(Self { database, objects, entries, file })
    }
}

impl Store for Sled {
    fn commit(&mut self, rows: &Rows) -> anyhow::Result<()> {
        (&self.objects, &self.entries)
            .transaction(|(objects, entries)| {
                for (key, value) in &rows.objects {
                    objects.insert(&key[..], &value[..])?;
                }
                for (key, value) in &rows.entries {
                    entries.insert(&key[..], &value[..])?;
                }
                Ok::<_, ConflictableTransactionError<()>>(())
            })
            .map_err(|error| anyhow::anyhow!("{error:?}"))?;
        self.database.flush()?;
        if let Some(file) = &self.file {
            file.sync_data()?;
        }
        Ok(())
    }

    fn object(&self, key: &[u8]) -> anyhow::Result<Option<Vec<u8>>> {
        Ok(self.objects.get(key)?.map(|value| value.to_vec()))
    }

    fn scan(&self) -> anyhow::Result<(u64, u64)> {
        let mut counts = [0; 2];
        for (count, tree) in counts.iter_mut().zip([&self.objects, &self.entries]) {
            for row in tree {
                row?;
                *count += 1;
            }
        }
        Ok(counts.into())
    }
}
