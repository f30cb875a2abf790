//! What a plan carries of a file that grew.

#![allow(missing_docs, clippy::unwrap_used)]

mod common;

use std::time::Duration;

use common::{Batch, ROOT, World, id, once, state};
use replicator_common::control::{Control, DeletionMode};
use replicator_common::id::BatchId;
use replicator_common::object::Kind;
use replicator_common::wire::{
    APPENDED_MAX, Appended, ContentSource, DestinationMessage, Hash, Op, SourceMessage,
};
use replicator_dst::replica::Point;

/// The file `log` has `size` bytes, of which these are the last.
fn grown(size: u64, basis: u64, bytes: &[u8]) -> (Appended, u64) {
    (Appended { basis: BatchId(basis), hash: Hash::of(bytes), bytes: bytes.to_vec() }, size)
}

fn put((appended, size): (Appended, u64), new: bool) -> Batch {
    Batch::new().op(Op::Put {
        object: id(2),
        state: state(Kind::File, 0o600, size),
        content: ContentSource::Appended(appended),
        new,
        links: 1,
    })
}

fn first() -> Batch {
    Batch::new().root().file(2, ROOT, "log", b"one,")
}

#[tokio::test(flavor = "multi_thread")]
async fn trap_5_what_is_appended_follows_one_version_of_the_file() {
    for by_path in [false, true] {
        let mut world = World { by_path, ..World::new() };
        let service = world.open(None).await;
        world.enrol(&service, false).await;
        let mut source = world.connect(&service, 0).await;
        source.apply(1, &first()).await;
        let content = || std::fs::read_to_string(world.replica.join("log")).unwrap();
        source.apply(2, &put(grown(9, 1, b" two,"), false)).await;
        assert_eq!(content(), "one, two,");
        source.apply(3, &put(grown(15, 2, b" three"), false)).await;
        assert_eq!(content(), "one, two, three");

        // Of a version that is not the last.
        for basis in [0, 2, 4] {
            source.send(4, &put(grown(20, basis, b" four"), false)).await;
            match source.next().await {
                DestinationMessage::Returned { batch: BatchId(4), objects, .. } => {
                    assert_eq!(objects.len(), 1);
                    assert_eq!(objects[0].0, id(2));
                }
                other => panic!("basis {basis}: {other:?}"),
            }
            source.writer.write(&SourceMessage::Abandon { batch: BatchId(4) }).await.unwrap();
        }
        assert_eq!(content(), "one, two, three");
        source.apply(4, &put(grown(20, 3, b" four"), false)).await;
        assert_eq!(content(), "one, two, three four");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn trap_8_what_is_appended_is_there_once_however_the_applier_dies() {
    let points = [Point::Staged, Point::Synced, Point::Committed, Point::Applied];
    for point in points {
        let mut world = World::new();
        let service = world.open(None).await;
        world.enrol(&service, false).await;
        world.connect(&service, 0).await.apply(1, &first()).await;
        service.shutdown().await;
        drop(service);

        let second = put(grown(9, 1, b" two,"), false);
        let service = world.open(Some(once(point))).await;
        let mut source = world.connect(&service, 1).await;
        source.send(2, &second).await;
        tokio::time::sleep(Duration::from_millis(300)).await;
        service.shutdown().await;
        drop((service, source));

        let service = world.open(None).await;
        let mut source = world.connect(&service, 1).await;
        if source.hello.as_ref().unwrap().committed.batch == BatchId(1) {
            assert!(matches!(point, Point::Staged | Point::Synced), "{point:?}");
            source.apply(2, &second).await;
        }
        let content = std::fs::read_to_string(world.replica.join("log")).unwrap();
        assert_eq!(content, "one, two,", "{point:?}");
        service.shutdown().await;
    }
}

/// A file longer than the replica's file system can hold is told of before it is logged.
#[tokio::test(flavor = "multi_thread")]
async fn what_would_be_too_long_is_given_back() {
    let mut world = World::new();
    let service = world.open(None).await;
    world.enrol(&service, false).await;
    let mut source = world.connect(&service, 0).await;
    source.apply(1, &first()).await;
    source.send(2, &put(grown(i64::MAX as u64, 1, b" two,"), false)).await;
    match source.next().await {
        DestinationMessage::Returned { batch: BatchId(2), objects, .. } => {
            assert_eq!(objects[0].0, id(2));
        }
        other => panic!("{other:?}"),
    }
    source.writer.write(&SourceMessage::Abandon { batch: BatchId(2) }).await.unwrap();
    source.apply(2, &put(grown(9, 1, b" two,"), false)).await;
    assert_eq!(std::fs::read_to_string(world.replica.join("log")).unwrap(), "one, two,");
}

/// Bytes that had arrived and were not applied are kept at failover.
#[tokio::test(flavor = "multi_thread")]
async fn what_had_arrived_is_in_lost_and_found() {
    let mut world = World::new();
    let service = world.open(None).await;
    world.enrol(&service, false).await;
    let mut source = world.connect(&service, 0).await;
    source.apply(1, &first()).await;
    let batch = put(grown(9, 1, b" two,"), false);
    // Of a plan that never became whole.
    source.plan(2, &batch.ops).await;
    tokio::time::sleep(Duration::from_millis(300)).await;
    drop(source);
    let report = service.delete(&world.source, DeletionMode::LocalConfigurationOnly).unwrap();
    let lost = world.replica.join(report.lost_and_found.unwrap());
    let manifest = std::fs::read_to_string(lost.join("manifest.json")).unwrap();
    assert!(manifest.contains("log"), "{manifest}");
    let kept: Vec<Vec<u8>> = std::fs::read_dir(&lost)
        .unwrap()
        .map(|entry| std::fs::read(entry.unwrap().path()).unwrap())
        .collect();
    assert!(kept.contains(&b" two,".to_vec()), "{manifest}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_does_not_fit_is_a_breach() {
    let mut world = World::new();
    let service = world.open(None).await;
    world.enrol(&service, false).await;
    world.connect(&service, 0).await.apply(1, &first()).await;
    let damaged = Appended { hash: Hash::of(b"other"), ..grown(9, 1, b" two,").0 };
    let long = vec![b'x'; APPENDED_MAX as usize + 1];
    let many = (0..17).map(|n| {
        let (appended, size) = grown(4 + APPENDED_MAX, 1, &vec![n; APPENDED_MAX as usize]);
        let mut ops = put((appended, size), false).ops;
        if let Some(Op::Put { object, .. }) = ops.first_mut() {
            *object = id(n + 10);
        }
        ops.remove(0)
    });
    let bad = [
        many.fold(Batch::new(), Batch::op),
        put((damaged, 9), false),
        put(grown(4 + APPENDED_MAX + 1, 1, &long), false),
        put(grown(3, 1, b" two,"), false),
        put(grown(u64::MAX, 1, b""), false),
        put(grown(9, 1, b" two,"), true).entry(ROOT, "new", None, Some(2)),
    ];
    for (number, batch) in bad.iter().enumerate() {
        let mut source = world.connect(&service, 1).await;
        source.send(2, batch).await;
        match source.next().await {
            DestinationMessage::Refused(refusal) => {
                assert!(refusal.to_string().contains("protocol"), "{number}: {refusal}");
            }
            other => panic!("{number}: {other:?}"),
        }
    }
    assert_eq!(std::fs::read_to_string(world.replica.join("log")).unwrap(), "one,");
}
