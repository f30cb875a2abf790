//! What is compared many at a time against what is looked at one by one.

use std::collections::{BTreeMap, BTreeSet};
use std::convert::Infallible;

use foldhash::{HashSet, HashSetExt};
use proptest::prelude::*;
use replicator_common::id::{BatchId, ObjectId};
use replicator_common::name::Name;
use replicator_common::object::{Attributes, Kind, ObjectState};
use replicator_common::sys::stat::Stat;
use replicator_common::time::Timestamp;

use crate::index::{Content, Known, Orphan, Page, View};
use crate::plan::resolve::{Binding, Budget, Place};
use crate::plan::tree::{Fate, Listed, Lookup, Seen, Skip, Tree};
use crate::plan::{Dirty, Listing, Need, Resolve};

const ROOT: u32 = 1;
const SECOND: i64 = 1_000_000_000;

fn id(number: u32) -> ObjectId {
    ObjectId::new(1, &number.to_be_bytes()).unwrap()
}

fn name(number: u8) -> Name {
    Name::new(&[b'a' + number]).unwrap()
}

fn kind(number: u32) -> Kind {
    match number % 5 {
        1 => Kind::Directory,
        2 => Kind::Symlink,
        _ => Kind::File,
    }
}

/// The source and the index, which do not change; both count the calls.
#[derive(Clone, Debug, Default)]
struct Both {
    here: BTreeMap<Place, (u32, i64)>,
    sockets: BTreeSet<Place>,
    there: BTreeMap<Place, u32>,
    /// Change time and time of reading.
    known: BTreeMap<u32, (i64, i64)>,
    page: usize,
    looked: usize,
}

impl Both {
    fn stat(&self, number: u32, ctime: i64) -> Stat {
        Stat {
            kind: kind(number),
            mode: 0o644,
            uid: 0,
            gid: 0,
            nlink: 1,
            size: 5,
            blocks: 8,
            mtime: Timestamp(7),
            ctime: Timestamp(ctime),
            btime: None,
            rdev: 0,
            dev: 1,
            ino: u64::from(number),
            mount_id: 1,
        }
    }

    fn look(&self, directory: &ObjectId, name: &Name) -> Lookup {
        let place = (directory.clone(), name.clone());
        if self.sockets.contains(&place) {
            return Lookup::Skipped(Skip::Socket);
        }
        match self.here.get(&place) {
            None => Lookup::Absent,
            Some((number, ctime)) => {
                let stat = self.stat(*number, *ctime);
                Lookup::Found(Seen { object: id(*number), stat })
            }
        }
    }

    /// Walks to the end; what the batches asked for, and changed, and found
    /// equal.
    fn walk(&mut self, budget: usize, waiting: Option<&HashSet<Place>>) -> Found {
        let mut dirty = Dirty::default();
        dirty.listings.push_back(Listing::new(id(ROOT), true));
        let budget = Budget {
            objects: budget,
            entries: budget * 2,
            compared: budget * 3,
            bytes: u64::MAX,
            large: 0,
        };
        let view = self.clone();
        let mut found = Found::default();
        for round in 0.. {
            assert!(round < 1000, "a walk that does not end");
            let mut resolve =
                Resolve { walking: true, waiting: waiting.cloned(), ..Resolve::default() };
            resolve.feed(&mut dirty, budget, &view, self).unwrap();
            found.needs.extend(resolve.asked.take());
            found.seen.extend(resolve.bindings.keys().cloned());
            let changed = resolve.bindings.into_iter().filter(|(_, one)| one.old != one.new);
            found.changed.extend(changed);
            found.skipped.extend(resolve.skipped);
            found.listed.extend(resolve.listed);
            found.equal.0 += resolve.equal.0;
            found.equal.1 += resolve.equal.1;
            if dirty.is_empty() {
                break;
            }
        }
        found
    }
}

#[derive(Debug, Default, PartialEq)]
struct Found {
    needs: BTreeMap<ObjectId, Need>,
    changed: BTreeMap<Place, Binding>,
    skipped: BTreeMap<Place, Option<Skip>>,
    listed: BTreeSet<ObjectId>,
    equal: (u64, u64),
    seen: BTreeSet<Place>,
}

impl View for Both {
    type Error = Infallible;

    fn object(&self, object: &ObjectId) -> Result<Option<Known>, Infallible> {
        let number = u32::from_be_bytes(object.body().try_into().unwrap());
        let Some((ctime, read_at)) = self.known.get(&number).copied() else { return Ok(None) };
        let mtime = Timestamp(7);
        let attributes = Attributes { mode: 0o644, uid: 0, gid: 0, mtime, xattrs: Vec::new() };
        let entry = self.there.iter().find(|(_, one)| **one == number);
        Ok(Some(Known {
            state: ObjectState { kind: kind(number), attributes, size: 5, rdev: 0 },
            ctime: Timestamp(ctime),
            read_at: Timestamp(read_at),
            version: BatchId(1),
            content: Content::None,
            entry: entry.map(|(place, _)| place.clone()),
            links: 1,
            nlink: 1,
        }))
    }

    fn entry(&self, directory: &ObjectId, name: &Name) -> Result<Option<ObjectId>, Infallible> {
        Ok(self.there.get(&(directory.clone(), name.clone())).map(|number| id(*number)))
    }

    fn children(&self, directory: &ObjectId) -> Result<Vec<(Name, ObjectId)>, Infallible> {
        let all = self.there.iter().filter(|((of, _), _)| of == directory);
        Ok(all.map(|((_, name), number)| (name.clone(), id(*number))).collect())
    }

    fn page(&self, directory: &ObjectId, after: Option<&Name>) -> Result<Page, Infallible> {
        let mut entries = self.children(directory)?;
        entries.retain(|(name, _)| after.is_none_or(|after| name > after));
        let more = entries.len() > self.page;
        entries.truncate(self.page);
        let last = entries.last().map(|(name, _)| name.clone());
        Ok(Page { entries, through: last.filter(|_| more) })
    }

    fn links(&self, object: &ObjectId) -> Result<Vec<Place>, Infallible> {
        let all = self.there.iter().filter(|(_, number)| id(**number) == *object);
        Ok(all.map(|(place, _)| place.clone()).collect())
    }

    fn orphans(&self) -> Result<Vec<(ObjectId, Orphan)>, Infallible> {
        Ok(Vec::new())
    }
}

impl Tree for Both {
    type Error = Infallible;

    fn lookup(&mut self, directory: &ObjectId, name: &Name) -> Result<Lookup, Infallible> {
        self.looked += 1;
        Ok(self.look(directory, name))
    }

    fn prober(&self, directory: &ObjectId) -> impl Fn(&Name, &ObjectId) -> Option<Stat> {
        move |name, object| match self.look(directory, name) {
            Lookup::Found(seen) if seen.object == *object => Some(seen.stat),
            _ => None,
        }
    }

    fn list(&self, directory: &ObjectId, most: usize) -> Result<Listed, Infallible> {
        let here = self.here.keys().chain(&self.sockets).filter(|(of, _)| of == directory);
        // In no order, as a file system does.
        let names: Vec<_> = here.map(|(_, name)| name.clone()).rev().collect();
        Ok(if names.len() > most { Listed::Many } else { Listed::Names(names) })
    }

    fn fate(&mut self, _: &ObjectId) -> Result<Fate, Infallible> {
        Ok(Fate::Dead)
    }
}

/// A directory with `count` files that are as the index says.
fn equal(count: u8, page: usize) -> Both {
    let mut both = Both { page, ..Both::default() };
    both.known.insert(ROOT, (SECOND, 9 * SECOND));
    for number in 0..count {
        let (place, object) = ((id(ROOT), name(number)), 100 + 5 * u32::from(number));
        both.here.insert(place.clone(), (object, SECOND));
        both.there.insert(place, object);
        both.known.insert(object, (SECOND, 9 * SECOND));
    }
    both
}

#[test]
fn what_is_equal_is_not_looked_at_one_by_one() {
    let mut both = equal(20, 3);
    let found = both.walk(1000, Some(&HashSet::new()));
    assert_eq!((both.looked, found.equal), (0, (20, 100)));
    assert_eq!(found.needs.keys().collect::<Vec<_>>(), [&id(ROOT)], "nothing above compares it");
}

/// An orphan that is a file is listed by a walk, too.
#[test]
fn what_stands_before_a_large_directory_does_not_have_it_looked_at_one_by_one() {
    let mut both = equal(20, 30);
    let mut dirty = Dirty::default();
    dirty.listings.extend([100, ROOT].map(|number| Listing::new(id(number), true)));
    let mut resolve = Resolve { waiting: Some(HashSet::new()), ..Resolve::default() };
    let budget = Budget { objects: 99, entries: 99, compared: 99, bytes: u64::MAX, large: 0 };
    let view = both.clone();
    resolve.feed(&mut dirty, budget, &view, &mut both).unwrap();
    assert_eq!((both.looked, resolve.equal), (0, (20, 100)));
    assert!(dirty.is_empty() && resolve.crowded.contains(&id(ROOT)));
}

#[test]
fn what_somebody_waits_for_is_looked_at_however_equal_it_is() {
    let mut both = equal(20, 3);
    let waiting = HashSet::from_iter([(id(ROOT), name(4))]);
    let found = both.walk(1000, Some(&waiting));
    assert_eq!((both.looked, found.equal), (1, (20, 100)));
    assert_eq!(found.seen.into_iter().collect::<Vec<_>>(), [(id(ROOT), name(4))]);
}

/// Equal times prove nothing where the reading was too close (trap 6).
#[test]
fn what_is_in_doubt_is_read() {
    let mut both = equal(3, 9);
    both.known.insert(100, (SECOND, SECOND));
    let found = both.walk(1000, Some(&HashSet::new()));
    let need = found.needs.get(&id(100)).expect("it is needed");
    assert!(need.content && both.looked == 1);
}

type Random = (Vec<(u8, u8, u8)>, Vec<(u8, u8, u8)>, Vec<(u8, u8)>);

fn random() -> impl Strategy<Value = Random> {
    let entries = || prop::collection::vec((0..3u8, 0..12u8, 0..16u8), 0..40);
    (entries(), entries(), prop::collection::vec((0..3u8, 0..12u8), 0..3))
}

proptest! {
    /// Both ways of walking ask for the same, change the same, and count the same.
    #[test]
    fn a_survey_finds_what_looking_one_by_one_finds(
        (here, there, sockets) in random(),
        common in 0..40usize,
        times in prop::collection::vec(0..3i64, 16),
        page in 1..9usize,
        // The root alone, and one entry with its directory, must have room.
        budget in 4..30usize,
    ) {
        // Directories 1 (the root), 6 and 11; objects 1 to 16.
        let place = |directory: u8, n: u8| (id(u32::from(directory) * 5 + 1), name(n));
        let object = |number: u8| u32::from(number) + 1;
        let mut both = Both { page, ..Both::default() };
        both.known.insert(ROOT, (SECOND, 9 * SECOND));
        let shared = here.iter().take(common);
        for (directory, n, number) in there.iter().chain(shared).copied() {
            // A tree: a directory stands in one of a smaller number, once.
            let (at, number) = (place(directory, n), object(number));
            let known = both.known.contains_key(&number);
            if kind(number) == Kind::Directory && (known || number <= u32::from(directory) * 5 + 1) {
                continue;
            }
            both.there.insert(at, number);
            both.known.insert(number, (SECOND, 9 * SECOND));
        }
        let mut placed = HashSet::new();
        for (directory, n, number) in here {
            let (at, number) = (place(directory, n), object(number));
            let directory = u32::from(directory) * 5 + 1;
            let once = kind(number) != Kind::Directory || number > directory && placed.insert(number);
            if !both.here.contains_key(&at) && once {
                let ctime = SECOND * (1 + times[number as usize - 1] / 2);
                both.here.insert(at, (number, ctime));
            }
        }
        for (directory, n) in sockets {
            let at = place(directory, n);
            if !both.here.contains_key(&at) {
                both.sockets.insert(at);
            }
        }
        let unique: BTreeSet<u32> = both.there.values().copied().collect();
        both.known.retain(|number, _| *number == ROOT || unique.contains(number));
        // What a batch makes known is not known to the next here, so what finds
        // directories in new places has to be one batch.
        let mut directories = both.here.iter().filter(|(_, (n, _))| kind(*n) == Kind::Directory);
        let moved = directories.any(|(at, (number, _))| both.there.get(at) != Some(number));
        let budget = if moved { 1000 } else { budget };
        let mut one_by_one = both.clone().walk(budget, None);
        let mut surveyed = both.walk(budget, Some(&HashSet::new()));
        prop_assert!(surveyed.seen.is_subset(&one_by_one.seen));
        for found in [&mut one_by_one, &mut surveyed] {
            found.seen.clear();
            // Any name will do.
            found.needs.values_mut().for_each(|need| need.hint = None);
            // What one name leads to as something new may have been counted by
            // another before.
            found.equal = if moved { (0, 0) } else { found.equal };
        }
        prop_assert_eq!(surveyed, one_by_one);
    }
}
