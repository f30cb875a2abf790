//! Two daemons on two hosts, as far as the network can tell: each lives in a
//! network namespace of its own, with a cable between them.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use replicator_common::status::ReplicationStatus;
use replicator_tests::binary;
use replicator_tests::compare;
use replicator_tests::mounts::FileSystem::{Ext4, Xfs};
use replicator_tests::mounts::{Mount, Scratch, require_root, run};
use replicator_tests::process::{Daemon, Ended, run_to_end};
use replicator_tests::scenario::PATIENCE;
use replicator_tests::serial::{self, Share};
use replicator_tests::workload::Workload;

const SOURCE_ADDRESS: &str = "192.0.2.1";
const DESTINATION_ADDRESS: &str = "192.0.2.2";
/// The destination's QUIC port.
const LISTEN: u16 = 4481;
/// Both APIs; the namespaces keep them apart.
const API: &str = "http://127.0.0.1:4480";

/// Two network namespaces with a cable between them.
struct Network {
    source: String,
    destination: String,
}

impl Network {
    fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        require_root();
        let id = format!("{:x}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let network = Self { source: format!("rs{id}"), destination: format!("rd{id}") };
        let (source, destination) = (&network.source, &network.destination);
        ip(&["netns", "add", source]);
        ip(&["netns", "add", destination]);
        let peer = ["peer", "name", "cable", "netns", destination];
        ip(&[&["-n", source, "link", "add", "cable", "type", "veth"][..], &peer].concat());
        for (namespace, address) in [(source, SOURCE_ADDRESS), (destination, DESTINATION_ADDRESS)] {
            ip(&["-n", namespace, "address", "add", &format!("{address}/24"), "dev", "cable"]);
            ip(&["-n", namespace, "link", "set", "cable", "up"]);
            ip(&["-n", namespace, "link", "set", "lo", "up"]);
        }
        network
    }

    /// Pulls the cable, or puts it back.
    fn set_cable(&self, state: &str) {
        ip(&["-n", &self.source, "link", "set", "cable", state]);
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        for namespace in [&self.source, &self.destination] {
            let _ = Command::new("ip").args(["netns", "delete", namespace]).status();
        }
    }
}

fn ip(arguments: &[&str]) {
    run(Command::new("ip").args(arguments));
}

/// A program in a network namespace. (`ip netns exec` would give it a mount
/// namespace of its own too, and the test would not see its read-only mount.)
fn inside(namespace: &str, program: &Path) -> Command {
    let mut command = Command::new("nsenter");
    command.arg(format!("--net=/run/netns/{namespace}")).arg("--").arg(program);
    command
}

/// A daemon of each kind, each in its namespace, with their file systems.
struct Hosts {
    source_daemon: Option<Daemon>,
    destination_daemon: Option<Daemon>,
    network: Network,
    scratch: Scratch,
    source: Mount,
    replica: Mount,
    share: Option<Share>,
}

impl Hosts {
    fn new() -> Self {
        let share = serial::share();
        let mut hosts = Self {
            source_daemon: None,
            destination_daemon: None,
            network: Network::new(),
            scratch: Scratch::new("hosts"),
            source: Mount::new(Ext4),
            replica: Mount::new(Xfs),
            share: Some(share),
        };
        hosts.start_destination();
        hosts.start_source();
        hosts
    }

    fn start_source(&mut self) {
        let config = self.write_config("source", "");
        let namespace = &self.network.source;
        self.source_daemon = Some(self.serve(binary::replicator_src(), namespace, &config));
    }

    fn start_destination(&mut self) {
        let addresses =
            format!("listen = \"[::]:{LISTEN}\"\nadvertise = \"{DESTINATION_ADDRESS}:{LISTEN}\"\n");
        let config = self.write_config("destination", &addresses);
        let namespace = &self.network.destination;
        self.destination_daemon = Some(self.serve(binary::replicator_dst(), namespace, &config));
    }

    fn write_config(&self, side: &str, more: &str) -> PathBuf {
        let path = self.scratch.path().join(format!("{side}.toml"));
        let state = self.scratch.path().join(side);
        fs::write(&path, format!("state_dir = {:?}\n{more}", state)).unwrap();
        path
    }

    fn serve(&self, program: &Path, namespace: &str, config: &Path) -> Daemon {
        let check = {
            let mut command = Command::new(program);
            command.args(["check-config", "--config"]).arg(config);
            run_to_end(command, Duration::from_secs(10))
        };
        check.success();
        let mut command = inside(namespace, program);
        command.args(["serve", "--config"]).arg(config);
        let path = Path::new("/run/netns").join(namespace);
        let mut daemon =
            Daemon::spawn(command, API, &config.with_extension("log")).in_namespace(path);
        daemon.wait_ready();
        daemon
    }

    /// `replicator` as typed on one of the hosts.
    fn on(&self, namespace: &str, arguments: &[&str]) -> Ended {
        let mut command = inside(namespace, binary::replicator());
        command.args(arguments);
        run_to_end(command, PATIENCE)
    }

    fn on_source(&self, arguments: &[&str]) -> Ended {
        self.on(&self.network.source, arguments)
    }

    fn on_destination(&self, arguments: &[&str]) -> Ended {
        self.on(&self.network.destination, arguments)
    }

    /// A new token for the replica.
    fn token(&self, more: &[&str]) -> String {
        let config = self.scratch.path().join("destination.toml");
        let mut command = inside(&self.network.destination, binary::replicator_dst());
        command.args(["token", "--config"]).arg(config).arg("--replica").arg(self.replica.path());
        command.args(more);
        let mut ended = run_to_end(command, Duration::from_secs(30)).success();
        ended.stdout.truncate(ended.stdout.trim_end().len());
        assert_eq!(ended.stdout.lines().count(), 1, "a token is one line: {ended:#?}");
        ended.stdout
    }

    fn create(&self, token: &str) -> Ended {
        let source = self.source.path().to_str().unwrap();
        let arguments = ["create-replication-configuration", "--source", source, "--destination"];
        self.on_source(&[&arguments[..], &[token]].concat())
    }

    /// Waits until describe on `namespace` says `status`.
    fn await_status(&self, namespace: &str, status: &str) -> serde_json::Value {
        let start = std::time::Instant::now();
        loop {
            let ended = self.on(namespace, &["describe-replication-configurations"]);
            if ended.code == Some(0) {
                let described = ended.json();
                let found = &described["Replications"][0]["Destinations"][0];
                if found["Status"] == status && found["LastReplicatedTimestamp"].is_number() {
                    return described;
                }
            }
            assert!(start.elapsed() < PATIENCE, "never {status}: {}", self.words());
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    fn settle(&self, context: &dyn std::fmt::Display) {
        self.on_source(&["wait", "--timeout", "120"]).success();
        compare::assert_same(self.source.path(), self.replica.path(), context);
    }

    /// What both daemons printed last.
    fn words(&self) -> String {
        let daemons = [&self.source_daemon, &self.destination_daemon];
        let output = |daemon: &&Option<Daemon>| daemon.as_ref().map(Daemon::output);
        daemons.iter().filter_map(output).collect::<Vec<_>>().join("\n--\n")
    }

    fn enrolled() -> Self {
        let hosts = Self::new();
        let directory = hosts.source.path().join("directory");
        fs::create_dir(&directory).unwrap();
        fs::write(directory.join("file"), "content").unwrap();
        let created = hosts.create(&hosts.token(&[])).success().json();
        assert!(created["SourceFileSystemId"].is_string(), "EFS's JSON: {created}");
        hosts.await_status(&hosts.network.source, "ENABLED");
        hosts.settle(&"enrolled");
        hosts
    }
}

#[test]
fn replicates_and_fails_over_with_the_source_dead() {
    let mut hosts = Hosts::enrolled();
    let workload = Workload { steps: 400, ..Workload::new() };
    let root = hosts.source.path().join("root");
    let beside = hosts.source.path().join("beside");
    fs::create_dir(&root).unwrap();
    fs::create_dir(&beside).unwrap();
    workload.run(&root, &beside);
    hosts.settle(&workload);

    // The destination's own view, and it says the same.
    let here = hosts.await_status(&hosts.network.source, "ENABLED");
    let there = hosts.await_status(&hosts.network.destination, "ENABLED");
    let id = |described: &serde_json::Value| {
        described["Replications"][0]["SourceFileSystemId"].as_str().unwrap().to_owned()
    };
    assert_eq!(id(&here), id(&there));
    let status = hosts.on_destination(&["status", "--json"]).success().json();
    assert!(status.to_string().contains("TimeSinceLastSync"), "{status}");

    hosts.source_daemon.take().unwrap().kill();
    fs::write(hosts.replica.path().join("x"), "").expect_err("still read-only");
    let mode = ["--deletion-mode", "LOCAL_CONFIGURATION_ONLY"];
    let delete = ["delete-replication-configuration", "--source-file-system-id", &id(&there)];
    let both = hosts.on_destination(&delete);
    assert_eq!(both.code, Some(1), "both sides cannot be reached: {both:#?}");
    assert!(both.stderr.contains("LOCAL_CONFIGURATION_ONLY"), "it says what works: {both:#?}");
    hosts.on_destination(&[&delete[..], &mode].concat()).success();
    compare::assert_same(hosts.source.path(), hosts.replica.path(), &workload);
    fs::write(hosts.replica.path().join("x"), "").expect("writable after failover");
}

#[test]
fn goes_on_after_the_cable_was_pulled_and_after_restarts() {
    let mut hosts = Hosts::enrolled();
    let write = |hosts: &Hosts, name: &str| {
        fs::write(hosts.source.path().join("directory").join(name), name).unwrap();
    };
    hosts.network.set_cable("down");
    write(&hosts, "while-pulled");
    let wait = hosts.on_source(&["wait", "--timeout", "2"]);
    assert_eq!(wait.code, Some(3), "a wait cannot succeed without a cable: {wait:#?}");
    assert!(!hosts.replica.path().join("directory/while-pulled").exists());
    hosts.network.set_cable("up");
    hosts.settle(&"the cable is back");

    hosts.destination_daemon.take().unwrap().kill();
    write(&hosts, "while-killed");
    hosts.start_destination();
    hosts.settle(&"the destination is back");

    hosts.source_daemon.take().unwrap().kill();
    write(&hosts, "while-nobody-watched");
    hosts.start_source();
    hosts.await_status(&hosts.network.source, "ENABLED");
    hosts.settle(&"the source is back");
}

#[test]
fn failover_with_both_sides_alive() {
    let hosts = Hosts::enrolled();
    let status = hosts.on_source(&["status", "--json"]).success().json().to_string();
    assert!(status.contains(&format!("{:?}", ReplicationStatus::Enabled.as_str())));
    hosts.on_source(&["failover"]).success();
    fs::write(hosts.replica.path().join("x"), "").expect("writable after failover");
    for namespace in [&hosts.network.source, &hosts.network.destination] {
        let described = hosts.on(namespace, &["describe-replication-configurations"]);
        let described = described.success().json();
        assert_eq!(described["Replications"].as_array().map(Vec::len), Some(0), "{described}");
    }
}

#[test]
fn tokens_are_good_once_for_a_time_and_as_they_are() {
    let hosts = Hosts::new();
    fs::write(hosts.source.path().join("file"), "content").unwrap();
    let expect = |token: &str, said: &str, case: &str| {
        let ended = hosts.create(token);
        assert_eq!(ended.code, Some(1), "{case}: {ended:#?}");
        let text = ended.stderr.to_lowercase();
        assert!(text.contains(said), "{case}: {said:?} is not in {ended:#?}");
    };
    expect("nonsense", "token", "not a token");
    let token = hosts.token(&[]);
    let mut damaged = token.clone().into_bytes();
    let last = damaged.len() - 5;
    damaged[last] = if damaged[last] == b'A' { b'B' } else { b'A' };
    expect(&String::from_utf8(damaged).unwrap(), "damaged", "damaged");
    expect(&token.replacen("replicator1:", "replicator9:", 1), "version", "of a newer program");

    hosts.create(&token).success();
    hosts.await_status(&hosts.network.source, "ENABLED");
    let other = Mount::new(Ext4);
    let source = other.path().to_str().unwrap();
    let create = ["create-replication-configuration", "--source", source, "--destination", &token];
    let used = hosts.on_source(&create);
    assert_eq!(used.code, Some(1), "{used:#?}");
    assert!(used.stderr.contains("used"), "a used token: {used:#?}");
    hosts.settle(&"a stranger's attempts change nothing");
}

/// The shortest validity is a minute, and this test takes no share of the
/// machine while it sleeps through it.
#[test]
fn an_expired_token_is_refused() {
    let mut hosts = Hosts::new();
    let token = hosts.token(&["--valid-seconds", "60"]);
    hosts.share = None;
    std::thread::sleep(Duration::from_secs(61));
    let ended = hosts.create(&token);
    assert_eq!(ended.code, Some(1), "{ended:#?}");
    assert!(ended.stderr.contains("expired"), "{ended:#?}");
}
