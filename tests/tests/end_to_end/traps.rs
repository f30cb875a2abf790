//! Traps of the design that take the whole program to set.

use std::fs::{self, File};
use std::io::Write;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use replicator_common::status::Counters;
use replicator_tests::binary;
use replicator_tests::compare;
use replicator_tests::mounts::FileSystem::{Ext4, Xfs};
use replicator_tests::mounts::{Scratch, run};
use replicator_tests::process::{Daemon, free_port, replicator};
use replicator_tests::scenario::{Layout, Pair, patience};
use replicator_tests::workload::content;
use replicator_tests::workload::raw::Mapping;

/// A new version is written beside the old one and replicated while it is short, it
/// grows, and is renamed over the old one: who reads the replica never sees a part of
/// it, and what both versions have in common does not travel.
#[test]
fn trap_10_a_file_seen_short_and_grown_is_renamed_over() {
    for (layout, watcher) in
        [(Layout::Two(Ext4, Xfs), "fanotify"), (Layout::Two(Xfs, Ext4), "inotify")]
    {
        let pair = Pair::new(layout);
        let old = content::incompressible(1, 8 << 20);
        let new = [&old[..4 << 20], b"inserted", &old[4 << 20..]].concat();
        let [beside, path] = [".file.new", "file"].map(|name| pair.source().join(name));
        fs::write(&path, &old).unwrap();
        fs::write(&beside, &new[..1000]).unwrap();
        let daemon = pair.start_enabled(watcher);
        pair.settle(&daemon, &"the old version, and the beginning of the new one");
        let shipped = daemon.counters().bytes_shipped;
        File::options().append(true).open(&beside).unwrap().write_all(&new[1000..]).unwrap();
        fs::rename(&beside, &path).unwrap();
        let start = Instant::now();
        loop {
            let found = fs::read(pair.replica().join("file")).unwrap();
            if found == new {
                break;
            }
            assert!(found == old, "{} bytes of neither version ({watcher})", found.len());
            assert!(start.elapsed() < patience(), "the new version does not come");
            thread::sleep(Duration::from_millis(2));
        }
        pair.settle(&daemon, &"the new version");
        let shipped = daemon.counters().bytes_shipped - shipped;
        assert!(shipped < 2 << 20, "{shipped} bytes shipped ({watcher})");
    }
}

fn times(path: &Path) -> (i64, i64, i64, i64) {
    let stat = fs::metadata(path).unwrap();
    (stat.ctime(), stat.ctime_nsec(), stat.mtime(), stat.mtime_nsec())
}

/// Content that changes under the very times and size with which it was read:
/// a store into a page that is dirty already sets no time and raises no event.
/// (A write that is under way while it is read does the same to its reader.)
/// After a crash nothing differs but the content.
#[test]
fn trap_6_content_that_changed_under_the_times_it_was_read_with() {
    let pair = Pair::alone(Layout::Two(Ext4, Ext4));
    let daemon = pair.start_enabled("fanotify");
    let path = pair.source().join("file");
    let (held, took) = read_then_store(&path, &daemon);
    // Beyond two seconds the design promises nothing, and the machine was slow.
    assert!(took < Duration::from_millis(1900), "no verdict: replicated after {took:?}");
    daemon.kill();
    assert_ne!(fs::read(&path).unwrap(), fs::read(pair.replica().join("file")).unwrap());

    let daemon = pair.start("fanotify");
    pair.settle(&daemon, &"content is read again although nothing else differs");
    // Only now: unmapping raises an event.
    drop(held);
}

/// Writes, lets it be replicated, stores. Gives what must be kept until the end
/// and how long after the write it was read at most.
fn read_then_store(path: &Path, daemon: &Daemon) -> (Mapping, Duration) {
    fs::write(path, [b'a'; 4096]).unwrap();
    let file = File::options().read(true).write(true).open(path).unwrap();
    let descriptor: OwnedFd = file.try_clone().unwrap().into();
    let mapping = Mapping::new(&descriptor, 4096).unwrap();
    mapping.store(0, b"the page is dirty").unwrap();
    let start = Instant::now();
    file.write_all_at(b"written", 100).unwrap();
    daemon.wait(patience());
    let took = start.elapsed();
    let before = times(path);
    mapping.store(200, b"stored unseen").unwrap();
    assert_eq!(times(path), before, "the kernel set a time: this shows nothing");
    // Were they closed, an event would say so.
    std::mem::forget((file, descriptor));
    (mapping, took)
}

/// Differences beside what was set aside.
fn assert_same_but_for_lost_and_found(pair: &Pair, context: &str) {
    let mut found = compare::compare(pair.source(), pair.replica(), compare::Options::default());
    found.retain(|difference| {
        let path = &difference.path;
        // A new name in the root changes the root's time.
        !path.starts_with(b"efs-replication-lost+found-") && !path.is_empty()
    });
    assert!(found.is_empty(), "{context}:\n{}", compare::report(&found));
}

fn copy(from: &Path, to: &Path) {
    run(Command::new("cp").arg("-a").arg(from).arg(to));
}

/// One side's memory, set back to an earlier one.
fn set_back(pair: &Pair, older: &Path, side: &str) {
    fs::remove_dir_all(pair.state_dir().join(side)).unwrap();
    copy(&older.join(side), &pair.state_dir().join(side));
}

/// State directories are restored from a backup, the source is changed back
/// meanwhile to what the backup remembers: whatever the memories say, the
/// replica becomes the source.
fn sides_set_back(sides: &[&str]) {
    let pair = Pair::new(Layout::Two(Ext4, Ext4));
    let root = pair.source();
    fs::create_dir(root.join("directory")).unwrap();
    for name in ["changed-back", "changed", "removed", "moved", "directory/stays"] {
        fs::write(root.join(name), format!("first {name}")).unwrap();
    }
    fs::write(root.join("large"), vec![7; 3 << 20]).unwrap();
    let daemon = pair.start_enabled("fanotify");
    pair.settle(&daemon, &"first");
    assert!(daemon.interrupt().success());
    let backup = Scratch::new("backup");
    let older = backup.path().join("state");
    copy(&pair.state_dir(), &older);

    let daemon = pair.start_enabled("fanotify");
    for name in ["changed-back", "changed", "new"] {
        fs::write(root.join(name), format!("second {name}")).unwrap();
        daemon.wait(patience());
    }
    fs::remove_file(root.join("removed")).unwrap();
    fs::rename(root.join("moved"), root.join("directory/moved")).unwrap();
    pair.settle(&daemon, &"second");
    let shipped = daemon.counters().bytes_shipped;
    assert!(daemon.interrupt().success());

    sides.iter().for_each(|side| set_back(&pair, &older, side));
    fs::write(root.join("changed-back"), "first changed-back").unwrap();
    let daemon = pair.start_enabled("fanotify");
    daemon.wait(patience());
    assert_same_but_for_lost_and_found(&pair, &format!("{sides:?} set back"));
    let again = daemon.counters().bytes_shipped;
    let again = again.checked_sub(shipped).unwrap_or(again);
    assert!(again < 1 << 20, "{again} bytes: what is the same travels again");
}

#[test]
fn trap_14_the_source_is_set_back() {
    sides_set_back(&["source"]);
}

#[test]
fn trap_14_the_destination_is_set_back() {
    sides_set_back(&["destination"]);
}

#[test]
fn trap_14_both_sides_are_set_back_and_agree() {
    sides_set_back(&["source", "destination"]);
}

/// The replica's file system is set back to a snapshot, and both memories are
/// ahead of it. Nothing runs.
fn replica_set_back() -> Pair {
    let pair = Pair::new(Layout::Two(Ext4, Xfs));
    let root = pair.source();
    fs::write(root.join("changed"), "first").unwrap();
    fs::write(root.join("large"), vec![7; 3 << 20]).unwrap();
    let daemon = pair.start_enabled("fanotify");
    pair.settle(&daemon, &"first");
    assert!(daemon.interrupt().success());
    let mount = &pair.mounts()[1];
    let snapshot = mount.image().with_extension("snapshot");
    mount.detach();
    copy(&mount.image(), &snapshot);
    mount.attach();

    let daemon = pair.start_enabled("fanotify");
    fs::write(root.join("changed"), "second").unwrap();
    fs::write(root.join("new"), "second").unwrap();
    pair.settle(&daemon, &"second");
    // Until the batch's steps are forgotten: redoing them would tell too.
    thread::sleep(Duration::from_secs(4));
    assert!(daemon.interrupt().success());
    mount.detach();
    fs::rename(&snapshot, mount.image()).unwrap();
    mount.attach();
    assert_eq!(fs::read_to_string(pair.replica().join("changed")).unwrap(), "first");
    pair
}

#[test]
fn trap_14_the_replica_is_set_back() {
    let pair = replica_set_back();
    let daemon = pair.start_enabled("fanotify");
    daemon.wait(patience());
    assert_same_but_for_lost_and_found(&pair, "the replica set back");
}

/// The same, and the source is lost as well: what had been claimed is not there
/// any more, and nobody may be told that it is.
#[test]
fn trap_14_the_replica_is_set_back_and_claims_nothing() {
    let pair = replica_set_back();
    let state = pair.state_dir();
    let ended = replicator([Path::new("failover"), Path::new("--state-dir"), &state]).success();
    assert!(ended.json()["LastReplicated"].is_null(), "{ended:#?}");
    assert_eq!(fs::read_to_string(pair.replica().join("changed")).unwrap(), "first");
    fs::write(pair.replica().join("writable"), "yes").unwrap();
}

/// On one file system, what we write ourselves raises events too: the applier's
/// in the replica, the stores' in the state directory. They are not the
/// source's: nothing of it travels, and no batch but heartbeats follows. (Else
/// each batch, which is noted in a store, would cause the next.)
#[test]
fn trap_18_what_we_write_ourselves_does_not_come_back() {
    let pair = Pair::new(Layout::Same(Ext4));
    for number in 0..50 {
        fs::write(pair.source().join(format!("file-{number}")), "content").unwrap();
    }
    let port = free_port();
    let mut command = Command::new(binary::replicator());
    command.arg("run").arg(pair.source()).arg(pair.replica());
    command.arg("--state-dir").arg(pair.outside().join("state"));
    command.args(["--api", &format!("127.0.0.1:{port}"), "--watcher", "fanotify"]);
    let logs = Scratch::new("own-writes");
    let endpoint = format!("http://127.0.0.1:{port}");
    let mut daemon = Daemon::spawn(command, &endpoint, &logs.path().join("log"));
    daemon.wait_ready();
    daemon.wait_enabled(patience());
    fs::write(pair.source().join("large"), vec![1; 3 << 20]).unwrap();
    pair.settle(&daemon, &"one more");
    // The last batch's own events have come by then.
    thread::sleep(Duration::from_millis(1500));
    let before = daemon.counters();
    thread::sleep(Duration::from_secs(4));
    let after = daemon.counters();
    let shipped = |counters: &Counters| (counters.objects_shipped, counters.bytes_shipped);
    assert_eq!(shipped(&after), shipped(&before), "with nobody changing anything");
    let batches = after.batches - before.batches;
    assert!(batches <= 6, "{batches} batches in four seconds of silence: one causes the next");
}
