//! `rsync -a` over ssh, to an sshd of its own with keys of its own.

use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};

use crate::peers::passes::Passes;
use crate::peers::rsync::{self, ACCEPTED};
use crate::peers::rsyncd::listens;
use crate::peers::{Abilities, Peer, Session, first_line};
use crate::site::{End, Service, Site, ask};

/// sshd wants to be called by its whole path.
const SSHD: &str = "/usr/sbin/sshd";
const PORT: u16 = 2222;

/// rsync over ssh.
pub struct Ssh;

impl Peer for Ssh {
    fn name(&self) -> &'static str {
        "rsync-ssh"
    }

    fn settings(&self) -> &'static str {
        "`rsync -a --delete -e 'ssh -c aes128-gcm@openssh.com'`, no compression"
    }

    fn version(&self) -> Option<String> {
        // The client alone is installed in many places.
        Path::new(SSHD).exists().then_some(())?;
        Some(format!("{}; {}", first_line(Command::new("ssh").arg("-V"))?, rsync::version()?))
    }

    fn abilities(&self) -> Abilities {
        Abilities { mirrors: true, network: true, ..Abilities::default() }
    }

    fn prepare(&self, site: &Arc<Site>) -> Result<Box<dyn Session>> {
        let daemon = daemon(site)?;
        let key = site.scratch("user-key");
        let passes = Passes::new(site, move |site| {
            let mut command = rsync::pass(site)?;
            command.arg("-e").arg(format!(
                "ssh -F none -p {PORT} -i {} -c aes128-gcm@openssh.com -o BatchMode=yes \
                 -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -o LogLevel=ERROR",
                key.display()
            ));
            command.arg(format!("root@{}:{}", site.net.address, site.replica.display()));
            Ok(command)
        });
        Ok(Box::new(passes.accepting(ACCEPTED).with(vec![daemon])))
    }
}

/// Starts sshd for this site alone.
fn daemon(site: &Site) -> Result<Service> {
    // Where sshd separates privileges; Debian's service makes it at its start.
    std::fs::create_dir_all("/run/sshd").context("/run/sshd")?;
    for key in ["host-key", "user-key"] {
        let mut command = Command::new("ssh-keygen");
        command.args(["-q", "-t", "ed25519", "-N", "", "-f"]).arg(site.scratch(key));
        ask(&mut command)?;
    }
    let path = |name: &str| site.scratch(name).display().to_string();
    let config = format!(
        "Port {PORT}\nHostKey {}\nAuthorizedKeysFile {}\nPidFile none\nStrictModes no\n\
         UsePAM no\nPermitRootLogin prohibit-password\nPasswordAuthentication no\nUseDNS no\n",
        path("host-key"),
        path("user-key.pub"),
    );
    let config = site.write("sshd_config", &config)?;
    let mut command = site.command(End::Destination, SSHD)?;
    command.args(["-D", "-e", "-f"]).arg(config);
    let mut daemon = site.spawn(command)?;
    let times = (Duration::from_millis(20), Duration::from_secs(10));
    daemon.until("it listens", times, |_| Ok(listens(site, PORT)))?;
    Ok(daemon)
}
