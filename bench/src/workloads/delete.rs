//! Many files are deleted.

use std::fs;
use std::path::Path;

use anyhow::Result;

use super::respond::{Change, respond};
use super::trees::small_files;
use super::{Bench, Outcome, Workload, unless_mirrors};
use crate::net::Net;
use crate::peers::Peer;
use crate::site::Site;

/// The deletion.
pub struct Delete;

fn files(bench: &Bench) -> u64 {
    bench.pick(100_000, 2_000)
}

impl Workload for Delete {
    fn name(&self) -> &'static str {
        "delete"
    }

    fn title(&self, bench: &Bench) -> String {
        format!("deletion of {} files of 4 KiB", files(bench))
    }

    fn about(&self) -> &'static str {
        "Until the directory is gone from the replica; the change itself is `rm -rf`. (What follows \
         has begun by its end; what does not is run after it.)"
    }

    fn excludes(&self, peer: &dyn Peer) -> Option<&'static str> {
        unless_mirrors(peer)
    }

    fn run(&self, bench: &Bench, peer: &dyn Peer, _first: bool) -> Result<Outcome> {
        let (source, replica) = (bench.disk().with_tree()?, bench.disk().with_tree()?);
        small_files(&source.tree().join("doomed"), files(bench), false)?;
        // A tree of which nothing is left would be another case.
        small_files(&source.tree().join("kept"), 100, false)?;
        let site = Site::new(&source.tree(), &replica.tree(), Net::local()?)?;
        let change = Change {
            make: |tree: &Path| Ok(fs::remove_dir_all(tree.join("doomed"))?),
            arrived: |tree: &Path| !tree.join("doomed").exists(),
        };
        respond(peer, &site, change)
    }
}
