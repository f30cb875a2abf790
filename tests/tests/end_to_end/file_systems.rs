//! Registered file systems between two hosts: each daemon knows its own by an
//! id, a token joins them, and both keep their ids over all that follows.

use std::fs;
use std::path::Path;

use replicator_tests::hosts::{Hosts, Side};
use serde_json::Value;

fn register(hosts: &Hosts, side: Side, path: &Path) -> String {
    let create = ["create-file-system", "--path", path.to_str().unwrap()];
    let made = hosts.on(side, &create).success().json();
    made["FileSystemId"].as_str().unwrap().to_owned()
}

/// What a side says of one file system.
fn described(hosts: &Hosts, side: Side, id: &str) -> Value {
    let all = hosts.on(side, &["describe-file-systems"]).success().json();
    let found = all.as_array().unwrap().iter().find(|one| one["FileSystemId"] == id);
    found.unwrap_or_else(|| panic!("{side:?} does not know {id}: {all}")).clone()
}

fn protection(hosts: &Hosts, side: Side, id: &str) -> String {
    let found = described(hosts, side, id);
    let word = &found["FileSystemProtection"]["ReplicationOverwriteProtection"];
    word.as_str().unwrap().to_owned()
}

fn unprotect(hosts: &Hosts, id: &str) {
    let update = ["update-file-system-protection", "--file-system-id", id];
    let word = ["--replication-overwrite-protection", "DISABLED"];
    hosts.on(Side::Destination, &[&update[..], &word].concat()).success();
}

/// Both ends of the one configuration, as a side tells of it.
fn ends(hosts: &Hosts, side: Side) -> [String; 2] {
    let one = hosts.await_enabled(side)["Replications"][0].clone();
    [&one["SourceFileSystemId"], &one["Destinations"][0]["FileSystemId"]]
        .map(|id| id.as_str().unwrap().to_owned())
}

#[test]
fn ids_last_over_restarts_and_failover() {
    let mut hosts = Hosts::strangers();
    fs::write(hosts.source().join("file"), "content").unwrap();
    let source = register(&hosts, Side::Source, hosts.source());
    let replica = register(&hosts, Side::Destination, hosts.replica());
    let expected = [source.clone(), replica.clone()];

    // Without consent there is no token, and the other side has no say.
    let tokens = serde_json::json!({ "replica": replica, "reconcile": true });
    let token = |hosts: &Hosts| {
        let answer = hosts.daemon(Side::Destination).request(
            "POST",
            "/replicator/v1/tokens",
            Some(tokens.clone()),
        );
        answer.map(|answer| answer["Token"].as_str().unwrap().to_owned())
    };
    let refused = token(&hosts).unwrap_err();
    assert!(refused.contains("protection") && refused.contains("DISABLED"), "{refused}");
    unprotect(&hosts, &replica);
    let first = token(&hosts).unwrap();
    let by_id = hosts.create(Path::new(&source), &replica);
    assert!(by_id.code == Some(1) && by_id.stderr.contains("enrolment token"), "{by_id:#?}");
    hosts.create(Path::new(&source), &first).success();
    assert_eq!(ends(&hosts, Side::Source), expected);
    assert_eq!(ends(&hosts, Side::Destination), expected);
    hosts.settle(&"by id");

    for side in Side::BOTH {
        assert_eq!(protection(&hosts, side, &replica), "REPLICATING", "{side:?}");
        let delete = ["delete-file-system", "--file-system-id", &source];
        let ended = hosts.on(side, &delete);
        assert!(ended.stderr.contains("in a replication configuration"), "{ended:#?}");
        hosts.kill(side);
        hosts.start(side);
    }
    assert_eq!(ends(&hosts, Side::Destination), expected);

    // Failed over at the destination alone, asked of nobody's API at the source.
    hosts.kill(Side::Source);
    let local = ["failover", "--deletion-mode", "LOCAL_CONFIGURATION_ONLY"];
    hosts.on(Side::Destination, &local).success();
    assert_eq!(protection(&hosts, Side::Destination, &replica), "ENABLED");
    hosts.start(Side::Source);
    hosts.on(Side::Source, &local).success();
    assert_eq!(described(&hosts, Side::Source, &source)["Here"], true);
    assert!(token(&hosts).is_err(), "it is protected again");

    // Anew, under the same ids and with what stands there.
    fs::write(hosts.source().join("file"), "later").unwrap();
    unprotect(&hosts, &replica);
    let second = token(&hosts).unwrap();
    hosts.create(hosts.source(), &second).success();
    assert_eq!(ends(&hosts, Side::Source), expected);
    assert_eq!(ends(&hosts, Side::Destination), expected);
    assert_eq!(fs::read(hosts.replica().join("file")).unwrap(), b"later");
    hosts.on(Side::Source, &["failover"]).success();
    for (side, id) in [(Side::Source, &source), (Side::Destination, &replica)] {
        hosts.on(side, &["delete-file-system", "--file-system-id", id]).success();
    }
    fs::write(hosts.replica().join("x"), "").expect("it is there, and writable");
}
