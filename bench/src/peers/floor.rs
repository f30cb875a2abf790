//! No peer, but what all of them are measured against: a bare pipeline without
//! what makes it a replication.

use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;

use anyhow::Result;

use crate::peers::passes::Passes;
use crate::peers::{Abilities, Peer, Session, first_line};
use crate::site::{End, Site};

/// The program `floor`, which is built with this one.
pub struct Floor;

impl Peer for Floor {
    fn name(&self) -> &'static str {
        "floor"
    }

    fn settings(&self) -> &'static str {
        "no peer: what reading, hashing, sealing, carrying through a socket, verifying and \
         writing costs at least, without index, journal, staging or a way to go on"
    }

    fn version(&self) -> Option<String> {
        first_line(Command::new(program()).arg("--version"))
    }

    fn abilities(&self) -> Abilities {
        Abilities::default()
    }

    fn prepare(&self, site: &Arc<Site>) -> Result<Box<dyn Session>> {
        Ok(Box::new(Passes::new(site, |site| {
            let mut command = site.command(End::Source, program())?;
            command.arg(&site.source).arg(&site.replica);
            Ok(command)
        })))
    }
}

/// Beside the benchmark itself.
fn program() -> PathBuf {
    std::env::current_exe().unwrap_or_default().with_file_name("floor")
}
