//! A replica that is not empty becomes the source's: only differences travel,
//! and what the source lacks is kept in lost+found.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use replicator_tests::compare;
use replicator_tests::mounts::FileSystem::{Ext4, Xfs};
use replicator_tests::process::Daemon;
use replicator_tests::scenario::{Layout, Pair, patience};
use replicator_tests::workload::content;

/// Larger than what is sent as a whole, so that it is compared by chunks.
const LARGE: usize = 400_000;

fn reconcile(pair: &Pair) -> Daemon {
    let mut daemon = pair.start_with(&["--reconcile", "--watcher", "fanotify"]);
    daemon.wait_enabled(patience());
    daemon.wait(patience());
    daemon
}

/// The replica is the source beside what was set aside.
#[track_caller]
fn assert_same(pair: &Pair) {
    let mut found = compare::compare(pair.source(), pair.replica(), compare::Options::default());
    found.retain(|difference| {
        let path = &difference.path;
        // lost+found is a new name in the root, which changes the root's time.
        !path.starts_with(b"efs-replication-lost+found-") && !path.is_empty()
    });
    assert!(found.is_empty(), "{}", compare::report(&found));
}

/// The content of every file in lost+found, the manifest aside.
fn set_aside(pair: &Pair) -> BTreeSet<Vec<u8>> {
    fn files(directory: &Path, into: &mut Vec<PathBuf>) {
        for entry in fs::read_dir(directory).unwrap() {
            let entry = entry.unwrap();
            let kind = entry.file_type().unwrap();
            if kind.is_dir() {
                files(&entry.path(), into);
            } else if kind.is_file() {
                into.push(entry.path());
            }
        }
    }
    let mut all = Vec::new();
    for entry in fs::read_dir(pair.replica()).unwrap() {
        let entry = entry.unwrap();
        if entry.file_name().as_encoded_bytes().starts_with(b"efs-replication-lost+found-") {
            files(&entry.path(), &mut all);
        }
    }
    all.retain(|path| path.file_name().is_none_or(|name| name != "manifest.json"));
    all.iter().map(|path| fs::read(path).unwrap()).collect()
}

fn bytes(seed: u64) -> Vec<u8> {
    content::incompressible(seed, LARGE)
}

/// Writes one content under several names of one file.
fn linked(root: &Path, names: &[&str], content: &[u8]) {
    fs::write(root.join(names[0]), content).unwrap();
    for name in &names[1..] {
        fs::hard_link(root.join(names[0]), root.join(name)).unwrap();
    }
}

fn apart(root: &Path, names: &[&str], content: &[u8]) {
    names.iter().for_each(|name| fs::write(root.join(name), content).unwrap());
}

/// The same links, other links, copies instead of links, links instead of
/// copies, names too many: the replica's names lead to files as the source's do.
#[test]
fn hard_links() {
    let pair = Pair::new(Layout::Two(Ext4, Xfs));
    let (source, replica) = (pair.source(), pair.replica());
    for root in [source, replica] {
        fs::create_dir(root.join("d")).unwrap();
        linked(root, &["same-1", "d/same-2", "same-3"], &bytes(1));
    }
    linked(source, &["copied-1", "d/copied-2"], &bytes(2));
    apart(replica, &["copied-1", "d/copied-2"], &bytes(2));
    apart(source, &["joined-1", "joined-2"], b"two files on the source");
    linked(replica, &["joined-1", "joined-2"], b"two files on the source");
    linked(source, &["x-1", "x-2"], b"x on the source");
    linked(source, &["y-1", "y-2"], b"y on the source");
    linked(replica, &["x-1", "y-1"], b"x-1 and y-1 on the replica");
    linked(replica, &["x-2", "y-2"], b"x-2 and y-2 on the replica");
    linked(source, &["fewer-1"], &bytes(3));
    linked(replica, &["fewer-1", "fewer-2", "d/fewer-3"], &bytes(3));
    fs::create_dir(replica.join("extra")).unwrap();
    linked(replica, &["extra/only-here", "extra/twice"], b"only on the replica");

    let daemon = reconcile(&pair);
    assert_same(&pair);
    let shipped = daemon.counters().bytes_shipped;
    assert!(shipped < 10_000, "{shipped} bytes: what is the same travels");
    let kept = set_aside(&pair);
    for precious in [&b"only on the replica"[..], b"x-2 and y-2 on the replica", &bytes(2)] {
        assert!(kept.contains(precious), "of {} that are kept, none is it", kept.len());
    }
    // And it stays so when links are written through and broken.
    fs::write(source.join("d/same-2"), "written through a link").unwrap();
    fs::remove_file(source.join("copied-1")).unwrap();
    daemon.wait(patience());
    assert_same(&pair);
    let kept_after = set_aside(&pair);
    assert!(kept_after.is_superset(&kept), "what was set aside is written to");
}

/// Changed files, missing ones, other kinds under the same names.
#[test]
fn differences_alone_travel() {
    let pair = Pair::new(Layout::Two(Ext4, Ext4));
    let (source, replica) = (pair.source(), pair.replica());
    for root in [source, replica] {
        fs::create_dir_all(root.join("d/e/f")).unwrap();
        for number in 0..20 {
            fs::write(root.join(format!("d/e/same-{number}")), bytes(number)).unwrap();
        }
    }
    let mut changed = bytes(3);
    changed[200_000..200_004].copy_from_slice(b"here");
    fs::write(replica.join("d/e/same-3"), &changed).unwrap();
    fs::write(source.join("d/e/f/new"), "new").unwrap();
    fs::create_dir_all(source.join("kind/inside")).unwrap();
    fs::write(replica.join("kind"), "a file on the replica").unwrap();
    fs::write(source.join("other-kind"), "a file on the source").unwrap();
    fs::create_dir_all(replica.join("other-kind/deep")).unwrap();
    fs::write(replica.join("other-kind/deep/file"), "below a directory").unwrap();
    std::os::unix::fs::symlink("here", source.join("link")).unwrap();
    std::os::unix::fs::symlink("elsewhere", replica.join("link")).unwrap();

    let daemon = reconcile(&pair);
    assert_same(&pair);
    let shipped = daemon.counters().bytes_shipped;
    assert!(shipped < 256 << 10, "{shipped} bytes: what is the same travels");
    let kept = set_aside(&pair);
    for precious in [&b"a file on the replica"[..], b"below a directory"] {
        assert!(kept.contains(precious));
    }
}

/// More entries than the parts of an inventory that are under way at a time.
#[test]
fn a_replica_of_many_parts() {
    const FILES: usize = 6_000;
    let pair = Pair::new(Layout::Two(Ext4, Ext4));
    for root in [pair.source(), pair.replica()] {
        for number in 0..FILES {
            let directory = root.join(format!("d-{}/e-{}", number % 7, number % 31));
            if number < 7 * 31 {
                fs::create_dir_all(&directory).unwrap();
            }
            fs::write(directory.join(format!("f-{number}")), format!("{number}")).unwrap();
        }
    }
    fs::write(pair.source().join("d-3/new"), "new").unwrap();
    fs::write(pair.replica().join("d-3/extra"), "extra").unwrap();
    let daemon = reconcile(&pair);
    assert_same(&pair);
    assert_eq!(daemon.counters().bytes_shipped, 3, "only what is new");
    assert_eq!(set_aside(&pair), BTreeSet::from([b"extra".to_vec()]));
}
