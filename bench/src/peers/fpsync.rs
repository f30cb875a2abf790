//! `fpsync`: several rsync at once, each with a part of the tree.

use std::process::Command;
use std::sync::Arc;

use anyhow::Result;

use crate::peers::passes::Passes;
use crate::peers::{Abilities, Peer, Session, first_line};
use crate::site::{End, Site};

/// fpart's fpsync.
pub struct Fpsync;

impl Peer for Fpsync {
    fn name(&self) -> &'static str {
        "fpsync"
    }

    fn settings(&self) -> &'static str {
        "`fpsync -n 2 -f 2000` with its own rsync options"
    }

    fn version(&self) -> Option<String> {
        // Its help begins with it.
        first_line(Command::new("fpsync").arg("-h"))
    }

    fn abilities(&self) -> Abilities {
        // It deletes nothing.
        Abilities::default()
    }

    fn prepare(&self, site: &Arc<Site>) -> Result<Box<dyn Session>> {
        Ok(Box::new(Passes::new(site, |site| {
            let mut command = site.command(End::Source, "fpsync")?;
            command.args(["-n", "2", "-f", "2000", "-t"]).arg(site.scratch("fpsync"));
            command.arg(site.source.join("")).arg(site.replica.join(""));
            Ok(command)
        })))
    }
}
