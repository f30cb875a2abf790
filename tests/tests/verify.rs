//! Verification: what events cannot tell of, and what came past the protection,
//! is found, told and put right; and what only changes is left alone.

use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, SystemTime};

use replicator_common::time::Timestamp;
use replicator_common::verification::{Difference, DifferenceKind, Verification};
use replicator_tests::compare;
use replicator_tests::mounts::FileSystem::{Btrfs, Ext4, Xfs};
use replicator_tests::mounts::{Scratch, run};
use replicator_tests::process::{Daemon, Ended, replicator};
use replicator_tests::scenario::{Layout, Pair, patience};
use replicator_tests::workload::content;

/// Larger than what is sent as a whole, and than one question about content.
const LARGE: usize = 9 << 20;

/// A way into the replica past its protection: a second mount of its file system,
/// made before.
#[derive(Debug)]
struct BackDoor {
    point: PathBuf,
    _scratch: Scratch,
}

impl BackDoor {
    fn new(replica: &Path) -> Self {
        let scratch = Scratch::new("back-door");
        let point = scratch.path().join("replica");
        fs::create_dir(&point).unwrap();
        run(Command::new("mount").arg("--bind").arg(replica).arg(&point));
        Self { point, _scratch: scratch }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.point.join(name)
    }

    /// Does something to a file, and sets its time as it was.
    fn unnoticed(&self, name: &str, change: impl FnOnce(&Path)) {
        let path = self.path(name);
        let before = fs::metadata(&path).unwrap().modified().unwrap();
        change(&path);
        set_mtime(&path, before);
    }

    /// Flips one bit, as a disk does.
    fn flip(&self, name: &str, offset: u64) {
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
    found.retain(|difference| !difference.path.starts_with(b"efs-replication-lost+found-"));
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
    let mut expected =
        vec![(content, "d/file-7"), (content, "d/linked-1"), (content, "large")];
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
