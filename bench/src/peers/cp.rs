//! `cp -a`.

use std::process::Command;
use std::sync::Arc;

use anyhow::Result;

use crate::peers::passes::Passes;
use crate::peers::{Abilities, Peer, Session, first_line};
use crate::site::{End, Site};

/// GNU cp.
pub struct Cp;

impl Peer for Cp {
    fn name(&self) -> &'static str {
        "cp"
    }

    fn settings(&self) -> &'static str {
        "`cp -a SOURCE/. REPLICA`; again with `-u`"
    }

    fn version(&self) -> Option<String> {
        first_line(Command::new("cp").arg("--version"))
    }

    fn abilities(&self) -> Abilities {
        Abilities::default()
    }

    fn prepare(&self, site: &Arc<Site>) -> Result<Box<dyn Session>> {
        Ok(Box::new(Passes::new(site, |site| {
            let mut command = site.command(End::Source, "cp")?;
            // To an empty replica `-u` changes nothing.
            command.arg("-au").arg(site.source.join(".")).arg(&site.replica);
            Ok(command)
        })))
    }
}
