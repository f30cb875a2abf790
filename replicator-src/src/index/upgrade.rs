//! What older versions of the store held, and what it becomes.
//!
//! Version 1: marks, in `meta` and at the end of each part of a pending delta,
//! had no nonce.

use redb::ReadableTable;
use replicator_common::id::{BatchId, BatchNonce, ObjectId, Seq};
use replicator_common::time::Timestamp;
use serde::{Deserialize, Serialize};

use super::known::{Delta, EntryChange, Known, Mark, Orphan};
use super::store::{IndexError, Store, failed};

/// [`Mark`] in version 1.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
struct MarkV1 {
    batch: BatchId,
    seq: Seq,
    watermark: Option<Timestamp>,
    consistent: Option<Timestamp>,
    bytes_changed: u64,
    bytes_shipped: u64,
    objects_shipped: u64,
    exact_batches: u64,
}

impl From<MarkV1> for Mark {
    fn from(old: MarkV1) -> Self {
        Self {
            batch: old.batch,
            nonce: BatchNonce::default(),
            seq: old.seq,
            watermark: old.watermark,
            consistent: old.consistent,
            bytes_changed: old.bytes_changed,
            bytes_shipped: old.bytes_shipped,
            objects_shipped: old.objects_shipped,
            exact_batches: old.exact_batches,
        }
    }
}

/// [`Delta`], or a part of one, in version 1.
#[derive(Debug, Serialize, Deserialize)]
struct DeltaV1 {
    objects: Vec<(ObjectId, Option<Known>)>,
    entries: Vec<EntryChange>,
    orphans: Vec<(ObjectId, Option<Orphan>)>,
    dead_lists: Vec<u64>,
    mark: MarkV1,
}

impl From<DeltaV1> for Delta {
    fn from(old: DeltaV1) -> Self {
        Self {
            objects: old.objects,
            entries: old.entries,
            orphans: old.orphans,
            dead_lists: old.dead_lists,
            mark: old.mark.into(),
        }
    }
}

type Meta<'a> = redb::Table<'a, &'static str, &'static [u8]>;
type Pending<'a> = redb::Table<'a, &'static [u8], &'static [u8]>;

impl Store {
    /// The mark of version 1.
    pub(super) fn upgrade_mark(&self, meta: &mut Meta<'_>) -> Result<(), IndexError> {
        let row = meta.get("mark").map_err(failed(&self.path))?;
        let old = row.map(|row| self.decode::<MarkV1>("meta", row.value())).transpose()?;
        let Some(old) = old else { return Ok(()) };
        let value = self.encode("meta", &Mark::from(old))?;
        meta.insert("mark", value.as_slice()).map_err(failed(&self.path))?;
        Ok(())
    }

    /// The pending deltas of version 1: as many as can be under way.
    pub(super) fn upgrade_pending(&self, pending: &mut Pending<'_>) -> Result<(), IndexError> {
        let mut rows = Vec::new();
        for row in pending.iter().map_err(failed(&self.path))? {
            let (key, value) = row.map_err(failed(&self.path))?;
            let old: DeltaV1 = self.decode("pending", value.value())?;
            rows.push((key.value().to_vec(), self.encode("pending", &Delta::from(old))?));
        }
        for (key, value) in rows {
            pending.insert(&key[..], value.as_slice()).map_err(failed(&self.path))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::index::Noted;
    use crate::index::store::{META, PENDING, VERSION};
    use replicator_common::codec::encode_record;
    use replicator_common::name::Name;

    fn mark(batch: u64) -> MarkV1 {
        let watermark = Some(Timestamp(5));
        let (seq, batch) = (Seq(9), BatchId(batch));
        let none = 0;
        MarkV1 {
            batch,
            seq,
            watermark,
            consistent: None,
            bytes_changed: 3,
            bytes_shipped: 4,
            objects_shipped: none,
            exact_batches: none,
        }
    }

    #[test]
    fn an_index_of_version_1_is_upgraded_and_a_newer_one_refused() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("index.redb");
        let id = |n: u8| ObjectId::new(1, &[n]).unwrap();
        let name = Name::new(b"a").unwrap();
        let change = EntryChange { directory: id(1), name, old: None, new: Some(id(2)) };
        let old = DeltaV1 {
            objects: Vec::new(),
            entries: vec![change],
            orphans: Vec::new(),
            dead_lists: vec![7],
            mark: mark(3),
        };
        let store = Store::open(&path).unwrap();
        let delta = Delta { mark: Mark::from(mark(3)), ..Delta::default() };
        store.prepare(Some((&delta, &Noted::default())), &[]).unwrap();
        let set_version = |store: &Store, version: u32| {
            let write = store.begin(redb::Durability::Immediate).unwrap();
            {
                let mut meta = write.open_table(META).unwrap();
                meta.insert("version", &version.to_le_bytes()[..]).unwrap();
                meta.insert("mark", encode_record(&mark(2)).unwrap().as_slice()).unwrap();
                let mut pending = write.open_table(PENDING).unwrap();
                let key = pending.first().unwrap().unwrap().0.value().to_vec();
                pending.insert(&key[..], encode_record(&old).unwrap().as_slice()).unwrap();
            }
            write.commit().unwrap();
        };
        set_version(&store, 1);
        drop(store);
        for _ in 0..2 {
            let store = Store::open(&path).unwrap();
            assert_eq!(store.mark().unwrap(), mark(2).into());
            let pending = store.pending().unwrap();
            assert_eq!(pending.len(), 1);
            assert_eq!(pending[0].mark, mark(3).into());
            assert_eq!((&pending[0].entries, &pending[0].dead_lists), (&old.entries, &vec![7]));
        }
        let store = Store::open(&path).unwrap();
        set_version(&store, VERSION + 1);
        drop(store);
        assert!(matches!(Store::open(&path), Err(IndexError::Newer { .. })));
    }
}
