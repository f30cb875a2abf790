//! A long journal that is trimmed at once costs no memory: that is what happens
//! when a destination that was away for long has its first batch.

use replicator_common::id::{ObjectId, Seq};
use replicator_common::name::Name;
use replicator_src::journal::{Journal, Record};

const RECORDS: u64 = 200_000;
/// Some 70 MiB on an idle machine and 101 on one whose cores are taken, where what sled frees waits for
/// its threads; with ten times as large batches more than 200.
const GROWTH_MAX: u64 = 150 << 20;

/// The most memory that this process has had, bytes.
#[allow(clippy::unwrap_used)]
fn peak() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() << 10
}

#[test]
fn trimming_a_long_backlog_takes_little_memory() {
    let directory = tempfile::tempdir().unwrap();
    let journal = Journal::open(&directory.path().join("journal"), Seq(0)).unwrap();
    let record = |number: u64| Record::Entry {
        directory: ObjectId::new(1, &number.to_be_bytes()).unwrap(),
        name: Name::new(format!("file-{number:07}").as_bytes()).unwrap(),
    };
    for from in (0..RECORDS).step_by(2000) {
        let part: Vec<_> = (from..from + 2000).map(record).collect();
        journal.append(&part).unwrap();
    }
    journal.flush().unwrap();
    let before = peak();
    journal.trim(Seq(RECORDS)).unwrap();
    // The kernel counts resident pages per CPU and sums them roughly while they are few: its peak can
    // read some pages lower than it did before.
    let growth = peak().saturating_sub(before);
    eprintln!("{} MiB before, {} MiB more", before >> 20, growth >> 20);
    assert!(growth < GROWTH_MAX, "{} MiB more", growth >> 20);
    assert!(journal.read(Seq(0), 1).unwrap().is_empty());
}
