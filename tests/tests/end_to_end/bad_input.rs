//! Bad input gets a clear error and loses nothing.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use replicator_tests::binary;
use replicator_tests::mounts::FileSystem::{Ext4, Tmpfs};
use replicator_tests::mounts::{Mount, Scratch};
use replicator_tests::process::{Ended, free_port, replicator, run_to_end};
use replicator_tests::scenario::{Layout, Pair, patience};

/// Exit status: 1 failed, 2 wrong usage, 3 timed out.
const FAILED: i32 = 1;
const USAGE: i32 = 2;
const TIMED_OUT: i32 = 3;

#[track_caller]
fn expect(ended: &Ended, code: i32, said: &str, case: &str) {
    assert_eq!(ended.code, Some(code), "{case}: {ended:#?}");
    let found = ended.stderr.to_lowercase().contains(&said.to_lowercase());
    assert!(found, "{case}: {said:?} is not in what it said: {ended:#?}");
    assert!(!ended.stderr.contains("panicked"), "{case}: {ended:#?}");
    assert_eq!(ended.stdout, "", "{case}: an error is not for machines' output");
}

/// `replicator run` that is expected to end at once.
fn run(source: &Path, replica: &Path, state: &Path, more: &[&str]) -> Ended {
    let mut command = Command::new(binary::replicator());
    command.arg("run").arg(source).arg(replica).arg("--state-dir").arg(state);
    command.args(["--api", &format!("127.0.0.1:{}", free_port())]).args(more);
    run_to_end(command, Duration::from_secs(30))
}

#[test]
fn wrong_usage() {
    let table: &[(&[&str], &str)] = &[
        (&["run"], "SOURCE"),
        (&["run", "/only-one"], "REPLICA"),
        (&["run", "/a", "/b", "--watcher", "bogus"], "fanotify"),
        (&["run", "/a", "/b", "--api", "nonsense"], "--api"),
        (&["run", "/a", "/b", "--bogus"], "--bogus"),
        (&["bogus"], "bogus"),
        (&["wait", "--timeout", "soon"], "--timeout"),
        (&["create-replication-configuration", "--source", "/a"], "--destination"),
        (&["delete-replication-configuration"], "--source-file-system-id"),
        (
            &[
                "delete-replication-configuration",
                "--source-file-system-id",
                "fs-01234567",
                "--deletion-mode",
                "SOME",
            ],
            "ALL_CONFIGURATIONS",
        ),
    ];
    for (arguments, said) in table {
        expect(&replicator(*arguments), USAGE, said, &format!("{arguments:?}"));
    }
}

#[test]
fn nobody_answers() {
    let endpoint = format!("http://127.0.0.1:{}", free_port());
    for command in
        ["status", "wait", "pause", "resume", "failover", "describe-replication-configurations"]
    {
        let ended = replicator([command, "--endpoint", &endpoint]);
        expect(&ended, FAILED, &endpoint["http://".len()..], command);
    }
}

#[test]
fn source_or_replica_is_no_good() {
    let scratch = Scratch::new("bad-input");
    let path = |name: &str| scratch.path().join(name);
    fs::create_dir_all(path("source/below")).unwrap();
    fs::create_dir_all(path("full/below")).unwrap();
    fs::write(path("source/file"), "kept").unwrap();
    fs::write(path("full/file"), "kept").unwrap();
    fs::write(path("a-file"), "kept").unwrap();
    std::os::unix::fs::symlink("source", path("alias")).unwrap();
    let table: &[(&str, &str, &str, &str)] = &[
        ("source missing", "missing", "replica", "missing"),
        ("source is a file", "a-file", "replica", "not a directory"),
        ("replica is a file", "source", "a-file", "not a directory"),
        ("replica inside the source", "source", "source/below", "inside"),
        ("replica to be made inside the source", "source", "source/new", "inside"),
        ("source inside the replica", "full/below", "full", "inside"),
        ("the same directory", "source", "source", "same"),
        ("the same by a symbolic link", "source", "alias", "same"),
        ("inside by a symbolic link", "source", "alias/below", "inside"),
        ("replica not empty", "source", "full", "not empty"),
        ("replica cannot be made", "source", "missing/deeper/replica", "missing"),
    ];
    for (case, source, replica, said) in table {
        let ended = run(&path(source), &path(replica), &path("state"), &[]);
        expect(&ended, FAILED, said, case);
    }
    let inside = run(&path("source"), &path("replica"), &path("source/state"), &[]);
    expect(&inside, FAILED, "inside", "state directory inside the source");
    for name in ["source/file", "full/file", "a-file"] {
        assert_eq!(fs::read_to_string(path(name)).unwrap(), "kept", "{name}");
    }
    let mut left: Vec<_> =
        fs::read_dir(path("full")).unwrap().map(|e| e.unwrap().file_name()).collect();
    left.sort();
    assert_eq!(left, ["below", "file"], "a refused replica is not touched");
    assert!(!path("source/new").exists(), "a refused replica is not made");
    // And it is not left read-only.
    fs::write(path("full/file"), "writable").unwrap();
}

#[test]
fn reconcile_keeps_what_the_source_lacks() {
    let pair = Pair::new(Layout::Two(Ext4, Ext4));
    for root in [pair.source(), pair.replica()] {
        fs::write(root.join("same"), vec![7; 400_000]).unwrap();
        fs::write(root.join("other"), root.to_str().unwrap()).unwrap();
        fs::create_dir(root.join("directory")).unwrap();
    }
    fs::write(pair.replica().join("directory/only-here"), "precious").unwrap();
    let port = free_port();
    let refused = run_to_end(pair.command(port, &[]), Duration::from_secs(30));
    expect(&refused, FAILED, "--reconcile", "replica not empty");

    let mut daemon = pair.start_with(&["--reconcile"]);
    daemon.wait_enabled(patience());
    daemon.wait(patience());
    assert!(daemon.counters().bytes_shipped < 10_000, "what is the same does not travel");
    assert_eq!(
        fs::read_to_string(pair.replica().join("other")).unwrap(),
        pair.source().to_str().unwrap()
    );
    assert!(!pair.replica().join("directory/only-here").exists());
    let kept = find_content(pair.replica(), "precious").expect("it is in lost+found");
    assert!(kept.to_str().unwrap().contains("efs-replication-lost+found-"), "{}", kept.display());
}

/// The first file below `root` with this content, under whatever name.
fn find_content(root: &Path, content: &str) -> Option<PathBuf> {
    let mut directories = vec![root.to_owned()];
    while let Some(directory) = directories.pop() {
        for entry in fs::read_dir(directory).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() && !path.is_symlink() {
                directories.push(path);
            } else if fs::read_to_string(&path).is_ok_and(|found| found == content) {
                return Some(path);
            }
        }
    }
    None
}

#[test]
fn state_directory_is_no_good() {
    let pair = Pair::new(Layout::Two(Tmpfs, Tmpfs));
    fs::write(pair.source().join("file"), "content").unwrap();
    let daemon = pair.start_enabled("auto");

    let ended = run(pair.source(), pair.replica(), &pair.state_dir(), &[]);
    expect(&ended, FAILED, "in use", "state directory of a running process");
    let port = daemon.endpoint().rsplit(':').next().unwrap().to_owned();
    let other = Mount::new(Tmpfs);
    let scratch = Scratch::new("state");
    let mut command = Command::new(binary::replicator());
    command.arg("run").arg(pair.outside()).arg(other.path());
    command.arg("--state-dir").arg(scratch.path().join("state"));
    command.args(["--api", &format!("127.0.0.1:{port}")]);
    let ended = run_to_end(command, Duration::from_secs(30));
    expect(&ended, FAILED, &port, "port in use");
    fs::write(other.path().join("x"), "not left read-only").unwrap();

    assert!(daemon.interrupt().success());
    let ended = run(pair.outside(), pair.replica(), &pair.state_dir(), &[]);
    expect(&ended, FAILED, pair.source().to_str().unwrap(), "state directory of another source");
    let ended = run(pair.source(), other.path(), &pair.state_dir(), &[]);
    expect(&ended, FAILED, pair.replica().to_str().unwrap(), "state directory of another replica");
    let ended = run(pair.source(), pair.replica(), &scratch.path().join("new"), &[]);
    expect(&ended, FAILED, "replica", "a replica that belongs to another state directory");

    // None of this did any harm.
    fs::write(pair.source().join("file"), "changed").unwrap();
    let daemon = pair.start("auto");
    pair.settle(&daemon, &"the right state directory again");
}

#[test]
fn a_file_as_state_directory() {
    let scratch = Scratch::new("bad-input");
    let path = |name: &str| scratch.path().join(name);
    fs::create_dir(path("source")).unwrap();
    fs::write(path("state"), "a file").unwrap();
    let ended = run(&path("source"), &path("replica"), &path("state"), &[]);
    expect(&ended, FAILED, "state", "a file as state directory");
    assert_eq!(fs::read_to_string(path("state")).unwrap(), "a file");
}

#[test]
fn a_full_disk_at_start_is_said() {
    let pair = Pair::new(Layout::Two(Tmpfs, Tmpfs));
    fs::write(pair.source().join("file"), "content").unwrap();
    let full = Mount::with_size(Tmpfs, 1 << 20);
    fs::write(full.path().join("filler"), vec![1; (1 << 20) - 4096]).unwrap();
    let ended = run(pair.source(), pair.replica(), &full.path().join("state"), &[]);
    expect(&ended, FAILED, "space", "no space for the state directory");
}

#[test]
fn a_wait_that_takes_too_long_says_so() {
    let pair = Pair::new(Layout::Two(Tmpfs, Tmpfs));
    let daemon = pair.start_enabled("auto");
    replicator(["pause", "--endpoint", daemon.endpoint()]).success();
    fs::write(pair.source().join("file"), "content").unwrap();
    let ended = replicator(["wait", "--timeout", "1", "--endpoint", daemon.endpoint()]);
    expect(&ended, TIMED_OUT, "", "wait while paused");
    replicator(["resume", "--endpoint", daemon.endpoint()]).success();
    replicator(["wait", "--timeout", "30", "--endpoint", daemon.endpoint()]).success();
    assert!(pair.replica().join("file").exists());
}

/// Machine-readable output is JSON on standard output, whatever is logged.
#[test]
fn output_for_machines() {
    let pair = Pair::new(Layout::Two(Tmpfs, Tmpfs));
    let daemon = pair.start_enabled("auto");
    let status = replicator(["status", "--json", "--endpoint", daemon.endpoint()]).success();
    let text = status.json().to_string();
    assert!(text.contains("ENABLED") && text.contains("Watcher"), "{text}");
    let described =
        replicator(["describe-replication-configurations", "--endpoint", daemon.endpoint()]);
    let described = described.success().json();
    let destination = &described["Replications"][0]["Destinations"][0];
    assert_eq!(destination["Status"], "ENABLED", "{described}");
    assert!(destination["LastReplicatedTimestamp"].is_number(), "{described}");
    let id = described["Replications"][0]["SourceFileSystemId"].as_str().unwrap();
    let one = ["describe-replication-configurations", "--file-system-id", id, "--endpoint"];
    let one = replicator(one.into_iter().chain([daemon.endpoint()])).success().json();
    assert_eq!(one["Replications"].as_array().map(Vec::len), Some(1));
    let unknown = replicator([
        "describe-replication-configurations",
        "--file-system-id",
        "fs-0123456789abcdef0",
        "--endpoint",
        daemon.endpoint(),
    ]);
    expect(&unknown, FAILED, "fs-0123456789abcdef0", "unknown id");
    let text = replicator(["status", "--endpoint", daemon.endpoint()]).success().stdout;
    assert!(text.contains("ENABLED"), "for a person too: {text}");
}

/// `--once` ends by itself when the replica equals the source.
#[test]
fn once() {
    let pair = Pair::new(Layout::Two(Ext4, Ext4));
    fs::write(pair.source().join("file"), "content").unwrap();
    for round in ["first", "second"] {
        let ended = run_to_end(pair.command(free_port(), &["--once"]), patience());
        ended.success();
        replicator_tests::compare::assert_same(pair.source(), pair.replica(), &round);
        fs::write(pair.source().join(round), round).unwrap();
    }
}
