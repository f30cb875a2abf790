//! Two hosts, as far as the network can tell: a daemon of each kind, each in a
//! network namespace of its own, with a cable between them.

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use crate::binary;
use crate::compare;
use crate::manager::Manager;
use crate::mounts::{FileSystem, Mount, Scratch, require_root, run};
use crate::process::{Daemon, Ended, run_to_end};
use crate::scenario::patience;
use crate::serial::{self, Share};
use crate::workload::raw;

/// The destination's QUIC port.
const LISTEN: u16 = 4481;
/// Both APIs; the namespaces keep them apart.
const API: &str = "http://127.0.0.1:4480";
/// The cable's name on both hosts.
const CABLE: &str = "cable";

/// One of the two hosts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// Runs `replicator-src`.
    Source,
    /// Runs `replicator-dst`.
    Destination,
}

impl Side {
    /// Both of them.
    pub const BOTH: [Self; 2] = [Self::Source, Self::Destination];

    fn name(self) -> &'static str {
        match self {
            Self::Source => "source",
            Self::Destination => "destination",
        }
    }

    /// From the range for documentation; the namespaces know no other.
    fn address(self) -> &'static str {
        match self {
            Self::Source => "192.0.2.1",
            Self::Destination => "192.0.2.2",
        }
    }

    /// Another one on each, so that answers cannot mix them up.
    pub fn region(self) -> &'static str {
        match self {
            Self::Source => "xx-source-1",
            Self::Destination => "xx-replica-2",
        }
    }

    fn program(self) -> &'static Path {
        match self {
            Self::Source => binary::replicator_src(),
            Self::Destination => binary::replicator_dst(),
        }
    }
}

/// Two network namespaces with a cable between them.
#[derive(Debug)]
struct Network {
    id: String,
}

impl Network {
    fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        require_root();
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let network = Self { id: format!("{:x}-{number}", std::process::id()) };
        let [source, destination] = Side::BOTH.map(|side| network.namespace(side));
        ip(&["netns", "add", &source]);
        ip(&["netns", "add", &destination]);
        ip(&[
            "-n",
            &source,
            "link",
            "add",
            CABLE,
            "type",
            "veth",
            "peer",
            "name",
            CABLE,
            "netns",
            &destination,
        ]);
        for side in Side::BOTH {
            let (namespace, address) = (network.namespace(side), format!("{}/24", side.address()));
            ip(&["-n", &namespace, "address", "add", &address, "dev", CABLE]);
            ip(&["-n", &namespace, "link", "set", CABLE, "up"]);
            ip(&["-n", &namespace, "link", "set", "lo", "up"]);
        }
        network
    }

    fn namespace(&self, side: Side) -> String {
        format!("replicator-{}-{}", side.name(), self.id)
    }

    /// A program on one of the hosts. (`ip netns exec` would give it a mount
    /// namespace of its own too, and the test would not see what it mounts.)
    fn inside(&self, side: Side, program: &Path) -> Command {
        let mut command = Command::new("nsenter");
        command.arg(format!("--net=/run/netns/{}", self.namespace(side))).arg("--").arg(program);
        command
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        for side in Side::BOTH {
            let _ = Command::new("ip").args(["netns", "delete", &self.namespace(side)]).status();
        }
    }
}

fn ip(arguments: &[&str]) {
    run(Command::new("ip").args(arguments));
}

/// The library of `faketime`, which stands between a program and its clock.
#[derive(Debug)]
struct Preload {
    library: String,
}

impl Preload {
    /// Asks `faketime` where its library is.
    fn find() -> Self {
        let output = run(Command::new("faketime").args(["-m", "-f", "+0", "env"]));
        let library = output.lines().find_map(|line| line.strip_prefix("LD_PRELOAD="));
        Self { library: library.expect("faketime preloads its library").to_owned() }
    }

    /// The program reads its wall clock by `clock` from now on.
    fn apply(&self, command: &mut Command, clock: &Path) {
        command.env("LD_PRELOAD", &self.library).env("FAKETIME_TIMESTAMP_FILE", clock);
        for name in [
            "DONT_FAKE_MONOTONIC",
            "FAKETIME_DONT_FAKE_MONOTONIC",
            "FAKETIME_NO_CACHE",
            "FAKETIME_DISABLE_SHM",
            "NO_FAKE_STAT",
        ] {
            command.env(name, "1");
        }
    }
}

/// Both hosts with their daemons and file systems.
#[derive(Debug)]
pub struct Hosts {
    source_daemon: Option<Daemon>,
    destination_daemon: Option<Daemon>,
    network: Network,
    scratch: Scratch,
    source: Mount,
    replica: Mount,
    share: Option<Share>,
    /// Further lines of the source's configuration.
    source_lines: String,
    /// Starts the source's daemon, with variables that it gets wrong.
    manager: Option<Manager>,
    /// The daemons read a wall clock that the test sets.
    clocks: Option<Preload>,
}

impl Hosts {
    /// Both daemons run and know nothing of each other.
    pub fn strangers() -> Self {
        Self::strangers_on(FileSystem::Ext4, FileSystem::Xfs)
    }

    /// The same with the file systems of source and replica.
    pub fn strangers_on(source: FileSystem, replica: FileSystem) -> Self {
        Self::make(source, replica, "", None)
    }

    /// The same, with further lines in the source's configuration.
    pub fn strangers_with(source: FileSystem, replica: FileSystem, source_lines: &str) -> Self {
        Self::make(source, replica, source_lines, None)
    }

    /// Strangers with wall clocks that can be set (see [`Self::set_clock`]).
    pub fn with_clocks() -> Self {
        Self::make(FileSystem::Ext4, FileSystem::Xfs, "", Some(Preload::find()))
    }

    fn make(
        source: FileSystem,
        replica: FileSystem,
        source_lines: &str,
        clocks: Option<Preload>,
    ) -> Self {
        let share = serial::share();
        let mut hosts = Self {
            source_daemon: None,
            destination_daemon: None,
            network: Network::new(),
            scratch: Scratch::new("hosts"),
            source: Mount::new(source),
            replica: Mount::new(replica),
            share: Some(share),
            source_lines: source_lines.to_owned(),
            manager: None,
            clocks,
        };
        if hosts.clocks.is_some() {
            Side::BOTH.into_iter().for_each(|side| hosts.set_clock(side, 0));
        }
        hosts.start(Side::Destination);
        hosts.start(Side::Source);
        hosts
    }

    /// The same, and the source's daemon is a service of a manager's.
    pub fn supervised() -> Self {
        let mut hosts = Self::strangers();
        hosts.kill(Side::Source);
        hosts.manager = Some(Manager::new());
        hosts.start(Side::Source);
        hosts
    }

    /// The manager of the source's daemon.
    pub fn manager(&self) -> &Manager {
        self.manager.as_ref().expect("the source's daemon is no service")
    }

    /// Both are enrolled, and a small tree is replicated.
    pub fn enrolled() -> Self {
        Self::strangers().enrol()
    }

    /// Strangers are enrolled, and a small tree is replicated.
    #[must_use]
    pub fn enrol(self) -> Self {
        let hosts = self;
        let directory = hosts.source().join("directory");
        fs::create_dir(&directory).unwrap();
        fs::write(directory.join("file"), "content").unwrap();
        let created = hosts.create(hosts.source(), &hosts.token(&[])).success().json();
        assert!(created["SourceFileSystemId"].is_string(), "EFS's JSON: {created}");
        hosts.await_enabled(Side::Source);
        hosts.settle(&"enrolled");
        hosts
    }

    /// The source's tree, a file system of its own.
    pub fn source(&self) -> &Path {
        self.source.path()
    }

    /// A file of the source that is whole before it has a name: of one that is being
    /// written, a beginning may be replicated.
    pub fn arrives(&self, name: &str, content: &[u8]) {
        raw::arrives(self.source(), name, content);
    }

    /// Mounts the source again, after the test unmounted it.
    pub fn attach_source(&self) {
        self.source.attach();
    }

    /// The replica, a file system of its own.
    pub fn replica(&self) -> &Path {
        self.replica.path()
    }

    /// A daemon that runs.
    pub fn daemon(&self, side: Side) -> &Daemon {
        let daemon = match side {
            Side::Source => &self.source_daemon,
            Side::Destination => &self.destination_daemon,
        };
        daemon.as_ref().unwrap_or_else(|| panic!("no daemon runs on the {}", side.name()))
    }

    /// `kill -9`.
    pub fn kill(&mut self, side: Side) {
        self.slot(side).take().unwrap().kill();
    }

    /// SIGTERM.
    pub fn terminate(&mut self, side: Side) {
        assert!(self.slot(side).take().unwrap().terminate().success());
    }

    /// Whether a daemon is there; it may have ended by itself.
    pub fn is_started(&self, side: Side) -> bool {
        match side {
            Side::Source => self.source_daemon.is_some(),
            Side::Destination => self.destination_daemon.is_some(),
        }
    }

    /// A daemon's state directory.
    pub fn state_dir(&self, side: Side) -> PathBuf {
        self.scratch.path().join(side.name())
    }

    /// Starts a daemon and waits until its API answers.
    pub fn start(&mut self, side: Side) {
        self.start_with(side, &[]);
    }

    /// The same with variables of its environment; see [`Manager::service`].
    pub fn start_with(&mut self, side: Side, variables: &[(&str, &str)]) {
        let config = self.write_config(side);
        let mut check = Command::new(side.program());
        check.args(["check-config", "--config"]).arg(&config);
        run_to_end(check, Duration::from_secs(10)).success();
        self.spawn_with(side, variables);
        self.slot(side).as_mut().unwrap().wait_ready();
    }

    /// Starts a daemon that was started before, and waits for nothing.
    pub fn spawn(&mut self, side: Side) {
        self.spawn_with(side, &[]);
    }

    /// What runs a daemon, for somebody else who starts it on its host. It must
    /// have been started before.
    pub fn serving(&self, side: Side) -> Command {
        let mut command = Command::new(side.program());
        command.args(["serve", "--config"]).arg(self.config(side));
        command
    }

    /// The network namespace that is one of the hosts.
    pub fn namespace(&self, side: Side) -> PathBuf {
        Path::new("/run/netns").join(self.network.namespace(side))
    }

    fn spawn_with(&mut self, side: Side, variables: &[(&str, &str)]) {
        let config = self.config(side);
        let mut command = self.network.inside(side, side.program());
        command.args(["serve", "--config"]).arg(&config);
        if let (Side::Source, Some(manager)) = (side, &self.manager) {
            command = manager.service(&command, variables);
        }
        if let Some(preload) = &self.clocks {
            preload.apply(&mut command, &self.clock(side));
        }
        let namespace = self.namespace(side);
        let log = config.with_extension("log");
        let daemon = Daemon::spawn(command, API, &log).in_namespace(namespace);
        *self.slot(side) = Some(daemon);
    }

    fn clock(&self, side: Side) -> PathBuf {
        self.scratch.path().join(format!("{}.clock", side.name()))
    }

    /// Sets the wall clock that a daemon reads, at once: so many seconds ahead of
    /// the true time (behind it when negative). What the kernel stamps on files,
    /// and clocks that only ever go on, stay as they are.
    pub fn set_clock(&self, side: Side, ahead: i64) {
        assert!(self.clocks.is_some(), "only with `Hosts::with_clocks`");
        let (path, new) = (self.clock(side), self.clock(side).with_extension("new"));
        fs::write(&new, format!("{ahead:+}s\n")).unwrap();
        // Never half written for who reads it at each look at the clock.
        fs::rename(new, path).unwrap();
    }

    /// Waits until the API of a daemon that was spawned answers.
    pub fn wait_ready(&mut self, side: Side) {
        self.slot(side).as_mut().unwrap().wait_ready();
    }

    fn slot(&mut self, side: Side) -> &mut Option<Daemon> {
        match side {
            Side::Source => &mut self.source_daemon,
            Side::Destination => &mut self.destination_daemon,
        }
    }

    fn config(&self, side: Side) -> PathBuf {
        self.scratch.path().join(format!("{}.toml", side.name()))
    }

    fn write_config(&self, side: Side) -> PathBuf {
        let (path, state) = (self.config(side), self.state_dir(side));
        let region = side.region();
        let addresses = match side {
            // A random workload deletes more than an operator would want unseen.
            Side::Source => format!("halt_deletions_percent = 0\n{}", self.source_lines),
            Side::Destination => {
                format!("listen = \"[::]:{LISTEN}\"\nadvertise = \"{}:{LISTEN}\"\n", side.address())
            }
        };
        fs::write(&path, format!("state_dir = {state:?}\nregion = {region:?}\n{addresses}"))
            .unwrap();
        path
    }

    /// `replicator` as typed on one of the hosts.
    #[track_caller]
    pub fn on(&self, side: Side, arguments: &[&str]) -> Ended {
        let mut command = self.network.inside(side, binary::replicator());
        command.args(arguments);
        run_to_end(command, patience())
    }

    /// A new token for the replica.
    #[track_caller]
    pub fn token(&self, more: &[&str]) -> String {
        self.token_for(self.replica(), more)
    }

    /// A new token for a directory on the destination.
    #[track_caller]
    pub fn token_for(&self, replica: &Path, more: &[&str]) -> String {
        let mut command = self.network.inside(Side::Destination, binary::replicator_dst());
        command.args(["token", "--config"]).arg(self.config(Side::Destination));
        command.arg("--replica").arg(replica).args(more);
        let ended = run_to_end(command, Duration::from_secs(30)).success();
        let token = ended.stdout.trim_end();
        assert!(!token.contains(char::is_whitespace), "a token is one line: {ended:#?}");
        token.to_owned()
    }

    /// Enables replication of `source` to whom the token is of.
    #[track_caller]
    pub fn create(&self, source: &Path, token: &str) -> Ended {
        let arguments = ["create-replication-configuration", "--source", source.to_str().unwrap()];
        self.on(Side::Source, &[&arguments[..], &["--destination", token]].concat())
    }

    /// Waits until describe on one of the hosts says ENABLED and a timestamp;
    /// gives what it says.
    #[track_caller]
    pub fn await_enabled(&self, side: Side) -> serde_json::Value {
        let start = Instant::now();
        loop {
            let described =
                self.on(side, &["describe-replication-configurations"]).success().json();
            let found = &described["Replications"][0]["Destinations"][0];
            if found["Status"] == "ENABLED" && found["LastReplicatedTimestamp"].is_number() {
                return described;
            }
            assert!(start.elapsed() < patience(), "not ENABLED: {described}\n{}", self.output());
            thread::sleep(Duration::from_millis(100));
        }
    }

    /// Waits until all is replicated, and compares.
    #[track_caller]
    pub fn settle(&self, context: &dyn fmt::Display) {
        self.on(Side::Source, &["wait", "--timeout", "100"]).success();
        compare::assert_same(self.source(), self.replica(), context);
    }

    /// Pulls the cable.
    pub fn pull_cable(&self) {
        ip(&["-n", &self.network.namespace(Side::Source), "link", "set", CABLE, "down"]);
    }

    /// Puts it back.
    pub fn plug_cable(&self) {
        ip(&["-n", &self.network.namespace(Side::Source), "link", "set", CABLE, "up"]);
    }

    /// The source's host has another address from now on.
    pub fn move_source(&self, address: &str) {
        let (namespace, old) = (self.network.namespace(Side::Source), Side::Source.address());
        // (With the first address of a network, the kernel takes its others.)
        ip(&["-n", &namespace, "address", "delete", &format!("{old}/24"), "dev", CABLE]);
        ip(&["-n", &namespace, "address", "add", &format!("{address}/24"), "dev", CABLE]);
    }

    /// Lets no more through from source to destination, in `tc`'s words.
    pub fn slow_cable(&self, rate: &str) {
        let mut command = self.network.inside(Side::Source, Path::new("tc"));
        command.args(["qdisc", "add", "dev", CABLE, "root", "tbf", "rate", rate]);
        run(command.args(["burst", "64kb", "latency", "100ms"]));
    }

    /// Bytes that went from source to destination since the cable was laid: every
    /// packet of every session, with all that was sent in vain.
    pub fn shipped(&self) -> u64 {
        self.counted("tx", "bytes")
    }

    /// Packets that went over the cable, both ways.
    pub fn packets(&self) -> u64 {
        self.counted("tx", "packets") + self.counted("rx", "packets")
    }

    fn counted(&self, way: &str, what: &str) -> u64 {
        let mut command = Command::new("ip");
        let namespace = self.network.namespace(Side::Source);
        command.args(["-n", &namespace, "-json", "-statistics", "link", "show", "dev", CABLE]);
        let said = run_to_end(command, Duration::from_secs(30)).success().json();
        let count = &said[0]["stats64"][way][what];
        count.as_u64().unwrap_or_else(|| panic!("no count of {what}: {said}"))
    }

    /// Waits until so many more bytes went from source to destination.
    #[track_caller]
    pub fn await_shipped(&self, more: u64) {
        self.await_shipped_up_to(more, u64::MAX);
    }

    /// The same where no more than that is ever shipped: on a slow machine it may be
    /// reached before anybody waits for it.
    pub fn await_shipped_up_to(&self, more: u64, most: u64) {
        let (from, start) = (self.shipped(), Instant::now());
        while self.shipped() < (from + more).min(most) {
            assert!(start.elapsed() < patience(), "nothing moves:\n{}", self.output());
            thread::sleep(Duration::from_millis(20));
        }
    }

    /// Ctrl-C, and waits for the end: the session ends in the same moment.
    pub fn interrupt(&mut self, side: Side) {
        let status = self.slot(side).take().unwrap().interrupt();
        assert!(status.success(), "{status}");
    }

    /// Lets other tests run: this one only waits from now on.
    pub fn give_up_share(&mut self) {
        self.share = None;
    }

    /// What the running daemons printed.
    fn output(&self) -> String {
        let daemons = [&self.source_daemon, &self.destination_daemon];
        let outputs = daemons.into_iter().flatten().map(Daemon::output);
        outputs.collect::<Vec<_>>().join("\n--\n")
    }
}
