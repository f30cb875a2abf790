//! The file of an embedded store (redb), made as a whole or not at all.

use std::io;
use std::path::Path;

use redb::{
    Builder, Database, DatabaseError, ReadableTable, TableDefinition, TableHandle, WriteTransaction,
};

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

/// Gives each row of a table another key: what [`turn_key`](crate::id::turn_key) made of it,
/// or what else `turn` does.
///
/// Memory: redb's cache, however many rows there are. In the same transaction, nothing may
/// have been changed in the table before (redb 3.1 would lose count of its pages).
///
/// # Errors
/// What redb says, and a key with which `turn` can do nothing.
pub fn turn_keys(
    write: &WriteTransaction,
    table: TableDefinition<'_, &'static [u8], &'static [u8]>,
    turn: impl Fn(&mut [u8]) -> Option<()>,
) -> Result<(), redb::Error> {
    const OLD: TableDefinition<'_, &[u8], &[u8]> = TableDefinition::new("with old keys");
    write.rename_table(table, OLD)?;
    {
        let (old, mut new) = (write.open_table(OLD)?, write.open_table(table)?);
        let mut key = Vec::new();
        for row in old.iter()? {
            let (old_key, value) = row?;
            key.clear();
            key.extend_from_slice(old_key.value());
            let turned = turn(&mut key);
            turned.ok_or_else(|| redb::Error::Corrupted(format!("a key of {}", table.name())))?;
            new.insert(key.as_slice(), value.value())?;
        }
    }
    write.delete_table(OLD)?;
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
