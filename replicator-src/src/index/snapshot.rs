//! Reads the tables as they stand at one moment.

use std::ops::Bound::{Excluded, Included, Unbounded};
use std::path::PathBuf;

use redb::{ReadableTable, ReadableTableMetadata};
use replicator_common::codec::{self, CodecError};
use replicator_common::id::{KeyOrder, ObjectId};
use replicator_common::name::Name;
use serde::de::DeserializeOwned;

use super::known::{Known, Orphan};
use super::store::{Bytes, IndexError, failed, pair_key, split_key};
use super::view::{Page, View};

/// Entries that are read at once.
const PAGE: usize = 8192;
/// Rows that are read past, in the order of keys, rather than looking for the
/// next that is wanted from the root of the tree. (Reading past one takes a
/// tenth of that.)
const PAST: usize = 16;

/// The tables at one moment, for reading.
pub struct Snapshot {
    pub(super) objects: redb::ReadOnlyTable<Bytes, Bytes>,
    pub(super) entries: redb::ReadOnlyTable<Bytes, Bytes>,
    pub(super) links: redb::ReadOnlyTable<Bytes, Bytes>,
    pub(super) orphans: redb::ReadOnlyTable<Bytes, Bytes>,
    pub(super) order: KeyOrder,
    pub(super) path: PathBuf,
}

impl Snapshot {
    fn row<T: DeserializeOwned>(&self, table: &'static str, value: &[u8]) -> Result<T, IndexError> {
        codec::decode_record(value).map_err(|source| IndexError::Row {
            path: self.path.clone(),
            table,
            source,
        })
    }

    fn damaged(&self, table: &'static str) -> IndexError {
        IndexError::Row { path: self.path.clone(), table, source: CodecError::Damaged("key") }
    }

    /// See [`super::View::object`].
    pub fn object(&self, object: &ObjectId) -> Result<Option<Known>, IndexError> {
        let value =
            self.objects.get(self.order.key(object).as_bytes()).map_err(failed(&self.path))?;
        value.map(|value| self.row("objects", value.value())).transpose()
    }

    /// See [`super::View::entry`].
    pub fn entry(&self, directory: &ObjectId, name: &Name) -> Result<Option<ObjectId>, IndexError> {
        let key = pair_key(self.order, directory, name.as_bytes());
        let value = self.entries.get(key.as_slice()).map_err(failed(&self.path))?;
        value
            .map(|value| ObjectId::from_bytes(value.value()).ok_or_else(|| self.damaged("entries")))
            .transpose()
    }

    /// See [`super::View::children`].
    pub fn children(&self, directory: &ObjectId) -> Result<Vec<(Name, ObjectId)>, IndexError> {
        let mut found = Vec::new();
        let prefix = pair_key(self.order, directory, &[]);
        for row in self.entries.range(prefix.as_slice()..).map_err(failed(&self.path))? {
            let (key, value) = row.map_err(failed(&self.path))?;
            let Some(name) = key.value().strip_prefix(prefix.as_slice()) else { break };
            let name = Name::new(name).map_err(|_| self.damaged("entries"))?;
            let object =
                ObjectId::from_bytes(value.value()).ok_or_else(|| self.damaged("entries"))?;
            found.push((name, object));
        }
        Ok(found)
    }

    /// See [`super::View::page`].
    pub fn page(&self, directory: &ObjectId, after: Option<&Name>) -> Result<Page, IndexError> {
        let mut page = Page::default();
        let prefix = pair_key(self.order, directory, &[]);
        let from = after.map(|name| pair_key(self.order, directory, name.as_bytes()));
        let from = from.as_ref().map_or(Included(&prefix[..]), |from| Excluded(&from[..]));
        for row in self.entries.range::<&[u8]>((from, Unbounded)).map_err(failed(&self.path))? {
            let (key, value) = row.map_err(failed(&self.path))?;
            let Some(name) = key.value().strip_prefix(prefix.as_slice()) else { break };
            if page.entries.len() == PAGE {
                page.through = page.entries.last().map(|(name, _)| name.clone());
                break;
            }
            let name = Name::new(name).map_err(|_| self.damaged("entries"))?;
            let object =
                ObjectId::from_bytes(value.value()).ok_or_else(|| self.damaged("entries"))?;
            page.entries.push((name, object));
        }
        Ok(page)
    }

    /// See [`super::View::see_objects`].
    pub fn see_objects(
        &self,
        wanted: &[&ObjectId],
        each: &mut dyn FnMut(usize, Option<&Known>),
    ) -> Result<(), IndexError> {
        let mut cursor = Cursor { snapshot: self, rows: None, at: None };
        for (at, object) in wanted.iter().enumerate() {
            each(at, cursor.object(object)?.as_ref());
        }
        Ok(())
    }

    /// See [`super::View::links`].
    pub fn links(&self, object: &ObjectId) -> Result<Vec<(ObjectId, Name)>, IndexError> {
        // See `index::merge`: where rows do not count.
        let Some(known) = self.object(object)? else { return Ok(Vec::new()) };
        if let Some(place) = known.only_entry() {
            return Ok(vec![place.clone()]);
        }
        let mut found = Vec::new();
        let prefix = pair_key(self.order, object, &[]);
        for row in self.links.range(prefix.as_slice()..).map_err(failed(&self.path))? {
            let (key, _) = row.map_err(failed(&self.path))?;
            let Some(rest) = key.value().strip_prefix(prefix.as_slice()) else { break };
            let (directory, name) =
                split_key(self.order, rest).ok_or_else(|| self.damaged("links"))?;
            found.push((directory, Name::new(name).map_err(|_| self.damaged("links"))?));
        }
        Ok(found)
    }

    /// See [`super::View::orphans`].
    pub fn orphans(&self) -> Result<Vec<(ObjectId, Orphan)>, IndexError> {
        let mut found = Vec::new();
        for row in self.orphans.iter().map_err(failed(&self.path))? {
            let (key, value) = row.map_err(failed(&self.path))?;
            let object = self.order.id(key.value()).ok_or_else(|| self.damaged("orphans"))?;
            found.push((object, self.row("orphans", value.value())?));
        }
        Ok(found)
    }

    /// How many objects there are.
    pub fn count(&self) -> Result<u64, IndexError> {
        self.objects.len().map_err(failed(&self.path))
    }

    /// The first objects after one, in the order of rows, `most` at most.
    pub fn objects_after(
        &self,
        after: Option<&ObjectId>,
        most: usize,
    ) -> Result<Vec<(ObjectId, Known)>, IndexError> {
        let after = after.map(|after| self.order.key(after));
        let from = after.as_ref().map_or(Unbounded, |after| Excluded(after.as_bytes()));
        let rows = self.objects.range::<&[u8]>((from, Unbounded)).map_err(failed(&self.path))?;
        let mut found = Vec::new();
        for row in rows.take(most) {
            let (key, value) = row.map_err(failed(&self.path))?;
            let object = self.order.id(key.value()).ok_or_else(|| self.damaged("objects"))?;
            found.push((object, self.row("objects", value.value())?));
        }
        Ok(found)
    }

    /// Calls `each` with every object; stops at the first error.
    pub fn each_object(&self, mut each: impl FnMut(ObjectId, Known)) -> Result<(), IndexError> {
        for row in self.objects.iter().map_err(failed(&self.path))? {
            let (key, value) = row.map_err(failed(&self.path))?;
            let object = self.order.id(key.value()).ok_or_else(|| self.damaged("objects"))?;
            each(object, self.row("objects", value.value())?);
        }
        Ok(())
    }
}

/// Goes through the objects' rows, mostly forth.
struct Cursor<'a> {
    snapshot: &'a Snapshot,
    rows: Option<redb::Range<'a, Bytes, Bytes>>,
    /// The last row that was read: none when there are no more.
    at: Option<Row<'a>>,
}

type Row<'a> = (redb::AccessGuard<'a, Bytes>, redb::AccessGuard<'a, Bytes>);

impl Cursor<'_> {
    fn object(&mut self, object: &ObjectId) -> Result<Option<Known>, IndexError> {
        let snapshot = self.snapshot;
        let value = self.seek(snapshot.order.key(object).as_bytes())?;
        value.map(|value| snapshot.row("objects", value)).transpose()
    }

    /// The value under `key`.
    fn seek(&mut self, key: &[u8]) -> Result<Option<&[u8]>, IndexError> {
        let failed = failed(&self.snapshot.path);
        let ahead = self.at.as_ref().is_none_or(|(at, _)| at.value() <= key);
        if let (Some(rows), true) = (&mut self.rows, ahead) {
            let mut past = 0;
            while past < PAST && self.at.as_ref().is_some_and(|(at, _)| at.value() < key) {
                self.at = rows.next().transpose().map_err(&failed)?;
                past += 1;
            }
        }
        let reached = self.at.as_ref().is_some_and(|(at, _)| at.value() >= key);
        if !(ahead && reached) {
            let mut rows = self.snapshot.objects.range(key..).map_err(&failed)?;
            self.at = rows.next().transpose().map_err(&failed)?;
            self.rows = Some(rows);
        }
        let at = self.at.as_ref().filter(|(at, _)| at.value() == key);
        Ok(at.map(|(_, value)| value.value()))
    }
}

impl View for Snapshot {
    type Error = IndexError;

    fn object(&self, object: &ObjectId) -> Result<Option<Known>, IndexError> {
        Self::object(self, object)
    }

    fn entry(&self, directory: &ObjectId, name: &Name) -> Result<Option<ObjectId>, IndexError> {
        Self::entry(self, directory, name)
    }

    fn children(&self, directory: &ObjectId) -> Result<Vec<(Name, ObjectId)>, IndexError> {
        Self::children(self, directory)
    }

    fn page(&self, directory: &ObjectId, after: Option<&Name>) -> Result<Page, IndexError> {
        Self::page(self, directory, after)
    }

    fn see_objects(
        &self,
        objects: &[&ObjectId],
        each: &mut dyn FnMut(usize, Option<&Known>),
    ) -> Result<(), IndexError> {
        Self::see_objects(self, objects, each)
    }

    fn links(&self, object: &ObjectId) -> Result<Vec<(ObjectId, Name)>, IndexError> {
        Self::links(self, object)
    }

    fn orphans(&self) -> Result<Vec<(ObjectId, Orphan)>, IndexError> {
        Self::orphans(self)
    }
}
