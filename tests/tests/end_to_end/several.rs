//! Several configurations between the same two daemons.

use std::fs;
use std::path::Path;

use replicator_tests::compare;
use replicator_tests::hosts::{Hosts, Side};
use replicator_tests::mounts::FileSystem::Ext4;
use replicator_tests::mounts::Mount;
use serde_json::Value;

/// A pair beside the one that the hosts have.
struct Pair {
    source: Mount,
    replica: Mount,
    id: String,
}

impl Pair {
    fn enrol(hosts: &Hosts) -> Self {
        let (source, replica) = (Mount::new(Ext4), Mount::new(Ext4));
        fs::write(source.path().join("other"), "of the other source").unwrap();
        let token = hosts.token_for(replica.path(), &[]);
        let created = hosts.create(source.path(), &token).success().json();
        let id = created["SourceFileSystemId"].as_str().unwrap().to_owned();
        Self { source, replica, id }
    }
}

fn described(hosts: &Hosts, side: Side) -> Vec<Value> {
    let described = hosts.on(side, &["describe-replication-configurations"]).success().json();
    described["Replications"].as_array().unwrap().clone()
}

#[track_caller]
fn settle(hosts: &Hosts, id: &str, source: &Path, replica: &Path) {
    let wait = ["wait", "--timeout", "100", "--source-file-system-id", id];
    hosts.on(Side::Source, &wait).success();
    compare::assert_same(source, replica, &id);
}

#[test]
fn one_is_failed_over_and_the_other_goes_on() {
    let mut hosts = Hosts::enrolled();
    let first =
        described(&hosts, Side::Source)[0]["SourceFileSystemId"].as_str().unwrap().to_owned();
    let other = Pair::enrol(&hosts);
    settle(&hosts, &other.id, other.source.path(), other.replica.path());
    fs::write(hosts.source().join("more"), "of the first source").unwrap();
    settle(&hosts, &first, hosts.source(), hosts.replica());

    // Both sides tell the same of both, regions included.
    for side in [Side::Source, Side::Destination] {
        let all = described(&hosts, side);
        assert_eq!(all.len(), 2, "{side:?}: {all:?}");
        for one in &all {
            assert_eq!(one["SourceFileSystemRegion"], Side::Source.region(), "{side:?}: {one}");
            let region = &one["Destinations"][0]["Region"];
            assert_eq!(region, Side::Destination.region(), "{side:?}: {one}");
        }
    }

    // Both come back after a restart of either side.
    for side in [Side::Destination, Side::Source] {
        hosts.kill(side);
        hosts.start(side);
        fs::write(other.source.path().join("other"), format!("after {side:?} came back")).unwrap();
        settle(&hosts, &other.id, other.source.path(), other.replica.path());
        settle(&hosts, &first, hosts.source(), hosts.replica());
    }

    hosts.on(Side::Source, &["failover", "--source-file-system-id", &other.id]).success();
    fs::write(other.replica.path().join("x"), "").expect("writable after failover");
    fs::write(hosts.replica().join("x"), "").expect_err("the other one is read-only still");
    fs::write(hosts.source().join("more"), "after the failover of the other").unwrap();
    settle(&hosts, &first, hosts.source(), hosts.replica());

    // Its certificate is pinned still, for the other; it may not come back.
    for side in [Side::Source, Side::Destination] {
        let left = described(&hosts, side);
        assert_eq!(left.len(), 1, "{side:?}: {left:?}");
        assert_eq!(left[0]["SourceFileSystemId"], first.as_str(), "{side:?}");
    }
}
