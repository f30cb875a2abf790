//! A restart with nothing changed: how long it takes to know that.

use anyhow::{Context, Result};

use super::trees::small_files;
use super::{Bench, Figure, Outcome, Workload};
use crate::disk::{Disk, sync_file_system};
use crate::measure::Meter;
use crate::net::Net;
use crate::peers::Peer;
use crate::site::Site;

/// The restart over many or very many files.
pub struct Restart {
    million: bool,
    source: Option<Disk>,
}

impl Restart {
    /// Over a million files, or a tenth of that.
    pub fn new(million: bool) -> Self {
        Self { million, source: None }
    }

    fn files(&self, bench: &Bench) -> u64 {
        if self.million { bench.pick(1_000_000, 20_000) } else { bench.pick(100_000, 2_000) }
    }
}

impl Workload for Restart {
    fn name(&self) -> &'static str {
        if self.million { "restart-million" } else { "restart" }
    }

    fn title(&self, bench: &Bench) -> String {
        format!("restart with nothing changed, {} files of 4 KiB", self.files(bench))
    }

    fn about(&self) -> &'static str {
        "A second pass after a first one, with warm caches; what follows is stopped and started again, \
         until it says that all is equal."
    }

    fn is_optional(&self) -> bool {
        self.million
    }

    fn excludes(&self, peer: &dyn Peer) -> Option<&'static str> {
        ["tar", "xcp", "btrfs"].contains(&peer.name()).then_some("copies all of it again")
    }

    fn prepare(&mut self, bench: &Bench) -> Result<()> {
        let disk = bench.disk().with_tree()?;
        small_files(&disk.tree(), self.files(bench), false)?;
        self.source = Some(disk);
        Ok(())
    }

    fn run(&self, bench: &Bench, peer: &dyn Peer, _first: bool) -> Result<Outcome> {
        let source = self.source.as_ref().context("the tree was not made")?.tree();
        let disk = bench.disk().with_tree()?;
        let site = Site::new(&source, &disk.tree(), Net::local()?)?;
        let mut session = peer.prepare(&site)?;
        session.pass()?;
        session.rest()?;
        sync_file_system(&site.replica)?;
        let meter = Meter::start(&site)?;
        session.pass()?;
        let usage = meter.stop()?;
        session.rest()?;
        let figures = vec![Figure::new("ended after, s", usage.seconds, 2)];
        Ok(Outcome::with_usage(figures, &usage))
    }
}
