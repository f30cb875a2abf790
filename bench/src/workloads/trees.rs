//! The trees that workloads begin with.

use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use replicator_tests::workload::content;

/// Files of one directory.
pub const PER_DIRECTORY: u64 = 100;
/// Bytes of a small file.
pub const SMALL: usize = 4096;

/// Where file `number` of [`small_files`] is.
pub fn small_file(number: u64) -> PathBuf {
    PathBuf::from(format!("directory-{}/file-{number}", number / PER_DIRECTORY))
}

/// `count` files of 4 KiB, 100 to a directory. Contents differ from file to file;
/// every other one compresses well, unless `incompressible`.
pub fn small_files(root: &Path, count: u64, incompressible: bool) -> Result<()> {
    for number in 0..count {
        let path = root.join(small_file(number));
        if number % PER_DIRECTORY == 0 {
            let directory = path.parent().context("a small file is in a directory")?;
            fs::create_dir_all(directory).with_context(|| directory.display().to_string())?;
        }
        let bytes = if incompressible {
            content::incompressible(number, SMALL)
        } else {
            content::bytes(number, SMALL)
        };
        fs::write(&path, bytes).with_context(|| path.display().to_string())?;
    }
    Ok(())
}

/// A file of `bytes` that no compressor makes smaller.
pub fn large_file(path: &Path, seed: u64, bytes: u64) -> Result<()> {
    const PART: u64 = 1 << 20;
    let file = File::create(path).with_context(|| path.display().to_string())?;
    let mut file = BufWriter::new(file);
    for part in 0..bytes / PART {
        file.write_all(&content::incompressible(seed << 32 | part, PART as usize))?;
    }
    file.flush().with_context(|| path.display().to_string())
}
