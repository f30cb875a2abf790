//! A source as naive as can be, and the batches that lead from one of its states
//! to another. Shared by the tests of planning, on a model, and by
//! `tests/crashes.rs`, on real files.

use std::collections::{BTreeMap, BTreeSet};

use replicator_common::id::ObjectId;
use replicator_common::name::Name;
use replicator_common::object::{Attributes, Kind, ObjectState};
use replicator_common::time::Timestamp;
use replicator_common::wire::{ContentSource, Op};

/// The source, as naive as can be: objects, entries, content.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Source {
    pub objects: BTreeMap<ObjectId, (Kind, Vec<u8>, u32)>,
    pub entries: BTreeMap<(ObjectId, Name), ObjectId>,
    next: u32,
}

pub fn source_id(n: u32) -> ObjectId {
    ObjectId::new(1, &n.to_be_bytes()).unwrap()
}

/// What no other file ever held.
fn content(n: u32) -> Vec<u8> {
    format!("{n} ").repeat(1 + (n as usize * 7) % 40).into_bytes()
}

pub fn name(n: u8) -> Name {
    Name::new(&[b'a' + n % 6]).unwrap()
}

impl Source {
    pub fn new() -> Self {
        let mut source = Self::default();
        source.make(Kind::Directory);
        source
    }

    fn make(&mut self, kind: Kind) -> ObjectId {
        let id = source_id(self.next);
        let content = if kind == Kind::File { content(self.next) } else { vec![] };
        self.objects.insert(id.clone(), (kind, content, 0o600));
        self.next += 1;
        id
    }

    pub fn links(&self, object: &ObjectId) -> usize {
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

    pub fn is_directory(&self, object: &ObjectId) -> bool {
        self.objects[object].0 == Kind::Directory
    }

    /// Whether `object` may be renamed or exchanged to `to` in this directory.
    fn fits(&self, object: &ObjectId, directory: &ObjectId) -> bool {
        !self.is_directory(object) || !self.inside(directory, object)
    }

    pub fn act(&mut self, action: &Action) {
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
                        entry.1 = content(next);
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
pub enum Action {
    Create(u8, u8, bool),
    Write(u8),
    Rename(u8, u8, u8),
    Exchange(u8, u8),
    Link(u8, u8, u8),
    Unlink(u8),
    Detach(u8),
    Reattach(u8, u8, u8),
}

pub fn state(kind: Kind, mode: u32, size: u64) -> ObjectState {
    let attributes = Attributes { mode, uid: 0, gid: 0, mtime: Timestamp(0), xattrs: Vec::new() };
    ObjectState { kind, attributes, size, rdev: 0 }
}

/// The operations that lead from `old` to `new`, as the source promises them.
/// `dead` says which of the objects without entries are dead.
pub fn diff(old: &Source, new: &Source, dead: &BTreeSet<ObjectId>, first: bool) -> Vec<Op> {
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
                (Some((Kind::Directory, ..)), false) if had > 0 && content.len() % 2 == 1 => {
                    ops.push(Op::Leave { object: object.clone() });
                }
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

/// Objects that have no entry and are said to be dead: a directory takes along
/// what hangs below it, so that the plan stays closed.
pub fn choose_dead(source: &mut Source, seed: u32) -> BTreeSet<ObjectId> {
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

/// The batch that leads from `old` to `new`, and what is in no replica after it;
/// `seed` chooses which of the objects without entries are dead.
pub fn next_batch(
    old: &Source,
    new: &mut Source,
    seed: u32,
    first: bool,
) -> (Vec<Op>, BTreeSet<ObjectId>) {
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
    (diff(old, new, &loose, first), loose)
}
