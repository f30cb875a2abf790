//! What the guard against deletions remembers, on disk.

use redb::{Durability, ReadableDatabase, ReadableTable, WriteTransaction};
use replicator_common::id::{BatchId, ObjectId};
use replicator_common::time::Timestamp;

use super::store::{IndexError, Store, YOUNG, failed};

/// What a batch changes of it. Durable with the batch's delta.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Noted {
    /// How many objects batches deleted lately, and when; `None`: as before.
    pub deletions: Option<Vec<(BatchId, Timestamp, u64)>>,
    /// When it was noted.
    pub at: Timestamp,
    /// Objects that came.
    pub born: Vec<ObjectId>,
    /// Objects that are not young any more, or not there.
    pub gone: Vec<ObjectId>,
}

/// All of it, as a process before this left it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Remembered {
    /// See [`Noted::deletions`].
    pub deletions: Vec<(BatchId, Timestamp, u64)>,
    /// Objects that came lately, and when.
    pub young: Vec<(ObjectId, Timestamp)>,
}

impl Store {
    /// What was noted so far.
    pub fn remembered(&self) -> Result<Remembered, IndexError> {
        let deletions = self.meta("deletions")?.unwrap_or_default();
        let read = self.db.begin_read().map_err(failed(&self.path))?;
        let table = read.open_table(YOUNG).map_err(failed(&self.path))?;
        let mut young = Vec::new();
        for row in table.iter().map_err(failed(&self.path))? {
            let (key, value) = row.map_err(failed(&self.path))?;
            let at = value.value().try_into().map(i64::from_le_bytes);
            // A row that nobody wrote so counts for nothing.
            if let (Some(object), Ok(at)) = (self.order.id(key.value()), at) {
                young.push((object, Timestamp(at)));
            }
        }
        Ok(Remembered { deletions, young })
    }

    /// Deletions are forgiven: no restart counts them.
    pub fn forgive_deletions(&self) -> Result<(), IndexError> {
        let write = self.begin(Durability::Immediate)?;
        self.put_meta(&write, "deletions", &Vec::<(BatchId, Timestamp, u64)>::new())?;
        write.commit().map_err(failed(&self.path))
    }

    pub(super) fn note(&self, write: &WriteTransaction, noted: &Noted) -> Result<(), IndexError> {
        if let Some(deletions) = &noted.deletions {
            self.put_meta(write, "deletions", deletions)?;
        }
        let mut table = write.open_table(YOUNG).map_err(failed(&self.path))?;
        for object in &noted.gone {
            table.remove(self.order.key(object).as_bytes()).map_err(failed(&self.path))?;
        }
        let at = noted.at.0.to_le_bytes();
        for object in &noted.born {
            table.insert(self.order.key(object).as_bytes(), &at[..]).map_err(failed(&self.path))?;
        }
        Ok(())
    }
}
