//! The replica is read-only for everybody while the configuration exists, and
//! failover hands it over whole, at once, and without a trace of ours.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use replicator_common::status::EnforcementKind;
use replicator_tests::compare;
use replicator_tests::mounts::FileSystem::{Btrfs, Ext4, Tmpfs, Xfs};
use replicator_tests::mounts::{Mount, mount_points_below};
use replicator_tests::process::{Daemon, Ended, free_port, replicator};
use replicator_tests::scenario::{Layout, Pair, patience};
use replicator_tests::workload::Workload;
use rustix::fs::XattrFlags;
use rustix::io::Errno;

/// Everything that root could do to the replica, and what came of it.
fn attempts(replica: &Path) -> Vec<(&'static str, std::io::Result<()>)> {
    let file = replica.join("file");
    let xattr = rustix::fs::lsetxattr(&file, "user.x", b"", XattrFlags::empty());
    let open = fs::File::options().write(true).open(&file);
    vec![
        ("create", fs::write(replica.join("new"), "")),
        ("create below", fs::write(replica.join("directory/new"), "")),
        ("make directory", fs::create_dir(replica.join("made"))),
        ("write", open.map(drop)),
        ("chmod", fs::set_permissions(&file, fs::Permissions::from_mode(0o600))),
        ("chown", std::os::unix::fs::chown(&file, Some(1), None)),
        ("set xattr", xattr.map_err(Into::into)),
        ("rename", fs::rename(&file, replica.join("renamed"))),
        ("hard link", fs::hard_link(&file, replica.join("link"))),
        ("unlink", fs::remove_file(&file)),
        ("remove directory", fs::remove_dir_all(replica.join("directory"))),
    ]
}

#[track_caller]
fn assert_read_only(replica: &Path, when: &str) {
    for (what, result) in attempts(replica) {
        let error = result.expect_err(&format!("{when}: {what} was let through"));
        assert_eq!(Errno::from_io_error(&error), Some(Errno::ROFS), "{when}: {what}: {error}");
    }
}

#[track_caller]
fn assert_writable(replica: &Path) {
    // The hard link is made of what the rename before it took away, and so on:
    // each is refused at most for that reason, never because of EROFS.
    for (what, result) in attempts(replica) {
        let refused = result.err().and_then(|error| Errno::from_io_error(&error));
        assert_ne!(refused, Some(Errno::ROFS), "{what} after failover");
    }
}

/// A small tree, replicated.
fn replicated(layout: Layout) -> (Pair, Daemon) {
    let pair = Pair::new(layout);
    fs::create_dir(pair.source().join("directory")).unwrap();
    fs::write(pair.source().join("directory/below"), "content").unwrap();
    fs::write(pair.source().join("file"), "content").unwrap();
    let daemon = pair.start_enabled("auto");
    pair.settle(&daemon, &"before");
    (pair, daemon)
}

fn read_only_throughout(layout: Layout) {
    let (pair, daemon) = replicated(layout);
    let enforcement = daemon.status().destination.unwrap().enforcement;
    assert_eq!(enforcement.kind, EnforcementKind::Mount, "{}", enforcement.reason);
    let mounts = mount_points_below(pair.replica()).unwrap().len();
    assert_read_only(pair.replica(), "while it runs");
    assert!(daemon.interrupt().success());
    assert_read_only(pair.replica(), "when it is stopped");
    let daemon = pair.start_enabled("auto");
    assert_read_only(pair.replica(), "when it runs again");
    daemon.kill();
    assert_read_only(pair.replica(), "after kill -9");
    let daemon = pair.start_enabled("auto");
    fs::write(pair.source().join("file"), "changed").unwrap();
    pair.settle(&daemon, &"our own writes still pass");
    assert_read_only(pair.replica(), "after a restart");
    let after = mount_points_below(pair.replica()).unwrap().len();
    assert_eq!(after, mounts, "read-only mounts are stacked");
}

#[test]
fn read_only_on_a_mount_point_ext4() {
    read_only_throughout(Layout::Two(Ext4, Ext4));
}

#[test]
fn read_only_on_a_mount_point_xfs() {
    read_only_throughout(Layout::Two(Tmpfs, Xfs));
}

#[test]
fn read_only_on_a_directory_btrfs() {
    read_only_throughout(Layout::Same(Btrfs));
}

/// A reader with an open file and a working directory is not in the way.
#[test]
fn failover_with_readers() {
    let (pair, daemon) = replicated(Layout::Two(Ext4, Ext4));
    let held = fs::File::open(pair.replica().join("file")).unwrap();
    let mut reader = Command::new("sleep").arg("60").current_dir(pair.replica()).spawn().unwrap();
    let ended = failover_online(&daemon);
    reader.kill().unwrap();
    reader.wait().unwrap();
    assert_eq!(ended.code, Some(0), "{ended:#?}");
    drop(held);
    assert_writable(pair.replica());
}

fn failover_online(daemon: &Daemon) -> Ended {
    replicator(["failover", "--endpoint", daemon.endpoint()])
}

/// Nothing of ours is left, and the tree equals the source's to the last hard
/// link; only then is it written to.
#[track_caller]
fn assert_handed_over(pair: &Pair) {
    for entry in fs::read_dir(pair.replica()).unwrap() {
        let name = entry.unwrap().file_name();
        let ours = [".replicator", "efs-replication-lost+found"];
        let left = ours.iter().any(|o| name.as_encoded_bytes().starts_with(o.as_bytes()));
        assert!(!left, "left behind: {}", name.display());
    }
    compare::assert_same(pair.source(), pair.replica(), &"after failover");
    assert_writable(pair.replica());
}

#[test]
fn failover_while_running() {
    let (pair, daemon) = replicated(Layout::Two(Ext4, Xfs));
    let ended = failover_online(&daemon).success();
    assert!(!ended.stdout.is_empty(), "it says what was and was not replicated");
    assert_handed_over(&pair);
}

#[test]
fn failover_by_efs_operation() {
    let (pair, daemon) = replicated(Layout::Same(Ext4));
    let id = daemon.status().source_file_system_id;
    let path = format!("/2015-02-01/file-systems/{id}/replication-configuration");
    daemon.request("DELETE", &path, None).unwrap();
    assert_handed_over(&pair);
}

fn failover_offline(pair: &Pair) -> Ended {
    let state = pair.state_dir();
    replicator([Path::new("failover"), Path::new("--state-dir"), &state])
}

#[test]
fn failover_while_stopped() {
    let (pair, daemon) = replicated(Layout::Two(Ext4, Ext4));
    assert!(daemon.interrupt().success());
    let ended = failover_offline(&pair).success();
    assert!(ended.stdout.contains(pair.replica().to_str().unwrap()), "{ended:#?}");
    assert_handed_over(&pair);
    // A second time there is nothing to fail over, and nothing is harmed.
    let again = failover_offline(&pair);
    assert_eq!(again.code, Some(1), "{again:#?}");
    assert!(pair.replica().join("renamed").exists());
}

/// Killed while a workload runs, failed over without the source's help: the
/// replica is a state between batches, and what had arrived beyond it is in
/// lost+found, listed.
#[test]
fn failover_after_kill_in_the_middle() {
    let pair = Pair::new(Layout::Two(Ext4, Ext4));
    let daemon = pair.start_enabled("fanotify");
    let workload = Workload { steps: 2000, rate: Some(2000.0), ..Workload::new() };
    std::thread::scope(|scope| {
        scope.spawn(|| workload.run(pair.source(), pair.outside()));
        std::thread::sleep(Duration::from_millis(1500));
        daemon.kill();
    });
    let report = failover_offline(&pair).success();
    assert!(!report.stdout.is_empty());
    for entry in fs::read_dir(pair.replica()).unwrap() {
        let entry = entry.unwrap();
        let name = entry.file_name().into_encoded_bytes();
        assert!(!name.starts_with(b".replicator"), "a hidden directory is left");
        if name.starts_with(b"efs-replication-lost+found-") {
            let manifest = fs::read_to_string(entry.path().join("manifest.json")).unwrap();
            let parsed: serde_json::Value = serde_json::from_str(&manifest).unwrap();
            let left = fs::read_dir(entry.path()).unwrap().count();
            assert!(parsed.is_object() && left > 1, "an empty lost+found: {manifest}");
        }
    }
    fs::write(pair.replica().join("written"), "").unwrap();
}

/// The other direction: what was the replica is replicated to a third place.
#[test]
fn a_former_replica_becomes_a_source() {
    let (pair, daemon) = replicated(Layout::Two(Ext4, Xfs));
    failover_online(&daemon).success();
    drop(daemon);
    fs::write(pair.replica().join("after"), "written after failover").unwrap();
    let third = Mount::new(Ext4);
    let state = replicator_tests::mounts::Scratch::new("state");
    let port = free_port();
    let mut command = Command::new(replicator_tests::binary::replicator());
    command.arg("run").arg(pair.replica()).arg(third.path());
    command.arg("--state-dir").arg(state.path().join("state"));
    command.args(["--api", &format!("127.0.0.1:{port}")]);
    let log = state.path().join("log");
    let mut daemon = Daemon::spawn(command, &format!("http://127.0.0.1:{port}"), &log);
    daemon.wait_ready();
    daemon.wait_enabled(patience());
    daemon.wait(patience());
    compare::assert_same(pair.replica(), third.path(), &"former replica as a source");
    assert!(third.path().join("after").exists());
}

/// Failover takes as long as the staged rest needs, not as long as the tree is
/// large. A ratio of times on a shared machine says little; with trees whose
/// sizes differ by a factor of 200, a walk shows all the same.
#[test]
fn failover_of_a_large_tree_takes_no_longer() {
    let time = |files: usize| {
        let pair = Pair::alone(Layout::Two(Ext4, Ext4));
        for number in 0..files {
            let directory = pair.source().join(format!("directory-{}", number / 500));
            if number % 500 == 0 {
                fs::create_dir(&directory).unwrap();
            }
            fs::write(directory.join(format!("file-{number}")), "x").unwrap();
        }
        let daemon = pair.start_enabled("fanotify");
        daemon.wait(patience());
        assert!(daemon.interrupt().success());
        // What the initial sync left to be written is not the failover's.
        rustix::fs::sync();
        let start = Instant::now();
        failover_offline(&pair).success();
        start.elapsed()
    };
    let (small, large) = (time(100), time(20_000));
    let limit = small * 3 + Duration::from_millis(300);
    assert!(large < limit, "{large:?} for 20,000 files, {small:?} for 100");
}
