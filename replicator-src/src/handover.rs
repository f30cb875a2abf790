//! From one process to the next without a walk.
//!
//! A service manager can keep the watcher's queue while no process runs
//! ([`replicator_common::supervisor`]). What a process knows beside it that is
//! neither in the journal nor in the index it leaves in a small file. The next
//! one goes on from there when all of it fits together; else it walks, as after
//! any other restart.
//!
//! INVARIANTS, which together make a walk needless:
//! - All that was read from the queue was in the journal, and the journal
//!   flushed, before the file was written; the rest is still in the queue.
//! - Only a process that ended as it was asked to, with no gap open, writes the
//!   file. It names the queue by a number that is used once.
//! - The file is durably removed before anything is read from the queue: who
//!   dies after that leaves none, and a queue from which something was read and
//!   lost fits no file.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use rand::Rng;
use replicator_common::crashsafe::{self, Format, StateFileError};
use replicator_common::id::{BatchId, FileSystemId, ObjectId, Seq};
use replicator_common::name::Name;
use replicator_common::supervisor::Supervisor;
use serde::{Deserialize, Serialize};

use crate::plan::{Dirty, Listing, Skip};
use crate::watcher::{Queue, What};

/// Format of the file. Versions: 1, the first. (Before it there was a
/// `source-handover`, which had ids for hashes: it is damaged, and so a gap.)
const FORMAT: Format = Format { name: "source-watch", version: 1 };
/// Things that the file names at most, some 10 MiB; beyond, a walk is as well.
pub const MOST: usize = 50_000;
/// Names the boot: no queue outlives it.
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

/// What is known of the source beside journal, index and queue.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Carried {
    /// Entries to look at: dirty, held, or in batches that are not acknowledged.
    pub entries: Vec<((ObjectId, Name), What)>,
    /// Objects to look at.
    pub objects: Vec<(ObjectId, What)>,
    /// Directories to list, and whether deeply.
    pub listings: Vec<(ObjectId, bool)>,
    /// What is passed over, which status counts.
    pub skipped: Vec<((ObjectId, Name), Skip)>,
    /// See [`crate::capture::Members::linked`]: objects that may have names outside.
    pub linked: Vec<u64>,
    /// See [`crate::capture::Left::recent`].
    pub recent: Vec<ObjectId>,
}

impl Carried {
    /// Notes what is dirty. Of a directory that was listed in part, all is
    /// listed again.
    pub fn set_dirty(&mut self, dirty: Dirty) {
        let mut listings = BTreeMap::<ObjectId, bool>::new();
        for listing in dirty.listings {
            *listings.entry(listing.directory).or_default() |= listing.deep;
        }
        self.entries = dirty.entries.into_iter().collect();
        self.objects = dirty.objects.into_iter().collect();
        self.listings = listings.into_iter().collect();
    }

    /// What is dirty.
    pub fn dirty(&mut self) -> Dirty {
        let listings = std::mem::take(&mut self.listings).into_iter();
        Dirty {
            entries: std::mem::take(&mut self.entries).into_iter().collect(),
            objects: std::mem::take(&mut self.objects).into_iter().collect(),
            listings: listings.map(|(one, deep)| Listing::new(one, deep)).collect(),
        }
    }

    /// Things named.
    pub fn len(&self) -> usize {
        let dirty = self.entries.len() + self.objects.len() + self.listings.len();
        dirty + self.skipped.len() + self.linked.len() + self.recent.len()
    }

    /// Whether nothing is named.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// All that one process leaves to the next.
#[derive(Debug)]
pub struct Rest {
    /// The watcher's queue.
    pub queue: Queue,
    /// What is known beside it.
    pub carried: Carried,
    /// The last record of the journal.
    pub seq: Seq,
    /// The last batch that the index was made durable for.
    pub batch: BatchId,
}

/// The file.
#[derive(Serialize, Deserialize)]
struct Record {
    /// The name under which the queue is kept.
    queue: String,
    boot: String,
    description: Vec<String>,
    seq: Seq,
    batch: BatchId,
    carried: Carried,
}

/// The queue's name without the part that is used once.
fn prefix(source: &FileSystemId) -> String {
    format!("replicator-{source}-")
}

fn file(directory: &Path) -> PathBuf {
    directory.join("handover")
}

/// Leaves `rest` to the next process: the file in the replication's directory,
/// the queue with the service manager.
///
/// # Errors
/// In words, when one of them could not be left: then the next process walks.
pub fn leave(
    directory: &Path,
    source: &FileSystemId,
    rest: &Rest,
    supervisor: &Supervisor,
) -> Result<(), String> {
    let name = format!("{}{:016x}", prefix(source), rand::rng().random::<u64>());
    let record = Record {
        queue: name.clone(),
        boot: boot_id()?,
        description: rest.queue.description.clone(),
        seq: rest.seq,
        batch: rest.batch,
        carried: rest.carried.clone(),
    };
    // The file first: a queue without one is thrown away, which is sound.
    crashsafe::write(&file(directory), &FORMAT, &record).map_err(|e| e.to_string())?;
    supervisor.keep(&name, rest.queue.descriptor.as_fd()).map_err(|e| e.to_string())
}

/// What the process before left, when all of it fits together; it is taken, so
/// that it is used once. What was left and does not fit is said in the log.
///
/// # Errors
/// When the file cannot be removed.
pub fn take(
    directory: &Path,
    source: &FileSystemId,
    supervisor: &Supervisor,
) -> Result<Option<Rest>, StateFileError> {
    let queues = supervisor.take(&prefix(source));
    for (name, _) in &queues {
        // Nobody may hold a queue that fills and is not read: it has no limit.
        supervisor.forget(name);
    }
    let path = file(directory);
    let record = crashsafe::read::<Record>(&path, &FORMAT);
    // INVARIANT (see the module): before anything is read from the queue.
    crashsafe::remove(&path)?;
    Ok(match fit(record, queues) {
        Ok(rest) => rest,
        Err(reason) => {
            tracing::warn!(%source, reason, "the watch of the process before is not taken over");
            None
        }
    })
}

fn fit(
    record: Result<Option<Record>, StateFileError>,
    queues: Vec<(String, OwnedFd)>,
) -> Result<Option<Rest>, String> {
    let Some(record) = record.map_err(|error| error.to_string())? else {
        return match queues.is_empty() {
            true => Ok(None),
            false => Err("it did not end as it should: what it had read may be lost".to_owned()),
        };
    };
    let found = queues.into_iter().find(|(name, _)| *name == record.queue);
    let Some((_, descriptor)) = found else {
        return Err("its queue was not kept (FileDescriptorStoreMax=)".to_owned());
    };
    if record.boot != boot_id()? {
        return Err("it was of another boot".to_owned());
    }
    let Record { description, seq, batch, carried, .. } = record;
    Ok(Some(Rest { queue: Queue { descriptor, description }, carried, seq, batch }))
}

fn boot_id() -> Result<String, String> {
    let text = std::fs::read_to_string(BOOT_ID).map_err(|error| format!("{BOOT_ID}: {error}"))?;
    Ok(text.trim().to_owned())
}

/// Throws away what was kept and belongs to no replication here.
pub fn discard_others(supervisor: &Supervisor) {
    for (name, _) in supervisor.take("") {
        tracing::warn!(name, "a descriptor that was kept belongs to no replication here");
        supervisor.forget(&name);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(number: u8) -> ObjectId {
        ObjectId::new(1, &[number]).unwrap()
    }

    fn carried() -> Carried {
        let (mut dirty, name) = (Dirty::default(), Name::new(b"a\xffb").unwrap());
        dirty.entry(id(1), name.clone(), What { content: true, attributes: false });
        dirty.object(id(2), What { content: false, attributes: true });
        let rest = Some(crate::plan::Rest::all(vec![name.clone()]));
        dirty.listings.push_back(Listing { directory: id(3), deep: false, rest });
        dirty.listings.push_back(Listing::new(id(3), true));
        dirty.listings.push_back(Listing::new(id(4), false));
        let mut carried = Carried {
            skipped: vec![((id(1), name), Skip::Fifo)],
            linked: vec![5],
            recent: vec![id(6)],
            ..Carried::default()
        };
        carried.set_dirty(dirty);
        carried
    }

    #[test]
    fn what_is_dirty_comes_back_and_partial_listings_are_whole() {
        let mut carried = carried();
        assert_eq!(carried.len(), 7);
        let dirty = carried.dirty();
        let listings: Vec<_> = dirty.listings.iter().cloned().collect();
        assert_eq!(listings, [Listing::new(id(3), true), Listing::new(id(4), false)]);
        assert_eq!((dirty.entries.len(), dirty.objects.len()), (1, 1));
        assert_eq!(carried.len(), 3);
    }

    fn record(queue: &str, boot: String) -> Record {
        let description = vec!["fanotify flags:0".to_owned()];
        let (seq, batch) = (Seq(7), BatchId(3));
        Record { queue: queue.into(), boot, description, seq, batch, carried: carried() }
    }

    fn queues(name: &str) -> Vec<(String, OwnedFd)> {
        vec![(name.to_owned(), std::fs::File::open("/dev/null").unwrap().into())]
    }

    #[test]
    fn only_the_queue_that_the_record_names_fits_and_only_in_the_same_boot() {
        let here = || boot_id().unwrap();
        let fits = |record, queues| fit(Ok(record), queues);
        let rest = fits(Some(record("q-1", here())), queues("q-1")).unwrap().unwrap();
        assert_eq!((rest.seq, rest.batch, rest.carried), (Seq(7), BatchId(3), carried()));
        assert!(fits(Some(record("q-1", here())), queues("q-2")).is_err(), "another's");
        assert!(fits(Some(record("q-1", here())), Vec::new()).is_err(), "not kept");
        assert!(fits(Some(record("q-1", "earlier".into())), queues("q-1")).is_err(), "boot");
        assert!(fits(None, queues("q-1")).is_err(), "killed");
        assert!(fits(None, Vec::new()).unwrap().is_none(), "nothing was left");
    }

    #[test]
    fn the_file_survives_names_that_are_no_text_and_is_used_once() {
        let directory = tempfile::tempdir().unwrap();
        let path = file(directory.path());
        crashsafe::write(&path, &FORMAT, &record("q-1", boot_id().unwrap())).unwrap();
        let read: Record = crashsafe::read(&path, &FORMAT).unwrap().unwrap();
        assert_eq!(read.carried, carried());
        let source = FileSystemId::random();
        // The queue itself is missing.
        assert!(take(directory.path(), &source, &Supervisor::nobody()).unwrap().is_none());
        assert!(!path.exists());
    }
}
