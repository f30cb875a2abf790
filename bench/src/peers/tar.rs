//! `tar | tar`.

use std::process::Command;
use std::sync::Arc;

use anyhow::Result;

use crate::peers::passes::Passes;
use crate::peers::{Abilities, Peer, Session, first_line};
use crate::site::{End, Site};

/// GNU tar, twice.
pub struct Tar;

impl Peer for Tar {
    fn name(&self) -> &'static str {
        "tar"
    }

    fn settings(&self) -> &'static str {
        "`tar -C SOURCE -cf - . | tar -C REPLICA -xpf -`"
    }

    fn version(&self) -> Option<String> {
        first_line(Command::new("tar").arg("--version"))
    }

    fn abilities(&self) -> Abilities {
        Abilities::default()
    }

    fn prepare(&self, site: &Arc<Site>) -> Result<Box<dyn Session>> {
        Ok(Box::new(Passes::new(site, |site| {
            let mut command = site.command(End::Source, "bash")?;
            command.arg("-c");
            command.arg("set -o pipefail; tar -C \"$0\" -cf - . | tar -C \"$1\" -xpf -");
            command.arg(&site.source).arg(&site.replica);
            Ok(command)
        })))
    }
}
