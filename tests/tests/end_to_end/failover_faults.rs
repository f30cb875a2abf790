//! Failover when everything else has failed too.

use std::fs::{self, File};
use std::io::Write;
use std::thread;
use std::time::{Duration, Instant};

use replicator_tests::hosts::{Hosts, Side};
use replicator_tests::mounts::FileSystem::{self, Ext4, Xfs};
use replicator_tests::scenario::patience;
use replicator_tests::serial;
use replicator_tests::workload::content;
use replicator_tests::wreck::{Death, State, Wreck};
use rustix::process::Signal;

/// Killed in the middle of applying a batch, with the source gone and a large
/// file half there; interrupted again at the `first`, `first + step`, … th of
/// each kind of call, and repeated.
fn interrupted(kind: FileSystem, nth: u32, calls: &[(&str, u32)]) {
    let _share = serial::share();
    let wreck = Wreck::new(kind, Death::Placing(nth));
    wreck.fail_over().success();
    let state = wreck.assert_handed_over("not interrupted");
    let mut kills = 0;
    for (call, step) in calls {
        for nth in (1..).step_by(*step as usize) {
            wreck.restore();
            let context = format!("killed at {call} number {nth}");
            let killed = wreck.fail_over_killed(call, nth);
            if killed {
                kills += 1;
                // A kill behind the last step leaves nothing to be done.
                let ended = wreck.fail_over();
                assert!(matches!(ended.code, Some(0 | 1)), "{context}: {ended:#?}");
            }
            assert_eq!(wreck.assert_handed_over(&context), state, "{context}");
            if !killed {
                break;
            }
        }
    }
    eprintln!("{kills} times killed, {state:?}");
    assert!(kills > calls.len(), "too few: {kills}");
}

#[test]
fn interrupted_at_what_makes_it_durable() {
    interrupted(Ext4, 5, &[("fsync", 1), ("fdatasync", 1), ("syncfs", 2)]);
}

#[test]
fn interrupted_at_what_moves_and_removes() {
    let calls =
        [("rename", 1), ("renameat,renameat2", 3), ("umount2", 1), ("unlink,unlinkat,rmdir", 7)];
    interrupted(Xfs, 9, &calls);
}

/// Writes until nothing more can be written.
fn fill(file: &mut File) {
    for size in [1 << 20, 4096, 1] {
        while file.write_all(&vec![1; size]).is_ok() {}
    }
    let _ = file.sync_all();
}

/// Replica and state directory are on a disk without a free byte.
fn full_disk(kind: FileSystem) {
    let _share = serial::share();
    let wreck = Wreck::new(kind, Death::Placing(7));
    let mut filler = File::create(wreck.replica().with_file_name("filler")).unwrap();
    fill(&mut filler);
    wreck.fail_over().success();
    assert_eq!(wreck.assert_handed_over("on a full disk"), State::After);
}

#[test]
fn on_a_full_ext4() {
    full_disk(Ext4);
}

#[test]
fn on_a_full_xfs() {
    full_disk(Xfs);
}

/// Killed before the batch was logged: the replica is as it was, and what had
/// arrived of the batch is set aside.
#[test]
fn of_a_batch_that_was_not_logged() {
    let _share = serial::share();
    let wreck = Wreck::new(Ext4, Death::Unsynced);
    wreck.fail_over().success();
    assert_eq!(wreck.assert_handed_over("not logged"), State::Before);
}

const FAILOVER: [&str; 3] = ["failover", "--deletion-mode", "LOCAL_CONFIGURATION_ONLY"];

/// The source dies while a large file is on its way. (Short of `kill`, which is
/// only asked for by what waits for it.)
fn source_dies_in_a_transfer() -> Hosts {
    let mut hosts = Hosts::enrolled();
    for seed in 0.. {
        let path = hosts.source().join(format!("directory/large-{seed}"));
        fs::write(path, content::incompressible(seed, 64 << 20)).unwrap();
        let begin = Instant::now();
        while begin.elapsed() < Duration::from_secs(10) {
            let destination = hosts.daemon(Side::Destination).status().destination.unwrap();
            if destination.arriving.iter().any(|arriving| arriving.bytes > 0) {
                hosts.kill(Side::Source);
                return hosts;
            }
        }
        assert!(begin.elapsed() < patience() && seed < 10, "nothing is ever arriving");
    }
    unreachable!("the numbers do not end")
}

/// Everything of ours is gone but lost+found, whose manifest says what each item
/// was to become.
#[track_caller]
fn assert_handed_over(hosts: &Hosts) {
    fs::write(hosts.replica().join("written"), "").expect("writable");
    assert_eq!(fs::read(hosts.replica().join("directory/file")).unwrap(), b"content");
    let names = fs::read_dir(hosts.replica()).unwrap().flatten();
    let names: Vec<_> = names.map(|entry| entry.file_name().into_string().unwrap()).collect();
    assert!(!names.iter().any(|name| name.starts_with(".replicator")), "{names:?}");
    let lost = names.iter().find(|name| name.starts_with("efs-replication-lost+found-"));
    let lost = hosts.replica().join(lost.unwrap_or_else(|| panic!("no lost+found: {names:?}")));
    let manifest = fs::read_to_string(lost.join("manifest.json")).unwrap();
    let parsed: serde_json::Value = serde_json::from_str(&manifest).unwrap();
    let items = parsed["items"].as_array().unwrap();
    let large = items.iter().filter(|item| item["kind"] == "partial file");
    assert!(large.count() > 0, "the large file is not listed: {manifest}");
    for item in items {
        assert!(lost.join(item["file"].as_str().unwrap()).exists(), "{item} is not there");
    }
}

#[test]
fn with_the_source_dead_and_twice() {
    let hosts = source_dies_in_a_transfer();
    hosts.on(Side::Destination, &FAILOVER).success();
    assert_handed_over(&hosts);
    let again = hosts.on(Side::Destination, &FAILOVER);
    assert_eq!(again.code, Some(1), "{again:#?}");
    assert_handed_over(&hosts);
}

/// The daemon is killed while it fails over; the next one brings it to its end.
#[test]
fn of_a_daemon_that_is_killed() {
    for millis in [60, 110] {
        let mut hosts = source_dies_in_a_transfer();
        thread::scope(|scope| {
            // Its answer is cut off when the daemon dies.
            scope.spawn(|| hosts.on(Side::Destination, &FAILOVER));
            thread::sleep(Duration::from_millis(millis));
            hosts.daemon(Side::Destination).signal(Signal::KILL);
        });
        hosts.kill(Side::Destination);
        hosts.start(Side::Destination);
        let asked = hosts.on(Side::Destination, &FAILOVER);
        assert!(matches!(asked.code, Some(0 | 1)), "{asked:#?}");
        assert_handed_over(&hosts);
    }
}
