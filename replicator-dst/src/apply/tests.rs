//! From any old state to any new one, interrupted after any step and redone.

use std::collections::{BTreeMap, BTreeSet};
use std::convert::Infallible;

use proptest::prelude::*;
use replicator_common::id::{BatchId, ObjectId, ReplicaHandle};
use replicator_common::name::Name;
use replicator_common::object::Kind;
use replicator_common::wire::{ContentSource, Op};

use super::execute::{self, Finding};
use super::model::{Model, Node, Stop};
use super::plan::{Arrival, Planned, Staged, plan};
use super::{Place, Step, Within};
use crate::objects::{Known, Objects, Position};

mod deep;
mod naive;

use naive::{Action, Source, next_batch, source_id, state};

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

impl Replica {
    fn new() -> Self {
        Self { tree: Model::new(), map: BTreeMap::new(), batch: 0 }
    }

    /// What the receiver and the sealer do: files and new directories in staging.
    fn stage(&mut self, ops: &[Op], source: &Source) -> Staged {
        let mut staged = Staged::default();
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
            self.tree.modes.insert(handle.clone(), state.attributes.mode);
            let state = (state.kind == Kind::File).then(|| state.clone());
            staged.insert(object.clone(), Arrival::Whole { place, handle, state });
        }
        self.nest(ops, &mut staged);
        let places = staged.values().filter_map(|arrival| match arrival {
            Arrival::Whole { place, handle, .. } => Some((place.clone(), handle.clone())),
            _ => None,
        });
        // Nests before what is in them.
        let mut places: Vec<_> = places.collect();
        places.sort_by_key(|(place, _)| matches!(place.within, Within::Nest(..)));
        for (place, handle) in places {
            self.tree.place(&place, &handle);
        }
        staged
    }

    /// Puts what arrives in a new directory into the nest that becomes it, but for
    /// some, which come by a step as ever.
    fn nest(&self, ops: &[Op], staged: &mut Staged) {
        let mut nested = Vec::new();
        super::arrivals::each(ops, staged, |(directory, name), from| {
            if let Some(Arrival::Whole { place: nest, .. }) = staged.get(directory)
                && !from.name.as_bytes().ends_with(b"3")
            {
                let within = Within::Nest(0, nest.name.clone());
                nested.push((from.clone(), Place { within, name: name.clone() }));
            }
        });
        for arrival in staged.values_mut() {
            if let Arrival::Whole { place, .. } = arrival
                && let Some((_, nest)) = nested.iter().find(|(from, _)| from == place)
            {
                *place = nest.clone();
            }
        }
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

fn round(
    replica: &mut Replica,
    old: &Source,
    new: &mut Source,
    seed: u32,
    crashes: &[usize],
) -> usize {
    let (ops, loose) = next_batch(old, new, seed, replica.batch == 0);
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
