//! The programs that are compared, one small file each.

mod btrfs;
mod cp;
mod floor;
mod fpsync;
mod lsyncd;
mod passes;
mod rclone;
mod replicator;
mod rsync;
mod rsyncd;
mod ssh;
mod syncthing;
mod tar;
mod xcp;

use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Result;

use crate::disk::Kind;
use crate::site::Site;

/// How long one pass over a tree may take.
pub const PASS_LIMIT: Duration = Duration::from_secs(1200);

/// What a peer can do; workloads choose by it.
#[derive(Clone, Copy, Debug, Default)]
pub struct Abilities {
    /// Follows changes by itself. The others are run again and again.
    pub follows: bool,
    /// A further pass brings renames, deletions and changes over too.
    pub mirrors: bool,
    /// Works between two hosts.
    pub network: bool,
    /// Works on this file system alone.
    pub only_on: Option<Kind>,
}

/// A program, or a way to use one.
pub trait Peer: Sync {
    /// As the tables and `--peers` call it.
    fn name(&self) -> &'static str;
    /// How it is run, in words.
    fn settings(&self) -> &'static str;
    /// Its version in its own words; `None` when it is not installed.
    fn version(&self) -> Option<String>;
    /// What it can do.
    fn abilities(&self) -> Abilities;
    /// Sets it up between the ends of a site: services are started, nothing is copied.
    fn prepare(&self, site: &Arc<Site>) -> Result<Box<dyn Session>>;
    /// How far what it says to be replicated is behind now, seconds; `None` when it
    /// says nothing of the kind.
    fn seconds_behind(&self, _site: &Site) -> Result<Option<f64>> {
        Ok(None)
    }
}

/// A peer that is set up.
pub trait Session {
    /// Brings all that is on the source to the replica; returns when it is there.
    /// What runs on (a peer that follows) is stopped by [`Self::rest`].
    fn pass(&mut self) -> Result<()>;
    /// From now on the replica follows; returns when all that is there now has
    /// arrived.
    fn follow(&mut self) -> Result<()>;
    /// Ends what the two above began; services stay.
    fn rest(&mut self) -> Result<()>;
    /// Where the replica is, when it is not where the site says.
    fn replica(&self) -> Option<PathBuf> {
        None
    }
}

/// All of them, in the order in which they take turns.
pub fn all() -> Vec<Box<dyn Peer>> {
    vec![
        Box::new(replicator::Replicator),
        Box::new(rsync::Rsync),
        Box::new(rsyncd::Rsyncd),
        Box::new(ssh::Ssh),
        Box::new(cp::Cp),
        Box::new(tar::Tar),
        Box::new(fpsync::Fpsync),
        Box::new(rclone::Rclone),
        Box::new(xcp::Xcp),
        Box::new(btrfs::Btrfs),
        Box::new(lsyncd::Lsyncd { delay: 0 }),
        Box::new(lsyncd::Lsyncd { delay: 1 }),
        Box::new(syncthing::Syncthing),
        Box::new(floor::Floor),
    ]
}

/// The first line of what a program says, on either output; `None` when it cannot
/// be started.
pub fn first_line(command: &mut Command) -> Option<String> {
    let output = command.output().ok()?;
    let text = [output.stdout, output.stderr].concat();
    let text = String::from_utf8_lossy(&text);
    Some(text.lines().next().unwrap_or("no version").trim().to_owned())
}
