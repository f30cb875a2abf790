//! The binary from outside: exit status, and what goes where.

#![expect(clippy::unwrap_used, reason = "a test's helpers may panic")]

use std::fs;
use std::net::TcpListener;
use std::path::Path;
use std::process::{Command, Output};

fn replicator(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_replicator"))
        .args(arguments)
        .env_remove("REPLICATOR_ENDPOINT")
        .output()
        .unwrap()
}

fn said(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

/// Failed with this status, with one line for the operator, none for machines.
fn assert_fails(output: &Output, code: i32, expected: &str) {
    let text = said(output);
    assert_eq!(output.status.code(), Some(code), "{text}");
    assert!(output.stdout.is_empty(), "{text}");
    assert!(text.contains(expected), "{expected:?} is not in {text:?}");
    if code == 1 {
        assert_eq!(text.lines().count(), 1, "{text}");
        assert!(text.starts_with("replicator: "), "{text}");
    }
}

/// An endpoint where nobody listens: a port that was just free.
fn nobody() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    format!("http://{}", listener.local_addr().unwrap())
}

#[test]
fn wrong_usage_is_status_2() {
    for arguments in [
        &[][..],
        &["copy"],
        &["run", "/a"],
        &["run", "/a", "/b", "--watcher", "magic"],
        &["run", "/a", "/b", "--api", "localhost"],
        &["run", "/a", "/b", "--api", "0.0.0.0:4480"],
        &["status", "--endpoint", "https://localhost"],
        &["status", "--endpoint", "ftp://localhost"],
        &["status", "--fingerprint", "xyz"],
        &["status", "--access-key-id", "AK"],
        &["wait", "--timeout", "-1"],
        &["wait", "--timeout", "NaN"],
        &["create-replication-configuration", "--source", "/a"],
        &["delete-replication-configuration"],
        &["failover", "--source-file-system-id", "bogus"],
        &["failover", "--state-dir", "/s", "--deletion-mode", "LOCAL_CONFIGURATION_ONLY"],
    ] {
        let output = replicator(arguments);
        assert_eq!(output.status.code(), Some(2), "{arguments:?}: {}", said(&output));
        assert!(output.stdout.is_empty(), "{arguments:?}");
        if !arguments.is_empty() {
            let said = said(&output);
            assert!(said.lines().count() == 1 && said.starts_with("replicator: "), "{said}");
        }
    }
}

#[test]
fn help_and_version_are_status_0() {
    for arguments in [&["--help"][..], &["--version"], &["run", "--help"]] {
        let output = replicator(arguments);
        assert!(output.status.success() && !output.stdout.is_empty(), "{arguments:?}");
    }
}

#[test]
fn nobody_to_ask_is_status_1() {
    let endpoint = nobody();
    for arguments in [
        &["status"][..],
        &["wait", "--timeout", "5"],
        &["pause"],
        &["resume"],
        &["failover"],
        &["describe-replication-configurations"],
        &["create-replication-configuration", "--source", "/a", "--destination", "T"],
        &["delete-replication-configuration", "--source-file-system-id", "fs-01234567"],
    ] {
        let output = replicator(&[arguments, &["--endpoint", &endpoint]].concat());
        assert_fails(&output, 1, &format!("no daemon answers at {endpoint}"));
    }
}

#[test]
fn an_error_is_json_for_who_wants_json() {
    let endpoint = nobody();
    for arguments in [&["status", "--json"][..], &["--json", "wait"]] {
        let output = replicator(&[arguments, &["--endpoint", &endpoint]].concat());
        let error: serde_json::Value = serde_json::from_str(&said(&output)).unwrap();
        assert_eq!((output.status.code(), &error["ExitStatus"]), (Some(1), &1.into()));
        assert!(error["Error"].as_str().unwrap().contains(&endpoint), "{error}");
    }
}

#[test]
fn wrong_usage_is_json_for_who_wants_json() {
    let output = replicator(&["--json", "status", "--no-such-option"]);
    let error: serde_json::Value = serde_json::from_str(&said(&output)).unwrap();
    assert_eq!((output.status.code(), &error["ExitStatus"]), (Some(2), &2.into()));
    assert!(error["Error"].as_str().unwrap().contains("--no-such-option"), "{error}");
}

/// What is wrong with how a daemon would be asked does not hold up a failover that asks
/// none: the state directory alone counts.
#[test]
fn an_offline_failover_asks_nobody() {
    let output = replicator(&[
        "failover",
        "--endpoint",
        "https://127.0.0.1:1",
        "--state-dir",
        "/nonexistent/state",
    ]);
    assert_fails(&output, 1, "there is no state directory /nonexistent/state");
}

#[test]
fn completions_and_man_pages_are_of_all_commands_but_their_own() {
    let base = tempfile::tempdir().unwrap();
    let at = base.path().to_str().unwrap();
    for what in ["man", "completions"] {
        assert!(replicator(&["generate", what, at]).status.success());
    }
    let page = fs::read_to_string(base.path().join("replicator-wait.1")).unwrap();
    assert!(page.contains("timeout") && page.contains("endpoint"), "{page}");
    assert!(base.path().join("replicator-delete-replication-configuration.1").exists());
    assert!(!base.path().join("replicator-generate.1").exists());
    assert!(fs::read_to_string(base.path().join("_replicator")).unwrap().contains("failover"));
    let output = replicator(&["generate", "man", "/dev/null/x"]);
    assert_fails(&output, 1, "cannot write to /dev/null/x");
}

#[test]
fn the_endpoint_may_stand_in_the_environment() {
    let endpoint = nobody();
    let output = Command::new(env!("CARGO_BIN_EXE_replicator"))
        .arg("status")
        .env("REPLICATOR_ENDPOINT", &endpoint)
        .output()
        .unwrap();
    assert_fails(&output, 1, &endpoint);
}

#[test]
fn a_run_with_bad_input_makes_nothing() {
    let base = tempfile::tempdir().unwrap();
    let path = |name: &str| base.path().join(name).to_str().unwrap().to_owned();
    fs::create_dir(path("source")).unwrap();
    fs::write(path("file"), "").unwrap();
    let run = |source: &str, replica: &str, state: &str| {
        replicator(&[
            "run",
            &path(source),
            &path(replica),
            "--state-dir",
            &path(state),
            "--api",
            "127.0.0.1:0",
        ])
    };
    for (source, replica, state, expected) in [
        ("none", "replica", "state", "does not exist"),
        ("file", "replica", "state", "is not a directory"),
        ("source", "file", "state", "is not a directory"),
        ("source", "source/replica", "state", "lies inside the source"),
        ("source", "source", "state", "are the same directory"),
        ("source", "replica", "source/state", "lies inside the source"),
        ("source", "replica", "replica/state", "lies inside the replica"),
        ("source", "replica", "file", "is not a directory"),
    ] {
        assert_fails(&run(source, replica, state), 1, expected);
    }
    let mut names: Vec<_> =
        fs::read_dir(base.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    names.sort();
    assert_eq!(names, ["file", "source"], "nothing was made");
    assert_eq!(fs::read_dir(path("source")).unwrap().count(), 0);
}

#[test]
fn a_port_in_use_is_said_before_a_replica_is_made() {
    let base = tempfile::tempdir().unwrap();
    let path = |name: &str| base.path().join(name).to_str().unwrap().to_owned();
    fs::create_dir(path("source")).unwrap();
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let api = taken.local_addr().unwrap().to_string();
    let output = replicator(&[
        "run",
        &path("source"),
        &path("replica"),
        "--state-dir",
        &path("state"),
        "--api",
        &api,
    ]);
    assert_fails(&output, 1, &format!("the API cannot listen on {api}: the port is in use"));
    assert!(!Path::new(&path("replica")).exists());
}

#[test]
fn failover_without_state_is_told() {
    let base = tempfile::tempdir().unwrap();
    let none = base.path().join("none");
    let output = replicator(&["failover", "--state-dir", none.to_str().unwrap()]);
    assert_fails(&output, 1, "there is no state directory");
}
