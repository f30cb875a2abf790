//! The destination end to end on a real directory, driven by a scripted source.

#![allow(clippy::unwrap_used)]

mod common;

use std::collections::BTreeMap;
use std::time::Duration;

use common::{Batch, Part, ROOT, World, data, id, name, once, pieces, plain, state};
use replicator_common::control::{Control, DeletionMode};
use replicator_common::id::{BatchId, TransferId};
use replicator_common::object::{Kind, Xattr};
use replicator_common::wire::{
    ContentSource, DataFrame, DestinationMessage, InventoryItem, Layout, Op, Piece, SourceMessage,
    TransferBegin,
};
use replicator_dst::failover::{self, Manifest};
use replicator_dst::replica::Point;

fn expect(tree: &BTreeMap<String, String>, expected: &[(&str, &str)]) {
    let expected: BTreeMap<_, _> =
        expected.iter().map(|(path, what)| ((*path).to_owned(), (*what).to_owned())).collect();
    assert_eq!(*tree, expected);
}

fn first() -> Batch {
    Batch::new()
        .root()
        .mkdir(1, ROOT, "dir")
        .file(2, 1, "a", b"alpha")
        .file(3, 1, "b", b"beta")
        .file(4, ROOT, "c", b"gamma")
}

/// Swap, replace, hard link, delete, move a directory, in one batch.
fn second() -> Batch {
    Batch::new()
        .directory(ROOT)
        .directory(1)
        .entry(1, "a", Some(2), Some(3))
        .entry(1, "b", Some(3), Some(2))
        .content(2, b"alpha two", false, 1)
        .entry(ROOT, "c", Some(4), None)
        .op(Op::Drop { object: id(4) })
        .mkdir(5, ROOT, "new")
        .entry(ROOT, "dir", Some(1), None)
        .entry(5, "moved", None, Some(1))
        .entry(ROOT, "b-link", None, Some(3))
        .op(Op::Put {
            object: id(3),
            state: state(Kind::File, 0o644, 4),
            content: ContentSource::Unchanged,
            new: false,
            links: 2,
        })
        .op(Op::Put {
            object: id(6),
            state: state(Kind::Symlink, 0o777, 7),
            content: ContentSource::Symlink { target: b"nowhere".to_vec() },
            new: true,
            links: 1,
        })
        .entry(5, "link", None, Some(6))
}

const AFTER_FIRST: &[(&str, &str)] = &[
    ("dir", "dir 750 1234"),
    ("dir/a", "file 640 1234 1 alpha"),
    ("dir/b", "file 640 1234 1 beta"),
    ("c", "file 640 1234 1 gamma"),
];
const AFTER_SECOND: &[(&str, &str)] = &[
    ("new", "dir 750 1234"),
    ("new/moved", "dir 755 1234"),
    ("new/moved/a", "file 644 1234 2 beta"),
    ("new/moved/b", "file 640 1234 1 alpha two"),
    ("new/link", "link nowhere"),
    ("b-link", "file 644 1234 2 beta"),
];

#[tokio::test(flavor = "multi_thread")]
async fn batches_arrive_and_a_session_resumes() {
    replicate_and_resume(World::new()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn batches_arrive_without_opening_by_handle() {
    replicate_and_resume(World { by_path: true, ..World::new() }).await;
}

async fn replicate_and_resume(mut world: World) {
    let service = world.open(None).await;
    world.enrol(&service, false).await;
    let mut source = world.connect(&service, 0).await;
    assert_eq!(source.hello.as_ref().unwrap().committed.batch, BatchId(0));
    source.apply(1, &first()).await;
    expect(&world.tree(), AFTER_FIRST);
    source.apply(2, &second()).await;
    expect(&world.tree(), AFTER_SECOND);
    // A heartbeat.
    source.apply(3, &Batch::new()).await;
    // Nobody else may write, where the mount protects.
    let status = service.list().remove(0);
    let destination = status.destination.unwrap();
    if destination.enforcement.kind == replicator_common::status::EnforcementKind::Mount {
        assert!(std::fs::write(world.replica.join("x"), "").is_err());
    }
    assert_eq!((destination.applied, destination.objects), (BatchId(3), 6));
    assert!(destination.last_replicated.is_some() && destination.last_error.is_none());
    // A directory whose file was replaced keeps its time.
    use std::os::unix::fs::MetadataExt;
    let before = world.replica.join("new/moved").metadata().unwrap().mtime_nsec();
    source.apply(4, &Batch::new().content(2, b"alpha three", false, 1)).await;
    let after = world.replica.join("new/moved").metadata().unwrap();
    assert_eq!((after.mtime(), after.mtime_nsec()), (1_600_000_000, before));
    // The same source again: the old session gives way.
    let source = world.connect(&service, 4).await;
    assert_eq!(source.hello.as_ref().unwrap().committed.batch, BatchId(4));
    service.shutdown().await;
    drop((service, source));
    let service = world.open(None).await;
    let mut source = world.connect(&service, 4).await;
    assert!(!source.hello.as_ref().unwrap().reconcile);
    source.apply(5, &Batch::new().directory(ROOT).file(9, ROOT, "late", b"x")).await;
    finish(&world, &service);
}

/// Leaves nothing mounted behind.
fn finish(world: &World, service: &replicator_dst::service::DestinationService) {
    service.delete(&world.source, DeletionMode::LocalConfigurationOnly).unwrap();
    std::fs::write(world.replica.join("writable"), "yes").unwrap();
    assert!(!world.replica.join(format!(".replicator-{}", world.source)).exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn trap_8_a_batch_is_whole_whenever_the_applier_dies() {
    let points = [Point::Staged, Point::Synced, Point::Committed, Point::Applied];
    for (point, by_path) in points.into_iter().flat_map(|p| [(p, false), (p, true)]) {
        let mut world = World { by_path, ..World::new() };
        let service = world.open(None).await;
        world.enrol(&service, false).await;
        world.connect(&service, 0).await.apply(1, &first()).await;
        service.shutdown().await;
        drop(service);

        let service = world.open(Some(once(point))).await;
        let mut source = world.connect(&service, 1).await;
        source.send(2, &second()).await;
        tokio::time::sleep(Duration::from_millis(300)).await;
        service.shutdown().await;
        drop((service, source));

        let service = world.open(None).await;
        let mut source = world.connect(&service, 1).await;
        let committed = source.hello.as_ref().unwrap().committed.batch;
        if matches!(point, Point::Staged | Point::Synced) {
            assert_eq!(committed, BatchId(1), "{point:?}");
            expect(&world.tree(), AFTER_FIRST);
            source.apply(2, &second()).await;
        } else {
            assert_eq!(committed, BatchId(2), "{point:?}");
        }
        expect(&world.tree(), AFTER_SECOND);
        source.apply(3, &Batch::new().directory(ROOT).file(9, ROOT, "late", b"x")).await;
        finish(&world, &service);
    }
}

async fn transfer(
    source: &mut common::FakeSource,
    number: u64,
    begin: TransferBegin,
    parts: Vec<Part>,
    size: u64,
) {
    let transfer = TransferId(number);
    source.data.write(&DataFrame::TransferBegin(begin)).await.unwrap();
    source.data.write(&pieces(transfer, parts)).await.unwrap();
    let end = DataFrame::TransferEnd { transfer, state: state(Kind::File, 0o600, size) };
    source.data.write(&end).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn transfers_replace_and_patch() {
    replace_and_patch(World::new()).await;
    replace_and_patch(World { by_path: true, ..World::new() }).await;
}

async fn replace_and_patch(mut world: World) {
    let service = world.open(None).await;
    world.enrol(&service, false).await;
    let mut source = world.connect(&service, 0).await;
    let begin = |number, layout, basis: Option<u8>, version| TransferBegin {
        transfer: TransferId(number),
        object: id(2),
        state: state(Kind::File, 0o600, 0),
        layout,
        basis: basis.map(id),
        basis_version: BatchId(version),
    };
    let put = |number, new, size| Op::Put {
        object: id(2),
        state: state(Kind::File, 0o600, size),
        content: ContentSource::Transferred { transfer: TransferId(number) },
        new,
        links: 1,
    };
    let mut expected = vec![b'x'; 300_000];
    expected.extend(vec![0; 100_000]);
    expected.extend(b"end");
    let size = expected.len() as u64;
    // Two pieces of data side by side, and one behind the hole.
    let parts = vec![
        data(vec![b'x'; 200_000]),
        data(vec![b'x'; 100_000]),
        plain(Piece::Hole { length: 100_000 }),
        data(*b"end"),
    ];
    transfer(&mut source, 1, begin(1, Layout::Replace, None, 0), parts, size).await;
    let batch = Batch::new().root().op(put(1, true, size)).entry(ROOT, "big", None, Some(2));
    source.apply(1, &batch).await;
    assert_eq!(std::fs::read(world.replica.join("big")).unwrap(), expected);

    // A patch: one run rewritten, one made a hole, the end cut.
    let parts = vec![
        plain(Piece::Copy { from: 0, length: 1000 }),
        data(*b"pat"),
        data(*b"ched"),
        plain(Piece::Copy { from: 1007, length: 98_993 }),
        plain(Piece::Hole { length: 100_000 }),
        plain(Piece::Copy { from: 200_000, length: 150_000 }),
    ];
    transfer(&mut source, 2, begin(2, Layout::Patch, Some(2), 1), parts, 350_000).await;
    source.apply(2, &Batch::new().op(put(2, false, 350_000))).await;
    expected[1000..1007].copy_from_slice(b"patched");
    expected[100_000..200_000].fill(0);
    expected.truncate(350_000);
    assert_eq!(std::fs::read(world.replica.join("big")).unwrap(), expected);

    // A new file from the old one's pieces, with an insertion.
    let parts = vec![
        plain(Piece::Copy { from: 0, length: 500 }),
        data(*b"inserted"),
        plain(Piece::Copy { from: 500, length: 349_500 }),
    ];
    transfer(&mut source, 3, begin(3, Layout::Replace, Some(2), 2), parts, 350_008).await;
    source.apply(3, &Batch::new().op(put(3, false, 350_008))).await;
    expected.splice(500..500, *b"inserted");
    assert_eq!(std::fs::read(world.replica.join("big")).unwrap(), expected);

    finish(&world, &service);
}

#[tokio::test(flavor = "multi_thread")]
async fn trap_1_orphans_wait_and_are_put_back_at_failover() {
    orphans(World::new()).await;
    orphans(World { by_path: true, ..World::new() }).await;
}

async fn orphans(mut world: World) {
    let service = world.open(None).await;
    world.enrol(&service, false).await;
    let mut source = world.connect(&service, 0).await;
    source.apply(1, &first()).await;
    let out = Batch::new()
        .directory(ROOT)
        .directory(1)
        .entry(1, "a", Some(2), None)
        .op(Op::Orphan { object: id(2) })
        .entry(ROOT, "c", Some(4), None)
        .op(Op::Orphan { object: id(4) });
    source.apply(2, &out).await;
    assert!(!world.replica.join("dir/a").exists());
    let back = Batch::new().directory(ROOT).entry(ROOT, "a2", None, Some(2));
    source.apply(3, &back).await;
    assert_eq!(std::fs::read(world.replica.join("a2")).unwrap(), b"alpha");
    let report = service.delete(&world.source, DeletionMode::LocalConfigurationOnly).unwrap();
    assert_eq!((report.put_back, report.set_aside, report.lost_and_found), (1, 0, None));
    assert_eq!(std::fs::read(world.replica.join("c")).unwrap(), b"gamma");
}

/// A tree that left goes back nowhere, unless the source says so.
#[tokio::test(flavor = "multi_thread")]
async fn what_left_is_set_aside_at_failover() {
    left(World::new()).await;
    left(World { by_path: true, ..World::new() }).await;
}

async fn left(mut world: World) {
    let service = world.open(None).await;
    world.enrol(&service, false).await;
    let mut source = world.connect(&service, 0).await;
    source.apply(1, &first()).await;
    let leave = |name: &str| {
        let gone = Batch::new().directory(ROOT).entry(ROOT, name, Some(1), None);
        gone.op(Op::Leave { object: id(1) })
    };
    source.apply(2, &leave("dir")).await;
    let back = Batch::new().directory(ROOT).entry(ROOT, "dir2", None, Some(1));
    source.apply(3, &back).await;
    assert_eq!(std::fs::read(world.replica.join("dir2/a")).unwrap(), b"alpha");
    // An orphan first, which has a home, then gone for good, and half taken apart.
    let orphan = Batch::new().directory(ROOT).entry(ROOT, "dir2", Some(1), None);
    source.apply(4, &orphan.op(Op::Orphan { object: id(1) })).await;
    source.apply(5, &Batch::new().op(Op::Leave { object: id(1) })).await;
    let apart = Batch::new().entry(1, "a", Some(2), None).op(Op::Drop { object: id(2) });
    source.apply(6, &apart).await;
    let report = service.delete(&world.source, DeletionMode::LocalConfigurationOnly).unwrap();
    assert_eq!((report.put_back, report.set_aside), (0, 1));
    assert!(!world.replica.join("dir2").exists());
    let lost = world.replica.join(report.lost_and_found.as_ref().unwrap());
    let manifest = std::fs::read_to_string(lost.join("manifest.json")).unwrap();
    assert!(manifest.contains("it had left the source"), "{manifest}");
}

/// Leaves packed objects and a plan behind that were never committed.
async fn leave_a_rest(world: &World, source: &mut common::FakeSource) {
    let rest = Batch::new().mkdir(7, 1, "sub").file(8, 7, "half", b"half arrived");
    source.packs(2, &rest.packs).await;
    source.plan(2, &rest.ops).await;
    let staging = world.replica.join(format!(".replicator-{}/staging", world.source));
    for _ in 0..200 {
        let files = |shard: &str, first: &str| {
            std::fs::read_dir(staging.join(shard)).is_ok_and(|entries| {
                entries.flatten().any(|e| {
                    e.file_name().to_string_lossy().starts_with(first)
                        && e.metadata().is_ok_and(|meta| meta.len() > 0)
                })
            })
        };
        if files("0", "p2.") && files("7", "plan.2.") {
            return;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    panic!("the rest did not arrive");
}

fn check_the_rest(world: &World) {
    let mut tree = world.tree();
    let lost: Vec<_> = tree.keys().filter(|path| path.contains("lost+found")).cloned().collect();
    let manifest = lost.iter().find(|path| path.ends_with("manifest.json")).expect("a manifest");
    let manifest: Manifest =
        serde_json::from_slice(&std::fs::read(world.replica.join(manifest)).unwrap()).unwrap();
    assert_eq!(manifest.items.len(), 1);
    let item = &manifest.items[0];
    assert_eq!((item.paths.as_slice(), item.size), (&["dir/sub/half".to_owned()][..], Some(12)));
    let kept = lost.iter().find(|path| path.ends_with(&item.file)).unwrap();
    assert_eq!(std::fs::read(world.replica.join(kept)).unwrap(), b"half arrived");
    tree.retain(|path, _| !path.contains("lost+found"));
    expect(&tree, AFTER_FIRST);
    assert!(!world.replica.join(format!(".replicator-{}", world.source)).exists());
    std::fs::write(world.replica.join("writable"), "yes").unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn failover_sets_the_rest_aside_whenever_it_is_interrupted() {
    for step in 0..=6 {
        let mut world = World::new();
        let service = world.open(Some(once(Point::Failover(step)))).await;
        world.enrol(&service, false).await;
        let mut source = world.connect(&service, 0).await;
        source.apply(1, &first()).await;
        leave_a_rest(&world, &mut source).await;
        let result = service.delete(&world.source, DeletionMode::LocalConfigurationOnly);
        assert_eq!(result.is_ok(), step == 0, "step {step}: {result:?}");
        service.shutdown().await;
        drop((service, source));
        if step > 0 {
            // Without a daemon, as after a crash.
            let report = retry_offline(&world).await;
            assert_eq!(report.set_aside, 1, "step {step}");
        }
        check_the_rest(&world);
    }
}

async fn retry_offline(world: &World) -> replicator_common::status::FailoverReport {
    for _ in 0..200 {
        match failover::offline(&world.state, None) {
            Ok(report) => return report,
            Err(failover::FailoverError::NotFound(_)) => panic!("the configuration is gone"),
            Err(_) => tokio::time::sleep(Duration::from_millis(50)).await,
        }
    }
    failover::offline(&world.state, None).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_source_deletes_and_is_told() {
    let mut world = World::new();
    let service = world.open(None).await;
    world.enrol(&service, false).await;
    let mut source = world.connect(&service, 0).await;
    source.apply(1, &first()).await;
    source.writer.write(&SourceMessage::Delete).await.unwrap();
    match source.next().await {
        DestinationMessage::FailedOver { report } => assert!(report.last_replicated.is_some()),
        other => panic!("{other:?}"),
    }
    assert!(service.list().is_empty());
    expect(&world.tree(), AFTER_FIRST);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replica_that_is_not_empty_is_reconciled() {
    let mut world = World::new();
    std::fs::create_dir_all(world.replica.join("dir/foreign")).unwrap();
    std::fs::write(world.replica.join("dir/a"), "alpha").unwrap();
    std::fs::write(world.replica.join("dir/foreign/x"), "mine").unwrap();
    let service = world.open(None).await;
    assert!(service.token(&world.replica, Duration::from_secs(9), false).is_err());
    world.enrol(&service, true).await;
    let mut source = world.connect(&service, 0).await;
    assert!(source.hello.as_ref().unwrap().reconcile);
    source.writer.write(&SourceMessage::RequestInventory).await.unwrap();
    let mut items: Vec<InventoryItem> = Vec::new();
    loop {
        match source.next().await {
            DestinationMessage::Inventory { items: more, last } => {
                items.extend(more);
                if last {
                    break;
                }
            }
            other => panic!("{other:?}"),
        }
    }
    let names: Vec<_> = items.iter().skip(1).map(|item| item.name.to_string()).collect();
    assert_eq!(names.len(), 4, "{names:?}");
    let find = |text: &str| items.iter().find(|item| item.name == name(text)).unwrap();
    let adopt = |object, text: &str, directory, kind| Op::Adopt {
        object,
        handle: find(text).handle.clone(),
        directory,
        name: name(text),
        kind,
    };
    let foreign = replicator_common::id::ObjectId::foreign(&find("foreign").handle).unwrap();
    let batch = Batch::new()
        .root()
        .op(adopt(id(1), "dir", id(ROOT), Kind::Directory))
        .op(adopt(id(2), "a", id(1), Kind::File))
        .op(adopt(foreign.clone(), "foreign", id(1), Kind::Directory))
        .op(Op::SetAside { object: foreign.clone() })
        .op(Op::Entry { directory: id(1), name: name("foreign"), old: Some(foreign), new: None })
        .directory(1)
        .content(2, b"alpha two", false, 1);
    source.apply(1, &batch).await;
    let report = service.delete(&world.source, DeletionMode::LocalConfigurationOnly).unwrap();
    let lost = world.replica.join(report.lost_and_found.unwrap());
    let mut tree = world.tree();
    assert_eq!(tree.keys().filter(|path| path.ends_with("/x")).count(), 1);
    let manifest = std::fs::read_to_string(lost.join("manifest.json")).unwrap();
    assert!(manifest.contains("the source does not"), "{manifest}");
    tree.retain(|path, _| !path.contains("lost+found"));
    expect(&tree, &[("dir", "dir 755 1234"), ("dir/a", "file 640 1234 1 alpha two")]);
}

#[tokio::test(flavor = "multi_thread")]
async fn attributes_are_exact() {
    let mut world = World::new();
    std::fs::create_dir(&world.replica).unwrap();
    let service = world.open(None).await;
    world.enrol(&service, false).await;
    let mut source = world.connect(&service, 0).await;
    let xattr = |name: &[u8], value: &[u8]| Xattr { name: name.to_vec(), value: value.to_vec() };
    let mut with = state(Kind::Directory, 0o2755, 0);
    with.attributes.xattrs = vec![xattr(b"user.one", b"1"), xattr(b"user.two", b"2")];
    let put = |state: &replicator_common::object::ObjectState, new| Op::Put {
        object: id(1),
        state: state.clone(),
        content: ContentSource::Unchanged,
        new,
        links: 1,
    };
    let batch = Batch::new().root().op(put(&with, true)).entry(ROOT, "dir", None, Some(1));
    source.apply(1, &batch).await;
    with.attributes.xattrs.remove(0);
    source.apply(2, &Batch::new().op(put(&with, false))).await;
    let fd =
        replicator_common::sys::place::open_directory_path(&world.replica.join("dir")).unwrap();
    let found = replicator_common::sys::xattr::read(std::os::fd::AsFd::as_fd(&fd)).unwrap();
    assert_eq!(found, with.attributes.xattrs);
    assert_eq!(world.tree()["dir"], "dir 2755 1234");
    drop(fd);
    finish(&world, &service);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_source_that_breaks_the_protocol_is_refused() {
    let mut world = World::new();
    let service = world.open(None).await;
    world.enrol(&service, false).await;
    let bad = [
        // An object that nobody sent.
        Batch::new().root().entry(ROOT, "x", None, Some(9)),
        // Our own directory's name.
        Batch::new().root().file(9, ROOT, &format!(".replicator-{}", world.source), b"x"),
        // A directory inside itself.
        Batch::new().root().mkdir(1, 2, "a").mkdir(2, 1, "b"),
    ];
    for batch in bad {
        let mut source = world.connect(&service, 0).await;
        source.send(1, &batch).await;
        match source.next().await {
            DestinationMessage::Refused(refusal) => {
                assert!(refusal.to_string().contains("protocol"), "{refusal}");
            }
            other => panic!("{other:?}"),
        }
    }
    assert!(world.tree().is_empty());
    // The good one goes through all the same.
    world.connect(&service, 0).await.apply(1, &first()).await;
    finish(&world, &service);
}

#[tokio::test(flavor = "multi_thread")]
async fn trap_15_a_map_that_is_not_true_is_given_up() {
    let mut world = World::new();
    let service = world.open(None).await;
    world.enrol(&service, false).await;
    let mut source = world.connect(&service, 0).await;
    source.apply(1, &first()).await;
    // Somebody reaches beneath the mount and takes a file away.
    let beneath = replicator_dst::readonly::Protection::establish(&world.replica).unwrap();
    let root = beneath.root();
    replicator_common::sys::place::unlink(root, &name("c")).unwrap();
    drop(beneath);
    let batch = Batch::new().directory(ROOT).entry(ROOT, "c", Some(4), None).entry(
        ROOT,
        "c2",
        None,
        Some(4),
    );
    source.send(2, &batch).await;
    loop {
        match source.next().await {
            DestinationMessage::Durable { .. } => {}
            DestinationMessage::Refused(refusal) => {
                assert!(refusal.to_string().contains("reconciled"), "{refusal}");
                break;
            }
            other => panic!("{other:?}"),
        }
    }
    // What was claimed was claimed of a replica that held the file.
    assert_eq!(service.list()[0].destination.as_ref().unwrap().last_replicated, None);
    let source = world.connect(&service, 1).await;
    let hello = source.hello.as_ref().unwrap();
    assert_eq!((hello.reconcile, hello.committed.batch), (true, BatchId(0)));
    let status = service.list().remove(0).destination.unwrap();
    assert!(status.last_error.is_some());
    assert_eq!(status.last_replicated, None);
    finish(&world, &service);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_not_expected_is_kept() {
    let mut world = World::new();
    let service = world.open(None).await;
    world.enrol(&service, false).await;
    let mut source = world.connect(&service, 0).await;
    source.apply(1, &first()).await;
    let beneath = replicator_dst::readonly::Protection::establish(&world.replica).unwrap();
    let stranger = replicator_common::sys::place::create_file(beneath.root(), &name("d")).unwrap();
    replicator_common::sys::place::write_at(&stranger, b"strange", 0).unwrap();
    drop((stranger, beneath));
    source.apply(2, &Batch::new().directory(ROOT).file(8, ROOT, "d", b"delta")).await;
    assert_eq!(std::fs::read(world.replica.join("d")).unwrap(), b"delta");
    let report = service.delete(&world.source, DeletionMode::LocalConfigurationOnly).unwrap();
    assert_eq!(report.set_aside, 1);
    let tree = world.tree();
    assert!(tree.values().any(|what| what.contains("strange")), "{tree:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replica_that_is_not_mounted_is_not_filled_anew() {
    let mut world = World::new();
    let service = world.open(None).await;
    world.enrol(&service, false).await;
    world.connect(&service, 0).await.apply(1, &first()).await;
    service.shutdown().await;
    drop(service);
    replicator_dst::readonly::release_path(&world.replica).unwrap();
    let aside = world.base.path().join("aside");
    std::fs::rename(&world.replica, &aside).unwrap();
    std::fs::create_dir(&world.replica).unwrap();
    let config = replicator_dst::state::replicas(&world.state).unwrap().remove(0);
    let mut refused = String::new();
    for _ in 0..100 {
        let options = replicator_dst::replica::ReplicaOptions::default();
        match replicator_dst::replica::Replica::open(&config.0, config.1.clone(), options) {
            Err(error @ replicator_dst::replica::ReplicaError::Missing { .. }) => {
                refused = error.to_string();
                break;
            }
            // The store may still be open in a task of the service.
            Err(_) => tokio::time::sleep(Duration::from_millis(50)).await,
            Ok(_) => panic!("an empty directory was taken for the replica"),
        }
    }
    assert!(refused.contains("mounted"), "{refused}");
    assert!(world.tree().is_empty());
    std::fs::remove_dir(&world.replica).unwrap();
    std::fs::rename(&aside, &world.replica).unwrap();
    let service = world.open(None).await;
    expect(&world.tree(), AFTER_FIRST);
    finish(&world, &service);
}

/// Undone when the test ends, however it ends.
struct Mounted(std::path::PathBuf);

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = replicator_dst::readonly::release_path(&self.0);
        let _ = std::process::Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

fn mount(options: &str, path: &std::path::Path) -> bool {
    let mut command = std::process::Command::new("mount");
    command.args(["-t", "tmpfs", "-o", options, "none"]).arg(path);
    command.status().is_ok_and(|status| status.success())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_gives_back_and_loses_nothing() {
    let mut world = World::new();
    std::fs::create_dir(&world.replica).unwrap();
    if !mount("size=2m,mode=755", &world.replica) {
        eprintln!("skipped: no right to mount");
        return;
    }
    let _mounted = Mounted(world.replica.clone());
    // A second way to the same file system, to enlarge it later.
    let door = world.base.path().join("door");
    std::fs::create_dir(&door).unwrap();
    let bound =
        std::process::Command::new("mount").arg("--bind").args([&world.replica, &door]).status();
    assert!(bound.unwrap().success());
    let _door = Mounted(door.clone());
    let service = world.open(None).await;
    world.enrol(&service, false).await;
    let mut source = world.connect(&service, 0).await;
    let content = vec![b'x'; 250_000];
    let mut batch = Batch::new().root();
    for n in 1..=12 {
        batch = batch.file(n, ROOT, &format!("f{n}"), &content);
    }
    // One object a frame, as far as frames go: the later ones have to wait.
    for pack in &batch.packs {
        source.packs(1, std::slice::from_ref(pack)).await;
    }
    source.plan(1, &batch.ops).await;
    source.commit(1, &batch).await;
    let told = source.next().await;
    let DestinationMessage::Returned { batch: BatchId(1), objects: returned, last: true } = told
    else {
        panic!("{told:?}")
    };
    let why = &returned[0].1;
    assert!(why.contains("o space left") && why.contains("free space"), "{why}");
    let fits = 12 - returned.len();
    assert!((1..12).contains(&fits), "{returned:?}");
    let error = service.list()[0].destination.as_ref().unwrap().last_error.clone();
    assert!(error.is_some_and(|error| error.error.contains("o space left")));
    // What was planned behind it before the source knew is passed over.
    let heartbeat = Batch::new();
    source.plan(2, &[]).await;
    source.commit(2, &heartbeat).await;
    source.writer.write(&SourceMessage::Abandon { batch: BatchId(1) }).await.unwrap();
    // Without those that found no place, the batch does.
    let mut rest = Batch::new().root();
    let gave = |n: u8| returned.iter().any(|(object, _)| *object == id(n));
    for n in (1..=12).filter(|n| !gave(*n)) {
        rest = rest.file(n, ROOT, &format!("f{n}"), &content).reread();
    }
    source.apply(1, &rest).await;
    // A deletion makes room.
    let gone = (1..=12).find(|n| !gave(*n)).unwrap();
    let drop_one = Batch::new().directory(ROOT).entry(ROOT, &format!("f{gone}"), Some(gone), None);
    source.apply(2, &drop_one.op(Op::Drop { object: id(gone) })).await;
    assert!(mount("remount,size=64m", &door));
    let mut late = Batch::new().directory(ROOT);
    for n in (1..=12).filter(|n| gave(*n) || *n == gone) {
        late = late.file(n, ROOT, &format!("f{n}"), &content).reread();
    }
    source.apply(3, &late).await;
    for n in 1..=12 {
        assert_eq!(std::fs::read(world.replica.join(format!("f{n}"))).unwrap(), content);
    }
    finish(&world, &service);
    service.shutdown().await;
}
