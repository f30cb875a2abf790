//! One replica that cannot be opened, beside another that can.

#![allow(clippy::unwrap_used)]

mod common;

use std::path::Path;

use common::{Batch, World};
use replicator_common::control::{Control, DeletionMode};
use replicator_common::status::{ReplicationStatus, Status};
use replicator_common::wire::Refusal;
use replicator_dst::readonly;
use replicator_dst::service::DestinationService;

fn first() -> Batch {
    Batch::new().root().file(1, common::ROOT, "file", b"content")
}

fn status(service: &DestinationService, world: &World) -> Status {
    let mut all = service.list();
    all.retain(|status| status.source_file_system_id == world.source);
    assert_eq!(all.len(), 1, "{all:#?}");
    all.remove(0)
}

fn finish(service: &DestinationService, world: &World) {
    service.delete(&world.source, DeletionMode::LocalConfigurationOnly).unwrap();
}

/// Breaks one of two replicas while nothing runs, looks, and mends it.
async fn with_one_broken(
    reason: &str,
    break_it: impl FnOnce(&World, &Path),
    mend: impl FnOnce(&World, &Path),
) {
    let mut bad = World::new();
    // Another source of the same daemon: of the same certificate.
    let mut good = World::new();
    good.state = bad.state.clone();
    good.identity = bad.identity.clone();
    let service = bad.open(None).await;
    for world in [&mut bad, &mut good] {
        world.enrol(&service, false).await;
        world.connect(&service, 0).await.apply(1, &first()).await;
    }
    service.shutdown().await;
    drop(service);
    // Until the stores are let go of.
    let service = bad.open(None).await;
    service.shutdown().await;
    drop(service);

    let state = bad.state.join("replicas").join(bad.source.as_str());
    break_it(&bad, &state);
    let service = bad.open_once(None).await;
    let broken = status(&service, &bad);
    assert_eq!(broken.status, ReplicationStatus::Error, "{broken:#?}");
    let message = broken.status_message.unwrap();
    assert!(message.contains(reason), "{message}");
    assert_eq!(broken.destination.unwrap().path, bad.replica.display().to_string());
    // The other one goes on, and a new one may be made.
    let mut source = good.connect(&service, 1).await;
    source.apply(2, &Batch::new().file(2, common::ROOT, "more", b"more").directory(0)).await;
    assert!(good.tree().contains_key("more"));
    let beside = bad.base.path().join("beside");
    service.token(&beside, std::time::Duration::from_secs(60), false).unwrap();
    let again = service.token(&bad.replica, std::time::Duration::from_secs(60), true);
    assert!(again.is_err(), "a token for a directory that is a replica already");
    let Err(refusal) = bad.try_connect(&service, 1).await else { panic!("a session with it") };
    assert!(matches!(&refusal, Refusal::Unable(why) if why.contains(reason)), "{refusal}");

    mend(&bad, &state);
    bad.connect(&service, 1).await;
    assert!(bad.tree().contains_key("file"));
    assert_ne!(status(&service, &bad).status, ReplicationStatus::Error);
    finish(&service, &bad);
    finish(&service, &good);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replica_whose_directory_is_gone_holds_up_no_other() {
    let aside = |world: &World| world.base.path().join("aside");
    with_one_broken(
        "is not the replica that was written to",
        |world, _| {
            readonly::release_path(&world.replica).unwrap();
            std::fs::rename(&world.replica, aside(world)).unwrap();
        },
        |world, _| std::fs::rename(aside(world), &world.replica).unwrap(),
    )
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replica_whose_store_is_damaged_holds_up_no_other() {
    let paths = |state: &Path| (state.join("store.redb"), state.join("store.good"));
    with_one_broken(
        "store",
        |_, state| {
            let (store, good) = paths(state);
            std::fs::rename(&store, good).unwrap();
            std::fs::write(&store, "this is no store".repeat(1000)).unwrap();
        },
        |_, state| {
            let (store, good) = paths(state);
            std::fs::rename(good, store).unwrap();
        },
    )
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stranger_may_not_speak_for_a_source() {
    let mut one = World::new();
    let mut other = World::new();
    other.state = one.state.clone();
    let service = one.open(None).await;
    one.enrol(&service, false).await;
    other.enrol(&service, false).await;
    // Enrolled, but for another file system.
    let source = std::mem::replace(&mut other.source, one.source.clone());
    let Err(refusal) = other.try_connect(&service, 0).await else { panic!("a session") };
    assert!(matches!(refusal, Refusal::NoConfiguration { .. }), "{refusal}");
    other.source = source;
    finish(&service, &one);
    finish(&service, &other);
}

/// A process that died while it made a configuration left our directory, and the
/// read-only mount, in the replica. Both are taken back, and it can be made again.
#[tokio::test(flavor = "multi_thread")]
async fn what_was_being_made_is_taken_back() {
    let mut world = World::new();
    let service = world.open(None).await;
    world.enrol(&service, false).await;
    service.shutdown().await;
    drop(service);
    let state = world.state.join("replicas").join(world.source.as_str());
    // As it is until the very end of making it.
    std::fs::rename(state.join("config.json"), state.join("making.json")).unwrap();
    assert!(std::fs::write(world.replica.join("file"), "").is_err(), "it is protected");

    let service = world.open(None).await;
    assert!(service.list().is_empty());
    assert_eq!(std::fs::read_dir(&world.replica).unwrap().count(), 0);
    assert!(!state.exists());
    std::fs::write(world.replica.join("file"), "").unwrap();
    std::fs::remove_file(world.replica.join("file")).unwrap();
    world.enrol(&service, false).await;
    world.connect(&service, 0).await.apply(1, &first()).await;
    assert!(!state.join("making.json").exists());
    finish(&service, &world);
}
