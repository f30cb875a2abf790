//! `xcp`, a parallel cp in Rust.

use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;

use anyhow::Result;

use crate::peers::passes::Passes;
use crate::peers::{Abilities, Peer, Session, first_line};
use crate::site::{End, Site};

/// xcp, as `just bench-install` puts it.
pub struct Xcp;

impl Peer for Xcp {
    fn name(&self) -> &'static str {
        "xcp"
    }

    fn settings(&self) -> &'static str {
        "`xcp -r -T --workers 2 --no-progress`"
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
            command.args(["-r", "-T", "--workers", "2", "--no-progress"]);
            command.arg(&site.source).arg(&site.replica);
            Ok(command)
        })))
    }
}

/// Below `$REPLICATOR_BENCH_CACHE` (default `~/.cache/replicator-bench`) if it is
/// there, else wherever the path leads.
fn program() -> PathBuf {
    let cache = std::env::var_os("REPLICATOR_BENCH_CACHE")
        .map(PathBuf::from)
        .or_else(|| Some(PathBuf::from(std::env::var_os("HOME")?).join(".cache/replicator-bench")));
    let program = cache.map(|cache| cache.join("bin/xcp"));
    program.filter(|program| program.exists()).unwrap_or_else(|| "xcp".into())
}
