//! Nothing happens: what following costs all the same.

use std::thread;
use std::time::Duration;

use anyhow::Result;

use super::trees::small_files;
use super::{Bench, Figure, Outcome, Workload, mib};
use crate::measure::Meter;
use crate::net::Net;
use crate::peers::Peer;
use crate::site::Site;

/// Until what follows the first pass is over.
const SETTLE: Duration = Duration::from_secs(5);

/// Idleness.
pub struct Idle;

fn files(bench: &Bench) -> u64 {
    bench.pick(100_000, 2_000)
}

fn time(bench: &Bench) -> Duration {
    Duration::from_secs(bench.pick(30, 5))
}

impl Workload for Idle {
    fn name(&self) -> &'static str {
        "idle"
    }

    fn title(&self, bench: &Bench) -> String {
        format!("idle for {} s, {} files of 4 KiB", time(bench).as_secs(), files(bench))
    }

    fn about(&self) -> &'static str {
        "Memory is the most that was held in this time, not at the first pass."
    }

    fn excludes(&self, peer: &dyn Peer) -> Option<&'static str> {
        (!peer.abilities().follows).then_some("does not follow")
    }

    fn run(&self, bench: &Bench, peer: &dyn Peer, _first: bool) -> Result<Outcome> {
        let (source, replica) = (bench.disk().with_tree()?, bench.disk().with_tree()?);
        small_files(&source.tree(), files(bench), false)?;
        let site = Site::new(&source.tree(), &replica.tree(), Net::local()?)?;
        let mut session = peer.prepare(&site)?;
        session.follow()?;
        thread::sleep(SETTLE);
        let meter = Meter::start(&site)?;
        thread::sleep(time(bench));
        let usage = meter.stop()?;
        session.rest()?;
        let figures = vec![
            Figure::new("CPU, % of a core", usage.cpu_seconds / usage.seconds * 100.0, 2),
            Figure::new("memory, MiB", mib(usage.peak_memory), 0),
            Figure::new("wire, bytes/s", usage.wire_bytes as f64 / usage.seconds, 0),
        ];
        Ok(Outcome { figures, note: None })
    }
}
