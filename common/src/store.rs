//! The file of an embedded store (redb), made as a whole or not at all.

use std::fs::{self, File};
use std::io;
use std::path::Path;

use redb::{Builder, Database, DatabaseError, Durability, WriteTransaction};
use rustix::fs::Advice;

use crate::crashsafe;
use crate::fault;

/// Bytes of a store that is read as a whole when it is opened after an unclean end: that
/// takes redb some 0.1 s (0.7 for 300 MiB, see ARCHITECTURE.md), and a slow disk 0.3.
const SMALL: u64 = 32 << 20;

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
    if is_small(path)
        && let Ok(file) = File::open(path)
    {
        // In one go, and not page by page where redb looks: a hint.
        let _ = rustix::fs::fadvise(&file, 0, None, Advice::WillNeed);
    }
    fault::open_store(builder, path)
}

/// Begins to change a store, whose file is `path`.
///
/// One that is not small keeps with each commit what lets redb open it at once after an
/// unclean end, which a failover would have to wait for else; that is another sync of
/// the disk for each commit. A small one is checked then by its checksums.
///
/// # Errors
/// What redb says.
pub fn begin(
    database: &Database,
    path: &Path,
    durability: Durability,
) -> Result<WriteTransaction, redb::Error> {
    let mut write = database.begin_write()?;
    write.set_durability(durability)?;
    write.set_quick_repair(!is_small(path));
    Ok(write)
}

fn is_small(path: &Path) -> bool {
    fs::metadata(path).is_ok_and(|data| data.len() <= SMALL)
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
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, Ordering};

    use redb::{ReadableDatabase, TableDefinition};

    use super::*;

    const ROWS: TableDefinition<'_, u64, &[u8]> = TableDefinition::new("rows");

    /// After an unclean end all that was committed is there; a small store is read as a whole
    /// for that, a large one is not.
    #[test]
    fn only_a_small_store_is_read_as_a_whole() {
        let directory = tempfile::tempdir_in("/var/tmp").unwrap();
        let path = directory.path().join("index.redb");
        let database = open(&Database::builder(), &path).unwrap();
        let put = |row: u64, bytes: usize| {
            let write = begin(&database, &path, Durability::Immediate).unwrap();
            write.open_table(ROWS).unwrap().insert(row, &*vec![row as u8; bytes]).unwrap();
            write.commit().unwrap();
        };
        // As a process that is killed leaves it.
        let was_read = |rows: u64| {
            let copy = directory.path().join("copy.redb");
            fs::copy(&path, &copy).unwrap();
            let whole = Arc::new(AtomicBool::new(false));
            let mut builder = Database::builder();
            let told = whole.clone();
            builder.set_repair_callback(move |_| told.store(true, Ordering::Relaxed));
            let database = open(&builder, &copy).unwrap();
            let found = database.begin_read().unwrap().open_table(ROWS).unwrap();
            for row in 0..rows {
                assert_eq!(found.get(row).unwrap().unwrap().value()[0], row as u8);
            }
            whole.load(Ordering::Relaxed)
        };
        put(0, 1000);
        put(1, 1000);
        assert!(was_read(2));
        put(2, SMALL as usize + 1);
        put(3, 1000);
        assert!(!was_read(4));
    }

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
