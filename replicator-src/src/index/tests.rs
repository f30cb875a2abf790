use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use proptest::prelude::*;
use replicator_common::chunk::Chunk;
use replicator_common::id::{BatchId, ObjectId, Seq};
use replicator_common::name::Name;
use replicator_common::object::{Attributes, Kind, ObjectState};
use replicator_common::time::Timestamp;
use replicator_common::wire::Hash;

use super::*;

fn id(n: u8) -> ObjectId {
    ObjectId::new(1, &[n]).unwrap()
}

fn name() -> Name {
    Name::new(b"f").unwrap()
}

/// What a power cut would leave of the store: the file as it stands, without
/// what closing it would add.
fn cut(path: &Path, number: u64) -> Arc<Store> {
    let copy = path.with_extension(number.to_string());
    std::fs::copy(path, &copy).unwrap();
    Arc::new(Store::open(&copy).unwrap())
}

fn delta(batch: u64, old: Option<u8>, new: Option<u8>) -> Delta {
    let change = EntryChange { directory: id(1), name: name(), old: old.map(id), new: new.map(id) };
    let mark = Mark { batch: BatchId(batch), ..Mark::default() };
    Delta { entries: vec![change], mark, ..Delta::default() }
}

/// The replica has batch 2, whose acknowledgement is lost, and the source dies:
/// after the restart the index knows of it, and what the destination says of
/// its last batch decides. Else a change back would look like no change.
#[test]
fn trap_5_a_batch_whose_acknowledgement_was_lost_is_known_after_a_crash() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("index.redb");
    let mut index = Index::new(Arc::new(Store::open(&path).unwrap())).unwrap();
    index.prepare(delta(1, None, Some(7)), &Noted::default()).unwrap();
    index.acknowledge(BatchId(1));
    index.prepare(delta(2, Some(7), Some(8)), &Noted::default()).unwrap();
    for (committed, expected) in [(1, 7), (2, 8)] {
        let store = cut(&path, committed);
        let pending: Vec<u64> = store.pending().unwrap().iter().map(|d| d.mark.batch.0).collect();
        assert_eq!(pending, [2], "durable before its COMMIT is sent");
        let mut index = Index::new(store).unwrap();
        index.settle(BatchId(committed)).unwrap();
        assert_eq!(index.entry(&id(1), &name()).unwrap(), Some(id(expected)));
        assert_eq!(index.store().mark().unwrap().batch, BatchId(committed));
        assert!(index.store().pending().unwrap().is_empty());
    }
}

fn file(batch: u64, list: u64) -> Known {
    let attributes =
        Attributes { mode: 0o600, uid: 0, gid: 0, mtime: Timestamp(0), xattrs: Vec::new() };
    Known {
        state: ObjectState { kind: Kind::File, attributes, size: 1 << 20, rdev: 0 },
        ctime: Timestamp(0),
        read_at: Timestamp(0),
        version: BatchId(batch),
        content: Content::Chunks { average: 1 << 14, list, digest: Hash([0; 32]) },
        entry: None,
        links: 0,
        nlink: 1,
    }
}

#[test]
fn chunk_lists_of_what_was_given_up_go() {
    let directory = tempfile::tempdir().unwrap();
    let store = Arc::new(Store::open(&directory.path().join("index")).unwrap());
    let chunk = Chunk { length: 1 << 20, hash: Hash([1; 32]) };
    for list in 1..=4 {
        store.put_chunks(list, &[chunk]).unwrap();
    }
    let object = ObjectId::new(1, &[1]).unwrap();
    let delta = |batch, known: Known, dead_lists| Delta {
        objects: vec![(object.clone(), Some(known))],
        dead_lists,
        mark: Mark { batch: BatchId(batch), ..Mark::default() },
        ..Delta::default()
    };
    let mut index = Index::new(store.clone()).unwrap();
    // A transfer was not placed (list 3); the next batches change attributes
    // alone, and then content, and neither is committed.
    index.prepare(delta(1, file(1, 1), vec![3]), &Noted::default()).unwrap();
    index.prepare(delta(2, file(1, 1), Vec::new()), &Noted::default()).unwrap();
    index.prepare(delta(3, file(3, 2), vec![1]), &Noted::default()).unwrap();
    index.settle(BatchId(1)).unwrap();
    let left: Vec<u64> = (1..=4).filter(|list| !store.chunks(*list).unwrap().is_empty()).collect();
    assert_eq!(left, [1, 4], "in use, and not known to anybody yet");
}

/// A batch that was acknowledged to a process that died then is pending still, and
/// what it covers was perhaps never written to the journal.
#[test]
fn the_numbers_that_pending_batches_cover_are_used() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("index");
    {
        let mut index = Index::new(Arc::new(Store::open(&path).unwrap())).unwrap();
        for (batch, seq) in [(1, 5), (2, 9)] {
            let mark = Mark { batch: BatchId(batch), seq: Seq(seq), ..Mark::default() };
            index.prepare(Delta { mark, ..Delta::default() }, &Noted::default()).unwrap();
            index.acknowledge(BatchId(batch));
        }
    }
    let store = Store::open(&path).unwrap();
    assert_eq!((store.mark().unwrap().seq, store.highest_seq().unwrap()), (Seq(5), Seq(9)));
}

/// What is remembered of an object is what the deltas and the store say, whatever
/// comes and goes.
#[test]
fn what_is_remembered_is_never_old() {
    let directory = tempfile::tempdir().unwrap();
    let store = Arc::new(Store::open(&directory.path().join("index")).unwrap());
    let mut index = Index::new(store).unwrap();
    let object = ObjectId::new(1, &[1]).unwrap();
    let version = |index: &Index| index.object(&object).unwrap().map(|known| known.version.0);
    let delta = |batch, known| Delta {
        objects: vec![(object.clone(), known)],
        mark: Mark { batch: BatchId(batch), ..Mark::default() },
        ..Delta::default()
    };
    index.expect([&object]).unwrap();
    assert_eq!((version(&index), index.has(&object).unwrap()), (None, false));
    index.prepare(delta(1, Some(file(1, 1))), &Noted::default()).unwrap();
    assert_eq!((version(&index), index.has(&object).unwrap()), (Some(1), true));
    index.acknowledge(BatchId(1));
    index.merge().unwrap();
    index.expect([&object, &object]).unwrap();
    assert_eq!(index.kind(&object).unwrap(), Some(Kind::File));
    index.prepare(delta(2, Some(file(2, 2))), &Noted::default()).unwrap();
    assert_eq!(version(&index), Some(2));
    index.prepare(delta(3, None), &Noted::default()).unwrap();
    assert_eq!((version(&index), index.kind(&object).unwrap()), (None, None));
    index.settle(BatchId(1)).unwrap();
    assert_eq!(version(&index), Some(1), "the others are lost");
}

/// What is appended to a file changes its version and not its list, which stays
/// when the batch is given up.
#[test]
fn a_chunk_list_that_was_in_use_before_stays() {
    let directory = tempfile::tempdir().unwrap();
    let store = Arc::new(Store::open(&directory.path().join("index")).unwrap());
    store.put_chunks(1, &[Chunk { length: 1 << 20, hash: Hash([1; 32]) }]).unwrap();
    let object = ObjectId::new(1, &[1]).unwrap();
    let delta = |batch| Delta {
        objects: vec![(object.clone(), Some(file(batch, 1)))],
        mark: Mark { batch: BatchId(batch), ..Mark::default() },
        ..Delta::default()
    };
    let mut index = Index::new(store.clone()).unwrap();
    index.prepare(delta(1), &Noted::default()).unwrap();
    index.prepare(delta(2), &Noted::default()).unwrap();
    index.settle(BatchId(1)).unwrap();
    assert_eq!(store.chunks(1).unwrap().len(), 1);
}

/// Pages one after the other are all entries, with what is under way laid over
/// them; several objects at once are each of them.
#[test]
fn pages_and_several_objects_are_what_is_there() {
    const MANY: u32 = 20_000;
    let directory = tempfile::tempdir().unwrap();
    let mut index =
        Index::new(Arc::new(Store::open(&directory.path().join("index")).unwrap())).unwrap();
    let object = |n: u32| ObjectId::new(1, &n.to_be_bytes()).unwrap();
    let change = |n: u32, old: Option<u32>, new: Option<u32>| EntryChange {
        directory: id(1),
        name: Name::new(format!("{n:06}").as_bytes()).unwrap(),
        old: old.map(object),
        new: new.map(object),
    };
    let mut first = Delta::default();
    first.mark.batch = BatchId(1);
    for n in (0..MANY).filter(|n| n % 3 != 0) {
        first.entries.push(change(n, None, Some(n)));
        first.objects.push((object(n), Some(file(u64::from(n), 1))));
    }
    // A neighbour's entries are not this directory's.
    let (other, name) = (id(2), Name::new(b"other").unwrap());
    first.entries.push(EntryChange { directory: other, name, old: None, new: Some(object(1)) });
    index.prepare(first, &Noted::default()).unwrap();
    index.acknowledge(BatchId(1));
    index.merge().unwrap();
    let mut second = Delta::default();
    second.mark.batch = BatchId(2);
    for n in (0..MANY).step_by(5) {
        let there = (n % 3 != 0).then_some(n);
        let after = there.is_none().then_some(n);
        second.entries.push(change(n, there, after));
        second.objects.push((object(n), after.map(|n| file(u64::from(n), 2))));
    }
    index.prepare(second, &Noted::default()).unwrap();

    let mut entries = Vec::new();
    let mut after = None;
    let mut pages = 0;
    loop {
        let page = index.page(&id(1), after.as_ref()).unwrap();
        pages += 1;
        entries.extend(page.entries);
        let Some(through) = page.through else { break };
        assert!(after.is_none_or(|after| after < through));
        after = Some(through);
    }
    assert!(pages > 1, "the test is of several pages");
    assert_eq!(entries, index.children(&id(1)).unwrap());

    let ordered: Vec<_> = (0..MANY + 100).step_by(7).map(object).collect();
    let close: Vec<_> = (100..400).flat_map(|n| [object(n), object(n)]).collect();
    let disordered: Vec<_> = (0..1000).map(|n| object(n * 7919 % MANY)).collect();
    for wanted in [ordered, close, disordered] {
        let each: Vec<_> = wanted.iter().map(|one| index.object(one).unwrap()).collect();
        assert!(each.iter().any(Option::is_some) && each.iter().any(Option::is_none));
        assert_eq!(index.objects(&wanted).unwrap(), each);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    /// What lies over the store, held to a map: in whatever order a batch names entries,
    /// also where it names one twice.
    #[test]
    fn batches_under_way_say_what_a_map_would(
        batches in prop::collection::vec(
            prop::collection::vec((1..4u8, 0..4u8, prop::option::of(10..13u8)), 0..8),
            1..4,
        ),
    ) {
        let directory = tempfile::tempdir().unwrap();
        let store = Arc::new(Store::open(&directory.path().join("index")).unwrap());
        let mut index = Index::new(store).unwrap();
        let named = |n: u8| Name::new(&[b'a' + n]).unwrap();
        let mut model: BTreeMap<(u8, u8), u8> = BTreeMap::new();
        for (number, changes) in (1..).zip(batches) {
            let mut entries = Vec::new();
            for (directory, name, new) in changes {
                let place = (directory, name);
                let old = match new {
                    Some(new) => model.insert(place, new),
                    None => model.remove(&place),
                };
                let (directory, name) = (id(directory), named(name));
                entries.push(EntryChange { directory, name, old: old.map(id), new: new.map(id) });
            }
            let mark = Mark { batch: BatchId(number), ..Mark::default() };
            index.prepare(Delta { entries, mark, ..Delta::default() }, &Noted::default()).unwrap();
            for directory in 1..4u8 {
                let of = model.iter().filter(|((of, _), _)| *of == directory);
                let there: Vec<_> = of.map(|((_, n), object)| (named(*n), id(*object))).collect();
                prop_assert_eq!(index.children(&id(directory)).unwrap(), &there[..]);
                prop_assert_eq!(index.page(&id(directory), None).unwrap().entries, there);
                for name in 0..4 {
                    let found = index.entry(&id(directory), &named(name)).unwrap();
                    prop_assert_eq!(found, model.get(&(directory, name)).map(|n| id(*n)));
                }
            }
            for object in 10..13 {
                let of = model.iter().filter(|(_, of)| **of == object);
                let links: Vec<_> = of.map(|((d, n), _)| (id(*d), named(*n))).collect();
                prop_assert_eq!(index.links(&id(object)).unwrap(), links);
            }
        }
    }
}
