//! The replica's file system, in memory: what a crash of the machine leaves of
//! it, and a disk that fails.

use std::collections::{BTreeMap, BTreeSet};

use rand::Rng;
use rand::rngs::StdRng;
use replicator_common::id::{Incarnation, ObjectId, ReplicaHandle};
use replicator_common::name::Name;
use replicator_common::object::ObjectState;
use replicator_common::time::Timestamp;
use replicator_dst::apply::{Outcome, Place, ReplicaTree, Within};
use replicator_dst::mark::Mark;

use crate::world::Body;

/// What never was written to the disk.
pub const TORN: u32 = u32::MAX;

/// An inode of the replica.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Node {
    /// Which of the source's inodes it stands for: for the checks alone.
    pub stands_for: u32,
    /// Its state.
    pub body: Body,
    /// Its entries; `None` for files.
    pub names: Option<BTreeMap<Name, ReplicaHandle>>,
    /// A sync has covered its content.
    synced: bool,
}

/// Why a call did not return as it should.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// The process dies here.
    Crash,
    /// The disk fails.
    Disk,
    /// The kernel would have refused, which no plan may provoke.
    Refused(&'static str),
}

/// What stands on the disk.
#[derive(Clone, Debug)]
struct Disk {
    nodes: BTreeMap<ReplicaHandle, Node>,
    mark: Option<Mark>,
    life: Option<Incarnation>,
}

/// The file system.
#[derive(Clone, Debug)]
pub struct Model {
    disk: Disk,
    /// What a power cut leaves: the disk at some moment since the last sync.
    image: Disk,
    /// How many moments there were to choose from.
    moments: u32,
    next: u32,
    /// After so many changes, this happens.
    pub fuse: Option<(u32, Stop)>,
}

/// The replica's root.
pub fn root() -> ReplicaHandle {
    handle(0)
}

fn handle(n: u32) -> ReplicaHandle {
    ObjectId::new(9, &n.to_be_bytes()).unwrap()
}

const STAGING: u32 = 1;
const ORPHANS: u32 = 2;
const LOST: u32 = 3;

impl Model {
    /// Empty, but for the areas.
    pub fn new(root: u32) -> Self {
        let disk = Disk { nodes: BTreeMap::new(), mark: None, life: None };
        let (moments, next, fuse) = (0, 0, None);
        let mut model = Self { image: disk.clone(), disk, moments, next, fuse };
        for area in [root, 0, 0, 0] {
            model.make(area, Body { content: 0, mode: 0o700 }, true);
        }
        model.sync();
        model
    }

    fn make(&mut self, stands_for: u32, body: Body, directory: bool) -> ReplicaHandle {
        let new = handle(self.next);
        self.next += 1;
        let names = directory.then(BTreeMap::new);
        self.disk.nodes.insert(new.clone(), Node { stands_for, body, names, synced: directory });
        new
    }

    /// Makes a file or directory at a private place, over what may stand there
    /// of an attempt before.
    pub fn stage(
        &mut self,
        place: &Place,
        stands_for: u32,
        body: Body,
        directory: bool,
        random: &mut StdRng,
    ) -> Result<ReplicaHandle, Stop> {
        self.spark()?;
        let new = self.make(stands_for, body, directory);
        let within = self.directory_of(place).unwrap();
        self.names(&within).unwrap().insert(place.name.clone(), new.clone());
        self.collect();
        self.passed(random);
        Ok(new)
    }

    /// What a power cut now would leave is one of the moments since the last
    /// sync; this is one more.
    pub fn passed(&mut self, random: &mut StdRng) {
        self.moments += 1;
        if random.random_range(0..=self.moments) == 0 {
            self.image = self.disk.clone();
        }
    }

    /// All of it is durable.
    pub fn sync(&mut self) {
        self.disk.nodes.values_mut().for_each(|node| node.synced = true);
        self.image = self.disk.clone();
        self.moments = 0;
    }

    /// The power goes: content that no sync has covered may be gone.
    pub fn cut(&mut self, random: &mut StdRng) {
        self.disk = self.image.clone();
        for node in self.disk.nodes.values_mut().filter(|node| !node.synced) {
            if random.random_bool(0.5) {
                node.body.content = TORN;
            }
        }
        self.sync();
    }

    /// The mark in the hidden directory.
    pub fn mark(&self) -> Option<Mark> {
        self.disk.mark
    }

    /// Writes it.
    pub fn set_mark(&mut self, mark: Mark) -> Result<(), Stop> {
        self.spark()?;
        self.disk.mark = Some(mark);
        Ok(())
    }

    /// Which life of the destination's state the replica belongs to.
    pub fn life(&self) -> Option<Incarnation> {
        self.disk.life
    }

    /// Sets it, durably.
    pub fn set_life(&mut self, life: Incarnation) {
        (self.disk.life, self.image.life) = (Some(life), Some(life));
    }

    /// A sync fails: what was to be written is lost, and nobody is told again.
    pub fn fail_sync(&mut self, random: &mut StdRng) {
        for node in self.disk.nodes.values_mut().filter(|node| !node.synced) {
            node.synced = true;
            if random.random_bool(0.5) {
                node.body.content = TORN;
            }
        }
    }

    /// An inode.
    pub fn node(&self, handle: &ReplicaHandle) -> Option<&Node> {
        self.disk.nodes.get(handle)
    }

    /// What an area holds.
    pub fn area(&self, within: &Within) -> BTreeMap<Name, ReplicaHandle> {
        let node = self.area_handle(within).and_then(|handle| self.node(&handle).cloned());
        node.and_then(|node| node.names).unwrap_or_default()
    }

    /// Removes all that is in staging.
    pub fn wipe_staging(&mut self) {
        self.names(&handle(STAGING)).unwrap().clear();
        self.collect();
    }

    /// Removes a staged file.
    pub fn discard(&mut self, place: &Place) {
        if let Some(within) = self.directory_of(place) {
            self.names(&within).unwrap().remove(&place.name);
        }
        self.collect();
    }

    fn area_handle(&self, within: &Within) -> Option<ReplicaHandle> {
        Some(match within {
            Within::Replica(handle) => handle.clone(),
            Within::Staging(_) | Within::Nest(..) => handle(STAGING),
            Within::Orphans => handle(ORPHANS),
            Within::LostAndFound => handle(LOST),
        })
    }

    fn directory_of(&self, place: &Place) -> Option<ReplicaHandle> {
        self.area_handle(&place.within).filter(|handle| self.is_directory(handle))
    }

    fn names(&mut self, directory: &ReplicaHandle) -> Option<&mut BTreeMap<Name, ReplicaHandle>> {
        self.disk.nodes.get_mut(directory)?.names.as_mut()
    }

    fn get(&self, place: &Place) -> Option<ReplicaHandle> {
        let directory = self.directory_of(place)?;
        self.node(&directory)?.names.as_ref()?.get(&place.name).cloned()
    }

    fn is_directory(&self, object: &ReplicaHandle) -> bool {
        self.node(object).is_some_and(|node| node.names.is_some())
    }

    fn is_inside(&self, object: &ReplicaHandle, above: &ReplicaHandle) -> bool {
        object == above
            || self.disk.nodes.iter().any(|(handle, node)| {
                let children = node.names.iter().flat_map(|names| names.values());
                children.into_iter().any(|child| child == object) && self.is_inside(handle, above)
            })
    }

    /// Frees inodes without a name: their handles become stale.
    fn collect(&mut self) {
        loop {
            let nodes = &self.disk.nodes;
            let mut live: BTreeSet<ReplicaHandle> = (0..=LOST).map(handle).collect();
            let names = nodes.values().filter_map(|node| node.names.as_ref());
            live.extend(names.flat_map(|names| names.values().cloned()));
            if live.len() >= nodes.len() {
                return;
            }
            self.disk.nodes.retain(|handle, _| live.contains(handle));
        }
    }

    /// A moment at which [`Self::fuse`] may act.
    pub fn spark(&mut self) -> Result<(), Stop> {
        match self.fuse.take() {
            Some((0, stop)) => Err(stop),
            fuse => {
                self.fuse = fuse.map(|(left, stop)| (left - 1, stop));
                Ok(())
            }
        }
    }

    fn set_name(&mut self, place: &Place, to: Option<ReplicaHandle>) {
        let within = self.directory_of(place).unwrap();
        let names = self.names(&within).unwrap();
        match to {
            Some(to) => names.insert(place.name.clone(), to),
            None => names.remove(&place.name),
        };
    }

    fn changed(&mut self) {
        self.collect();
        self.moments += 1;
        // Half of all cuts leave what was at the last sync, or little more.
        if self.moments.is_multiple_of(3) {
            self.image = self.disk.clone();
        }
    }
}

impl ReplicaTree for Model {
    type Error = Stop;

    fn lookup(&mut self, place: &Place) -> Result<Option<ReplicaHandle>, Stop> {
        Ok(self.get(place))
    }

    fn rename(&mut self, from: &Place, to: &Place, replace: bool) -> Result<Outcome, Stop> {
        let Some(object) = self.get(from) else { return Ok(Outcome::Missing) };
        let Some(target) = self.directory_of(to) else { return Ok(Outcome::Missing) };
        if self.is_directory(&object) && self.is_inside(&target, &object) {
            return Err(Stop::Refused("a directory into itself"));
        }
        if let Some(victim) = self.get(to) {
            if !replace {
                return Ok(Outcome::Occupied);
            }
            if victim == object {
                return Err(Stop::Refused("rename between two names of one object"));
            }
            if self.is_directory(&victim) || self.is_directory(&object) {
                return Err(Stop::Refused("a directory would be replaced, or replace"));
            }
        }
        self.spark()?;
        self.set_name(from, None);
        self.set_name(to, Some(object));
        self.changed();
        Ok(Outcome::Done)
    }

    fn link(&mut self, object: &ReplicaHandle, to: &Place) -> Result<Outcome, Stop> {
        if self.node(object).is_none() || self.directory_of(to).is_none() {
            return Ok(Outcome::Missing);
        }
        if self.is_directory(object) {
            return Err(Stop::Refused("a hard link to a directory"));
        }
        if self.get(to).is_some() {
            return Ok(Outcome::Occupied);
        }
        self.spark()?;
        self.set_name(to, Some(object.clone()));
        self.changed();
        Ok(Outcome::Done)
    }

    fn unlink(&mut self, at: &Place) -> Result<Outcome, Stop> {
        let Some(object) = self.get(at) else { return Ok(Outcome::Missing) };
        if self.is_directory(&object) {
            return Err(Stop::Refused("unlink of a directory"));
        }
        self.spark()?;
        self.set_name(at, None);
        self.changed();
        Ok(Outcome::Done)
    }

    fn remove_directory(&mut self, at: &Place) -> Result<Outcome, Stop> {
        let Some(object) = self.get(at) else { return Ok(Outcome::Missing) };
        match self.node(&object).and_then(|node| node.names.as_ref()) {
            None => return Err(Stop::Refused("rmdir of a file")),
            Some(names) if !names.is_empty() => return Ok(Outcome::NotEmpty),
            Some(_) => {}
        }
        self.spark()?;
        self.set_name(at, None);
        self.changed();
        Ok(Outcome::Done)
    }

    fn list(&mut self, directory: &ReplicaHandle) -> Result<Vec<Name>, Stop> {
        Ok(self.names(directory).map(|names| names.keys().cloned().collect()).unwrap_or_default())
    }

    fn rewrite(&mut self, object: &ReplicaHandle, from: &Place) -> Result<Outcome, Stop> {
        let staged = self.get(from).and_then(|from| self.node(&from).cloned());
        let Some(staged) = staged else { return Ok(Outcome::Missing) };
        self.spark()?;
        let Some(node) = self.disk.nodes.get_mut(object) else { return Ok(Outcome::Missing) };
        (node.body.content, node.synced) = (staged.body.content, false);
        self.changed();
        Ok(Outcome::Done)
    }

    fn patch(
        &mut self,
        object: &ReplicaHandle,
        literals: &Place,
        _: &Place,
        _: u64,
    ) -> Result<Outcome, Stop> {
        self.rewrite(object, literals)
    }

    fn append(&mut self, _: &ReplicaHandle, _: u64, _: &[u8]) -> Result<Outcome, Stop> {
        Err(Stop::Refused("what the simulated source never sends"))
    }

    fn set_attributes(
        &mut self,
        object: &ReplicaHandle,
        state: &ObjectState,
    ) -> Result<Outcome, Stop> {
        self.spark()?;
        let Some(node) = self.disk.nodes.get_mut(object) else { return Ok(Outcome::Missing) };
        node.body.mode = state.attributes.mode;
        self.changed();
        Ok(Outcome::Done)
    }

    fn set_mtime(&mut self, _: &ReplicaHandle, _: Timestamp) -> Result<Outcome, Stop> {
        Ok(Outcome::Done)
    }
}
