//! A directory with many files is renamed.

use std::cell::Cell;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use anyhow::Result;

use super::respond::{Change, respond};
use super::trees::{SMALL, small_file, small_files};
use super::{Bench, Outcome, Workload, unless_mirrors};
use crate::net::Net;
use crate::peers::Peer;
use crate::site::Site;

/// The rename.
pub struct Rename;

fn files(bench: &Bench) -> u64 {
    bench.pick(50_000, 2_000)
}

impl Workload for Rename {
    fn name(&self) -> &'static str {
        "rename"
    }

    fn title(&self, bench: &Bench) -> String {
        format!("rename of a directory with {} files of 4 KiB", files(bench))
    }

    fn about(&self) -> &'static str {
        "Until the old name is gone and the last file stands under the new one. (What does not follow \
         is run after the rename.)"
    }

    fn excludes(&self, peer: &dyn Peer) -> Option<&'static str> {
        unless_mirrors(peer)
    }

    fn run(&self, bench: &Bench, peer: &dyn Peer, _first: bool) -> Result<Outcome> {
        let (source, replica) = (bench.disk().with_tree()?, bench.disk().with_tree()?);
        let files = files(bench);
        small_files(&source.tree().join("before"), files, false)?;
        let site = Site::new(&source.tree(), &replica.tree(), Net::local()?)?;
        let number = |at: &Path| fs::metadata(at).ok().map(|it| it.ino());
        let (mut next, was) = (0, Cell::new(None));
        let change = Change {
            make: |tree: &Path| {
                was.set(number(&site.replica.join("before")));
                Ok(fs::rename(tree.join("before"), tree.join("after"))?)
            },
            arrived: |tree: &Path| {
                let after = tree.join("after");
                // The same directory has the same files: looking at each takes 0.1 s.
                let same = was.get().is_some() && number(&after) == was.get();
                if same && !tree.join("before").exists() {
                    return true;
                }
                // Goes on where the look before ended.
                while next < files {
                    let file = fs::symlink_metadata(after.join(small_file(next)));
                    if !file.is_ok_and(|file| file.len() == SMALL as u64) {
                        return false;
                    }
                    next += 1;
                }
                !tree.join("before").exists()
            },
        };
        respond(peer, &site, change)
    }
}
