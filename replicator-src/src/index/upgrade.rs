//! What older versions of the store held, and what it becomes.
//!
//! Version 1: marks, in `meta` and at the end of each part of a pending delta,
//! had no nonce. Versions 1 and 2: of no orphan was it known to have left. Versions
//! 1 to 3: every entry had a row in `links`.

use redb::{ReadableTable, WriteTransaction};
use replicator_common::id::{BatchId, BatchNonce, ObjectId, Seq};
use replicator_common::time::Timestamp;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::known::{Delta, EntryChange, Known, Mark, Orphan};
use super::store::{IndexError, ORPHANS, PENDING, Store, failed};

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

/// [`Orphan`] in versions 1 and 2.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
struct OrphanV2 {
    since: Timestamp,
    floor: Timestamp,
}

impl From<OrphanV2> for Orphan {
    fn from(OrphanV2 { since, floor }: OrphanV2) -> Self {
        Self { since, floor, left: false }
    }
}

/// [`Delta`], or a part of one, in version 1 (with [`MarkV1`]) and 2 (with [`Mark`]).
#[derive(Debug, Serialize, Deserialize)]
struct DeltaV2<M> {
    objects: Vec<(ObjectId, Option<Known>)>,
    entries: Vec<EntryChange>,
    orphans: Vec<(ObjectId, Option<OrphanV2>)>,
    dead_lists: Vec<u64>,
    mark: M,
}

impl<M: Into<Mark>> From<DeltaV2<M>> for Delta {
    fn from(old: DeltaV2<M>) -> Self {
        let orphans = old.orphans.into_iter();
        Self {
            objects: old.objects,
            entries: old.entries,
            orphans: orphans.map(|(object, orphan)| (object, orphan.map(Orphan::from))).collect(),
            dead_lists: old.dead_lists,
            mark: old.mark.into(),
        }
    }
}

type Meta<'a> = redb::Table<'a, &'static str, &'static [u8]>;
type Rows<'a> = redb::Table<'a, &'static [u8], &'static [u8]>;

impl Store {
    /// Makes of version `found`, one before 4, version 4.
    pub(super) fn upgrade(
        &self,
        write: &WriteTransaction,
        meta: &mut Meta<'_>,
        found: u32,
    ) -> Result<(), IndexError> {
        if found < 3 {
            let mut pending = write.open_table(PENDING).map_err(failed(&self.path))?;
            if found < 2 {
                self.upgrade_mark(meta)?;
                self.upgrade_pending_v1(&mut pending)?;
            } else {
                self.upgrade_pending_v2(&mut pending)?;
            }
            let mut orphans = write.open_table(ORPHANS).map_err(failed(&self.path))?;
            self.upgrade_orphans(&mut orphans)?;
        }
        Ok(())
    }

    /// The mark of version 1.
    fn upgrade_mark(&self, meta: &mut Meta<'_>) -> Result<(), IndexError> {
        let row = meta.get("mark").map_err(failed(&self.path))?;
        let old = row.map(|row| self.decode::<MarkV1>("meta", row.value())).transpose()?;
        let Some(old) = old else { return Ok(()) };
        let value = self.encode("meta", &Mark::from(old))?;
        meta.insert("mark", value.as_slice()).map_err(failed(&self.path))?;
        Ok(())
    }

    /// The pending deltas of version 1: as many as can be under way.
    fn upgrade_pending_v1(&self, pending: &mut Rows<'_>) -> Result<(), IndexError> {
        self.upgrade_rows::<DeltaV2<MarkV1>, Delta>("pending", pending)
    }

    /// The pending deltas of version 2.
    fn upgrade_pending_v2(&self, pending: &mut Rows<'_>) -> Result<(), IndexError> {
        self.upgrade_rows::<DeltaV2<Mark>, Delta>("pending", pending)
    }

    /// The orphans of versions 1 and 2: what is being moved at the moment.
    fn upgrade_orphans(&self, orphans: &mut Rows<'_>) -> Result<(), IndexError> {
        self.upgrade_rows::<OrphanV2, Orphan>("orphans", orphans)
    }

    fn upgrade_rows<Old, New>(
        &self,
        name: &'static str,
        table: &mut Rows<'_>,
    ) -> Result<(), IndexError>
    where
        Old: DeserializeOwned + Into<New>,
        New: Serialize,
    {
        let mut rows = Vec::new();
        for row in table.iter().map_err(failed(&self.path))? {
            let (key, value) = row.map_err(failed(&self.path))?;
            let old: Old = self.decode(name, value.value())?;
            rows.push((key.value().to_vec(), self.encode(name, &old.into())?));
        }
        for (key, value) in rows {
            table.insert(&key[..], value.as_slice()).map_err(failed(&self.path))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::index::{Index, Noted, View};
    use std::path::Path;
    use std::sync::Arc;

    use crate::index::known::Content;
    use crate::index::store::{ENTRIES, LINKS, META, OBJECTS, VERSION, YOUNG, pair_key};
    use redb::{ReadableDatabase, ReadableTableMetadata};
    use replicator_common::codec::encode_record;
    use replicator_common::id::KeyOrder;
    use replicator_common::name::Name;
    use replicator_common::object::{Attributes, Kind, ObjectState};

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

    fn id(n: u8) -> ObjectId {
        ObjectId::new(1, &[n]).unwrap()
    }

    fn old_delta<M>(mark: M) -> DeltaV2<M> {
        let name = Name::new(b"a").unwrap();
        let change = EntryChange { directory: id(1), name, old: None, new: Some(id(2)) };
        DeltaV2 {
            objects: Vec::new(),
            entries: vec![change],
            orphans: vec![(id(3), Some(orphan())), (id(4), None)],
            dead_lists: vec![7],
            mark,
        }
    }

    fn link(object: &ObjectId, directory: &ObjectId, name: &Name) -> Vec<u8> {
        let entry = pair_key(KeyOrder::Bytes, directory, name.as_bytes());
        pair_key(KeyOrder::Bytes, object, &entry)
    }

    fn orphan() -> OrphanV2 {
        OrphanV2 { since: Timestamp(1), floor: Timestamp(2) }
    }

    /// Makes an index as an older version would have left it.
    fn make_old<M: Serialize, D: Serialize>(path: &Path, version: u32, kept: &M, delta: &D) {
        let store = Store::open(path).unwrap();
        let new = Delta { mark: Mark::from(mark(3)), ..Delta::default() };
        store.prepare(Some((&new, &Noted::default())), &[]).unwrap();
        let write = store.begin(redb::Durability::Immediate).unwrap();
        {
            let mut meta = write.open_table(META).unwrap();
            meta.insert("version", &version.to_le_bytes()[..]).unwrap();
            meta.insert("mark", encode_record(kept).unwrap().as_slice()).unwrap();
            let mut pending = write.open_table(PENDING).unwrap();
            let key = pending.first().unwrap().unwrap().0.value().to_vec();
            pending.insert(&key[..], encode_record(delta).unwrap().as_slice()).unwrap();
            let mut orphans = write.open_table(ORPHANS).unwrap();
            let row = encode_record(&orphan()).unwrap();
            orphans.insert(id(9).as_bytes(), row.as_slice()).unwrap();
        }
        write.commit().unwrap();
    }

    #[test]
    fn an_index_of_an_older_version_is_upgraded_and_a_newer_one_refused() {
        for version in [1, 2] {
            let directory = tempfile::tempdir().unwrap();
            let path = directory.path().join("index.redb");
            match version {
                1 => make_old(&path, 1, &mark(2), &old_delta(mark(3))),
                _ => make_old(&path, 2, &Mark::from(mark(2)), &old_delta(Mark::from(mark(3)))),
            }
            for _ in 0..2 {
                let store = Store::open(&path).unwrap();
                assert_eq!(store.mark().unwrap(), mark(2).into());
                let pending = store.pending().unwrap();
                assert_eq!(pending, [Delta::from(old_delta(mark(3)))]);
                let orphans = store.snapshot().unwrap().orphans().unwrap();
                assert_eq!(orphans, [(id(9), orphan().into())]);
            }
            let newer = VERSION + 1;
            make_old(&path, newer, &Mark::default(), &Delta::default());
            assert!(
                matches!(Store::open(&path), Err(IndexError::Newer { found, .. }) if found == newer)
            );
        }
    }
    /// Version 3 had a row in `links` for each entry. One of an object with one name
    /// stays when that name goes, and is not taken for a name later.
    #[test]
    fn names_of_version_3_that_the_objects_tell_themselves_do_not_count() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("index.redb");
        let place = |n: u8| (id(1), Name::new(&[b'a' + n]).unwrap());
        let (alone, twice) = (known(1, place(0)), known(2, place(1)));
        {
            let store = Store::open(&path).unwrap();
            let write = store.begin(redb::Durability::Immediate).unwrap();
            {
                let mut meta = write.open_table(META).unwrap();
                meta.insert("version", &3_u32.to_le_bytes()[..]).unwrap();
                let mut objects = write.open_table(OBJECTS).unwrap();
                let mut links = write.open_table(LINKS).unwrap();
                for (object, known, places) in
                    [(id(2), &alone, vec![place(0)]), (id(3), &twice, vec![place(1), place(2)])]
                {
                    let row = encode_record(known).unwrap();
                    objects.insert(object.as_bytes(), row.as_slice()).unwrap();
                    for (directory, name) in places {
                        let key = link(&object, &directory, &name);
                        links.insert(&key[..], &[][..]).unwrap();
                    }
                }
            }
            write.commit().unwrap();
        }
        let store = Arc::new(Store::open(&path).unwrap());
        let mut index = Index::new(store).unwrap();
        let links = |index: &Index, object| index.store().snapshot().unwrap().links(&object);
        assert_eq!(links(&index, id(2)).unwrap(), [place(0)]);
        assert_eq!(links(&index, id(3)).unwrap(), [place(1), place(2)]);
        // The first is renamed; it gets a second name; it goes, and comes back with two.
        let mut after = |batch: u64, moves: &[(u8, bool)], known: Option<Known>| {
            let entries = moves.iter().map(|(n, gained)| {
                let ((directory, name), object) = (place(*n), Some(id(2)));
                let (old, new) = if *gained { (None, object) } else { (object, None) };
                EntryChange { directory, name, old, new }
            });
            let (entries, objects) = (entries.collect(), vec![(id(2), known)]);
            let mark = Mark { batch: BatchId(batch), ..Mark::default() };
            index
                .prepare(Delta { objects, entries, mark, ..Delta::default() }, &Noted::default())
                .unwrap();
            index.acknowledge(BatchId(batch));
            index.merge().unwrap();
            links(&index, id(2)).unwrap()
        };
        assert_eq!(after(10, &[(0, false), (4, true)], Some(known(1, place(4)))), [place(4)]);
        assert_eq!(after(11, &[(5, true)], Some(known(2, place(4)))), [place(4), place(5)]);
        assert_eq!(after(12, &[(4, false)], Some(known(1, place(5)))), [place(5)]);
        assert_eq!(after(13, &[(5, false)], None), []);
        let two = [place(0), place(4)];
        assert_eq!(after(14, &[(0, true), (4, true)], Some(known(2, place(0)))), two);
    }

    /// An object of version 3 that goes leaves its row, and may come back with others.
    #[test]
    fn names_of_version_3_do_not_come_back() {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::open(&directory.path().join("index.redb")).unwrap();
        let place = |n: u8| (id(1), Name::new(&[b'a' + n]).unwrap());
        let write = store.begin(redb::Durability::Immediate).unwrap();
        {
            let mut links = write.open_table(LINKS).unwrap();
            let (directory, name) = place(0);
            let key = link(&id(2), &directory, &name);
            links.insert(&key[..], &[][..]).unwrap();
        }
        write.commit().unwrap();
        assert_eq!(store.snapshot().unwrap().links(&id(2)).unwrap(), [], "it is not there");
        let gained = |n| {
            let ((directory, name), new) = (place(n), Some(id(2)));
            EntryChange { directory, name, old: None, new }
        };
        let delta = Delta {
            objects: vec![(id(2), Some(known(2, place(1))))],
            entries: vec![gained(1), gained(2)],
            ..Delta::default()
        };
        store.merge_all(&[&delta]).unwrap();
        assert_eq!(store.snapshot().unwrap().links(&id(2)).unwrap(), [place(1), place(2)]);
    }

    /// Up to version 4 keys held the bytes of ids, whose order is not that of inodes. Such an
    /// index is used as it is.
    #[test]
    fn rows_of_version_4_stay_in_their_order() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("index.redb");
        // Handles as ext4's: inode and generation.
        let id = |inode: u32| {
            let body = [inode.to_le_bytes(), 9_u32.to_le_bytes()].concat();
            ObjectId::new(1, &body).unwrap()
        };
        let name = |n: u8| Name::new(&[b'a' + n]).unwrap();
        let old_pair = |id: &ObjectId, rest: &[u8]| {
            [&[id.as_bytes().len() as u8], id.as_bytes(), rest].concat()
        };
        let (above, file, left) = (id(0x0102), id(0x0201), id(3));
        let places = [(above.clone(), name(0)), (left.clone(), name(1))];
        let twice = known(2, places[0].clone());
        {
            let store = Store::open(&path).unwrap();
            let write = store.begin(redb::Durability::Immediate).unwrap();
            {
                let mut meta = write.open_table(META).unwrap();
                meta.insert("version", &4_u32.to_le_bytes()[..]).unwrap();
                let mut objects = write.open_table(OBJECTS).unwrap();
                let row = encode_record(&twice).unwrap();
                objects.insert(file.as_bytes(), row.as_slice()).unwrap();
                let mut entries = write.open_table(ENTRIES).unwrap();
                let mut links = write.open_table(LINKS).unwrap();
                for (directory, name) in &places {
                    let key = old_pair(directory, name.as_bytes());
                    entries.insert(&key[..], file.as_bytes()).unwrap();
                    links.insert(&old_pair(&file, &key)[..], &[][..]).unwrap();
                }
                let mut orphans = write.open_table(ORPHANS).unwrap();
                let row = encode_record(&Orphan::from(orphan())).unwrap();
                orphans.insert(left.as_bytes(), row.as_slice()).unwrap();
                let mut young = write.open_table(YOUNG).unwrap();
                young.insert(file.as_bytes(), &8_i64.to_le_bytes()[..]).unwrap();
            }
            write.commit().unwrap();
        }
        for _ in 0..2 {
            let store = Store::open(&path).unwrap();
            assert_eq!(store.remembered().unwrap().young, [(file.clone(), Timestamp(8))]);
            let rows = store.snapshot().unwrap();
            assert_eq!(rows.object(&file).unwrap(), Some(twice.clone()));
            assert_eq!(rows.orphans().unwrap(), [(left.clone(), orphan().into())]);
            for (directory, name) in &places {
                assert_eq!(rows.entry(directory, name).unwrap(), Some(file.clone()));
                assert_eq!(rows.children(directory).unwrap(), [(name.clone(), file.clone())]);
            }
            let mut links = rows.links(&file).unwrap();
            links.sort();
            let mut expected = places.to_vec();
            expected.sort();
            assert_eq!(links, expected);
            let all = rows.objects(&[left.clone(), file.clone(), above.clone()]).unwrap();
            assert_eq!(all, [None, Some(twice.clone()), None]);
            assert_eq!(rows.objects_after(None, 9).unwrap(), [(file.clone(), twice.clone())]);
            assert_eq!(rows.objects_after(Some(&file), 9).unwrap(), []);
        }
        let store = Store::open(&path).unwrap();
        let gone = |(directory, name): (ObjectId, Name)| {
            let (old, new) = (Some(file.clone()), None);
            EntryChange { directory, name, old, new }
        };
        let delta = Delta {
            objects: vec![(file.clone(), None)],
            entries: places.map(gone).into(),
            orphans: vec![(left, None)],
            ..Delta::default()
        };
        store.merge_all(&[&delta]).unwrap();
        let read = store.db.begin_read().unwrap();
        for table in [OBJECTS, ENTRIES, LINKS, ORPHANS] {
            assert!(read.open_table(table).unwrap().is_empty().unwrap(), "{table}");
        }
        let meta = read.open_table(META).unwrap();
        assert_eq!(meta.get("version").unwrap().unwrap().value(), 4_u32.to_le_bytes());
    }

    fn known(links: u32, entry: (ObjectId, Name)) -> Known {
        let attributes =
            Attributes { mode: 0o600, uid: 0, gid: 0, mtime: Timestamp(0), xattrs: Vec::new() };
        Known {
            state: ObjectState { kind: Kind::File, attributes, size: 0, rdev: 0 },
            ctime: Timestamp(0),
            read_at: Timestamp(0),
            version: BatchId(1),
            content: Content::None,
            entry: Some(entry),
            links,
            nlink: links,
        }
    }
}
