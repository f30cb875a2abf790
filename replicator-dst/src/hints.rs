//! Where the objects of a batch stand before it, for an applier that goes by
//! path.

use std::collections::{HashMap, HashSet};

use replicator_common::id::{BatchId, ObjectId, ReplicaHandle};
use replicator_common::name::Name;
use replicator_common::object::Kind;
use replicator_common::wire::Op;

use crate::apply::{Place, Step, Within};
use crate::objects::{Entry, Known, Objects, Position};

/// Steps that say where everything that `ops` name stands, and the directories
/// above it.
pub fn hints<O: Objects>(
    objects: &O,
    root: &ReplicaHandle,
    batch: BatchId,
    ops: &[Op],
) -> Result<Vec<Step>, O::Error> {
    let objects = &Before::new(objects, root, batch, ops);
    let mut seen = HashSet::new();
    let mut steps = Vec::new();
    for op in ops {
        let named: [Option<&ObjectId>; 3] = match op {
            Op::Entry { directory, old, new, .. } => [Some(directory), old.as_ref(), new.as_ref()],
            Op::Adopt { object, directory, .. } => [Some(object), Some(directory), None],
            Op::Put { object, .. }
            | Op::Drop { object }
            | Op::Orphan { object }
            | Op::Leave { object }
            | Op::SetAside { object } => [Some(object), None, None],
            Op::Root { .. } => [None, None, None],
        };
        for object in named.into_iter().flatten() {
            let chain = place_chain(objects, object, &mut seen)?;
            steps.extend(chain.into_iter().map(|(object, at)| Step::Hint { object, at }));
        }
        // An object of several names is known by one of them, which may be the
        // one that goes.
        match op {
            Op::Entry { directory, name, old, new } => {
                for object in [old, new].into_iter().flatten() {
                    steps.extend(entry_hint(objects, directory, name, object)?);
                }
            }
            Op::Adopt { object, directory, name, .. } => {
                steps.extend(entry_hint(objects, directory, name, object)?);
            }
            _ => {}
        }
    }
    Ok(steps)
}

/// The objects map with what the batch itself says of objects that are in the
/// replica already: of those that it adopts, the map knows nothing yet.
struct Before<'a, O> {
    objects: &'a O,
    adopted: HashMap<&'a ObjectId, Known>,
}

impl<'a, O: Objects> Before<'a, O> {
    fn new(objects: &'a O, root: &ReplicaHandle, batch: BatchId, ops: &'a [Op]) -> Self {
        let known = |handle: &ReplicaHandle, kind, position| {
            let (handle, links) = (Some(handle.clone()), 1);
            Known { handle, kind, position, links, content: batch }
        };
        let mut adopted = HashMap::new();
        for op in ops {
            match op {
                Op::Root { object } => {
                    adopted.insert(object, known(root, Kind::Directory, Position::Root));
                }
                Op::Adopt { object, handle, directory, name, kind } => {
                    let entry = Entry { directory: directory.clone(), name: name.clone() };
                    adopted.insert(object, known(handle, *kind, Position::Entry(entry)));
                }
                _ => {}
            }
        }
        Self { objects, adopted }
    }
}

impl<O: Objects> Objects for Before<'_, O> {
    type Error = O::Error;

    fn get(&self, object: &ObjectId) -> Result<Option<Known>, O::Error> {
        match self.adopted.get(object) {
            Some(known) => Ok(Some(known.clone())),
            None => self.objects.get(object),
        }
    }
}

/// That an object may stand under a name.
fn entry_hint<O: Objects>(
    objects: &O,
    directory: &ObjectId,
    name: &Name,
    object: &ObjectId,
) -> Result<Option<Step>, O::Error> {
    let within = objects.get(directory)?.and_then(|known| known.handle);
    let handle = objects.get(object)?.and_then(|known| known.handle);
    Ok(within.zip(handle).map(|(within, object)| {
        let at = Place { within: Within::Replica(within), name: name.clone() };
        Step::Hint { object, at }
    }))
}

/// Where an object and the directories above it stand, as far as not `seen` yet.
pub fn place_chain<O: Objects>(
    objects: &O,
    object: &ObjectId,
    seen: &mut HashSet<ObjectId>,
) -> Result<Vec<(ReplicaHandle, Place)>, O::Error> {
    let mut chain = Vec::new();
    let mut at = object.clone();
    while seen.insert(at.clone()) {
        let Some(known) = objects.get(&at)? else { break };
        let Some(handle) = known.handle else { break };
        let Some(entry) = known.position.entry() else {
            chain.push((handle, Place::orphan(&at)));
            break;
        };
        let Some(parent) = objects.get(&entry.directory)?.and_then(|known| known.handle) else {
            break;
        };
        chain.push((handle, Place { within: Within::Replica(parent), name: entry.name.clone() }));
        at = entry.directory.clone();
    }
    Ok(chain)
}
