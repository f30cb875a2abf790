//! The file of an embedded store (redb), made as a whole or not at all.

use std::io;
use std::path::Path;

use redb::{Builder, Database, DatabaseError};

use crate::crashsafe;
use crate::fault;

/// Opens the store in the file `path`, or makes it.
///
/// INVARIANT: what stands under `path` was made to its end. redb makes a file in
/// several steps, and takes one that was left in the middle for damaged, for
/// good: a process that died then would leave a state directory that none opens.
/// So a store is made under another name, and renamed.
///
/// # Errors
/// What redb says, or the system of making the file.
pub fn open(builder: &Builder, path: &Path) -> Result<Database, DatabaseError> {
    if !path.try_exists()? {
        make(builder, path)?;
    }
    fault::open_store(builder, path)
}

fn make(builder: &Builder, path: &Path) -> Result<(), DatabaseError> {
    let new = path.with_extension("new");
    // Of a process that died while it made it.
    crashsafe::remove(&new).map_err(io::Error::other)?;
    drop(fault::open_store(builder, &new)?);
    crashsafe::install(&new, path).map_err(io::Error::other)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn what_a_process_that_died_left_of_a_new_store_is_made_anew() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("index.redb");
        // As redb leaves a file whose making was interrupted: no magic number yet.
        fs::write(path.with_extension("new"), vec![0; 1 << 20]).unwrap();
        drop(open(&Database::builder(), &path).unwrap());
        assert!(path.exists() && !path.with_extension("new").exists());
        // What is damaged is not made anew: it was somebody's state.
        fs::write(&path, vec![0; 1 << 20]).unwrap();
        open(&Database::builder(), &path).unwrap_err();
        assert_eq!(fs::read(&path).unwrap().len(), 1 << 20);
    }
}
