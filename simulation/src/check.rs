//! What must hold after each step.

use std::collections::{BTreeMap, BTreeSet};

use replicator_common::id::{BatchId, ReplicaHandle};
use replicator_common::name::Name;
use replicator_common::time::Timestamp;
use replicator_common::wire::Hash;
use replicator_dst::apply::Within;
use replicator_dst::store::Standing;
use replicator_src::index::Content;

use crate::destination::Destination;
use crate::failover::HandedOver;
use crate::source::{Expected, Source};
use crate::tree::{Model, Node, root};
use crate::world::{Body, ROOT, World, names};

/// A tree as a reader finds it, in the source's inode numbers.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Visible {
    /// Entries.
    pub entries: BTreeMap<(u32, Name), u32>,
    /// What they lead to.
    pub bodies: BTreeMap<u32, Body>,
    directories: BTreeSet<u32>,
}

impl Visible {
    /// All below some handles. Hard links must lead to one inode.
    fn of(tree: &Model, tops: &[ReplicaHandle]) -> Self {
        let mut visible = Self::default();
        let mut known: BTreeMap<u32, ReplicaHandle> = BTreeMap::new();
        let mut queue = tops.to_vec();
        while let Some(handle) = queue.pop() {
            let Node { stands_for, body, names, .. } = tree.node(&handle).unwrap();
            if let Some(other) = known.insert(*stands_for, handle.clone()) {
                assert_eq!(other, handle, "inode {stands_for} is there twice");
                continue;
            }
            visible.bodies.insert(*stands_for, *body);
            if names.is_some() {
                visible.directories.insert(*stands_for);
            }
            for (name, child) in names.iter().flatten() {
                let below = tree.node(child).unwrap().stands_for;
                visible.entries.insert((*stands_for, name.clone()), below);
                queue.push(child.clone());
            }
        }
        visible
    }

    /// What a reader of the replica sees.
    pub fn replica(tree: &Model) -> Self {
        Self::of(tree, &[root()])
    }

    /// The source at one moment.
    fn source(world: &World, moment: i64) -> Self {
        let mut visible = Self::default();
        let mut queue = vec![ROOT];
        while let Some(inode) = queue.pop() {
            let Some(body) = world.was(moment, inode) else { continue };
            if visible.bodies.insert(inode, body).is_some() {
                continue;
            }
            for name in names() {
                if let Some(child) = world.led_to(moment, inode, &name) {
                    visible.entries.insert((inode, name), child);
                    queue.push(child);
                }
            }
        }
        visible
    }
}

/// Invariant 1: all that the watermark claims is there.
pub fn truth(world: &World, destination: &Destination) {
    claimed(world, destination.told.watermark, &destination.tree);
}

fn claimed(world: &World, told: Timestamp, tree: &Model) {
    if told == Timestamp::NEVER {
        return;
    }
    let seen = Visible::replica(tree);
    let moving = world.moving(told.0);
    let inside = |inode: &&u32| world.was_inside_since(told.0, **inode) && !moving.contains(*inode);
    for directory in seen.directories.iter().filter(inside) {
        for name in names() {
            let to = seen.entries.get(&(*directory, name.clone())).copied();
            assert!(
                world.may_lead(told.0, *directory, &name, to),
                "the watermark says {told:?}, and {directory}/{name} leads to {to:?}"
            );
        }
    }
    for (inode, body) in seen.bodies.iter().filter(|(inode, _)| inside(inode)) {
        let true_then = world.may_be(told.0, *inode, *body);
        assert!(true_then, "the watermark says {told:?}, and inode {inode} is {body:?}");
    }
}

/// Invariants 2, 3 and 6: the replica is what the index says of the last batch.
pub fn between_batches(source: &Source, destination: &Destination) {
    let standing = &destination.now.standing;
    let Some(expected) = expected(source, standing) else { return };
    let mut tops = vec![root()];
    tops.extend(destination.tree.area(&Within::Orphans).into_values());
    let seen = Visible::of(&destination.tree, &tops);
    let batch = standing.committed;
    assert_eq!(seen.entries, expected.entries, "entries after batch {batch}");
    as_expected(&seen, expected, batch);
}

/// Invariants 2 and 5 after a failover: the replica is what the last committed
/// batch made it, with orphans back where they were, or in lost+found; and what
/// is claimed of it is so.
pub fn handed_over(world: &World, source: &Source, over: &HandedOver) {
    let standing = &over.records.standing;
    let Some(expected) = expected(source, standing) else { return };
    let tops: Vec<_> = std::iter::once(root()).chain(over.orphans.iter().cloned()).collect();
    let seen = Visible::of(&over.tree, &tops);
    let mut entries = expected.entries.clone();
    for place in &over.put_back {
        let Within::Replica(directory) = &place.within else { panic!("{place:?}") };
        let node = over.tree.node(directory).unwrap();
        let back = node.names.as_ref().and_then(|names| names.get(&place.name));
        let back = back.unwrap_or_else(|| panic!("{place:?} was not put back"));
        let orphan = over.tree.node(back).unwrap().stands_for;
        let old = entries.insert((node.stands_for, place.name.clone()), orphan);
        assert_eq!(old, None, "{place:?} was not free");
    }
    assert_eq!(seen.entries, entries, "entries after a failover at batch {}", standing.committed);
    as_expected(&seen, expected, standing.committed);
    claimed(world, standing.watermark, &over.tree);
}

fn as_expected(seen: &Visible, expected: &Expected, batch: BatchId) {
    let hash = |body: &Body| Content::Whole(Hash::of(&body.content.to_be_bytes()));
    let kept = seen.bodies.keys().collect::<BTreeSet<_>>();
    assert_eq!(kept, expected.objects.keys().collect(), "objects after batch {batch}");
    for (inode, body) in &seen.bodies {
        let (content, mode) = &expected.objects[inode];
        let same = *content == Content::None || *content == hash(body);
        assert!(same, "content of {inode} after batch {batch}: {body:?}");
        assert_eq!(body.mode, *mode, "attributes of {inode} after batch {batch}");
    }
}

fn expected<'a>(source: &'a Source, standing: &Standing) -> Option<&'a Expected> {
    if standing.committed == BatchId(0) {
        return None;
    }
    let life = standing.source_incarnation.unwrap();
    Some(&source.expected[&(life.0, standing.edition())])
}

/// The exact batch: the replica equals the source at that instant.
pub fn exact(world: &World, source: &Source, destination: &Destination) {
    let moment = expected(source, &destination.now.standing).and_then(|expected| expected.exact);
    let Some(Timestamp(moment)) = moment else { return };
    let (seen, then) = (Visible::replica(&destination.tree), Visible::source(world, moment));
    assert_eq!(seen.entries, then.entries, "entries at the exact moment {moment}");
    assert_eq!(seen.bodies, then.bodies, "objects at the exact moment {moment}");
}

/// Invariant 4: what the journal forgot is durable at the destination.
pub fn forgotten(source: &mut Source, destination: &Destination) {
    for batch in std::mem::take(&mut source.trims) {
        let durable = destination.durable.standing.committed;
        assert!(batch <= durable, "forgotten up to batch {batch}, durable up to {durable}");
    }
}

/// When all is quiet, the replica is the source.
pub fn converged(world: &World, destination: &Destination) {
    let (seen, now) = (Visible::replica(&destination.tree), Visible::source(world, world.now));
    assert_eq!(seen.entries, now.entries, "entries at the end");
    assert_eq!(seen.bodies, now.bodies, "objects at the end");
}
