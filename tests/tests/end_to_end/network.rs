//! A bad network between real daemons: whatever it does, replication goes on by
//! itself when it can, says why it does not when it cannot, and what waits is on
//! disk.
//!
//! `just network [SECONDS] [SEED]` runs the random part for longer.

use std::fs;
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use replicator_common::status::Link;
use replicator_common::time::Timestamp;
use replicator_tests::cgroup::{MemoryLimit, peak_memory};
use replicator_tests::hosts::{Hosts, Side};
use replicator_tests::line::{Line, free_address};
use replicator_tests::relay::{Relay, Weather};
use replicator_tests::scenario::patience;
use replicator_tests::workload::{Workload, content};

/// The longest pause between attempts to connect (`session::BACKOFF`), and what
/// a busy machine adds to the status's age.
const NEXT_ATTEMPT: Duration = Duration::from_secs(5);
/// What the source's daemon may take with a backlog of any length, page cache
/// excepted, bytes: ARCHITECTURE, "Memory".
const MEMORY: u64 = 256 << 20;
/// Changes that wait while the network is cut.
const BACKLOG: u64 = 200_000;

fn files(root: &Path, name: &str, count: u32) {
    let directory = root.join(name);
    fs::create_dir(&directory).unwrap();
    for number in 0..count {
        let length = 100 + 37 * number as usize;
        let bytes = content::bytes(u64::from(number), length);
        fs::write(directory.join(number.to_string()), bytes).unwrap();
    }
    fs::write(directory.join("large"), content::incompressible(1, 1 << 20)).unwrap();
}

/// None of these ends a session.
#[test]
fn a_bad_line_is_slow_and_nothing_else() {
    let line = Line::enrolled(11);
    let sessions = line.source_report().counters.sessions;
    let (millis, usual) = (Duration::from_millis, Weather::default);
    let all = [
        ("latency", Weather { delay: millis(100), jitter: millis(50), ..usual() }),
        ("loss", Weather { loss: 0.05, ..usual() }),
        ("order", Weather { reordered: 0.3, ..usual() }),
        ("duplicates", Weather { duplicated: 0.3, ..usual() }),
        ("corruption", Weather { corrupted: 0.05, ..usual() }),
        ("truncation", Weather { truncated: 0.05, ..usual() }),
        ("bandwidth", Weather { bandwidth: Some(2 << 20), ..usual() }),
    ];
    for (name, weather) in all {
        line.relay.set(weather);
        files(line.source(), name, 30);
        line.settle(&name);
    }
    line.relay.set(Weather::cut());
    files(line.source(), "short cut", 30);
    thread::sleep(Duration::from_secs(2));
    line.relay.heal();
    line.settle(&"a short cut");
    line.daemon(Side::Destination).freeze();
    files(line.source(), "frozen", 30);
    thread::sleep(Duration::from_secs(2));
    line.daemon(Side::Destination).thaw();
    line.settle(&"a peer that hung");
    assert_eq!(line.source_report().counters.sessions, sessions, "the session lasted");
}

fn away(line: &Line, side: Side) -> Link {
    let link = line.await_link(side, false);
    let page = line.on(side, &["status"]).success().stdout;
    let row = page.lines().find(|row| row.trim_start().starts_with("link ")).unwrap();
    assert!(row.contains("NOT CONNECTED with 127.0.0.1:"), "{side:?}: {page}");
    let why = link.last_error.as_ref().unwrap_or_else(|| panic!("{side:?} says no reason: {page}"));
    assert!(row.contains(why.as_str()) || side == Side::Source, "{side:?}, {why}: {page}");
    let message = line.daemon(side).status().status_message;
    let message = message.unwrap_or_else(|| panic!("{side:?} has nothing to say: {page}"));
    assert!(message.contains("connect") && message.contains("since"), "{side:?}: {message}");
    link
}

fn is_soon(next: Option<Timestamp>) -> bool {
    next.is_some_and(|next| next.since(Timestamp::now()) < NEXT_ATTEMPT)
}

/// Both sides say since when and why; nothing is claimed; the operator who asks
/// does not wait for the next attempt.
#[test]
fn a_long_cut_is_told_and_ends_by_itself() {
    let line = Line::enrolled(12);
    line.relay.set(Weather::cut());
    let cut = Timestamp::now();
    files(line.source(), "cut", 30);
    let page = || line.on(Side::Source, &["status"]).success().stdout;
    let links = [Side::Source, Side::Destination].map(|side| away(&line, side));
    for (link, side) in links.iter().zip([Side::Source, Side::Destination]) {
        assert!(link.since > cut, "{side:?}: {link:?}");
    }
    assert!(links[0].next_attempt.is_some() && page().contains("try") | page().contains("next"));

    // What stands still is said to: the truth grows old.
    let before = (line.source_report(), line.destination_report());
    let spent = [Side::Source, Side::Destination].map(|side| line.daemon(side).processor_time());
    let begin = Instant::now();
    while begin.elapsed() < Duration::from_secs(6) {
        assert!(is_soon(line.link(Side::Source).next_attempt), "{:?}", line.link(Side::Source));
        thread::sleep(Duration::from_millis(500));
    }
    let waited = begin.elapsed();
    for (side, before) in [Side::Source, Side::Destination].into_iter().zip(spent) {
        let spent = line.daemon(side).processor_time() - before;
        assert!(spent < waited / 2, "{side:?} is busy while it waits: {spent:?} of {waited:?}");
    }
    let after = (line.source_report(), line.destination_report());
    assert_eq!(after.1.last_replicated, before.1.last_replicated);
    assert!(after.1.last_replicated.unwrap() <= cut, "a claim beyond what is there");
    assert_eq!(after.0.link.since, before.0.link.since, "attempts change nothing of that");
    assert_eq!(after.1.link.since, before.1.link.since);
    let grown = |before: f64, after: f64| after - before > 5.0;
    let age = |report: &replicator_common::status::DestinationReport| report.time_since_last_sync;
    assert!(grown(age(&before.1).unwrap(), age(&after.1).unwrap()), "{:?}", after.1);
    assert!(grown(before.0.lag.applied, after.0.lag.applied), "{:?}", after.0.lag);
    assert!(after.0.backlog_records > 30, "{:?}", after.0);

    // Each call of an operator is an attempt at once.
    let taken = || line.relay.seen().taken.load(Ordering::Relaxed);
    let (first, begin) = (taken(), Instant::now());
    while taken() < first + 4 {
        line.on(Side::Source, &["resume"]).success();
        assert!(begin.elapsed() < Duration::from_secs(4), "{} packets", taken() - first);
    }
    line.relay.heal();
    line.await_link(Side::Source, true);
    line.settle(&"healed");
    let link = line.await_link(Side::Destination, true);
    assert!(link.last_error.is_none() && line.link(Side::Source).next_attempt.is_none());
}

/// A client behind a gateway that forgets, or on the move: QUIC's migration.
#[test]
fn a_client_whose_address_changes_keeps_its_session() {
    let line = Line::enrolled(13);
    let before = line.source_report().counters;
    line.relay.set(Weather { bandwidth: Some(4 << 20), ..Weather::default() });
    let length = 8 << 20;
    fs::write(line.source().join("large"), content::incompressible(1, length)).unwrap();
    let mut peers = vec![line.link(Side::Destination).peer];
    for _ in 0..3 {
        thread::sleep(Duration::from_millis(700));
        line.relay.move_client();
        let begin = Instant::now();
        while peers.contains(&line.link(Side::Destination).peer) {
            assert!(begin.elapsed() < patience(), "still at {peers:?}");
            thread::sleep(Duration::from_millis(50));
        }
        peers.push(line.link(Side::Destination).peer);
    }
    line.settle(&"moved");
    let after = line.source_report().counters;
    assert_eq!(after.sessions, before.sessions, "the session lasted");
    let shipped = after.bytes_shipped - before.bytes_shipped;
    assert!(shipped < length as u64 * 11 / 10, "{shipped} bytes for {length}");
}

/// The same with an interface, between hosts.
#[test]
fn a_host_whose_address_changes_keeps_its_session() {
    let hosts = Hosts::enrolled();
    let report = || hosts.daemon(Side::Source).status().source.unwrap();
    let sessions = report().counters.sessions;
    hosts.move_source("192.0.2.77");
    files(hosts.source(), "moved", 30);
    hosts.settle(&"another address");
    assert_eq!(report().counters.sessions, sessions, "the session lasted");
    // With the source's next report.
    let start = Instant::now();
    loop {
        let there = hosts.daemon(Side::Destination).status().destination.unwrap().link.peer;
        if there.contains("192.0.2.77") {
            break;
        }
        assert!(start.elapsed() < patience(), "{there}");
        thread::sleep(Duration::from_millis(50));
    }
}

/// The source's host vanishes without a word and comes back with another port,
/// while the destination still holds what it believes to be its session.
#[test]
fn a_source_that_comes_back_does_not_wait_for_its_old_session() {
    let mut hosts = Hosts::enrolled();
    hosts.pull_cable();
    hosts.kill(Side::Source);
    files(hosts.source(), "meanwhile", 30);
    hosts.start(Side::Source);
    hosts.plug_cable();
    hosts.settle(&"back");
    let said = hosts.daemon(Side::Destination).output();
    assert!(said.contains("replaced by a newer session") || said.contains("closed"), "{said}");
    assert!(!said.contains("timed out"), "the old session was waited for: {said}");
}

/// Puts a list of hosts of the daemon's own into its mount namespace, and goes on
/// to the daemon. Other tests' mounts must not live on there.
const OWN_HOSTS: &str = r#"
hosts=$1; shift
while read -r _ point _; do
    case $point in
        "$REPLICATOR_TEST_SOURCE") ;;
        *[0-9]/mnt) umount --lazy "$point" ;;
    esac
done < /proc/mounts
mount --bind "$hosts" /etc/hosts && exec "$@"
"#;

/// The operator's endpoint is a name, which leads elsewhere after a move of the
/// destination.
#[test]
fn a_name_is_looked_up_for_each_attempt() {
    let listen = free_address();
    let first = Relay::at("127.0.0.2:0".parse().unwrap(), listen, 14);
    let port = first.address().port();
    let second = Relay::at(SocketAddr::from(([127, 0, 0, 3], port)), listen, 15);
    let hosts = replicator_tests::mounts::Scratch::new("names");
    let file = hosts.path().join("hosts");
    fs::write(&file, "127.0.0.2 replica.test\n").unwrap();
    let wrap = ["unshare", "--mount", "sh", "-c", OWN_HOSTS, "sh", file.to_str().unwrap()];
    let wrap = wrap.map(str::to_owned).into();
    let mut line = Line::with(first, listen, format!("replica.test:{port}"), wrap);
    fs::write(&file, "127.0.0.3 replica.test\n").unwrap();
    let first = std::mem::replace(&mut line.relay, second);
    first.set(Weather::cut());
    files(line.source(), "moved", 30);
    line.settle(&"at another address");
    assert_eq!(line.link(Side::Source).peer, line.relay.address().to_string());
}

/// A copy of a machine, or of a state directory: the two would undo each
/// other's work for ever.
#[test]
fn of_two_sources_with_one_identity_the_second_is_refused() {
    let mut line = Line::enrolled(16);
    line.kill(Side::Source);
    let copy = line.scratch().join("copy");
    let mut copying = Command::new("cp");
    copying.arg("-a").arg(line.state(Side::Source)).arg(&copy);
    assert!(copying.status().unwrap().success());
    line.start(Side::Source);
    files(line.source(), "first", 30);
    line.settle(&"the first goes on");
    let sessions = line.source_report().counters.sessions;

    let second = line.spawn(Side::Source, &copy, "second");
    let said = |daemon: &replicator_tests::process::Daemon| {
        let source = daemon.status().source.unwrap();
        source.link.last_error.unwrap_or_default()
    };
    let begin = Instant::now();
    while !said(&second).contains("another source with this one's identity") {
        assert!(begin.elapsed() < patience(), "{:?}", second.status());
        thread::sleep(Duration::from_millis(50));
    }
    files(line.source(), "beside", 30);
    line.settle(&"the second is there");
    thread::sleep(Duration::from_secs(3));
    assert_eq!(line.source_report().counters.sessions, sessions, "the first was not disturbed");
    let told = line.destination_report().last_error.map(|error| error.error).unwrap_or_default();
    assert!(told.contains("identity"), "the destination's operator is told: {told:?}");

    // When the first is gone, the second is as good: it knows less, and says so.
    line.kill(Side::Source);
    files(line.source(), "after", 30);
    second.wait(patience());
    replicator_tests::compare::assert_same(line.source(), line.replica(), &"the second alone");
    let lost = fs::read_dir(line.replica()).unwrap().map(|entry| entry.unwrap().file_name());
    let lost: Vec<_> = lost.filter(|name| name.to_string_lossy().contains("lost+found")).collect();
    assert!(lost.is_empty(), "{lost:?}");
    line.start(Side::Source);
    let begin = Instant::now();
    while !said(line.daemon(Side::Source)).contains("identity") {
        assert!(begin.elapsed() < patience(), "{:?}", line.source_report());
        thread::sleep(Duration::from_millis(50));
    }
}

/// INVARIANT (bounded resources): what waits is in the journal, not in memory.
#[test]
fn a_backlog_is_on_disk() {
    let limit = MemoryLimit::new(MEMORY);
    let listen = free_address();
    let relay = Relay::new(listen, 17);
    let advertise = relay.address().to_string();
    let confined = limit.confine(&Command::new("env"));
    let words = std::iter::once(confined.get_program()).chain(confined.get_args());
    let wrap = words.map(|word| word.to_str().unwrap().to_owned()).collect();
    let line = Line::with(relay, listen, advertise, wrap);
    let paths: Vec<_> = (0..2_000).map(|n| line.source().join(format!("{n:05}"))).collect();
    for path in &paths {
        fs::write(path, "before").unwrap();
    }
    line.settle(&"before the cut");
    line.relay.set(Weather::cut());
    // Each round makes events of another kind than the one before, but the
    // kernel may merge some all the same.
    let waiting = || line.source_report().backlog_records;
    for round in (0u32..).take_while(|_| waiting() < BACKLOG) {
        for path in &paths {
            if round.is_multiple_of(2) {
                let mode = fs::Permissions::from_mode(0o600 + (round & 0o77));
                fs::set_permissions(path, mode).unwrap();
            } else {
                fs::write(path, round.to_string()).unwrap();
            }
        }
    }
    let report = line.source_report();
    assert_eq!(report.counters.gaps, 1, "no event was lost: {report:?}");
    line.relay.heal();
    line.settle(&"200,000 changes later");
    assert_eq!(limit.kills(), 0);
    let peak = peak_memory(line.daemon(Side::Source).id());
    eprintln!("{peak} bytes of memory at most");
}

/// Anything at all, and then again anything at all.
#[test]
fn random_weather() {
    let number = |name: &str| std::env::var(name).ok().map(|text| text.parse::<u64>().unwrap());
    let seconds = number("REPLICATOR_NETWORK_SECONDS").unwrap_or(12);
    let seed = number("REPLICATOR_SEED").unwrap_or_else(rand::random);
    eprintln!("{seconds} seconds of random weather, REPLICATOR_SEED={seed}");
    let mut rng = StdRng::seed_from_u64(seed);
    let mut line = Line::enrolled(seed);
    let (root, beside) = (line.source().join("root"), line.source().join("beside"));
    fs::create_dir(&root).unwrap();
    fs::create_dir(&beside).unwrap();
    let end = Instant::now() + Duration::from_secs(seconds);
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        let working = scope.spawn(|| {
            for round in 0.. {
                if over.load(Ordering::Relaxed) {
                    return;
                }
                let seed = seed.wrapping_add(round);
                let workload = Workload { seed, threads: 2, steps: 100, ..Workload::new() };
                Workload { rate: Some(200.0), ..workload }.run(&root, &beside);
            }
        });
        while Instant::now() < end && !working.is_finished() {
            match rng.random_range(0..12) {
                0 => line.relay.move_client(),
                1 => {
                    let side = [Side::Source, Side::Destination][rng.random_range(0..2)];
                    eprintln!("{side:?} is killed");
                    line.kill(side);
                    line.start(side);
                }
                _ => {
                    let weather = Weather::random(&mut rng);
                    eprintln!("{weather:?}");
                    line.relay.set(weather);
                }
            }
            thread::sleep(Duration::from_millis(rng.random_range(100..2500)));
            // What it says must be true at any moment.
            let claimed = line.source_report().watermark;
            assert!(claimed <= Timestamp::now(), "{claimed}");
        }
        over.store(true, Ordering::Relaxed);
        working.join().unwrap();
    });
    line.relay.heal();
    line.settle(&format!("REPLICATOR_SEED={seed}"));
}
