//! The source's file system: inodes, entries, and what the kernel tells of
//! changes. It remembers every state that any part of it ever had, with the
//! moment at which the system call returned, which is what the watermark is
//! about.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use rand::Rng;
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use replicator_common::id::ObjectId;
use replicator_common::name::Name;
use replicator_common::object::{Attributes, Kind, ObjectState};
use replicator_common::sys::stat::Stat;
use replicator_common::time::Timestamp;
use replicator_src::journal::Record;
use replicator_src::plan::{Fate, Listed, Lookup, Seen, Tree};
use replicator_src::watcher::What;

use crate::Never;

/// The root's inode number.
pub const ROOT: u32 = 1;
/// A directory outside the source, of the same file system.
pub const OUTSIDE: u32 = 2;
/// The tick of the file system's clock: change times are as coarse as this.
const TICK: i64 = 4_000_000;
/// A call takes no longer than this: what the engine relies on before it takes an
/// orphan for outside.
const LONGEST: i64 = 90_000_000;
/// No system call has returned yet.
const RUNNING: i64 = i64::MAX;

/// An inode number as the id that planning knows.
pub fn id(inode: u32) -> ObjectId {
    ObjectId::new(1, &inode.to_be_bytes()).unwrap()
}

/// The inode number of an id.
pub fn inode(id: &ObjectId) -> u32 {
    u32::from_be_bytes(id.body().try_into().unwrap())
}

/// What a file or directory is, apart from its names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Body {
    /// Stands for all content.
    pub content: u32,
    /// Stands for all attributes.
    pub mode: u32,
}

/// An inode.
#[derive(Clone, Debug)]
pub struct Inode {
    /// Its kind: file or directory.
    pub kind: Kind,
    /// Its state.
    pub body: Body,
    ctime: i64,
    mtime: i64,
    /// Its entries, of a directory.
    pub entries: BTreeMap<Name, u32>,
}

/// A state, and when the call that made it returned.
#[derive(Clone, Copy, Debug)]
struct Past<T> {
    made: i64,
    returned: i64,
    value: T,
}

/// States, oldest first, with the call that made each.
type History<T> = Vec<(u64, Past<T>)>;

/// A call that has had its effect and has not returned: its events are not told
/// yet (trap 6).
#[derive(Clone, Debug)]
struct Call {
    number: u64,
    made: i64,
    records: Vec<Record>,
}

/// The source's file system.
#[derive(Clone, Debug)]
pub struct World {
    /// The inodes that live.
    pub inodes: BTreeMap<u32, Inode>,
    next: u32,
    /// The wall clock, nanoseconds.
    pub now: i64,
    /// What the kernel has queued for the watcher.
    pub events: VecDeque<Record>,
    calls: Vec<Call>,
    number: u64,
    /// When a call last was under way for longer than a moment.
    pub busy: i64,
    /// Which call brought what is in the source into it, and when that returned.
    entered: BTreeMap<u32, (u64, i64)>,
    /// History, by slot and by inode; the number says which call made it.
    slots: BTreeMap<(u32, Name), History<Option<u32>>>,
    bodies: BTreeMap<u32, History<Body>>,
    /// One operation after the other, in words.
    pub log: VecDeque<String>,
}

fn name(n: u8) -> Name {
    Name::new(&[b'a' + n % 5]).unwrap()
}

/// Every name that an entry can have.
pub fn names() -> impl Iterator<Item = Name> {
    (0..5).map(name)
}

impl Default for World {
    fn default() -> Self {
        Self::new()
    }
}

impl World {
    /// An empty source.
    pub fn new() -> Self {
        let mut world = Self {
            inodes: BTreeMap::new(),
            next: ROOT,
            now: 1_700_000_000_000_000_000,
            events: VecDeque::new(),
            calls: Vec::new(),
            number: 0,
            busy: 0,
            entered: BTreeMap::from([(ROOT, (0, i64::MIN))]),
            slots: BTreeMap::new(),
            bodies: BTreeMap::new(),
            log: VecDeque::new(),
        };
        world.make(Kind::Directory);
        world.make(Kind::Directory);
        world
    }

    fn ticks(&self) -> i64 {
        self.now - self.now % TICK
    }

    fn make(&mut self, kind: Kind) -> u32 {
        let inode = self.next;
        self.next += 1;
        let body = Body { content: 0, mode: 0o700 };
        let (ctime, mtime) = (self.ticks(), self.ticks());
        let made = Inode { kind, body, ctime, mtime, entries: BTreeMap::new() };
        self.inodes.insert(inode, made);
        self.note_body(inode);
        inode
    }

    fn note_body(&mut self, inode: u32) {
        let past = Past { made: self.now, returned: RUNNING, value: self.inodes[&inode].body };
        self.bodies.entry(inode).or_default().push((self.number, past));
    }

    fn bind(&mut self, directory: u32, name: &Name, to: Option<u32>) {
        let now = self.ticks();
        let above = self.inodes.get_mut(&directory).unwrap();
        match to {
            Some(to) => above.entries.insert(name.clone(), to),
            None => above.entries.remove(name),
        };
        (above.ctime, above.mtime) = (now, now);
        let past = Past { made: self.now, returned: RUNNING, value: to };
        self.slots.entry((directory, name.clone())).or_default().push((self.number, past));
    }

    /// Whether an inode, alive or dead, is a directory: those have no content.
    fn is_directory(&self, inode: u32) -> bool {
        self.bodies[&inode].last().is_some_and(|(_, past)| past.value.content == 0)
    }

    /// Entries that lead to an inode.
    pub fn links(&self, target: u32) -> usize {
        self.inodes.values().flat_map(|i| i.entries.values()).filter(|n| **n == target).count()
    }

    fn is_below(&self, directory: u32, above: u32) -> bool {
        directory == above
            || self.inodes[&above].entries.values().any(|child| {
                self.inodes[child].kind == Kind::Directory && self.is_below(directory, *child)
            })
    }

    fn touch(&mut self, inode: u32) {
        let now = self.ticks();
        if let Some(touched) = self.inodes.get_mut(&inode) {
            touched.ctime = now;
        }
    }

    fn collect(&mut self) {
        loop {
            let dead: Vec<u32> = self.inodes.keys().copied().collect();
            let dead: Vec<u32> =
                dead.into_iter().filter(|n| *n > OUTSIDE && self.links(*n) == 0).collect();
            if dead.is_empty() {
                return;
            }
            dead.iter().for_each(|n| drop(self.inodes.remove(n)));
        }
    }

    fn of_kind(&self, kind: Kind) -> Vec<u32> {
        self.inodes.iter().filter(|(_, i)| i.kind == kind).map(|(n, _)| *n).collect()
    }

    /// One system call; its events are told at once, or when it returns.
    pub fn act(&mut self, random: &mut StdRng) {
        self.number += 1;
        let directories = self.of_kind(Kind::Directory);
        let directory = *directories.choose(random).unwrap();
        let name = name(random.random());
        let there = self.inodes[&directory].entries.get(&name).copied();
        let mut records = Vec::new();
        match (random.random_range(0..10), there) {
            (0..=2, None) => self.create(directory, &name, random, &mut records),
            (3..=4, _) => self.write(random, &mut records),
            (5, Some(target)) => self.remove(directory, &name, target, &mut records),
            (6, None) => self.link(directory, &name, random, &mut records),
            (7, Some(target)) => self.exchange(directory, &name, target, random, &mut records),
            (_, Some(_)) => self.rename(directory, &name, random, &mut records),
            _ => {}
        }
        self.collect();
        if records.is_empty() {
            return;
        }
        self.note_entered();
        self.log.push_back(format!("{} call {}: {}", self.now, self.number, words(&records)));
        if self.log.len() > 60 {
            self.log.pop_front();
        }
        self.calls.push(Call { number: self.number, made: self.now, records });
        if random.random_bool(0.8) {
            self.give_back(self.calls.len() - 1);
        }
    }

    fn note_entered(&mut self) {
        let mut inside = BTreeMap::new();
        let mut queue = vec![ROOT];
        while let Some(inode) = queue.pop() {
            let since = self.entered.get(&inode).copied().unwrap_or((self.number, RUNNING));
            if inside.insert(inode, since).is_none() {
                queue.extend(self.inodes[&inode].entries.values().copied());
            }
        }
        self.entered = inside;
    }

    /// Whether an inode has been in the source since `moment` at least. What
    /// came in later was not changed in the source before.
    pub fn was_inside_since(&self, moment: i64, inode: u32) -> bool {
        self.entered.get(&inode).is_some_and(|(_, since)| *since < moment)
    }

    /// What renames that had had their effect at one moment, and had not returned,
    /// were moving, with all that was below it.
    ///
    /// Nothing is claimed of it: it may have been looked for where it was no more,
    /// and not yet where it was to be, and come afterwards, bit by bit.
    pub fn moving(&self, moment: i64) -> BTreeSet<u32> {
        let (mut from, mut to) = (BTreeSet::new(), BTreeSet::new());
        for past in self.slots.values() {
            for (at, (call, state)) in past.iter().enumerate() {
                if state.made > moment || state.returned < moment {
                    continue;
                }
                to.extend(state.value.map(|inode| (*call, inode)));
                let before = at.checked_sub(1).and_then(|before| past[before].1.value);
                from.extend(before.map(|inode| (*call, inode)));
            }
        }
        let mut moving = BTreeSet::new();
        let mut queue: Vec<u32> = from.intersection(&to).map(|(_, inode)| *inode).collect();
        while let Some(inode) = queue.pop() {
            if moving.insert(inode) {
                queue.extend(names().filter_map(|name| self.led_to(moment, inode, &name)));
            }
        }
        moving
    }

    /// A call that had its effect returns.
    pub fn finish_call(&mut self, random: &mut StdRng) {
        if !self.calls.is_empty() {
            self.give_back(random.random_range(0..self.calls.len()));
        }
    }

    /// Time passes; no call takes for ever.
    pub fn pass(&mut self, nanos: i64) {
        self.now += nanos;
        while self.calls.first().is_some_and(|call| self.now - call.made > LONGEST) {
            self.give_back(0);
        }
    }

    /// All calls return.
    pub fn finish_calls(&mut self) {
        while !self.calls.is_empty() {
            self.give_back(0);
        }
    }

    /// Whether a call has had its effect and has not returned.
    pub fn is_busy(&self) -> bool {
        !self.calls.is_empty()
    }

    fn give_back(&mut self, at: usize) {
        let Call { number, made, records } = self.calls.remove(at);
        if made < self.now {
            self.busy = self.now;
        }
        for record in records {
            // The kernel merges what is queued already (trap 4).
            if !self.events.contains(&record) {
                self.events.push_back(record);
            }
        }
        let now = self.now;
        if made < self.now {
            self.log.push_back(format!("{now} call {number} returns"));
        }
        let slots = self.slots.values_mut().flatten().filter(|(call, _)| *call == number);
        slots.for_each(|(_, past)| past.returned = now);
        let entered = self.entered.values_mut().filter(|(call, _)| *call == number);
        entered.for_each(|(_, returned)| *returned = now);
        let bodies = self.bodies.values_mut().flatten().filter(|(call, _)| *call == number);
        bodies.for_each(|(_, past)| past.returned = now);
    }

    /// The kernel's queue overflows.
    pub fn overflow(&mut self) {
        self.events.clear();
        self.events.push_back(Record::Gap { reason: "overflow".to_owned() });
    }

    fn create(
        &mut self,
        directory: u32,
        name: &Name,
        random: &mut StdRng,
        records: &mut Vec<Record>,
    ) {
        let kind = if random.random_bool(0.7) { Kind::File } else { Kind::Directory };
        let new = self.make(kind);
        self.inodes.get_mut(&new).unwrap().body.content = if kind == Kind::File { new } else { 0 };
        self.note_body(new);
        self.bind(directory, name, Some(new));
        records.push(entry(directory, name));
    }

    fn write(&mut self, random: &mut StdRng, records: &mut Vec<Record>) {
        let all: Vec<u32> = self.inodes.keys().copied().filter(|n| *n != OUTSIDE).collect();
        let Some(target) = all.choose(random).copied() else { return };
        let (now, number) = (self.ticks(), self.number);
        let inode = self.inodes.get_mut(&target).unwrap();
        let content = inode.kind == Kind::File && random.random_bool(0.8);
        if content {
            inode.body.content = 1_000_000 + number as u32;
            inode.mtime = now;
        } else {
            inode.body.mode = 0o600 + (number % 64) as u32;
        }
        inode.ctime = now;
        self.note_body(target);
        records.push(object(target, content));
    }

    fn remove(&mut self, directory: u32, name: &Name, target: u32, records: &mut Vec<Record>) {
        if !self.inodes[&target].entries.is_empty() || target == OUTSIDE {
            return;
        }
        self.bind(directory, name, None);
        self.touch(target);
        records.extend([entry(directory, name), object(target, false)]);
    }

    fn link(
        &mut self,
        directory: u32,
        name: &Name,
        random: &mut StdRng,
        records: &mut Vec<Record>,
    ) {
        let Some(file) = self.of_kind(Kind::File).choose(random).copied() else { return };
        self.bind(directory, name, Some(file));
        self.touch(file);
        records.extend([object(file, false), entry(directory, name)]);
    }

    fn exchange(
        &mut self,
        directory: u32,
        name: &Name,
        target: u32,
        random: &mut StdRng,
        records: &mut Vec<Record>,
    ) {
        let slots = self.inodes.iter().flat_map(|(n, i)| {
            i.entries.iter().map(move |(name, target)| (*n, name.clone(), *target))
        });
        let slots: Vec<_> = slots.collect();
        let Some((other, second, partner)) = slots.choose(random).cloned() else { return };
        let is_directory = |n: u32| self.inodes[&n].kind == Kind::Directory;
        let fits = |moved: u32, to: u32| !is_directory(moved) || !self.is_below(to, moved);
        if partner == target || !fits(target, other) || !fits(partner, directory) {
            return;
        }
        self.bind(directory, name, Some(partner));
        self.bind(other, &second, Some(target));
        [target, partner].iter().for_each(|n| self.touch(*n));
        records.extend([entry(directory, name), entry(other, &second)]);
        records.extend([object(target, false), object(partner, false)]);
    }

    fn rename(&mut self, from: u32, name: &Name, random: &mut StdRng, records: &mut Vec<Record>) {
        let moved = self.inodes[&from].entries[name];
        let to = *self.of_kind(Kind::Directory).choose(random).unwrap();
        let second = self::name(random.random());
        let kind = self.inodes[&moved].kind;
        if kind == Kind::Directory && self.is_below(to, moved) {
            return;
        }
        let victim = self.inodes[&to].entries.get(&second).copied();
        if let Some(victim) = victim {
            let other = &self.inodes[&victim];
            if victim == moved || other.kind != kind || !other.entries.is_empty() {
                return;
            }
            self.touch(victim);
            records.push(object(victim, false));
        }
        self.bind(from, name, None);
        self.bind(to, &second, Some(moved));
        self.touch(moved);
        records.extend([entry(from, name), entry(to, &second), object(moved, false)]);
    }

    /// The inode's state as planning knows it.
    pub fn state(&self, inode: u32) -> ObjectState {
        let i = &self.inodes[&inode];
        let attributes = Attributes {
            mode: i.body.mode,
            uid: 0,
            gid: 0,
            mtime: Timestamp(i.mtime),
            xattrs: Vec::new(),
        };
        let size = if i.kind == Kind::File { 4 } else { 0 };
        ObjectState { kind: i.kind, attributes, size, rdev: 0 }
    }

    /// The inode's time of last change.
    pub fn changed(&self, inode: u32) -> Timestamp {
        Timestamp(self.inodes[&inode].ctime)
    }

    /// Whether the replica may have this under a name when it claims all that
    /// was done before `moment`: it is what stood there then, or came later.
    pub fn may_lead(&self, moment: i64, directory: u32, name: &Name, to: Option<u32>) -> bool {
        match self.slots.get(&(directory, name.clone())) {
            // Nothing ever stood there.
            None => to.is_none(),
            Some(past) => {
                let from = since(past, moment);
                let nothing = from.is_none() && to.is_none();
                let later = &past[from.unwrap_or(0)..];
                let is = |(_, past): &(u64, Past<Option<u32>>)| past.value == to;
                // A directory that moves on does not wait where it stood for
                // what is to stand there.
                let left = |(_, past): &(u64, Past<Option<u32>>)| {
                    past.value.is_some_and(|inode| self.is_directory(inode))
                };
                let moved_on = to.is_none() && later[..later.len() - 1].iter().any(left);
                nothing || moved_on || later.iter().any(is)
            }
        }
    }

    /// The same of an inode's state.
    pub fn may_be(&self, moment: i64, inode: u32, body: Body) -> bool {
        let past = &self.bodies[&inode];
        let since = &past[since(past, moment).unwrap_or(0)..];
        // Content and attributes may be of two moments.
        since.iter().any(|(_, past)| past.value.content == body.content)
            && since.iter().any(|(_, past)| past.value.mode == body.mode)
    }

    /// What stood under a name at one moment.
    pub fn led_to(&self, moment: i64, directory: u32, name: &Name) -> Option<u32> {
        let past = self.slots.get(&(directory, name.clone()))?;
        past.iter().rev().find(|(_, past)| past.made <= moment).and_then(|(_, past)| past.value)
    }

    /// What an inode was at one moment.
    pub fn was(&self, moment: i64, inode: u32) -> Option<Body> {
        let past = self.bodies.get(&inode)?;
        past.iter().rev().find(|(_, past)| past.made <= moment).map(|(_, past)| past.value)
    }
}

/// Where the last state stands that was made before `moment`; `None` if none was.
fn since<T>(past: &[(u64, Past<T>)], moment: i64) -> Option<usize> {
    past.iter().rposition(|(_, past)| past.returned < moment)
}

fn entry(directory: u32, name: &Name) -> Record {
    Record::Entry { directory: id(directory), name: name.clone() }
}

fn object(inode: u32, content: bool) -> Record {
    Record::Object { object: id(inode), what: What { content, attributes: true } }
}

fn words(records: &[Record]) -> String {
    let word = |record: &Record| match record {
        Record::Entry { directory, name } => format!("{}/{name}", inode(directory)),
        Record::Object { object, what } if what.content => format!("#{} written", inode(object)),
        Record::Object { object, .. } => format!("#{}", inode(object)),
        other => format!("{other:?}"),
    };
    records.iter().map(word).collect::<Vec<_>>().join(", ")
}

impl World {
    fn stat(&self, n: u32) -> Stat {
        let state = self.state(n);
        let i = &self.inodes[&n];
        Stat {
            kind: i.kind,
            mode: i.body.mode,
            uid: 0,
            gid: 0,
            nlink: self.links(n) as u32,
            size: state.size,
            blocks: 0,
            mtime: Timestamp(i.mtime),
            ctime: Timestamp(i.ctime),
            btime: None,
            rdev: 0,
            dev: 0,
            ino: u64::from(n),
            mount_id: 0,
        }
    }
}

impl Tree for World {
    type Error = Never;

    fn lookup(&mut self, directory: &ObjectId, name: &Name) -> Result<Lookup, Never> {
        let above = self.inodes.get(&inode(directory));
        let Some(n) = above.and_then(|above| above.entries.get(name)) else {
            return Ok(Lookup::Absent);
        };
        let stat = self.stat(*n);
        Ok(Lookup::Found(Seen { object: id(*n), stat }))
    }

    fn prober(&self, directory: &ObjectId) -> impl Fn(&Name, &ObjectId) -> Option<Stat> {
        let there = self.inodes.get(&inode(directory));
        move |name, object| {
            let n = *there?.entries.get(name)?;
            (id(n) == *object).then(|| self.stat(n))
        }
    }

    fn list(&self, directory: &ObjectId, most: usize) -> Result<Listed, Never> {
        Ok(match self.inodes.get(&inode(directory)) {
            Some(found) if found.entries.len() > most => Listed::Many,
            Some(found) => Listed::Names(found.entries.keys().cloned().collect()),
            None => Listed::Gone,
        })
    }

    fn fate(&mut self, object: &ObjectId) -> Result<Fate, Never> {
        Ok(if self.inodes.contains_key(&inode(object)) { Fate::Alive } else { Fate::Dead })
    }
}
