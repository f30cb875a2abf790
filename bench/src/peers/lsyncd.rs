//! lsyncd over rsync, to rsync's daemon.

use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Result;

use crate::peers::{Abilities, PASS_LIMIT, Peer, Session, first_line, rsyncd};
use crate::site::{End, Service, Site};

/// lsyncd.
pub struct Lsyncd {
    /// Seconds for which it collects changes: 0 or 1.
    pub delay: u32,
}

impl Peer for Lsyncd {
    fn name(&self) -> &'static str {
        if self.delay == 0 { "lsyncd-0" } else { "lsyncd-1" }
    }

    fn settings(&self) -> &'static str {
        if self.delay == 0 {
            "`default.rsync` to rsync's daemon, `archive`, `delay = 0`"
        } else {
            "`default.rsync` to rsync's daemon, `archive`, `delay = 1`"
        }
    }

    fn version(&self) -> Option<String> {
        first_line(Command::new("lsyncd").arg("-version"))
    }

    fn abilities(&self) -> Abilities {
        Abilities { follows: true, mirrors: true, network: true, only_on: None }
    }

    fn prepare(&self, site: &Arc<Site>) -> Result<Box<dyn Session>> {
        let rsyncd = rsyncd::daemon(site)?;
        Ok(Box::new(Following {
            site: site.clone(),
            delay: self.delay,
            _rsyncd: rsyncd,
            daemon: None,
        }))
    }
}

struct Following {
    site: Arc<Site>,
    delay: u32,
    _rsyncd: Service,
    daemon: Option<Service>,
}

impl Session for Following {
    fn pass(&mut self) -> Result<()> {
        self.follow()
    }

    fn follow(&mut self) -> Result<()> {
        self.rest()?;
        let config = format!(
            "settings {{ nodaemon = true, insist = true }}\n\
             sync {{ default.rsync, source = {:?}, target = {:?}, delay = {}, delete = true, \
             rsync = {{ archive = true }} }}\n",
            self.site.source,
            rsyncd::url(&self.site),
            self.delay,
        );
        let config = self.site.write("lsyncd.lua", &config)?;
        let mut command = self.site.command(End::Source, "lsyncd")?;
        command.args(["-nodaemon", "-log", "all"]).arg(config);
        let mut daemon = self.site.spawn(command)?;
        daemon.until(
            "its first rsync ended",
            (Duration::from_millis(10), PASS_LIMIT),
            |daemon| {
                Ok(daemon
                    .output()
                    .lines()
                    .any(|l| l.contains("tartup of") && l.contains("finished")))
            },
        )?;
        self.daemon = Some(daemon);
        Ok(())
    }

    fn rest(&mut self) -> Result<()> {
        // It ends when its rsync has; nobody needs that.
        self.daemon = None;
        Ok(())
    }
}
