//! The file of an embedded store (redb), made as a whole or not at all.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::path::Path;

use redb::backends::FileBackend;
use redb::{Builder, Database, DatabaseError, Durability, StorageBackend, WriteTransaction};
use rustix::fs::Advice;

use crate::crashsafe;
use crate::fault;
use crate::sys::place;

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
    if let Ok(file) = File::open(path) {
        // INVARIANT: what is read is what the disk holds. What a process before could not
        // write is still in the kernel's cache, as if it had been.
        place::forget_cached(&file);
        if is_small(path) {
            // In one go, and not page by page where redb looks: a hint.
            let _ = rustix::fs::fadvise(&file, 0, None, Advice::WillNeed);
        }
    }
    open_file(builder, path)
}

fn open_file(builder: &Builder, path: &Path) -> Result<Database, DatabaseError> {
    let mut options = OpenOptions::new();
    let file = options.read(true).write(true).create(true).truncate(false).open(path)?;
    let file = fault::store(FileBackend::new(file)?, path);
    builder.create_with_backend(Lasting { file })
}

/// A store's file, which is as long as its header says also after a loss of power.
///
/// redb makes it longer and notes that in the header with the next commit, whose sync can
/// put the header on the disk before the file's length is there. It refuses a file that is
/// shorter than its header says, for good.
#[derive(Debug)]
struct Lasting<B> {
    file: B,
}

impl<B: StorageBackend> StorageBackend for Lasting<B> {
    fn len(&self) -> io::Result<u64> {
        self.file.len()
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        self.file.read(offset, out)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        let grows = len > self.file.len()?;
        self.file.set_len(len)?;
        if grows { self.file.sync_data() } else { Ok(()) }
    }

    fn sync_data(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.file.write(offset, data)
    }

    fn close(&self) -> io::Result<()> {
        self.file.close()
    }
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
    fs::metadata(path).is_ok_and(|data| data.len() <= fault::small_store(SMALL))
}

fn make(builder: &Builder, path: &Path) -> Result<(), DatabaseError> {
    let new = path.with_extension("new");
    // Of a process that died while it made it.
    crashsafe::remove(&new).map_err(io::Error::other)?;
    drop(open_file(builder, &new)?);
    crashsafe::install(&new, path).map_err(io::Error::other)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::sync::{Arc, Mutex};

    use redb::{ReadableDatabase, TableDefinition};

    use super::*;

    const ROWS: TableDefinition<'_, u64, &[u8]> = TableDefinition::new("rows");

    /// Remembers what was done to it since the last sync.
    #[derive(Debug, Default)]
    struct Watched {
        file: redb::backends::InMemoryBackend,
        unsynced: Arc<Mutex<Vec<&'static str>>>,
        grown: Arc<AtomicBool>,
    }

    impl StorageBackend for Watched {
        fn len(&self) -> io::Result<u64> {
            self.file.len()
        }

        fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
            self.file.read(offset, out)
        }

        fn set_len(&self, len: u64) -> io::Result<()> {
            if len > self.file.len()? {
                self.unsynced.lock().unwrap().push("grew");
                self.grown.store(true, Ordering::Relaxed);
            }
            self.file.set_len(len)
        }

        fn sync_data(&self) -> io::Result<()> {
            self.unsynced.lock().unwrap().clear();
            self.file.sync_data()
        }

        fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
            assert!(self.unsynced.lock().unwrap().is_empty(), "written before it was as long");
            self.file.write(offset, data)
        }
    }

    #[test]
    fn a_file_is_as_long_on_disk_before_its_header_says_so() {
        let (file, grown) = (Watched::default(), Arc::new(AtomicBool::new(false)));
        let file = Watched { grown: grown.clone(), ..file };
        let database = Database::builder().create_with_backend(Lasting { file }).unwrap();
        grown.store(false, Ordering::Relaxed);
        for row in 0..40 {
            let write = database.begin_write().unwrap();
            write.open_table(ROWS).unwrap().insert(row, &*vec![1; 1 << 20]).unwrap();
            write.commit().unwrap();
        }
        assert!(grown.load(Ordering::Relaxed), "it never grew");
    }

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
