//! `rsync -a` to a daemon over TCP: no encryption.

use std::sync::Arc;
use std::time::Duration;

use anyhow::Result;

use crate::peers::passes::Passes;
use crate::peers::rsync::{self, ACCEPTED};
use crate::peers::{Abilities, Peer, Session};
use crate::site::{End, Service, Site};

const PORT: u16 = 8730;

/// rsync with its daemon.
pub struct Rsyncd;

impl Peer for Rsyncd {
    fn name(&self) -> &'static str {
        "rsyncd"
    }

    fn settings(&self) -> &'static str {
        "`rsync -a --delete SOURCE/ rsync://…`, the daemon as root without chroot"
    }

    fn version(&self) -> Option<String> {
        rsync::version()
    }

    fn abilities(&self) -> Abilities {
        Abilities { mirrors: true, network: true, ..Abilities::default() }
    }

    fn prepare(&self, site: &Arc<Site>) -> Result<Box<dyn Session>> {
        let daemon = daemon(site)?;
        let passes = Passes::new(site, |site| {
            let mut command = rsync::pass(site)?;
            command.arg(url(site));
            Ok(command)
        });
        Ok(Box::new(passes.accepting(ACCEPTED).with(vec![daemon])))
    }
}

/// Where the replica is for rsync.
pub fn url(site: &Site) -> String {
    format!("rsync://{}:{PORT}/replica", site.net.address)
}

/// Starts the daemon.
pub fn daemon(site: &Site) -> Result<Service> {
    let config = format!(
        "use chroot = no\nmunge symlinks = no\nreverse lookup = no\nuid = root\ngid = root\n[replica]\npath = {}\nread only = no\n",
        site.replica.display(),
    );
    let config = site.write("rsyncd.conf", &config)?;
    let mut command = site.command(End::Destination, "rsync")?;
    command.args(["--daemon", "--no-detach", "--log-file=/dev/null"]);
    command.arg(format!("--port={PORT}")).arg(format!("--config={}", config.display()));
    let mut daemon = site.spawn(command)?;
    let times = (Duration::from_millis(20), Duration::from_secs(10));
    daemon.until("it listens", times, |_| Ok(listens(site, PORT)))?;
    Ok(daemon)
}

/// Whether something takes connections at the destination.
pub fn listens(site: &Site, port: u16) -> bool {
    let connect = || Ok(std::net::TcpStream::connect((site.net.address, port))?);
    site.namespace(End::Destination).inside(connect).is_ok()
}
