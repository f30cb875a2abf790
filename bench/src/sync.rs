//! The initial sync: a standing tree is brought to an empty file system.

use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::PathBuf;

use anyhow::Result;
use replicator_tests::compare;
use replicator_tests::mounts::{FileSystem, Mount, Scratch};
use replicator_tests::workload::content;
use serde::Serialize;

use crate::measure::{self, Usage};
use crate::peer::Peer;

/// Files of one directory.
const PER_DIRECTORY: u64 = 100;
/// Room for either tree with its overhead.
const DISK: u64 = 8 << 30;

/// A tree to be brought elsewhere, on a file system of its own.
pub struct Source {
    mount: Mount,
}

impl Source {
    /// `count` files of 4 KiB, 100 to a directory. Contents differ from file to
    /// file; every other one compresses well.
    pub fn small_files(count: u64) -> Result<Self> {
        let source = Self::empty()?;
        for number in 0..count {
            let directory = source.path().join(format!("directory-{}", number / PER_DIRECTORY));
            if number % PER_DIRECTORY == 0 {
                fs::create_dir(&directory)?;
            }
            fs::write(directory.join(format!("file-{number}")), content::bytes(number, 4096))?;
        }
        Ok(source)
    }

    /// `count` files of `bytes` that no compressor makes smaller.
    pub fn large_files(count: u64, bytes: u64) -> Result<Self> {
        const PART: u64 = 1 << 20;
        let source = Self::empty()?;
        for number in 0..count {
            let mut file = BufWriter::new(File::create(source.path().join(format!("{number}")))?);
            for part in 0..bytes / PART {
                file.write_all(&content::incompressible(number << 32 | part, PART as usize))?;
            }
            file.flush()?;
        }
        Ok(source)
    }

    fn empty() -> Result<Self> {
        let source = Self { mount: Mount::with_size(FileSystem::Ext4, DISK) };
        fs::create_dir(source.path())?;
        Ok(source)
    }

    /// Below the file system's root: `lost+found` is not to be measured.
    fn path(&self) -> PathBuf {
        self.mount.path().join("tree")
    }
}

/// One run of one program.
#[derive(Debug, Serialize)]
pub struct Sync {
    /// Of what.
    pub measurement: String,
    /// By which program.
    pub peer: Peer,
    /// Until it ended.
    pub seconds: f64,
    /// Until all was on disk as well: replicator ends only then, for the others
    /// a `syncfs` is added.
    pub durable_seconds: f64,
    /// What it used.
    pub usage: Usage,
}

/// Brings `source` to a file system that was made for this run. `verify`
/// compares the two afterwards.
pub fn measure(measurement: &str, peer: Peer, source: &Source, verify: bool) -> Result<Sync> {
    let replica = Mount::with_size(FileSystem::Ext4, DISK);
    let scratch = Scratch::new("bench");
    let (state, log) = (scratch.path().join("state"), scratch.path().join("log"));
    let mut command = peer.pass(&source.path(), replica.path(), &state);
    measure::drop_caches()?;
    let (time, usage) = measure::run(&mut command, &[0], &log)?;
    let flush = measure::sync_file_system(replica.path())?;
    if verify {
        let context = format!("{measurement} by {}", peer.name());
        compare::assert_same(&source.path(), replica.path(), &context);
    }
    Ok(Sync {
        measurement: measurement.to_owned(),
        peer,
        seconds: time.as_secs_f64(),
        durable_seconds: (time + flush).as_secs_f64(),
        usage,
    })
}
