//! The models of an index and of a replica.

use super::*;

/// The index as a map.
#[derive(Default)]
pub(super) struct Map {
    pub(super) objects: BTreeMap<ObjectId, Known>,
    pub(super) entries: BTreeMap<(ObjectId, Name), ObjectId>,
    pub(super) orphans: BTreeMap<ObjectId, Orphan>,
}

impl View for Map {
    type Error = Infallible;

    fn object(&self, object: &ObjectId) -> Result<Option<Known>, Infallible> {
        Ok(self.objects.get(object).cloned())
    }

    fn entry(&self, directory: &ObjectId, name: &Name) -> Result<Option<ObjectId>, Infallible> {
        Ok(self.entries.get(&(directory.clone(), name.clone())).cloned())
    }

    fn children(&self, directory: &ObjectId) -> Result<Vec<(Name, ObjectId)>, Infallible> {
        let all = self.entries.iter().filter(|((d, _), _)| d == directory);
        Ok(all.map(|((_, n), o)| (n.clone(), o.clone())).collect())
    }

    fn links(&self, object: &ObjectId) -> Result<Vec<(ObjectId, Name)>, Infallible> {
        Ok(self.entries.iter().filter(|(_, o)| *o == object).map(|(p, _)| p.clone()).collect())
    }

    fn orphans(&self) -> Result<Vec<(ObjectId, Orphan)>, Infallible> {
        Ok(self.orphans.iter().map(|(o, orphan)| (o.clone(), *orphan)).collect())
    }
}

impl Map {
    pub(super) fn apply(&mut self, delta: &Delta) {
        for change in &delta.entries {
            let place = (change.directory.clone(), change.name.clone());
            assert_eq!(self.entries.get(&place), change.old.as_ref(), "delta's old entry");
            match &change.new {
                Some(new) => drop(self.entries.insert(place, new.clone())),
                None => drop(self.entries.remove(&place)),
            }
        }
        for (object, known) in &delta.objects {
            match known {
                Some(known) => drop(self.objects.insert(object.clone(), known.clone())),
                None => drop(self.objects.remove(object)),
            }
        }
        for (object, orphan) in &delta.orphans {
            match orphan {
                Some(orphan) => drop(self.orphans.insert(object.clone(), *orphan)),
                None => drop(self.orphans.remove(object)),
            }
        }
    }
}

/// The replica: what operations made of it.
#[derive(Default)]
pub(super) struct Replica {
    pub(super) objects: BTreeMap<ObjectId, (ObjectState, u32)>,
    pub(super) entries: BTreeMap<(ObjectId, Name), ObjectId>,
    pub(super) orphans: BTreeSet<ObjectId>,
}

impl Replica {
    /// Applies a batch, checking what the source promises.
    pub(super) fn apply(&mut self, ops: &[Op], contents: &HashMap<ObjectId, u32>) {
        for op in ops {
            match op {
                Op::Root { object } => {
                    let state = contents_state();
                    self.objects.insert(object.clone(), (state, 0));
                }
                Op::Put { object, state, content, new, .. } => {
                    assert_eq!(*new, !self.objects.contains_key(object), "new of {object}");
                    let old = self.objects.get(object).map_or(0, |(_, content)| *content);
                    let content = match content {
                        ContentSource::Packed { .. } => contents[object],
                        _ => old,
                    };
                    self.objects.insert(object.clone(), (state.clone(), content));
                }
                _ => {}
            }
        }
        for op in ops {
            let Op::Entry { directory, name, old, new } = op else { continue };
            let place = (directory.clone(), name.clone());
            assert_eq!(self.entries.get(&place), old.as_ref(), "old of {name} in {directory}");
            assert!(self.objects.contains_key(directory), "directory {directory} is unknown");
            match new {
                Some(new) => {
                    assert!(self.objects.contains_key(new), "entry leads to unknown {new}");
                    self.orphans.remove(new);
                    self.entries.insert(place, new.clone());
                }
                None => drop(self.entries.remove(&place)),
            }
        }
        for op in ops {
            match op {
                Op::Drop { object } => {
                    assert!(self.objects.remove(object).is_some(), "dropped {object} is unknown");
                    self.orphans.remove(object);
                    assert!(!self.entries.values().any(|o| o == object), "dropped with an entry");
                    assert!(!self.entries.keys().any(|(d, _)| d == object), "dropped not empty");
                }
                Op::Orphan { object } | Op::Leave { object } => {
                    self.orphans.insert(object.clone());
                }
                _ => {}
            }
        }
        let mut ends = BTreeSet::new();
        for op in ops {
            if let Op::Drop { object } | Op::Orphan { object } | Op::Leave { object } = op {
                assert!(ends.insert(object), "the end of {object} is named twice");
            }
        }
        for object in self.objects.keys().filter(|o| **o != id(ROOT)) {
            let entries = self.entries.values().filter(|o| *o == object).count();
            let orphan = self.orphans.contains(object);
            assert_eq!(entries == 0, orphan, "{object}: {entries} entries, orphan: {orphan}");
            let directory = self.objects[object].0.kind == Kind::Directory;
            assert!(!directory || entries <= 1, "directory {object} has {entries} entries");
            let (mut at, mut depth) = (object.clone(), 0);
            while let Some(((above, _), _)) = self.entries.iter().find(|(_, o)| **o == at) {
                depth += 1;
                assert!(depth <= self.objects.len(), "directory {at} is inside itself");
                at = above.clone();
            }
        }
    }
}

pub(super) fn contents_state() -> ObjectState {
    World::new().state(ROOT)
}
