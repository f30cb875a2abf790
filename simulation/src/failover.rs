//! Failover at any step of a run, interrupted anywhere and asked for again.
//!
//! It is tried on a copy, so that the run goes on. What decides is the
//! product's: [`execute`] redoes, [`path_of`] says where an orphan's home is.
//! The order of the steps of `replicator_dst::failover` is repeated here.

use std::collections::{BTreeMap, BTreeSet};

use rand::Rng;
use rand::rngs::StdRng;
use replicator_common::id::ReplicaHandle;
use replicator_common::name::Name;
use replicator_dst::apply::{Outcome, Place, ReplicaTree, Within, execute};
use replicator_dst::objects::{Objects, Position, path_of};
use replicator_dst::seal::needed_by;

use crate::destination::Records;
use crate::tree::{Model, Node, Stop};

/// Interruptions at most.
const INTERRUPTIONS: u32 = 4;

/// What was decided, durable before any of it is done.
#[derive(Clone, Debug, Default)]
struct Decision {
    moves: Vec<Place>,
    put_back: Vec<(Place, Place)>,
}

/// A replica that is handed over.
#[derive(Debug)]
pub struct HandedOver {
    /// Its tree.
    pub tree: Model,
    /// What it stood at.
    pub records: Records,
    /// Where orphans were put back.
    pub put_back: Vec<Place>,
    /// Orphans in lost+found.
    pub orphans: Vec<ReplicaHandle>,
}

struct Failover {
    tree: Model,
    store: Records,
    durable: Records,
    decision: Option<Decision>,
}

/// Fails over. Panics where something that had arrived is gone.
pub fn run(tree: &Model, store: &Records, durable: &Records, random: &mut StdRng) -> HandedOver {
    let (mut tree, store, durable) = (tree.clone(), store.clone(), durable.clone());
    tree.fuse = None;
    let staged = arrived(&tree, &store).into_values();
    let staged: BTreeMap<ReplicaHandle, Node> =
        staged.map(|handle| (handle.clone(), tree.node(&handle).unwrap().clone())).collect();
    let before = tree.area(&Within::LostAndFound);
    let mut failover = Failover { tree, store, durable, decision: None };
    let (mut powered, mut left) = (true, INTERRUPTIONS);
    loop {
        if left > 0 && random.random_bool(0.7) {
            failover.tree.fuse = Some((random.random_range(0..12), Stop::Crash));
        }
        match failover.attempt() {
            Ok(()) => break,
            Err(Stop::Refused(what)) => panic!("the kernel refuses at failover: {what}"),
            Err(_) => left -= 1,
        }
        failover.store = failover.durable.clone();
        if random.random_bool(0.3) {
            failover.tree.cut(random);
            powered = false;
        }
    }
    failover.nothing_is_thrown_away(&staged, &before, powered);
    failover.handed_over()
}

/// What is staged, but for what logged steps copy from: the rest they move.
fn arrived(tree: &Model, store: &Records) -> BTreeMap<Place, ReplicaHandle> {
    let needed: BTreeSet<Place> = store.log.values().flatten().flat_map(needed_by).collect();
    let staged = tree.area(&Within::Staging(0)).into_iter();
    let files = staged.filter(|(name, _)| name.as_bytes().starts_with(b"p"));
    let placed = files.map(|(name, handle)| (Place { within: Within::Staging(0), name }, handle));
    placed.filter(|(place, _)| !needed.contains(place)).collect()
}

impl Failover {
    fn attempt(&mut self) -> Result<(), Stop> {
        let decision = match self.decision.clone() {
            Some(decision) => decision,
            None => {
                self.redo()?;
                let decision = self.decide()?;
                self.tree.spark()?;
                self.decision = Some(decision.clone());
                decision
            }
        };
        self.tree.spark()?;
        for (from, to) in &decision.put_back {
            let outcome = self.tree.rename(from, to, false)?;
            assert!(matches!(outcome, Outcome::Done | Outcome::Missing), "{to:?}: {outcome:?}");
        }
        self.tree.spark()?;
        for from in &decision.moves {
            let to = Place { within: Within::LostAndFound, name: from.name.clone() };
            self.tree.rename(from, &to, false)?;
        }
        self.tree.spark()?;
        self.tree.sync();
        Ok(())
    }

    fn redo(&mut self) -> Result<(), Stop> {
        let steps: Vec<_> = self.store.log.values().flatten().cloned().collect();
        let mut findings = Vec::new();
        execute::run(&mut self.tree, &steps, &mut findings)?;
        assert!(findings.is_empty(), "at failover: {findings:?}");
        self.tree.spark()?;
        self.tree.sync();
        self.store.standing.applied = self.store.standing.committed;
        self.store.log.clear();
        self.durable = self.store.clone();
        self.tree.spark()?;
        steps.iter().flat_map(needed_by).for_each(|place| self.tree.discard(&place));
        Ok(())
    }

    fn decide(&mut self) -> Result<Decision, Stop> {
        let mut decision = Decision::default();
        decision.moves.extend(arrived(&self.tree, &self.store).into_keys());
        let mut taken = BTreeSet::new();
        for (object, known) in self.store.rows.clone() {
            let Position::Orphan { was } = known.position else { continue };
            let from = Place::orphan(&object);
            let home = was.and_then(|was| {
                path_of(&self.store, &was.directory).unwrap()?;
                let handle = self.store.get(&was.directory).unwrap()?.handle?;
                Some(Place { within: Within::Replica(handle), name: was.name })
            });
            match home {
                Some(to) if self.tree.lookup(&to)?.is_none() && taken.insert(to.clone()) => {
                    decision.put_back.push((from, to));
                }
                _ => decision.moves.push(from),
            }
        }
        Ok(decision)
    }

    /// Invariant 5. What had only been written, and not synced, a cut of the
    /// power may take: then (not `powered`) there is nothing to ask.
    fn nothing_is_thrown_away(
        &self,
        staged: &BTreeMap<ReplicaHandle, Node>,
        before: &BTreeMap<Name, ReplicaHandle>,
        powered: bool,
    ) {
        let lost = self.tree.area(&Within::LostAndFound);
        let moves = self.decision.iter().flat_map(|decision| &decision.moves);
        let listed: BTreeSet<&Name> = moves.map(|place| &place.name).chain(before.keys()).collect();
        for name in lost.keys() {
            assert!(listed.contains(name), "{name} is in lost+found, and not in the manifest");
        }
        let staging: BTreeSet<_> = self.tree.area(&Within::Staging(0)).into_values().collect();
        for (handle, node) in staged.iter().filter(|_| powered) {
            // In the replica it may have got other attributes meanwhile.
            let found = self.tree.node(handle).filter(|_| !staging.contains(handle));
            let whole = found.is_some_and(|found| found.body.content == node.body.content);
            assert!(whole, "{node:?} had arrived, and is {found:?}");
        }
        assert!(self.tree.area(&Within::Orphans).is_empty(), "an orphan is left");
    }

    fn handed_over(self) -> HandedOver {
        let Decision { moves, put_back } = self.decision.unwrap_or_default();
        let lost = self.tree.area(&Within::LostAndFound);
        let orphans = moves.iter().filter(|place| place.within == Within::Orphans);
        let orphans = orphans.filter_map(|place| lost.get(&place.name).cloned()).collect();
        let put_back = put_back.into_iter().map(|(_, to)| to).collect();
        HandedOver { tree: self.tree, records: self.store, put_back, orphans }
    }
}
