//! The watermark tells the truth: what was closed before
//! LastReplicatedTimestamp is on the replica, right, at the moment of the claim.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use replicator_common::time::Timestamp;
use replicator_tests::mounts::FileSystem::{Btrfs, Ext4, Tmpfs, Xfs};
use replicator_tests::process::Daemon;
use replicator_tests::scenario::{Layout, Pair};
use replicator_tests::stamps::{Stamper, steadily};

/// How long changes are made.
const TIME: Duration = Duration::from_secs(6);
/// Changes a second of each of the two writers.
const RATE: f64 = 150.0;

fn claimed(daemon: &Daemon) -> Option<Timestamp> {
    daemon.try_status()?.destination?.last_replicated
}

/// Polls the claim until `done` and holds each new one against the replica.
/// Gives the distinct claims.
fn check_claims(
    daemon: &Daemon,
    stamper: &Stamper,
    pair: &Pair,
    done: &AtomicBool,
) -> Vec<Timestamp> {
    let mut claims: Vec<Timestamp> = Vec::new();
    while !done.load(Ordering::Relaxed) {
        if let Some(claim) = claimed(daemon) {
            assert!(claim <= Timestamp::now(), "a claim about the future: {claim}");
            let last = claims.last().copied().unwrap_or(Timestamp::NEVER);
            assert!(claim >= last, "the watermark moved back from {last} to {claim}");
            let broken = stamper.broken_claims(pair.replica(), claim);
            assert!(broken.is_empty(), "{claim} was claimed, but:\n{}", broken.join("\n"));
            if claim > last {
                claims.push(claim);
            }
        }
        thread::sleep(Duration::from_millis(15));
    }
    claims
}

fn watermark(layout: Layout, watcher: &str) {
    let pair = Pair::alone(layout);
    let daemon = pair.start_enabled(watcher);
    let (stamper, done) = (Stamper::new(pair.source()), AtomicBool::new(false));
    let claims = thread::scope(|scope| {
        let checker = scope.spawn(|| check_claims(&daemon, &stamper, &pair, &done));
        let writers: Vec<_> = (0..2)
            .map(|writer| {
                scope.spawn({
                    let stamper = &stamper;
                    move || write_steadily(stamper, writer)
                })
            })
            .collect();
        for writer in writers {
            writer.join().unwrap();
        }
        let end = Timestamp::now();
        // The checker goes on until a claim covers everything.
        let start = Instant::now();
        while claimed(&daemon).is_none_or(|claim| claim <= end) {
            assert!(start.elapsed() < Duration::from_secs(30), "no claim covers {end}");
            thread::sleep(Duration::from_millis(20));
        }
        thread::sleep(Duration::from_millis(100));
        done.store(true, Ordering::Relaxed);
        checker.join().unwrap()
    });
    assert!(stamper.count() > 1000, "too few files: {}", stamper.count());
    assert!(claims.len() >= 5, "too few claims to say anything: {claims:?}");
    assert_moves_on_when_idle(&daemon);
}

/// New files, files replaced by rename, and logs, in a few directories.
fn write_steadily(stamper: &Stamper, writer: u32) {
    steadily(RATE, TIME, |number| {
        let version = number / 40 + 1;
        let name = match number % 40 {
            0..10 => format!("writer-{writer}/new-{number}/file"),
            slot @ 10..38 => format!("writer-{writer}/slot-{slot}"),
            slot => format!("writer-{writer}/{slot}.log"),
        };
        let version = if name.contains("/new-") { 1 } else { version };
        stamper.write(&name, version).unwrap();
    });
}

/// Heartbeats of at most a second: over three seconds of silence the watermark
/// gains at least one and a half.
fn assert_moves_on_when_idle(daemon: &Daemon) {
    let before = claimed(daemon).unwrap();
    thread::sleep(Duration::from_secs(3));
    let after = claimed(daemon).unwrap();
    let gain = after.since(before);
    assert!(
        gain >= Duration::from_millis(1500),
        "an idle source's watermark gained {gain:?} in 3 s"
    );
    let lag = daemon.status().destination.unwrap().time_since_last_sync.unwrap();
    assert!((0.0..2.5).contains(&lag), "TimeSinceLastSync is {lag} s with an idle source");
}

#[test]
fn holds_ext4_fanotify() {
    watermark(Layout::Two(Ext4, Ext4), "fanotify");
}

#[test]
fn holds_xfs_inotify() {
    watermark(Layout::Two(Xfs, Xfs), "inotify");
}

#[test]
fn holds_on_one_btrfs_fanotify() {
    watermark(Layout::Same(Btrfs), "fanotify");
}

/// With `scan` only a whole walk proves anything: claims are rarer, not looser.
#[test]
fn holds_tmpfs_scan() {
    let pair = Pair::alone(Layout::Two(Tmpfs, Tmpfs));
    let daemon = pair.start_enabled("scan");
    let stamper = Stamper::new(pair.source());
    for round in 0..5 {
        for number in 0..100 {
            stamper.write(&format!("directory-{}/file-{number}", number % 7), round + 1).unwrap();
        }
        if round == 3 {
            daemon.wait(Duration::from_secs(60));
        }
        let claim = claimed(&daemon).unwrap();
        let broken = stamper.broken_claims(pair.replica(), claim);
        assert!(broken.is_empty(), "{claim} was claimed, but:\n{}", broken.join("\n"));
    }
}

/// While paused nothing is claimed that was done after the pause, and nothing
/// of it is lost.
#[test]
fn does_not_move_while_paused() {
    let pair = Pair::alone(Layout::Two(Ext4, Ext4));
    let daemon = pair.start_enabled("fanotify");
    let stamper = Stamper::new(pair.source());
    stamper.write("before", 1).unwrap();
    daemon.wait(Duration::from_secs(30));
    let post = |name: &str| {
        let path = format!("/replicator/v1/{name}");
        daemon.request("POST", &path, Some(serde_json::json!({}))).unwrap();
    };
    post("pause");
    thread::sleep(Duration::from_millis(300));
    for number in 0..50 {
        stamper.write(&format!("paused/{number}"), 1).unwrap();
    }
    thread::sleep(Duration::from_millis(1500));
    let claim = claimed(&daemon).unwrap();
    assert!(stamper.broken_claims(pair.replica(), claim).is_empty());
    assert!(!pair.replica().join("paused").exists(), "shipped while paused");
    post("resume");
    pair.settle(&daemon, &"after resume");
    let claim = claimed(&daemon).unwrap();
    assert!(stamper.broken_claims(pair.replica(), claim).is_empty());
}
