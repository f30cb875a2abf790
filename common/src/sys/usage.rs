//! How much of a disk a directory takes.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// Bytes that the files below `directory` take on disk. What cannot be read, or
/// vanishes meanwhile, counts nothing. For directories of few files.
pub fn of(directory: &Path) -> u64 {
    let mut bytes = 0;
    let mut left = vec![directory.to_owned()];
    while let Some(directory) = left.pop() {
        for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
            // Of a link, the link itself.
            let Ok(about) = entry.metadata() else { continue };
            bytes += about.blocks() * 512;
            if about.is_dir() {
                left.push(entry.path());
            }
        }
    }
    bytes
}
