//! A daemon of each kind on this host, and a bad network between them: what
//! they say to each other goes through a [`Relay`].

use std::fmt;
use std::fs;
use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use replicator_common::status::{DestinationReport, Link, SourceReport};

use crate::binary;
use crate::compare;
use crate::hosts::Side;
use crate::mounts::{FileSystem, Mount, Scratch};
use crate::process::{Daemon, Ended, free_port, run_to_end};
use crate::relay::Relay;
use crate::scenario::patience;
use crate::serial::{self, Share};

/// Both daemons with their file systems, and what stands between them.
#[derive(Debug)]
pub struct Line {
    source_daemon: Option<Daemon>,
    destination_daemon: Option<Daemon>,
    /// The network.
    pub relay: Relay,
    listen: SocketAddr,
    /// What tokens name.
    advertise: String,
    /// Is put before the source's daemon: `unshare …`, say.
    wrap: Vec<String>,
    scratch: Scratch,
    source: Mount,
    replica: Mount,
    _share: Share,
}

/// A UDP address of this host that nobody listens on now.
pub fn free_address() -> SocketAddr {
    UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).and_then(|socket| socket.local_addr()).unwrap()
}

impl Line {
    /// Both daemons run and are enrolled, and a small tree is replicated. What
    /// the network does at random, it draws from `seed`.
    pub fn enrolled(seed: u64) -> Self {
        let listen = free_address();
        let relay = Relay::new(listen, seed);
        let advertise = relay.address().to_string();
        Self::with(relay, listen, advertise, Vec::new())
    }

    /// The same with a relay of one's own before a destination that listens at
    /// `listen`; tokens name `advertise`; the source's daemon is started as the
    /// last arguments of `wrap`, which finds the source's path in the variable
    /// `REPLICATOR_TEST_SOURCE`.
    pub fn with(relay: Relay, listen: SocketAddr, advertise: String, wrap: Vec<String>) -> Self {
        let share = serial::share();
        let mut line = Self {
            source_daemon: None,
            destination_daemon: None,
            relay,
            listen,
            advertise,
            wrap,
            scratch: Scratch::new("line"),
            source: Mount::new(FileSystem::Ext4),
            replica: Mount::new(FileSystem::Xfs),
            _share: share,
        };
        line.start(Side::Destination);
        line.start(Side::Source);
        line.enrol();
        line
    }

    fn enrol(&mut self) {
        let directory = self.source().join("directory");
        fs::create_dir(&directory).unwrap();
        fs::write(directory.join("file"), "content").unwrap();
        let mut token = Command::new(binary::replicator_dst());
        token.args(["token", "--config"]).arg(self.config(Side::Destination));
        token.arg("--replica").arg(self.replica());
        let token = run_to_end(token, Duration::from_secs(30)).success().stdout;
        let source = self.source().to_str().unwrap().to_owned();
        let create = ["create-replication-configuration", "--source", &source, "--destination"];
        self.on(Side::Source, &[&create[..], &[token.trim_end()]].concat()).success();
        self.slot(Side::Source).as_mut().unwrap().wait_enabled(patience());
        self.settle(&"enrolled");
    }

    /// The source's tree, a file system of its own.
    pub fn source(&self) -> &Path {
        self.source.path()
    }

    /// The replica, a file system of its own.
    pub fn replica(&self) -> &Path {
        self.replica.path()
    }

    /// A directory beside them, on this host's file system.
    pub fn scratch(&self) -> &Path {
        self.scratch.path()
    }

    /// Where a daemon keeps its state.
    pub fn state(&self, side: Side) -> PathBuf {
        self.scratch.path().join(name(side))
    }

    fn config(&self, side: Side) -> PathBuf {
        self.scratch.path().join(format!("{}.toml", name(side)))
    }

    /// Starts a daemon and waits until its API answers.
    pub fn start(&mut self, side: Side) {
        let daemon = self.spawn(side, &self.state(side), name(side));
        *self.slot(side) = Some(daemon);
    }

    /// A daemon with a state directory of the caller's choice; `label` names its
    /// files.
    pub fn spawn(&self, side: Side, state: &Path, label: &str) -> Daemon {
        let api = format!("127.0.0.1:{}", free_port());
        let mut text = format!("state_dir = {state:?}\napi = {api:?}\n");
        if side == Side::Destination {
            text += &format!("listen = \"{}\"\nadvertise = {:?}\n", self.listen, self.advertise);
        }
        let config = self.scratch.path().join(format!("{label}.toml"));
        fs::write(&config, text).unwrap();
        let program = match side {
            Side::Source => binary::replicator_src(),
            Side::Destination => binary::replicator_dst(),
        };
        let mut command = match self.wrap.split_first() {
            Some((first, rest)) if side == Side::Source => {
                let mut command = Command::new(first);
                command.args(rest).arg(program);
                command
            }
            _ => Command::new(program),
        };
        command.args(["serve", "--config"]).arg(&config);
        command.env("REPLICATOR_TEST_SOURCE", self.source());
        let log = config.with_extension("log");
        let mut daemon = Daemon::spawn(command, &format!("http://{api}"), &log);
        daemon.wait_ready();
        daemon
    }

    /// `kill -9`.
    pub fn kill(&mut self, side: Side) {
        self.slot(side).take().unwrap().kill();
    }

    fn slot(&mut self, side: Side) -> &mut Option<Daemon> {
        match side {
            Side::Source => &mut self.source_daemon,
            Side::Destination => &mut self.destination_daemon,
        }
    }

    /// A daemon that runs.
    pub fn daemon(&self, side: Side) -> &Daemon {
        let daemon = match side {
            Side::Source => &self.source_daemon,
            Side::Destination => &self.destination_daemon,
        };
        daemon.as_ref().unwrap_or_else(|| panic!("no daemon runs on the {}", name(side)))
    }

    /// `replicator` as typed to one of the daemons.
    #[track_caller]
    pub fn on(&self, side: Side, arguments: &[&str]) -> Ended {
        let mut command = Command::new(binary::replicator());
        command.arg("--endpoint").arg(self.daemon(side).endpoint()).args(arguments);
        run_to_end(command, patience())
    }

    /// The source's view of itself.
    pub fn source_report(&self) -> SourceReport {
        self.daemon(Side::Source).status().source.unwrap()
    }

    /// The destination's view of itself.
    pub fn destination_report(&self) -> DestinationReport {
        self.daemon(Side::Destination).status().destination.unwrap()
    }

    /// What one of the sides says of the connection.
    pub fn link(&self, side: Side) -> Link {
        match side {
            Side::Source => self.source_report().link,
            Side::Destination => self.destination_report().link,
        }
    }

    /// Waits until one of the sides says that there is a connection, or none.
    #[track_caller]
    pub fn await_link(&self, side: Side, connected: bool) -> Link {
        let begin = Instant::now();
        loop {
            let link = self.link(side);
            if link.connected == connected {
                return link;
            }
            assert!(begin.elapsed() < patience(), "{side:?} still says {link:?}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Waits until all is replicated, and compares.
    #[track_caller]
    pub fn settle(&self, context: &dyn fmt::Display) {
        self.daemon(Side::Source).wait(patience());
        compare::assert_same(self.source(), self.replica(), context);
    }
}

fn name(side: Side) -> &'static str {
    match side {
        Side::Source => "source",
        Side::Destination => "destination",
    }
}
