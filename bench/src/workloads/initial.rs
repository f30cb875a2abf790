//! The initial sync: a standing tree is brought to an empty file system.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use replicator_tests::compare::{self, Aspect, Options};

use super::trees::{large_file, small_files};
use super::{Bench, Figure, Outcome, Workload};
use crate::disk::{Disk, drop_caches, sync_file_system};
use crate::measure::Meter;
use crate::net::Net;
use crate::peers::Peer;
use crate::site::{Site, ask};

/// What stands there.
#[derive(Clone, Copy, Debug)]
pub enum What {
    /// Files of 4 KiB.
    Small,
    /// Files of 1 GiB that do not compress.
    Large,
    /// A copy of /usr.
    Usr,
}

/// The initial sync of one kind of tree.
pub struct Initial {
    what: What,
    source: Option<Disk>,
}

impl Initial {
    /// Of this.
    pub fn new(what: What) -> Self {
        Self { what, source: None }
    }
}

impl Initial {
    /// The figure that does not depend on how much there is.
    fn by_size(&self, bench: &Bench, seconds: f64, cpu_seconds: f64) -> Figure {
        match self.what {
            What::Small => {
                let files = small_count(bench) as f64;
                Figure::new("CPU a file, µs", cpu_seconds * 1e6 / files, 0)
            }
            What::Large => {
                let (files, mib) = large_size(bench);
                let gigabytes = ((files * mib) << 20) as f64 / 1e9;
                Figure::new("on disk, GB/s", gigabytes / seconds, 2)
            }
            What::Usr => Figure::new("cores", cpu_seconds / seconds, 2),
        }
    }
}

fn small_count(bench: &Bench) -> u64 {
    bench.pick(100_000, 2_000)
}

/// Files and MiB of each.
fn large_size(bench: &Bench) -> (u64, u64) {
    bench.pick((4, 1024), (2, 32))
}

fn real_tree(bench: &Bench) -> &'static str {
    bench.pick("/usr", "/usr/share/perl")
}

impl Workload for Initial {
    fn name(&self) -> &'static str {
        match self.what {
            What::Small => "small",
            What::Large => "large",
            What::Usr => "usr",
        }
    }

    fn title(&self, bench: &Bench) -> String {
        match self.what {
            What::Small => format!("initial sync, {} files of 4 KiB", small_count(bench)),
            What::Large => {
                let (files, mib) = large_size(bench);
                format!("initial sync, {files} files of {mib} MiB, incompressible")
            }
            What::Usr => format!("initial sync, a copy of {}", real_tree(bench)),
        }
    }

    fn about(&self) -> &'static str {
        "Caches dropped before. \"On disk\" adds a `syncfs` to the programs that end without one; \
         replicator ends only when all is durable."
    }

    fn excludes(&self, _peer: &dyn Peer) -> Option<&'static str> {
        None
    }

    fn prepare(&mut self, bench: &Bench) -> Result<()> {
        let disk = bench.disk().with_tree()?;
        let root = disk.tree();
        match self.what {
            What::Small => small_files(&root, small_count(bench), false)?,
            What::Large => {
                let (files, mib) = large_size(bench);
                for number in 0..files {
                    large_file(&root.join(number.to_string()), number, mib << 20)?;
                }
            }
            What::Usr => {
                let from = Path::new(real_tree(bench)).join(".");
                ask(Command::new("cp").arg("-a").arg(from).arg(&root))?;
            }
        }
        self.source = Some(disk);
        Ok(())
    }

    fn run(&self, bench: &Bench, peer: &dyn Peer, first: bool) -> Result<Outcome> {
        let source = self.source.as_ref().context("the tree was not made")?.tree();
        let disk = bench.disk().with_tree()?;
        let site = Site::new(&source, &disk.tree(), Net::local()?)?;
        let mut session = peer.prepare(&site)?;
        drop_caches()?;
        // The files come from disk, the program does not.
        let _ = peer.version();
        let meter = Meter::start(&site)?;
        session.pass()?;
        let usage = meter.stop()?;
        let durable = usage.seconds + sync_file_system(&site.replica)?.as_secs_f64();
        session.rest()?;
        let figures = vec![
            Figure::new("ended after, s", usage.seconds, 2),
            Figure::new("on disk after, s", durable, 2),
            self.by_size(bench, durable, usage.cpu_seconds),
        ];
        let mut outcome = Outcome::with_usage(figures, &usage);
        if first {
            let replica = session.replica().unwrap_or_else(|| site.replica.clone());
            outcome.note = check(peer, &source, replica)?;
        }
        Ok(outcome)
    }
}

/// Compares the trees. What a peer does not bring over by design is a note; what it
/// must bring over is an error.
fn check(peer: &dyn Peer, source: &Path, replica: PathBuf) -> Result<Option<String>> {
    let differences = compare::compare(source, &replica, Options::default());
    let mut counts: BTreeMap<String, usize> = BTreeMap::new();
    for difference in &differences {
        let lost = matches!(difference.aspect, Aspect::Missing | Aspect::Size | Aspect::Content);
        ensure!(!lost, "the replica is not complete: {difference}");
        *counts.entry(format!("{:?}", difference.aspect).to_lowercase()).or_default() += 1;
    }
    if differences.is_empty() {
        return Ok(None);
    }
    if peer.name() == "replicator" {
        bail!("the replica differs:\n{}", compare::report(&differences));
    }
    let counts: Vec<_> = counts.iter().map(|(aspect, count)| format!("{aspect} {count}")).collect();
    Ok(Some(format!("not as on the source: {} times", counts.join(", "))))
}
