//! Large files that grow: what was appended is there at once, costs what it is,
//! and nothing is claimed of the rest before it was compared.

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use replicator_tests::mounts::FileSystem::{Ext4, Xfs};
use replicator_tests::process::Daemon;
use replicator_tests::scenario::{Layout, Pair, patience};
use replicator_tests::workload::content;

const SIZE: usize = 32 << 20;
const LINE: usize = 4096;

fn line(number: u64) -> Vec<u8> {
    content::incompressible(number | 1 << 61, LINE)
}

/// A pair with a log of [`SIZE`] that is the replica's.
fn pair_with_log(daemon: impl FnOnce(&Pair) -> Daemon) -> (Pair, Daemon) {
    let pair = Pair::new(Layout::Two(Ext4, Xfs));
    fs::write(pair.source().join("log"), content::incompressible(1, SIZE)).unwrap();
    let daemon = daemon(&pair);
    pair.settle(&daemon, &"at first");
    (pair, daemon)
}

fn append(log: &Path, number: u64) {
    let mut log = OpenOptions::new().append(true).open(log).unwrap();
    log.write_all(&line(number)).unwrap();
}

/// Waits until the `number`th line can be read in the copy; how long that took.
fn seen(copy: &Path, number: u64) -> Duration {
    let start = Instant::now();
    let mut found = vec![0; LINE];
    let place = SIZE as u64 + number * LINE as u64;
    loop {
        let read = File::open(copy).unwrap().read_exact_at(&mut found, place);
        if read.is_ok() && found == line(number) {
            return start.elapsed();
        }
        assert!(start.elapsed() < patience(), "line {number} is not seen");
        thread::sleep(Duration::from_millis(2));
    }
}

/// Each line travels once, alone; how soon it is there is printed. (That it is there
/// before the file was compared, the next test shows.)
#[test]
fn what_is_appended_is_there_at_once_and_travels_once() {
    const LINES: u64 = 40;
    let (pair, daemon) = pair_with_log(|pair| pair.start_enabled("fanotify"));
    let (log, copy) = (pair.source().join("log"), pair.replica().join("log"));
    let before = daemon.counters();
    let mut took: Vec<Duration> = Vec::new();
    for number in 0..LINES {
        append(&log, number);
        took.push(seen(&copy, number));
        thread::sleep(Duration::from_millis(40));
    }
    daemon.wait(6 * patience());
    pair.settle(&daemon, &"in the end");
    let after = daemon.counters();
    let shipped = after.bytes_shipped - before.bytes_shipped;
    let appended = LINES * LINE as u64;
    took.sort();
    eprintln!("{shipped} bytes shipped of {appended}; seen after {took:?}");
    // A chunk for each reading would be three times as much.
    assert!(shipped <= appended + appended / 20, "{shipped} bytes for {appended}");
}

/// A block in the middle changes, and a line is appended: the line is there before
/// the block was looked at, and until it was, nothing is claimed.
#[test]
fn what_changed_elsewhere_holds_every_claim() {
    let (pair, mut daemon) = pair_with_log(|pair| pair.start_enabled("fanotify"));
    let (log, copy) = (pair.source().join("log"), pair.replica().join("log"));
    let before = daemon.status().destination.unwrap();
    let mut early = 0;
    for number in 0..5 {
        let place = (SIZE / 2) as u64 + number * LINE as u64;
        let block = line(1000 + number);
        File::options().write(true).open(&log).unwrap().write_all_at(&block, place).unwrap();
        let changed = replicator_common::time::Timestamp::now();
        append(&log, number);
        seen(&copy, number);
        // First the claims, then what they are about.
        let there = daemon.status().destination.unwrap();
        let mut found = vec![0; LINE];
        File::open(&copy).unwrap().read_exact_at(&mut found, place).unwrap();
        if found != block {
            early += 1;
            assert!(there.last_replicated.is_none_or(|claim| claim < changed), "{there:?}");
            assert!(there.last_consistent.is_none_or(|claim| claim < changed), "{there:?}");
            // What it says of itself is some 200 ms old.
            daemon.poll_until(patience(), "the file is named, or is as it was", |daemon| {
                File::open(&copy).unwrap().read_exact_at(&mut found, place).unwrap();
                let blocked = daemon.try_status()?.source?.blocked_by;
                let named = blocked.iter().any(|one| one.path.as_deref() == Some("log"));
                (named || found == block).then_some(())
            });
        }
        daemon.wait(6 * patience());
        File::open(&copy).unwrap().read_exact_at(&mut found, place).unwrap();
        assert!(found == block, "claimed, and not there");
    }
    eprintln!("{early} of 5 lines were there before the block");
    assert!(early > 0, "nothing was tested");
    pair.settle(&daemon, &"in the end");
    daemon.poll_until(patience(), "an exact batch", |daemon| {
        let there = daemon.try_status()?.destination?;
        (there.last_consistent > before.last_consistent).then_some(())
    });
}

/// The same, and the source dies before it has compared the file: the index must not
/// say that it was read.
#[test]
fn trap_6_a_crash_before_what_was_appended_to_was_compared() {
    let (pair, daemon) = pair_with_log(|pair| pair.start_enabled("fanotify"));
    let (log, copy) = (pair.source().join("log"), pair.replica().join("log"));
    // What is read more than two seconds after its change leaves no doubt by itself.
    let block = line(1000);
    File::options().write(true).open(&log).unwrap().write_all_at(&block, 1 << 20).unwrap();
    append(&log, 0);
    seen(&copy, 0);
    daemon.kill();
    let daemon = pair.start_enabled("fanotify");
    pair.settle(&daemon, &"after a crash");
}
