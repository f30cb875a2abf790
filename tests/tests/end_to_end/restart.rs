//! A restart copies nothing again.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::{Duration, Instant};

use replicator_tests::mounts::FileSystem::{Btrfs, Ext4, Tmpfs, Xfs};
use replicator_tests::process::{Daemon, free_port};
use replicator_tests::scenario::{self, Layout, Pair};
use replicator_tests::workload::{Workload, content};

/// When each object of a tree was last touched in any respect, by path: the
/// kernel's word, whatever the program's counters say.
fn touched(root: &Path) -> BTreeMap<std::path::PathBuf, (u64, i64, i64)> {
    fn walk(path: &Path, into: &mut BTreeMap<std::path::PathBuf, (u64, i64, i64)>) {
        for entry in fs::read_dir(path).unwrap() {
            let path = entry.unwrap().path();
            let stat = fs::symlink_metadata(&path).unwrap();
            if path.file_name().is_some_and(|n| n.as_encoded_bytes().starts_with(b".replicator-")) {
                continue;
            }
            into.insert(path.clone(), (stat.ino(), stat.ctime(), stat.ctime_nsec()));
            if stat.is_dir() {
                walk(&path, into);
            }
        }
    }
    let mut all = BTreeMap::new();
    walk(root, &mut all);
    all
}

/// A tree without the depths that [`touched`] cannot reach by path.
fn populate(root: &Path) {
    for directory in 0..20 {
        let path = root.join(format!("directory-{directory}/below"));
        fs::create_dir_all(&path).unwrap();
        for file in 0..20u64 {
            fs::write(path.join(format!("file-{file}")), content::bytes(file, 9000)).unwrap();
        }
        fs::hard_link(path.join("file-1"), path.join("link")).unwrap();
        std::os::unix::fs::symlink("below/file-1", path.with_file_name("symlink")).unwrap();
    }
    fs::write(root.join("large"), content::incompressible(1, 5 << 20)).unwrap();
    let sparse = fs::File::create(root.join("sparse")).unwrap();
    sparse.set_len(64 << 20).unwrap();
}

fn restart(layout: Layout, watcher: &str, stop: fn(Daemon)) {
    let pair = Pair::new(layout);
    populate(pair.source());
    let daemon = pair.start_enabled(watcher);
    // More is shipped than stands there in the end, so that "everything again"
    // cannot look like "nothing", whether counters go on or begin anew.
    let passing = pair.source().join("passing");
    fs::write(&passing, content::incompressible(2, 3 << 20)).unwrap();
    pair.settle(&daemon, &"before");
    fs::remove_file(&passing).unwrap();
    pair.settle(&daemon, &"removed");
    let (shipped, before) = (daemon.counters().bytes_shipped, touched(pair.replica()));
    stop(daemon);

    let mut daemon = pair.start(watcher);
    daemon.wait_enabled(scenario::patience());
    pair.settle(&daemon, &"after the restart");
    let after = daemon.counters().bytes_shipped;
    let again = after.checked_sub(shipped).unwrap_or(after);
    assert!(again == 0, "{again} bytes were shipped again ({shipped} before, {after} after)");
    let now = touched(pair.replica());
    let changed: Vec<_> =
        before.iter().filter(|(path, then)| now.get(*path) != Some(*then)).collect();
    assert!(changed.is_empty(), "the replica was written to: {changed:#?}");

    // And what is changed now still arrives.
    let workload = Workload { steps: 100, ..scenario::workload_for(watcher) };
    workload.run(pair.source(), pair.outside());
    pair.settle(&daemon, &workload);
}

#[test]
fn after_interrupt_ext4_fanotify() {
    restart(Layout::Two(Ext4, Ext4), "fanotify", |daemon| assert!(daemon.interrupt().success()));
}

#[test]
fn after_interrupt_xfs_inotify() {
    restart(Layout::Two(Xfs, Xfs), "inotify", |daemon| assert!(daemon.interrupt().success()));
}

#[test]
fn after_interrupt_btrfs_scan() {
    restart(Layout::Two(Btrfs, Btrfs), "scan", |daemon| assert!(daemon.interrupt().success()));
}

#[test]
fn after_kill_ext4_fanotify() {
    restart(Layout::Same(Ext4), "fanotify", Daemon::kill);
}

#[test]
fn after_kill_btrfs_inotify() {
    restart(Layout::Two(Btrfs, Xfs), "inotify", Daemon::kill);
}

#[test]
fn after_kill_tmpfs_fanotify() {
    restart(Layout::Two(Tmpfs, Tmpfs), "fanotify", Daemon::kill);
}

/// What was done while nothing ran: only that travels.
#[test]
fn changes_while_stopped_travel_alone() {
    let pair = Pair::new(Layout::Two(Ext4, Xfs));
    populate(pair.source());
    let daemon = pair.start_enabled("fanotify");
    pair.settle(&daemon, &"before");
    let shipped = daemon.counters().bytes_shipped;
    assert!(daemon.interrupt().success());

    let root = pair.source();
    fs::write(root.join("new"), content::incompressible(3, 100_000)).unwrap();
    fs::rename(root.join("directory-1"), root.join("directory-2/moved")).unwrap();
    fs::remove_dir_all(root.join("directory-3")).unwrap();
    fs::rename(root.join("large"), root.join("larger")).unwrap();
    fs::hard_link(root.join("larger"), root.join("directory-4/large-too")).unwrap();

    let daemon = pair.start("fanotify");
    pair.settle(&daemon, &"after");
    let after = daemon.counters().bytes_shipped;
    let since = after.checked_sub(shipped).unwrap_or(after);
    assert!((100_000..110_000).contains(&since), "{since} bytes for 100000 that are new");
}

/// Dying while the pair is made, at any moment, leaves nothing that the next
/// start would refuse.
#[test]
fn killed_while_the_pair_is_made() {
    for moment in 0..9 {
        killed_when(&format!("after {} ms", 12 * moment), |_| {
            std::thread::sleep(Duration::from_millis(12 * moment));
        });
    }
}

/// The replica's half is there, the source's is not, or was just made.
#[test]
fn killed_between_the_halves_of_a_pair() {
    for _ in 0..5 {
        killed_when("once enrolled", |log| {
            let end = Instant::now() + scenario::patience();
            while !fs::read_to_string(log).is_ok_and(|said| said.contains("enrolled source")) {
                assert!(Instant::now() < end, "never enrolled");
            }
        });
    }
}

fn killed_when(when: &str, wait: impl FnOnce(&Path)) {
    let pair = Pair::new(Layout::Two(Tmpfs, Tmpfs));
    fs::write(pair.source().join("file"), "content").unwrap();
    let port = free_port();
    let command = pair.command(port, &["--watcher", "fanotify"]);
    let log = pair.state_dir().with_extension("log");
    let daemon = Daemon::spawn(command, &format!("http://127.0.0.1:{port}"), &log);
    wait(&log);
    daemon.kill();
    let daemon = pair.start_enabled("fanotify");
    pair.settle(&daemon, &format!("killed {when}"));
}
