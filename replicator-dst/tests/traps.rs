//! Traps of the design that a scripted source can set.

#![allow(clippy::unwrap_used)]

mod common;

use std::os::fd::AsRawFd;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use common::{Batch, FakeSource, ROOT, World, data, id, once, pieces, state};
use replicator_common::control::{Control, DeletionMode};
use replicator_common::id::{BatchId, BatchNonce, TransferId};
use replicator_common::object::Kind;
use replicator_common::status::Status;
use replicator_common::time::Timestamp;
use replicator_common::wire::{
    ContentSource, DataFrame, DestinationMessage, Layout, Op, SourceMessage, TransferBegin,
};
use replicator_dst::readonly::Protection;
use replicator_dst::replica::{Point, Replica};
use replicator_dst::service::DestinationService;

fn finish(world: &World, service: &DestinationService) {
    service.delete(&world.source, DeletionMode::LocalConfigurationOnly).unwrap();
}

async fn until(what: &str, mut done: impl FnMut() -> bool) {
    for _ in 0..400 {
        if done() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    panic!("not in time: {what}");
}

/// The destination's refusal, which must be the next that it says.
async fn refusal(source: &mut FakeSource) -> String {
    match tokio::time::timeout(Duration::from_secs(10), source.next()).await {
        Ok(DestinationMessage::Refused(refusal)) => refusal.to_string(),
        other => panic!("{other:?}"),
    }
}

/// A patch is of one version of the file alone: on another it makes neither.
#[tokio::test(flavor = "multi_thread")]
async fn trap_5_a_delta_of_another_version_of_its_basis_is_refused() {
    let mut world = World::new();
    let service = world.open(None).await;
    world.enrol(&service, false).await;
    let mut source = world.connect(&service, 0).await;
    source.apply(1, &Batch::new().root().file(2, ROOT, "f", b"one")).await;
    // A heartbeat: now the last batch is not the one that made the file.
    source.apply(2, &Batch::new()).await;
    let begin = |number, version| {
        DataFrame::TransferBegin(TransferBegin {
            transfer: TransferId(number),
            object: id(2),
            state: state(Kind::File, 0o600, 0),
            layout: Layout::Patch,
            basis: Some(id(2)),
            basis_version: BatchId(version),
        })
    };
    for version in [0, 2, 3] {
        source.data.write(&begin(version, version)).await.unwrap();
        // What is taken is not answered, and reports never end.
        match tokio::time::timeout(Duration::from_secs(10), source.next()).await {
            Ok(DestinationMessage::TransferRefused { transfer, .. }) => {
                assert_eq!(transfer.0, version);
            }
            other => panic!("basis {version}: {other:?}"),
        }
    }
    let transfer = TransferId(9);
    source.data.write(&begin(9, 1)).await.unwrap();
    source.data.write(&pieces(transfer, vec![data(*b"two")])).await.unwrap();
    let end = DataFrame::TransferEnd { transfer, state: state(Kind::File, 0o600, 3) };
    source.data.write(&end).await.unwrap();
    let put = Op::Put {
        object: id(2),
        state: state(Kind::File, 0o600, 3),
        content: ContentSource::Transferred { transfer },
        new: false,
        links: 1,
    };
    source.apply(3, &Batch::new().op(put)).await;
    assert_eq!(std::fs::read(world.replica.join("f")).unwrap(), b"two");
    finish(&world, &service);
}

/// An error of writeback is told once. It came when the applier tidied up
/// between batches; what the session had staged by then may be lost with it, so
/// a batch that names it must not be acknowledged: it has to come again.
#[tokio::test(flavor = "multi_thread")]
async fn trap_16_what_was_staged_before_a_failed_sync_comes_again() {
    let mut world = World::new();
    let fails = Arc::new(AtomicBool::new(false));
    let armed = fails.clone();
    let hook = Arc::new(move |at| at == Point::Sync && armed.swap(false, Ordering::SeqCst));
    let service = world.open(Some(hook)).await;
    world.enrol(&service, false).await;
    let mut source = world.connect(&service, 0).await;
    source.apply(1, &Batch::new().root().file(2, ROOT, "a", b"alpha")).await;
    fails.store(true, Ordering::SeqCst);
    let second = Batch::new().directory(ROOT).file(3, ROOT, "b", b"beta");
    source.packs(2, &second.packs).await;
    let staging = world.replica.join(format!(".replicator-{}/staging/0", world.source));
    until("staged", || std::fs::read_dir(&staging).is_ok_and(|names| names.count() == 1)).await;
    until("an error is told, once", || !fails.load(Ordering::SeqCst)).await;
    source.plan(2, &second.ops).await;
    source.commit(2, &second).await;
    let reason = refusal(&mut source).await;
    assert!(reason.contains("synced"), "{reason}");
    assert!(!world.replica.join("b").exists());
    drop(source);

    let mut source = world.connect(&service, 1).await;
    assert_eq!(source.hello.as_ref().unwrap().committed.batch, BatchId(1));
    assert_eq!(std::fs::read_dir(&staging).unwrap().count(), 0, "in doubt, hence of no use");
    source.apply(2, &second).await;
    assert_eq!(std::fs::read(world.replica.join("b")).unwrap(), b"beta");
    let status = service.list().remove(0).destination.unwrap();
    assert!(status.last_error.is_some_and(|error| error.error.contains("synced")), "it is said");
    finish(&world, &service);
}

/// The same while a batch is sealed.
#[tokio::test(flavor = "multi_thread")]
async fn trap_16_a_batch_whose_sync_fails_is_given_back() {
    let mut world = World::new();
    let fails = Arc::new(AtomicBool::new(false));
    let armed = fails.clone();
    let hook = Arc::new(move |at| at == Point::Sync && armed.swap(false, Ordering::SeqCst));
    let service = world.open(Some(hook)).await;
    world.enrol(&service, false).await;
    let mut source = world.connect(&service, 0).await;
    source.apply(1, &Batch::new().root().file(2, ROOT, "a", b"alpha")).await;
    fails.store(true, Ordering::SeqCst);
    let second = Batch::new().directory(ROOT).file(3, ROOT, "b", b"beta");
    source.send(2, &second).await;
    let reason = refusal(&mut source).await;
    assert!(reason.contains("synced"), "{reason}");
    drop(source);
    let mut source = world.connect(&service, 1).await;
    source.apply(2, &second).await;
    assert_eq!(std::fs::read(world.replica.join("b")).unwrap(), b"beta");
    finish(&world, &service);
}

/// A part of the inventory comes for each time it is asked for, and no more: the
/// source is never given more than it can take.
#[tokio::test(flavor = "multi_thread")]
async fn an_inventory_comes_in_the_parts_that_were_asked_for() {
    let mut world = World::new();
    std::fs::create_dir(&world.replica).unwrap();
    for number in 0..2500 {
        std::fs::write(world.replica.join(format!("file-{number}")), "content").unwrap();
    }
    let service = world.open(None).await;
    world.enrol(&service, true).await;
    let mut source = world.connect(&service, 0).await;
    let mut found = Vec::new();
    for (part, expected) in [(1, 1000), (2, 2000), (3, 2501)] {
        source.writer.write(&SourceMessage::RequestInventory).await.unwrap();
        let limit = Duration::from_secs(10);
        match tokio::time::timeout(limit, source.next()).await.expect("a part") {
            DestinationMessage::Inventory { items, last } => {
                found.extend(items);
                assert_eq!((found.len(), last), (expected, part == 3));
            }
            other => panic!("{other:?}"),
        }
        let more = tokio::time::timeout(Duration::from_millis(700), source.next()).await;
        assert!(more.is_err(), "unasked: {more:?}");
    }
    // After the last there is none, and the session goes on.
    source.writer.write(&SourceMessage::RequestInventory).await.unwrap();
    let more = tokio::time::timeout(Duration::from_millis(700), source.next()).await;
    assert!(more.is_err(), "after the last: {more:?}");
    source.apply(1, &Batch::new().root()).await;
    finish(&world, &service);
}

/// `O_PATH` descriptors hear of no errors: the one that is synced is real.
#[test]
fn trap_16_the_descriptor_that_is_synced_is_real() {
    let world = World::new();
    std::fs::create_dir(&world.replica).unwrap();
    let protection = Protection::establish(&world.replica).unwrap();
    let flags = rustix::fs::fcntl_getfl(protection.root()).unwrap();
    assert!(!flags.contains(rustix::fs::OFlags::PATH), "{flags:?}");
    rustix::fs::syncfs(protection.root()).unwrap();
    protection.release().unwrap();
}

/// The source's state was saved while a batch was on its way, which was lost and
/// built anew, with other content, under its number; then the state is put back.
/// Both name the same number, and do not mean the same batch.
#[tokio::test(flavor = "multi_thread")]
async fn trap_14_another_batch_of_the_same_number_is_noticed() {
    let mut world = World::new();
    let service = world.open(None).await;
    world.enrol(&service, false).await;
    let mut source = world.connect(&service, 0).await;
    source.apply(1, &Batch::new().root()).await;
    source.apply(2, &Batch::new().directory(ROOT).file(2, ROOT, "f", b"one")).await;
    let life = source.hello.as_ref().unwrap().incarnation;
    drop(source);
    let source = world.connect(&service, 1).await;
    let hello = source.hello.clone().unwrap();
    assert_eq!((hello.incarnation, hello.committed.batch), (life, BatchId(2)));
    assert_eq!(hello.committed.nonce, BatchNonce(2), "as the header said");
    drop(source);

    world.rebuilt = 1;
    let source = world.connect(&service, 1).await;
    let hello = source.hello.clone().unwrap();
    assert_ne!(hello.incarnation, life, "what it remembers does not fit the replica");
    assert_eq!(hello.committed.batch, BatchId(0));
    assert!(hello.reconcile);
    finish(&world, &service);
}

/// A batch is in the log, and nothing of it was done when the destination died.
/// Then the replica alone is put back to before the batch was staged there: what
/// staging holds now is of an attempt before, or nothing. Here the mark is what is
/// put back: the batch stages nothing, so all else is as it was.
#[tokio::test(flavor = "multi_thread")]
async fn trap_14_a_replica_that_is_put_back_behind_the_log_is_noticed() {
    for put_back in [false, true] {
        let mut world = World::new();
        let service = world.open(None).await;
        world.enrol(&service, false).await;
        let mut source = world.connect(&service, 0).await;
        let life = source.hello.as_ref().unwrap().incarnation;
        source.apply(1, &Batch::new().root().file(2, ROOT, "a", b"alpha")).await;
        service.shutdown().await;
        drop((service, source));
        let mark = world.replica.join(format!(".replicator-{}/batch", world.source));
        let older = std::fs::read(&mark).unwrap();

        let service = world.open(Some(once(Point::Committed))).await;
        let mut source = world.connect(&service, 1).await;
        let gone = Batch::new().directory(ROOT).entry(ROOT, "a", Some(2), None);
        source.send(2, &gone.op(Op::Drop { object: id(2) })).await;
        tokio::time::sleep(Duration::from_millis(300)).await;
        service.shutdown().await;
        drop((service, source));
        assert!(world.replica.join("a").exists(), "logged, and not done");
        if put_back {
            // Past the protection, which stands.
            let protection = Protection::establish(&world.replica).unwrap();
            let root = format!("/proc/self/fd/{}", protection.root().as_raw_fd());
            let mark = mark.strip_prefix(&world.replica).unwrap();
            std::fs::write(Path::new(&root).join(mark), &older).unwrap();
        }

        let service = world.open(None).await;
        let source = world.connect(&service, 2).await;
        let hello = source.hello.clone().unwrap();
        assert_eq!((hello.incarnation != life, hello.reconcile), (put_back, put_back));
        assert_eq!(world.replica.join("a").exists(), put_back, "redone");
        finish(&world, &service);
    }
}

/// After a crash the store holds the claims of a batch that is logged and not
/// applied: nobody is told of them before it is.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_redone_yet_is_not_claimed() {
    let mut world = World::new();
    let service = world.open(None).await;
    world.enrol(&service, false).await;
    world.connect(&service, 0).await.apply(1, &Batch::new().root()).await;
    let claimed = |status: &Status| status.destination.as_ref().unwrap().last_replicated.unwrap();
    let first = claimed(&service.list()[0]);
    service.shutdown().await;
    drop(service);

    let service = world.open(Some(once(Point::Committed))).await;
    let mut source = world.connect(&service, 1).await;
    source.send(2, &Batch::new().directory(ROOT).file(2, ROOT, "a", b"alpha")).await;
    tokio::time::sleep(Duration::from_millis(300)).await;
    service.shutdown().await;
    drop((service, source));

    let (directory, config) = replicator_dst::state::replicas(&world.state).unwrap().remove(0);
    let options = replicator_dst::replica::ReplicaOptions::default();
    let mut opened = None;
    for _ in 0..200 {
        // The one before may still be closing its store.
        match Replica::open(&directory, config.clone(), options.clone()) {
            Ok(replica) => {
                opened = Some(replica);
                break;
            }
            Err(_) => tokio::time::sleep(Duration::from_millis(50)).await,
        }
    }
    let replica = opened.expect("the replica can be opened");
    assert!(!world.replica.join("a").exists() && !replica.is_redone());
    let told = replica.report(Timestamp::now());
    assert_eq!((told.last_replicated, told.last_consistent), (None, None));
    drop(replica);

    let service = world.open(None).await;
    // No waiting: the claim is there as soon as anybody can ask.
    assert!(claimed(&service.list()[0]) > first);
    assert!(world.replica.join("a").exists());
    service.delete(&world.source, DeletionMode::LocalConfigurationOnly).unwrap();
}

/// A batch that is given back may have another behind it in the queue. Were that
/// one committed, the next greeting would take both for committed, and what the
/// first had brought would never come again.
#[tokio::test(flavor = "multi_thread")]
async fn what_waits_behind_a_batch_that_is_given_back_is_not_committed() {
    let mut world = World::new();
    let fails = Arc::new(AtomicBool::new(false));
    let armed = fails.clone();
    let hook = Arc::new(move |at| {
        let now = at == Point::Sync && armed.load(Ordering::SeqCst);
        if now {
            // The other one is in the queue by the time that this one fails.
            std::thread::sleep(Duration::from_secs(1));
        }
        now && armed.swap(false, Ordering::SeqCst)
    });
    let service = world.open(Some(hook)).await;
    world.enrol(&service, false).await;
    let mut source = world.connect(&service, 0).await;
    source.apply(1, &Batch::new().root().file(2, ROOT, "a", b"alpha")).await;
    let second = Batch::new().directory(ROOT).file(3, ROOT, "b", b"beta");
    fails.store(true, Ordering::SeqCst);
    source.send(2, &second).await;
    source.send(3, &Batch::new()).await;
    let reason = refusal(&mut source).await;
    assert!(reason.contains("synced"), "{reason}");
    drop(source);

    let mut source = world.connect(&service, 1).await;
    assert_eq!(source.hello.as_ref().unwrap().committed.batch, BatchId(1));
    source.apply(2, &second).await;
    assert_eq!(std::fs::read(world.replica.join("b")).unwrap(), b"beta");
    finish(&world, &service);
}
