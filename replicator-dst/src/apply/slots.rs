//! From operations to slots: which replica object each place holds before and
//! after the batch. Checks the source's promises on the way.

use std::collections::{BTreeMap, BTreeSet};

use foldhash::{HashSet, HashSetExt};
use replicator_common::id::{BatchId, ObjectId, ReplicaHandle};
use replicator_common::name::Name;
use replicator_common::object::{Kind, ObjectState};
use replicator_common::wire::{ContentSource, Op};

use super::Place;
use super::arrivals::{self, Arrived};
use super::departures::{self, Departed};
use super::plan::{Arrival, PlanError, Staged, Violation};
use crate::objects::{DEPTH_MAX, Entry, Known, Objects, Position};

/// A place in the plan, by source ids: entries of the tree, and our own areas
/// as if they were directories with one entry an object.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) enum Slot {
    /// An entry of the tree.
    Entry(Entry),
    /// The orphan area.
    Orphan(ObjectId),
    /// Lost+found.
    Lost(ObjectId),
}

/// What a slot holds.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Change {
    pub(super) before: Option<ReplicaHandle>,
    pub(super) after: Option<ReplicaHandle>,
}

/// An object's end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fate {
    Drop,
    Orphan,
    Leave,
    SetAside,
}

/// A [`Op::Put`], by object.
#[derive(Clone, Debug)]
pub(super) struct Put {
    pub(super) state: ObjectState,
    pub(super) content: ContentSource,
    pub(super) new: bool,
    pub(super) links: u32,
}

/// One replica object that takes part.
#[derive(Clone, Debug)]
pub(super) struct Inode {
    pub(super) object: ObjectId,
    pub(super) kind: Kind,
    /// Where it was staged, for one that is new.
    pub(super) staged: Option<Place>,
}

/// A batch, taken apart and checked.
pub(super) struct Parts<'a, O: Objects> {
    pub(super) objects: &'a O,
    pub(super) staged: &'a Staged,
    pub(super) batch: BatchId,
    pub(super) puts: BTreeMap<ObjectId, Put>,
    pub(super) fates: BTreeMap<ObjectId, Fate>,
    /// Rows as they are before, with adopted ones; cached.
    pub(super) before: BTreeMap<ObjectId, Option<Known>>,
    pub(super) adopted: BTreeSet<ObjectId>,
    /// Entry operations: slot → (old, new).
    pub(super) entries: BTreeMap<Entry, (Option<ObjectId>, Option<ObjectId>)>,
    /// The same by object.
    pub(super) removed: BTreeMap<ObjectId, Vec<Entry>>,
    pub(super) added: BTreeMap<ObjectId, Vec<Entry>>,
    pub(super) restated: BTreeMap<ObjectId, Vec<Entry>>,
    pub(super) slots: BTreeMap<Slot, Change>,
    pub(super) inodes: BTreeMap<ReplicaHandle, Inode>,
    /// New objects that need no planning beyond one rename.
    pub(super) arrivals: Vec<Arrived>,
    /// Objects that need none beyond one unlink.
    pub(super) departures: Vec<Departed>,
    /// Directories that get arrivals, or lose departures.
    pub(super) touched: BTreeSet<ObjectId>,
}

impl<'a, O: Objects> Parts<'a, O> {
    /// Sorts operations by what they are about.
    pub(super) fn collect(
        objects: &'a O,
        staged: &'a Staged,
        batch: BatchId,
        ops: Vec<Op>,
        reserved: &Name,
        root: &ReplicaHandle,
    ) -> Result<Self, PlanError<O::Error>> {
        let mut parts = Self {
            objects,
            staged,
            batch,
            puts: BTreeMap::new(),
            fates: BTreeMap::new(),
            before: BTreeMap::new(),
            adopted: BTreeSet::new(),
            entries: BTreeMap::new(),
            removed: BTreeMap::new(),
            added: BTreeMap::new(),
            restated: BTreeMap::new(),
            slots: BTreeMap::new(),
            inodes: BTreeMap::new(),
            arrivals: Vec::new(),
            departures: Vec::new(),
            touched: BTreeSet::new(),
        };
        let (arrivals, ops) = arrivals::split(ops, staged);
        let (departures, ops) = departures::split(ops, objects)?;
        for op in ops {
            parts.sort(op, root)?;
        }
        parts.check(reserved)?;
        parts.check_arrivals(&arrivals, reserved)?;
        parts.check_departures(&departures)?;
        (parts.arrivals, parts.departures) = (arrivals, departures);
        parts.build_slots()?;
        Ok(parts)
    }

    fn sort(&mut self, op: Op, root: &ReplicaHandle) -> Result<(), PlanError<O::Error>> {
        match op {
            Op::Put { object, state, content, new, links } => {
                let put = Put { state, content, new, links };
                if self.puts.insert(object.clone(), put).is_some() {
                    return Err(Violation::Twice { what: "state", object }.into());
                }
            }
            Op::Entry { directory, name, old, new } => {
                let entry = Entry { directory, name };
                if self.entries.contains_key(&entry) {
                    let object = entry.directory;
                    return Err(Violation::Twice { what: "entry", object }.into());
                }
                if old == new {
                    if let Some(object) = &old {
                        self.restated.entry(object.clone()).or_default().push(entry.clone());
                    }
                } else {
                    if let Some(object) = &old {
                        self.removed.entry(object.clone()).or_default().push(entry.clone());
                    }
                    if let Some(object) = &new {
                        self.added.entry(object.clone()).or_default().push(entry.clone());
                    }
                }
                self.entries.insert(entry, (old, new));
            }
            Op::Drop { object } => self.fate(object, Fate::Drop)?,
            Op::Orphan { object } => self.fate(object, Fate::Orphan)?,
            Op::Leave { object } => self.fate(object, Fate::Leave)?,
            Op::SetAside { object } => self.fate(object, Fate::SetAside)?,
            Op::Root { object } => {
                let known = Known {
                    handle: Some(root.clone()),
                    kind: Kind::Directory,
                    position: Position::Root,
                    links: 1,
                    content: BatchId(0),
                };
                match self.objects.get(&object).map_err(PlanError::Objects)? {
                    Some(old) if old.position != Position::Root => {
                        return Err(Violation::RootMoved { object }.into());
                    }
                    _ => drop(self.before.insert(object.clone(), Some(known))),
                }
                self.adopted.insert(object);
            }
            Op::Adopt { object, handle, directory, name, kind } => {
                let known = Known {
                    handle: Some(handle),
                    kind,
                    position: Position::Entry(Entry { directory, name }),
                    links: 1,
                    content: self.batch,
                };
                self.before.insert(object.clone(), Some(known));
                self.adopted.insert(object);
            }
        }
        Ok(())
    }

    fn fate(&mut self, object: ObjectId, fate: Fate) -> Result<(), PlanError<O::Error>> {
        match self.fates.insert(object.clone(), fate) {
            Some(other) if other != fate => Err(Violation::Twice { what: "end", object }.into()),
            _ => Ok(()),
        }
    }

    /// The row of an object before the batch.
    pub(super) fn known(
        &mut self,
        object: &ObjectId,
    ) -> Result<Option<&Known>, PlanError<O::Error>> {
        if !self.before.contains_key(object) {
            let known = self.objects.get(object).map_err(PlanError::Objects)?;
            self.before.insert(object.clone(), known);
        }
        Ok(self.before.get(object).and_then(Option::as_ref))
    }

    fn check(&mut self, reserved: &Name) -> Result<(), PlanError<O::Error>> {
        // What the batch itself binds to an object of the replica is there,
        // whatever the source thinks of it.
        for object in &self.adopted {
            if let Some(put) = self.puts.get_mut(object) {
                put.new = false;
            }
        }
        let puts: Vec<_> = self.puts.iter().map(|(o, p)| (o.clone(), p.clone())).collect();
        for (object, put) in puts {
            match (self.known(&object)?, put.new) {
                (Some(_), true) => return Err(Violation::NotNew { object }.into()),
                (None, false) => return Err(Violation::Unknown { object }.into()),
                (Some(known), false) if known.kind != put.state.kind => {
                    return Err(Violation::KindChanged { object }.into());
                }
                _ => {}
            }
            if put.new && !self.staged.contains_key(&object) {
                return Err(Violation::NotStaged { object }.into());
            }
            if put.new && !self.added.contains_key(&object) && !self.fates.contains_key(&object) {
                return Err(Violation::Unplaced { object }.into());
            }
        }
        let entries: Vec<_> = self.entries.iter().map(|(e, c)| (e.clone(), c.clone())).collect();
        for (entry, (old, new)) in entries {
            for object in [Some(&entry.directory), old.as_ref(), new.as_ref()].into_iter().flatten()
            {
                let new = self.puts.get(object).is_some_and(|put| put.new);
                if !new && self.known(object)?.is_none() {
                    return Err(Violation::Unknown { object: object.clone() }.into());
                }
            }
            if self.kind(&entry.directory)? != Some(Kind::Directory) {
                return Err(Violation::NotDirectory { object: entry.directory }.into());
            }
            if new.is_some() && self.fates.get(&entry.directory) == Some(&Fate::Drop) {
                return Err(Violation::IntoDropped { object: entry.directory }.into());
            }
            let at_root =
                self.known(&entry.directory)?.is_some_and(|known| known.position == Position::Root);
            if at_root && entry.name == *reserved {
                return Err(Violation::Reserved { name: entry.name }.into());
            }
        }
        self.check_fates()?;
        self.check_loops()
    }

    fn check_fates(&mut self) -> Result<(), PlanError<O::Error>> {
        let fates: Vec<_> = self.fates.iter().map(|(o, f)| (o.clone(), *f)).collect();
        for (object, _) in fates {
            let added = self.added.contains_key(&object) || self.restated.contains_key(&object);
            if added {
                return Err(Violation::PlacedAndEnded { object }.into());
            }
            let new = self.puts.get(&object).is_some_and(|put| put.new);
            match self.known(&object)? {
                None if !new => return Err(Violation::Unknown { object }.into()),
                Some(known) if known.position == Position::Root => {
                    return Err(Violation::RootMoved { object }.into());
                }
                _ => {}
            }
        }
        let removed: Vec<_> = self.removed.iter().map(|(o, r)| (o.clone(), r.clone())).collect();
        for (object, entries) in removed {
            let elsewhere = self.added.contains_key(&object)
                || self.restated.contains_key(&object)
                || self.fates.contains_key(&object)
                || self.remaining_entry(&object, &entries)?.is_some();
            if !elsewhere {
                return Err(Violation::Detached { object }.into());
            }
        }
        let twice = self.added.iter().find(|(object, added)| {
            let kept = self.restated.get(*object).map_or(0, Vec::len);
            added.len() + kept > 1 && self.peek_kind(object) == Some(Kind::Directory)
        });
        match twice {
            Some((object, _)) => Err(Violation::DirectoryTwice { object: object.clone() }.into()),
            None => Ok(()),
        }
    }

    /// The entry that the map knows, unless the batch removes it.
    fn remaining_entry(
        &mut self,
        object: &ObjectId,
        removed: &[Entry],
    ) -> Result<Option<Entry>, PlanError<O::Error>> {
        let entry = self.known(object)?.and_then(|known| known.position.entry().cloned());
        Ok(entry.filter(|entry| !removed.contains(entry)))
    }

    /// No directory may end up inside itself: the kernel would refuse, and the
    /// batch would stall for ever.
    fn check_loops(&mut self) -> Result<(), PlanError<O::Error>> {
        let moved: Vec<_> = self
            .added
            .keys()
            .filter(|object| self.peek_kind(object) == Some(Kind::Directory))
            .cloned()
            .collect();
        // What is known to lead to an end is not followed again: a branch of
        // many new levels is walked once, not once a level.
        let mut ends: HashSet<ObjectId> = HashSet::new();
        for object in moved {
            let mut trail = HashSet::new();
            let mut at = object;
            while !ends.contains(&at) {
                let parent = self.parent_after(&at)?;
                if !trail.insert(at.clone()) || trail.len() > DEPTH_MAX {
                    return Err(Violation::Loop { object: at }.into());
                }
                let Some(parent) = parent else { break };
                at = parent;
            }
            ends.extend(trail);
        }
        Ok(())
    }

    /// The directory that holds a directory after the batch.
    pub(super) fn parent_after(
        &mut self,
        object: &ObjectId,
    ) -> Result<Option<ObjectId>, PlanError<O::Error>> {
        if let Some(entry) = self.added.get(object).and_then(|added| added.first()) {
            return Ok(Some(entry.directory.clone()));
        }
        if self.fates.contains_key(object) {
            return Ok(None);
        }
        Ok(self.known(object)?.and_then(|k| k.position.entry().map(|e| e.directory.clone())))
    }

    fn peek_kind(&self, object: &ObjectId) -> Option<Kind> {
        match self.puts.get(object) {
            Some(put) => Some(put.state.kind),
            None => self.before.get(object)?.as_ref().map(|known| known.kind),
        }
    }

    /// What an object is.
    pub(super) fn kind(&mut self, object: &ObjectId) -> Result<Option<Kind>, PlanError<O::Error>> {
        match self.puts.get(object) {
            Some(put) => Ok(Some(put.state.kind)),
            None => Ok(self.known(object)?.map(|known| known.kind)),
        }
    }

    /// Whether new content is written into the object instead of replacing it
    /// (trap 9: a rename would split hard links).
    pub(super) fn in_place(&mut self, object: &ObjectId) -> Result<bool, PlanError<O::Error>> {
        let Some(put) = self.puts.get(object) else { return Ok(false) };
        let (after, new) = (put.links, put.new);
        let removed = self.removed.get(object).map_or(0, Vec::len);
        let before = self.known(object)?.map_or(0, |known| known.links as usize).max(removed);
        Ok(!new && (after > 1 || before > 1))
    }

    /// The replica's object before the batch.
    pub(super) fn handle_before(
        &mut self,
        object: &ObjectId,
    ) -> Result<Option<ReplicaHandle>, PlanError<O::Error>> {
        Ok(self.known(object)?.and_then(|known| known.handle.clone()))
    }

    /// The replica's object after the batch: another one when a staged file
    /// takes its place.
    pub(super) fn handle_after(
        &mut self,
        object: &ObjectId,
    ) -> Result<Option<ReplicaHandle>, PlanError<O::Error>> {
        let staged = self.staged;
        match staged.get(object) {
            Some(Arrival::Whole { handle, .. }) if !self.in_place(object)? => {
                Ok(Some(handle.clone()))
            }
            Some(Arrival::Absent) => Ok(None),
            _ => self.handle_before(object),
        }
    }

    fn build_slots(&mut self) -> Result<(), PlanError<O::Error>> {
        let entries: Vec<_> = self.entries.iter().map(|(e, c)| (e.clone(), c.clone())).collect();
        for (entry, (old, new)) in entries {
            let before = old.as_ref().map(|o| self.handle_before(o)).transpose()?.flatten();
            let after = new.as_ref().map(|o| self.handle_after(o)).transpose()?.flatten();
            self.slots.insert(Slot::Entry(entry), Change { before, after });
        }
        let mut touched: BTreeSet<ObjectId> = self.puts.keys().cloned().collect();
        touched.extend(self.fates.keys().cloned());
        touched.extend(self.removed.keys().cloned());
        touched.extend(self.added.keys().cloned());
        for object in touched {
            self.own_slots(&object)?;
        }
        Ok(())
    }

    /// Slots of an object that no entry operation names, and its inodes.
    fn own_slots(&mut self, object: &ObjectId) -> Result<(), PlanError<O::Error>> {
        let before = self.handle_before(object)?;
        let after = self.handle_after(object)?;
        let fate = self.fates.get(object).copied();
        let stays = if fate.is_none() { after.clone() } else { None };
        match self.known(object)?.map(|known| known.position.clone()) {
            Some(Position::Entry(entry)) => {
                let change = Change { before: before.clone(), after: stays };
                self.slots.entry(Slot::Entry(entry)).or_insert(change);
            }
            Some(Position::Orphan { .. }) => {
                let placed = self.added.contains_key(object) || fate.is_some();
                let after = if placed { None } else { stays };
                let change = Change { before: before.clone(), after };
                self.slots.insert(Slot::Orphan(object.clone()), change);
            }
            _ => {}
        }
        match fate {
            Some(Fate::Orphan | Fate::Leave) => {
                let slot = self.slots.entry(Slot::Orphan(object.clone())).or_default();
                slot.after = after.clone();
            }
            Some(Fate::SetAside) => {
                let slot = self.slots.entry(Slot::Lost(object.clone())).or_default();
                slot.after = after.clone();
            }
            Some(Fate::Drop) | None => {}
        }
        let kind = self.kind(object)?.unwrap_or(Kind::File);
        if let Some(handle) = before {
            let inode = Inode { object: object.clone(), kind, staged: None };
            if self.inodes.insert(handle, inode).is_some_and(|other| other.object != *object) {
                return Err(
                    Violation::Twice { what: "replica object", object: object.clone() }.into()
                );
            }
        }
        if let (Some(handle), Some(Arrival::Whole { place, .. })) = (after, self.staged.get(object))
            && !self.in_place(object)?
        {
            let staged = Some(place.clone());
            self.inodes.insert(handle, Inode { object: object.clone(), kind, staged });
        }
        Ok(())
    }
}
