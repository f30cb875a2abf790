use super::*;
use crate::apply::{Place, Within};
use crate::upgrade::StandingV1;
use replicator_common::id::Incarnation;
use replicator_common::name::Name;
use replicator_common::time::Timestamp;

#[test]
fn a_store_of_version_1_is_upgraded_and_a_newer_one_refused() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("store.redb");
    let mut standing = Standing::new(Incarnation([1; 16]), false);
    standing.source_incarnation = Some(Incarnation([3; 16]));
    (standing.committed, standing.applied) = (BatchId(7), BatchId(6));
    standing.watermark = Timestamp(5);
    let version = |version: u32, row: Vec<u8>| {
        let store = Store::open(&path, || standing.clone()).unwrap();
        let write = |transaction: &redb::WriteTransaction, store: &Store| {
            let mut meta = transaction.open_table(META).unwrap();
            meta.insert("version", store.encode(&version)?.as_slice()).unwrap();
            meta.insert("standing", row.as_slice()).unwrap();
            Ok(())
        };
        store.write("make it old", Durability::Immediate, write).unwrap();
    };
    version(1, codec::encode_record(&StandingV1::from(standing.clone())).unwrap());
    for _ in 0..2 {
        let store = Store::open(&path, || unreachable!()).unwrap();
        assert_eq!(store.standing().unwrap(), standing);
    }
    version(2, codec::encode_record(&standing).unwrap());
    for _ in 0..2 {
        let store = Store::open(&path, || unreachable!()).unwrap();
        assert_eq!(store.standing().unwrap(), standing);
    }
    version(STORE_VERSION + 1, codec::encode_record(&standing).unwrap());
    let newer = Store::open(&path, || unreachable!());
    assert!(matches!(newer, Err(StoreError::Newer { found, .. }) if found > STORE_VERSION));
}

/// Up to version 3 the map's rows are in the order of ids' bytes, and stay so.
#[test]
fn a_map_of_version_3_stays_in_its_order() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("store.redb");
    // Handles as ext4's: inode and generation.
    let ids = [0x0102_u32, 0x0201, 7].map(|inode| {
        let body = [inode.to_le_bytes(), 9_u32.to_le_bytes()].concat();
        ObjectId::new(1, &body).unwrap()
    });
    let known = |links| Known {
        handle: None,
        kind: replicator_common::object::Kind::File,
        position: Position::Orphan { was: None },
        links,
        content: BatchId(1),
    };
    {
        let mut standing = Standing::new(Incarnation([1; 16]), false);
        (standing.objects, standing.orphans) = (3, 3);
        let store = Store::open(&path, || standing).unwrap();
        let write = |transaction: &redb::WriteTransaction, store: &Store| {
            let mut meta = transaction.open_table(META).unwrap();
            meta.insert("version", store.encode(&3_u32)?.as_slice()).unwrap();
            let mut objects = transaction.open_table(OBJECTS).unwrap();
            for (id, links) in ids.iter().zip(1..) {
                let row = store.encode(&known(links))?;
                objects.insert(id.as_bytes(), row.as_slice()).unwrap();
            }
            Ok(())
        };
        store.write("make it old", Durability::Immediate, write).unwrap();
    }
    for _ in 0..2 {
        let store = Store::open(&path, || unreachable!()).unwrap();
        for (id, links) in ids.iter().zip(1..) {
            assert_eq!(store.get(id).unwrap(), Some(known(links)));
        }
        let found: Vec<_> = store.orphans().unwrap().into_iter().map(|(id, _)| id).collect();
        assert_eq!(found, [ids[1].clone(), ids[0].clone(), ids[2].clone()], "by bytes");
    }
    let store = Store::open(&path, || unreachable!()).unwrap();
    let mut standing = store.standing().unwrap();
    let rows = ids.map(|id| (id, None));
    store.commit(&mut standing, &Commit { rows: &rows, ..Commit::default() }).unwrap();
    assert!(store.orphans().unwrap().is_empty() && store.get(&rows[0].0).unwrap().is_none());
}

/// What is logged can be read again, however many bytes its steps carry.
#[test]
fn steps_that_carry_much_are_logged_in_rows_that_can_be_read() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("store.redb");
    let store = Store::open(&path, || Standing::new(Incarnation([1; 16]), false)).unwrap();
    let mut standing = store.standing().unwrap();
    standing.committed = BatchId(1);
    let object = ObjectId::new(1, &[1]).unwrap();
    let steps = vec![Step::Append { object, at: 7, bytes: vec![b'x'; 64 << 10] }; 400];
    store.commit(&mut standing, &Commit { steps: &steps, ..Commit::default() }).unwrap();
    drop(store);
    let store = Store::open(&path, || unreachable!()).unwrap();
    let mut logged = 0;
    store.each_logged(|_, part| logged += part.len()).unwrap();
    assert_eq!(logged, 400);
}

#[test]
fn a_commit_survives_and_is_trimmed() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("store.redb");
    let new = || Standing::new(Incarnation([1; 16]), false);
    let id = |n| ObjectId::new(1, &[n]).unwrap();
    let store = Store::open(&path, new).unwrap();
    let mut standing = store.standing().unwrap();
    standing.committed = BatchId(1);
    let at = Place { within: Within::Orphans, name: Name::new(b"x").unwrap() };
    let steps = vec![Step::Unlink { object: id(1), at }; 5000];
    let known = Known {
        handle: Some(id(9)),
        kind: replicator_common::object::Kind::File,
        position: Position::Orphan { was: None },
        links: 1,
        content: BatchId(1),
    };
    let rows = [(id(2), Some(known.clone()))];
    let commit = Commit { steps: &steps, rows: &rows, ..Commit::default() };
    store.commit(&mut standing, &commit).unwrap();
    store.commit(&mut standing, &commit).unwrap();
    assert_eq!((standing.objects, standing.orphans), (1, 1));
    drop(store);
    let store = Store::open(&path, || unreachable!()).unwrap();
    assert_eq!(store.standing().unwrap(), standing);
    assert_eq!(store.get(&id(2)).unwrap(), Some(known));
    assert_eq!(store.orphans().unwrap().len(), 1);
    let mut logged = Vec::new();
    store.each_logged(|_, part| logged.extend(part)).unwrap();
    assert_eq!(logged, steps);
    assert_eq!(store.marked().unwrap(), None);
    for reached in [Reached::begun, Reached::through, Reached::begun] {
        store.forget(BatchId(1), Some(reached(BatchId(1)))).unwrap();
    }
    assert_eq!(store.marked().unwrap(), Some(Reached::through(BatchId(1))));
    store.forget(BatchId(2), Some(Reached::begun(BatchId(2)))).unwrap();
    assert_eq!(store.marked().unwrap(), Some(Reached::begun(BatchId(2))));
    store.each_logged(|_, _| panic!("trimmed")).unwrap();
}
