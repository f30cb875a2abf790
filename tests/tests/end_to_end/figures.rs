//! What status counts, and that it says what it means.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use replicator_common::status::{Counters, Skipped};
use replicator_tests::hosts::{Hosts, Side};
use replicator_tests::mounts::FileSystem::Ext4;
use replicator_tests::process::Daemon;
use replicator_tests::scenario::{Layout, Pair, patience};
use replicator_tests::workload::content;
use rustix::fs::{CWD, FileType, Mode};

/// What the chunks around one change come to at most, bytes.
const AROUND: u64 = 256 << 10;

/// Waits, and gives (changed, shipped) since `before`.
fn since(before: &Counters, daemon: &Daemon) -> (u64, u64) {
    daemon.wait(patience());
    let now = daemon.counters();
    (now.bytes_changed - before.bytes_changed, now.bytes_shipped - before.bytes_shipped)
}

#[test]
fn bytes_changed_are_the_users_and_bytes_shipped_the_networks() {
    let pair = Pair::alone(Layout::Two(Ext4, Ext4));
    let daemon = pair.start_enabled("fanotify");
    let root = pair.source();
    daemon.wait(patience());

    let before = daemon.counters();
    fs::write(root.join("text"), "the same words again\n".repeat(5000)).unwrap();
    let (changed, shipped) = since(&before, &daemon);
    assert_eq!(changed, 105_000, "a small file counts with its length");
    assert_eq!(shipped, 105_000, "what stays on the host is not compressed");

    let before = daemon.counters();
    let size = 4u64 << 20;
    fs::write(root.join("large"), content::incompressible(1, size as usize)).unwrap();
    let (changed, shipped) = since(&before, &daemon);
    assert_eq!(changed, size, "a new large file counts with all of it");
    assert!(shipped >= size, "{shipped}: nothing can be saved on it");

    let before = daemon.counters();
    let file = fs::File::options().write(true).open(root.join("large")).unwrap();
    file.write_all_at(&content::incompressible(2, 4096), 2 << 20).unwrap();
    drop(file);
    let (changed, shipped) = since(&before, &daemon);
    assert!((4096..AROUND).contains(&changed), "the chunks around the change: {changed}");
    assert!((4096..AROUND).contains(&shipped), "{shipped}");

    let before = daemon.counters();
    fs::rename(root.join("large"), root.join("renamed")).unwrap();
    fs::copy(root.join("text"), root.join("text.new")).unwrap();
    fs::rename(root.join("text.new"), root.join("text")).unwrap();
    let (changed, _) = since(&before, &daemon);
    assert_eq!(changed, 105_000, "a rename changes nothing, a new small file is new");
}

/// Blocks of a large file are overwritten, as a database does it: they travel, and not
/// the chunks around them. What was written elsewhere, at any place and of any length, is
/// right all the same.
#[test]
fn blocks_that_are_overwritten_travel_alone() {
    let seed: u64 = std::env::var("REPLICATOR_SEED")
        .map_or_else(|_| rand::random(), |text| text.parse().expect("REPLICATOR_SEED: a number"));
    eprintln!("REPLICATOR_SEED={seed}");
    let mut random = StdRng::seed_from_u64(seed);
    let pair = Pair::alone(Layout::Two(Ext4, Ext4));
    let size = 64u64 << 20;
    fs::write(pair.source().join("base"), content::incompressible(seed, size as usize)).unwrap();
    let daemon = pair.start_enabled("fanotify");
    daemon.wait(patience());
    let file = fs::File::options().write(true).open(pair.source().join("base")).unwrap();

    // Chunks of 16 KiB would be some 2.9 MiB. More than that, and blocks beside blocks.
    for blocks in [100, 400] {
        let before = daemon.counters();
        for number in 0..blocks {
            let at = random.random_range(0..size / 4096) * 4096;
            file.write_all_at(&content::incompressible(seed + number + blocks, 4096), at).unwrap();
        }
        let (_, shipped) = since(&before, &daemon);
        pair.settle(&daemon, &format!("{blocks} blocks, REPLICATOR_SEED={seed}"));
        assert!(shipped < blocks * 4096 * 3 / 2, "{shipped} for {blocks} blocks, seed {seed}");
    }
    for round in 0..8 {
        for _ in 0..random.random_range(20..60) {
            let length = random.random_range(1..20_000);
            let at = random.random_range(0..size - length as u64);
            file.write_all_at(&content::incompressible(random.random(), length), at).unwrap();
        }
        match round % 4 {
            1 => file.set_len(size + random.random_range(0..100_000)).unwrap(),
            2 => file.set_len(size - random.random_range(0..100_000)).unwrap(),
            3 => file.set_len(size).unwrap(),
            _ => {}
        }
        pair.settle(&daemon, &format!("round {round}, REPLICATOR_SEED={seed}"));
    }
}

#[test]
fn what_leaves_the_host_travels_compressed() {
    let hosts = Hosts::enrolled();
    hosts.await_enabled(Side::Source);
    hosts.settle(&"at first");
    let before = hosts.shipped();
    fs::write(hosts.source().join("text"), "the same words again\n".repeat(5000)).unwrap();
    hosts.settle(&"with a text");
    let shipped = hosts.shipped() - before;
    assert!((1..20_000).contains(&shipped), "{shipped} for 105,000 bytes");
}

/// However short it takes to build a batch, each takes what changed in a moment.
#[test]
fn changes_that_go_on_share_batches() {
    let pair = Pair::alone(Layout::Two(Ext4, Ext4));
    let daemon = pair.start_enabled("fanotify");
    pair.settle(&daemon, &"at first");
    let (before, start) = (daemon.counters().batches, Instant::now());
    for number in 0..1000 {
        fs::write(pair.source().join(format!("file-{}", number % 100)), [0; 100]).unwrap();
        std::thread::sleep(Duration::from_millis(1));
    }
    let batches = daemon.counters().batches - before;
    // One each 10 ms; and what was under way when counting began.
    let most = start.elapsed().as_millis() as u64 / 10 + 3;
    assert!((2..=most).contains(&batches), "{batches} batches, {most} at most");
    pair.settle(&daemon, &"in the end");
}

fn special(path: &Path, kind: FileType) {
    rustix::fs::mknodat(CWD, path, kind, Mode::from_raw_mode(0o644), 0x0103).unwrap();
}

fn counted(daemon: &mut Daemon, what: &str, sockets: u64, fifos: u64, devices: u64) {
    daemon.wait(patience());
    // Status is refreshed a few times a second.
    daemon.poll_until(patience(), what, |daemon| {
        let Skipped { sockets: s, fifos: f, devices: d, .. } = daemon.status().source?.skipped;
        ((s, f, d) == (sockets, fifos, devices)).then_some(())
    });
}

#[test]
fn what_is_passed_over_no_more_is_not_counted() {
    let pair = Pair::alone(Layout::Two(Ext4, Ext4));
    let mut daemon = pair.start_enabled("fanotify");
    let root = pair.source();
    let (tree, sub) = (root.join("tree"), root.join("tree/sub"));
    fs::create_dir_all(&sub).unwrap();
    for (number, directory) in [root, &tree, &sub].into_iter().enumerate() {
        special(&directory.join("fifo"), FileType::Fifo);
        special(&directory.join("socket"), FileType::Socket);
        special(&directory.join("device"), FileType::CharacterDevice);
        let so_far = number as u64 + 1;
        counted(&mut daemon, "all are counted", so_far, so_far, so_far);
    }
    fs::remove_file(root.join("fifo")).unwrap();
    counted(&mut daemon, "one was removed", 3, 2, 3);
    fs::write(root.join("new"), "").unwrap();
    fs::rename(root.join("new"), root.join("socket")).unwrap();
    counted(&mut daemon, "one was replaced by a file", 2, 2, 3);
    fs::rename(root.join("device"), root.join("renamed")).unwrap();
    counted(&mut daemon, "one was renamed", 2, 2, 3);
    fs::rename(&sub, root.join("sub")).unwrap();
    counted(&mut daemon, "a directory with some was renamed", 2, 2, 3);
    fs::remove_dir_all(&tree).unwrap();
    counted(&mut daemon, "a tree with some was removed", 1, 1, 2);
    fs::remove_dir_all(root.join("sub")).unwrap();
    fs::remove_file(root.join("renamed")).unwrap();
    counted(&mut daemon, "none are left", 0, 0, 0);
}

/// How often the engine's thread gave up the processor so far.
fn switches(daemon: &Daemon) -> u64 {
    let tasks = fs::read_dir(format!("/proc/{}/task", daemon.id())).unwrap();
    let engine = tasks
        .map(|task| task.unwrap().path())
        .find(|task| fs::read_to_string(task.join("comm")).unwrap().trim() == "engine")
        .expect("the engine has a thread");
    let status = fs::read_to_string(engine.join("status")).unwrap();
    let count = status.lines().find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"));
    count.unwrap().trim().parse().unwrap()
}

/// A user's programs are not put off whenever a thread of ours wakes: all are of the policy
/// SCHED_BATCH, which is 3 (sched(7)).
#[test]
fn no_thread_takes_a_processor_from_who_is_at_work() {
    let pair = Pair::new(Layout::Two(Ext4, Ext4));
    let daemon = pair.start_enabled("fanotify");
    daemon.wait(patience());
    assert_gentle(&daemon);
    drop((daemon, pair));
    let hosts = Hosts::enrolled();
    assert_gentle(hosts.daemon(Side::Source));
    assert_gentle(hosts.daemon(Side::Destination));
}

fn assert_gentle(daemon: &Daemon) {
    let tasks = fs::read_dir(format!("/proc/{}/task", daemon.id())).unwrap();
    let mut threads = 0;
    for task in tasks {
        // One may have ended.
        let Ok(said) = fs::read_to_string(task.unwrap().path().join("stat")) else { continue };
        // The second field, in brackets, may hold anything; the policy is the 41st.
        let policy = said.rsplit_once(')').unwrap().1.split_whitespace().nth(38);
        assert_eq!(policy, Some("3"), "{said}");
        threads += 1;
    }
    // An applier, a session, stagers: else nothing was looked at.
    assert!(threads > 4, "{threads} threads");
}

#[test]
fn a_paused_source_sleeps() {
    let pair = Pair::alone(Layout::Two(Ext4, Ext4));
    let daemon = pair.start_enabled("fanotify");
    daemon.wait(patience());
    daemon.request("POST", "/replicator/v1/pause", Some(serde_json::json!({}))).unwrap();
    // A large file waits for its turn meanwhile.
    fs::write(pair.source().join("large"), content::incompressible(1, 1 << 20)).unwrap();
    std::thread::sleep(Duration::from_secs(2));
    let before = switches(&daemon);
    std::thread::sleep(Duration::from_secs(3));
    let switches = switches(&daemon) - before;
    assert!(switches < 300, "{switches} times in 3 s");
    daemon.request("POST", "/replicator/v1/resume", Some(serde_json::json!({}))).unwrap();
    pair.settle(&daemon, &"resumed");
}

#[test]
fn one_clock_is_not_ahead_of_itself() {
    let pair = Pair::alone(Layout::Two(Ext4, Ext4));
    // The greeting's answer takes longer when there is something to settle.
    drop(pair.start_enabled("fanotify"));
    let daemon = pair.start_enabled("fanotify");
    std::thread::sleep(Duration::from_secs(2));
    let status = daemon.status();
    let links = [status.source.unwrap().link, status.destination.unwrap().link];
    for link in links {
        let ahead = link.clock_offset_nanos.expect("it is known by now");
        assert!(ahead.abs() < 3_000_000, "{ahead} ns: {link:?}");
    }
}

/// What two idle ends say each second is a heartbeat and its answer; the reports of both go in
/// the packets of these.
#[test]
fn an_idle_pair_says_little() {
    let hosts = Hosts::enrolled();
    hosts.settle(&"the beginning");
    // The first sync's last word, and looks at how long packets may be.
    thread::sleep(Duration::from_secs(5));
    // Beside other work some answers come late, and travel alone: the quietest second counts.
    let seconds = (0..10).map(|_| {
        let before = hosts.packets();
        thread::sleep(Duration::from_secs(1));
        hosts.packets() - before
    });
    let least = seconds.min().unwrap();
    assert!((1..=7).contains(&least), "{least} packets in the quietest of ten seconds");
}
