//! A link on which a large file takes long: what is small does not queue behind
//! it, the watermark waits for it and says so, and what of it had arrived when
//! the source died is in lost+found.

use std::fs;
use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant};

use replicator_common::status::Status;
use replicator_common::time::Timestamp;
use replicator_tests::hosts::{Hosts, Side};
use replicator_tests::workload::content;

/// A file of this size takes a quarter of a minute at [`RATE`].
const LARGE: usize = 24 << 20;
const RATE: &str = "12mbit";

/// Writes the large file and waits until it is on its way. Gives the moment
/// after it was closed.
fn large_file_under_way(hosts: &Hosts) -> Timestamp {
    hosts.slow_cable(RATE);
    hosts.arrives("large", &content::incompressible(1, LARGE));
    let closed = Timestamp::now();
    thread::sleep(Duration::from_secs(2));
    closed
}

fn claimed(status: &Status) -> Option<Timestamp> {
    status.destination.as_ref()?.last_replicated
}

#[test]
fn small_files_do_not_queue_behind_a_large_one() {
    let hosts = Hosts::enrolled();
    let closed = large_file_under_way(&hosts);
    let start = Instant::now();
    fs::write(hosts.source().join("small"), "small").unwrap();
    let small = hosts.replica().join("small");
    while fs::read_to_string(&small).ok().as_deref() != Some("small") {
        assert!(start.elapsed() < Duration::from_secs(5), "a small file queued behind a large one");
        thread::sleep(Duration::from_millis(20));
    }
    assert!(!hosts.replica().join("large").exists(), "the large file is not whole yet");
    let status = hosts.daemon(Side::Source).status();
    assert!(claimed(&status).is_none_or(|claim| claim <= closed), "a claim beyond what is there");
    let blockers = &status.source.unwrap().blocked_by;
    let named = blockers.iter().find(|blocker| blocker.path.as_deref() == Some("large"));
    let left = named.and_then(|blocker| blocker.bytes_left);
    let within = left.is_some_and(|left| (1..=LARGE as u64).contains(&left));
    assert!(within, "the large file with the bytes left is not named: {blockers:?}");
    hosts.settle(&"all of it in the end");
}

/// The large file's name moves to another object while its content travels.
#[test]
fn trap_10_a_large_file_that_is_renamed_over_on_its_way() {
    let hosts = Hosts::enrolled();
    large_file_under_way(&hosts);
    fs::write(hosts.source().join("other"), "other").unwrap();
    fs::rename(hosts.source().join("large"), hosts.source().join("directory/large")).unwrap();
    fs::rename(hosts.source().join("other"), hosts.source().join("large")).unwrap();
    thread::sleep(Duration::from_millis(500));
    fs::remove_file(hosts.source().join("directory/large")).unwrap();
    hosts.settle(&"renamed, replaced, removed");
}

#[test]
fn what_had_arrived_of_a_large_file_is_in_lost_and_found() {
    let mut hosts = Hosts::enrolled();
    large_file_under_way(&hosts);
    hosts.kill(Side::Source);
    let failover = ["failover", "--deletion-mode", "LOCAL_CONFIGURATION_ONLY"];
    let report = hosts.on(Side::Destination, &failover).success();
    let report = report.json();
    let name = report["LostAndFound"].as_str().unwrap_or_else(|| panic!("nothing kept: {report}"));
    assert!(name.starts_with("efs-replication-lost+found-"), "{report}");
    let directory = hosts.replica().join(name);
    let manifest = fs::read_to_string(directory.join("manifest.json")).unwrap();
    assert!(manifest.contains("large"), "the manifest says what it was to become: {manifest}");
    let kept: Vec<PathBuf> =
        fs::read_dir(&directory).unwrap().map(|entry| entry.unwrap().path()).collect();
    let bytes = |path: &PathBuf| fs::metadata(path).map_or(0, |stat| stat.len());
    assert!(kept.iter().any(|path| bytes(path) > 500_000), "only {kept:?}: {manifest}");
    // What was replicated before is as it was, and the partial file is not in
    // its place.
    assert_eq!(fs::read_to_string(hosts.replica().join("directory/file")).unwrap(), "content");
    assert!(!hosts.replica().join("large").exists());
}
