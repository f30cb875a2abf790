//! Small parts of a large file are overwritten in place.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use anyhow::Result;
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use replicator_tests::workload::content;

use super::respond::{Change, respond};
use super::trees::large_file;
use super::{Bench, Outcome, Workload, unless_mirrors};
use crate::net::Net;
use crate::peers::Peer;
use crate::site::Site;

const BLOCK: usize = 4096;
const BLOCKS: u64 = 100;

/// The overwrites.
pub struct Overwrite;

fn mib(bench: &Bench) -> u64 {
    bench.pick(1024, 64)
}

impl Workload for Overwrite {
    fn name(&self) -> &'static str {
        "overwrite"
    }

    fn title(&self, bench: &Bench) -> String {
        format!("{BLOCKS} random overwrites of 4 KiB in a file of {} MiB", mib(bench))
    }

    fn about(&self) -> &'static str {
        "Until all of them stand in the replica's file. (What does not follow is run after them.)"
    }

    fn excludes(&self, peer: &dyn Peer) -> Option<&'static str> {
        unless_mirrors(peer)
    }

    fn run(&self, bench: &Bench, peer: &dyn Peer, _first: bool) -> Result<Outcome> {
        let (source, replica) = (bench.disk().with_tree()?, bench.disk().with_tree()?);
        let bytes = mib(bench) << 20;
        large_file(&source.tree().join("large"), 1, bytes)?;
        let site = Site::new(&source.tree(), &replica.tree(), Net::local()?)?;
        let mut rng = SmallRng::seed_from_u64(7);
        let mut block = || rng.random_range(0..bytes / BLOCK as u64) * BLOCK as u64;
        let places: Vec<u64> = (0..BLOCKS).map(|_| block()).collect();
        let change = Change {
            make: |tree: &Path| {
                let file = File::options().write(true).open(tree.join("large"))?;
                for place in &places {
                    file.write_all_at(&written(*place), *place)?;
                }
                Ok(())
            },
            arrived: |tree: &Path| has_all(&tree.join("large"), &places),
        };
        respond(peer, &site, change)
    }
}

/// What is written at a place: the same, should it be drawn twice.
fn written(place: u64) -> Vec<u8> {
    content::incompressible(place | 1 << 60, BLOCK)
}

fn has_all(path: &Path, places: &[u64]) -> bool {
    let Ok(file) = File::open(path) else { return false };
    let mut found = vec![0; BLOCK];
    places
        .iter()
        .all(|place| file.read_exact_at(&mut found, *place).is_ok() && found == written(*place))
}
