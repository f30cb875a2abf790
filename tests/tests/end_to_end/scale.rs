//! State of a size that breaks what is quadratic or keeps everything in memory:
//! a directory of very many files, very many hard links, a backlog of very many
//! records; both ends in one process, under a limit of memory that the kernel
//! keeps.
//!
//! `REPLICATOR_SCALE` is the number of objects (1,000,000 by `just scale`); a
//! quadratic step at that size does not end within the patience of the tests.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use replicator_tests::cgroup::{MemoryLimit, peak_memory};
use replicator_tests::compare;
use replicator_tests::mounts::FileSystem::{Ext4, Xfs};
use replicator_tests::process::Daemon;
use replicator_tests::scenario::{Layout, Pair};
use replicator_tests::workload::raw;

/// What both ends together may take at any size, page cache excepted, bytes:
/// ARCHITECTURE, "Memory".
const BOUND: u64 = 384 << 20;

fn objects() -> u64 {
    let given = std::env::var("REPLICATOR_SCALE").ok();
    given.map_or(10_000, |text| text.parse().expect("REPLICATOR_SCALE is a number"))
}

/// Three milliseconds an object and step is some ten times what is normal on a
/// machine that does other things too; the limit of memory, which the page cache
/// counts for, has the stores read from the disk again and again.
fn limit() -> Duration {
    Duration::from_secs(120) + 3 * Duration::from_millis(objects())
}

/// A pair with room for the objects: ext4 has an inode for 16 KiB.
fn pair(layout: Layout) -> Pair {
    Pair::sized(layout, (2 << 30) + objects() * 2 * 16384)
}

/// A stretch of a test, for the figures that it prints.
struct Phase {
    what: &'static str,
    began: Instant,
    /// What the daemon had used of a processor before.
    used: Duration,
}

impl Phase {
    fn new(what: &'static str, daemon: Option<&Daemon>) -> Self {
        let used = daemon.map_or(Duration::ZERO, Daemon::processor_time);
        Self { what, began: Instant::now(), used }
    }

    /// Waits until all is replicated, says what it took, and compares.
    fn settle(self, daemon: &Daemon, pair: &Pair, memory: &MemoryLimit) {
        let what = self.what;
        if let Err(error) = daemon.try_wait(limit()) {
            panic!("{what}: {error}; {} killed by the limit", memory.kills());
        }
        let (time, used) = (self.began.elapsed(), daemon.processor_time() - self.used);
        let peak = peak_memory(daemon.id()) >> 20;
        let disk = sizes(&pair.state_dir());
        eprintln!("{what}: {time:.1?}, CPU {used:.1?}, peak memory {peak} MiB; on disk {disk}");
        compare::assert_same(pair.source(), pair.replica(), &what);
    }
}

/// The files of a state directory that have a size to speak of, and theirs.
fn sizes(state: &Path) -> String {
    let mut found = Vec::new();
    let mut directories = vec![state.to_owned()];
    while let Some(directory) = directories.pop() {
        for entry in fs::read_dir(&directory).into_iter().flatten().flatten() {
            // What is gone meanwhile has no size.
            let Ok(metadata) = entry.metadata() else { continue };
            if metadata.is_dir() {
                directories.push(entry.path());
            } else if metadata.blocks() >= 2048 {
                let path = entry.path();
                let name = path.strip_prefix(state).unwrap_or(&path).display().to_string();
                found.push(format!("{name} {} MiB", metadata.blocks() >> 11));
            }
        }
    }
    found.sort();
    found.join(", ")
}

/// Starts; the phase lasts until `settle`.
fn start(pair: &Pair, memory: &MemoryLimit, what: &'static str) -> (Daemon, Phase) {
    let phase = Phase::new(what, None);
    let mut daemon = pair.start_within(memory, &[]);
    daemon.wait_enabled(limit());
    (daemon, phase)
}

fn file(directory: &Path, number: u64) -> PathBuf {
    directory.join(format!("file-{number:07}"))
}

/// All in one directory: made, found again after a restart, moved as a whole,
/// removed.
fn one_directory(layout: Layout) {
    let (pair, memory) = (pair(layout), MemoryLimit::new(BOUND));
    let directory = pair.source().join("directory");
    fs::create_dir(&directory).unwrap();
    for number in 0..objects() {
        fs::write(file(&directory, number), number.to_le_bytes()).unwrap();
    }
    let (daemon, phase) = start(&pair, &memory, "the initial sync");
    phase.settle(&daemon, &pair, &memory);
    daemon.kill();
    let (daemon, phase) = start(&pair, &memory, "the rescan after a restart");
    phase.settle(&daemon, &pair, &memory);
    let shipped = daemon.counters().bytes_shipped;
    let phase = Phase::new("the directory's new name", Some(&daemon));
    fs::rename(&directory, pair.source().join("renamed")).unwrap();
    phase.settle(&daemon, &pair, &memory);
    assert_eq!(daemon.counters().bytes_shipped, shipped, "a new name ships no content");
    let phase = Phase::new("removed", Some(&daemon));
    fs::remove_dir_all(pair.source().join("renamed")).unwrap();
    phase.settle(&daemon, &pair, &memory);
}

#[test]
fn a_directory_of_very_many_files_ext4() {
    one_directory(Layout::Two(Ext4, Ext4));
}

#[test]
fn a_directory_of_very_many_files_xfs() {
    one_directory(Layout::Two(Xfs, Xfs));
}

/// Files with two names each, in two directories of the same names.
#[test]
fn very_many_groups_of_hard_links() {
    let (pair, memory) = (pair(Layout::Two(Ext4, Ext4)), MemoryLimit::new(BOUND));
    let [left, right] = ["left", "right"].map(|name| pair.source().join(name));
    for directory in [&left, &right] {
        fs::create_dir(directory).unwrap();
    }
    for number in 0..objects() {
        fs::write(file(&left, number), number.to_le_bytes()).unwrap();
        fs::hard_link(file(&left, number), file(&right, number)).unwrap();
    }
    let (daemon, phase) = start(&pair, &memory, "the initial sync");
    phase.settle(&daemon, &pair, &memory);
    let phase = Phase::new("changes through the other names", Some(&daemon));
    for number in (0..objects()).step_by(10) {
        fs::write(file(&right, number), "changed through the other name").unwrap();
        fs::remove_file(file(&left, number)).unwrap();
    }
    phase.settle(&daemon, &pair, &memory);
    daemon.kill();
    let (daemon, phase) = start(&pair, &memory, "the rescan after a restart");
    phase.settle(&daemon, &pair, &memory);
}

/// Ten changes of each object while nothing is shipped: ten times as many
/// records, on disk.
#[test]
fn a_backlog_of_very_many_records() {
    let (pair, memory) = (pair(Layout::Two(Ext4, Ext4)), MemoryLimit::new(BOUND));
    let files = (0..objects()).map(|number| {
        let directory = pair.source().join(format!("directory-{}", number % 100));
        (directory.clone(), file(&directory, number))
    });
    let files: Vec<_> = files.collect();
    for (directory, path) in &files {
        fs::create_dir_all(directory).unwrap();
        fs::write(path, "x").unwrap();
    }
    let (daemon, phase) = start(&pair, &memory, "the initial sync");
    phase.settle(&daemon, &pair, &memory);
    daemon.request("POST", "/replicator/v1/pause", None).unwrap();
    let phase = Phase::new("the backlog is made", Some(&daemon));
    for round in 0..10 {
        for (_, path) in &files {
            let mode = fs::Permissions::from_mode(0o600 + round);
            fs::set_permissions(path, mode).unwrap();
        }
    }
    let (time, used) = (phase.began.elapsed(), daemon.processor_time() - phase.used);
    let backlog = daemon.status().source.unwrap().backlog_records;
    let (peak, disk) = (peak_memory(daemon.id()) >> 20, sizes(&pair.state_dir()));
    eprintln!("{backlog} records: {time:.1?}, CPU {used:.1?}, peak memory {peak} MiB; {disk}");
    let phase = Phase::new("the backlog", Some(&daemon));
    daemon.request("POST", "/replicator/v1/resume", None).unwrap();
    phase.settle(&daemon, &pair, &memory);
}

/// Gone as a whole, with more than a batch may hold: moved out, back again, and
/// deleted while nothing watches.
#[test]
fn a_tree_that_leaves() {
    let (pair, memory) = (pair(Layout::Two(Ext4, Xfs)), MemoryLimit::new(BOUND));
    let (tree, outside) = (pair.source().join("tree"), pair.outside().join("tree"));
    for number in 0..2 * objects() {
        let directory = tree.join(format!("directory-{}", number % 100));
        fs::create_dir_all(&directory).unwrap();
        fs::write(file(&directory, number), number.to_le_bytes()).unwrap();
    }
    let (daemon, phase) = start(&pair, &memory, "the initial sync");
    phase.settle(&daemon, &pair, &memory);
    let phase = Phase::new("moved out", Some(&daemon));
    fs::rename(&tree, &outside).unwrap();
    phase.settle(&daemon, &pair, &memory);
    // Most of it is still to be dropped.
    let phase = Phase::new("moved back", Some(&daemon));
    fs::write(file(&outside.join("directory-7"), 7), "changed outside").unwrap();
    fs::rename(&outside, &tree).unwrap();
    phase.settle(&daemon, &pair, &memory);
    daemon.kill();
    fs::remove_dir_all(&tree).unwrap();
    let (mut daemon, phase) = start(&pair, &memory, "deleted while nothing watched");
    phase.settle(&daemon, &pair, &memory);
    daemon.poll_until(limit(), "all of it is dropped", |daemon| {
        let destination = daemon.status().destination?;
        (destination.orphans == 0 && destination.objects < 200).then_some(())
    });
}

/// Directories in each other: no step takes time or memory by the length of
/// paths.
#[test]
fn a_tree_of_thousands_of_levels() {
    let (pair, memory) = (Pair::new(Layout::Two(Ext4, Xfs)), MemoryLimit::new(BOUND));
    raw::deep_file(pair.source(), 2000, 1, b"at the bottom");
    let (daemon, phase) = start(&pair, &memory, "the initial sync");
    phase.settle(&daemon, &pair, &memory);
    daemon.kill();
    let (daemon, phase) = start(&pair, &memory, "the rescan after a restart");
    phase.settle(&daemon, &pair, &memory);
}
