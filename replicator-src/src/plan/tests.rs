//! Property test of planning against naive models of a source and a replica.
//!
//! Random changes happen to the source, also between the steps of building a
//! batch; their records arrive in the journal late, and batches take arbitrary
//! prefixes of it. After each batch the replica's model checks what the source
//! promises (ARCHITECTURE.md "Wire"); at the end, when all records are in, the
//! replica equals the source.

use std::collections::{BTreeMap, BTreeSet};
use std::convert::Infallible;

use foldhash::{HashMap, HashMapExt, HashSet};
use proptest::prelude::*;
use replicator_common::id::{BatchId, ObjectId};
use replicator_common::name::Name;
use replicator_common::object::{Attributes, Kind, ObjectState};
use replicator_common::sys::stat::Stat;
use replicator_common::time::Timestamp;
use replicator_common::wire::{ContentSource, Hash, Op};

use super::resolve::Budget;
use super::waits::{is_through, still_leads};
use super::*;
use crate::index::{Content, Delta, Known, Orphan, View};
use crate::journal::Record;
use crate::watcher::What;

mod limits;
mod replica;
mod run;
mod traps;
mod world;

use replica::{Map, Replica};
use run::Run;
use world::{ROOT, World, id, inode};

type Action = (u8, u8, u8, u8);

#[derive(Clone, Debug)]
struct Step {
    actions: Vec<Action>,
    absorb: usize,
    between: Vec<Action>,
    budget: usize,
    large: u32,
    rescan: bool,
    follow: bool,
}

fn step() -> impl Strategy<Value = Step> {
    let actions = || prop::collection::vec(any::<Action>(), 0..12);
    let rescan = prop::bool::weighted(0.15);
    (actions(), 0..20usize, actions(), 1..12usize, 0..4u32, rescan, any::<bool>()).prop_map(
        |(actions, absorb, between, budget, large, rescan, follow)| Step {
            actions,
            absorb,
            between,
            budget,
            large,
            rescan,
            follow,
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1500, ..ProptestConfig::default() })]

    /// Traps 1, 3, 4, 11 and 12 in the model.
    #[test]
    fn whatever_happens_the_replica_becomes_the_source(
        before in prop::collection::vec(any::<Action>(), 0..30),
        steps in prop::collection::vec(step(), 0..8),
        by_name in any::<bool>(),
        apart in prop_oneof![1..4usize, Just(1000)],
    ) {
        let mut world = World::new();
        world.places = by_name.then(BTreeMap::new);
        before.iter().for_each(|action| world.act(*action));
        // What happened before the first look has no records.
        world.records.clear();
        let mut run = Run { apart, ..Run::new(world) };
        run.dirty.listings.push_back(Listing::new(id(ROOT), true));
        for step in steps {
            step.actions.iter().for_each(|action| run.world.act(*action));
            if step.rescan {
                // Records are lost; a walk follows.
                run.cursor = run.world.records.len();
                run.dirty = Dirty::default();
                run.astray = Dirty::default();
                run.held.clear();
                run.walking = true;
                run.dirty.listings.push_back(Listing::new(id(ROOT), true));
                let orphans = run.orphans().into_iter();
                run.dirty.listings.extend(orphans.map(|orphan| Listing::new(orphan, true)));
            } else {
                run.absorb(step.absorb);
            }
            run.batch(&step.between, step.budget, step.large, false, step.follow);
        }
        run.finish();
    }
}
