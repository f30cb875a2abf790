//! `rclone sync` between two local directories.

use std::process::Command;
use std::sync::Arc;

use anyhow::Result;

use crate::peers::passes::Passes;
use crate::peers::{Abilities, Peer, Session, first_line};
use crate::site::{End, Site};

/// rclone.
pub struct Rclone;

impl Peer for Rclone {
    fn name(&self) -> &'static str {
        "rclone"
    }

    fn settings(&self) -> &'static str {
        "`rclone sync --links --metadata --transfers 8 --checkers 16`"
    }

    fn version(&self) -> Option<String> {
        first_line(Command::new("rclone").arg("version"))
    }

    fn abilities(&self) -> Abilities {
        Abilities { mirrors: true, ..Abilities::default() }
    }

    fn prepare(&self, site: &Arc<Site>) -> Result<Box<dyn Session>> {
        Ok(Box::new(Passes::new(site, |site| {
            let mut command = site.command(End::Source, "rclone")?;
            command.args(["sync", "--links", "--metadata", "--config", "/dev/null"]);
            command.args(["--transfers", "8", "--checkers", "16", "--create-empty-src-dirs"]);
            command.arg(&site.source).arg(&site.replica);
            Ok(command)
        })))
    }
}
