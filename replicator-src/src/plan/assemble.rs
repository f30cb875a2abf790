//! Closes a batch over references and makes its operations and index delta.
//!
//! INVARIANT (trap 1): after assembling, every entry that the batch sets leads
//! to an object that the replica has or gets with the batch, and every object
//! that loses its last entry is named as dropped or as an orphan. What would
//! break this is taken out of the batch as a [`Hold`]; the watermark waits for
//! holds and for orphans.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use foldhash::{HashMap, HashMapExt, HashSet, HashSetExt};
use replicator_common::id::ObjectId;
use replicator_common::name::Name;
use replicator_common::object::Kind;
use replicator_common::time::Timestamp;
use replicator_common::wire::{ContentSource, Op};

pub use limits::Limits;

use super::PlanError;
use super::dirty::Dirty;
use super::resolve::{Binding, Resolve};
use super::tree::Tree;
use crate::index::store::dead_list;
use crate::index::{Delta, EntryChange, Known, View};
use crate::watcher::What;
use place_set::PlaceSet;

mod apart;
mod detach;
mod limits;
mod over;
mod place_set;

/// What reading an object gave.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It was read; the replica gets this. Entries and link count in `known`
    /// are filled in by [`assemble`].
    Ship {
        /// As the index will know it.
        known: Known,
        /// Where the destination takes the content from.
        content: ContentSource,
    },
    /// Nothing differs; the index takes over the change time.
    Same {
        /// As the index will know it.
        known: Known,
    },
    /// It is large and its content must travel on its own first.
    Large {
        /// Bytes of content.
        size: u64,
    },
    /// It went away before it could be read; entries that lead to it are
    /// looked at again.
    Gone,
    /// It is not where names led to, which does not say that it is gone. It
    /// stays dirty.
    Away,
    /// It cannot be read now.
    Unreadable {
        /// What the system said.
        error: String,
    },
    /// The destination has no place for it now.
    Refused {
        /// What the destination said.
        error: String,
    },
}

/// Why something waits.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum HoldReason {
    /// A large object's content travels.
    Large {
        /// Bytes of content.
        size: u64,
    },
    /// It cannot be read.
    Unreadable {
        /// What the system said.
        error: String,
    },
    /// The destination has no place for it.
    Refused {
        /// What the destination said.
        error: String,
    },
}

/// An object whose change waits; it and its entries are looked at again later.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hold {
    /// Why.
    pub reason: HoldReason,
    /// Entries that wait for it; none when only its content waits.
    pub entries: BTreeSet<(ObjectId, Name)>,
}

/// What assembling needs to know beside the tree.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    /// The moment at which the batch was read, for new orphans.
    pub now: Timestamp,
    /// The watermark before this batch: where it waits for new orphans.
    pub floor: Timestamp,
    /// Orphans found before this moment are outside the source by now: every
    /// event that could tell of a new entry has been seen. `None` while a gap
    /// is open or the journal has not been read that far.
    pub outside_before: Option<Timestamp>,
    /// What names the replica's file system takes.
    pub limits: Limits,
    /// Entries that the batch may drop of trees that lost their last entry.
    pub apart: usize,
}

impl Settings {
    /// With nothing known of time: for tests, and the first batch.
    pub const UNKNOWN: Self = Self {
        now: Timestamp::NEVER,
        floor: Timestamp::NEVER,
        outside_before: None,
        limits: Limits { links: None, name: None },
        apart: usize::MAX / 2,
    };
}

/// A batch, closed.
#[derive(Debug, Default)]
pub struct Assembly {
    /// Operations, in no particular order.
    pub ops: Vec<Op>,
    /// What the batch changes in the index; the engine fills in the mark.
    pub delta: Delta,
    /// Objects that wait.
    pub holds: BTreeMap<ObjectId, Hold>,
    /// Entries to look at again in the next batch.
    pub again: BTreeSet<(ObjectId, Name)>,
    /// Entries and objects whose objects were not where they were believed to be.
    pub astray: Dirty,
    /// Orphans that the watermark waits for after this batch.
    pub orphans: usize,
    /// Directories that leave the source with this batch, and are not taken
    /// apart yet.
    pub leaving: Vec<ObjectId>,
    /// How many trees that left are not all dropped after this batch.
    pub left: usize,
    /// What this batch drops of trees that left before.
    pub apart: HashSet<ObjectId>,
    /// Directories that this batch makes orphans: no walk reaches them from the
    /// root, so a walk under way must be told of them (trap 11).
    pub orphaned: Vec<ObjectId>,
    /// Objects that have names outside the tree, or may have.
    pub linked: Vec<ObjectId>,
}

/// Assembles a batch from what was resolved and read.
pub fn assemble<V: View, T: Tree>(
    resolve: &Resolve,
    outcomes: &HashMap<ObjectId, Outcome>,
    root: &ObjectId,
    settings: Settings,
    view: &V,
    tree: &mut T,
) -> Result<Assembly, PlanError<V::Error, T::Error>> {
    let mut work = Work {
        resolve,
        outcomes,
        root,
        settings,
        view,
        tree,
        out: Assembly::default(),
        changed: BTreeMap::new(),
        gained: HashMap::new(),
        lost: HashMap::new(),
        gone: HashSet::new(),
        kept: HashSet::new(),
        admitted: HashSet::new(),
        loose: Vec::new(),
        apart: 0,
    };
    work.admitted = work.admit()?;
    work.bind()?;
    work.fit_links()?;
    let directories = work.gained_directories()?;
    work.unite_directories(&directories)?;
    work.break_loops(directories)?;
    work.detach()?;
    work.settle_orphans()?;
    work.put_objects()?;
    work.entry_ops()?;
    Ok(work.out)
}

type Place = (ObjectId, Name);
type Failure<V, T> = PlanError<<V as View>::Error, <T as Tree>::Error>;

struct Work<'a, V: View, T: Tree> {
    resolve: &'a Resolve,
    outcomes: &'a HashMap<ObjectId, Outcome>,
    root: &'a ObjectId,
    settings: Settings,
    view: &'a V,
    tree: &'a mut T,
    out: Assembly,
    /// Entries that this batch changes.
    changed: BTreeMap<Place, Binding>,
    gained: HashMap<ObjectId, PlaceSet>,
    lost: HashMap<ObjectId, PlaceSet>,
    /// Objects dropped or set aside.
    gone: HashSet<ObjectId>,
    /// Objects that stay without an entry, as orphans or because they leave.
    kept: HashSet<ObjectId>,
    /// New objects that the replica gets: of them the index knows nothing, and
    /// is not asked.
    admitted: HashSet<ObjectId>,
    /// Directories that would be inside themselves, and get no entry.
    loose: Vec<ObjectId>,
    /// Entries that went with what they were in, of [`Settings::apart`].
    apart: usize,
}

impl<V: View, T: Tree> Work<'_, V, T> {
    fn known(&self, object: &ObjectId) -> Result<Option<Known>, Failure<V, T>> {
        if self.admitted.contains(object) {
            return Ok(None);
        }
        self.view.object(object).map_err(PlanError::Index)
    }

    /// Whether the replica has it.
    fn is_known(&self, object: &ObjectId) -> Result<bool, Failure<V, T>> {
        Ok(self.view.kind(object).map_err(PlanError::Index)?.is_some())
    }

    fn shippable(&self, object: &ObjectId) -> bool {
        matches!(self.outcomes.get(object), Some(Outcome::Ship { .. } | Outcome::Same { .. }))
    }

    /// New objects that the replica gets: readable, and reachable from a
    /// directory that the replica has.
    fn admit(&self) -> Result<HashSet<ObjectId>, Failure<V, T>> {
        let mut below: HashMap<&ObjectId, Vec<&ObjectId>> = HashMap::new();
        let mut queue = VecDeque::new();
        for ((directory, name), binding) in &self.resolve.bindings {
            let Some(new) = &binding.new else { continue };
            if !self.shippable(new) || self.too_long(name).is_some() {
                continue;
            }
            below.entry(directory).or_default().push(new);
            if !self.resolve.fresh.contains(directory) {
                queue.push_back(directory);
            }
        }
        let mut admitted = HashSet::new();
        if self.resolve.fresh.contains(self.root) && self.shippable(self.root) {
            // The first batch: nothing leads to the root.
            admitted.insert(self.root.clone());
            queue.push_back(self.root);
        }
        while let Some(directory) = queue.pop_front() {
            for object in below.remove(directory).unwrap_or_default() {
                if !self.is_known(object)? && admitted.insert(object.clone()) {
                    queue.push_back(object);
                }
            }
        }
        Ok(admitted)
    }

    /// Decides each entry: as it is on the source, or held.
    fn bind(&mut self) -> Result<(), Failure<V, T>> {
        let bindings = &self.resolve.bindings;
        let waiting = self.find_waiting()?;
        for (place, binding) in bindings {
            let (directory, _) = place;
            if self.resolve.fresh.contains(directory) && !self.admitted.contains(directory) {
                // The directory itself did not make it; what led to it is
                // looked at again, and then it is listed anew.
                continue;
            }
            if binding.old == binding.new {
                continue;
            }
            if let Some((object, reason)) = self.waits((place, binding), &waiting)?
                && self.too_long(&place.1).is_none()
            {
                self.hold_entry(object, place, reason.clone());
                continue;
            }
            let new = match &binding.new {
                Some(new) if self.is_held(new, place)? => {
                    self.hold(new, place);
                    match &binding.old {
                        Some(old) if !self.stays_under_held(old)? => None,
                        _ => continue,
                    }
                }
                new => new.clone(),
            };
            self.change(place.clone(), Binding { old: binding.old.clone(), new });
        }
        Ok(())
    }

    /// Whether an entry cannot come to be now: its object is not there, or the
    /// replica does not take its name.
    fn is_held(&self, object: &ObjectId, (_, name): &Place) -> Result<bool, Failure<V, T>> {
        let there = self.admitted.contains(object) || self.is_known(object)?;
        Ok(!there || self.too_long(name).is_some())
    }

    /// Whether the object that a held entry would replace may stay there
    /// meanwhile. A directory may not: it can have only one entry, and may be
    /// on its way elsewhere.
    fn stays_under_held(&self, old: &ObjectId) -> Result<bool, Failure<V, T>> {
        let kind = self.view.kind(old).map_err(PlanError::Index)?;
        Ok(kind != Some(Kind::Directory))
    }

    /// Takes an entry out of the batch because its object is not there yet.
    fn hold(&mut self, object: &ObjectId, place: &Place) {
        if let Some(error) = self.too_long(&place.1) {
            self.hold_entry(object, place, HoldReason::Refused { error });
            return;
        }
        let reason = match self.outcomes.get(object) {
            Some(Outcome::Large { size }) => HoldReason::Large { size: *size },
            Some(Outcome::Unreadable { error }) => HoldReason::Unreadable { error: error.clone() },
            Some(Outcome::Refused { error }) => HoldReason::Refused { error: error.clone() },
            Some(Outcome::Away) => {
                let (directory, name) = place.clone();
                self.out.astray.entry(directory, name, What::default());
                return;
            }
            Some(Outcome::Gone | Outcome::Ship { .. } | Outcome::Same { .. }) | None => {
                self.out.again.insert(place.clone());
                return;
            }
        };
        self.hold_entry(object, place, reason);
    }

    /// Content comes before names that do not fit: a transfer begins only of what
    /// waits for its content.
    fn hold_entry(&mut self, object: &ObjectId, place: &Place, reason: HoldReason) {
        let fresh = || Hold { reason: reason.clone(), entries: BTreeSet::new() };
        let hold = self.out.holds.entry(object.clone()).or_insert_with(fresh);
        hold.entries.insert(place.clone());
        if matches!(reason, HoldReason::Large { .. }) {
            hold.reason = reason;
        }
    }

    fn change(&mut self, place: Place, binding: Binding) {
        if let Some(old) = &binding.old {
            self.lost.entry(old.clone()).or_default().insert(place.clone());
        }
        if let Some(new) = &binding.new {
            self.gained.entry(new.clone()).or_default().insert(place.clone());
        }
        self.changed.insert(place, binding);
    }

    /// Directories to which the batch gives an entry: few, where most objects are files.
    fn gained_directories(&self) -> Result<BTreeSet<ObjectId>, Failure<V, T>> {
        let mut directories = BTreeSet::new();
        for object in self.gained.keys() {
            if self.is_directory(object)? {
                directories.insert(object.clone());
            }
        }
        Ok(directories)
    }

    /// A directory has one entry. Where it was moved between two looks, or the
    /// record of its old name is still to come, the batch sees two: one of
    /// those it looked at stays, and all are looked at again.
    fn unite_directories(&mut self, directories: &BTreeSet<ObjectId>) -> Result<(), Failure<V, T>> {
        for object in directories {
            let links = self.links_after(object)?;
            if links.len() < 2 {
                continue;
            }
            let kept = self.gained.get(object).and_then(|places| places.first()).cloned();
            for place in links {
                self.out.again.insert(place.clone());
                if Some(&place) != kept.as_ref() {
                    self.unbind(place, object);
                }
            }
        }
        Ok(())
    }

    /// A directory is never inside itself on the source. Where one was seen in
    /// another whose own move out of it was not, the batch would put it there:
    /// it gets no entry for now, and is looked at again.
    fn break_loops(&mut self, directories: BTreeSet<ObjectId>) -> Result<(), Failure<V, T>> {
        let mut sound: HashSet<ObjectId> = HashSet::from_iter([self.root.clone()]);
        for object in directories {
            let mut way: Vec<ObjectId> = Vec::new();
            let mut at = Some(object);
            while let Some(next) = at.filter(|next| !sound.contains(next)) {
                if let Some(start) = way.iter().position(|seen| *seen == next) {
                    self.break_loop(&way[start..]);
                    break;
                }
                at = self.links_after(&next)?.first().map(|(above, _)| above.clone());
                way.push(next);
            }
            sound.extend(way);
        }
        Ok(())
    }

    fn break_loop(&mut self, inside: &[ObjectId]) {
        let moved = inside
            .iter()
            .find(|one| self.gained.get(*one).is_some_and(|places| !places.is_empty()));
        let Some(object) = moved else { return };
        for place in self.gained.get(object).cloned().unwrap_or_default().iter() {
            self.out.again.insert(place.clone());
            self.unbind(place.clone(), object);
        }
        self.loose.push(object.clone());
    }

    fn is_directory(&self, object: &ObjectId) -> Result<bool, Failure<V, T>> {
        let kind = match self.outcomes.get(object) {
            Some(Outcome::Ship { known, .. } | Outcome::Same { known }) => Some(known.state.kind),
            _ if self.admitted.contains(object) => None,
            _ => self.view.kind(object).map_err(PlanError::Index)?,
        };
        Ok(kind == Some(Kind::Directory))
    }

    /// Takes the entry away from the object, whether the batch gave it or the
    /// replica has it.
    fn unbind(&mut self, place: Place, object: &ObjectId) {
        if let Some(gained) = self.gained.get_mut(object)
            && gained.remove(&place)
        {
            let binding = self.changed.remove(&place);
            if let Some(Binding { old: Some(old), .. }) = binding {
                self.changed.insert(place, Binding { old: Some(old), new: None });
            }
            return;
        }
        self.change(place, Binding { old: Some(object.clone()), new: None });
    }

    /// The object's entries after the batch.
    fn links_after(&self, object: &ObjectId) -> Result<Vec<Place>, Failure<V, T>> {
        let mut links = match self.admitted.contains(object) {
            true => Vec::new(),
            false => self.links_before(object)?,
        };
        if let Some(lost) = self.lost.get(object) {
            links.retain(|place| !lost.contains(place));
        }
        if let Some(gained) = self.gained.get(object) {
            if links.is_empty() {
                return Ok(gained.iter().cloned().collect());
            }
            // By hash: both may be tens of thousands.
            let there: HashSet<&Place> = links.iter().collect();
            let new: Vec<Place> =
                gained.iter().filter(|place| !there.contains(place)).cloned().collect();
            links.extend(new);
        }
        Ok(links)
    }

    /// The object's entries in the replica: each batch that changes entries of an
    /// object says with it how many it has then ([`Self::put_object`]).
    fn links_before(&self, object: &ObjectId) -> Result<Vec<Place>, Failure<V, T>> {
        match self.view.only_entry(object).map_err(PlanError::Index)? {
            Some(place) => Ok(vec![place]),
            None => self.view.links(object).map_err(PlanError::Index),
        }
    }

    /// States of objects: those read, and those whose links changed.
    fn put_objects(&mut self) -> Result<(), Failure<V, T>> {
        let touched = self.lost.keys().chain(self.gained.keys()).chain(self.outcomes.keys());
        let mut touched: Vec<&ObjectId> = touched.collect();
        touched.sort_unstable();
        touched.dedup();
        let touched: Vec<ObjectId> = touched.into_iter().cloned().collect();
        for object in touched {
            if self.gone.contains(&object) {
                continue;
            }
            let old = self.known(&object)?;
            if old.is_none() && !self.admitted.contains(&object) {
                continue;
            }
            self.put_object(object, old)?;
        }
        Ok(())
    }

    fn put_object(&mut self, object: ObjectId, old: Option<Known>) -> Result<(), Failure<V, T>> {
        let links = self.links_after(&object)?;
        if object == *self.root && old.is_none() {
            self.out.ops.push(Op::Root { object: object.clone() });
        } else if old.is_none() && links.is_empty() {
            // Admitted, but the directory that held it went away meanwhile.
            return Ok(());
        }
        let outcome = self.outcomes.get(&object);
        let mut known = match (outcome, &old) {
            (Some(Outcome::Ship { known, content }), _) => {
                self.out.ops.push(Op::Put {
                    object: object.clone(),
                    state: known.state.clone(),
                    content: content.clone(),
                    // The replica's root directory is there already.
                    new: old.is_none() && object != *self.root,
                    links: links.len() as u32,
                });
                known.clone()
            }
            (Some(Outcome::Same { known }), _) => known.clone(),
            (Some(Outcome::Large { size }), Some(old)) => {
                let reason = HoldReason::Large { size: *size };
                self.hold_content(&object, reason);
                old.clone()
            }
            (Some(Outcome::Unreadable { error }), Some(old)) => {
                let reason = HoldReason::Unreadable { error: error.clone() };
                self.hold_content(&object, reason);
                old.clone()
            }
            (Some(Outcome::Refused { error }), Some(old)) => {
                self.hold_content(&object, HoldReason::Refused { error: error.clone() });
                old.clone()
            }
            (Some(Outcome::Away), Some(old)) => {
                // Without a name it is an orphan: seen again, it is read whole.
                if !links.is_empty() || object == *self.root {
                    let content = self.resolve.asked.wants_content(&object);
                    self.out.astray.object(object.clone(), What { content, attributes: true });
                }
                old.clone()
            }
            (_, Some(old)) => old.clone(),
            (_, None) => return Ok(()),
        };
        known.links = links.len() as u32;
        if known.nlink > known.links && known.state.kind != Kind::Directory {
            self.out.linked.push(object.clone());
        }
        known.entry = match known.entry {
            Some(place) if links.contains(&place) => Some(place),
            _ => links.first().cloned(),
        };
        self.restate(&object, &links);
        if old.as_ref() != Some(&known) {
            self.out.delta.dead_lists.extend(dead_list(old.as_ref(), Some(&known)));
            self.out.delta.objects.push((object, Some(known)));
        }
        Ok(())
    }

    /// Names of it may be held already, see [`Self::hold_entry`].
    fn hold_content(&mut self, object: &ObjectId, reason: HoldReason) {
        let entries = self.out.holds.remove(object).map(|hold| hold.entries).unwrap_or_default();
        self.out.holds.insert(object.clone(), Hold { reason, entries });
    }

    /// An object that lost an entry and gained none keeps others: one of them
    /// is said, so that the destination knows a living name.
    fn restate(&mut self, object: &ObjectId, links: &[Place]) {
        let lost = self.lost.get(object).is_some_and(|places| !places.is_empty());
        let gained = self.gained.get(object).is_some_and(|places| !places.is_empty());
        if let Some((directory, name)) = links.first()
            && lost
            && !gained
        {
            self.out.ops.push(Op::Entry {
                directory: directory.clone(),
                name: name.clone(),
                old: Some(object.clone()),
                new: Some(object.clone()),
            });
        }
    }

    fn entry_ops(&mut self) -> Result<(), Failure<V, T>> {
        for ((directory, name), binding) in std::mem::take(&mut self.changed) {
            self.out.delta.entries.push(EntryChange {
                directory: directory.clone(),
                name: name.clone(),
                old: binding.old.clone(),
                new: binding.new.clone(),
            });
            self.out.ops.push(Op::Entry { directory, name, old: binding.old, new: binding.new });
        }
        Ok(())
    }
}
