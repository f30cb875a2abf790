//! A naive file system in memory that behaves as Linux does where applying can
//! tell the difference, and that crashes after any mutation.

use std::collections::BTreeMap;

use replicator_common::id::{ObjectId, ReplicaHandle};
use replicator_common::name::Name;
use replicator_common::object::ObjectState;
use replicator_common::time::Timestamp;

use super::{Outcome, Place, ReplicaTree, Within};

/// What a model inode holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Node {
    Directory(BTreeMap<Name, ReplicaHandle>),
    File(Vec<u8>),
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Stop {
    /// The crash that the test asked for.
    Crash,
    /// The kernel would have refused, which no plan may provoke.
    Refused(&'static str),
}

/// The file system: inodes by handle, never reused.
#[derive(Clone, Debug)]
pub(super) struct Model {
    pub(super) nodes: BTreeMap<ReplicaHandle, Node>,
    pub(super) modes: BTreeMap<ReplicaHandle, u32>,
    pub(super) root: ReplicaHandle,
    staging: ReplicaHandle,
    orphans: ReplicaHandle,
    lost: ReplicaHandle,
    next: u32,
    /// Mutations until the crash.
    pub(super) fuse: Option<usize>,
    pub(super) mutations: usize,
    /// Slots that must never be empty, looked at after each mutation.
    pub(super) watched: Vec<(ReplicaHandle, Name)>,
    /// How many names objects may have at any moment, as the source reckons it.
    pub(super) most: BTreeMap<ReplicaHandle, usize>,
}

impl Model {
    pub(super) fn new() -> Self {
        let handle = |n: u32| ObjectId::new(9, &n.to_be_bytes()).unwrap();
        let mut model = Self {
            nodes: BTreeMap::new(),
            modes: BTreeMap::new(),
            root: handle(0),
            staging: handle(1),
            orphans: handle(2),
            lost: handle(3),
            next: 0,
            fuse: None,
            mutations: 0,
            watched: Vec::new(),
            most: BTreeMap::new(),
        };
        for _ in 0..4 {
            model.create(Node::Directory(BTreeMap::new()));
        }
        model
    }

    pub(super) fn create(&mut self, node: Node) -> ReplicaHandle {
        let handle = ObjectId::new(9, &self.next.to_be_bytes()).unwrap();
        self.next += 1;
        self.nodes.insert(handle.clone(), node);
        handle
    }

    /// Puts a name without counting it as a mutation.
    pub(super) fn place(&mut self, place: &Place, object: &ReplicaHandle) {
        let directory = self.directory_of(place).unwrap();
        self.names(&directory).unwrap().insert(place.name.clone(), object.clone());
    }

    pub(super) fn private_names(&self) -> Vec<Name> {
        [&self.staging, &self.lost]
            .into_iter()
            .flat_map(|directory| match &self.nodes[directory] {
                Node::Directory(names) => names.keys().cloned().collect::<Vec<_>>(),
                Node::File(_) => Vec::new(),
            })
            .collect()
    }

    fn directory_of(&self, place: &Place) -> Option<ReplicaHandle> {
        let handle = match &place.within {
            Within::Replica(handle) => handle,
            Within::Staging(_) => &self.staging,
            Within::Nest(_, name) => self.nest(name)?,
            Within::Orphans => &self.orphans,
            Within::LostAndFound => &self.lost,
        };
        matches!(self.nodes.get(handle), Some(Node::Directory(_))).then(|| handle.clone())
    }

    fn nest(&self, name: &Name) -> Option<&ReplicaHandle> {
        match &self.nodes[&self.staging] {
            Node::Directory(names) => names.get(name),
            Node::File(_) => None,
        }
    }

    fn names(&mut self, directory: &ReplicaHandle) -> Option<&mut BTreeMap<Name, ReplicaHandle>> {
        match self.nodes.get_mut(directory) {
            Some(Node::Directory(names)) => Some(names),
            _ => None,
        }
    }

    fn get(&self, place: &Place) -> Option<ReplicaHandle> {
        match self.nodes.get(&self.directory_of(place)?) {
            Some(Node::Directory(names)) => names.get(&place.name).cloned(),
            _ => None,
        }
    }

    fn count(&self, object: &ReplicaHandle) -> usize {
        let names = |node: &Node| match node {
            Node::Directory(names) => names.values().filter(|one| *one == object).count(),
            Node::File(_) => 0,
        };
        self.nodes.values().map(names).sum()
    }

    fn is_directory(&self, object: &ReplicaHandle) -> bool {
        matches!(self.nodes.get(object), Some(Node::Directory(_)))
    }

    fn is_inside(&self, object: &ReplicaHandle, ancestor: &ReplicaHandle) -> bool {
        if object == ancestor {
            return true;
        }
        self.nodes.iter().any(|(handle, node)| match node {
            Node::Directory(names) => {
                names.values().any(|child| child == object && self.is_directory(child))
                    && self.is_inside(handle, ancestor)
            }
            Node::File(_) => false,
        })
    }

    /// Frees inodes without a name: their handles become stale.
    fn collect(&mut self) {
        let live: std::collections::BTreeSet<_> = self
            .nodes
            .values()
            .filter_map(|node| match node {
                Node::Directory(names) => Some(names.values().cloned()),
                Node::File(_) => None,
            })
            .flatten()
            .chain([&self.root, &self.staging, &self.orphans, &self.lost].map(Clone::clone))
            .collect();
        self.nodes.retain(|handle, _| live.contains(handle));
    }

    fn mutated(&mut self) {
        self.collect();
        self.mutations += 1;
        for (directory, name) in &self.watched {
            let Some(Node::Directory(names)) = self.nodes.get(directory) else { continue };
            assert!(names.contains_key(name), "a reader misses {name:?} in {directory}");
        }
    }

    fn spark(&mut self) -> Result<(), Stop> {
        match &mut self.fuse {
            Some(0) => Err(Stop::Crash),
            Some(left) => {
                *left -= 1;
                Ok(())
            }
            None => Ok(()),
        }
    }
}

impl ReplicaTree for Model {
    type Error = Stop;

    fn lookup(&mut self, place: &Place) -> Result<Option<ReplicaHandle>, Stop> {
        Ok(self.get(place))
    }

    fn rename(&mut self, from: &Place, to: &Place, replace: bool) -> Result<Outcome, Stop> {
        let (Some(object), Some(source)) = (self.get(from), self.directory_of(from)) else {
            return Ok(Outcome::Missing);
        };
        let Some(target) = self.directory_of(to) else { return Ok(Outcome::Missing) };
        if self.is_directory(&object) && self.is_inside(&target, &object) {
            return Err(Stop::Refused("directory into itself"));
        }
        if let Some(victim) = self.get(to) {
            if !replace {
                return Ok(Outcome::Occupied);
            }
            if victim == object {
                return Err(Stop::Refused("rename between two names of one object does nothing"));
            }
            if self.is_directory(&victim) || self.is_directory(&object) {
                return Err(Stop::Refused("a directory would be replaced, or replace"));
            }
        }
        self.spark()?;
        self.names(&source).unwrap().remove(&from.name);
        self.names(&target).unwrap().insert(to.name.clone(), object);
        self.mutated();
        Ok(Outcome::Done)
    }

    fn link(&mut self, object: &ReplicaHandle, to: &Place) -> Result<Outcome, Stop> {
        if !self.nodes.contains_key(object) {
            return Ok(Outcome::Missing);
        }
        let Some(target) = self.directory_of(to) else { return Ok(Outcome::Missing) };
        if self.is_directory(object) {
            return Err(Stop::Refused("hard link to a directory"));
        }
        if self.get(to).is_some() {
            return Ok(Outcome::Occupied);
        }
        self.spark()?;
        self.names(&target).unwrap().insert(to.name.clone(), object.clone());
        if self.most.get(object).is_some_and(|most| self.count(object) > *most) {
            return Err(Stop::Refused("more names than the source reckons with"));
        }
        self.mutated();
        Ok(Outcome::Done)
    }

    fn unlink(&mut self, at: &Place) -> Result<Outcome, Stop> {
        let Some(object) = self.get(at) else { return Ok(Outcome::Missing) };
        if self.is_directory(&object) {
            return Err(Stop::Refused("unlink of a directory"));
        }
        self.spark()?;
        let directory = self.directory_of(at).unwrap();
        self.names(&directory).unwrap().remove(&at.name);
        self.mutated();
        Ok(Outcome::Done)
    }

    fn remove_directory(&mut self, at: &Place) -> Result<Outcome, Stop> {
        let Some(object) = self.get(at) else { return Ok(Outcome::Missing) };
        match &self.nodes[&object] {
            Node::File(_) => return Err(Stop::Refused("rmdir of a file")),
            Node::Directory(names) if !names.is_empty() => return Ok(Outcome::NotEmpty),
            Node::Directory(_) => {}
        }
        self.spark()?;
        let directory = self.directory_of(at).unwrap();
        self.names(&directory).unwrap().remove(&at.name);
        self.mutated();
        Ok(Outcome::Done)
    }

    fn list(&mut self, directory: &ReplicaHandle) -> Result<Vec<Name>, Stop> {
        Ok(self.names(directory).map(|names| names.keys().cloned().collect()).unwrap_or_default())
    }

    fn rewrite(&mut self, object: &ReplicaHandle, from: &Place) -> Result<Outcome, Stop> {
        let Some(Node::File(bytes)) = self.get(from).and_then(|f| self.nodes.get(&f)).cloned()
        else {
            return Ok(Outcome::Missing);
        };
        self.spark()?;
        match self.nodes.get_mut(object) {
            Some(Node::File(content)) => *content = bytes,
            _ => return Ok(Outcome::Missing),
        }
        self.mutated();
        Ok(Outcome::Done)
    }

    fn patch(
        &mut self,
        object: &ReplicaHandle,
        literals: &Place,
        _list: &Place,
        _size: u64,
    ) -> Result<Outcome, Stop> {
        self.rewrite(object, literals)
    }

    fn append(&mut self, object: &ReplicaHandle, at: u64, bytes: &[u8]) -> Result<Outcome, Stop> {
        self.spark()?;
        match self.nodes.get_mut(object) {
            Some(Node::File(content)) => {
                content.resize(at as usize, 0);
                content.extend_from_slice(bytes);
            }
            _ => return Ok(Outcome::Missing),
        }
        self.mutated();
        Ok(Outcome::Done)
    }

    fn set_attributes(
        &mut self,
        object: &ReplicaHandle,
        state: &ObjectState,
    ) -> Result<Outcome, Stop> {
        self.spark()?;
        self.modes.insert(object.clone(), state.attributes.mode);
        self.mutated();
        Ok(Outcome::Done)
    }

    fn set_mtime(&mut self, _: &ReplicaHandle, _: Timestamp) -> Result<Outcome, Stop> {
        Ok(Outcome::Done)
    }
}
