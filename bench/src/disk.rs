//! Freshly made file systems on loop devices.
//!
//! Never one on which much was deleted: after that ext4's inode allocator takes
//! a millisecond a file, and what is measured is that.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use clap::ValueEnum;
use replicator_tests::mounts::{FileSystem, Mount};
use serde::{Deserialize, Serialize};

/// What source and replica are made as.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// As `mkfs.ext4` makes it.
    Ext4,
    /// As `mkfs.xfs` makes it.
    Xfs,
    /// As `mkfs.btrfs` makes it.
    Btrfs,
}

impl Kind {
    /// As `mount -t` spells it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Ext4 => "ext4",
            Self::Xfs => "xfs",
            Self::Btrfs => "btrfs",
        }
    }
}

/// A file system that was made for one run, unmounted and removed when dropped.
#[derive(Debug)]
pub struct Disk {
    mount: Mount,
}

impl Disk {
    /// Made anew, `bytes` large; its image takes no more room than is written to it.
    pub fn new(kind: Kind, bytes: u64) -> Self {
        let kind = match kind {
            Kind::Ext4 => FileSystem::Ext4,
            Kind::Xfs => FileSystem::Xfs,
            Kind::Btrfs => FileSystem::Btrfs,
        };
        Self { mount: Mount::with_size(kind, bytes) }
    }

    /// The directory that is replicated, or that becomes the replica: below the
    /// root, for `lost+found` is not to be measured.
    pub fn tree(&self) -> PathBuf {
        self.mount.path().join("tree")
    }

    /// The same, made: on btrfs a subvolume, as `btrfs send` wants it.
    pub fn with_tree(self) -> Result<Self> {
        let tree = self.tree();
        if self.mount.kind() == FileSystem::Btrfs {
            let output =
                Command::new("btrfs").args(["-q", "subvolume", "create"]).arg(&tree).output();
            let output = output.context("btrfs (Debian package btrfs-progs) cannot be started")?;
            ensure!(output.status.success(), "btrfs: {}", String::from_utf8_lossy(&output.stderr));
        } else {
            fs::create_dir(&tree).with_context(|| tree.display().to_string())?;
        }
        Ok(self)
    }
}

/// Writes everything out and forgets it: what is read next comes from disk.
pub fn drop_caches() -> Result<()> {
    const FILE: &str = "/proc/sys/vm/drop_caches";
    rustix::fs::sync();
    fs::write(FILE, "3").with_context(|| format!("{FILE} (needs root)"))
}

/// Makes the file system that `path` is on durable; gives the time it took.
pub fn sync_file_system(path: &Path) -> Result<Duration> {
    let start = Instant::now();
    let file = File::open(path).with_context(|| path.display().to_string())?;
    rustix::fs::syncfs(file).with_context(|| format!("syncfs of {}", path.display()))?;
    Ok(start.elapsed())
}
