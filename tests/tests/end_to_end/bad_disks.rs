//! A replica's file system that refuses, for real: a quota is used up, content
//! cannot be written back, an error turns it read-only, a file can have no more
//! names. Beside `disks`, whose disks are full.

use std::collections::BTreeSet;
use std::fs;
use std::io::Write;
use std::os::unix::fs::{DirEntryExt, MetadataExt};
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use replicator_common::time::Timestamp;
use replicator_tests::compare;
use replicator_tests::disks::{Disks, MIB, await_named, await_told, blockers, content, watermark};
use replicator_tests::mounts::FileSystem::{Btrfs, Ext4, Tmpfs, Xfs};
use replicator_tests::mounts::{Mount, run};
use replicator_tests::process::Daemon;
use replicator_tests::scenario::patience;
use replicator_tests::serial;
use replicator_tests::workload::raw;

/// A quota of the replica's file system. (btrfs: its quotas bind root too, and
/// it is the only one that every kernel can have quotas of.)
fn limit(disks: &Disks, quota: &str) {
    run(Command::new("btrfs").args(["qgroup", "limit", quota, "0/5"]).arg(disks.door()));
}

/// What fits goes on, deletions above all; what does not is named with what to
/// do, and comes by itself when the quota is raised.
#[test]
fn a_quota_of_the_replica_is_used_up() {
    let disks = Disks::new(Tmpfs, (Btrfs, 1024 * MIB), None);
    run(Command::new("btrfs").args(["quota", "enable"]).arg(disks.door()));
    for name in ["old-1", "old-2"] {
        disks.write(name, 10 * MIB);
    }
    limit(&disks, "64M");
    let mut daemon = disks.start();
    raw::arrives(&disks.source(), "large", &content("large", 60 * MIB));
    let written = Timestamp::now();
    let words = ["no place at the destination", "uota exceeded", "raise the quota"];
    await_named(&mut daemon, "large", &words);
    disks.write("small", 1000);
    disks.await_same(&mut daemon, "small");
    assert!(!disks.replica().join("large").exists());
    assert!(watermark(&daemon) < written, "claimed, and not there");
    fs::remove_file(disks.source().join("old-1")).unwrap();
    disks.await_same(&mut daemon, "old-1");
    // More small ones than the quota has room for. (Of the last bytes btrfs refuses
    // even a rename, in a batch that is logged already: that waits as a whole.)
    for number in 0..300 {
        disks.write(&format!("many-{number:03}"), 200_000);
    }
    daemon.poll_until(patience(), "the quota is told of", |daemon| {
        let status = daemon.try_status()?;
        let stalled = status.destination.as_ref().and_then(|there| there.stalled.clone());
        let small = blockers(&status).into_iter().filter(|(path, _)| path.starts_with("many-"));
        let mut told = small.map(|(_, why)| why).chain(stalled);
        told.any(|why| why.contains("raise the quota")).then_some(())
    });
    fs::remove_file(disks.source().join("old-2")).unwrap();
    assert!(watermark(&daemon) < written, "claimed, and not there");
    limit(&disks, "512M");
    disks.settle(&mut daemon, "the quota is raised");
    assert!(watermark(&daemon) > written);
    assert!(blockers(&daemon.status()).is_empty());
    assert!(daemon.interrupt().success());
}

/// A replica on a disk of which a part can be lost.
fn on_a_bad_disk() -> Disks {
    let share = serial::share();
    Disks::over(share, Mount::new(Tmpfs), Mount::with_end_taken(BAD, GOOD), None)
}

/// What of it stays good. So little that none of it is kept for failover.
const GOOD: u64 = 14 * MIB;
/// The size of that disk.
const BAD: u64 = 120 * MIB;

/// Stops, mounts the replica anew so that nothing but its disk can be read, and
/// compares. Whatever was acknowledged is there.
fn compare_from_disk(disks: &Disks, daemon: Daemon, what: &str) {
    assert!(daemon.interrupt().success());
    take_down(disks);
    run(Command::new("e2fsck").arg("-fn").arg(disks.disk.image()));
    disks.disk.attach();
    compare::assert_same(&disks.source(), &disks.replica(), &what);
}

/// Unmounts the replica's file system wherever it is mounted, and waits until the
/// kernel has let go of it: mount namespaces of other tests may have copies.
fn take_down(disks: &Disks) {
    run(Command::new("umount").arg(disks.door()));
    disks.disk.detach();
    let start = Instant::now();
    while disks.disk.is_attached() {
        assert!(start.elapsed() < patience(), "the replica's file system is still mounted");
        thread::sleep(Duration::from_millis(50));
    }
}

/// Content cannot be written back (EIO). What is not on the disk is not
/// acknowledged, although the kernel tells the error once (trap 16) and the next
/// sync succeeds; and when the disk is whole again, all comes by itself.
#[test]
fn trap_16_the_replicas_disk_cannot_be_written() {
    let disks = on_a_bad_disk();
    for name in ["in-place", "same"] {
        disks.write(name, 4 * MIB);
    }
    fs::hard_link(disks.source().join("in-place"), disks.source().join("its-link")).unwrap();
    let mut daemon = disks.start();
    disks.settle(&mut daemon, "before the disk is bad");
    disks.disk.free_end();
    assert!(disks.disk.cut());
    let written = disks.write("large", 8 * MIB);
    disks.write("small", 1000);
    disks.write("in-place", 12 * MIB);
    await_told(&mut daemon, "nput/output error");
    // The error is told once: the next sync may well succeed, and must not count.
    daemon.poll_until(patience(), "there is a session again, or an error again", |daemon| {
        let status = daemon.try_status()?;
        let failed = batches_given_back(daemon) > 1;
        (failed || status.destination?.link.connected).then_some(())
    });
    assert!(watermark(&daemon) < written, "claimed, and not on the disk");
    disks.disk.mend(BAD);
    // A read that began while the disk was bad may still end.
    daemon.poll_until(6 * patience(), "all of the replica can be read", |_| {
        let files = ["in-place", "its-link", "large", "same", "small"];
        files.iter().all(|name| fs::read(disks.replica().join(name)).is_ok()).then_some(())
    });
    disks.settle(&mut daemon, "the disk is whole again");
    daemon.poll_until(patience(), "nothing is said to stall", |daemon| {
        daemon.try_status()?.destination?.stalled.is_none().then_some(())
    });
    compare_from_disk(&disks, daemon, "from the disk");
}

/// How often the log says that a sync failed.
fn batches_given_back(daemon: &Daemon) -> usize {
    daemon.output().lines().filter(|line| line.contains("could not be synced")).count()
}

/// What was applied and acknowledged, and is not on the disk yet, cannot be
/// written back. The log still has it: it is done again until a sync covers it.
#[test]
fn trap_16_what_was_acknowledged_cannot_be_written_back() {
    let disks = on_a_bad_disk();
    disks.write("in-place", 8 * MIB);
    fs::hard_link(disks.source().join("in-place"), disks.source().join("its-link")).unwrap();
    let mut daemon = disks.start();
    disks.settle(&mut daemon, "at first");
    disks.disk.free_end();
    // Whether the kernel or the applier wrote it back before the disk is cut is
    // theirs; then it is tried again.
    for attempt in 2.. {
        assert!(attempt < 12, "it was always on the disk before");
        disks.settle(&mut daemon, "before the disk is bad");
        let file = fs::File::options().append(true).open(disks.source().join("in-place"));
        file.unwrap().write_all(&content(&format!("{attempt}"), 3 * MIB)).unwrap();
        disks.await_same(&mut daemon, "in-place");
        daemon.freeze();
        let cut = disks.disk.cut();
        daemon.thaw();
        if !cut {
            continue;
        }
        let (before, poke) = (batches_given_back(&daemon), format!("poke-{attempt}"));
        disks.write(&poke, MIB);
        daemon.poll_until(patience(), "a sync fails, or all found a place", |daemon| {
            let there = fs::read(disks.replica().join(&poke)).ok();
            let arrived = there == fs::read(disks.source().join(&poke)).ok();
            (arrived || batches_given_back(daemon) > before).then_some(())
        });
        disks.disk.mend(BAD);
        // The comparer syncs what it reads, and would be told of the old error,
        // which nobody has been told of for this file.
        let _ = fs::File::open(disks.replica().join("in-place")).unwrap().sync_data();
        disks.settle(&mut daemon, "the disk is whole again");
        if daemon.output().contains("redoing the last batch") {
            break;
        }
    }
    compare_from_disk(&disks, daemon, "from the disk");
}

/// An error in the file system's own structures turns it read-only. Status says
/// so, nothing is claimed; after what an operator does then (stop, check the file
/// system, mount it, start), all goes on.
#[test]
fn an_error_turns_the_replica_read_only() {
    let disks = on_a_bad_disk();
    for name in ["changes", "goes"] {
        disks.write(name, 10_000);
    }
    let mut daemon = disks.start();
    disks.settle(&mut daemon, "before the error");
    run(Command::new("mount").args(["-o", "remount,errors=remount-ro"]).arg(disks.door()));
    let device = disks.disk.device();
    let name = device.file_name().unwrap().to_str().unwrap();
    fs::write(format!("/sys/fs/ext4/{name}/trigger_fs_error"), "by a test").unwrap();
    let written = disks.write("new", 10_000);
    disks.write("large", 2 * MIB);
    disks.write("changes", 20_000);
    fs::remove_file(disks.source().join("goes")).unwrap();
    await_told(&mut daemon, "ead-only file system");
    assert!(watermark(&daemon) < written, "claimed, and not there");
    assert!(disks.replica().join("goes").exists());
    daemon.interrupt();
    take_down(&disks);
    // 1: errors were found and put right.
    let checked = Command::new("e2fsck").arg("-fy").arg(disks.disk.image()).output().unwrap();
    assert!(matches!(checked.status.code(), Some(0 | 1)), "{checked:?}");
    disks.disk.attach();
    let mut daemon = disks.start();
    disks.settle(&mut daemon, "the operator has put it right");
    assert!(daemon.interrupt().success());
}

/// More names than the replica's file system (ext4) takes of one file, which the
/// source's (xfs) does: those that fit are there, the others are named with what
/// to do, all else goes on; when some are removed, the others come.
#[test]
fn more_names_of_a_file_than_the_replica_takes() {
    const MOST: usize = 65_000;
    let disks = Disks::new(Xfs, (Ext4, 512 * MIB), None);
    let file = disks.source().join("file");
    fs::write(&file, "of many names").unwrap();
    let names = disks.source().join("names");
    fs::create_dir(&names).unwrap();
    let name = |number: usize| names.join(format!("{number:05}"));
    (2..MOST).for_each(|number| fs::hard_link(&file, name(number)).unwrap());
    let mut daemon = disks.start();
    await_names(&disks, &mut daemon, "one less than fit");
    // The last that fits and two that do not, in one batch and by themselves.
    for number in MOST..MOST + 3 {
        fs::hard_link(&file, name(number)).unwrap();
    }
    let linked = Timestamp::now();
    let words = ["no place at the destination", "65000 names of one file", "remove some"];
    daemon.poll_until(patience(), "what is too much is named", |daemon| {
        let all = blockers(&daemon.try_status()?);
        let told = |why: &str| words.iter().all(|word| why.contains(word));
        all.iter().any(|(path, why)| path.starts_with("names/6500") && told(why)).then_some(())
    });
    disks.write("other", 1000);
    disks.await_same(&mut daemon, "other");
    // The content goes on in all of them, and a rename needs no more names.
    fs::write(&file, "of other content").unwrap();
    fs::rename(name(2), disks.source().join("renamed")).unwrap();
    for name in ["file", "renamed"] {
        disks.await_same(&mut daemon, name);
    }
    let metadata = fs::metadata(disks.replica().join("file")).unwrap();
    assert_eq!(metadata.nlink(), MOST as u64);
    assert!(watermark(&daemon) < linked, "claimed, and not there");
    let there = daemon.status().destination.unwrap();
    assert!(there.stalled.is_none() && there.last_error.is_none(), "{there:?}");
    for number in 3..10 {
        fs::remove_file(name(number)).unwrap();
    }
    await_names(&disks, &mut daemon, "some are removed");
    assert!(blockers(&daemon.status()).is_empty());
    assert!(daemon.interrupt().success());
}

/// Waits until all is replicated, and looks at the names alone: the comparer
/// reads and syncs a file under each of them, which takes minutes.
fn await_names(disks: &Disks, daemon: &mut Daemon, what: &str) {
    daemon.poll_until(patience(), what, |daemon| daemon.try_wait(Duration::from_secs(5)).ok());
    let names = |root: &Path| -> BTreeSet<_> {
        let file = fs::metadata(root.join("file")).unwrap().ino();
        let entries = fs::read_dir(root.join("names")).unwrap().map(Result::unwrap);
        entries.map(|entry| (entry.file_name(), entry.ino() == file)).collect()
    };
    assert!(names(&disks.source()) == names(&disks.replica()), "{what}: the names differ");
}
