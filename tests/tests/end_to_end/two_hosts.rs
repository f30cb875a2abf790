//! Two daemons on two hosts: enrolment by a token, failover with the source
//! dead, cables pulled and programs killed.

use std::fs;
use std::time::Duration;

use replicator_tests::compare;
use replicator_tests::hosts::{Hosts, Side};
use replicator_tests::mounts::FileSystem::Ext4;
use replicator_tests::mounts::Mount;
use replicator_tests::workload::Workload;
use serde_json::Value;

fn source_id(described: &Value) -> String {
    described["Replications"][0]["SourceFileSystemId"].as_str().unwrap().to_owned()
}

#[test]
fn replicates_and_fails_over_with_the_source_dead() {
    let mut hosts = Hosts::enrolled();
    let (root, beside) = (hosts.source().join("root"), hosts.source().join("beside"));
    fs::create_dir(&root).unwrap();
    fs::create_dir(&beside).unwrap();
    let workload = Workload { steps: 400, ..Workload::new() };
    workload.run(&root, &beside);
    hosts.settle(&workload);

    // The destination has a view of its own, of the same thing.
    let here = hosts.await_enabled(Side::Source);
    let there = hosts.await_enabled(Side::Destination);
    let id = source_id(&there);
    assert_eq!(source_id(&here), id);
    let status = hosts.on(Side::Destination, &["status", "--json"]).success().json();
    assert!(status.to_string().contains("TimeSinceLastSync"), "{status}");

    hosts.kill(Side::Source);
    fs::write(hosts.replica().join("x"), "").expect_err("still read-only");
    let delete = ["delete-replication-configuration", "--source-file-system-id", &id];
    let both = hosts.on(Side::Destination, &delete);
    assert_eq!(both.code, Some(1), "both sides cannot be reached: {both:#?}");
    assert!(both.stderr.contains("LOCAL_CONFIGURATION_ONLY"), "it says what works: {both:#?}");
    fs::write(hosts.replica().join("x"), "").expect_err("still read-only after a refusal");
    let local = [&delete[..], &["--deletion-mode", "LOCAL_CONFIGURATION_ONLY"]].concat();
    hosts.on(Side::Destination, &local).success();
    compare::assert_same(hosts.source(), hosts.replica(), &workload);
    fs::write(hosts.replica().join("x"), "").expect("writable after failover");

    // The source comes back, is told, and does no harm.
    hosts.start(Side::Source);
    fs::write(hosts.source().join("after"), "").unwrap();
    std::thread::sleep(Duration::from_secs(2));
    assert!(!hosts.replica().join("after").exists(), "replicated after failover");
    let status = hosts.on(Side::Source, &["status", "--json"]).success().json().to_string();
    assert!(status.contains("no replication configuration"), "the source says why: {status}");
}

#[test]
fn goes_on_after_the_cable_was_pulled_and_after_kills() {
    let mut hosts = Hosts::enrolled();
    let write = |hosts: &Hosts, name: &str| {
        fs::write(hosts.source().join("directory").join(name), name).unwrap();
    };
    hosts.pull_cable();
    write(&hosts, "while-pulled");
    let wait = hosts.on(Side::Source, &["wait", "--timeout", "2"]);
    assert_eq!(wait.code, Some(3), "a wait cannot succeed without a cable: {wait:#?}");
    assert!(!hosts.replica().join("directory/while-pulled").exists());
    hosts.plug_cable();
    hosts.settle(&"the cable is back");

    hosts.kill(Side::Destination);
    write(&hosts, "while-the-destination-was-dead");
    hosts.start(Side::Destination);
    hosts.settle(&"the destination is back");

    hosts.kill(Side::Source);
    write(&hosts, "while-nobody-watched");
    hosts.start(Side::Source);
    hosts.settle(&"the source is back");
}

#[test]
fn failover_with_both_sides_alive() {
    let hosts = Hosts::enrolled();
    let failover = hosts.on(Side::Source, &["failover"]).success();
    assert!(!failover.stdout.is_empty(), "it says what was and was not replicated");
    fs::write(hosts.replica().join("x"), "").expect("writable after failover");
    for side in [Side::Source, Side::Destination] {
        let described = hosts.on(side, &["describe-replication-configurations"]).success().json();
        assert_eq!(described["Replications"].as_array().map(Vec::len), Some(0), "{described}");
    }
}

/// A token with one character changed, in the middle of what is encoded.
fn damaged(token: &str) -> String {
    let middle = token.len() / 2;
    let other = if &token[middle..=middle] == "A" { "B" } else { "A" };
    format!("{}{other}{}", &token[..middle], &token[middle + 1..])
}

#[test]
fn tokens_are_good_once_and_as_they_are() {
    let hosts = Hosts::strangers();
    fs::write(hosts.source().join("file"), "content").unwrap();
    let other = Mount::new(Ext4);
    let expect = |token: &str, said: &str, case: &str| {
        let ended = hosts.create(other.path(), token);
        assert_eq!(ended.code, Some(1), "{case}: {ended:#?}");
        assert!(ended.stderr.contains(said), "{case}: {said:?} is not in {ended:#?}");
    };
    let token = hosts.token(&[]);
    expect("nonsense", "not an enrolment token", "no token");
    expect(&damaged(&token), "damaged", "damaged");
    expect(&token.replacen("replicator1:", "replicator9:", 1), "version", "of a newer program");

    hosts.create(hosts.source(), &token).success();
    hosts.await_enabled(Side::Source);
    expect(&token, "used", "used by another source");
    hosts.settle(&"a stranger's attempts change nothing");
}

/// The shortest validity is a minute; while it sleeps through that, this test
/// takes no share of the machine.
#[test]
fn an_expired_token_is_refused() {
    let mut hosts = Hosts::strangers();
    let token = hosts.token(&["--valid", "60"]);
    hosts.give_up_share();
    std::thread::sleep(Duration::from_secs(61));
    let ended = hosts.create(hosts.source(), &token);
    assert_eq!(ended.code, Some(1), "{ended:#?}");
    assert!(ended.stderr.contains("expired"), "{ended:#?}");
}
