//! Data that never changes: once it has arrived, it is never written again.

use std::collections::BTreeMap;
use std::fs;
use std::io::ErrorKind;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use crate::workload::content;

/// Small files.
const SMALL: u64 = 400;
/// Large files, which travel in lanes of their own.
const LARGE: u64 = 6;
/// Bytes of each large file.
const LARGE_BYTES: usize = 6 << 20;

/// Each object of the replica: its number and its time. A file that was sent
/// again is another object, whatever the program's counters say. (Not its change
/// time: a batch that is redone restates attributes.)
pub(super) type Touched = BTreeMap<PathBuf, (u64, i64, i64)>;

/// The objects of a tree. What goes away meanwhile is
/// left out, and so are names that are too long for a path.
pub(super) fn touched(root: &Path) -> Touched {
    let mut all = BTreeMap::new();
    walk(root, &mut all);
    all
}

fn walk(directory: &Path, into: &mut Touched) {
    let entries = match fs::read_dir(directory) {
        Ok(entries) => entries,
        Err(error) if error.kind() == ErrorKind::NotFound => return,
        Err(error) if error.raw_os_error() == Some(libc::ENAMETOOLONG) => return,
        Err(error) => panic!("{}: {error}", directory.display()),
    };
    for entry in entries {
        let path = entry.unwrap().path();
        let ours =
            path.file_name().is_some_and(|n| n.as_encoded_bytes().starts_with(b".replicator-"));
        let Ok(stat) = fs::symlink_metadata(&path) else { continue };
        if ours {
            continue;
        }
        into.insert(path.clone(), (stat.ino(), stat.mtime(), stat.mtime_nsec()));
        if stat.is_dir() {
            walk(&path, into);
        }
    }
}

/// Panics when something was replaced, came or went.
#[track_caller]
pub(super) fn assert_untouched(before: &Touched, after: &Touched) {
    let differing = |a: &Touched, b: &Touched| -> Touched {
        let differing = a.iter().filter(|(path, then)| b.get(*path) != Some(*then));
        differing.map(|(path, then)| (path.clone(), *then)).collect()
    };
    let (gone, new) = (differing(before, after), differing(after, before));
    let sizes: Vec<_> = new.keys().map(|path| fs::metadata(path).map(|stat| stat.len())).collect();
    let any = !(gone.is_empty() && new.is_empty());
    assert!(!any, "replaced: {gone:?}\nnow: {new:?}\nbytes: {sizes:?}");
}

/// The ballast, and what of it was seen on the replica.
pub(super) struct Ballast {
    replica: PathBuf,
    seen: BTreeMap<PathBuf, u64>,
    settled: Option<Touched>,
}

impl Ballast {
    /// Writes it below `source`.
    pub(super) fn write(source: &Path, replica: &Path) -> Self {
        let root = source.join("ballast");
        for number in 0..SMALL {
            let directory = root.join(format!("directory-{}", number % 17));
            fs::create_dir_all(&directory).unwrap();
            let bytes = content::bytes(number, 500 + 37 * number as usize);
            fs::write(directory.join(format!("file-{number}")), bytes).unwrap();
        }
        for number in 0..LARGE {
            let bytes = content::incompressible(number, LARGE_BYTES);
            fs::write(root.join(format!("large-{number}")), bytes).unwrap();
        }
        Self { replica: replica.join("ballast"), seen: BTreeMap::new(), settled: None }
    }

    /// Panics when a file that had arrived was replaced.
    pub(super) fn check(&mut self) {
        let now = touched(&self.replica);
        if let Some(settled) = &self.settled {
            return assert_untouched(settled, &now);
        }
        for (path, object) in &self.seen {
            let found = now.get(path).map(|(number, ..)| *number);
            assert_eq!(found, Some(*object), "{} was sent again", path.display());
        }
        let files = now.into_iter().filter(|(path, _)| path.is_file());
        self.seen.extend(files.map(|(path, (number, ..))| (path, number)));
    }

    /// All of it has arrived.
    pub(super) fn settled(&mut self) {
        self.check();
        self.settled = Some(touched(&self.replica));
    }
}
