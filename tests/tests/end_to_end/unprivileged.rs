//! Source and destination as a user who is not root.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use replicator_common::status::ReplicationStatus;
use replicator_common::time::Timestamp;
use replicator_tests::binary;
use replicator_tests::compare::{self, Aspect};
use replicator_tests::disks::{await_named, watermark};
use replicator_tests::mounts::FileSystem::{self, Btrfs, Ext4, Xfs};
use replicator_tests::mounts::Mount;
use replicator_tests::process::{Daemon, free_port, run_to_end};
use replicator_tests::scenario::patience;
use replicator_tests::serial;

/// A user without rights, `nobody` on most systems.
const USER: &str = "65534";

fn as_user(program: &Path) -> Command {
    let mut command = Command::new("setpriv");
    command.args(["--reuid", USER, "--regid", USER, "--clear-groups", "--"]).arg(program);
    command
}

/// A shell script, run in `directory`.
#[track_caller]
fn script(directory: &Path, text: &str) {
    let mut command = as_user(Path::new("sh"));
    command.args(["-ec", text]).current_dir(directory);
    run_to_end(command, Duration::from_secs(30)).success();
}

/// Brings the replica to what the source is, and compares.
#[track_caller]
fn once(base: &Path, step: &str) {
    run_once(base, &[]);
    compare::assert_same(&base.join("source"), &base.join("replica"), &step);
}

#[track_caller]
fn run_once(base: &Path, arguments: &[&str]) {
    let (source, replica) = (base.join("source"), base.join("replica"));
    let mut command = as_user(binary::replicator());
    command.arg("run").arg(&source).arg(&replica).arg("--state-dir").arg(base.join("state"));
    command.args(["--api", "127.0.0.1:0", "--watcher", "inotify", "--once"]);
    command.args(arguments);
    let ended = run_to_end(command, patience());
    assert!(!ended.stderr.contains("somebody else"), "{}", ended.stderr);
    ended.success();
}

fn changes_where_the_owner_may_not_write(kind: FileSystem) {
    let _share = serial::share();
    let mount = Mount::new(kind);
    let base = mount.path().join("user");
    std::fs::create_dir(&base).unwrap();
    std::os::unix::fs::chown(&base, Some(65534), Some(65534)).unwrap();
    script(
        &base,
        "mkdir -p source/a/b source/c/moved source/dark/below
         for d in a a/b c c/moved dark dark/below; do echo $d > source/$d/file; done
         head -c 1000000 /dev/urandom > source/c/large
         chmod 0400 source/c/large
         chmod 0400 source/a/file
         chmod 0500 source/a/b source/a source/c/moved source/c source/dark/below source/dark",
    );
    once(&base, "first");
    script(
        &base,
        "chmod 0700 source/a source/a/b source/c source/c/moved
         echo new > source/a/new; rm source/a/b/file; ln source/a/new source/c/link
         mv source/c/moved source/a/moved; mkdir source/a/b/made; echo x > source/a/b/made/x
         chmod 0600 source/c/large
         printf changed | dd of=source/c/large bs=1 seek=500000 conv=notrunc 2>/dev/null
         chmod 0400 source/c/large
         chmod 0500 source/a/b/made source/a/b source/a/moved source/a source/c source",
    );
    once(&base, "names change in directories of mode 0500");
    script(
        &base,
        "chmod 0700 source source/a source/a/b source/c; mv source/c/large source/a/b/large
         mv source/a/b source/b; rm source/c/link source/c/file; rmdir source/c
         chmod 0500 source/a source/b source",
    );
    once(&base, "trees move and go");

    let mut failover = as_user(binary::replicator());
    failover.args(["failover", "--state-dir"]).arg(base.join("state"));
    run_to_end(failover, patience()).success();
    compare::assert_same(&base.join("source"), &base.join("replica"), &"after failover");
}

#[test]
fn changes_where_the_owner_may_not_write_ext4() {
    changes_where_the_owner_may_not_write(Ext4);
}

#[test]
fn changes_where_the_owner_may_not_write_xfs() {
    changes_where_the_owner_may_not_write(Xfs);
}

#[test]
fn changes_where_the_owner_may_not_write_btrfs() {
    changes_where_the_owner_may_not_write(Btrfs);
}

/// The destination knows a file of several names by one of them. That one goes,
/// while the file changes under another.
#[test]
fn a_name_goes_and_the_file_changes() {
    let _share = serial::share();
    let mount = Mount::new(Ext4);
    let base = mount.path().join("user");
    std::fs::create_dir(&base).unwrap();
    std::os::unix::fs::chown(&base, Some(65534), Some(65534)).unwrap();
    script(
        &base,
        "mkdir -p source/a source/b source/c
         for n in 1 2 3; do echo $n > source/a/$n; ln source/a/$n source/b/$n; done",
    );
    once(&base, "two names each");
    script(
        &base,
        "rm source/a/1; chmod 0640 source/b/1; rm source/b/2; chmod 0640 source/a/2
         rm source/a/3; echo more >> source/b/3; ln source/b/3 source/c/3",
    );
    once(&base, "one of them goes");
    script(&base, "mv source/b source/c/b; rm source/c/3; echo more >> source/c/b/3");
    once(&base, "the directory of the other moves");
    script(&base, "ln source/a/2 source/c/2; mv source/a source/c/a; rm source/c/a/2");
    once(&base, "the first goes with its directory");
}

/// The state is lost; what stands in the replica is adopted, all levels of it
/// at once, and only differences travel.
#[test]
fn a_replica_is_reconciled() {
    let _share = serial::share();
    let mount = Mount::new(Ext4);
    let base = mount.path().join("user");
    std::fs::create_dir(&base).unwrap();
    std::os::unix::fs::chown(&base, Some(65534), Some(65534)).unwrap();
    script(
        &base,
        "mkdir -p source/a/b/c source/d
         for d in a a/b a/b/c d; do echo $d > source/$d/file; ln source/$d/file source/$d/link; done
         head -c 1000000 /dev/urandom > source/a/b/large",
    );
    once(&base, "first");
    script(
        &base,
        "rm -r state; echo new > source/a/b/c/new; echo more >> source/a/b/file
         rm source/d/file; mv source/d source/a/b/c/d; ln source/a/file source/a/b/other
         echo more >> source/a/b/large; chmod 0700 source/a/b/c",
    );
    run_once(&base, &["--reconcile"]);
    let mut found =
        compare::compare(&base.join("source"), &base.join("replica"), compare::Options::default());
    // What the source lacks is set aside, which changes the root's time.
    found.retain(|one| {
        !one.path.starts_with(b"efs-replication-lost+found-") && !one.path.is_empty()
    });
    assert!(found.is_empty(), "{}", compare::report(&found));
}

/// What the source's user may not read is named with the reason and what to do;
/// all else goes on, and it comes by itself once it may be read.
#[test]
fn what_may_not_be_read_is_named_and_comes_later() {
    let _share = serial::share();
    let mount = Mount::new(Ext4);
    let base = mount.path().join("user");
    std::fs::create_dir(&base).unwrap();
    std::os::unix::fs::chown(&base, Some(65534), Some(65534)).unwrap();
    script(&base, "mkdir -p source/open; echo 1 > source/open/before");
    // Of root, for nobody: made as root, before the daemon runs.
    let source = base.join("source");
    let shut = |name: &str, bytes: usize| {
        let path = source.join(name);
        std::fs::write(&path, vec![b'x'; bytes]).unwrap();
        mode(&path, 0);
    };
    shut("roots", 5000);
    shut("roots-large", 2_000_000);
    std::fs::create_dir_all(source.join("dark/below")).unwrap();
    shut("dark/file", 5000);
    std::fs::write(source.join("dark/below/file"), "below").unwrap();
    mode(&source.join("dark"), 0);

    let (port, log) = (free_port(), mount.path().join("log"));
    let mut command = as_user(binary::replicator());
    command.arg("run").arg(&source).arg(base.join("replica"));
    command.arg("--state-dir").arg(base.join("state"));
    command.args(["--api", &format!("127.0.0.1:{port}"), "--watcher", "inotify"]);
    let mut daemon = Daemon::spawn(command, &format!("http://127.0.0.1:{port}"), &log);
    daemon.wait_ready();
    let words = ["ermission denied", "let the daemon's user read it"];
    for name in ["roots", "roots-large", "dark"] {
        await_named(&mut daemon, name, &words);
    }
    // While it runs: the user's own files, which get their content when nobody
    // may open them any more, and a directory that nobody could list before.
    script(
        &base,
        "mkdir later; echo f > later/file; chmod 0300 later; mv later source/later
         (chmod 0 source/own; echo own >&3) 3> source/own
         (chmod 0 source/own-large; head -c 2000000 /dev/urandom >&3) 3> source/own-large
         echo 2 > source/open/while; echo changed > source/open/before",
    );
    let written = Timestamp::now();
    for name in ["own", "own-large", "later"] {
        await_named(&mut daemon, name, &words);
    }
    for name in ["open/while", "open/before"] {
        daemon.poll_until(patience(), &format!("{name} goes on"), |_| {
            let (here, there) = (source.join(name), base.join("replica").join(name));
            (std::fs::read(here).ok() == std::fs::read(there).ok()).then_some(())
        });
    }
    let claimed = watermark_or_never(&daemon);
    assert!(
        claimed < written,
        "{claimed} is claimed, and what was written at {written} is not there"
    );

    for name in ["roots", "roots-large", "own", "own-large", "dark/file"] {
        mode(&source.join(name), 0o644);
    }
    for name in ["dark", "later"] {
        mode(&source.join(name), 0o755);
    }
    daemon.poll_until(patience(), "all can be read", |daemon| {
        daemon.try_wait(Duration::from_secs(5)).ok()
    });
    let differs = compare::compare(&source, &base.join("replica"), compare::Options::default());
    // An owner that is not root cannot give files to root.
    let owned = |one: &compare::Difference| matches!(one.aspect, Aspect::Owner | Aspect::Group);
    let differs: Vec<_> = differs.into_iter().filter(|one| !owned(one)).collect();
    assert!(differs.is_empty(), "{}", compare::report(&differs));
    daemon.poll_until(patience(), "nothing waits any more", |daemon| {
        let status = daemon.try_status()?;
        let none = status.source.as_ref()?.blocked_by.is_empty();
        (none && status.status == ReplicationStatus::Enabled).then_some(())
    });
    assert!(watermark(&daemon) > written);
    assert!(daemon.interrupt().success());
}

fn mode(path: &Path, mode: u32) {
    use std::os::unix::fs::PermissionsExt;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
}

/// Before the initial sync is through, nothing is claimed.
fn watermark_or_never(daemon: &Daemon) -> Timestamp {
    daemon.status().destination.and_then(|there| there.last_replicated).unwrap_or(Timestamp::NEVER)
}
