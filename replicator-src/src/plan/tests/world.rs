//! The model of a source: what stands there, what happens to it, and the records of that.

use super::*;

pub(super) const ROOT: u32 = 1;

pub(super) fn id(inode: u32) -> ObjectId {
    ObjectId::new(1, &inode.to_be_bytes()).unwrap()
}

pub(super) fn inode(id: &ObjectId) -> u32 {
    u32::from_be_bytes(id.body().try_into().unwrap())
}

pub(super) fn name(n: u8) -> Name {
    Name::new(&[b'a' + n % 4]).unwrap()
}

#[derive(Clone, Debug, PartialEq)]
pub(super) struct Inode {
    pub(super) kind: Kind,
    pub(super) content: u32,
    pub(super) changed: i64,
    pub(super) entries: BTreeMap<Name, u32>,
}

/// The source: inodes 1 (the root) and 2 (a directory outside the source).
#[derive(Clone)]
pub(super) struct World {
    pub(super) inodes: BTreeMap<u32, Inode>,
    pub(super) next: u32,
    pub(super) clock: i64,
    pub(super) records: Vec<Record>,
    /// Where directories were seen last, when only names lead to objects.
    pub(super) places: Option<BTreeMap<u32, (u32, Name)>>,
}

impl World {
    pub(super) fn new() -> Self {
        let (inodes, records) = (BTreeMap::new(), Vec::new());
        let mut world = Self { inodes, next: 1, clock: 0, records, places: None };
        world.make(Kind::Directory);
        world.make(Kind::Directory);
        world
    }

    pub(super) fn make(&mut self, kind: Kind) -> u32 {
        let inode = self.next;
        self.next += 1;
        self.clock += 1;
        let entries = BTreeMap::new();
        self.inodes.insert(inode, Inode { kind, content: 0, changed: self.clock, entries });
        inode
    }

    pub(super) fn directories(&self) -> Vec<u32> {
        self.of_kind(Kind::Directory)
    }

    pub(super) fn of_kind(&self, kind: Kind) -> Vec<u32> {
        self.inodes.iter().filter(|(_, i)| i.kind == kind).map(|(n, _)| *n).collect()
    }

    pub(super) fn links(&self, target: u32) -> usize {
        self.inodes.values().flat_map(|i| i.entries.values()).filter(|n| **n == target).count()
    }

    pub(super) fn is_below(&self, directory: u32, above: u32) -> bool {
        directory == above
            || self.inodes[&above]
                .entries
                .values()
                .any(|n| self.inodes[n].kind == Kind::Directory && self.is_below(directory, *n))
    }

    pub(super) fn touch(&mut self, inode: u32) {
        self.clock += 1;
        if let Some(i) = self.inodes.get_mut(&inode) {
            i.changed = self.clock;
        }
    }

    pub(super) fn entry_event(&mut self, directory: u32, name: &Name) {
        self.touch(directory);
        self.records.push(Record::Entry { directory: id(directory), name: name.clone() });
    }

    pub(super) fn object_event(&mut self, inode: u32, content: bool) {
        let what = What { content, attributes: true };
        self.records.push(Record::Object { object: id(inode), what });
    }

    /// Forgets inodes without links.
    pub(super) fn collect(&mut self) {
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

    pub(super) fn act(&mut self, (what, a, b, c): (u8, u8, u8, u8)) {
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

    pub(super) fn rename(&mut self, d: u32, n: Name, c: u8) {
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
    pub(super) fn reaches(&self, inode: u32, hint: Option<(u32, Name)>) -> bool {
        let Some(places) = &self.places else { return true };
        let mut hints = hint.into_iter().chain(places.get(&inode).cloned());
        inode == ROOT
            || hints.any(|(directory, name)| {
                self.inodes.get(&directory).and_then(|i| i.entries.get(&name)) == Some(&inode)
                    && self.reaches(directory, None)
            })
    }

    pub(super) fn state(&self, inode: u32) -> ObjectState {
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

impl World {
    fn stat(&self, n: u32) -> Stat {
        let i = &self.inodes[&n];
        Stat {
            kind: i.kind,
            mode: 0,
            uid: 0,
            gid: 0,
            nlink: self.links(n) as u32,
            size: 0,
            blocks: 0,
            mtime: Timestamp(i.changed),
            ctime: Timestamp(i.changed),
            btime: None,
            rdev: 0,
            dev: 0,
            ino: u64::from(n),
            mount_id: 0,
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
        let stat = self.stat(*n);
        Ok(Lookup::Found(Seen { object: id(*n), stat }))
    }

    fn prober(&self, directory: &ObjectId) -> impl Fn(&Name, &ObjectId) -> Option<Stat> {
        let above = inode(directory);
        let there = self.inodes.get(&above).filter(|_| self.reaches(above, None));
        move |name, object| {
            let n = *there?.entries.get(name)?;
            (id(n) == *object).then(|| self.stat(n))
        }
    }

    fn list(&self, directory: &ObjectId, most: usize) -> Result<Listed, Infallible> {
        let n = inode(directory);
        Ok(match self.inodes.get(&n) {
            _ if !self.reaches(n, None) => Listed::Away,
            Some(i) if i.entries.len() > most => Listed::Many,
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
