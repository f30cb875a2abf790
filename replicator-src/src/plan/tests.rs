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
mod traps;

const ROOT: u32 = 1;

fn id(inode: u32) -> ObjectId {
    ObjectId::new(1, &inode.to_be_bytes()).unwrap()
}

fn inode(id: &ObjectId) -> u32 {
    u32::from_be_bytes(id.body().try_into().unwrap())
}

fn name(n: u8) -> Name {
    Name::new(&[b'a' + n % 4]).unwrap()
}

#[derive(Clone, Debug, PartialEq)]
struct Inode {
    kind: Kind,
    content: u32,
    changed: i64,
    entries: BTreeMap<Name, u32>,
}

/// The source: inodes 1 (the root) and 2 (a directory outside the source).
#[derive(Clone)]
struct World {
    inodes: BTreeMap<u32, Inode>,
    next: u32,
    clock: i64,
    records: Vec<Record>,
    /// Where directories were seen last, when only names lead to objects.
    places: Option<BTreeMap<u32, (u32, Name)>>,
}

impl World {
    fn new() -> Self {
        let (inodes, records) = (BTreeMap::new(), Vec::new());
        let mut world = Self { inodes, next: 1, clock: 0, records, places: None };
        world.make(Kind::Directory);
        world.make(Kind::Directory);
        world
    }

    fn make(&mut self, kind: Kind) -> u32 {
        let inode = self.next;
        self.next += 1;
        self.clock += 1;
        let entries = BTreeMap::new();
        self.inodes.insert(inode, Inode { kind, content: 0, changed: self.clock, entries });
        inode
    }

    fn directories(&self) -> Vec<u32> {
        self.of_kind(Kind::Directory)
    }

    fn of_kind(&self, kind: Kind) -> Vec<u32> {
        self.inodes.iter().filter(|(_, i)| i.kind == kind).map(|(n, _)| *n).collect()
    }

    fn links(&self, target: u32) -> usize {
        self.inodes.values().flat_map(|i| i.entries.values()).filter(|n| **n == target).count()
    }

    fn is_below(&self, directory: u32, above: u32) -> bool {
        directory == above
            || self.inodes[&above]
                .entries
                .values()
                .any(|n| self.inodes[n].kind == Kind::Directory && self.is_below(directory, *n))
    }

    fn touch(&mut self, inode: u32) {
        self.clock += 1;
        if let Some(i) = self.inodes.get_mut(&inode) {
            i.changed = self.clock;
        }
    }

    fn entry_event(&mut self, directory: u32, name: &Name) {
        self.touch(directory);
        self.records.push(Record::Entry { directory: id(directory), name: name.clone() });
    }

    fn object_event(&mut self, inode: u32, content: bool) {
        let what = What { content, attributes: true };
        self.records.push(Record::Object { object: id(inode), what });
    }

    /// Forgets inodes without links.
    fn collect(&mut self) {
        loop {
            let dead: Vec<u32> =
                self.inodes.keys().copied().filter(|n| *n > 2 && self.links(*n) == 0).collect();
            if dead.is_empty() {
                return;
            }
            for n in dead {
                self.inodes.remove(&n);
            }
        }
    }

    fn act(&mut self, (what, a, b, c): (u8, u8, u8, u8)) {
        let directories = self.directories();
        let pick = |list: &[u32], n: u8| (!list.is_empty()).then(|| list[n as usize % list.len()]);
        let Some(d) = pick(&directories, a) else { return };
        let n = name(b);
        let there = self.inodes[&d].entries.get(&n).copied();
        match what % 8 {
            0 | 1 if there.is_none() => {
                let kind = if what % 2 == 0 { Kind::File } else { Kind::Directory };
                let new = self.make(kind);
                self.inodes.get_mut(&d).unwrap().entries.insert(n.clone(), new);
                self.entry_event(d, &n);
            }
            2 => {
                let files = self.of_kind(Kind::File);
                let Some(file) = pick(&files, b) else { return };
                self.touch(file);
                self.inodes.get_mut(&file).unwrap().content = self.clock as u32;
                self.object_event(file, true);
            }
            3 => {
                let Some(target) = there else { return };
                if !self.inodes[&target].entries.is_empty() {
                    return;
                }
                self.inodes.get_mut(&d).unwrap().entries.remove(&n);
                self.touch(target);
                self.entry_event(d, &n);
                self.object_event(target, false);
                self.collect();
            }
            4 if there.is_none() => {
                let files = self.of_kind(Kind::File);
                let Some(file) = pick(&files, c) else { return };
                self.inodes.get_mut(&d).unwrap().entries.insert(n.clone(), file);
                self.touch(file);
                self.object_event(file, false);
                self.entry_event(d, &n);
            }
            _ => self.rename(d, n, c),
        }
    }

    fn rename(&mut self, d: u32, n: Name, c: u8) {
        let Some(moved) = self.inodes[&d].entries.get(&n).copied() else { return };
        let directories = self.directories();
        let to = directories[c as usize % directories.len()];
        let target = name(c / 16);
        let is_directory = self.inodes[&moved].kind == Kind::Directory;
        if is_directory && self.is_below(to, moved) {
            return;
        }
        if let Some(victim) = self.inodes[&to].entries.get(&target).copied() {
            let fits = victim != moved
                && self.inodes[&victim].kind == self.inodes[&moved].kind
                && self.inodes[&victim].entries.is_empty();
            if !fits {
                return;
            }
            self.touch(victim);
            self.object_event(victim, false);
        }
        self.inodes.get_mut(&d).unwrap().entries.remove(&n);
        self.inodes.get_mut(&to).unwrap().entries.insert(target.clone(), moved);
        self.touch(moved);
        self.entry_event(d, &n);
        self.entry_event(to, &target);
        self.object_event(moved, false);
        self.collect();
    }

    /// Whether an object can be opened: by handle, or under a name that leads
    /// to it.
    fn reaches(&self, inode: u32, hint: Option<(u32, Name)>) -> bool {
        let Some(places) = &self.places else { return true };
        let mut hints = hint.into_iter().chain(places.get(&inode).cloned());
        inode == ROOT
            || hints.any(|(directory, name)| {
                self.inodes.get(&directory).and_then(|i| i.entries.get(&name)) == Some(&inode)
                    && self.reaches(directory, None)
            })
    }

    fn state(&self, inode: u32) -> ObjectState {
        let i = &self.inodes[&inode];
        ObjectState {
            kind: i.kind,
            attributes: Attributes {
                mode: 0,
                uid: 0,
                gid: 0,
                mtime: Timestamp(i.changed),
                xattrs: Vec::new(),
            },
            size: 0,
            rdev: 0,
        }
    }
}

/// The source as planning sees it; every look may be followed by a change.
impl Tree for World {
    type Error = Infallible;

    fn lookup(&mut self, directory: &ObjectId, name: &Name) -> Result<Lookup, Infallible> {
        let above = inode(directory);
        if !self.reaches(above, None) {
            return Ok(Lookup::Away);
        }
        let Some(directory) = self.inodes.get(&above) else { return Ok(Lookup::Absent) };
        let Some(n) = directory.entries.get(name) else { return Ok(Lookup::Absent) };
        let i = &self.inodes[n];
        if let (Kind::Directory, Some(places)) = (i.kind, &mut self.places) {
            places.insert(*n, (above, name.clone()));
        }
        let stat = Stat {
            kind: i.kind,
            mode: 0,
            uid: 0,
            gid: 0,
            nlink: self.links(*n) as u32,
            size: 0,
            blocks: 0,
            mtime: Timestamp(i.changed),
            ctime: Timestamp(i.changed),
            btime: None,
            rdev: 0,
            dev: 0,
            ino: u64::from(*n),
            mount_id: 0,
        };
        Ok(Lookup::Found(Seen { object: id(*n), stat }))
    }

    fn list(&mut self, directory: &ObjectId) -> Result<Listed, Infallible> {
        let n = inode(directory);
        Ok(match self.inodes.get(&n) {
            _ if !self.reaches(n, None) => Listed::Away,
            Some(i) => Listed::Names(i.entries.keys().cloned().collect()),
            None => Listed::Gone,
        })
    }

    fn fate(&mut self, object: &ObjectId) -> Result<Fate, Infallible> {
        // Of what is not found by name, nobody knows whether it lives.
        let alive = self.inodes.contains_key(&inode(object)) || self.places.is_some();
        Ok(if alive { Fate::Alive } else { Fate::Dead })
    }
}

/// The index as a map.
#[derive(Default)]
struct Map {
    objects: BTreeMap<ObjectId, Known>,
    entries: BTreeMap<(ObjectId, Name), ObjectId>,
    orphans: BTreeMap<ObjectId, Orphan>,
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
    fn apply(&mut self, delta: &Delta) {
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
struct Replica {
    objects: BTreeMap<ObjectId, (ObjectState, u32)>,
    entries: BTreeMap<(ObjectId, Name), ObjectId>,
    orphans: BTreeSet<ObjectId>,
}

impl Replica {
    /// Applies a batch, checking what the source promises.
    fn apply(&mut self, ops: &[Op], contents: &HashMap<ObjectId, u32>) {
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

fn contents_state() -> ObjectState {
    World::new().state(ROOT)
}

/// One replication of a world.
struct Run {
    world: World,
    index: Map,
    replica: Replica,
    dirty: Dirty,
    astray: Dirty,
    cursor: usize,
    batch: u64,
    held: Vec<(ObjectId, Hold)>,
    walking: bool,
    limits: Limits,
    /// See [`Settings::apart`].
    apart: usize,
}

impl Run {
    /// A world before the initial sync.
    fn new(world: World) -> Self {
        Self {
            world,
            index: Map::default(),
            replica: Replica::default(),
            dirty: Dirty::default(),
            astray: Dirty::default(),
            cursor: 0,
            batch: 0,
            held: Vec::new(),
            walking: true,
            limits: Limits::default(),
            apart: 1000,
        }
    }

    /// Those that a walk is told of.
    fn orphans(&self) -> Vec<ObjectId> {
        let orphans = self.index.orphans.iter().filter(|(_, orphan)| !orphan.left);
        orphans.map(|(object, _)| object.clone()).collect()
    }

    fn absorb(&mut self, count: usize) {
        let end = self.world.records.len().min(self.cursor + count);
        for record in &self.world.records[self.cursor..end] {
            self.dirty.absorb(record);
        }
        self.cursor = end;
    }

    /// What waits is looked at again when its content is there, `large` being those of
    /// which it is not, or when a name of it is looked at.
    fn release(&mut self, large: u32) {
        let what = What { content: true, attributes: true };
        for (object, hold) in std::mem::take(&mut self.held) {
            let object = &object;
            let comes = large == 0 || !inode(object).is_multiple_of(large);
            let had = self.index.entries.iter().filter(|(_, one)| *one == object);
            let names = had.map(|(place, _)| place);
            let touched = names.into_iter().any(|place| self.dirty.entries.contains_key(place));
            let looked_at = touched && self.index.objects.contains_key(object);
            if !(comes || looked_at) {
                self.held.push((object.clone(), hold));
                continue;
            }
            for (directory, name) in hold.entries {
                self.dirty.entry(directory, name, what);
            }
            self.dirty.object(object.clone(), what);
        }
    }

    /// What the batch leaves to wait, and what waited and was not looked at.
    fn hold(
        &mut self,
        mut left: BTreeMap<ObjectId, Hold>,
        resolve: &Resolve,
        outcomes: &HashMap<ObjectId, Outcome>,
    ) {
        for (object, mut old) in std::mem::take(&mut self.held) {
            if resolve.under_way.contains_key(&object) {
                old.entries.retain(|place| still_leads(&object, place, resolve));
            }
            match left.get_mut(&object) {
                Some(hold) => hold.entries.extend(old.entries),
                None if is_through(&object, &old.entries, resolve, outcomes) => {
                    // Names that were not looked at are, in the next.
                    for (directory, name) in old.entries {
                        let place = (directory, name);
                        if !resolve.bindings.contains_key(&place) {
                            self.dirty.entry(place.0, place.1, What::default());
                        }
                    }
                }
                None => drop(left.insert(object, old)),
            }
        }
        self.held = left.into_iter().collect();
    }

    /// Builds one batch; `between` changes the world between resolving,
    /// reading and assembling. `large`: inodes whose content is not ready.
    fn batch(
        &mut self,
        between: &[Action],
        budget: usize,
        large: u32,
        settled: bool,
        follow: bool,
    ) {
        self.batch += 1;
        let known = self.held.iter().filter(|(one, _)| self.index.objects.contains_key(one));
        let under_way: HashMap<_, _> =
            known.map(|(object, hold)| (object.clone(), hold.reason.clone())).collect();
        let elsewhere = |object: &ObjectId, hold: &Hold| {
            hold.entries.iter().any(|place| self.index.entries.get(place) != Some(object))
        };
        let named = self.held.iter().filter(|(object, hold)| elsewhere(object, hold));
        let named = named.map(|(object, _)| object.clone()).collect();
        self.release(large);
        let quiet = self.dirty.listings.is_empty()
            && self.astray.is_empty()
            && self.cursor == self.world.records.len();
        let astray = std::mem::take(&mut self.astray);
        self.dirty.merge(recall(astray, &id(ROOT), &self.index, &mut self.world).unwrap());
        let mut resolve = Resolve::default();
        resolve.walking = self.walking;
        (resolve.under_way, resolve.named) = (under_way, named);
        resolve.waiting = self.walking.then(HashSet::default);
        let leaves = self.index.orphans.values().any(|orphan| orphan.left);
        resolve.root = (leaves || self.world.places.is_some()).then(|| id(ROOT));
        if !self.index.objects.contains_key(&id(ROOT)) {
            resolve.begin_at(&id(ROOT));
        }
        let budget = Budget {
            objects: budget,
            entries: budget * 2,
            compared: budget * 3,
            bytes: u64::MAX,
            large: 0,
        };
        resolve.feed(&mut self.dirty, budget, &self.index, &mut self.world).unwrap();
        let half = between.len() / 2;
        between[..half].iter().for_each(|action| self.world.act(*action));
        let (mut outcomes, mut contents) = self.read(&mut resolve, large);
        if follow {
            // What changed meanwhile is followed within the batch.
            self.absorb(usize::MAX - self.cursor);
            self.release(large);
            resolve.feed(&mut self.dirty, budget, &self.index, &mut self.world).unwrap();
            let (again, fresh) = self.read(&mut resolve, large);
            outcomes.extend(again);
            contents.extend(fresh);
        }
        between[half..].iter().for_each(|action| self.world.act(*action));
        let away = outcomes.values().any(|outcome| *outcome == Outcome::Away);
        let settled = settled && !away && resolve.astray.is_empty() && self.dirty.is_empty();
        let settings = Settings {
            now: Timestamp(self.world.clock),
            floor: Timestamp::NEVER,
            outside_before: settled.then_some(Timestamp(i64::MAX)),
            limits: self.limits,
            apart: self.apart,
        };
        let root = id(ROOT);
        let out =
            assemble(&resolve, &outcomes, &root, settings, &self.index, &mut self.world).unwrap();
        self.dropped_within_bounds(&resolve, &out);
        self.nothing_gives_way_to_half(&outcomes, &out);
        self.index.apply(&out.delta);
        self.replica.apply(&out.ops, &contents);
        assert_eq!(self.index.entries, self.replica.entries);
        for (directory, name) in out.again {
            self.dirty.entry(directory, name, What::default());
        }
        if self.walking {
            let orphaned = out.orphaned.into_iter().map(|orphan| Listing::new(orphan, true));
            self.dirty.listings.extend(orphaned);
        }
        self.hold(out.holds, &resolve, &outcomes);
        self.astray = resolve.astray;
        self.astray.merge(out.astray);
        self.walking &= !(quiet && self.dirty.is_empty() && self.astray.is_empty());
    }

    /// A file that has a name where it could wait for its content does not take
    /// another's (trap 10).
    fn nothing_gives_way_to_half(&self, outcomes: &HashMap<ObjectId, Outcome>, out: &Assembly) {
        let after: BTreeMap<_, _> = out
            .delta
            .entries
            .iter()
            .map(|change| ((&change.directory, &change.name), &change.new))
            .collect();
        let moves =
            |it: &ObjectId| out.delta.entries.iter().any(|change| change.old.as_ref() == Some(it));
        for change in &out.delta.entries {
            let (Some(old), Some(new)) = (&change.old, &change.new) else { continue };
            let directory = self.index.objects[old].state.kind == Kind::Directory;
            // Who has too many names does not take the one that was another's either.
            let fits = self.limits.links.is_none();
            if directory || !fits || !matches!(outcomes.get(new), Some(Outcome::Large { .. })) {
                continue;
            }
            let had = self.index.entries.iter().filter(|(_, object)| *object == new);
            for ((directory, name), _) in had {
                let taken = after.get(&(directory, name)).is_some_and(|new| new.is_some());
                assert!(taken || moves(directory), "{name:?} in {directory} was free for {new}");
            }
        }
    }

    /// What nobody looked at is dropped because what it is in ended.
    fn dropped_within_bounds(&self, resolve: &Resolve, out: &Assembly) {
        let gone = |object: &ObjectId| {
            out.delta.objects.iter().any(|(one, known)| one == object && known.is_none())
        };
        let unseen = out.delta.entries.iter().filter(|change| {
            let place = (change.directory.clone(), change.name.clone());
            let ended = change.new.is_none() && change.old.as_ref().is_some_and(gone);
            ended && !resolve.bindings.contains_key(&place)
        });
        let count = unseen.count();
        assert!(count <= self.apart, "{count} entries are dropped, of at most {}", self.apart);
    }

    fn read(
        &self,
        resolve: &mut Resolve,
        large: u32,
    ) -> (HashMap<ObjectId, Outcome>, HashMap<ObjectId, u32>) {
        let mut outcomes = HashMap::new();
        let mut contents = HashMap::new();
        for (object, need) in resolve.asked.take() {
            let n = inode(&object);
            let hint = need.hint.as_ref().map(|(directory, name)| (inode(directory), name.clone()));
            if !self.world.reaches(n, hint) {
                outcomes.insert(object, Outcome::Away);
                continue;
            }
            let Some(i) = self.world.inodes.get(&n) else {
                outcomes.insert(object, Outcome::Gone);
                continue;
            };
            if need.content && i.kind == Kind::File && large != 0 && n.is_multiple_of(large) {
                outcomes.insert(object, Outcome::Large { size: 1 });
                continue;
            }
            let packed = need.content && i.kind == Kind::File;
            let known = Known {
                state: self.world.state(n),
                ctime: Timestamp(i.changed),
                // Far from the change, so that nothing is in doubt; but content
                // that was not looked at is.
                read_at: Timestamp(if packed { i64::MAX } else { i.changed }),
                version: BatchId(self.batch),
                content: Content::Whole(Hash::of(&i.content.to_be_bytes())),
                entry: None,
                links: 0,
                nlink: self.world.links(n) as u32,
            };
            contents.insert(object.clone(), i.content);
            let content = match packed {
                true => ContentSource::Packed { version: 1 },
                false => ContentSource::Unchanged,
            };
            outcomes.insert(object, Outcome::Ship { known, content });
        }
        (outcomes, contents)
    }

    /// Everything has happened: a few batches later the replica is the source.
    fn finish(&mut self) {
        for _ in 0..12 {
            self.absorb(usize::MAX - self.cursor);
            let settled = !self.walking;
            self.batch(&[], 1000, 0, settled, false);
        }
        // Each batch takes something from a tree that left.
        for _ in 0..1000 {
            if !self.index.orphans.values().any(|orphan| orphan.left) {
                break;
            }
            self.batch(&[], 1000, 0, true, false);
        }
        let mut entries = BTreeMap::new();
        let mut objects = BTreeSet::from([ROOT]);
        let mut queue = vec![ROOT];
        while let Some(n) = queue.pop() {
            for (name, child) in &self.world.inodes[&n].entries {
                entries.insert((id(n), name.clone()), id(*child));
                if objects.insert(*child) {
                    queue.push(*child);
                }
            }
        }
        assert_eq!(self.replica.entries, entries, "entries");
        assert!(self.replica.orphans.is_empty(), "orphans are left");
        let kept: BTreeSet<u32> = self.replica.objects.keys().map(inode).collect();
        assert_eq!(kept, objects, "objects");
        for (object, (state, content)) in &self.replica.objects {
            let n = inode(object);
            assert_eq!(state, &self.world.state(n), "state of {n}");
            assert_eq!(*content, self.world.inodes[&n].content, "content of {n}");
        }
    }
}

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
