//! Several configurations between the same two daemons.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use replicator_tests::compare;
use replicator_tests::fuse::Device;
use replicator_tests::hosts::{Hosts, Side};
use replicator_tests::mounts::FileSystem::Ext4;
use replicator_tests::mounts::Mount;
use replicator_tests::scenario::patience;
use rustix::mount::UnmountFlags;
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

/// A file system that answers nothing, mounted over a directory.
struct Hanging<'a>(&'a Path, Option<Device>);

impl<'a> Hanging<'a> {
    fn over(directory: &'a Path) -> Self {
        Self(directory, Some(Device::mount(directory, 1 << 20).unwrap()))
    }
}

impl Drop for Hanging<'_> {
    fn drop(&mut self) {
        // Whoever waits for it gets an error now.
        self.1 = None;
        let _ = rustix::mount::unmount(self.0, UnmountFlags::DETACH);
    }
}

/// One replication has ended with an error and is to be started again, but its file
/// system hangs by then: whoever fails over the other one does not wait for that.
#[test]
fn a_source_that_hangs_while_it_is_started_holds_up_no_other() {
    let mut hosts = Hosts::enrolled();
    let first =
        described(&hosts, Side::Source)[0]["SourceFileSystemId"].as_str().unwrap().to_owned();
    let other = Pair::enrol(&hosts);
    settle(&hosts, &other.id, other.source.path(), other.replica.path());
    hosts.kill(Side::Source);
    let boot = hosts.state_dir(Side::Source).join("replications").join(&other.id).join("boot");
    fs::remove_file(&boot).unwrap();
    fs::create_dir(&boot).unwrap();
    hosts.start(Side::Source);
    let status = |hosts: &Hosts, id: &str| {
        let all = described(hosts, Side::Source);
        all.into_iter().find(|one| one["SourceFileSystemId"] == id).unwrap()
    };
    assert_eq!(status(&hosts, &other.id)["Destinations"][0]["Status"], "ERROR");

    let hanging = Hanging::over(other.source.path());
    // It is tried after a second, and after two more, and so on.
    std::thread::sleep(Duration::from_secs(8));
    fs::write(hosts.source().join("more"), "while the other hangs").unwrap();
    settle(&hosts, &first, hosts.source(), hosts.replica());
    hosts.on(Side::Source, &["failover", "--source-file-system-id", &first]).success();
    fs::write(hosts.replica().join("x"), "").expect("writable after failover");

    // Nor does a start of the daemon, or its end.
    for end in [Hosts::kill, Hosts::terminate] {
        end(&mut hosts, Side::Source);
        hosts.start(Side::Source);
        assert_eq!(status(&hosts, &other.id)["Destinations"][0]["Status"], "ERROR");
    }

    // What stood in its way is gone: it goes on by itself.
    drop(hanging);
    fs::remove_dir(&boot).unwrap();
    fs::write(other.source.path().join("other"), "afterwards").unwrap();
    let end = Instant::now() + patience();
    while status(&hosts, &other.id)["Destinations"][0]["Status"] != "ENABLED" {
        assert!(Instant::now() < end, "{}", status(&hosts, &other.id));
        std::thread::sleep(Duration::from_millis(200));
    }
    settle(&hosts, &other.id, other.source.path(), other.replica.path());
}
