//! A random workload on real file systems, with each watcher, on one file
//! system and on two; and the replica must equal the source.

use std::fs::File;
use std::io::Write;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use replicator_tests::compare;
use replicator_tests::mounts::FileSystem::{Btrfs, Ext4, Tmpfs, Xfs};
use replicator_tests::process::Daemon;
use replicator_tests::scenario::{self, Layout, Pair, patience};
use replicator_tests::workload::{Workload, content};

/// First what stands on the source before replication begins, then changes
/// while the initial sync runs, then changes while it is ENABLED.
fn continuous(layout: Layout, watcher: &str) {
    let pair = Pair::new(layout);
    let workload = Workload { steps: 300, ..scenario::workload_for(watcher) };
    workload.run(pair.source(), pair.outside());

    let mut daemon = pair.start(watcher);
    let workload = Workload { steps: 500, ..next(workload) };
    workload.run(pair.source(), pair.outside());
    pair.settle(&daemon, &format!("initial sync, {workload}"));
    daemon.wait_enabled(patience());

    let workload = next(workload);
    let report = workload.run(pair.source(), pair.outside());
    pair.settle(&daemon, &format!("continuous, {workload}"));
    assert!(report.done() > 500, "too little was done: {report:#?}");
    check_status(&daemon, watcher);
    let status = daemon.interrupt();
    assert!(status.success(), "a clean stop is no failure: {status}");
}

fn next(workload: Workload) -> Workload {
    Workload { seed: workload.seed.wrapping_add(1), ..workload }
}

/// What status must say after a run in which nothing went wrong.
fn check_status(daemon: &Daemon, watcher: &str) {
    let status = daemon.status();
    let (source, destination) = (status.source.unwrap(), status.destination.unwrap());
    assert_eq!(source.watcher.kind.as_str(), watcher);
    assert!(!source.watcher.reason.is_empty(), "the choice has a reason");
    assert_eq!(destination.shortfalls, Default::default(), "root on these can hold everything");
    assert_eq!(source.skipped.unreadable, []);
    assert!(destination.orphans == 0, "nothing is being moved: {destination:#?}");
    assert!(source.counters.bytes_shipped > 0 && source.counters.batches > 0);
}

macro_rules! continuous {
    ($($(#[$attribute:meta])* $name:ident: $layout:expr, $watcher:literal;)*) => {
        $(#[test] $(#[$attribute])* fn $name() { continuous($layout, $watcher); })*
    };
}

continuous! {
    ext4_to_ext4_fanotify: Layout::Two(Ext4, Ext4), "fanotify";
    ext4_to_xfs_inotify: Layout::Two(Ext4, Xfs), "inotify";
    ext4_to_btrfs_scan: Layout::Two(Ext4, Btrfs), "scan";
    xfs_to_ext4_fanotify: Layout::Two(Xfs, Ext4), "fanotify";
    xfs_to_xfs_inotify: Layout::Two(Xfs, Xfs), "inotify";
    xfs_to_tmpfs_scan: Layout::Two(Xfs, Tmpfs), "scan";
    btrfs_to_xfs_fanotify: Layout::Two(Btrfs, Xfs), "fanotify";
    btrfs_to_ext4_inotify: Layout::Two(Btrfs, Ext4), "inotify";
    btrfs_to_btrfs_scan: Layout::Two(Btrfs, Btrfs), "scan";
    tmpfs_to_ext4_fanotify: Layout::Two(Tmpfs, Ext4), "fanotify";
    tmpfs_to_tmpfs_inotify: Layout::Two(Tmpfs, Tmpfs), "inotify";
    tmpfs_to_btrfs_scan: Layout::Two(Tmpfs, Btrfs), "scan";
    one_ext4_fanotify: Layout::Same(Ext4), "fanotify";
    one_ext4_scan: Layout::Same(Ext4), "scan";
    one_xfs_fanotify: Layout::Same(Xfs), "fanotify";
    one_btrfs_fanotify: Layout::Same(Btrfs), "fanotify";
    one_btrfs_inotify: Layout::Same(Btrfs), "inotify";
    one_tmpfs_fanotify: Layout::Same(Tmpfs), "fanotify";
}

/// Stops again and again while the source changes, by `stop`; each time the
/// same command goes on, and in the end nothing is missing.
fn stopped_in_the_middle(watcher: &str, stop: fn(Daemon)) {
    let pair = Pair::new(Layout::Two(Ext4, Ext4));
    let workload = Workload { steps: 750, rate: Some(800.0), ..scenario::workload_for(watcher) };
    thread::scope(|scope| {
        let running = scope.spawn(|| workload.run(pair.source(), pair.outside()));
        for pause in [400, 1500, 100, 2500, 900] {
            let daemon = pair.start(watcher);
            thread::sleep(Duration::from_millis(pause));
            stop(daemon);
        }
        running.join().unwrap();
    });
    let daemon = pair.start(watcher);
    pair.settle(&daemon, &workload);
}

#[test]
fn interrupted_in_the_middle_fanotify() {
    stopped_in_the_middle("fanotify", |daemon| assert!(daemon.interrupt().success()));
}

#[test]
fn interrupted_in_the_middle_inotify() {
    stopped_in_the_middle("inotify", |daemon| assert!(daemon.interrupt().success()));
}

#[test]
fn killed_in_the_middle_fanotify() {
    stopped_in_the_middle("fanotify", Daemon::kill);
}

#[test]
fn killed_in_the_middle_inotify() {
    stopped_in_the_middle("inotify", Daemon::kill);
}

#[test]
fn killed_in_the_middle_scan() {
    stopped_in_the_middle("scan", Daemon::kill);
}

/// What a queue that is too small loses, a rescan finds.
#[test]
fn an_overflow_is_a_gap_that_a_rescan_closes() {
    let pair = Pair::new(Layout::Two(Tmpfs, Tmpfs));
    let daemon = pair.start_enabled("inotify");
    let workload = scenario::workload_for("inotify");
    workload.run(pair.source(), pair.outside());
    // More events than fs.fanotify.max_queued_events (16,384), two a round,
    // while the reader cannot read.
    let stopped = StoppedProcess::new(&daemon);
    for number in 0..12_000 {
        let path = pair.source().join(format!("overflow-{}", number % 500));
        std::fs::write(&path, format!("{number}")).unwrap();
        std::fs::rename(&path, path.with_extension("moved")).unwrap();
    }
    drop(stopped);
    daemon.wait(patience());
    compare::assert_same(pair.source(), pair.replica(), &workload);
    let counters = daemon.counters();
    assert!(counters.gaps > 0 && counters.rescans > 0, "no overflow was met: {counters:?}");
}

/// A walk begins while directories are made, and the batch with which it begins finds
/// some of them itself, before: they keep their watches.
#[test]
fn directories_that_are_made_while_a_walk_begins_stay_watched() {
    let pair = Pair::new(Layout::Two(Tmpfs, Tmpfs));
    let made = AtomicU64::new(0);
    let directory = |number: u64| pair.source().join(number.to_string());
    for _ in 0..3 {
        let (over, start) = (AtomicBool::new(false), Instant::now());
        let daemon = thread::scope(|scope| {
            scope.spawn(|| {
                while !over.load(Ordering::Relaxed) && start.elapsed() < patience() {
                    std::fs::create_dir(directory(made.load(Ordering::Relaxed))).unwrap();
                    made.fetch_add(1, Ordering::Relaxed);
                    thread::sleep(Duration::from_millis(2));
                }
            });
            let mut daemon = pair.start("inotify");
            daemon.wait_enabled(patience());
            daemon.wait(patience());
            over.store(true, Ordering::Relaxed);
            daemon
        });
        pair.settle(&daemon, &"made");
        let made = made.load(Ordering::Relaxed);
        let watches = daemon.status().source.unwrap().watcher.watches;
        assert_eq!(watches, Some(made + 1), "each directory has one, and the root");
        for number in 0..made {
            std::fs::write(directory(number).join("file"), number.to_string()).unwrap();
        }
        pair.settle(&daemon, &"written");
        drop(daemon);
    }
}

/// Files that stand empty, or half written, for as long as the engine needs to
/// look at them: whatever it saw first, in the end it has what was written last.
#[test]
fn a_file_that_is_read_while_it_is_written() {
    for watcher in ["fanotify", "inotify"] {
        let pair = Pair::new(Layout::Two(Ext4, Ext4));
        let daemon = pair.start_enabled(watcher);
        for number in 0..400u64 {
            let path = pair.source().join(format!("file-{number}"));
            let mut file = File::create(path).unwrap();
            for part in 0..number % 3 + 1 {
                thread::sleep(Duration::from_micros(number * 7919 % 9000));
                file.write_all(&content::bytes(part, 4096)).unwrap();
            }
        }
        pair.settle(&daemon, &watcher);
    }
}

/// A process that does nothing until this is dropped.
struct StoppedProcess(rustix::process::Pid);

impl StoppedProcess {
    fn new(daemon: &Daemon) -> Self {
        let pid = rustix::process::Pid::from_raw(daemon.id() as i32).unwrap();
        rustix::process::kill_process(pid, rustix::process::Signal::STOP).unwrap();
        Self(pid)
    }
}

impl Drop for StoppedProcess {
    fn drop(&mut self) {
        let _ = rustix::process::kill_process(self.0, rustix::process::Signal::CONT);
    }
}
