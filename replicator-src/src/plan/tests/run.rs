//! One replication from the model of a source to that of a replica.

use super::*;

/// One replication of a world.
pub(super) struct Run {
    pub(super) world: World,
    pub(super) index: Map,
    pub(super) replica: Replica,
    pub(super) dirty: Dirty,
    pub(super) astray: Dirty,
    pub(super) cursor: usize,
    pub(super) batch: u64,
    pub(super) held: Vec<(ObjectId, Hold)>,
    pub(super) walking: bool,
    pub(super) limits: Limits,
    /// See [`Settings::apart`].
    pub(super) apart: usize,
}

impl Run {
    /// A world before the initial sync.
    pub(super) fn new(world: World) -> Self {
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
    pub(super) fn orphans(&self) -> Vec<ObjectId> {
        let orphans = self.index.orphans.iter().filter(|(_, orphan)| !orphan.left);
        orphans.map(|(object, _)| object.clone()).collect()
    }

    pub(super) fn absorb(&mut self, count: usize) {
        let end = self.world.records.len().min(self.cursor + count);
        for record in &self.world.records[self.cursor..end] {
            self.dirty.absorb(record);
        }
        self.cursor = end;
    }

    /// What waits is looked at again when its content is there, `large` being those of
    /// which it is not, or when a name of it is looked at.
    pub(super) fn release(&mut self, large: u32) {
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
    pub(super) fn hold(
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
    pub(super) fn batch(
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
        let leaves = self.index.orphans.values().any(|orphan| orphan.left);
        let mut resolve = Resolve {
            walking: self.walking,
            under_way,
            named,
            waiting: self.walking.then(HashSet::default),
            root: (leaves || self.world.places.is_some()).then(|| id(ROOT)),
            ..Resolve::default()
        };
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
    pub(super) fn nothing_gives_way_to_half(
        &self,
        outcomes: &HashMap<ObjectId, Outcome>,
        out: &Assembly,
    ) {
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
    pub(super) fn dropped_within_bounds(&self, resolve: &Resolve, out: &Assembly) {
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

    pub(super) fn read(
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
    pub(super) fn finish(&mut self) {
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
