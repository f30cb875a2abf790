//! Directories that nothing tells of, for real: the user has too few watches. What
//! is not told is walked, and status says so. (Overflows and processes that are
//! killed: `workloads`; changes while nothing runs: `restart`, `handover`.)

use std::fs;
use std::process::Command;
use std::time::Duration;

use replicator_tests::mounts::FileSystem::{Ext4, Tmpfs};
use replicator_tests::process::{Daemon, free_port};
use replicator_tests::scenario::{Layout, Pair, patience};

/// A user namespace whose limits of watches are set by `limits`.
fn start_limited(pair: &Pair, limits: &str) -> Daemon {
    let port = free_port();
    let command = pair.command(port, &["--watcher", "inotify"]);
    let mut limited = Command::new("unshare");
    limited.args(["--user", "--map-root-user", "sh", "-ec"]);
    limited.arg(format!("cd /proc/sys/user; {limits}; cd /; exec \"$@\"")).arg("sh");
    limited.arg(command.get_program()).args(command.get_args());
    let log = pair.outside().join("log");
    let mut daemon = Daemon::spawn(limited, &format!("http://127.0.0.1:{port}"), &log);
    daemon.wait_ready();
    daemon.wait_enabled(patience());
    daemon
}

/// Fewer watches than directories: what is not watched is walked, and said.
fn too_few_watches(limits: &str, reason: &str) {
    let pair = Pair::new(Layout::Two(Ext4, Tmpfs));
    let directory = |number: usize| pair.source().join(format!("directory-{number}"));
    for number in 0..20 {
        fs::create_dir(directory(number)).unwrap();
        fs::write(directory(number).join("f"), "before").unwrap();
    }
    let mut daemon = start_limited(&pair, limits);
    let report = daemon.poll_until(patience(), "status says it", |daemon| {
        let report = daemon.try_status()?.source?.watcher;
        report.doubts.iter().any(|doubt| doubt.contains(reason)).then_some(report)
    });
    assert!(report.watches.is_some_and(|count| (1..20).contains(&count)), "{report:?}");
    for number in 0..20 {
        fs::write(directory(number).join("f"), format!("after {number}")).unwrap();
        fs::create_dir_all(directory(number).join("new/below")).unwrap();
        fs::write(directory(number).join("new/below/f"), "new").unwrap();
    }
    // Not at the next walk in a minute: somebody waits.
    daemon.wait(Duration::from_secs(40).min(patience()));
    pair.settle(&daemon, &"too few watches");
    fs::remove_dir_all(directory(19)).unwrap();
    fs::rename(directory(18), directory(17).join("moved")).unwrap();
    pair.settle(&daemon, &"too few watches, once more");
}

#[test]
fn too_few_fanotify_marks() {
    too_few_watches("echo 8 >max_fanotify_marks", "max_user_marks is reached");
}

#[test]
fn too_few_inotify_watches() {
    too_few_watches(
        "echo 0 >max_fanotify_groups; echo 8 >max_inotify_watches",
        "max_user_watches is reached",
    );
}
