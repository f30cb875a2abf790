use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use proptest::prelude::*;
use redb::ReadableTableMetadata;
use replicator_common::id::BatchId;
use replicator_common::name::Name;
use replicator_common::object::{Attributes, Kind, ObjectState};
use replicator_common::time::Timestamp;

use super::*;
use crate::index::known::{Content, Mark};
use crate::index::{Index, Noted, View};

const OBJECTS_MAX: u8 = 4;
const PLACES_MAX: u8 = 6;

fn object(n: u8) -> ObjectId {
    ObjectId::new(1, &[n]).unwrap()
}

fn place(n: u8) -> (ObjectId, Name) {
    (object(100 + n % 2), Name::new(&[b'a' + n]).unwrap())
}

/// What each place leads to, and how many names each object has elsewhere.
#[derive(Clone, Default, PartialEq)]
struct Model {
    places: BTreeMap<u8, u8>,
    elsewhere: BTreeMap<u8, u32>,
    /// The entry that each object's row names, where it still has it.
    named: BTreeMap<u8, u8>,
}

impl Model {
    fn of(&self, object: u8) -> BTreeSet<u8> {
        let places = self.places.iter().filter(|(_, there)| **there == object);
        places.map(|(place, _)| *place).collect()
    }

    /// As assembling does it: the named entry stays while it is there.
    fn known(&mut self, number: u8) -> Option<Known> {
        let places = self.of(number);
        let Some(first) = places.first() else {
            self.named.remove(&number);
            return None;
        };
        let named = self.named.entry(number).or_insert(*first);
        if !places.contains(named) {
            *named = *first;
        }
        let attributes =
            Attributes { mode: 0, uid: 0, gid: 0, mtime: Timestamp(0), xattrs: Vec::new() };
        let links = places.len() as u32;
        Some(Known {
            state: ObjectState { kind: Kind::File, attributes, size: 0, rdev: 0 },
            ctime: Timestamp(0),
            read_at: Timestamp(0),
            version: BatchId(1),
            content: Content::None,
            entry: Some(place(*named)),
            links,
            nlink: links + self.elsewhere.get(&number).copied().unwrap_or_default(),
        })
    }

    /// Rows that the table has to hold.
    fn rows(&mut self) -> u64 {
        let known = (0..OBJECTS_MAX).filter_map(|n| self.known(n));
        known.map(|k| if k.only_entry().is_some() { 0 } else { u64::from(k.links) }).sum()
    }
}

/// What leads from one model to the next.
fn delta(batch: u64, from: &mut Model, to: &mut Model) -> Delta {
    let mark = Mark { batch: BatchId(batch), ..Mark::default() };
    let mut delta = Delta { mark, ..Delta::default() };
    for number in 0..PLACES_MAX {
        let (old, new) = (from.places.get(&number), to.places.get(&number));
        if old != new {
            let (directory, name) = place(number);
            let (old, new) = (old.map(|n| object(*n)), new.map(|n| object(*n)));
            delta.entries.push(EntryChange { directory, name, old, new });
        }
    }
    for number in 0..OBJECTS_MAX {
        let (old, new) = (from.known(number), to.known(number));
        if old != new {
            delta.objects.push((object(number), new));
        }
    }
    delta
}

/// In one batch: places that lead elsewhere from now on, and names elsewhere.
type Step = (Vec<(u8, Option<u8>)>, Vec<(u8, u32)>);

fn step() -> impl Strategy<Value = Step> {
    let binding = (0..PLACES_MAX, prop::option::of(0..OBJECTS_MAX));
    let elsewhere = (0..OBJECTS_MAX, 0_u32..2);
    (prop::collection::vec(binding, 1..4), prop::collection::vec(elsewhere, 0..2))
}

proptest! {
    /// The names of every object are those of the naive model, whether the batch is
    /// merged or under way, and no row is there that need not be.
    #[test]
    fn names_are_those_of_a_naive_model(steps in prop::collection::vec((step(), any::<bool>()), 1..20)) {
        let directory = tempfile::tempdir().unwrap();
        let store = Arc::new(Store::open(&directory.path().join("index")).unwrap());
        let mut index = Index::new(store).unwrap();
        let mut model = Model::default();
        for (number, ((bindings, elsewhere), is_merged)) in steps.into_iter().enumerate() {
            let mut next = model.clone();
            for (place, object) in bindings {
                match object {
                    Some(object) => next.places.insert(place, object),
                    None => next.places.remove(&place),
                };
            }
            next.elsewhere.extend(elsewhere);
            let batch = number as u64 + 1;
            index.prepare(delta(batch, &mut model, &mut next), &Noted::default()).unwrap();
            index.acknowledge(BatchId(batch));
            if is_merged {
                index.merge().unwrap();
                let snapshot = index.store().snapshot().unwrap();
                prop_assert_eq!(snapshot.links.len().unwrap(), next.rows());
            }
            model = next;
            for number in 0..OBJECTS_MAX {
                let mut links = index.links(&object(number)).unwrap();
                links.sort();
                let mut expected: Vec<_> = model.of(number).into_iter().map(place).collect();
                expected.sort();
                prop_assert_eq!(links, expected, "object {}", number);
            }
        }
    }
}
