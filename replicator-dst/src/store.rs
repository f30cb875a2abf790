//! The durable store of one replica (redb): objects map, commit log, standing.
//!
//! Tables, all values as [`codec::encode_record`] writes them (version,
//! checksum, body):
//! - `objects`: object id, as the store's [`KeyOrder`] has it → [`Known`].
//! - `log`: (batch, part) → [`Step`]s of a committed batch, in order.
//! - `set_aside`: number → [`SetAsideItem`].
//! - `meta`: `version` → the format's version, `standing` → [`Standing`],
//!   `marked` → the batch of the mark that is durable in the replica (see
//!   [`crate::mark`]; missing until there is one), `through` → the last batch
//!   whose mark says that it is through, `sealed` → the [`Edition`] of the last
//!   batch that was logged.
//!
//! Versions: 1, the first; 2, the standing names the last batch's nonce; 3, the log may
//! hold [`Step::Append`]; 4, the objects map is in [`KeyOrder::Inodes`]. One older than 3
//! is upgraded to that when it is opened (see `upgrade`); 3 stays, in [`KeyOrder::Bytes`].

mod standing;
#[cfg(test)]
mod tests;

pub use standing::Standing;

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

use redb::{Database, Durability, ReadableDatabase, ReadableTable, TableDefinition};
use replicator_common::codec::{self, CodecError};
use replicator_common::id::{BatchId, Edition, KeyOrder, ObjectId};
use replicator_common::store;
use serde::{Deserialize, Serialize};

use crate::apply::Step;
use crate::mark::Reached;
use crate::objects::{Known, Objects, Position};

const STORE_VERSION: u32 = 4;
/// The last one whose map is in the order of bytes.
pub(crate) const VERSION_BYTES: u32 = 3;
const META: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("meta");
const OBJECTS: TableDefinition<'_, &[u8], &[u8]> = TableDefinition::new("objects");
const LOG: TableDefinition<'_, (u64, u32), &[u8]> = TableDefinition::new("log");
const SET_ASIDE: TableDefinition<'_, u64, &[u8]> = TableDefinition::new("set_aside");
/// Steps are cut into rows of about this many bytes, far below the codec's limit.
const LOG_ROW_BYTES: usize = 1 << 20;
/// redb's own default is 1 GiB, which is no bound for a service.
const CACHE_BYTES: usize = 64 << 20;

/// Why the store did not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The store said no.
    #[error("store {}: cannot {action}: {source}", path.display())]
    Redb {
        /// The store's file.
        path: PathBuf,
        /// What was tried.
        action: &'static str,
        /// What it said.
        source: Box<redb::Error>,
    },
    /// A row is not what this program writes.
    #[error("store {}: {source}", path.display())]
    Codec {
        /// The store's file.
        path: PathBuf,
        /// What is wrong.
        source: CodecError,
    },
    /// A newer program wrote it.
    #[error("store {} has version {found}, this program knows up to {STORE_VERSION}: run the newer replicator that wrote it", path.display())]
    Newer {
        /// The store's file.
        path: PathBuf,
        /// Version found.
        found: u32,
    },
}

/// Something of the replica's that went to lost+found while it was replicated.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SetAsideItem {
    /// Its name in lost+found.
    pub file: String,
    /// The object, hexadecimal.
    pub object: String,
    /// Where it stood, relative to the replica, where known.
    pub path: Option<String>,
    /// Why it is there.
    pub reason: String,
}

/// What one commit changes.
#[derive(Debug, Default)]
pub struct Commit<'a> {
    /// Steps to redo until the batch is known to be applied and synced.
    pub steps: &'a [Step],
    /// Rows that change.
    pub rows: &'a [(ObjectId, Option<Known>)],
    /// What went to lost+found.
    pub set_aside: &'a [SetAsideItem],
    /// Batches up to this one are applied and a later sync has covered them:
    /// their steps go.
    pub covered: BatchId,
    /// The mark in the replica that the same sync has covered.
    pub marked: Option<Reached>,
}

/// The store.
///
/// After an error of the disk redb refuses everything until its file is opened
/// anew ([`Store::reopen`]), for it cannot know what the disk holds: what was
/// being committed then may be there or not, as after a crash.
#[derive(Debug)]
pub struct Store {
    /// `None` while it could not be opened again.
    database: RwLock<Option<Arc<Database>>>,
    order: KeyOrder,
    path: PathBuf,
    /// The disk failed: nothing works before [`Store::reopen`].
    failed: AtomicBool,
}

/// Opens the store's file.
fn open_database(path: &Path) -> Result<Arc<Database>, StoreError> {
    let mut builder = Database::builder();
    builder.set_cache_size(CACHE_BYTES);
    let database = store::open(&builder, path);
    database.map(Arc::new).map_err(|error| failed(path, "open")(error.into()))
}

impl Store {
    /// Opens the store, or makes it with `standing`.
    pub fn open(path: &Path, standing: impl FnOnce() -> Standing) -> Result<Self, StoreError> {
        let database = RwLock::new(Some(open_database(path)?));
        let (order, failed) = (KeyOrder::Inodes, AtomicBool::new(false));
        let mut store = Self { database, order, path: path.to_owned(), failed };
        // Durability: immediate. The incarnation is told to the source, and to the
        // replica, at once.
        store.order = store.write("open", Durability::Immediate, |transaction, store| {
            let mut meta = transaction.open_table(META).map_err(|e| store.err("open")(e.into()))?;
            transaction.open_table(OBJECTS).map_err(|e| store.err("open")(e.into()))?;
            transaction.open_table(LOG).map_err(|e| store.err("open")(e.into()))?;
            transaction.open_table(SET_ASIDE).map_err(|e| store.err("open")(e.into()))?;
            let version = meta.get("version").map_err(|e| store.err("open")(e.into()))?;
            let version = version.map(|row| store.decode::<u32>(row.value())).transpose()?;
            match version {
                Some(found) if found > STORE_VERSION => {
                    Err(StoreError::Newer { path: store.path.clone(), found })
                }
                Some(STORE_VERSION) => Ok(KeyOrder::Inodes),
                Some(VERSION_BYTES) => Ok(KeyOrder::Bytes),
                Some(found) => {
                    store.upgrade(&mut meta, found)?;
                    Ok(KeyOrder::Bytes)
                }
                None => {
                    let rows = [
                        ("version", store.encode(&STORE_VERSION)?),
                        ("standing", store.encode(&standing())?),
                    ];
                    for (key, value) in rows {
                        meta.insert(key, value.as_slice())
                            .map_err(|e| store.err("open")(e.into()))?;
                    }
                    Ok(KeyOrder::Inodes)
                }
            }
        })?;
        Ok(store)
    }

    pub(crate) fn err(&self, action: &'static str) -> impl FnOnce(redb::Error) -> StoreError {
        move |source| {
            if is_of_the_disk(&source) {
                self.failed.store(true, Ordering::Release);
            }
            failed(&self.path, action)(source)
        }
    }

    fn database(&self) -> Result<Arc<Database>, StoreError> {
        let open = self.database.read().unwrap_or_else(PoisonError::into_inner).clone();
        open.ok_or_else(|| self.err("use")(redb::Error::PreviousIo))
    }

    /// Whether the disk failed under it, so that nothing works any more.
    pub fn has_failed(&self) -> bool {
        self.failed.load(Ordering::Acquire)
    }

    /// Opens the file anew after the disk failed. What was being committed when
    /// it did is in it or not: ask [`Self::standing`].
    ///
    /// # Errors
    /// The disk fails still, or somebody reads in the old one still: to be tried
    /// again.
    pub fn reopen(&self) -> Result<(), StoreError> {
        let mut database = self.database.write().unwrap_or_else(PoisonError::into_inner);
        // Closed first: a file that is open is locked.
        *database = None;
        *database = Some(open_database(&self.path)?);
        self.failed.store(false, Ordering::Release);
        Ok(())
    }

    pub(crate) fn encode<T: Serialize + ?Sized>(&self, value: &T) -> Result<Vec<u8>, StoreError> {
        codec::encode_record(value)
            .map_err(|source| StoreError::Codec { path: self.path.clone(), source })
    }

    pub(crate) fn decode<T: serde::de::DeserializeOwned>(
        &self,
        record: &[u8],
    ) -> Result<T, StoreError> {
        codec::decode_record(record)
            .map_err(|source| StoreError::Codec { path: self.path.clone(), source })
    }

    fn write<T>(
        &self,
        action: &'static str,
        durability: Durability,
        change: impl FnOnce(&redb::WriteTransaction, &Self) -> Result<T, StoreError>,
    ) -> Result<T, StoreError> {
        let database = self.database()?;
        let transaction =
            store::begin(&database, &self.path, durability).map_err(self.err(action))?;
        let value = change(&transaction, self)?;
        transaction.commit().map_err(|e| self.err(action)(e.into()))?;
        Ok(value)
    }

    /// Where the replica stands.
    pub fn standing(&self) -> Result<Standing, StoreError> {
        let action = "read the standing";
        let read = self.database()?.begin_read().map_err(|e| self.err(action)(e.into()))?;
        let meta = read.open_table(META).map_err(|e| self.err(action)(e.into()))?;
        match meta.get("standing").map_err(|e| self.err(action)(e.into()))? {
            Some(row) => self.decode(row.value()),
            None => Err(StoreError::Codec {
                path: self.path.clone(),
                source: CodecError::Damaged("no standing"),
            }),
        }
    }

    /// Makes `standing` durable at once: for what has been promised to others
    /// (a heartbeat's watermark, an incarnation).
    pub fn set_standing(&self, standing: &Standing) -> Result<(), StoreError> {
        self.put_standing(standing, Durability::Immediate)
    }

    /// Notes `standing` without waiting for the disk: for what saves work after
    /// a restart but is not needed for correctness (that a batch was applied;
    /// redo finds out by itself).
    pub fn note_standing(&self, standing: &Standing) -> Result<(), StoreError> {
        self.put_standing(standing, Durability::None)
    }

    fn put_standing(&self, standing: &Standing, durability: Durability) -> Result<(), StoreError> {
        self.write("write the standing", durability, |transaction, store| {
            store.insert_standing(transaction, standing)
        })
    }

    fn insert_standing(
        &self,
        transaction: &redb::WriteTransaction,
        standing: &Standing,
    ) -> Result<(), StoreError> {
        let action = "write the standing";
        let mut meta = transaction.open_table(META).map_err(|e| self.err(action)(e.into()))?;
        let record = self.encode(standing)?;
        meta.insert("standing", record.as_slice()).map_err(|e| self.err(action)(e.into()))?;
        Ok(())
    }

    /// Logs a batch: from here on it will be applied, whatever happens. Updates
    /// the counts of objects in `standing` on the way.
    ///
    /// Durability: immediate, once a batch. This is the moment that makes an
    /// acknowledgement true.
    pub fn commit(&self, standing: &mut Standing, commit: &Commit<'_>) -> Result<(), StoreError> {
        let mut next = standing.clone();
        self.write("commit a batch", Durability::Immediate, |transaction, store| {
            store.trim(transaction, commit.covered)?;
            store.note_marked(transaction, commit.marked)?;
            store.log(transaction, next.committed, commit.steps)?;
            store.note_sealed(transaction, &next.edition())?;
            store.change_rows(transaction, &mut next, commit.rows)?;
            store.add_set_aside(transaction, commit.set_aside)?;
            store.insert_standing(transaction, &next)
        })?;
        *standing = next;
        Ok(())
    }

    /// Forgets the steps of batches up to `covered`. `marked` is the mark in the
    /// replica that the same sync has covered, where that is known.
    ///
    /// Durability: immediate, since staged files that the steps name are
    /// deleted next, and steps without their files could not be redone.
    pub fn forget(&self, covered: BatchId, marked: Option<Reached>) -> Result<(), StoreError> {
        self.write("trim the log", Durability::Immediate, |transaction, store| {
            store.note_marked(transaction, marked)?;
            store.trim(transaction, covered)
        })
    }

    fn note_marked(
        &self,
        transaction: &redb::WriteTransaction,
        marked: Option<Reached>,
    ) -> Result<(), StoreError> {
        let Some(Reached { batch, through }) = marked else { return Ok(()) };
        let action = "note the mark";
        let mut meta = transaction.open_table(META).map_err(|e| self.err(action)(e.into()))?;
        let record = self.encode(&batch)?;
        for key in ["marked", "through"].iter().take(1 + usize::from(through)) {
            meta.insert(*key, record.as_slice()).map_err(|e| self.err(action)(e.into()))?;
        }
        Ok(())
    }

    fn note_sealed(
        &self,
        transaction: &redb::WriteTransaction,
        edition: &Edition,
    ) -> Result<(), StoreError> {
        let action = "note the batch";
        let record = self.encode(edition)?;
        let mut meta = transaction.open_table(META).map_err(|e| self.err(action)(e.into()))?;
        meta.insert("sealed", record.as_slice()).map_err(|e| self.err(action)(e.into()))?;
        Ok(())
    }

    /// The batch whose steps are in the log. `None` too where a version before
    /// logged it, without its nonce.
    pub fn logged(&self) -> Result<Option<Edition>, StoreError> {
        let action = "read the log";
        let read = self.database()?.begin_read().map_err(|e| self.err(action)(e.into()))?;
        let log = read.open_table(LOG).map_err(|e| self.err(action)(e.into()))?;
        let last = log.last().map_err(|e| self.err(action)(e.into()))?;
        let last = last.map(|(key, _)| BatchId(key.value().0));
        let meta = read.open_table(META).map_err(|e| self.err(action)(e.into()))?;
        let row = meta.get("sealed").map_err(|e| self.err(action)(e.into()))?;
        let sealed: Option<Edition> = row.map(|row| self.decode(row.value())).transpose()?;
        Ok(sealed.filter(|sealed| Some(sealed.batch) == last))
    }

    /// The mark that is durable in the replica, as far as the store knows.
    pub fn marked(&self) -> Result<Option<Reached>, StoreError> {
        let action = "read the mark";
        let read = self.database()?.begin_read().map_err(|e| self.err(action)(e.into()))?;
        let meta = read.open_table(META).map_err(|e| self.err(action)(e.into()))?;
        let batch = |key| -> Result<Option<BatchId>, StoreError> {
            let row = meta.get(key).map_err(|e| self.err(action)(e.into()))?;
            row.map(|row| self.decode(row.value())).transpose()
        };
        let (marked, through) = (batch("marked")?, batch("through")?);
        Ok(marked.map(|batch| Reached { batch, through: through == Some(batch) }))
    }

    fn trim(
        &self,
        transaction: &redb::WriteTransaction,
        covered: BatchId,
    ) -> Result<(), StoreError> {
        let action = "trim the log";
        let mut log = transaction.open_table(LOG).map_err(|e| self.err(action)(e.into()))?;
        log.retain_in((0, 0)..=(covered.0, u32::MAX), |_, _| false)
            .map_err(|e| self.err(action)(e.into()))
    }

    fn log(
        &self,
        transaction: &redb::WriteTransaction,
        batch: BatchId,
        steps: &[Step],
    ) -> Result<(), StoreError> {
        let action = "log a batch";
        let mut log = transaction.open_table(LOG).map_err(|e| self.err(action)(e.into()))?;
        let (mut start, mut bytes, mut part) = (0, 0, 0);
        for end in 1..=steps.len() {
            bytes += estimate(&steps[end - 1]);
            if bytes >= LOG_ROW_BYTES || end == steps.len() {
                let record = self.encode(&steps[start..end])?;
                log.insert((batch.0, part), record.as_slice())
                    .map_err(|e| self.err(action)(e.into()))?;
                (start, bytes, part) = (end, 0, part + 1);
            }
        }
        Ok(())
    }

    fn change_rows(
        &self,
        transaction: &redb::WriteTransaction,
        standing: &mut Standing,
        rows: &[(ObjectId, Option<Known>)],
    ) -> Result<(), StoreError> {
        let action = "change the objects map";
        let mut table = transaction.open_table(OBJECTS).map_err(|e| self.err(action)(e.into()))?;
        let order = self.order;
        let orphan = |known: &Known| u64::from(matches!(known.position, Position::Orphan { .. }));
        // In the order of the table (of [`KeyOrder::Inodes`]): neighbours are on one page.
        let mut rows: Vec<_> = rows.iter().collect();
        rows.sort_by(|(a, _), (b, _)| a.cmp(b));
        for (object, row) in rows {
            let old = match row {
                Some(known) => {
                    standing.objects += 1;
                    standing.orphans += orphan(known);
                    let record = self.encode(known)?;
                    table.insert(order.key(object).as_bytes(), record.as_slice())
                }
                None => table.remove(order.key(object).as_bytes()),
            };
            let old = old.map_err(|e| self.err(action)(e.into()))?;
            if let Some(old) = old {
                let old: Known = self.decode(old.value())?;
                standing.objects = standing.objects.saturating_sub(1);
                standing.orphans = standing.orphans.saturating_sub(orphan(&old));
            }
        }
        Ok(())
    }

    fn add_set_aside(
        &self,
        transaction: &redb::WriteTransaction,
        items: &[SetAsideItem],
    ) -> Result<(), StoreError> {
        let action = "note what was set aside";
        if items.is_empty() {
            return Ok(());
        }
        let mut table =
            transaction.open_table(SET_ASIDE).map_err(|e| self.err(action)(e.into()))?;
        let last = table.last().map_err(|e| self.err(action)(e.into()))?;
        let next = last.map_or(0, |(key, _)| key.value() + 1);
        for (number, item) in (next..).zip(items) {
            let record = self.encode(item)?;
            table.insert(number, record.as_slice()).map_err(|e| self.err(action)(e.into()))?;
        }
        Ok(())
    }

    /// Adds to what was set aside.
    ///
    /// Durability: immediate. The step that set it aside is not found again by
    /// redoing it, and the manifest would not say what the file was.
    pub fn note_set_aside(&self, items: &[SetAsideItem]) -> Result<(), StoreError> {
        self.write("note what was set aside", Durability::Immediate, |transaction, store| {
            store.add_set_aside(transaction, items)
        })
    }

    /// All that was set aside.
    pub fn set_aside(&self) -> Result<Vec<SetAsideItem>, StoreError> {
        let action = "read what was set aside";
        let read = self.database()?.begin_read().map_err(|e| self.err(action)(e.into()))?;
        let table = read.open_table(SET_ASIDE).map_err(|e| self.err(action)(e.into()))?;
        let mut items = Vec::new();
        for row in table.iter().map_err(|e| self.err(action)(e.into()))? {
            let (_, row) = row.map_err(|e| self.err(action)(e.into()))?;
            items.push(self.decode(row.value())?);
        }
        Ok(items)
    }

    /// The logged steps, row by row in order, with their batch.
    pub fn each_logged(&self, mut see: impl FnMut(BatchId, Vec<Step>)) -> Result<(), StoreError> {
        let action = "read the log";
        let read = self.database()?.begin_read().map_err(|e| self.err(action)(e.into()))?;
        let table = read.open_table(LOG).map_err(|e| self.err(action)(e.into()))?;
        for row in table.iter().map_err(|e| self.err(action)(e.into()))? {
            let (key, row) = row.map_err(|e| self.err(action)(e.into()))?;
            see(BatchId(key.value().0), self.decode(row.value())?);
        }
        Ok(())
    }

    /// The orphans of the map.
    pub fn orphans(&self) -> Result<Vec<(ObjectId, Known)>, StoreError> {
        let mut orphans = Vec::new();
        if self.standing()?.orphans == 0 {
            return Ok(orphans);
        }
        let (action, order) = ("look for orphans", self.order);
        let read = self.database()?.begin_read().map_err(|e| self.err(action)(e.into()))?;
        let table = read.open_table(OBJECTS).map_err(|e| self.err(action)(e.into()))?;
        for row in table.iter().map_err(|e| self.err(action)(e.into()))? {
            let (key, row) = row.map_err(|e| self.err(action)(e.into()))?;
            let known: Known = self.decode(row.value())?;
            if let (Position::Orphan { .. }, Some(object)) =
                (&known.position, order.id(key.value()))
            {
                orphans.push((object, known));
            }
        }
        Ok(orphans)
    }

    /// Begins a new life: nothing that was remembered of the replica is
    /// trusted any more (traps 14, 15).
    ///
    /// Durability: immediate. The new incarnation goes to the replica next, and
    /// the source builds on it: a store that went back would be one of another life.
    pub fn renounce(&self, standing: &Standing) -> Result<(), StoreError> {
        let action = "begin a new incarnation";
        self.write(action, Durability::Immediate, |transaction, store| {
            transaction.delete_table(OBJECTS).map_err(|e| store.err(action)(e.into()))?;
            transaction.delete_table(LOG).map_err(|e| store.err(action)(e.into()))?;
            transaction.open_table(OBJECTS).map_err(|e| store.err(action)(e.into()))?;
            transaction.open_table(LOG).map_err(|e| store.err(action)(e.into()))?;
            let mut meta = transaction.open_table(META).map_err(|e| store.err(action)(e.into()))?;
            for key in ["marked", "through", "sealed"] {
                meta.remove(key).map_err(|e| store.err(action)(e.into()))?;
            }
            drop(meta);
            store.insert_standing(transaction, standing)
        })
    }
}

/// The objects map at one moment: cheaper than [`Store`] for many rows.
pub struct Snapshot<'a> {
    store: &'a Store,
    table: redb::ReadOnlyTable<&'static [u8], &'static [u8]>,
}

impl Store {
    /// The objects map as it is now.
    pub fn snapshot(&self) -> Result<Snapshot<'_>, StoreError> {
        let action = "read the objects map";
        let read = self.database()?.begin_read().map_err(|e| self.err(action)(e.into()))?;
        let table = read.open_table(OBJECTS).map_err(|e| self.err(action)(e.into()))?;
        Ok(Snapshot { store: self, table })
    }
}

impl Objects for Snapshot<'_> {
    type Error = StoreError;

    fn get(&self, object: &ObjectId) -> Result<Option<Known>, StoreError> {
        let row = self.table.get(self.store.order.key(object).as_bytes());
        let row = row.map_err(|e| self.store.err("read the objects map")(e.into()))?;
        row.map(|row| self.store.decode(row.value())).transpose()
    }
}

impl Objects for Store {
    type Error = StoreError;

    fn get(&self, object: &ObjectId) -> Result<Option<Known>, StoreError> {
        self.snapshot()?.get(object)
    }
}

/// Whether the store's file could not be read or written.
fn is_of_the_disk(error: &redb::Error) -> bool {
    matches!(error, redb::Error::Io(_) | redb::Error::PreviousIo)
}

fn failed(path: &Path, action: &'static str) -> impl FnOnce(redb::Error) -> StoreError {
    let path = path.to_owned();
    move |source| StoreError::Redb { path, action, source: Box::new(source) }
}

/// About how many bytes a step takes in the log.
fn estimate(step: &Step) -> usize {
    let xattrs = match step {
        Step::Attributes { state, .. } => {
            state.attributes.xattrs.iter().map(|x| x.name.len() + x.value.len() + 8).sum()
        }
        _ => 0,
    };
    let appended = match step {
        Step::Append { bytes, .. } => bytes.len(),
        _ => 0,
    };
    600 + xattrs + appended
}
