//! A source that is emptied, or loses much of what it held: the replica does
//! not follow before the operator says so.

use std::fs;
use std::path::Path;
use std::thread;
use std::time::Duration;

use replicator_common::status::ReplicationStatus;
use replicator_tests::compare;
use replicator_tests::mounts::FileSystem::Ext4;
use replicator_tests::process::{Daemon, replicator};
use replicator_tests::scenario::{Layout, Pair, patience};

/// Files of the tree; no more than it takes, for an unoptimised build.
const FILES: usize = 80;
/// Of them, in the directory that goes.
const MANY: usize = 60;
/// The rule, but for the least number as it is without: half.
const MIN: usize = 20;

/// Creates files in a directory that it makes.
fn fill(directory: &Path, files: usize) {
    fs::create_dir(directory).unwrap();
    for file in 0..files {
        fs::write(directory.join(format!("file-{file}")), file.to_string()).unwrap();
    }
}

/// `many` with 60 files and `few` with 20.
fn populate(root: &Path) {
    fill(&root.join("many"), MANY);
    fill(&root.join("few"), FILES - MANY);
}

fn start(pair: &Pair) -> Daemon {
    let min = MIN.to_string();
    pair.start_with(&["--watcher", "fanotify", "--halt-deletions-min", &min])
}

fn enabled_over(populate: impl FnOnce(&Path)) -> (Pair, Daemon) {
    let pair = Pair::new(Layout::Two(Ext4, Ext4));
    populate(pair.source());
    let mut daemon = start(&pair);
    daemon.wait_enabled(patience());
    pair.settle(&daemon, &"populated");
    (pair, daemon)
}

fn enabled() -> (Pair, Daemon) {
    enabled_over(populate)
}

fn post(daemon: &Daemon, operation: &str) {
    let path = format!("/replicator/v1/{operation}");
    daemon.request("POST", &path, Some(serde_json::json!({}))).unwrap();
}

/// One look of the source sees all that `act` does.
fn at_once(daemon: &Daemon, act: impl FnOnce()) {
    post(daemon, "pause");
    act();
    post(daemon, "resume");
}

fn files(directory: &Path) -> usize {
    fs::read_dir(directory).map_or(0, Iterator::count)
}

fn remove(directory: &Path, range: std::ops::Range<usize>) {
    for file in range {
        fs::remove_file(directory.join(format!("file-{file}"))).unwrap();
    }
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
    // Longer than a heartbeat.
    thread::sleep(Duration::from_millis(1500));
    let status = daemon.status();
    assert_eq!(status.source.unwrap().watermark, before.watermark);
    assert_eq!(status.status, ReplicationStatus::Halted);
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
    at_once(&daemon, || fs::remove_dir_all(pair.source().join("many")).unwrap());
    await_halted(&mut daemon);
    assert_stands_still(&pair, &mut daemon);
    assert_eq!(files(&pair.replica().join("many")), MANY);

    daemon.kill();
    let mut daemon = start(&pair);
    await_halted(&mut daemon);
    assert_stands_still_again(&pair, &mut daemon);
    accept(&pair, &mut daemon);
    assert!(!pair.replica().join("many").exists());

    // The permission was for that. What is found at a start is not young.
    assert!(daemon.interrupt().success());
    populate(&pair.source().join("few"));
    let mut daemon = start(&pair);
    pair.settle(&daemon, &"grown again");
    at_once(&daemon, || fs::remove_dir_all(pair.source().join("few/many")).unwrap());
    await_halted(&mut daemon);
    assert_eq!(files(&pair.replica().join("few/many")), MANY);
}

/// After a restart as before.
#[track_caller]
fn assert_stands_still_again(pair: &Pair, daemon: &mut Daemon) {
    thread::sleep(Duration::from_millis(1500));
    assert_eq!(daemon.status().status, ReplicationStatus::Halted);
    assert_eq!(files(&pair.replica().join("many")), MANY);
}

#[test]
fn deletions_add_up_to_the_share_also_over_a_restart() {
    let (pair, daemon) = enabled();
    let many = pair.source().join("many");
    remove(&many, 0..24);
    pair.settle(&daemon, &"less than half was deleted");
    daemon.kill();
    let mut daemon = start(&pair);
    pair.settle(&daemon, &"after the restart");
    remove(&many, 24..44);
    await_halted(&mut daemon);
    let left = files(&pair.replica().join("many")) + files(&pair.replica().join("few"));
    assert!((FILES / 2..=FILES - 24).contains(&left), "{left} files are left");
    accept(&pair, &mut daemon);
    assert_eq!(files(&pair.replica().join("many")), MANY - 44);
}

#[test]
fn what_is_below_the_share_or_the_least_number_does_not_halt() {
    let (pair, daemon) = enabled();
    at_once(&daemon, || fs::remove_dir_all(pair.source().join("few")).unwrap());
    pair.settle(&daemon, &"a quarter was deleted");
    drop((daemon, pair));

    let (pair, daemon) = enabled_over(|root| fill(&root.join("files"), MIN - 1));
    at_once(&daemon, || remove(&pair.source().join("files"), 0..MIN - 1));
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
    at_once(&daemon, || {
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
    });
    pair.settle(&daemon, &"both at once");
    assert_eq!(daemon.status().status, ReplicationStatus::Enabled);
}

/// Of a tree that holds little, all comes and goes many times over.
#[test]
fn what_comes_and_goes_never_halts_not_even_over_a_restart() {
    let (pair, mut daemon) = enabled_over(|root| fill(&root.join("stays"), 5));
    for round in 0..5 {
        let directory = pair.source().join(format!("round-{round}"));
        fill(&directory, MIN + 10);
        pair.settle(&daemon, &"made");
        if round == 2 {
            daemon.kill();
            daemon = start(&pair);
            pair.settle(&daemon, &"after the restart");
        }
        fs::remove_dir_all(&directory).unwrap();
        pair.settle(&daemon, &"removed");
    }
    assert_eq!(daemon.status().status, ReplicationStatus::Enabled);
}

/// As when another backup is unpacked in its place: it has not shrunk at all.
#[test]
fn a_tree_whose_content_is_replaced_wholesale_halts() {
    let (pair, mut daemon) = enabled();
    at_once(&daemon, || {
        for name in ["many", "few"] {
            fs::remove_dir_all(pair.source().join(name)).unwrap();
        }
        fill(&pair.source().join("other"), 2 * FILES);
    });
    await_halted(&mut daemon);
    let left = files(&pair.replica().join("many")) + files(&pair.replica().join("few"));
    assert!(left >= FILES / 2, "{left} files are left");
    accept(&pair, &mut daemon);
}

/// However few objects it had.
#[test]
fn a_source_that_is_emptied_halts() {
    let (pair, mut daemon) = enabled_over(|root| fill(&root.join("files"), 3));
    at_once(&daemon, || fs::remove_dir_all(pair.source().join("files")).unwrap());
    await_halted(&mut daemon);
    assert_eq!(files(&pair.replica().join("files")), 3);
    accept(&pair, &mut daemon);
    assert!(!pair.replica().join("files").exists());
}

#[test]
fn a_source_that_was_emptied_while_nothing_ran_halts() {
    let (pair, daemon) = enabled();
    assert!(daemon.interrupt().success());
    for name in ["many", "few"] {
        fs::remove_dir_all(pair.source().join(name)).unwrap();
    }
    let mut daemon = start(&pair);
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
    at_once(&daemon, || {
        for name in ["many", "few", "root"] {
            fs::rename(pair.source().join(name), pair.outside().join(name)).unwrap();
        }
    });
    await_halted(&mut daemon);
    assert_eq!(files(&pair.replica().join("many")), MANY);
    for name in ["many", "few", "root"] {
        fs::rename(pair.outside().join(name), pair.source().join(name)).unwrap();
    }
    accept(&pair, &mut daemon);
    compare::assert_same(pair.source(), pair.replica(), &"all came back");
}

/// More than one batch drops: all of it counts when it leaves, and none of it
/// counts again while it is taken apart.
#[test]
fn a_large_tree_that_is_moved_out_counts_as_a_whole() {
    let large = 17_000;
    let (pair, mut daemon) = enabled_over(|root| {
        fill(&root.join("large"), large);
        fill(&root.join("few"), FILES);
    });
    fs::rename(pair.source().join("large"), pair.outside().join("large")).unwrap();
    await_halted(&mut daemon);
    let objects = |daemon: &Daemon| daemon.status().destination.unwrap().objects;
    assert!(objects(&daemon) > large as u64, "the replica has lost some of it");
    daemon.kill();
    let mut daemon = start(&pair);
    await_halted(&mut daemon);
    accept(&pair, &mut daemon);
    daemon.poll_until(patience(), "all of it is dropped", |daemon| {
        (objects(daemon) < 2 * FILES as u64).then_some(())
    });
    pair.settle(&daemon, &"taken apart");
    assert_eq!(files(&pair.replica().join("few")), FILES);
}
