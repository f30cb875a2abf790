//! From slots to steps: pure, deterministic, and careful about the order.
//!
//! 1. *Detach.* What stands in the way and lives on goes to the orphan area;
//!    what dies and is not replaced by rename is unlinked.
//! 2. *Attach.* Renames and links into place. A non-directory that moves goes
//!    directly once its target is free, so that its readers miss it as briefly
//!    as can be; a cycle is broken by detaching one of its members. A directory
//!    moves directly only when no other one moves (else a parent could be on its
//!    way into its former child). New directories come last, deepest first.
//! 3. *Drop.* Dead directories, children before parents.
//! 4. *Content and attributes.* Files, then directories, children before parents.

use std::collections::{BTreeMap, BTreeSet};
use std::convert::Infallible;

use foldhash::HashMap;
use replicator_common::id::{BatchId, ObjectId, ReplicaHandle};
use replicator_common::name::Name;
use replicator_common::object::{Kind, ObjectState};
use replicator_common::wire::Op;

use super::slots::{Change, Fate, Inode, Parts, Slot};
use super::{Place, Step, Within, area_name};
use crate::objects::{Entry, Known, Objects};

/// What arrived for an object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Arrival {
    /// It stands complete in staging.
    Whole {
        /// Where.
        place: Place,
        /// The staged object itself.
        handle: ReplicaHandle,
        /// Its state as staged; `None` when attributes are still to be set.
        state: Option<ObjectState>,
    },
    /// Literal bytes and a list of where they go.
    Patch {
        /// The bytes.
        literals: Place,
        /// The list.
        list: Place,
    },
    /// Bytes that follow those that the replica has.
    Append {
        /// Where they begin.
        at: u64,
        /// The bytes.
        bytes: Vec<u8>,
    },
    /// The replica cannot make such an object.
    Absent,
}

/// What arrived, by object.
pub type Staged = HashMap<ObjectId, Arrival>;

/// A promise of the source (see ARCHITECTURE.md) that a batch breaks.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[allow(missing_docs)]
pub enum Violation {
    #[error("the {what} of object {object} is named twice in one batch")]
    Twice { what: &'static str, object: ObjectId },
    #[error("object {object} is not in the replica and does not come with the batch")]
    Unknown { object: ObjectId },
    #[error("object {object} is said to be new but is in the replica")]
    NotNew { object: ObjectId },
    #[error("object {object} changed its kind")]
    KindChanged { object: ObjectId },
    #[error("nothing was staged for object {object}")]
    NotStaged { object: ObjectId },
    #[error("new object {object} has no entry")]
    Unplaced { object: ObjectId },
    #[error("object {object} holds entries but is no directory")]
    NotDirectory { object: ObjectId },
    #[error("an entry is placed into directory {object}, which is dropped")]
    IntoDropped { object: ObjectId },
    #[error("object {object} is given an entry and an end")]
    PlacedAndEnded { object: ObjectId },
    #[error("object {object} loses its last known entry and nothing says what becomes of it")]
    Detached { object: ObjectId },
    #[error("directory {object} has two entries")]
    DirectoryTwice { object: ObjectId },
    #[error("directory {object} would be inside itself")]
    Loop { object: ObjectId },
    #[error("{object} is or would be the root and something else")]
    RootMoved { object: ObjectId },
    #[error("{name} in the root is the destination's own")]
    Reserved { name: Name },
}

/// Why a batch has no plan.
#[derive(Debug, thiserror::Error)]
pub enum PlanError<E> {
    /// The source broke a promise.
    #[error(transparent)]
    Violation(#[from] Violation),
    /// The objects map could not be read.
    #[error("cannot read the objects map: {0}")]
    Objects(E),
}

/// A batch's plan.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Planned {
    /// What to do, in order.
    pub steps: Vec<Step>,
    /// Rows of the objects map after the batch; `None` removes one.
    pub rows: Vec<(ObjectId, Option<Known>)>,
    /// Directories of the replica whose entries change and of whose time the
    /// source says nothing: it is kept.
    pub touched: Vec<ReplicaHandle>,
    /// Foreign objects that go to lost+found, with their names there.
    pub set_aside: Vec<(ObjectId, Name)>,
}

/// Plans a batch. `reserved` is our hidden directory's name, which no entry of
/// the root may have; `root` is the replica's root.
pub fn plan<O: Objects>(
    objects: &O,
    batch: BatchId,
    ops: Vec<Op>,
    staged: &Staged,
    reserved: &Name,
    root: &ReplicaHandle,
) -> Result<Planned, PlanError<O::Error>> {
    let parts = Parts::collect(objects, staged, batch, ops, reserved, root)?;
    let mut planner = Planner::new(parts);
    planner.detach()?;
    planner.attach()?;
    planner.drop_directories()?;
    planner.contents()?;
    planner.rows()?;
    planner.touched()?;
    Ok(planner.out)
}

/// How one inode gets from its old places to its new ones.
#[derive(Clone, Debug, Default)]
pub(super) struct Route {
    /// Slots it leaves.
    leaves: Vec<Slot>,
    /// Slots it enters, in order.
    pub(super) enters: Vec<Slot>,
    /// It has a slot that stays.
    kept: bool,
    /// The slot it is renamed away from, when it must be carried.
    carried_from: Option<Slot>,
    /// It waits in the orphan area between phases.
    detached: bool,
}

pub(super) struct Planner<'a, O: Objects> {
    pub(super) parts: Parts<'a, O>,
    pub(super) routes: BTreeMap<ReplicaHandle, Route>,
    pub(super) out: Planned,
}

impl<'a, O: Objects> Planner<'a, O> {
    fn new(parts: Parts<'a, O>) -> Self {
        let mut routes: BTreeMap<ReplicaHandle, Route> = BTreeMap::new();
        for (slot, Change { before, after }) in &parts.slots {
            if before == after {
                if let Some(handle) = before {
                    routes.entry(handle.clone()).or_default().kept = true;
                }
                continue;
            }
            if let Some(handle) = before {
                routes.entry(handle.clone()).or_default().leaves.push(slot.clone());
            }
            if let Some(handle) = after {
                routes.entry(handle.clone()).or_default().enters.push(slot.clone());
            }
        }
        for (handle, route) in &mut routes {
            let staged = parts.inodes.get(handle).is_some_and(|inode| inode.staged.is_some());
            if !route.kept && !staged && !route.enters.is_empty() {
                // A slot that nothing enters is the best to leave from: nobody
                // has to wait for it.
                let free = |slot: &&Slot| parts.slots[slot].after.is_none();
                let leaves = &route.leaves;
                route.carried_from = leaves.iter().find(free).or(leaves.first()).cloned();
            }
        }
        Self { parts, routes, out: Planned::default() }
    }

    pub(super) fn inode(&self, handle: &ReplicaHandle) -> Option<&Inode> {
        self.parts.inodes.get(handle)
    }

    pub(super) fn is_directory(&self, handle: &ReplicaHandle) -> bool {
        self.inode(handle).is_some_and(|inode| inode.kind == Kind::Directory)
    }

    fn carried_from(&self, handle: &ReplicaHandle) -> Option<&Slot> {
        self.routes.get(handle)?.carried_from.as_ref()
    }

    /// Whether what leaves `slot` is replaced there in one rename: both are
    /// non-directories and the old one is not needed from this name.
    fn replaced_at(&self, slot: &Slot) -> bool {
        let change = &self.parts.slots[slot];
        match (&change.before, &change.after) {
            (Some(before), Some(after)) => {
                !self.is_directory(before)
                    && !self.is_directory(after)
                    && self.carried_from(before) != Some(slot)
            }
            _ => false,
        }
    }

    fn place(&mut self, slot: &Slot) -> Result<Place, PlanError<O::Error>> {
        Ok(match slot {
            Slot::Entry(Entry { directory, name }) => match self.parts.handle_after(directory)? {
                Some(handle) => Place { within: Within::Replica(handle), name: name.clone() },
                None => return Err(Violation::Unknown { object: directory.clone() }.into()),
            },
            Slot::Orphan(object) => Place::orphan(object),
            Slot::Lost(object) => Place::lost(object),
        })
    }

    fn moving(&self, handle: &ReplicaHandle) -> Place {
        Place::moving(self.inode(handle).map_or(handle, |inode| &inode.object))
    }

    // ------------------------------------------------------------- phase 1

    fn detach(&mut self) -> Result<(), PlanError<O::Error>> {
        self.choose_detached();
        self.detach_departures()?;
        let handles: Vec<_> = self.routes.keys().cloned().collect();
        for handle in handles {
            let route = self.routes[&handle].clone();
            let directory = self.is_directory(&handle);
            for slot in &route.leaves {
                let at = self.place(slot)?;
                let object = handle.clone();
                if route.carried_from.as_ref() == Some(slot) {
                    self.carry_away(&handle, &route, at)?;
                } else if directory {
                    // It dies. Its name is needed now, the removal waits for
                    // its children to be out.
                    if self.parts.slots[slot].after.is_some() {
                        let to = self.moving(&handle);
                        self.out.steps.push(Step::Move { object, from: at, to, over: None });
                    }
                } else if !self.replaced_at(slot) {
                    self.out.steps.push(Step::Unlink { object, at });
                }
            }
        }
        Ok(())
    }

    /// The first step of a carried object: into its private place at once, or
    /// aside, or (for a direct move) nothing yet.
    fn carry_away(
        &mut self,
        handle: &ReplicaHandle,
        route: &Route,
        from: Place,
    ) -> Result<(), PlanError<O::Error>> {
        let private = matches!(route.enters[0], Slot::Orphan(_) | Slot::Lost(_));
        let object = handle.clone();
        if private {
            let to = self.place(&route.enters[0])?;
            self.out.steps.push(Step::Move { object, from, to, over: None });
        } else if route.detached {
            let to = self.moving(handle);
            self.out.steps.push(Step::Move { object, from, to, over: None });
        }
        Ok(())
    }

    /// Decides which of the carried objects cannot be renamed directly.
    fn choose_detached(&mut self) {
        let in_tree = |route: &Route| {
            matches!(route.carried_from, Some(Slot::Entry(_)))
                && matches!(route.enters.first(), Some(Slot::Entry(_)))
        };
        let movers: Vec<_> =
            self.routes.iter().filter(|(_, r)| in_tree(r)).map(|(h, _)| h.clone()).collect();
        let directories: Vec<_> =
            movers.iter().filter(|handle| self.is_directory(handle)).cloned().collect();
        if directories.len() > 1 {
            for handle in &directories {
                if let Some(route) = self.routes.get_mut(handle) {
                    route.detached = true;
                }
            }
        }
        // Each mover waits for at most one other (the one that leaves its
        // target), so cycles are found by following that one.
        let mut settled = BTreeSet::new();
        for start in &movers {
            let mut trail = Vec::new();
            let mut at = Some(start.clone());
            while let Some(handle) = at {
                if self.routes[&handle].detached || settled.contains(&handle) {
                    break;
                }
                if trail.contains(&handle) {
                    if let Some(route) = self.routes.get_mut(&handle) {
                        route.detached = true;
                    }
                    break;
                }
                at = self.waits_for(&handle);
                trail.push(handle);
            }
            settled.extend(trail);
        }
    }

    /// The object that must have left before `handle` can enter its first slot
    /// directly.
    fn waits_for(&self, handle: &ReplicaHandle) -> Option<ReplicaHandle> {
        let slot = self.routes.get(handle)?.enters.first()?;
        self.leaver(slot)
    }

    /// The object that is carried directly away from `slot`.
    fn leaver(&self, slot: &Slot) -> Option<ReplicaHandle> {
        let before = self.parts.slots.get(slot)?.before.as_ref()?;
        let route = self.routes.get(before)?;
        let direct = route.carried_from.as_ref() == Some(slot)
            && !route.detached
            && matches!(route.enters.first(), Some(Slot::Entry(_)));
        direct.then(|| before.clone())
    }

    // ------------------------------------------------------------- phase 2

    fn attach(&mut self) -> Result<(), PlanError<O::Error>> {
        let mut done = BTreeSet::new();
        let handles: Vec<_> = self.routes.keys().cloned().collect();
        for handle in &handles {
            let direct =
                self.routes[handle].carried_from.is_some() && !self.routes[handle].detached;
            let from_orphans = matches!(self.carried_from(handle), Some(Slot::Orphan(_)));
            if !self.is_directory(handle) || (direct && !from_orphans) {
                for slot in self.routes[handle].enters.clone() {
                    self.enter(&slot, &mut done)?;
                }
            }
        }
        self.attach_arrivals()?;
        let mut directories = Vec::new();
        let mut depths = Depths::default();
        for handle in &handles {
            if self.is_directory(handle) {
                let depth = self.attach_depth(handle, &mut depths);
                directories.extend(self.routes[handle].enters.iter().map(|s| (depth, s.clone())));
            }
        }
        // Deepest first: a new tree appears whole when its top does.
        directories.sort_by(|a, b| b.cmp(a));
        for (_, slot) in directories {
            self.enter(&slot, &mut done)?;
        }
        Ok(())
    }

    /// How many of the directories above are themselves attached by this batch.
    fn attach_depth(&self, handle: &ReplicaHandle, depths: &mut Depths) -> usize {
        let Some(inode) = self.inode(handle) else { return 0 };
        let added = &self.parts.added;
        // Ends: the parts were checked to hold no loop.
        let above = |at: &ObjectId| Ok(added.get(at).map(|added| added[0].directory.clone()));
        let depth: Result<usize, Infallible> = depths.of(&inode.object, above);
        match depth {
            Ok(depth) => depth,
        }
    }

    /// Fills a slot, after whatever must leave it first. The chain of leavers
    /// is followed without recursion: a log rotation may be long.
    fn enter(&mut self, slot: &Slot, done: &mut BTreeSet<Slot>) -> Result<(), PlanError<O::Error>> {
        let mut chain = vec![slot.clone()];
        while let Some(leaver) = chain.last().and_then(|slot| self.leaver(slot)) {
            let next = self.routes[&leaver].enters[0].clone();
            if done.contains(&next) || chain.contains(&next) {
                break;
            }
            chain.push(next);
        }
        for slot in chain.into_iter().rev() {
            if done.insert(slot.clone()) {
                self.fill(&slot)?;
            }
        }
        Ok(())
    }

    fn fill(&mut self, slot: &Slot) -> Result<(), PlanError<O::Error>> {
        let change = self.parts.slots[slot].clone();
        let Some(object) = change.after else { return Ok(()) };
        let to = self.place(slot)?;
        let over = if self.replaced_at(slot) { change.before } else { None };
        let staged = self.inode(&object).and_then(|inode| inode.staged.clone());
        // Not cloned as a whole, and searched by halves: a file may enter tens of
        // thousands of slots in one batch.
        let route = &self.routes[&object];
        let first = route.enters.first() == Some(slot) && !route.kept;
        let index = route.enters.binary_search(slot).unwrap_or(0);
        let (detached, carried_from) = (route.detached, route.carried_from.clone());
        if first {
            let from = match (staged, &carried_from) {
                (Some(place), _) => place,
                (None, Some(_)) if detached => self.moving(&object),
                (None, Some(from)) => self.place(from)?,
                // Neither staged nor anywhere: the row has no handle, and then
                // there is no inode either.
                (None, None) => return Ok(()),
            };
            // Into a private place it went in phase 1.
            if !(matches!(slot, Slot::Orphan(_) | Slot::Lost(_)) && carried_from.is_some()) {
                self.out.steps.push(Step::Move { object, from, to, over });
            }
        } else {
            let inode = self.inode(&object).map_or(&object, |inode| &inode.object);
            let name = area_name(inode, &format!(".{index}"));
            let spare = Place { within: Within::Orphans, name };
            self.out.steps.push(Step::Link { object, to, over, spare });
        }
        Ok(())
    }

    // ------------------------------------------------------------- phase 3

    fn drop_directories(&mut self) -> Result<(), PlanError<O::Error>> {
        let mut dying = Vec::new();
        for (handle, route) in &self.routes {
            if self.is_directory(handle) && route.enters.is_empty() && !route.kept {
                dying.push((handle.clone(), route.leaves.clone()));
            }
        }
        let mut steps = Vec::new();
        let mut depths = Depths::default();
        for (object, leaves) in dying {
            for slot in leaves {
                let depth = self.dying_depth(&slot, &mut depths)?;
                let vacated = self.parts.slots[&slot].after.is_some();
                let at = if vacated { self.moving(&object) } else { self.place(&slot)? };
                steps.push((depth, Step::RemoveDirectory { object: object.clone(), at }));
            }
        }
        steps.sort_by_key(|(depth, _)| std::cmp::Reverse(*depth));
        self.out.steps.extend(steps.into_iter().map(|(_, step)| step));
        Ok(())
    }

    /// How many dropped directories stand above a slot.
    fn dying_depth(
        &mut self,
        slot: &Slot,
        depths: &mut Depths,
    ) -> Result<usize, PlanError<O::Error>> {
        let Slot::Entry(entry) = slot else { return Ok(0) };
        let parts = &mut self.parts;
        let dropped =
            |parts: &Parts<'_, O>, at: &ObjectId| parts.fates.get(at) == Some(&Fate::Drop);
        if !dropped(parts, &entry.directory) {
            return Ok(0);
        }
        let depth: Result<usize, PlanError<O::Error>> = depths.of(&entry.directory, |at| {
            let known = parts.known(at)?;
            let above = known.and_then(|known| known.position.entry().cloned());
            Ok(above.map(|entry| entry.directory).filter(|above| dropped(parts, above)))
        });
        Ok(depth? + 1)
    }

    // ------------------------------------------------------------- phase 4

    fn contents(&mut self) -> Result<(), PlanError<O::Error>> {
        let puts: Vec<_> = self.parts.puts.iter().map(|(o, p)| (o.clone(), p.clone())).collect();
        let mut directories = Vec::new();
        let mut depths = Depths::default();
        for (object, put) in puts {
            if self.parts.fates.get(&object) == Some(&Fate::Drop) {
                continue;
            }
            let Some(handle) = self.parts.handle_after(&object)? else { continue };
            let in_place = self.parts.in_place(&object)?;
            let mut attributes_stand = false;
            match self.parts.staged.get(&object) {
                Some(Arrival::Whole { place, .. }) if in_place => {
                    let from = place.clone();
                    self.out.steps.push(Step::Rewrite { object: handle.clone(), from });
                }
                Some(Arrival::Whole { state, .. }) => {
                    attributes_stand = state.as_ref() == Some(&put.state);
                }
                Some(Arrival::Patch { literals, list }) => self.out.steps.push(Step::Patch {
                    object: handle.clone(),
                    literals: literals.clone(),
                    list: list.clone(),
                    size: put.state.size,
                }),
                Some(Arrival::Append { at, bytes }) => {
                    let (object, at, bytes) = (handle.clone(), *at, bytes.clone());
                    self.out.steps.push(Step::Append { object, at, bytes });
                }
                Some(Arrival::Absent) | None => {}
            }
            let kind = put.state.kind;
            let step = Step::Attributes { object: handle, state: put.state };
            if kind == Kind::Directory {
                directories.push((self.put_depth(&object, &mut depths)?, step));
            } else if !attributes_stand {
                self.out.steps.push(step);
            }
        }
        directories.sort_by_key(|(depth, _)| std::cmp::Reverse(*depth));
        self.out.steps.extend(directories.into_iter().map(|(_, step)| step));
        Ok(())
    }

    /// How many of the directories above get attributes in this batch too. (A
    /// parent that becomes unsearchable would hide its children from an applier
    /// that goes by path.)
    fn put_depth(
        &mut self,
        object: &ObjectId,
        depths: &mut Depths,
    ) -> Result<usize, PlanError<O::Error>> {
        let parts = &mut self.parts;
        depths.of(object, |at| {
            Ok(parts.parent_after(at)?.filter(|parent| parts.puts.contains_key(parent)))
        })
    }
}

/// How far objects are from the end of a chain upwards. Remembered, so that a
/// branch of many levels is followed once, not once a level.
#[derive(Default)]
struct Depths(HashMap<ObjectId, usize>);

impl Depths {
    /// How many steps `above` leads from `object`.
    fn of<E>(
        &mut self,
        object: &ObjectId,
        mut above: impl FnMut(&ObjectId) -> Result<Option<ObjectId>, E>,
    ) -> Result<usize, E> {
        let mut trail = vec![object.clone()];
        let mut depth = 0;
        while let Some(at) = trail.last() {
            if let Some(known) = self.0.get(at) {
                depth = *known;
                trail.pop();
                break;
            }
            match above(at)? {
                // Rows of the map that lead in a circle must not hang us.
                Some(next) if trail.len() < crate::objects::DEPTH_MAX => trail.push(next),
                _ => {
                    if let Some(end) = trail.pop() {
                        self.0.insert(end, 0);
                    }
                    break;
                }
            }
        }
        for at in trail.into_iter().rev() {
            depth += 1;
            self.0.insert(at, depth);
        }
        Ok(depth)
    }
}
