//! From any old state to any new one, interrupted after any step and redone.

use std::collections::{BTreeMap, BTreeSet};
use std::convert::Infallible;

use proptest::prelude::*;
use replicator_common::id::{BatchId, ObjectId, ReplicaHandle};
use replicator_common::name::Name;
use replicator_common::object::{Attributes, Kind, ObjectState};
use replicator_common::time::Timestamp;
use replicator_common::wire::{ContentSource, Op};

use super::execute::{self, Finding};
use super::model::{Model, Node, Stop};
use super::plan::{Arrival, Planned, Staged, plan};
use super::{Place, Step, Within};
use crate::objects::{Known, Objects, Position};

mod deep;

/// The source, as naive as can be: objects, entries, content.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Source {
    objects: BTreeMap<ObjectId, (Kind, Vec<u8>, u32)>,
    entries: BTreeMap<(ObjectId, Name), ObjectId>,
    next: u32,
}

fn source_id(n: u32) -> ObjectId {
    ObjectId::new(1, &n.to_be_bytes()).unwrap()
}

fn name(n: u8) -> Name {
    Name::new(&[b'a' + n % 6]).unwrap()
}

impl Source {
    fn new() -> Self {
        let mut source = Self::default();
        source.make(Kind::Directory);
        source
    }

    fn make(&mut self, kind: Kind) -> ObjectId {
        let id = source_id(self.next);
        let content = if kind == Kind::File { self.next.to_be_bytes().to_vec() } else { vec![] };
        self.objects.insert(id.clone(), (kind, content, 0o600));
        self.next += 1;
        id
    }

    fn links(&self, object: &ObjectId) -> usize {
        self.entries.values().filter(|o| *o == object).count()
    }

    fn directories(&self) -> Vec<ObjectId> {
        // Only those that hang on the root: an orphan is out of reach.
        let reach = |id: &ObjectId| {
            let mut at = id.clone();
            while at != source_id(0) {
                match self.entries.iter().find(|(_, o)| **o == at) {
                    Some(((parent, _), _)) => at = parent.clone(),
                    None => return false,
                }
            }
            true
        };
        let all = self.objects.iter().filter(|(_, o)| o.0 == Kind::Directory).map(|(id, _)| id);
        all.filter(|id| reach(id)).cloned().collect()
    }

    fn inside(&self, object: &ObjectId, ancestor: &ObjectId) -> bool {
        let mut at = object.clone();
        loop {
            if at == *ancestor {
                return true;
            }
            match self.entries.iter().find(|(_, o)| **o == at) {
                Some(((parent, _), _)) => at = parent.clone(),
                None => return false,
            }
        }
    }

    fn is_empty(&self, directory: &ObjectId) -> bool {
        !self.entries.keys().any(|(d, _)| d == directory)
    }

    fn is_directory(&self, object: &ObjectId) -> bool {
        self.objects[object].0 == Kind::Directory
    }

    /// Whether `object` may be renamed or exchanged to `to` in this directory.
    fn fits(&self, object: &ObjectId, directory: &ObjectId) -> bool {
        !self.is_directory(object) || !self.inside(directory, object)
    }

    fn act(&mut self, action: &Action) {
        let directories = self.directories();
        let pick = |n: u8| directories[n as usize % directories.len()].clone();
        let slots: Vec<_> = self.entries.keys().cloned().collect();
        let slot =
            |n: u8| (!slots.is_empty()).then(|| slots[n as usize % slots.len().max(1)].clone());
        match *action {
            Action::Create(d, n, directory) => {
                let to = (pick(d), name(n));
                if !self.entries.contains_key(&to) {
                    let kind = if directory { Kind::Directory } else { Kind::File };
                    let id = self.make(kind);
                    self.entries.insert(to, id);
                }
            }
            Action::Write(n) => {
                if let Some(object) = slot(n).and_then(|slot| self.entries.get(&slot).cloned()) {
                    let next = self.next;
                    self.next += 1;
                    let entry = self.objects.get_mut(&object).unwrap();
                    if entry.0 == Kind::File {
                        entry.1 = next.to_be_bytes().to_vec();
                    }
                    entry.2 = 0o600 + next % 8;
                }
            }
            Action::Rename(n, d, m) => {
                let Some(from) = slot(n) else { return };
                let (object, to) = (self.entries[&from].clone(), (pick(d), name(m)));
                let victim = self.entries.get(&to).cloned();
                let allowed = match &victim {
                    None => true,
                    Some(victim) if *victim == object => false,
                    Some(victim) if self.is_directory(victim) => {
                        self.is_directory(&object) && self.is_empty(victim)
                    }
                    Some(_) => !self.is_directory(&object),
                };
                if allowed && self.fits(&object, &to.0) && victim.as_ref() != Some(&to.0) {
                    self.entries.remove(&from);
                    self.entries.insert(to, object);
                }
            }
            Action::Exchange(n, m) => {
                let (Some(a), Some(b)) = (slot(n), slot(m)) else { return };
                let (x, y) = (self.entries[&a].clone(), self.entries[&b].clone());
                if x != y && self.fits(&x, &b.0) && self.fits(&y, &a.0) {
                    self.entries.insert(a, y);
                    self.entries.insert(b, x);
                }
            }
            Action::Link(n, d, m) => {
                let Some(from) = slot(n) else { return };
                let (object, to) = (self.entries[&from].clone(), (pick(d), name(m)));
                if !self.is_directory(&object) && !self.entries.contains_key(&to) {
                    self.entries.insert(to, object);
                }
            }
            Action::Unlink(n) => {
                let Some(at) = slot(n) else { return };
                let object = self.entries[&at].clone();
                if !self.is_directory(&object) || self.is_empty(&object) {
                    self.entries.remove(&at);
                }
            }
            Action::Detach(n) => {
                if let Some(at) = slot(n) {
                    self.entries.remove(&at);
                }
            }
            Action::Reattach(n, d, m) => {
                let orphans: Vec<_> =
                    self.objects.keys().skip(1).filter(|o| self.links(o) == 0).cloned().collect();
                let to = (pick(d), name(m));
                if !orphans.is_empty() && !self.entries.contains_key(&to) {
                    let object = orphans[n as usize % orphans.len()].clone();
                    if self.fits(&object, &to.0) {
                        self.entries.insert(to, object);
                    }
                }
            }
        }
    }
}

#[derive(Clone, Debug)]
enum Action {
    Create(u8, u8, bool),
    Write(u8),
    Rename(u8, u8, u8),
    Exchange(u8, u8),
    Link(u8, u8, u8),
    Unlink(u8),
    Detach(u8),
    Reattach(u8, u8, u8),
}

fn action() -> impl Strategy<Value = Action> {
    let b = any::<u8>;
    prop_oneof![
        4 => (b(), b(), any::<bool>()).prop_map(|(d, n, k)| Action::Create(d, n, k)),
        2 => b().prop_map(Action::Write),
        4 => (b(), b(), b()).prop_map(|(n, d, m)| Action::Rename(n, d, m)),
        2 => (b(), b()).prop_map(|(n, m)| Action::Exchange(n, m)),
        2 => (b(), b(), b()).prop_map(|(n, d, m)| Action::Link(n, d, m)),
        2 => b().prop_map(Action::Unlink),
        1 => b().prop_map(Action::Detach),
        1 => (b(), b(), b()).prop_map(|(n, d, m)| Action::Reattach(n, d, m)),
    ]
}

/// The destination: the model file system and the objects map.
#[derive(Clone, Debug)]
struct Replica {
    tree: Model,
    map: BTreeMap<ObjectId, Known>,
    batch: u64,
}

struct Map<'a>(&'a BTreeMap<ObjectId, Known>);

impl Objects for Map<'_> {
    type Error = Infallible;

    fn get(&self, object: &ObjectId) -> Result<Option<Known>, Infallible> {
        Ok(self.0.get(object).cloned())
    }
}

fn state(kind: Kind, mode: u32, size: u64) -> ObjectState {
    let attributes = Attributes { mode, uid: 0, gid: 0, mtime: Timestamp(0), xattrs: Vec::new() };
    ObjectState { kind, attributes, size, rdev: 0 }
}

/// The operations that lead from `old` to `new`, as the source promises them.
/// `dead` says which of the objects without entries are dead.
fn diff(old: &Source, new: &Source, dead: &BTreeSet<ObjectId>, first: bool) -> Vec<Op> {
    let mut ops = Vec::new();
    if first {
        ops.push(Op::Root { object: source_id(0) });
    }
    let slots: BTreeSet<_> = old.entries.keys().chain(new.entries.keys()).cloned().collect();
    let mut changed_directories = BTreeSet::new();
    let mut lost_one = BTreeSet::new();
    for slot in &slots {
        let (before, after) = (old.entries.get(slot), new.entries.get(slot));
        if before != after {
            changed_directories.insert(slot.0.clone());
            lost_one.extend(before.cloned());
            ops.push(Op::Entry {
                directory: slot.0.clone(),
                name: slot.1.clone(),
                old: before.cloned(),
                new: after.cloned(),
            });
        }
    }
    for object in &lost_one {
        let stays = |slot: &&(ObjectId, Name)| {
            old.entries.get(*slot) == Some(object) && new.entries.get(*slot) == Some(object)
        };
        if let Some(slot) = slots.iter().find(stays) {
            ops.push(Op::Entry {
                directory: slot.0.clone(),
                name: slot.1.clone(),
                old: Some(object.clone()),
                new: Some(object.clone()),
            });
        }
    }
    for (object, (kind, content, mode)) in &new.objects {
        let before = old.objects.get(object);
        let had = old.links(object);
        let has = new.links(object);
        let is_root = *object == source_id(0);
        if has == 0 && !is_root {
            match (before, dead.contains(object)) {
                (None, _) => continue,
                (Some(_), true) => ops.push(Op::Drop { object: object.clone() }),
                (Some(_), false) if had > 0 => ops.push(Op::Orphan { object: object.clone() }),
                (Some(_), false) => {}
            }
            if dead.contains(object) {
                continue;
            }
        }
        let new_content = before.is_none_or(|b| b.1 != *content);
        let restate = changed_directories.contains(object) || had != has;
        if before.is_none_or(|b| b != &(*kind, content.clone(), *mode)) || restate {
            let packed = *kind == Kind::File && new_content;
            ops.push(Op::Put {
                object: object.clone(),
                state: state(*kind, *mode, content.len() as u64),
                content: if packed {
                    ContentSource::Packed { version: 1 }
                } else {
                    ContentSource::Unchanged
                },
                new: before.is_none() && !is_root,
                links: has.max(1) as u32,
            });
        }
    }
    ops
}

impl Replica {
    fn new() -> Self {
        Self { tree: Model::new(), map: BTreeMap::new(), batch: 0 }
    }

    /// What the receiver and the sealer do: files and new directories in staging.
    fn stage(&mut self, ops: &[Op], source: &Source) -> Staged {
        let mut staged = Staged::new();
        for op in ops {
            let Op::Put { object, state, content, new, .. } = op else { continue };
            let node = match content {
                ContentSource::Packed { .. } => Node::File(source.objects[object].1.clone()),
                _ if *new => Node::Directory(BTreeMap::new()),
                _ => continue,
            };
            let handle = self.tree.create(node);
            let place = Place {
                within: Within::Staging(0),
                name: super::area_name(object, &format!(".{}", self.batch)),
            };
            self.tree.place(&place, &handle);
            self.tree.modes.insert(handle.clone(), state.attributes.mode);
            let state = (state.kind == Kind::File).then(|| state.clone());
            staged.insert(object.clone(), Arrival::Whole { place, handle, state });
        }
        staged
    }

    fn plan(&mut self, ops: Vec<Op>, source: &Source) -> Planned {
        self.batch += 1;
        let staged = self.stage(&ops, source);
        let reserved = Name::new(b".replicator").unwrap();
        let root = self.tree.root.clone();
        plan(&Map(&self.map), BatchId(self.batch), ops, &staged, &reserved, &root).unwrap()
    }

    fn commit(&mut self, planned: &Planned) {
        for (object, row) in &planned.rows {
            match row {
                Some(row) => drop(self.map.insert(object.clone(), row.clone())),
                None => drop(self.map.remove(object)),
            }
        }
    }

    fn check(&self, source: &Source, dead: &BTreeSet<ObjectId>) {
        let mut found = BTreeMap::new();
        for (object, known) in &self.map {
            let handle = known.handle.clone().unwrap();
            let (kind, content, mode) = &source.objects[object];
            assert_eq!(known.kind, *kind);
            let node = self.tree.nodes.get(&handle);
            let node = node.unwrap_or_else(|| panic!("{object} has lost its inode"));
            assert_eq!(self.tree.modes.get(&handle).unwrap_or(&0o600), mode, "mode of {object}");
            match node {
                Node::File(bytes) => assert_eq!(bytes, content, "content of {object}"),
                Node::Directory(names) => {
                    for (name, child) in names {
                        found.insert((object.clone(), name.clone()), child.clone());
                    }
                }
            }
            match &known.position {
                Position::Root => assert_eq!(*object, source_id(0)),
                Position::Orphan { .. } => assert_eq!(source.links(object), 0),
                Position::Entry(entry) => {
                    let slot = (entry.directory.clone(), entry.name.clone());
                    assert_eq!(source.entries.get(&slot), Some(object), "row of {object}");
                    assert_eq!(known.links as usize, source.links(object));
                }
            }
        }
        let expected: BTreeMap<_, ReplicaHandle> = source
            .entries
            .iter()
            .filter(|((directory, _), object)| !dead.contains(directory) && !dead.contains(object))
            .map(|(slot, object)| (slot.clone(), self.map[object].handle.clone().unwrap()))
            .collect();
        assert_eq!(found, expected);
        assert_eq!(self.tree.private_names(), Vec::<Name>::new());
    }
}

/// Names that hold a file before and after and whose file before dies: a
/// reader must never miss them. (Also those that nothing changes.)
fn never_missing(
    replica: &Replica,
    old: &Source,
    new: &Source,
    dead: &BTreeSet<ObjectId>,
) -> Vec<(ReplicaHandle, Name)> {
    let file = |source: &Source, object: &ObjectId| source.objects[object].0 == Kind::File;
    old.entries
        .iter()
        .filter_map(|(slot, before)| {
            let after = new.entries.get(slot)?;
            let settled = before == after || dead.contains(before);
            if !(settled && file(old, before) && file(new, after)) {
                return None;
            }
            Some((replica.map.get(&slot.0)?.handle.clone()?, slot.1.clone()))
        })
        .collect()
}

/// How many names a file may have at any moment of the batch. The source reckons
/// so, and leaves out what the file system would refuse (its `plan::Limits`): a
/// name that goes makes room at once where nothing comes to stand.
fn most_names(replica: &Replica, old: &Source, new: &Source) -> BTreeMap<ReplicaHandle, usize> {
    let mut all = BTreeMap::new();
    for (object, known) in &replica.map {
        let (Some(handle), Kind::File) = (known.handle.clone(), known.kind) else { continue };
        let named = |source: &Source, slot| source.entries.get(slot) == Some(object);
        let lost: Vec<_> = old.entries.keys().filter(|s| named(old, s) && !named(new, s)).collect();
        let gained = new.entries.keys().filter(|s| named(new, s) && !named(old, s)).count();
        let free = lost.iter().filter(|slot| !new.entries.contains_key(**slot)).count();
        // In the orphan area it has one, and is moved from there.
        let before = old.links(object);
        let most = (before + gained).saturating_sub(free);
        all.insert(handle, most.max(before).max(1));
    }
    all
}

/// Objects that have no entry and are said to be dead: a directory takes along
/// what hangs below it, so that the plan stays closed.
fn choose_dead(source: &mut Source, seed: u32) -> BTreeSet<ObjectId> {
    let mut dead = BTreeSet::new();
    let loose: Vec<_> =
        source.objects.keys().skip(1).filter(|o| source.links(o) == 0).cloned().collect();
    for (i, object) in loose.into_iter().enumerate() {
        if (seed >> (i % 32)) & 1 == 1 {
            bury(source, object, &mut dead);
        }
    }
    dead
}

fn bury(source: &mut Source, object: ObjectId, dead: &mut BTreeSet<ObjectId>) {
    let below: Vec<_> = source.entries.keys().filter(|(d, _)| *d == object).cloned().collect();
    dead.insert(object);
    for slot in below {
        if let Some(child) = source.entries.remove(&slot)
            && source.links(&child) == 0
        {
            bury(source, child, dead);
        }
    }
}

fn round(
    replica: &mut Replica,
    old: &Source,
    new: &mut Source,
    seed: u32,
    crashes: &[usize],
) -> usize {
    let dead = choose_dead(new, seed);
    // Objects that came and went between two batches never travel.
    let unknown: Vec<_> = new
        .objects
        .keys()
        .filter(|o| !old.objects.contains_key(*o) && (dead.contains(*o) || new.links(o) == 0))
        .cloned()
        .collect();
    for object in unknown {
        // An orphan that the replica never had keeps its children out of it too.
        let mut gone = BTreeSet::new();
        if *object.as_bytes() != *source_id(0).as_bytes() {
            bury(new, object, &mut gone);
        }
        for object in gone {
            if !old.objects.contains_key(&object) {
                new.objects.remove(&object);
            }
        }
    }
    let loose: BTreeSet<_> = new
        .objects
        .keys()
        .filter(|o| new.links(o) == 0 && **o != source_id(0))
        .filter(|o| dead.contains(*o) || !old.objects.contains_key(*o))
        .cloned()
        .collect();
    let ops = diff(old, new, &loose, replica.batch == 0);
    let planned = replica.plan(ops, new);
    replica.tree.watched = never_missing(replica, old, new, &loose);
    replica.tree.most = most_names(replica, old, new);
    replica.commit(&planned);
    let mut findings: Vec<Finding> = Vec::new();
    for crash in crashes {
        replica.tree.fuse = Some(*crash);
        match execute::run(&mut replica.tree, &planned.steps, &mut findings) {
            Err(Stop::Crash) => {}
            Err(refused) => panic!("{refused:?}\n{:#?}", planned.steps),
            Ok(()) => {}
        }
    }
    replica.tree.fuse = None;
    replica.tree.mutations = 0;
    for _ in 0..2 {
        execute::run(&mut replica.tree, &planned.steps, &mut findings)
            .unwrap_or_else(|stop| panic!("{stop:?}\n{:#?}", planned.steps));
    }
    let mutations = replica.tree.mutations;
    for step in &planned.steps {
        if let Step::Rewrite { from, .. } = step {
            super::ReplicaTree::unlink(&mut replica.tree, from).unwrap();
        }
    }
    assert!(findings.is_empty(), "{findings:?}\n{:#?}", planned.steps);
    replica.check(new, &loose);
    new.objects.retain(|object, _| !loose.contains(object));
    mutations
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1500, ..ProptestConfig::default() })]

    /// Traps 1, 8, 9, 12: any change, interrupted twice, ends as the source is.
    #[test]
    fn trap_8_redo_is_idempotent(
        batches in prop::collection::vec(
            (
                prop::collection::vec(action(), 0..14),
                any::<u32>(),
                prop::collection::vec(0usize..40, 0..3),
            ),
            1..5,
        ),
    ) {
        let mut replica = Replica::new();
        let mut source = Source::new();
        let mut old = Source::default();
        for (actions, seed, crashes) in batches {
            for action in &actions {
                source.act(action);
            }
            round(&mut replica, &old, &mut source, seed, &crashes);
            old = source.clone();
        }
    }
}

/// Builds a state, applies one change, and crashes after each single mutation.
fn every_crash(before: &[Action], after: &[Action]) {
    let mut source = Source::new();
    before.iter().for_each(|action| source.act(action));
    let mut base = Replica::new();
    round(&mut base, &Source::default(), &mut source, u32::MAX, &[]);
    let old = source.clone();
    after.iter().for_each(|action| source.act(action));
    let total = round(&mut base.clone(), &old, &mut source.clone(), u32::MAX, &[]);
    for crash in 0..=total {
        for second in [None, Some(0), Some(1), Some(2)] {
            let crashes: Vec<_> = std::iter::once(crash).chain(second).collect();
            round(&mut base.clone(), &old, &mut source.clone(), u32::MAX, &crashes);
        }
    }
}

#[test]
fn trap_8_swap_chain_and_rotation() {
    let files =
        [Action::Create(0, 0, false), Action::Create(0, 1, false), Action::Create(0, 2, false)];
    every_crash(&files, &[Action::Exchange(0, 1)]);
    every_crash(&files, &[Action::Exchange(0, 1), Action::Exchange(1, 2)]);
    // a→d, b→a, c→b: a rotation with an end.
    every_crash(
        &files,
        &[Action::Rename(0, 0, 3), Action::Rename(0, 0, 0), Action::Rename(1, 0, 1)],
    );
}

#[test]
fn trap_9_hard_links_are_not_split() {
    let linked = [Action::Create(0, 0, false), Action::Link(0, 0, 1)];
    every_crash(&linked, &[Action::Write(0)]);
    every_crash(&linked, &[Action::Unlink(0), Action::Write(0)]);
    every_crash(&linked, &[Action::Rename(0, 0, 3), Action::Link(0, 0, 4), Action::Write(0)]);
}

#[test]
fn a_directory_moves_into_its_former_child() {
    // root/a/b → root/b/a.
    let nested = [Action::Create(0, 0, true), Action::Create(1, 1, true)];
    every_crash(&nested, &[Action::Rename(1, 0, 1), Action::Rename(0, 2, 0)]);
}

#[test]
fn a_replaced_file_is_never_missing() {
    let files = [Action::Create(0, 0, false), Action::Create(0, 1, false)];
    every_crash(&files, &[Action::Rename(1, 0, 0)]);
    every_crash(&files, &[Action::Write(0)]);
}
