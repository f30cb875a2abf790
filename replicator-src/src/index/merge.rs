//! A delta becomes part of the tables, each in the order of ids, so that neighbours are
//! on one page. (In an index of [`KeyOrder::Bytes`] they are not; it is as right, and slower.)
//!
//! [`KeyOrder::Bytes`]: replicator_common::id::KeyOrder::Bytes
//!
//! INVARIANT (names of an object): `links` has a row for each entry of an object, and
//! no other, unless the object's own row says which is its only one
//! ([`Known::only_entry`]) or there is none; then rows of it do not count. They are not
//! written: most objects have one name, and each row that need not be is one less to
//! write, and to take away again. (But an index of version 3 has them still.)

#[cfg(test)]
mod tests;

use redb::WriteTransaction;
use replicator_common::id::ObjectId;

use super::known::{Delta, EntryChange, Known};
use super::store::{Bytes, ENTRIES, IndexError, LINKS, OBJECTS, ORPHANS, Store, failed, pair_key};

type Table<'a> = redb::Table<'a, Bytes, Bytes>;

/// An entry that an object gained, or lost.
struct Moved<'a> {
    object: &'a ObjectId,
    /// Of the entry, as in `entries`.
    key: Vec<u8>,
    gained: bool,
}

impl Store {
    /// Makes a delta part of the tables.
    pub(super) fn merge(&self, write: &WriteTransaction, delta: &Delta) -> Result<(), IndexError> {
        let moved = self.merge_entries(write, &delta.entries)?;
        self.merge_objects(write, delta, &moved)?;
        self.merge_orphans(write, delta)?;
        self.remove_lists(write, &delta.dead_lists)?;
        self.put_meta(write, "mark", &delta.mark)?;
        self.drop_pending(write, delta.mark.batch)
    }

    /// Gives what objects gained and lost by it, in the order of objects.
    fn merge_entries<'a>(
        &self,
        write: &WriteTransaction,
        changes: &'a [EntryChange],
    ) -> Result<Vec<Moved<'a>>, IndexError> {
        let mut entries = write.open_table(ENTRIES).map_err(failed(&self.path))?;
        let mut moved = Vec::with_capacity(changes.len());
        for EntryChange { directory, name, old, new } in changes {
            let key = pair_key(self.order, directory, name.as_bytes());
            match new {
                None => drop(entries.remove(key.as_slice()).map_err(failed(&self.path))?),
                Some(object) => {
                    entries
                        .insert(key.as_slice(), object.as_bytes())
                        .map_err(failed(&self.path))?;
                }
            }
            if let Some(object) = old.as_ref().filter(|old| Some(*old) != new.as_ref()) {
                moved.push(Moved { object, key: key.clone(), gained: false });
            }
            moved.extend(new.iter().map(|object| Moved { object, key: key.clone(), gained: true }));
        }
        // No two changes are of one entry, so of an object no two are of one link.
        moved.sort_unstable_by(|a, b| a.object.cmp(b.object));
        Ok(moved)
    }

    fn merge_objects(
        &self,
        write: &WriteTransaction,
        delta: &Delta,
        moved: &[Moved<'_>],
    ) -> Result<(), IndexError> {
        let mut table = write.open_table(OBJECTS).map_err(failed(&self.path))?;
        let mut links = write.open_table(LINKS).map_err(failed(&self.path))?;
        let mut objects: Vec<_> = delta.objects.iter().collect();
        objects.sort_by(|(a, _), (b, _)| a.cmp(b));
        let mut moved = moved.chunk_by(|a, b| a.object == b.object).peekable();
        for (object, known) in objects {
            // Those before it are of objects that stay as they are.
            while let Some(others) = moved.next_if(|moved| moved[0].object < object) {
                self.move_links(&mut links, &table, others)?;
            }
            let own = moved.next_if(|moved| moved[0].object == object).unwrap_or_default();
            let before = match known {
                None => table.remove(self.order.key(object).as_bytes()),
                Some(known) => {
                    let value = self.encode("objects", known)?;
                    table.insert(self.order.key(object).as_bytes(), value.as_slice())
                }
            };
            let before = before.map_err(failed(&self.path))?;
            let before: Option<Known> =
                before.map(|row| self.decode("objects", row.value())).transpose()?;
            self.merge_links(&mut links, object, before.as_ref(), known.as_ref(), own)?;
        }
        moved.try_for_each(|others| self.move_links(&mut links, &table, others))
    }

    /// Entries of an object whose own row stays.
    fn move_links(
        &self,
        links: &mut Table<'_>,
        objects: &Table<'_>,
        moved: &[Moved<'_>],
    ) -> Result<(), IndexError> {
        let object = moved[0].object;
        let row = redb::ReadableTable::get(objects, self.order.key(object).as_bytes());
        let row = row.map_err(failed(&self.path))?;
        let known: Option<Known> =
            row.map(|row| self.decode("objects", row.value())).transpose()?;
        self.merge_links(links, object, known.as_ref(), known.as_ref(), moved)
    }

    /// Keeps the module's invariant for one object.
    fn merge_links(
        &self,
        links: &mut Table<'_>,
        object: &ObjectId,
        before: Option<&Known>,
        after: Option<&Known>,
        moved: &[Moved<'_>],
    ) -> Result<(), IndexError> {
        let is_alone = after.and_then(Known::only_entry).is_some();
        let has_rows = !is_alone && (after.is_some() || before.is_none());
        let alone_before = before.and_then(Known::only_entry);
        if alone_before.is_some() && !has_rows {
            return Ok(());
        }
        if has_rows && after.is_some() && (alone_before.is_some() || before.is_none()) {
            // Those that did not count until now.
            self.remove_links(links, object)?;
        }
        if let Some((directory, name)) = alone_before {
            // It has more now, or may have: this one too gets a row, which goes again
            // below if it is among those that it lost.
            let key =
                pair_key(self.order, object, &pair_key(self.order, directory, name.as_bytes()));
            links.insert(key.as_slice(), &[][..]).map_err(failed(&self.path))?;
        }
        for Moved { key, gained, .. } in moved {
            let key = pair_key(self.order, object, key);
            match gained {
                true if !has_rows => {}
                true => drop(links.insert(key.as_slice(), &[][..]).map_err(failed(&self.path))?),
                false => drop(links.remove(key.as_slice()).map_err(failed(&self.path))?),
            }
        }
        match before {
            Some(_) if !has_rows => self.remove_links(links, object),
            _ => Ok(()),
        }
    }

    /// What is left of an object's rows. (Few: redb copies a page for each row that a range
    /// loses, and keeps the old ones until the end of the transaction.)
    fn remove_links(&self, links: &mut Table<'_>, object: &ObjectId) -> Result<(), IndexError> {
        let from = pair_key(self.order, object, &[]);
        // Above every entry's key, which begins with the length of an id.
        let to = pair_key(self.order, object, &[u8::MAX]);
        links.retain_in(&from[..]..&to[..], |_, _| false).map_err(failed(&self.path))
    }

    fn merge_orphans(&self, write: &WriteTransaction, delta: &Delta) -> Result<(), IndexError> {
        let mut orphans = write.open_table(ORPHANS).map_err(failed(&self.path))?;
        for (object, orphan) in &delta.orphans {
            match orphan {
                None => drop(
                    orphans
                        .remove(self.order.key(object).as_bytes())
                        .map_err(failed(&self.path))?,
                ),
                Some(orphan) => {
                    let value = self.encode("orphans", orphan)?;
                    orphans
                        .insert(self.order.key(object).as_bytes(), value.as_slice())
                        .map_err(failed(&self.path))?;
                }
            }
        }
        Ok(())
    }
}
