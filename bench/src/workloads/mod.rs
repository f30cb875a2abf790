//! What the peers are compared by, one small file each.

mod append;
mod create;
mod delete;
mod idle;
mod initial;
mod lag;
mod overwrite;
mod rename;
mod respond;
mod restart;
mod trees;
mod wan;

use std::borrow::Cow;
use std::time::Duration;

use anyhow::Result;
use serde::{Deserialize, Deserializer, Serialize};

use crate::disk::{Disk, Kind};
use crate::measure::Usage;
use crate::peers::Peer;
use crate::wan::Tcp;

/// Room for either tree with its overhead, bytes; an image takes what is written.
const DISK: u64 = 24 << 30;

/// How all of it is run.
#[derive(Clone, Copy, Debug)]
pub struct Bench {
    /// Small and short.
    pub quick: bool,
    /// What source and replica are on.
    pub kind: Kind,
    /// How TCP finds its pace over a long path.
    pub tcp: Tcp,
}

impl Bench {
    /// One of two sizes.
    pub fn pick<T>(&self, full: T, quick: T) -> T {
        if self.quick { quick } else { full }
    }

    /// A new file system.
    fn disk(&self) -> Disk {
        Disk::new(self.kind, DISK)
    }
}

/// One figure of a run, a column of the table.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Figure {
    /// What it is, with its unit.
    pub name: Cow<'static, str>,
    /// How much; not a number when it was not reached.
    #[serde(deserialize_with = "or_not_a_number")]
    pub value: f64,
    /// Digits behind the point that mean something.
    pub digits: usize,
}

/// JSON knows no such number; what is written for it is `null`.
fn or_not_a_number<'de, D: Deserializer<'de>>(deserializer: D) -> Result<f64, D::Error> {
    Ok(Option::deserialize(deserializer)?.unwrap_or(f64::NAN))
}

impl Figure {
    /// A figure.
    pub fn new(name: &'static str, value: f64, digits: usize) -> Self {
        Self { name: name.into(), value, digits }
    }
}

/// What one run gave.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Outcome {
    /// In the order of the columns.
    pub figures: Vec<Figure>,
    /// What else is to be said, in words.
    pub note: Option<String>,
}

impl Outcome {
    /// These figures, and what was used for them.
    fn with_usage(mut figures: Vec<Figure>, usage: &Usage) -> Self {
        figures.push(Figure::new("CPU, s", usage.cpu_seconds, 2));
        figures.push(Figure::new("memory, MiB", mib(usage.peak_memory), 1));
        let wire = match usage.wire_bytes {
            // Nothing went through the network: there is none.
            0 => f64::NAN,
            bytes => mib(bytes),
        };
        figures.push(Figure::new("wire, MiB", wire, 3));
        Self { figures, note: None }
    }
}

fn mib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}

/// Something that peers are compared by.
pub trait Workload {
    /// As `--only` calls it.
    fn name(&self) -> &'static str;
    /// As the table is headed.
    fn title(&self, bench: &Bench) -> String;
    /// What is measured and how, where the title does not say it.
    fn about(&self) -> &'static str;
    /// Whether only those who ask for it by its whole name get it: it takes long.
    fn is_optional(&self) -> bool {
        false
    }
    /// Why a peer has no part in it; `None` when it has.
    fn excludes(&self, peer: &dyn Peer) -> Option<&'static str>;
    /// How long all rounds of one peer may take together; see [`crate::patience`].
    fn patience(&self) -> Duration {
        Duration::from_secs(240)
    }
    /// Makes what all runs share.
    fn prepare(&mut self, _bench: &Bench) -> Result<()> {
        Ok(())
    }
    /// One run of one peer; the first of each may check more.
    fn run(&self, bench: &Bench, peer: &dyn Peer, first: bool) -> Result<Outcome>;
}

/// All of them, in the order in which they are run.
pub fn all() -> Vec<Box<dyn Workload>> {
    let mut all: Vec<Box<dyn Workload>> = vec![
        Box::new(initial::Initial::new(initial::What::Small)),
        Box::new(initial::Initial::new(initial::What::Large)),
        Box::new(initial::Initial::new(initial::What::Usr)),
        Box::new(restart::Restart::new(false)),
        Box::new(restart::Restart::new(true)),
        Box::new(lag::Lag { name: "lag-50", rate: 50 }),
        Box::new(lag::Lag { name: "lag-500", rate: 500 }),
        Box::new(lag::Lag { name: "lag-2000", rate: 2000 }),
        Box::new(create::Create { pace: None }),
        // What the goal has for one second of catching up.
        Box::new(create::Create { pace: Some(12_000) }),
        Box::new(rename::Rename),
        Box::new(overwrite::Overwrite),
        Box::new(append::Append),
        Box::new(delete::Delete),
    ];
    all.extend(wan::all().into_iter().map(|wan| Box::new(wan) as Box<dyn Workload>));
    all.push(Box::new(idle::Idle));
    all
}

/// For workloads that change a tree that is replicated already.
fn unless_mirrors(peer: &dyn Peer) -> Option<&'static str> {
    (!peer.abilities().mirrors).then_some("copies only")
}

/// For workloads that go on for a while: who does not follow is run in a loop, and
/// one loop of each kind is enough.
fn unless_follows(peer: &dyn Peer) -> Option<&'static str> {
    let looped = ["rsync", "rsyncd"].contains(&peer.name());
    (!peer.abilities().follows && !looped).then_some("does not follow")
}
