//! Syncthing: two instances, each with a home of its own, that know each other's
//! address and nobody else.

use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use serde::Deserialize;
use serde_json::Value;

use crate::http;
use crate::peers::{Abilities, PASS_LIMIT, Peer, Session, first_line};
use crate::site::{End, Service, Site, ask};

const KEY: &str = "bench";
/// How often it is asked whether it is done.
const POLL: Duration = Duration::from_millis(100);

/// Syncthing.
pub struct Syncthing;

impl Peer for Syncthing {
    fn name(&self) -> &'static str {
        "syncthing"
    }

    fn settings(&self) -> &'static str {
        "send-only to receive-only, `fsWatcherDelayS=1`, no discovery, no relays, no NAT"
    }

    fn version(&self) -> Option<String> {
        first_line(Command::new("syncthing").arg("--version"))
    }

    fn abilities(&self) -> Abilities {
        Abilities { follows: true, mirrors: true, network: true, only_on: None }
    }

    fn prepare(&self, site: &Arc<Site>) -> Result<Box<dyn Session>> {
        let [source, destination] =
            [generate(site, End::Source)?, generate(site, End::Destination)?];
        for end in [End::Source, End::Destination] {
            let config = config(site, end, &source, &destination);
            site.write(&format!("{}/config.xml", home(end)), &config)?;
        }
        Ok(Box::new(Pair { site: site.clone(), destination, running: Vec::new() }))
    }
}

struct Pair {
    site: Arc<Site>,
    /// The receiving device.
    destination: String,
    running: Vec<Service>,
}

impl Session for Pair {
    fn pass(&mut self) -> Result<()> {
        self.follow()
    }

    fn follow(&mut self) -> Result<()> {
        self.rest()?;
        for end in [End::Destination, End::Source] {
            let mut command = self.site.command(end, "syncthing")?;
            command.arg("serve").arg("--home").arg(self.site.scratch(home(end)));
            command.args(["--no-browser", "--no-restart", "--no-upgrade"]);
            self.running.push(self.site.spawn(command)?);
        }
        let (site, device) = (self.site.clone(), self.destination.clone());
        let source = self.running.last_mut().context("syncthing was not started")?;
        // It may not answer yet.
        source.until("the replica is complete", (POLL, PASS_LIMIT), |_| {
            Ok(is_complete(&site, &device).unwrap_or(false))
        })
    }

    fn rest(&mut self) -> Result<()> {
        self.running.drain(..).try_for_each(Service::stop)
    }
}

fn home(end: End) -> &'static str {
    match end {
        End::Source => "syncthing-source",
        End::Destination => "syncthing-destination",
    }
}

/// The port of an instance's API; that of its protocol is one less.
fn api(end: End) -> u16 {
    match end {
        End::Source => 22_002,
        End::Destination => 22_012,
    }
}

/// Makes an instance's keys; gives its device's name.
fn generate(site: &Site, end: End) -> Result<String> {
    let home = site.scratch(home(end));
    ask(site.command(end, "syncthing")?.arg("generate").arg("--home").arg(&home))?;
    ask(site.command(end, "syncthing")?.arg("serve").arg("--device-id").arg("--home").arg(&home))
}

fn config(site: &Site, end: End, source: &str, destination: &str) -> String {
    let (kind, path, listen) = match end {
        End::Source => ("sendonly", &site.source, "127.0.0.1"),
        End::Destination => ("receiveonly", &site.replica, site.net.address),
    };
    // The source calls; the destination waits for it.
    let address = format!("tcp://{}:{}", site.net.address, api(End::Destination) - 1);
    format!(
        "<configuration version=\"35\">\n\
         <folder id=\"tree\" path=\"{path}\" type=\"{kind}\" rescanIntervalS=\"86400\" \
         fsWatcherEnabled=\"true\" fsWatcherDelayS=\"1\">\n\
         <device id=\"{source}\"></device><device id=\"{destination}\"></device>\n\
         <markerName>.</markerName></folder>\n\
         <device id=\"{source}\" name=\"source\"><address>dynamic</address></device>\n\
         <device id=\"{destination}\" name=\"destination\"><address>{address}</address></device>\n\
         <gui enabled=\"true\"><address>127.0.0.1:{}</address><apikey>{KEY}</apikey></gui>\n\
         <options><listenAddress>tcp://{listen}:{}</listenAddress>\
         <globalAnnounceEnabled>false</globalAnnounceEnabled>\
         <localAnnounceEnabled>false</localAnnounceEnabled><relaysEnabled>false</relaysEnabled>\
         <natEnabled>false</natEnabled><urAccepted>-1</urAccepted>\
         <autoUpgradeIntervalH>0</autoUpgradeIntervalH><startBrowser>false</startBrowser>\
         <crashReportingEnabled>false</crashReportingEnabled>\
         <setLowPriority>false</setLowPriority>\
         <reconnectionIntervalS>1</reconnectionIntervalS></options>\n</configuration>\n",
        api(end),
        api(end) - 1,
        path = path.display(),
    )
}

/// What an instance says of its folder.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Folder {
    state: String,
    local_files: u64,
    local_bytes: u64,
    need_total_items: u64,
}

/// Whether the source has looked at all it has, and the replica has as much and
/// lacks nothing.
fn is_complete(site: &Site, device: &str) -> Result<bool> {
    let url = |end: End, path: &str| format!("http://127.0.0.1:{}/rest/{path}", api(end));
    let folder = |end: End| -> Result<Folder> {
        http::get(site.namespace(end), &url(end, "db/status?folder=tree"), KEY)
    };
    let (here, there) = (folder(End::Source)?, folder(End::Destination)?);
    if [&here, &there].iter().any(|folder| folder.state != "idle" || folder.local_files == 0) {
        return Ok(false);
    }
    let links = url(End::Source, "system/connections");
    let links: Value = http::get(site.namespace(End::Source), &links, KEY)?;
    Ok(links["connections"][device]["connected"] == true
        && there.need_total_items == 0
        && (there.local_files, there.local_bytes) == (here.local_files, here.local_bytes))
}
