//! The objects map after a batch, and the directories whose time is kept.

use std::collections::{BTreeMap, BTreeSet};

use replicator_common::id::ObjectId;
use replicator_common::object::Kind;
use replicator_common::wire::ContentSource;

use super::Place;
use super::plan::{PlanError, Planner};
use super::slots::{Fate, Slot};
use crate::objects::{Entry, Known, Objects, Position};

impl<O: Objects> Planner<'_, O> {
    pub(super) fn rows(&mut self) -> Result<(), PlanError<O::Error>> {
        let mut objects: BTreeSet<ObjectId> = self.parts.puts.keys().cloned().collect();
        objects.extend(self.parts.adopted.iter().cloned());
        objects.extend(self.parts.fates.keys().cloned());
        objects.extend(self.parts.removed.keys().cloned());
        objects.extend(self.parts.added.keys().cloned());
        objects.extend(self.parts.restated.keys().cloned());
        for object in objects {
            let row = self.row(&object)?;
            let before = self.parts.before.get(&object).cloned().flatten();
            if row != before || self.parts.adopted.contains(&object) {
                self.out.rows.push((object, row));
            }
        }
        Ok(())
    }

    fn row(&mut self, object: &ObjectId) -> Result<Option<Known>, PlanError<O::Error>> {
        let before = self.parts.known(object)?.cloned();
        let was = before.as_ref().and_then(|known| match &known.position {
            Position::Entry(entry) => Some(entry.clone()),
            Position::Orphan { was } => was.clone(),
            Position::Root => None,
        });
        let position = match self.parts.fates.get(object) {
            Some(Fate::Drop) => return Ok(None),
            Some(Fate::SetAside) => {
                self.out.set_aside.push((object.clone(), Place::lost(object).name));
                return Ok(None);
            }
            Some(Fate::Orphan) => Position::Orphan { was },
            // It goes back nowhere.
            Some(Fate::Leave) => Position::Orphan { was: None },
            None => self.position_after(object, before.as_ref()),
        };
        let put = self.parts.puts.get(object);
        let changed = put.is_some_and(|put| put.new || put.content != ContentSource::Unchanged);
        let links = match (put, &before) {
            (Some(put), _) => put.links,
            (None, Some(known)) => {
                let count = |map: &BTreeMap<ObjectId, Vec<Entry>>| {
                    map.get(object).map_or(0, |entries| entries.len() as u32)
                };
                let (added, removed) = (count(&self.parts.added), count(&self.parts.removed));
                (known.links + added).saturating_sub(removed)
            }
            (None, None) => 1,
        };
        let content = if changed {
            self.parts.batch
        } else {
            before.as_ref().map_or(self.parts.batch, |known| known.content)
        };
        let kind = self.parts.kind(object)?.unwrap_or(Kind::File);
        let handle = self.parts.handle_after(object)?;
        Ok(Some(Known { handle, kind, position, links, content }))
    }

    fn position_after(&self, object: &ObjectId, before: Option<&Known>) -> Position {
        let first = |map: &BTreeMap<ObjectId, Vec<Entry>>| {
            map.get(object).and_then(|entries| entries.first()).cloned()
        };
        let gone = |entry: &Entry| {
            self.parts.removed.get(object).is_some_and(|removed| removed.contains(entry))
        };
        let stated = first(&self.parts.restated).or_else(|| first(&self.parts.added));
        match before.map(|known| known.position.clone()) {
            Some(Position::Entry(entry)) if !gone(&entry) => Position::Entry(entry),
            Some(Position::Root) => Position::Root,
            other => match stated {
                Some(entry) => Position::Entry(entry),
                None => other.unwrap_or(Position::Orphan { was: None }),
            },
        }
    }

    /// Directories in which names change or move, without a state of their own.
    pub(super) fn touched(&mut self) -> Result<(), PlanError<O::Error>> {
        let mut touched = BTreeSet::new();
        let mut objects = std::mem::take(&mut self.parts.touched);
        for (slot, change) in &self.parts.slots {
            if let (Slot::Entry(entry), true) = (slot, change.before != change.after) {
                objects.insert(entry.directory.clone());
            }
        }
        for (handle, route) in &self.routes {
            if self.is_directory(handle) && !route.enters.is_empty() {
                objects.extend(self.inode(handle).map(|inode| inode.object.clone()));
            }
        }
        for object in objects {
            let stated = self.parts.puts.contains_key(&object);
            let ends = self.parts.fates.get(&object) == Some(&Fate::Drop);
            if !stated && !ends {
                touched.extend(self.parts.handle_after(&object)?);
            }
        }
        self.out.touched = touched.into_iter().collect();
        Ok(())
    }
}
