//! Steps of a logged batch that cannot be run, and a failover that therefore fails.

#![allow(clippy::unwrap_used)]

mod common;

use std::os::fd::AsRawFd;
use std::process::Command;
use std::time::Duration;

use common::{Batch, ROOT, World};
use replicator_common::control::{Control, DeletionMode};
use replicator_common::id::BatchId;
use replicator_common::wire::DestinationMessage;
use replicator_dst::readonly::Protection;

/// A file of the replica that cannot be changed until this is dropped.
struct Immutable {
    /// Below the read-only mount.
    protection: Protection,
    file: &'static str,
}

impl Immutable {
    fn new(world: &World, file: &'static str) -> Self {
        let immutable = Self { protection: Protection::establish(&world.replica).unwrap(), file };
        assert!(immutable.set("+i"), "chattr");
        immutable
    }

    fn set(&self, flag: &str) -> bool {
        let (root, process) = (self.protection.root().as_raw_fd(), std::process::id());
        let path = format!("/proc/{process}/fd/{root}/{}", self.file);
        Command::new("chattr").args([flag, &path]).status().is_ok_and(|status| status.success())
    }
}

impl Drop for Immutable {
    fn drop(&mut self) {
        self.set("-i");
    }
}

/// The applier tidies up when it has had nothing to do for two seconds. It must not take
/// away what the steps place that could not be run.
#[tokio::test(flavor = "multi_thread")]
async fn steps_that_wait_keep_their_files_when_a_failover_fails() {
    let mut world = World::new();
    let service = world.open(None).await;
    world.enrol(&service, false).await;
    let mut source = world.connect(&service, 0).await;
    // A file with several names is written in its place.
    let first = Batch::new().root().content(3, b"hard", true, 2);
    let first = first.entry(ROOT, "one", None, Some(3)).entry(ROOT, "other", None, Some(3));
    source.apply(1, &first).await;
    let stuck = Immutable::new(&world, "one");
    source.send(2, &Batch::new().content(3, b"hardly", false, 2)).await;
    loop {
        if matches!(source.next().await, DestinationMessage::Durable { batch, .. } if batch == BatchId(2))
        {
            break;
        }
    }
    let delete = || service.delete(&world.source, DeletionMode::LocalConfigurationOnly);
    assert!(delete().is_err(), "the steps cannot be run");
    tokio::time::sleep(Duration::from_secs(5)).await;
    drop(stuck);
    delete().unwrap();
    assert_eq!(std::fs::read(world.replica.join("other")).unwrap(), b"hardly");
    service.shutdown().await;
}
