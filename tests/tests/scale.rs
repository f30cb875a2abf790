//! State of a size that breaks what is quadratic or keeps everything in memory:
//! a directory of very many files, very many hard links, a backlog of very many
//! records; both ends in one process, under a limit of memory that the kernel
//! keeps.
//!
//! `REPLICATOR_SCALE` is the number of objects (1,000,000 by `just scale`); a
//! quadratic step at that size does not end within the patience of the tests.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

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

/// A millisecond an object and step is some ten times what is normal.
fn limit() -> Duration {
    Duration::from_secs(120) + Duration::from_millis(objects())
}

/// A pair with room for the objects: ext4 has an inode for 16 KiB.
fn pair(layout: Layout) -> Pair {
    Pair::sized(layout, (2 << 30) + objects() * 2 * 16384)
}

/// Waits until all is replicated.
fn settle(daemon: &Daemon, pair: &Pair, memory: &MemoryLimit, what: &str) {
    if let Err(error) = daemon.try_wait(limit()) {
        panic!("{what}: {error}; {} killed by the limit", memory.kills());
    }
    eprintln!("{what}: peak memory {} MiB", peak_memory(daemon.id()) >> 20);
    compare::assert_same(pair.source(), pair.replica(), &what);
}

fn start(pair: &Pair, memory: &MemoryLimit) -> Daemon {
    let mut daemon = pair.start_within(memory, &[]);
    daemon.wait_enabled(limit());
    daemon
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
    let daemon = start(&pair, &memory);
    settle(&daemon, &pair, &memory, "the initial sync");
    daemon.kill();
    let daemon = start(&pair, &memory);
    settle(&daemon, &pair, &memory, "the rescan after a restart");
    let shipped = daemon.counters().bytes_shipped;
    fs::rename(&directory, pair.source().join("renamed")).unwrap();
    settle(&daemon, &pair, &memory, "the directory's new name");
    assert_eq!(daemon.counters().bytes_shipped, shipped, "a new name ships no content");
    fs::remove_dir_all(pair.source().join("renamed")).unwrap();
    settle(&daemon, &pair, &memory, "removed");
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
    let daemon = start(&pair, &memory);
    settle(&daemon, &pair, &memory, "the initial sync");
    for number in (0..objects()).step_by(10) {
        fs::write(file(&right, number), "changed through the other name").unwrap();
        fs::remove_file(file(&left, number)).unwrap();
    }
    settle(&daemon, &pair, &memory, "changes through the other names");
    daemon.kill();
    let daemon = start(&pair, &memory);
    settle(&daemon, &pair, &memory, "the rescan after a restart");
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
    let daemon = start(&pair, &memory);
    settle(&daemon, &pair, &memory, "the initial sync");
    daemon.request("POST", "/replicator/v1/pause", None).unwrap();
    for round in 0..10 {
        for (_, path) in &files {
            let mode = fs::Permissions::from_mode(0o600 + round);
            fs::set_permissions(path, mode).unwrap();
        }
    }
    let backlog = daemon.status().source.unwrap().backlog_records;
    eprintln!("{backlog} records of backlog, {} MiB", peak_memory(daemon.id()) >> 20);
    daemon.request("POST", "/replicator/v1/resume", None).unwrap();
    settle(&daemon, &pair, &memory, "the backlog");
}

/// Directories in each other: no step takes time or memory by the length of
/// paths.
#[test]
fn a_tree_of_thousands_of_levels() {
    let (pair, memory) = (Pair::new(Layout::Two(Ext4, Xfs)), MemoryLimit::new(BOUND));
    raw::deep_file(pair.source(), 2000, 1, b"at the bottom");
    let daemon = start(&pair, &memory);
    settle(&daemon, &pair, &memory, "the initial sync");
    daemon.kill();
    let daemon = start(&pair, &memory);
    settle(&daemon, &pair, &memory, "the rescan after a restart");
}
