//! This project's: `replicator run` on one host, a daemon of each kind on two.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use replicator_common::status::{ReplicationStatus, Status};
use replicator_common::time::Timestamp;
use replicator_tests::binary;

use crate::http;
use crate::peers::{Abilities, PASS_LIMIT, Peer, Session, first_line};
use crate::site::{End, Service, Site, ask};

const API: &str = "127.0.0.1:4480";
const LISTEN: u16 = 4481;
/// Between two looks at the status.
const POLL: Duration = Duration::from_millis(20);
/// The workloads delete more than an operator would want unseen.
const NEVER_HALT: &str = "halt_deletions_percent = 0";

/// replicator.
pub struct Replicator;

impl Peer for Replicator {
    fn name(&self) -> &'static str {
        "replicator"
    }

    fn settings(&self) -> &'static str {
        "`replicator run [--once] --halt-deletions-percent 0`; between two hosts a daemon on each"
    }

    fn version(&self) -> Option<String> {
        first_line(Command::new(binary::replicator()).arg("--version"))
    }

    fn abilities(&self) -> Abilities {
        Abilities { follows: true, mirrors: true, network: true, only_on: None }
    }

    fn prepare(&self, site: &Arc<Site>) -> Result<Box<dyn Session>> {
        if site.net.is_long() {
            return Ok(Box::new(Hosts::start(site)?));
        }
        Ok(Box::new(Run { site: site.clone(), daemon: None }))
    }

    fn seconds_behind(&self, site: &Site) -> Result<Option<f64>> {
        let there = status(site)?.and_then(|status| status.destination);
        let replicated = there.and_then(|there| there.last_replicated);
        let replicated = replicated.context("replicator says no LastReplicatedTimestamp")?;
        Ok(Some(Timestamp::now().since(replicated).as_secs_f64()))
    }
}

/// Both ends in one process.
struct Run {
    site: Arc<Site>,
    daemon: Option<Service>,
}

impl Run {
    fn command(&self) -> Result<Command> {
        let mut command = self.site.command(End::Source, binary::replicator())?;
        command.arg("run").arg(&self.site.source).arg(&self.site.replica);
        command.arg("--state-dir").arg(self.site.scratch("state"));
        command.args(["--api", API, "--halt-deletions-percent", "0"]).env("RUST_LOG", "warn");
        Ok(command)
    }
}

impl Session for Run {
    fn pass(&mut self) -> Result<()> {
        let mut command = self.command()?;
        command.arg("--once");
        self.site.run(command, &[0], PASS_LIMIT)
    }

    fn follow(&mut self) -> Result<()> {
        let mut daemon = self.site.spawn(self.command()?)?;
        until_enabled(&self.site, &mut daemon)?;
        self.daemon = Some(daemon);
        Ok(())
    }

    fn rest(&mut self) -> Result<()> {
        self.daemon.take().map_or(Ok(()), Service::stop)
    }
}

/// A daemon of each kind, each on its host.
struct Hosts {
    site: Arc<Site>,
    source: Service,
    _destination: Service,
    token: String,
}

impl Hosts {
    fn start(site: &Arc<Site>) -> Result<Self> {
        let there = format!(
            "listen = \"[::]:{LISTEN}\"\nadvertise = \"{}:{LISTEN}\"\n[[replica]]\npath = {:?}\n",
            site.net.address, site.replica
        );
        let there = config(site, "destination", &there)?;
        let here = config(site, "source", NEVER_HALT)?;
        let destination = serve(site, End::Destination, binary::replicator_dst(), &there)?;
        let source = serve(site, End::Source, binary::replicator_src(), &here)?;
        let mut command = site.command(End::Destination, binary::replicator_dst())?;
        command.args(["token", "--config"]).arg(there).arg("--replica").arg(&site.replica);
        let token = ask(&mut command)?;
        Ok(Self { site: site.clone(), source, _destination: destination, token })
    }
}

impl Session for Hosts {
    fn pass(&mut self) -> Result<()> {
        let mut command = self.site.command(End::Source, binary::replicator())?;
        command.arg("create-replication-configuration").arg("--source").arg(&self.site.source);
        command.arg("--destination").arg(&self.token);
        ask(&mut command)?;
        until_enabled(&self.site, &mut self.source)
    }

    fn follow(&mut self) -> Result<()> {
        self.pass()
    }

    fn rest(&mut self) -> Result<()> {
        Ok(())
    }
}

fn config(site: &Site, name: &str, lines: &str) -> Result<PathBuf> {
    let state = site.scratch(&format!("{name}-state"));
    site.write(&format!("{name}.toml"), &format!("state_dir = {state:?}\n{lines}\n"))
}

/// Starts a daemon and waits until its API answers.
fn serve(site: &Site, end: End, program: &Path, config: &Path) -> Result<Service> {
    let mut command = site.command(end, program)?;
    command.args(["serve", "--config"]).arg(config).env("RUST_LOG", "warn");
    let mut daemon = site.spawn(command)?;
    let url = format!("http://{API}/replicator/v1/status");
    let times = (POLL, Duration::from_secs(30));
    daemon.until("the API answers", times, |_| {
        Ok(http::get::<Vec<Status>>(site.namespace(end), &url, "").is_ok())
    })?;
    Ok(daemon)
}

/// Waits until the initial sync is through.
fn until_enabled(site: &Site, daemon: &mut Service) -> Result<()> {
    daemon.until("the status is ENABLED", (POLL, PASS_LIMIT), |_| {
        let enabled = |status: Status| {
            status.status == ReplicationStatus::Enabled
                && status.destination.is_some_and(|there| there.last_replicated.is_some())
        };
        // The API may not answer yet.
        Ok(status(site).ok().flatten().is_some_and(enabled))
    })
}

/// What the source's side says of the one replication.
fn status(site: &Site) -> Result<Option<Status>> {
    let url = format!("http://{API}/replicator/v1/status");
    let all: Vec<Status> = http::get(site.namespace(End::Source), &url, "")?;
    Ok(all.into_iter().next())
}
