//! A delta becomes part of the tables, each in its own order: neighbours are on
//! one page.

use redb::WriteTransaction;

use super::known::{Delta, EntryChange};
use super::store::{ENTRIES, IndexError, LINKS, OBJECTS, ORPHANS, Store, failed, pair_key};

impl Store {
    /// Makes a delta part of the tables.
    pub(super) fn merge(&self, write: &WriteTransaction, delta: &Delta) -> Result<(), IndexError> {
        {
            self.merge_entries(write, &delta.entries)?;
            let mut table = write.open_table(OBJECTS).map_err(failed(&self.path))?;
            // In the order of the table: neighbours are on one page.
            let mut objects: Vec<_> = delta.objects.iter().collect();
            objects.sort_by(|(a, _), (b, _)| a.cmp(b));
            for (object, known) in objects {
                match known {
                    None => drop(table.remove(object.as_bytes()).map_err(failed(&self.path))?),
                    Some(known) => {
                        let value = self.encode("objects", known)?;
                        table
                            .insert(object.as_bytes(), value.as_slice())
                            .map_err(failed(&self.path))?;
                    }
                }
            }
            let mut orphans = write.open_table(ORPHANS).map_err(failed(&self.path))?;
            for (object, orphan) in &delta.orphans {
                match orphan {
                    None => drop(orphans.remove(object.as_bytes()).map_err(failed(&self.path))?),
                    Some(orphan) => {
                        let value = self.encode("orphans", orphan)?;
                        orphans
                            .insert(object.as_bytes(), value.as_slice())
                            .map_err(failed(&self.path))?;
                    }
                }
            }
        }
        self.remove_lists(write, &delta.dead_lists)?;
        self.put_meta(write, "mark", &delta.mark)?;
        self.drop_pending(write, delta.mark.batch)
    }

    /// Each table in its own order, as with objects. (No two changes are of one
    /// entry, so neither are two of one link.)
    fn merge_entries(
        &self,
        write: &WriteTransaction,
        changes: &[EntryChange],
    ) -> Result<(), IndexError> {
        let mut entries = write.open_table(ENTRIES).map_err(failed(&self.path))?;
        let mut rows = Vec::with_capacity(changes.len());
        for EntryChange { directory, name, old, new } in changes {
            let key = pair_key(directory, name.as_bytes());
            match new {
                None => drop(entries.remove(key.as_slice()).map_err(failed(&self.path))?),
                Some(object) => {
                    entries
                        .insert(key.as_slice(), object.as_bytes())
                        .map_err(failed(&self.path))?;
                }
            }
            let link = |object| (pair_key(object, &key), Some(object) == new.as_ref());
            rows.extend(old.iter().filter(|old| Some(*old) != new.as_ref()).map(link));
            rows.extend(new.iter().map(link));
        }
        drop(entries);
        rows.sort_unstable();
        let mut links = write.open_table(LINKS).map_err(failed(&self.path))?;
        for (key, there) in rows {
            match there {
                true => drop(links.insert(key.as_slice(), &[][..]).map_err(failed(&self.path))?),
                false => drop(links.remove(key.as_slice()).map_err(failed(&self.path))?),
            }
        }
        Ok(())
    }
}
