//! A random workload of a user without any privilege: source and destination
//! run as that user too. Objects are then opened by the names that lead to
//! them, which go stale whenever somebody renames.

use std::fs;
use std::os::unix::fs::chown;
use std::path::PathBuf;
use std::process::Command;
use std::thread;

use replicator_tests::binary;
use replicator_tests::compare;
use replicator_tests::mounts::FileSystem::{self, Btrfs, Ext4, Xfs};
use replicator_tests::mounts::{Mount, Scratch};
use replicator_tests::process::{Daemon, free_port};
use replicator_tests::scenario::patience;
use replicator_tests::serial::{self, Share};
use replicator_tests::workload::{Report, Workload};
use rustix::process::{Gid, Uid};
use rustix::thread::{set_thread_gid, set_thread_groups, set_thread_uid};

/// A user without rights, `nobody` on most systems.
const USER: u32 = 65534;

/// What such a user may not do, or shuts itself out with: a file whose mode
/// does not let its owner read it waits until it does.
const WITHOUT: &[&str] =
    &["OutsideLink", "TmpFile", "Mode", "Owner", "Acl", "Capability", "Special"];

/// Source and replica that belong to the user.
struct Pair {
    // Dropped in this order: mounts before the lock that says how many run.
    state: Scratch,
    source: Mount,
    replica: Mount,
    _share: Share,
}

impl Pair {
    fn new(from: FileSystem, to: FileSystem) -> Self {
        let share = serial::share();
        let (source, replica) = (Mount::new(from), Mount::new(to));
        let state = Scratch::new("state");
        let made = [source.path().join("source"), source.path().join("outside")];
        made.iter().for_each(|path| fs::create_dir(path).unwrap());
        for path in [state.path(), replica.path(), &made[0], &made[1]] {
            chown(path, Some(USER), Some(USER)).unwrap();
        }
        Self { state, source, replica, _share: share }
    }

    fn source(&self) -> PathBuf {
        self.source.path().join("source")
    }

    /// `replicator run` as the user, without a single capability.
    fn start(&self) -> Daemon {
        let port = free_port();
        let mut command = Command::new("setpriv");
        let user = USER.to_string();
        command.args(["--reuid", &user, "--regid", &user, "--clear-groups"]);
        command.args(["--bounding-set=-all", "--inh-caps=-all", "--"]).arg(binary::replicator());
        command.arg("run").arg(self.source()).arg(self.replica.path());
        command.arg("--state-dir").arg(self.state.path().join("state"));
        command.args(["--api", &format!("127.0.0.1:{port}"), "--watcher", "inotify"]);
        // It deletes more than an operator would want unseen.
        command.args(["--halt-deletions-percent", "0"]);
        let endpoint = format!("http://127.0.0.1:{port}");
        let mut daemon = Daemon::spawn(command, &endpoint, &self.state.path().join("log"));
        daemon.wait_ready();
        daemon
    }

    fn run(&self, workload: &Workload) -> Report {
        let (source, outside) = (self.source(), self.source.path().join("outside"));
        as_user(|| workload.run(&source, &outside))
    }

    #[track_caller]
    fn settle(&self, daemon: &Daemon, context: &str) {
        daemon.wait(patience());
        compare::assert_same(&self.source(), self.replica.path(), &context);
    }
}

/// Runs something in a thread that is the user's: what it starts is, too.
fn as_user<T: Send>(work: impl FnOnce() -> T + Send) -> T {
    thread::scope(|scope| {
        let user = scope.spawn(|| {
            set_thread_groups(&[]).unwrap();
            set_thread_gid(Gid::from_raw(USER)).unwrap();
            set_thread_uid(Uid::from_raw(USER)).unwrap();
            work()
        });
        user.join().unwrap()
    })
}

fn next(workload: &Workload) -> Workload {
    Workload { seed: workload.seed.wrapping_add(1), ..workload.clone() }
}

/// What stands before the start, changes during the initial sync, changes while
/// it is ENABLED.
fn continuous(from: FileSystem, to: FileSystem) {
    let pair = Pair::new(from, to);
    let workload = Workload { steps: 300, without: WITHOUT, ..Workload::new() };
    pair.run(&workload);

    let mut daemon = pair.start();
    let workload = Workload { steps: 500, ..next(&workload) };
    pair.run(&workload);
    pair.settle(&daemon, &format!("initial sync, {workload}"));
    daemon.wait_enabled(patience());

    let workload = next(&workload);
    let report = pair.run(&workload);
    pair.settle(&daemon, &format!("continuous, {workload}"));
    assert!(report.done() > 300, "too little was done: {report:#?}");
    let status = daemon.status();
    let (source, destination) = (status.source.unwrap(), status.destination.unwrap());
    assert_eq!(source.skipped.unreadable, []);
    assert_eq!(destination.last_error, None);
    assert_eq!(destination.orphans, 0, "nothing is being moved: {destination:#?}");
    assert!(daemon.interrupt().success(), "a clean stop is no failure");
}

#[test]
fn ext4_to_xfs() {
    continuous(Ext4, Xfs);
}

#[test]
fn xfs_to_ext4() {
    continuous(Xfs, Ext4);
}

#[test]
fn btrfs_to_ext4() {
    continuous(Btrfs, Ext4);
}
