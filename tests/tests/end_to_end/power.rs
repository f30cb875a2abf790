//! Trap 7: a flush that is no flush. `kill -9` cannot tell the difference; what
//! can is a look at the calls, and an image of the disk at a random moment.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use replicator_common::time::Timestamp;
use replicator_tests::binary;
use replicator_tests::compare;
use replicator_tests::disk::Disk;
use replicator_tests::mounts::FileSystem::{self, Ext4, Tmpfs, Xfs};
use replicator_tests::mounts::{Mount, Scratch};
use replicator_tests::process::{Daemon, free_port, replicator};
use replicator_tests::scenario::{Layout, Pair, patience};
use replicator_tests::serial;
use replicator_tests::stamps::{Stamper, steadily, version_of};
use replicator_tests::trace::{self, Call};

/// Files written one by one and waited for: so many batches are looked at.
const BATCHES: u32 = 5;

/// A program under strace.
fn start_traced(pair: &Pair, output: &Path) -> Daemon {
    let port = free_port();
    let command = trace::traced(&pair.command(port, &["--watcher", "fanotify"]), output);
    let log = output.with_extension("log");
    let mut daemon = Daemon::spawn(command, &format!("http://127.0.0.1:{port}"), &log);
    daemon.wait_ready();
    daemon.wait_enabled(patience());
    daemon
}

/// The calls of `name` on files for which `on` holds, within a stretch of time.
fn within<'a>(
    calls: &'a [Call],
    name: &'a str,
    (from, to): (Timestamp, Timestamp),
    on: impl Fn(&Path) -> bool + 'a,
) -> impl Iterator<Item = &'a Call> {
    let calls = calls.iter().filter(move |call| call.name == name && on(&call.path));
    calls.filter(move |call| call.begin >= from && call.end <= to)
}

/// Before a batch is acknowledged: the index's delta is on disk, then the
/// replica's file system is synced, then the commit record is on disk.
#[test]
fn trap_7_what_is_acknowledged_was_flushed_by_calls_that_flush() {
    let pair = Pair::alone(Layout::Two(Ext4, Ext4));
    let scratch = Scratch::new("trace");
    let output = scratch.path().join("strace");
    let daemon = start_traced(&pair, &output);
    let mut batches = Vec::new();
    for number in 0..BATCHES {
        // Neither the sync that tidies up after a batch nor a heartbeat is to
        // be taken for part of the next.
        thread::sleep(Duration::from_millis(2500));
        let from = Timestamp::now();
        fs::write(pair.source().join(format!("file-{number}")), "content").unwrap();
        daemon.wait(patience());
        assert!(pair.replica().join(format!("file-{number}")).exists());
        batches.push((from, Timestamp::now()));
    }
    thread::sleep(Duration::from_millis(500));
    assert!(daemon.interrupt().success());

    let calls = trace::calls(&output);
    let ends = |end: &'static str| move |path: &Path| path.ends_with(end);
    // The applier's private clone of the mount is attached nowhere: its root is
    // all the path that it has. That it is the replica's, the images show.
    let clone = |path: &Path| path == Path::new("/");
    // Small state files: their content before their name, their name at once.
    let (start, all) = (Timestamp::NEVER, batches[0].0);
    for file in ["configuration.new", "config.new", "incarnation.new", "destination.new"] {
        let content = within(&calls, "fsync", (start, all), ends(file)).next();
        let content = content.unwrap_or_else(|| panic!("no fsync of {file}: {calls:#?}"));
        let parent = content.path.parent().unwrap();
        let named = within(&calls, "fsync", (content.end, all), |path| path == parent).next();
        assert!(named.is_some(), "no fsync of the directory of {file}: {calls:#?}");
    }
    for span in batches {
        let index = within(&calls, "fdatasync", span, ends("index.redb")).next();
        let index = index.unwrap_or_else(|| panic!("no sync of the index: {calls:#?}"));
        let after_index = (index.end, span.1);
        let sync = within(&calls, "syncfs", after_index, clone).next();
        let sync = sync.unwrap_or_else(|| panic!("no syncfs after {index:?}: {calls:#?}"));
        let after_sync = (sync.end, span.1);
        let commit = within(&calls, "fdatasync", after_sync, ends("store.redb")).next();
        assert!(commit.is_some(), "no sync of the commit log after {sync:?}: {calls:#?}");
        // The journal is flushed beside the batch, not before it.
        let soon = (span.0, Timestamp(span.1.0 + 500_000_000));
        let sled = |name| within(&calls, name, soon, ends("journal/db"));
        let flushed = sled("sync_file_range").next().expect("the journal is flushed").end;
        let kept = sled("fdatasync").any(|call| call.begin >= flushed);
        assert!(kept, "sled's flush does not reach the disk: {calls:#?}");
    }
}

/// Files of one generation, replaced one after the other by one writer: at each
/// instant the generations do not grow along the names, and differ by one at most.
const SET: u64 = 12;
/// Images of one file system.
const IMAGES: usize = 5;

/// An image of the disk, and what was claimed before it was taken.
struct Cut {
    image: PathBuf,
    claimed: Timestamp,
}

fn set_name(number: u64) -> String {
    format!("set/{number:02}")
}

/// Keeps writing: the set, files that are new, logs.
fn write_on(stamper: &Stamper, done: &AtomicBool) {
    let set = AtomicU64::new(0);
    while !done.load(Ordering::Relaxed) {
        steadily(250.0, Duration::from_secs(1), |number| {
            let turn = set.fetch_add(1, Ordering::Relaxed);
            stamper.write(&set_name(turn % SET), turn / SET + 1).unwrap();
            if number % 3 == 0 {
                stamper.write(&format!("new-{}/file-{turn}", turn % 50), 1).unwrap();
            }
            if number % 10 == 0 {
                stamper.write("a.log", turn / 10 + 1).unwrap_or_default();
            }
        });
    }
}

fn start(source: &Path, disk: &Disk, log: &Path) -> Daemon {
    let port = free_port();
    let mut command = Command::new(binary::replicator());
    command.arg("run").arg(source).arg(disk.path().join("replica"));
    command.arg("--state-dir").arg(disk.path().join("state"));
    command.args(["--api", &format!("127.0.0.1:{port}"), "--watcher", "fanotify"]);
    let mut daemon = Daemon::spawn(command, &format!("http://127.0.0.1:{port}"), log);
    daemon.wait_ready();
    daemon
}

fn cut(daemon: &Daemon, disk: &Disk, number: usize) -> Cut {
    let claimed = daemon.status().destination.unwrap().last_replicated.expect("a claim");
    Cut { image: disk.image_of_now(number), claimed }
}

/// Takes images at random moments under load.
fn cuts(daemon: &Daemon, disk: &Disk, stamper: &Stamper, seed: u64) -> Vec<Cut> {
    let (done, cuts) = (AtomicBool::new(false), Mutex::new(Vec::new()));
    thread::scope(|scope| {
        scope.spawn(|| write_on(stamper, &done));
        for number in 0..IMAGES {
            let pause = 400 + (seed.rotate_left(number as u32 * 13) & 0x3ff);
            thread::sleep(Duration::from_millis(pause));
            cuts.lock().unwrap().push(cut(daemon, disk, number));
        }
        done.store(true, Ordering::Relaxed);
    });
    // And one when all is quiet: claims are made by heartbeats alone.
    thread::sleep(Duration::from_millis(2500));
    cuts.lock().unwrap().push(cut(daemon, disk, IMAGES));
    cuts.into_inner().unwrap()
}

/// A file system of a kind, on a disk that loses things as a seed decides.
type MakeDisk = fn(FileSystem, u64) -> Disk;

/// A disk that has written what it was told to write.
const WITHOUT_CACHE: MakeDisk = |kind, _| Disk::new(kind);
/// A disk that loses any part of what it was not told to flush.
const WITH_CACHE: MakeDisk = Disk::with_cache;

fn power_cuts(kind: FileSystem, make: MakeDisk) {
    let seed = std::env::var("REPLICATOR_SEED").ok().and_then(|text| text.parse().ok());
    let seed: u64 = seed.unwrap_or_else(|| Timestamp::now().0 as u64);
    println!("REPLICATOR_SEED={seed}");
    let _share = serial::share();
    let (source, disk, logs) = (Mount::new(Tmpfs), make(kind, seed), Scratch::new("power"));
    let root = source.path().join("source");
    fs::create_dir_all(root.join("set")).unwrap();
    fs::create_dir(disk.path().join("replica")).unwrap();
    let stamper = Stamper::new(&root);
    let mut daemon = start(&root, &disk, &logs.path().join("log"));
    daemon.wait_enabled(patience());
    let cuts = cuts(&daemon, &disk, &stamper, seed);
    daemon.kill();
    let mut exact = 0;
    for (number, cut) in cuts.iter().enumerate() {
        disk.cut_back_to(&cut.image);
        exact += u32::from(fail_over(&disk, &stamper, cut, number));
    }
    println!("{kind:?}: {exact} of {} handed over as of one instant", cuts.len());
    go_on(&root, &disk, &cuts[IMAGES / 2], &logs.path().join("again"));
}

/// Fails over what the power cut left, and holds it against what was claimed.
/// Says whether the replica was of one instant.
fn fail_over(disk: &Disk, stamper: &Stamper, cut: &Cut, number: usize) -> bool {
    let state = disk.path().join("state");
    let ended = replicator([Path::new("failover"), Path::new("--state-dir"), &state]).success();
    let replica = disk.path().join("replica");
    let report = ended.json();
    let broken = stamper.broken_claims(&replica, cut.claimed);
    let all = format!("image {number}, {} was claimed, {report}", cut.claimed);
    assert!(broken.is_empty(), "{all}:\n{}", broken.join("\n"));
    fs::write(replica.join("writable"), "yes").unwrap();
    // What the report itself claims is no less true.
    let moment = |name: &str| serde_json::from_value::<Timestamp>(report[name].clone()).ok();
    let (replicated, consistent) = (moment("LastReplicated"), moment("LastConsistent"));
    assert!(replicated >= Some(cut.claimed), "the watermark moved back: {all}");
    let exact = replicated == consistent;
    if exact {
        let generations: Vec<_> =
            (0..SET).map(|number| version_of(&replica, &set_name(number)).unwrap_or(0)).collect();
        let ordered = generations.is_sorted_by(|a, b| a >= b);
        let close = generations[0] <= generations[SET as usize - 1] + 1;
        assert!(ordered && close, "of no instant: {generations:?}, {all}");
    }
    exact
}

/// The machine is back and replication goes on, with the state that the cut left.
fn go_on(source: &Path, disk: &Disk, cut: &Cut, log: &Path) {
    disk.cut_back_to(&cut.image);
    let daemon = start(source, disk, log);
    daemon.wait(patience());
    compare::assert_same(source, &disk.path().join("replica"), &"after the power came back");
    assert!(daemon.interrupt().success());
}

#[test]
fn trap_7_power_cuts_ext4() {
    power_cuts(Ext4, WITHOUT_CACHE);
}

#[test]
fn trap_7_power_cuts_xfs() {
    power_cuts(Xfs, WITHOUT_CACHE);
}

#[test]
fn trap_7_power_cuts_that_lose_what_was_not_flushed_ext4() {
    power_cuts(Ext4, WITH_CACHE);
}

#[test]
fn trap_7_power_cuts_that_lose_what_was_not_flushed_xfs() {
    power_cuts(Xfs, WITH_CACHE);
}
