//! Nothing that arrived or was here is thrown away, and the manifest names all
//! that was set aside, whenever and however it was.

#![allow(clippy::unwrap_used)]

mod common;

use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use common::{Batch, ROOT, World, name, once};
use replicator_common::control::{Control, DeletionMode};
use replicator_common::status::FailoverReport;
use replicator_common::sys::place;
use replicator_dst::failover::{self, FailoverError, Manifest};
use replicator_dst::readonly::Protection;
use replicator_dst::replica::Point;

fn manifest(directory: &Path) -> Manifest {
    serde_json::from_slice(&std::fs::read(directory.join("manifest.json")).unwrap()).unwrap()
}

fn lost(world: &World, report: &FailoverReport) -> PathBuf {
    world.replica.join(report.lost_and_found.as_ref().expect("something was set aside"))
}

/// Writes beneath the read-only mount, as nobody should.
fn beneath(world: &World, directory: &str, file: &str, content: &[u8]) {
    let protection = Protection::establish(&world.replica).unwrap();
    let root = protection.root();
    if directory.is_empty() {
        put(root, file, content);
    } else {
        place::make_directory(root, &name(directory)).unwrap();
        let within = place::open_directory(root, &name(directory)).unwrap();
        put(within.as_fd(), file, content);
    }
}

fn put(directory: BorrowedFd<'_>, file: &str, content: &[u8]) {
    let file = place::create_file(directory, &name(file)).unwrap();
    place::write_at(&file, content, 0).unwrap();
}

/// Without a daemon; the one before may still be closing its store.
async fn offline(world: &World) -> FailoverReport {
    for _ in 0..200 {
        match failover::offline(&world.state, None) {
            Ok(report) => return report,
            Err(error @ FailoverError::NotFound(_)) => panic!("{error}"),
            Err(_) => tokio::time::sleep(Duration::from_millis(50)).await,
        }
    }
    failover::offline(&world.state, None).unwrap()
}

/// A replica that holds the lost+found of a failover before: that one and its
/// manifest stay as they are.
#[tokio::test(flavor = "multi_thread")]
async fn an_earlier_manifest_is_not_written_over() {
    let mut world = World::new();
    let earlier = format!("efs-replication-lost+found-{}-20200101T000000Z", world.source);
    let earlier = world.replica.join(earlier);
    std::fs::create_dir_all(&earlier).unwrap();
    std::fs::write(earlier.join("manifest.json"), "what was lost then").unwrap();
    std::fs::write(earlier.join("old"), "lost then").unwrap();
    let service = world.open(None).await;
    world.enrol(&service, true).await;
    let mut source = world.connect(&service, 0).await;
    source.apply(1, &Batch::new().root().file(2, ROOT, "a", b"alpha")).await;
    beneath(&world, "", "b", b"a stranger");
    source.apply(2, &Batch::new().directory(ROOT).file(3, ROOT, "b", b"beta")).await;
    let report = service.delete(&world.source, DeletionMode::LocalConfigurationOnly).unwrap();
    let found = lost(&world, &report);
    assert_ne!(found, earlier);
    assert_eq!((report.set_aside, manifest(&found).items.len()), (1, 1));
    let text = std::fs::read_to_string(earlier.join("manifest.json")).unwrap();
    assert_eq!(text, "what was lost then");
    assert_eq!(std::fs::read_dir(&earlier).unwrap().count(), 2);
}

/// What an interrupted run had set aside without coming to note it is named.
#[tokio::test(flavor = "multi_thread")]
async fn what_was_set_aside_before_a_crash_is_in_the_manifest() {
    let mut world = World::new();
    let service = world.open(None).await;
    world.enrol(&service, false).await;
    let mut source = world.connect(&service, 0).await;
    source.apply(1, &Batch::new().root().file(2, ROOT, "a", b"alpha")).await;
    let directory = format!("efs-replication-lost+found-{}-20200101T000000Z", world.source);
    beneath(&world, &directory, "0123", b"not noted");
    let report = service.delete(&world.source, DeletionMode::LocalConfigurationOnly).unwrap();
    let found = lost(&world, &report);
    assert_eq!(found, world.replica.join(directory));
    let items = manifest(&found).items;
    assert_eq!((items.len(), items[0].file.as_str(), report.set_aside), (1, "0123", 1));
    assert_eq!(std::fs::read(found.join("0123")).unwrap(), b"not noted");
}

/// The redo of a failover meets what it does not know: kept, named, and said.
/// Also when the failover is interrupted itself, at any step.
#[tokio::test(flavor = "multi_thread")]
async fn what_a_failover_meets_is_in_its_manifest() {
    for step in 0..=4 {
        let mut world = World::new();
        let service = world.open(Some(once(Point::Committed))).await;
        world.enrol(&service, false).await;
        let mut source = world.connect(&service, 0).await;
        source.send(1, &Batch::new().root().file(2, ROOT, "a", b"alpha")).await;
        tokio::time::sleep(Duration::from_millis(300)).await;
        service.shutdown().await;
        drop((service, source));
        beneath(&world, "", "a", b"a stranger");
        if step > 0 {
            interrupted(&world, step).await;
        }
        let report = offline(&world).await;
        assert_eq!(std::fs::read(world.replica.join("a")).unwrap(), b"alpha", "step {step}");
        let found = lost(&world, &report);
        let items = manifest(&found).items;
        assert_eq!((items.len(), report.set_aside), (1, 1), "step {step}: {items:?}");
        assert!(items[0].reason.contains("unexpectedly"), "step {step}: {items:?}");
        assert_eq!(std::fs::read(found.join(&items[0].file)).unwrap(), b"a stranger");
        let all = std::fs::read_dir(&world.replica).unwrap().flatten();
        let beside = all.filter(|e| e.file_name().to_string_lossy().starts_with("efs-")).count();
        assert_eq!(beside, 1, "step {step}: one lost+found");
    }
}

/// A failover that dies at a step.
async fn interrupted(world: &World, step: u8) {
    for attempt in 0.. {
        let (directory, config) = replicator_dst::state::replicas(&world.state).unwrap().remove(0);
        let hook = Some(once(Point::Failover(step)));
        let options = replicator_dst::replica::ReplicaOptions { by_path: false, hook };
        match replicator_dst::replica::Replica::open(&directory, config, options) {
            Ok(replica) => {
                let handles = replica.abilities.handles;
                let mut tree = replicator_dst::tree::Tree::new(replica.area.clone(), handles);
                let ended = failover::run(&replica, &mut tree);
                assert!(matches!(ended, Err(FailoverError::Interrupted)), "{step}: {ended:?}");
                return;
            }
            Err(error) if attempt > 200 => panic!("{error}"),
            Err(_) => tokio::time::sleep(Duration::from_millis(50)).await,
        }
    }
}

/// A batch had moved a file of the replica into a new directory that still stood
/// in staging, and then its record was given up: the file is not wiped with it.
#[tokio::test(flavor = "multi_thread")]
async fn what_was_being_put_together_is_kept_when_the_memories_are_given_up() {
    let mut world = World::new();
    let service = world.open(None).await;
    world.enrol(&service, false).await;
    let mut source = world.connect(&service, 0).await;
    source.apply(1, &Batch::new().root().file(2, ROOT, "a", b"alpha")).await;
    drop(source);
    let protection = Protection::establish(&world.replica).unwrap();
    let ours = format!(".replicator-{}", world.source);
    let hidden = place::open_directory(protection.root(), &name(&ours)).unwrap();
    let staging = place::open_directory(hidden.as_fd(), &name("staging")).unwrap();
    let shard = place::open_directory(staging.as_fd(), &name("7")).unwrap();
    for directory in ["d2.0", "d2.1"] {
        place::make_directory(shard.as_fd(), &name(directory)).unwrap();
    }
    let half = place::open_directory(shard.as_fd(), &name("d2.1")).unwrap();
    place::rename(protection.root(), &name("a"), half.as_fd(), &name("a")).unwrap();
    drop((protection, hidden, staging, shard, half));
    // A source that remembers more than it has sent: they do not fit together.
    let source = world.connect(&service, 40).await;
    assert!(source.hello.as_ref().unwrap().reconcile);
    let report = service.delete(&world.source, DeletionMode::LocalConfigurationOnly).unwrap();
    let found = lost(&world, &report);
    let items = manifest(&found).items;
    assert_eq!((items.len(), report.set_aside), (1, 1), "{items:?}");
    assert!(items[0].reason.contains("put together"), "{items:?}");
    assert_eq!(std::fs::read(found.join(&items[0].file).join("a")).unwrap(), b"alpha");
}
