//! Verification: what events cannot tell of, and what came past the protection,
//! is found, told and put right; and what only changes is left alone.

use std::fs;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use replicator_common::time::Timestamp;
use replicator_common::verification::{Difference, DifferenceKind, Verification};
use replicator_tests::compare;
use replicator_tests::hosts::{Hosts, Side};
use replicator_tests::mounts::FileSystem::{Btrfs, Ext4, Xfs};
use replicator_tests::mounts::{Scratch, run};
use replicator_tests::process::{Daemon, Ended, replicator};
use replicator_tests::scenario::{Layout, Pair, patience};
use replicator_tests::workload::raw::Mapping;
use replicator_tests::workload::{Workload, content};
use rustix::fs::{Advice, XattrFlags};

/// Larger than what is sent as a whole, and than one question about content.
const LARGE: usize = 9 << 20;

/// A way into the replica past its protection: a second mount of its file system,
/// made before.
#[derive(Debug)]
pub(crate) struct BackDoor {
    point: PathBuf,
    _scratch: Scratch,
}

impl BackDoor {
    pub(crate) fn new(replica: &Path) -> Self {
        let scratch = Scratch::new("back-door");
        let point = scratch.path().join("replica");
        fs::create_dir(&point).unwrap();
        run(Command::new("mount").arg("--bind").arg(replica).arg(&point));
        Self { point, _scratch: scratch }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.point.join(name)
    }

    /// Does something to a file, and sets its time as it was.
    pub(crate) fn unnoticed(&self, name: &str, change: impl FnOnce(&Path)) {
        let path = self.path(name);
        let before = fs::metadata(&path).unwrap().modified().unwrap();
        change(&path);
        set_mtime(&path, before);
    }

    /// Flips one bit, as a disk does.
    pub(crate) fn flip(&self, name: &str, offset: u64) {
        self.unnoticed(name, |path| {
            let file = fs::File::options().read(true).write(true).open(path).unwrap();
            let mut byte = [0];
            file.read_exact_at(&mut byte, offset).unwrap();
            file.write_all_at(&[byte[0] ^ 1], offset).unwrap();
        });
    }
}

impl Drop for BackDoor {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(&self.point).status();
    }
}

fn set_mtime(path: &Path, time: SystemTime) {
    let file = fs::File::open(path).unwrap();
    file.set_modified(time).unwrap();
}

/// A pair with a tree of every kind of object, replicated, with a way in.
fn replicated(layout: Layout, watcher: &str) -> (Pair, BackDoor, Daemon) {
    let pair = Pair::new(layout);
    let door = BackDoor::new(pair.replica());
    let source = pair.source();
    fs::create_dir_all(source.join("d/e/f")).unwrap();
    for number in 0..30 {
        fs::write(source.join(format!("d/file-{number}")), format!("content {number}")).unwrap();
    }
    fs::write(source.join("large"), content::incompressible(1, LARGE)).unwrap();
    fs::write(source.join("d/linked-1"), "of two names").unwrap();
    fs::hard_link(source.join("d/linked-1"), source.join("linked-2")).unwrap();
    fs::write(source.join("d/big-linked"), content::incompressible(2, 400_000)).unwrap();
    fs::hard_link(source.join("d/big-linked"), source.join("d/e/big-linked")).unwrap();
    std::os::unix::fs::symlink("nowhere", source.join("d/link")).unwrap();
    fs::write(source.join("d/e/f/deep"), "deep").unwrap();
    fs::write(source.join("empty"), "").unwrap();
    let mut daemon = pair.start(watcher);
    daemon.wait_enabled(patience());
    daemon.wait(patience());
    (pair, door, daemon)
}

/// `replicator verify` with further arguments, to its end.
fn verify(daemon: &Daemon, arguments: &[&str]) -> Ended {
    let mut all = vec!["verify", "--endpoint", daemon.endpoint()];
    all.extend(arguments);
    replicator(all)
}

/// The lines of its report, with its exit status and no other.
#[track_caller]
fn differences(ended: &Ended) -> Vec<Difference> {
    let lines = ended.stdout.lines();
    let found: Vec<Difference> = lines
        .map(|line| serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}")))
        .collect();
    assert_eq!(ended.code, Some(if found.is_empty() { 0 } else { 2 }), "{ended:#?}");
    found
}

/// Kinds and paths, in order.
fn names(differences: &[Difference]) -> Vec<(DifferenceKind, &str)> {
    let mut names: Vec<_> =
        differences.iter().map(|found| (found.kind, found.path.as_str())).collect();
    names.sort();
    names
}

/// Nothing differs, and everything was looked at.
#[track_caller]
fn assert_clean(daemon: &Daemon) -> Verification {
    let ended = verify(daemon, &[]);
    assert_eq!(differences(&ended), [], "{ended:#?}");
    let now = verification(daemon);
    assert_eq!((now.read_errors, now.running), (0, false), "{now:#?}");
    assert!(now.objects >= now.objects_expected, "{now:#?}");
    now
}

fn verification(daemon: &Daemon) -> Verification {
    daemon.status().source.unwrap().verification
}

/// The replica is the source, beside what was set aside.
#[track_caller]
fn assert_same(pair: &Pair) {
    let mut found = compare::compare(pair.source(), pair.replica(), compare::Options::default());
    // A name that was set aside may lead to a file of the replica.
    found.retain(|one| !compare::report(std::slice::from_ref(one)).contains("lost+found-"));
    assert!(found.is_empty(), "{}", compare::report(&found));
}

#[test]
fn a_bit_that_flipped_in_the_replica_is_found_and_put_right() {
    let (pair, door, daemon) = replicated(Layout::Two(Ext4, Xfs), "fanotify");
    let before = Timestamp::now();
    assert_clean(&daemon);
    door.flip("d/file-7", 3);
    door.flip("large", (LARGE - 5) as u64);
    door.flip("d/linked-1", 0);
    door.flip("d/e/big-linked", 300_000);
    let ended = verify(&daemon, &[]);
    let found = differences(&ended);
    let content = DifferenceKind::Content;
    let mut expected = vec![(content, "d/file-7"), (content, "d/linked-1"), (content, "large")];
    // Either of its names is the object's.
    let linked: Vec<_> = found.iter().map(|one| one.path.as_str()).collect();
    let big = if linked.contains(&"d/big-linked") { "d/big-linked" } else { "d/e/big-linked" };
    expected.push((content, big));
    if linked.contains(&"linked-2") {
        expected[1].1 = "linked-2";
    }
    expected.sort();
    assert_eq!(names(&found), expected, "{ended:#?}");
    assert!(found.iter().all(|one| one.repaired && one.source != one.replica), "{found:#?}");
    assert_same(&pair);
    let now = assert_clean(&daemon);
    assert!(now.last_verified_timestamp.is_some_and(|time| time > before), "{now:#?}");
    assert_eq!(now.differences.len(), 4, "status keeps the last differences: {now:#?}");
}

/// What the destination applied last waits in memory for the next batch: a pass that
/// begins before that looks at it all the same.
#[test]
fn what_was_replicated_last_is_looked_at_too() {
    let (pair, door, daemon) = replicated(Layout::Two(Ext4, Ext4), "fanotify");
    fs::write(pair.source().join("newest"), "as it is").unwrap();
    daemon.wait(patience());
    door.flip("newest", 3);
    let found = differences(&verify(&daemon, &["--no-repair"]));
    assert_eq!(names(&found), [(DifferenceKind::Content, "newest")]);
}

/// A store through a mapping that stays makes no event.
#[test]
fn stores_through_a_mapping_are_found_and_sent() {
    let (pair, _door, daemon) = replicated(Layout::Two(Ext4, Ext4), "fanotify");
    let map = |name: &str, length| {
        let file = fs::File::options().read(true).write(true).open(pair.source().join(name));
        Mapping::new(&OwnedFd::from(file.unwrap()), length).unwrap()
    };
    let mappings = [(map("d/file-3", 9), 2), (map("large", LARGE), 5 << 20)];
    daemon.wait(patience());
    for (mapping, offset) in &mappings {
        mapping.store(*offset, b"MAPPED").unwrap();
    }
    daemon.wait(patience());
    let stale = fs::read(pair.replica().join("d/file-3")).unwrap();
    assert_eq!(stale, b"content 3", "there was an event: this tests nothing");
    let found = differences(&verify(&daemon, &[]));
    let content = DifferenceKind::Content;
    let expected = [(content, "d/file-3"), (content, "large")];
    // The stores changed the times of modification too, which content includes.
    assert_eq!(names(&found), expected, "{found:#?}");
    assert!(found.iter().all(|one| one.repaired), "{found:#?}");
    assert_same(&pair);
    drop(mappings);
}

/// What somebody did to the replica past its protection, of each kind: told and
/// left alone when asked so, else put right, and nothing is thrown away.
#[test]
fn changes_past_the_protection_are_found_and_put_right() {
    use DifferenceKind::{Attributes, Content, Extra, Missing};
    let (pair, door, daemon) = replicated(Layout::Two(Xfs, Ext4), "fanotify");
    // Time stands still for directories: only what is meant differs.
    let directories: Vec<_> = ["", "d", "d/e", "d/e/f"].map(|name| door.path(name)).into();
    let times: Vec<_> =
        directories.iter().map(|path| fs::metadata(path).unwrap().modified().unwrap()).collect();
    fs::write(door.path("d/extra"), "precious").unwrap();
    fs::create_dir_all(door.path("extra/below")).unwrap();
    fs::write(door.path("extra/below/file"), "as precious").unwrap();
    fs::hard_link(door.path("d/file-0"), door.path("d/e/extra-link")).unwrap();
    fs::remove_file(door.path("d/file-1")).unwrap();
    fs::remove_dir_all(door.path("d/e/f")).unwrap();
    fs::remove_file(door.path("linked-2")).unwrap();
    // The link is split: another file of the same content.
    let copy = fs::read(door.path("d/e/big-linked")).unwrap();
    fs::remove_file(door.path("d/e/big-linked")).unwrap();
    fs::write(door.path("d/e/big-linked"), copy).unwrap();
    fs::write(door.path("new"), "replaced by rename").unwrap();
    fs::rename(door.path("new"), door.path("d/file-2")).unwrap();
    fs::rename(door.path("d/file-6"), door.path("d/moved-6")).unwrap();
    let mode = fs::Permissions::from_mode(0o4711);
    fs::set_permissions(door.path("d/file-3"), mode).unwrap();
    rustix::fs::setxattr(door.path("d/file-4"), "user.x", b"y", XattrFlags::empty()).unwrap();
    std::os::unix::fs::chown(door.path("empty"), Some(7), Some(8)).unwrap();
    set_mtime(&door.path("d/file-5"), SystemTime::UNIX_EPOCH);
    for (path, time) in directories.iter().zip(times).filter(|(path, _)| path.exists()) {
        set_mtime(path, time);
    }
    let expected = vec![
        (Missing, "d/e/big-linked"),
        (Missing, "d/e/f"),
        (Missing, "d/file-1"),
        (Missing, "d/file-2"),
        (Missing, "d/file-6"),
        (Missing, "linked-2"),
        (Extra, "d/e/extra-link"),
        (Extra, "d/extra"),
        (Extra, "d/moved-6"),
        (Extra, "extra"),
        (Attributes, "d/file-3"),
        (Attributes, "d/file-4"),
        (Attributes, "d/file-5"),
        (Attributes, "empty"),
    ];
    let before = compare::compare(pair.source(), pair.replica(), compare::Options::default());
    let found = differences(&verify(&daemon, &["--no-repair"]));
    assert_eq!(names(&found), expected, "{found:#?}");
    assert!(found.iter().all(|one| !one.repaired), "{found:#?}");
    let after = compare::compare(pair.source(), pair.replica(), compare::Options::default());
    assert_eq!(compare::report(&before), compare::report(&after), "--no-repair changed something");
    let unproven = verification(&daemon);
    assert_eq!(unproven.last_verified_timestamp, None, "{unproven:#?}");

    let found = differences(&verify(&daemon, &[]));
    assert_eq!(names(&found), expected, "{found:#?}");
    assert!(found.iter().all(|one| one.repaired), "{found:#?}");
    assert!(found.iter().all(|one| one.kind != Content), "{found:#?}");
    assert_clean(&daemon);
    assert_same(&pair);
    let link = |name: &str| fs::metadata(pair.replica().join(name)).unwrap().ino();
    assert_eq!(link("d/linked-1"), link("linked-2"), "the names lead to one file again");
    assert_eq!(link("d/big-linked"), link("d/e/big-linked"));
    let kept = set_aside(pair.replica());
    for precious in ["precious", "as precious", "replaced by rename", "content 6"] {
        assert!(kept.iter().any(|file| file == precious.as_bytes()), "{precious:?} is lost");
    }
}

/// The content of every file in lost+found.
fn set_aside(replica: &Path) -> Vec<Vec<u8>> {
    fn files(directory: &Path, into: &mut Vec<Vec<u8>>) {
        for entry in fs::read_dir(directory).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                files(&path, into);
            } else {
                into.push(fs::read(path).unwrap());
            }
        }
    }
    let mut all = Vec::new();
    for entry in fs::read_dir(replica).unwrap() {
        let entry = entry.unwrap();
        if entry.file_name().as_encoded_bytes().starts_with(b"efs-replication-lost+found-") {
            files(&entry.path(), &mut all);
        }
    }
    all
}

/// A false alarm is the worst that verification could do.
fn nothing_is_found_in_a_busy_tree(layout: Layout, watcher: &str) {
    let pair = Pair::new(layout);
    let daemon = pair.start_enabled(watcher);
    let time_limit = Duration::from_secs(6);
    let unlimited = replicator_tests::scenario::workload_for(watcher);
    let workload = Workload { steps: 100_000, rate: Some(400.0), time_limit, ..unlimited };
    let done = AtomicBool::new(false);
    let (passes, objects) = thread::scope(|scope| {
        let work = scope.spawn(|| {
            let report = workload.run(pair.source(), pair.outside());
            done.store(true, Ordering::Relaxed);
            report
        });
        let (mut passes, mut objects) = (0, 0);
        while !done.load(Ordering::Relaxed) {
            let ended = verify(&daemon, &["--no-repair", "--quiet"]);
            assert_eq!(differences(&ended), [], "{workload}\n{ended:#?}");
            passes += 1;
            objects += verification(&daemon).objects;
        }
        assert!(work.join().unwrap().done() > 500);
        (passes, objects)
    });
    assert!(passes > 0 && objects > 100, "{passes} passes over {objects} objects");
    pair.settle(&daemon, &workload);
    assert_clean(&daemon);
}

#[test]
fn nothing_is_found_in_a_busy_tree_fanotify() {
    nothing_is_found_in_a_busy_tree(Layout::Two(Ext4, Xfs), "fanotify");
}

#[test]
fn nothing_is_found_in_a_busy_tree_inotify() {
    nothing_is_found_in_a_busy_tree(Layout::Two(Btrfs, Ext4), "inotify");
}

/// Small files beside the others, for a pass of several steps.
const FILES: u64 = 1500;

/// A pass that was interrupted goes on where it was, and at its rate.
#[test]
fn a_pass_outlives_its_process_and_keeps_its_rate() {
    let (pair, door, daemon) = replicated(Layout::Two(Ext4, Ext4), "fanotify");
    for number in 0..FILES {
        fs::write(pair.source().join(format!("d/e/{number}")), "small").unwrap();
    }
    fs::remove_file(pair.source().join("large")).unwrap();
    daemon.wait(patience());
    door.flip("d/file-9", 1);
    // Each object counts as 16 KiB at least: some 23 seconds.
    let arguments = ["--rate", "1MiB", "--quiet"];
    let start = Instant::now();
    let before = thread::scope(|scope| {
        let command = scope.spawn(|| verify(&daemon, &arguments));
        let deadline = Instant::now() + patience();
        let now = loop {
            let now = verification(&daemon);
            if now.running && now.content > 0 && now.objects > 256 {
                break now;
            }
            assert!(Instant::now() < deadline, "{now:#?}");
            thread::sleep(Duration::from_millis(50));
        };
        // Its cursor is on disk by now.
        thread::sleep(Duration::from_secs(6));
        assert!(verification(&daemon).running, "1 MiB/s was promised");
        let second = verify(&daemon, &[]);
        assert_eq!(second.code, Some(1), "two passes at a time: {second:#?}");
        assert!(second.stderr.contains("under way"), "{second:#?}");
        rustix::process::kill_process(
            rustix::process::Pid::from_raw(daemon.id() as i32).unwrap(),
            rustix::process::Signal::KILL,
        )
        .unwrap();
        assert_eq!(command.join().unwrap().code, Some(1), "the daemon is gone");
        now
    });
    drop(daemon);
    let mut daemon = pair.start("fanotify");
    daemon.wait_enabled(patience());
    let now = daemon.poll_until(patience(), "the pass ends", |daemon| {
        let now = daemon.try_status()?.source?.verification;
        (!now.running).then_some(now)
    });
    assert_eq!((now.pass, now.started), (before.pass, before.started), "{now:#?}");
    assert_eq!((now.content, now.repaired, now.found()), (1, 1, 1), "{now:#?}");
    assert_eq!(now.last_verified_timestamp, now.started, "{now:#?}");
    // What one question covers, of 128 objects, may be met twice.
    let objects = now.objects_expected..=now.objects_expected + 128;
    assert!(objects.contains(&now.objects), "it began anew: {now:#?}");
    // Slower is no failure: faster would be.
    let least = Duration::from_secs(FILES * 16 / 1024 - 1);
    assert!(start.elapsed() > least, "{:?}", start.elapsed());
    assert_same(&pair);
}

/// A disk that cannot read is named, and the good copy is not taken for bad.
#[test]
fn what_cannot_be_read_is_named_and_left() {
    let (pair, door, daemon) = replicated(Layout::Two(Ext4, Btrfs), "fanotify");
    let needle = b"the only such line in the world, once and never again; ";
    let content: Vec<u8> = needle.iter().copied().cycle().take(100_000).collect();
    fs::write(pair.source().join("d/bad"), &content).unwrap();
    daemon.wait(patience());
    let file = fs::File::open(door.path("d/bad")).unwrap();
    run(Command::new("sync").arg("-f").arg(door.path("d/bad")));
    spoil_image(&pair.mounts()[1].image(), needle);
    rustix::fs::fadvise(&file, 0, None, Advice::DontNeed).unwrap();
    assert!(fs::read(door.path("d/bad")).is_err(), "the disk reads all the same");
    let ended = verify(&daemon, &[]);
    assert_eq!((ended.code, ended.stdout.as_str()), (Some(1), ""), "{ended:#?}");
    assert!(ended.stderr.contains("d/bad cannot be read: in the replica:"), "{ended:#?}");
    let now = verification(&daemon);
    assert_eq!((now.found(), now.read_errors), (0, 1), "{now:#?}");
    assert_eq!(now.last_verified_timestamp, None, "{now:#?}");
    assert_eq!(now.errors[0].path, "d/bad");
    assert!(now.objects >= now.objects_expected, "the rest was verified: {now:#?}");
    assert_eq!(fs::read(pair.source().join("d/bad")).unwrap(), content);
}

/// Flips a bit in the first two places of a file system's image where `needle`
/// stands; its checksums tell.
fn spoil_image(image: &Path, needle: &[u8]) {
    let bytes = fs::read(image).unwrap();
    let file = fs::File::options().write(true).open(image).unwrap();
    let mut at = 0;
    let mut spoilt = 0;
    while let Some(found) = bytes[at..].windows(needle.len()).position(|part| part == needle) {
        at += found;
        file.write_all_at(&[bytes[at] ^ 1], at as u64).unwrap();
        at += needle.len();
        spoilt += 1;
        if spoilt == 2 {
            break;
        }
    }
    assert!(spoilt > 0, "the content is not in the image");
}

/// Without anybody asking: found, put right, told on both sides; and again when
/// either daemon was killed.
#[test]
fn the_daemons_verify_by_themselves() {
    let strangers = Hosts::strangers_with(Ext4, Xfs, "verify_interval = \"1s\"\n");
    // Before the replica is protected.
    let door = BackDoor::new(strangers.replica());
    let mut hosts = strangers.enrol();
    for (round, killed) in Side::BOTH.into_iter().enumerate() {
        let name = format!("directory/file-{round}");
        fs::write(hosts.source().join(&name), format!("round {round}")).unwrap();
        hosts.settle(&round);
        hosts.kill(killed);
        door.flip(&name, 2);
        hosts.start(killed);
        let start = Timestamp::now();
        for side in [Side::Source, Side::Destination] {
            let found = await_verification(&hosts, side, |now| {
                now.differences.iter().any(|one| one.path == name && one.repaired)
                    && now.last_verified_timestamp.is_some_and(|time| time > start)
            });
            let of_it = found.differences.iter().filter(|one| one.path == name);
            assert_eq!(of_it.count(), 1, "found once: {found:#?}");
        }
        hosts.settle(&format!("after round {round}"));
    }
    let refused = hosts.on(Side::Destination, &["verify"]);
    assert_eq!(refused.code, Some(1), "{refused:#?}");
    assert!(refused.stderr.contains("only the source verifies"), "{refused:#?}");
    let described = hosts.on(Side::Source, &["describe-replication-configurations"]).json();
    let destination = &described["Replications"][0]["Destinations"][0];
    assert!(destination["LastReplicatedTimestamp"].is_number(), "{described}");
    // EFS's shapes have what EFS has.
    assert!(destination.get("LastVerifiedTimestamp").is_none(), "{described}");
    let status = hosts.on(Side::Destination, &["status"]).success();
    assert!(status.stdout.contains("  verified        up to 2"), "{}", status.stdout);
}

fn await_verification(
    hosts: &Hosts,
    side: Side,
    is_there: impl Fn(&Verification) -> bool,
) -> Verification {
    let deadline = Instant::now() + patience();
    loop {
        let status = hosts.daemon(side).try_status();
        let now = status.and_then(|status| status.source).map(|source| source.verification);
        match now {
            Some(now) if is_there(&now) => return now,
            now => assert!(Instant::now() < deadline, "{now:#?}"),
        }
        thread::sleep(Duration::from_millis(100));
    }
}
