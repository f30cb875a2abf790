//! The index on disk (redb; see ARCHITECTURE.md "Stores" for why).
//!
//! # Format
//! One file. Tables, all with byte keys and values; an object's id stands in a key as its
//! [`KeyOrder`] has it; values of objects, pending parts and marks are
//! [`codec::encode_record`]s:
//! - `meta`: `version`, `incarnation`, `peer`, `reconciling`, `mark`, `next_list`,
//!   `deletions`
//! - `objects`: object → [`Known`]
//! - `entries`: `pair_key` of directory and name → object
//! - `links`: `pair_key` of object and (`pair_key` of directory and name) →
//!   nothing; of objects whose own row does not say it all (see `index::merge`)
//! - `chunks`: list number and segment, big endian → chunks
//! - `orphans`: object → [`Orphan`]
//! - `pending`: batch and part, big endian → a part of a [`Delta`]
//! - `young`: object → when it came, little endian nanoseconds
//!
//! Versions: 1, the first; 2, marks name their batch's nonce; 3, orphans may have
//! left; 4, objects with one name have no row in `links`; 5, ids in keys are in [`KeyOrder::Inodes`]. One older than 4 is
//! upgraded to that when it is opened (see `index::upgrade`); 4 stays, in [`KeyOrder::Bytes`].
//! (`deletions` and `young` came later: their absence is as if they were empty,
//! and who does not know them may leave them.)
//!
//! # Durability
//! INVARIANT (trap 5): a batch's delta is durable in `pending` before its
//! COMMIT is sent. [`Store::prepare`] therefore commits with an fsync, and in
//! the same transaction merges the deltas that were acknowledged since: one
//! fsync a batch. Chunk lists are written before, without one: the same fsync
//! covers them.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use redb::{
    Database, Durability, ReadableDatabase, ReadableTable, TableDefinition, WriteTransaction,
};
use replicator_common::chunk::Chunk;
use replicator_common::codec::{self, CodecError};
use replicator_common::id::{BatchId, Incarnation, KeyOrder, ObjectId, Seq};
use replicator_common::store;
use replicator_common::time::Timestamp;
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::known::{Content, Delta, EntryChange, Known, Mark, Orphan};
use super::noted::Noted;
use super::snapshot::Snapshot;
use super::view::Base;

pub(super) type Bytes = &'static [u8];

pub(super) const META: TableDefinition<'static, &'static str, Bytes> = TableDefinition::new("meta");
pub(super) const OBJECTS: TableDefinition<'static, Bytes, Bytes> = TableDefinition::new("objects");
pub(super) const ENTRIES: TableDefinition<'static, Bytes, Bytes> = TableDefinition::new("entries");
pub(super) const LINKS: TableDefinition<'static, Bytes, Bytes> = TableDefinition::new("links");
const CHUNKS: TableDefinition<'static, Bytes, Bytes> = TableDefinition::new("chunks");
pub(super) const ORPHANS: TableDefinition<'static, Bytes, Bytes> = TableDefinition::new("orphans");
pub(super) const PENDING: TableDefinition<'static, Bytes, Bytes> = TableDefinition::new("pending");
pub(super) const YOUNG: TableDefinition<'static, Bytes, Bytes> = TableDefinition::new("young");

pub(super) const VERSION: u32 = 5;
/// The one whose keys are in the order of bytes.
const VERSION_BYTES: u32 = 4;
/// Chunks of a list in one row: 36 bytes each, so some 150 KB.
const SEGMENT_CHUNKS: usize = 4096;
/// Objects or entries of a delta in one pending row, so that a row stays far
/// below the codec's limit.
const PART_ITEMS: usize = 2048;
/// redb's cache, bytes: bounds the index's memory whatever the tree's size.
const CACHE_BYTES: usize = 64 << 20;

/// Why the index cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum IndexError {
    /// The store says no.
    #[error("index {}: {source}", path.display())]
    Store {
        /// The index's file.
        path: PathBuf,
        /// What the store said.
        source: Box<redb::Error>,
    },
    /// A row cannot be read.
    #[error("index {}: a row of table {table} is damaged: {source}", path.display())]
    Row {
        /// The index's file.
        path: PathBuf,
        /// Which table.
        table: &'static str,
        /// What is wrong.
        source: CodecError,
    },
    /// Written by a newer program.
    #[error("index {} has format version {found}, this program knows up to {VERSION}: run the newer replicator that wrote it", path.display())]
    Newer {
        /// The index's file.
        path: PathBuf,
        /// Version found.
        found: u32,
    },
    /// Another process has it open.
    #[error("index {} is in use by another process", path.display())]
    InUse {
        /// The index's file.
        path: PathBuf,
    },
}

/// The index's tables.
pub struct Store {
    pub(super) db: Database,
    pub(super) order: KeyOrder,
    pub(super) path: PathBuf,
}

/// A key of an id and a name (or another such key): length of the id, the id's key, the name.
pub(super) fn pair_key(order: KeyOrder, first: &ObjectId, second: &[u8]) -> Vec<u8> {
    let first = order.key(first);
    let first = first.as_bytes();
    let mut key = Vec::with_capacity(1 + first.len() + second.len());
    key.push(first.len() as u8);
    key.extend_from_slice(first);
    key.extend_from_slice(second);
    key
}

/// Takes a `pair_key` apart.
pub(super) fn split_key(order: KeyOrder, key: &[u8]) -> Option<(ObjectId, &[u8])> {
    let (length, rest) = key.split_first()?;
    let (first, second) = rest.split_at_checked(usize::from(*length))?;
    Some((order.id(first)?, second))
}

impl Store {
    /// Opens or makes the index in the file `path`.
    pub fn open(path: &Path) -> Result<Self, IndexError> {
        let db = store::open(redb::Builder::new().set_cache_size(CACHE_BYTES), path).map_err(
            |error| match error {
                redb::DatabaseError::DatabaseAlreadyOpen => {
                    IndexError::InUse { path: path.to_owned() }
                }
                other => failed(path)(other),
            },
        )?;
        let mut store = Self { db, order: KeyOrder::Inodes, path: path.to_owned() };
        store.order = store.make_tables()?;
        Ok(store)
    }

    /// Gives the order of keys, too.
    fn make_tables(&self) -> Result<KeyOrder, IndexError> {
        let write = self.begin(Durability::Immediate)?;
        let order = {
            let mut meta = write.open_table(META).map_err(failed(&self.path))?;
            let found = meta
                .get("version")
                .map_err(failed(&self.path))?
                .map(|v| v.value().try_into().map_or(u32::MAX, u32::from_le_bytes));
            match found {
                Some(found) if found > VERSION => {
                    return Err(IndexError::Newer { path: self.path.clone(), found });
                }
                Some(VERSION | VERSION_BYTES) => {}
                Some(found) => {
                    self.upgrade(&write, &mut meta, found)?;
                    meta.insert("version", &VERSION_BYTES.to_le_bytes()[..])
                        .map_err(failed(&self.path))?;
                }
                None => {
                    let incarnation = Incarnation::random();
                    let value = self.encode("meta", &incarnation)?;
                    meta.insert("version", &VERSION.to_le_bytes()[..])
                        .map_err(failed(&self.path))?;
                    meta.insert("incarnation", value.as_slice()).map_err(failed(&self.path))?;
                }
            }
            for table in [OBJECTS, ENTRIES, LINKS, CHUNKS, ORPHANS, PENDING, YOUNG] {
                write.open_table(table).map_err(failed(&self.path))?;
            }
            match found {
                Some(found) if found < VERSION => KeyOrder::Bytes,
                _ => KeyOrder::Inodes,
            }
        };
        // Durable, as is the default: the incarnation is told to the destination.
        write.commit().map_err(failed(&self.path))?;
        Ok(order)
    }

    /// Names this life of the source's state.
    pub fn incarnation(&self) -> Result<Incarnation, IndexError> {
        // make_tables writes it in the transaction that makes the file.
        Ok(self.meta("incarnation")?.unwrap_or(Incarnation([0; 16])))
    }

    /// The destination's incarnation that this index describes.
    pub fn peer(&self) -> Result<Option<Incarnation>, IndexError> {
        Ok(self.meta("peer")?.flatten())
    }

    /// Where the last acknowledged batch left the source.
    pub fn mark(&self) -> Result<Mark, IndexError> {
        Ok(self.meta("mark")?.unwrap_or_default())
    }

    /// The highest number of a journal record that any batch covers, acknowledged or
    /// not.
    ///
    /// INVARIANT (acknowledged means durable): no new record gets a number up to
    /// this. The journal need not hold those records any more, nor ever have held
    /// them; and to acknowledge a batch is to trim it that far.
    pub fn highest_seq(&self) -> Result<Seq, IndexError> {
        let pending = self.pending()?;
        Ok(pending.iter().map(|delta| delta.mark.seq).fold(self.mark()?.seq, Seq::max))
    }

    /// A number for a new chunk list, never used before (also not by a process
    /// that died: numbers are reserved by the thousand).
    pub fn reserve_lists(&self, count: u64) -> Result<u64, IndexError> {
        let next: u64 = self.meta("next_list")?.unwrap_or(1);
        // Durable: a number that was given twice would have two lists under it.
        let write = self.begin(Durability::Immediate)?;
        self.put_meta(&write, "next_list", &(next + count))?;
        write.commit().map_err(failed(&self.path))?;
        Ok(next)
    }

    /// The destination's incarnation that this index describes from now on.
    pub fn set_peer(&self, peer: Incarnation) -> Result<(), IndexError> {
        self.set_meta("peer", &Some(peer))
    }

    /// Whether a reconciliation was begun and not finished.
    pub fn reconciling(&self) -> Result<bool, IndexError> {
        Ok(self.meta("reconciling")?.unwrap_or(false))
    }

    /// Notes that a reconciliation begins or is finished.
    pub fn set_reconciling(&self, reconciling: bool) -> Result<(), IndexError> {
        self.set_meta("reconciling", &reconciling)
    }

    fn set_meta<T: Serialize>(&self, key: &str, value: &T) -> Result<(), IndexError> {
        // Durable: the next session trusts the index, or compares anew, by these
        // words; and a reconciliation begun must not look like one never begun.
        let write = self.begin(Durability::Immediate)?;
        self.put_meta(&write, key, value)?;
        write.commit().map_err(failed(&self.path))
    }

    /// Forgets everything and takes a new incarnation: the index describes an
    /// empty replica of a destination that is not known yet.
    pub fn reset(&self) -> Result<(), IndexError> {
        // Durable: the greeting that follows names the new incarnation.
        let write = self.begin(Durability::Immediate)?;
        for table in [OBJECTS, ENTRIES, LINKS, CHUNKS, ORPHANS, PENDING, YOUNG] {
            write.delete_table(table).map_err(failed(&self.path))?;
            write.open_table(table).map_err(failed(&self.path))?;
        }
        let old = self.mark()?;
        let mark = Mark { seq: old.seq, ..Mark::default() };
        self.put_meta(&write, "peer", &None::<Incarnation>)?;
        self.put_meta(&write, "reconciling", &false)?;
        self.put_meta(&write, "mark", &mark)?;
        self.put_meta(&write, "deletions", &Vec::<(BatchId, Timestamp, u64)>::new())?;
        self.put_meta(&write, "incarnation", &Incarnation::random())?;
        write.commit().map_err(failed(&self.path))
    }

    /// Makes a batch's delta durable as pending, and merges `acknowledged`
    /// deltas into the tables, in one durable transaction.
    pub fn prepare(
        &self,
        delta: Option<(&Delta, &Noted)>,
        acknowledged: &[&Delta],
    ) -> Result<(), IndexError> {
        let write = self.begin(Durability::Immediate)?;
        for delta in acknowledged {
            self.merge(&write, delta)?;
        }
        if let Some((delta, noted)) = delta {
            self.put_pending(&write, delta)?;
            self.note(&write, noted)?;
        }
        write.commit().map_err(failed(&self.path))
    }

    /// Merges `acknowledged` deltas into the tables, durable with the next
    /// transaction that is.
    pub fn merge_all(&self, acknowledged: &[&Delta]) -> Result<(), IndexError> {
        let write = self.begin(Durability::None)?;
        for delta in acknowledged {
            self.merge(&write, delta)?;
        }
        write.commit().map_err(failed(&self.path))
    }

    fn put_pending(&self, write: &WriteTransaction, delta: &Delta) -> Result<(), IndexError> {
        let mut table = write.open_table(PENDING).map_err(failed(&self.path))?;
        let parts = delta
            .objects
            .len()
            .max(delta.entries.len())
            .max(delta.orphans.len())
            .max(delta.dead_lists.len())
            .div_ceil(PART_ITEMS)
            .max(1);
        for part in 0..parts {
            let piece = DeltaPart {
                objects: slice(&delta.objects, part),
                entries: slice(&delta.entries, part),
                orphans: slice(&delta.orphans, part),
                dead_lists: slice(&delta.dead_lists, part),
                mark: delta.mark,
            };
            let key = pending_key(delta.mark.batch, part as u32);
            let value = self.encode("pending", &piece)?;
            table.insert(&key[..], value.as_slice()).map_err(failed(&self.path))?;
        }
        Ok(())
    }

    /// Deltas that are durable but were not acknowledged, oldest first.
    pub fn pending(&self) -> Result<Vec<Delta>, IndexError> {
        let read = self.db.begin_read().map_err(failed(&self.path))?;
        let table = read.open_table(PENDING).map_err(failed(&self.path))?;
        let mut deltas: Vec<Delta> = Vec::new();
        for row in table.iter().map_err(failed(&self.path))? {
            let (_, value) = row.map_err(failed(&self.path))?;
            let piece: Delta = self.decode("pending", value.value())?;
            match deltas.last_mut() {
                Some(last) if last.mark.batch == piece.mark.batch => {
                    last.objects.extend(piece.objects);
                    last.entries.extend(piece.entries);
                    last.orphans.extend(piece.orphans);
                    last.dead_lists.extend(piece.dead_lists);
                }
                _ => deltas.push(piece),
            }
        }
        Ok(deltas)
    }

    /// Settles what was pending when the last session ended: deltas up to
    /// `committed` took effect, later ones did not.
    pub fn settle(&self, committed: BatchId) -> Result<(), IndexError> {
        let pending = self.pending()?;
        // Durable: batches are numbered on from here, and the journal is trimmed.
        let write = self.begin(Durability::Immediate)?;
        for delta in pending.iter().filter(|delta| delta.mark.batch <= committed) {
            self.merge(&write, delta)?;
        }
        for delta in pending.iter().filter(|delta| delta.mark.batch > committed) {
            let lists = self.unused(&write, delta)?;
            self.remove_lists(&write, &lists)?;
        }
        self.drop_pending(&write, BatchId(u64::MAX))?;
        write.commit().map_err(failed(&self.path))
    }

    /// The chunk lists that a delta which did not take effect brought. (What was
    /// appended to a file changes its version, and not its list.)
    fn unused(&self, write: &WriteTransaction, lost: &Delta) -> Result<Vec<u64>, IndexError> {
        let objects = write.open_table(OBJECTS).map_err(failed(&self.path))?;
        let mut lists: BTreeSet<u64> = lost.lists().into_iter().collect();
        for (object, _) in &lost.objects {
            let Some(row) =
                objects.get(self.order.key(object).as_bytes()).map_err(failed(&self.path))?
            else {
                continue;
            };
            if let Content::Chunks { list, .. } =
                self.decode::<Known>("objects", row.value())?.content
            {
                lists.remove(&list);
            }
        }
        Ok(lists.into_iter().collect())
    }

    pub(super) fn drop_pending(
        &self,
        write: &WriteTransaction,
        through: BatchId,
    ) -> Result<(), IndexError> {
        let mut table = write.open_table(PENDING).map_err(failed(&self.path))?;
        let end = pending_key(through, u32::MAX);
        table.retain_in(..=&end[..], |_, _| false).map_err(failed(&self.path))
    }

    pub(super) fn remove_lists(
        &self,
        write: &WriteTransaction,
        lists: &[u64],
    ) -> Result<(), IndexError> {
        let mut chunks = write.open_table(CHUNKS).map_err(failed(&self.path))?;
        for list in lists {
            let (from, to) = (chunk_key(*list, 0), chunk_key(*list, u32::MAX));
            chunks.retain_in(&from[..]..=&to[..], |_, _| false).map_err(failed(&self.path))?;
        }
        Ok(())
    }

    /// Writes a chunk list; durable with the next [`Store::prepare`].
    pub fn put_chunks(&self, list: u64, chunks: &[Chunk]) -> Result<(), IndexError> {
        let write = self.begin(Durability::None)?;
        {
            let mut table = write.open_table(CHUNKS).map_err(failed(&self.path))?;
            for (segment, part) in chunks.chunks(SEGMENT_CHUNKS).enumerate() {
                let key = chunk_key(list, segment as u32);
                let value = self.encode("chunks", part)?;
                table.insert(&key[..], value.as_slice()).map_err(failed(&self.path))?;
            }
        }
        write.commit().map_err(failed(&self.path))
    }

    /// Reads a chunk list.
    pub fn chunks(&self, list: u64) -> Result<Vec<Chunk>, IndexError> {
        let read = self.db.begin_read().map_err(failed(&self.path))?;
        let table = read.open_table(CHUNKS).map_err(failed(&self.path))?;
        let (from, to) = (chunk_key(list, 0), chunk_key(list, u32::MAX));
        let mut chunks = Vec::new();
        for row in table.range(&from[..]..=&to[..]).map_err(failed(&self.path))? {
            let (_, value) = row.map_err(failed(&self.path))?;
            chunks.extend(self.decode::<Vec<Chunk>>("chunks", value.value())?);
        }
        Ok(chunks)
    }

    /// Opens the tables for reading as they stand now.
    pub fn snapshot(&self) -> Result<Snapshot, IndexError> {
        let read = self.db.begin_read().map_err(failed(&self.path))?;
        let open = |table| read.open_table(table).map_err(failed(&self.path));
        Ok(Snapshot {
            objects: open(OBJECTS)?,
            entries: open(ENTRIES)?,
            links: open(LINKS)?,
            orphans: open(ORPHANS)?,
            order: self.order,
            path: self.path.clone(),
        })
    }

    /// Bytes on disk.
    pub fn size(&self) -> u64 {
        std::fs::metadata(&self.path).map_or(0, |data| data.len())
    }

    pub(super) fn begin(&self, durability: Durability) -> Result<WriteTransaction, IndexError> {
        store::begin(&self.db, &self.path, durability).map_err(failed(&self.path))
    }

    pub(super) fn meta<T: DeserializeOwned>(&self, key: &str) -> Result<Option<T>, IndexError> {
        let read = self.db.begin_read().map_err(failed(&self.path))?;
        let table = read.open_table(META).map_err(failed(&self.path))?;
        let value = table.get(key).map_err(failed(&self.path))?;
        value.map(|value| self.decode("meta", value.value())).transpose()
    }

    pub(super) fn put_meta<T: Serialize>(
        &self,
        write: &WriteTransaction,
        key: &str,
        value: &T,
    ) -> Result<(), IndexError> {
        let value = self.encode("meta", value)?;
        let mut table = write.open_table(META).map_err(failed(&self.path))?;
        table.insert(key, value.as_slice()).map_err(failed(&self.path))?;
        Ok(())
    }

    pub(super) fn encode<T: Serialize + ?Sized>(
        &self,
        table: &'static str,
        value: &T,
    ) -> Result<Vec<u8>, IndexError> {
        codec::encode_record(value).map_err(|source| IndexError::Row {
            path: self.path.clone(),
            table,
            source,
        })
    }

    pub(super) fn decode<T: DeserializeOwned>(
        &self,
        table: &'static str,
        value: &[u8],
    ) -> Result<T, IndexError> {
        codec::decode_record(value).map_err(|source| IndexError::Row {
            path: self.path.clone(),
            table,
            source,
        })
    }
}

impl Base for Store {
    type Error = IndexError;
    type Snapshot = Snapshot;

    fn snapshot(&self) -> Result<Snapshot, IndexError> {
        Self::snapshot(self)
    }

    fn prepare(
        &self,
        delta: Option<(&Delta, &Noted)>,
        acknowledged: &[&Delta],
    ) -> Result<(), IndexError> {
        Self::prepare(self, delta, acknowledged)
    }

    fn merge_all(&self, acknowledged: &[&Delta]) -> Result<(), IndexError> {
        Self::merge_all(self, acknowledged)
    }

    fn settle(&self, committed: BatchId) -> Result<(), IndexError> {
        Self::settle(self, committed)
    }
}

/// A part of a [`Delta`], written as if it were one.
#[derive(Serialize)]
struct DeltaPart<'a> {
    objects: &'a [(ObjectId, Option<Known>)],
    entries: &'a [EntryChange],
    orphans: &'a [(ObjectId, Option<Orphan>)],
    dead_lists: &'a [u64],
    mark: Mark,
}

fn slice<T>(items: &[T], part: usize) -> &[T] {
    let start = items.len().min(part * PART_ITEMS);
    &items[start..items.len().min(start + PART_ITEMS)]
}

fn pending_key(batch: BatchId, part: u32) -> [u8; 12] {
    let mut key = [0; 12];
    key[..8].copy_from_slice(&batch.0.to_be_bytes());
    key[8..].copy_from_slice(&part.to_be_bytes());
    key
}

fn chunk_key(list: u64, segment: u32) -> [u8; 12] {
    pending_key(BatchId(list), segment)
}

pub(super) fn failed<E: Into<redb::Error>>(path: &Path) -> impl Fn(E) -> IndexError + use<E> {
    let path = path.to_owned();
    move |error| IndexError::Store { path: path.clone(), source: Box::new(error.into()) }
}

/// Chunk lists that an object's old content held and its new one does not.
pub fn dead_list(old: Option<&Known>, new: Option<&Known>) -> Option<u64> {
    let list = |known: Option<&Known>| match known?.content {
        Content::Chunks { list, .. } => Some(list),
        _ => None,
    };
    let old = list(old)?;
    (list(new) != Some(old)).then_some(old)
}
