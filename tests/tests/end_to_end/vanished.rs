//! A source that is unmounted, mounted over or replaced: the replica stays as
//! it is, and replication goes on by itself when the source is there again.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use replicator_common::status::ReplicationStatus;
use replicator_tests::compare;
use replicator_tests::hosts::{Hosts, Side};
use replicator_tests::mounts::FileSystem::{Ext4, Xfs};
use replicator_tests::mounts::{FileSystem, Mount, run};
use replicator_tests::process::{Daemon, replicator};
use replicator_tests::scenario::{Layout, Pair, patience};
use rustix::mount::UnmountFlags;

/// A source that is a file system's root, with a small tree.
fn enabled(kind: FileSystem) -> (Pair, Daemon) {
    let pair = Pair::new(Layout::Roots(kind, Ext4));
    fs::create_dir(pair.source().join("directory")).unwrap();
    for name in ["directory/a", "directory/b", "c"] {
        fs::write(pair.source().join(name), name).unwrap();
    }
    let daemon = pair.start_enabled("fanotify");
    pair.settle(&daemon, &"populated");
    (pair, daemon)
}

fn unmount(path: &Path, flags: UnmountFlags) -> Result<(), rustix::io::Errno> {
    rustix::mount::unmount(path, flags)
}

fn mount_over(other: &Mount, path: &Path) {
    run(Command::new("mount").arg("--bind").arg(other.path()).arg(path));
}

fn assert_untouched(pair: &Pair) {
    for name in ["directory/a", "directory/b", "c"] {
        assert_eq!(fs::read(pair.replica().join(name)).unwrap(), name.as_bytes());
    }
    assert!(!pair.replica().join("stranger").exists());
}

/// Waits until it says HALTED, why, and what to do; the replica is as it was,
/// and the watermark stands.
#[track_caller]
fn await_halted(pair: &Pair, daemon: &mut Daemon) {
    let status = daemon.poll_until(patience(), "the status is HALTED", |daemon| {
        let status = daemon.try_status()?;
        assert_ne!(status.status, ReplicationStatus::Error, "{:?}", status.status_message);
        (status.status == ReplicationStatus::Halted).then_some(status)
    });
    let message = status.status_message.expect("it says why");
    assert!(message.contains(pair.source().to_str().unwrap()), "{message}");
    assert!(message.contains("`mount`"), "{message}");
    let before = status.source.expect("it is the source that says so");
    assert!(before.blocked_by.iter().any(|one| one.reason.starts_with("halted: ")));
    let error = daemon.try_wait(patience()).expect_err("nobody waits in vain");
    assert!(error.contains("halted since"), "{error}");
    // It is no matter of deletions.
    let resume = ["resume", "--accept-deletions", "--endpoint", daemon.endpoint()];
    let refused = replicator(resume);
    assert!(refused.code != Some(0) && refused.stderr.contains("`mount`"), "{refused:?}");
    // Longer than a heartbeat, and than what is waited between two looks.
    thread::sleep(Duration::from_millis(1500));
    let status = daemon.status();
    assert_eq!(status.status, ReplicationStatus::Halted);
    assert_eq!(status.source.unwrap().watermark, before.watermark);
    assert_untouched(pair);
}

/// Nobody says anything, and it goes on.
#[track_caller]
fn await_return(pair: &Pair, daemon: &mut Daemon, name: &str) {
    fs::write(pair.source().join(name), "after").unwrap();
    daemon.wait_enabled(patience());
    pair.settle(daemon, &name);
    assert!(pair.replica().join(name).exists());
}

#[test]
fn unmounted_while_it_is_watched_and_over_a_restart() {
    let (pair, mut daemon) = enabled(Ext4);
    let watermark = daemon.status().source.unwrap().watermark;
    assert_eq!(
        unmount(pair.source(), UnmountFlags::empty()),
        Err(rustix::io::Errno::BUSY),
        "the source is pinned while it is watched"
    );
    unmount(pair.source(), UnmountFlags::DETACH).unwrap();
    await_halted(&pair, &mut daemon);
    // What somebody puts into the empty mount point is nobody's.
    fs::write(pair.source().join("stranger"), "").unwrap();

    daemon.kill();
    let mut daemon = pair.start("fanotify");
    await_halted(&pair, &mut daemon);
    fs::remove_file(pair.source().join("stranger")).unwrap();
    pair.mounts()[0].attach();
    await_return(&pair, &mut daemon, "first");
    assert!(daemon.status().source.unwrap().watermark > watermark);

    // Once more, with the same process.
    unmount(pair.source(), UnmountFlags::DETACH).unwrap();
    await_halted(&pair, &mut daemon);
    pair.mounts()[0].attach();
    await_return(&pair, &mut daemon, "second");
    assert!(daemon.interrupt().success());
}

/// Root directories of two file systems of ext4 have the same handle.
#[test]
fn mounted_over_by_another_file_system_and_over_a_restart() {
    let (pair, mut daemon) = enabled(Ext4);
    let other = Mount::with_size(Ext4, 64 << 20);
    fs::write(other.path().join("stranger"), "").unwrap();
    mount_over(&other, pair.source());
    await_halted(&pair, &mut daemon);
    unmount(pair.source(), UnmountFlags::empty()).unwrap();
    await_return(&pair, &mut daemon, "first");

    assert!(daemon.interrupt().success());
    mount_over(&other, pair.source());
    let mut daemon = pair.start("fanotify");
    await_halted(&pair, &mut daemon);
    unmount(pair.source(), UnmountFlags::empty()).unwrap();
    await_return(&pair, &mut daemon, "second");
}

#[test]
fn another_file_system_in_its_place_and_over_a_restart() {
    for kind in [Ext4, Xfs] {
        let (pair, mut daemon) = enabled(kind);
        let other = Mount::with_size(kind, 320 << 20);
        fs::write(other.path().join("stranger"), "").unwrap();
        // While it runs: the one goes, the other comes.
        unmount(pair.source(), UnmountFlags::DETACH).unwrap();
        mount_over(&other, pair.source());
        await_halted(&pair, &mut daemon);
        daemon.kill();
        let mut daemon = pair.start("fanotify");
        await_halted(&pair, &mut daemon);
        unmount(pair.source(), UnmountFlags::empty()).unwrap();
        pair.mounts()[0].attach();
        await_return(&pair, &mut daemon, "back");
        compare::assert_same(pair.source(), pair.replica(), &"back");
    }
}

/// The operator of the replica must not think that all is well, or that it is
/// the network.
#[test]
fn the_destination_s_status_says_so_too() {
    let hosts = Hosts::enrolled();
    unmount(hosts.source(), UnmountFlags::DETACH).unwrap();
    for side in [Side::Source, Side::Destination] {
        let start = Instant::now();
        loop {
            let status = hosts.daemon(side).status();
            let message = status.status_message.unwrap_or_default();
            if status.status == ReplicationStatus::Halted && message.contains("`mount`") {
                break;
            }
            assert!(start.elapsed() < patience(), "{side:?}: {:?} {message}", status.status);
            thread::sleep(Duration::from_millis(50));
        }
    }
    assert_eq!(fs::read(hosts.replica().join("directory/file")).unwrap(), b"content");
    hosts.attach_source();
    hosts.await_enabled(Side::Destination);
    hosts.settle(&"mounted again");
}
