//! A source that vanishes, is emptied, or loses much of what it held: the
//! replica does not follow before the operator says so.

use std::fs;
use std::path::Path;
use std::time::Duration;

use replicator_common::status::ReplicationStatus;
use replicator_tests::compare;
use replicator_tests::mounts::FileSystem::Ext4;
use replicator_tests::process::{Daemon, replicator};
use replicator_tests::scenario::{Layout, Pair, patience};

/// Files of the tree.
const FILES: usize = 4000;
/// Of them, in the directory that goes.
const MANY: usize = 3000;

/// `many` with 3,000 files and `few` with 1,000.
fn populate(root: &Path) {
    for (name, files) in [("many", MANY), ("few", FILES - MANY)] {
        let directory = root.join(name);
        fs::create_dir(&directory).unwrap();
        for file in 0..files {
            fs::write(directory.join(format!("file-{file}")), file.to_string()).unwrap();
        }
    }
}

fn enabled() -> (Pair, Daemon) {
    let pair = Pair::new(Layout::Two(Ext4, Ext4));
    populate(pair.source());
    let daemon = pair.start_enabled("fanotify");
    pair.settle(&daemon, &"populated");
    (pair, daemon)
}

fn post(daemon: &Daemon, operation: &str) {
    let path = format!("/replicator/v1/{operation}");
    daemon.request("POST", &path, Some(serde_json::json!({}))).unwrap();
}

fn files(directory: &Path) -> usize {
    fs::read_dir(directory).map_or(0, Iterator::count)
}

/// Waits until it says HALTED; checks all that it says then.
#[track_caller]
fn await_halted(daemon: &mut Daemon) {
    let status = daemon.poll_until(patience(), "the status is HALTED", |daemon| {
        daemon.try_status().filter(|status| status.status == ReplicationStatus::Halted)
    });
    let message = status.status_message.expect("it says why");
    assert!(message.contains("replicator resume --accept-deletions"), "{message}");
    daemon.poll_until(patience(), "BlockedBy says so", |daemon| {
        let blocked = daemon.status().source?.blocked_by;
        blocked.iter().any(|blocker| blocker.reason.starts_with("halted: ")).then_some(())
    });
    let error = daemon.try_wait(patience()).expect_err("nobody waits in vain");
    assert!(error.contains("--accept-deletions"), "{error}");
}

/// The watermark stands, while changes are journaled and do not travel.
#[track_caller]
fn assert_stands_still(pair: &Pair, daemon: &mut Daemon) {
    let before = daemon.status().source.unwrap();
    fs::write(pair.source().join("later"), "later").unwrap();
    daemon.poll_until(patience(), "the change is journaled", |daemon| {
        let now = daemon.status().source?;
        (now.positions.journaled > before.positions.journaled).then_some(())
    });
    std::thread::sleep(Duration::from_secs(3));
    assert_eq!(daemon.status().source.unwrap().watermark, before.watermark);
    assert!(!pair.replica().join("later").exists(), "nothing travels");
}

/// Plain `resume` is refused; with `--accept-deletions`, the replica follows.
#[track_caller]
fn accept(pair: &Pair, daemon: &mut Daemon) {
    let refused = replicator(["resume", "--endpoint", daemon.endpoint()]);
    assert_ne!(refused.code, Some(0), "{refused:?}");
    assert!(refused.stderr.contains("--accept-deletions"), "{refused:?}");
    assert_eq!(daemon.status().status, ReplicationStatus::Halted);
    replicator(["resume", "--accept-deletions", "--endpoint", daemon.endpoint()]).success();
    daemon.wait_enabled(patience());
    pair.settle(daemon, &"the deletions were accepted");
}

#[test]
fn a_large_deletion_halts_until_it_is_accepted() {
    let (pair, mut daemon) = enabled();
    // One look sees all of it.
    post(&daemon, "pause");
    fs::remove_dir_all(pair.source().join("many")).unwrap();
    post(&daemon, "resume");
    await_halted(&mut daemon);
    assert_stands_still(&pair, &mut daemon);
    assert_eq!(files(&pair.replica().join("many")), MANY);

    daemon.kill();
    let mut daemon = pair.start("fanotify");
    await_halted(&mut daemon);
    std::thread::sleep(Duration::from_secs(3));
    assert_eq!(daemon.status().status, ReplicationStatus::Halted);
    assert_eq!(files(&pair.replica().join("many")), MANY);

    accept(&pair, &mut daemon);
    assert!(!pair.replica().join("many").exists());

    // The permission was for that.
    populate(&pair.source().join("few"));
    pair.settle(&daemon, &"grown again");
    post(&daemon, "pause");
    fs::remove_dir_all(pair.source().join("few/many")).unwrap();
    post(&daemon, "resume");
    await_halted(&mut daemon);
    assert_eq!(files(&pair.replica().join("few/many")), MANY);
}

#[test]
fn a_large_deletion_that_is_followed_as_it_goes_halts_at_the_share() {
    let (pair, mut daemon) = enabled();
    for file in 0..MANY {
        fs::remove_file(pair.source().join(format!("many/file-{file}"))).unwrap();
        if file % 300 == 0 {
            std::thread::sleep(Duration::from_millis(200));
        }
    }
    await_halted(&mut daemon);
    let left = files(&pair.replica().join("many")) + files(&pair.replica().join("few"));
    assert!(left >= FILES / 2, "{left} files are left");
    assert!(left < FILES, "it followed before the share was reached, or tests nothing");
    accept(&pair, &mut daemon);
}

#[test]
fn what_is_below_the_share_or_the_least_number_does_not_halt() {
    let (pair, daemon) = enabled();
    post(&daemon, "pause");
    fs::remove_dir_all(pair.source().join("few")).unwrap();
    post(&daemon, "resume");
    pair.settle(&daemon, &"a quarter was deleted");
    drop(daemon);

    let pair = Pair::new(Layout::Two(Ext4, Ext4));
    for file in 0..900 {
        fs::write(pair.source().join(format!("file-{file}")), "").unwrap();
    }
    let daemon = pair.start_enabled("fanotify");
    for file in 0..900 {
        fs::remove_file(pair.source().join(format!("file-{file}"))).unwrap();
    }
    pair.settle(&daemon, &"all of a small tree was deleted");
}

#[test]
fn moves_and_replacements_are_not_deletions() {
    let (pair, daemon) = enabled();
    let root = pair.source();
    fs::rename(root.join("many"), root.join("few/moved")).unwrap();
    pair.settle(&daemon, &"a directory was moved");
    let moved = root.join("few/moved");
    for file in 0..MANY {
        let name = format!("file-{file}");
        fs::write(moved.join("new"), format!("new {file}")).unwrap();
        fs::rename(moved.join("new"), moved.join(name)).unwrap();
    }
    pair.settle(&daemon, &"files were replaced");
    post(&daemon, "pause");
    fs::create_dir(root.join("other")).unwrap();
    for file in 0..MANY {
        let name = format!("file-{file}");
        fs::rename(moved.join(&name), root.join("other").join(name)).unwrap();
    }
    for file in 0..FILES - MANY {
        let name = root.join(format!("few/file-{file}"));
        fs::write(root.join("new"), format!("new {file}")).unwrap();
        fs::rename(root.join("new"), name).unwrap();
    }
    post(&daemon, "resume");
    pair.settle(&daemon, &"both at once");
    assert_eq!(daemon.status().status, ReplicationStatus::Enabled);
}

#[test]
fn a_source_that_was_emptied_while_nothing_ran_halts() {
    let (pair, daemon) = enabled();
    assert!(daemon.interrupt().success());
    for name in ["many", "few"] {
        fs::remove_dir_all(pair.source().join(name)).unwrap();
    }
    let mut daemon = pair.start("fanotify");
    await_halted(&mut daemon);
    assert_eq!(files(&pair.replica().join("many")), MANY);
    assert_eq!(files(&pair.replica().join("few")), FILES - MANY);
    accept(&pair, &mut daemon);
}

#[test]
fn a_source_whose_content_is_moved_out_halts_before_anything_is_set_aside() {
    let (pair, mut daemon) = enabled();
    fs::create_dir(pair.source().join("root")).unwrap();
    pair.settle(&daemon, &"one more");
    post(&daemon, "pause");
    for name in ["many", "few", "root"] {
        fs::rename(pair.source().join(name), pair.outside().join(name)).unwrap();
    }
    post(&daemon, "resume");
    await_halted(&mut daemon);
    assert_eq!(files(&pair.replica().join("many")), MANY);
    for name in ["many", "few", "root"] {
        fs::rename(pair.outside().join(name), pair.source().join(name)).unwrap();
    }
    accept(&pair, &mut daemon);
    compare::assert_same(pair.source(), pair.replica(), &"all came back");
}

#[test]
fn a_source_that_is_unmounted_leaves_the_replica_alone() {
    let (pair, mut daemon) = enabled();
    let mount = pair.mounts()[0].path();
    // It is held open: only a lazy unmount succeeds.
    rustix::mount::unmount(mount, rustix::mount::UnmountFlags::DETACH).unwrap();
    let status = daemon.poll_until(patience(), "the status is ERROR", |daemon| {
        daemon.try_status().filter(|status| status.status == ReplicationStatus::Error)
    });
    let message = status.status_message.expect("it says why");
    assert!(message.contains(pair.source().to_str().unwrap()), "{message}");
    // The empty mount point, at the same path.
    fs::create_dir_all(pair.source()).unwrap();
    drop(daemon);
    let mut daemon = pair.start("fanotify");
    let status = daemon.poll_until(patience(), "the status is ERROR", |daemon| {
        daemon.try_status().filter(|status| status.status == ReplicationStatus::Error)
    });
    let message = status.status_message.expect("it says why");
    assert!(message.contains("is not the directory that was replicated"), "{message}");
    assert_eq!(files(&pair.replica().join("many")), MANY);
    assert_eq!(files(&pair.replica().join("few")), FILES - MANY);
    fs::remove_dir_all(pair.source()).unwrap();
}
