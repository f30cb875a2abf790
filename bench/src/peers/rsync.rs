//! `rsync -a` from one mount to the other.

use std::process::Command;
use std::sync::Arc;

use anyhow::Result;

use crate::peers::passes::Passes;
use crate::peers::{Abilities, Peer, Session, first_line};
use crate::site::{End, Site};

/// Statuses that are no failure: 23 and 24 say that a file vanished while rsync
/// looked at it; the next pass finds what came of it.
pub const ACCEPTED: &[i32] = &[0, 23, 24];

/// rsync without a network.
pub struct Rsync;

impl Peer for Rsync {
    fn name(&self) -> &'static str {
        "rsync"
    }

    fn settings(&self) -> &'static str {
        "`rsync -a --delete SOURCE/ REPLICA`"
    }

    fn version(&self) -> Option<String> {
        version()
    }

    fn abilities(&self) -> Abilities {
        Abilities { mirrors: true, ..Abilities::default() }
    }

    fn prepare(&self, site: &Arc<Site>) -> Result<Box<dyn Session>> {
        let passes = Passes::new(site, |site| {
            let mut command = pass(site)?;
            command.arg(&site.replica);
            Ok(command)
        });
        Ok(Box::new(passes.accepting(ACCEPTED)))
    }
}

/// What rsync says of itself.
pub fn version() -> Option<String> {
    first_line(Command::new("rsync").arg("--version"))
}

/// A pass that lacks its target.
pub fn pass(site: &Site) -> Result<Command> {
    let mut command = site.command(End::Source, "rsync")?;
    // The slash makes it copy what is in the directory.
    command.args(["-a", "--delete"]).arg(site.source.join(""));
    Ok(command)
}
