//! What older versions of the store held, and what it becomes.

use redb::ReadableTable;
use replicator_common::id::{BatchId, BatchNonce, Incarnation};
use replicator_common::status::{Shortfalls, TimedError};
use replicator_common::time::Timestamp;
use serde::{Deserialize, Serialize};

use crate::store::{Standing, Store, StoreError, VERSION_BYTES};

/// [`Standing`] in version 1 of the store: without the last batch's nonce.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct StandingV1 {
    incarnation: Incarnation,
    source_incarnation: Option<Incarnation>,
    committed: BatchId,
    applied: BatchId,
    watermark: Timestamp,
    last_consistent: Option<Timestamp>,
    complete: bool,
    reconcile: bool,
    objects: u64,
    orphans: u64,
    batches: (u64, u64),
    bytes: (u64, u64),
    shortfalls: Shortfalls,
    clock_offset: Option<i64>,
    last_error: Option<TimedError>,
}

impl From<StandingV1> for Standing {
    fn from(old: StandingV1) -> Self {
        Self {
            incarnation: old.incarnation,
            source_incarnation: old.source_incarnation,
            committed: old.committed,
            nonce: BatchNonce::default(),
            applied: old.applied,
            watermark: old.watermark,
            last_consistent: old.last_consistent,
            complete: old.complete,
            reconcile: old.reconcile,
            objects: old.objects,
            orphans: old.orphans,
            batches: old.batches,
            bytes: old.bytes,
            shortfalls: old.shortfalls,
            clock_offset: old.clock_offset,
            last_error: old.last_error,
        }
    }
}

impl Store {
    /// Makes of version `found`, one before 3, version 3.
    pub(crate) fn upgrade(
        &self,
        meta: &mut redb::Table<'_, &'static str, &'static [u8]>,
        found: u32,
    ) -> Result<(), StoreError> {
        let action = "upgrade";
        let mut rows = vec![("version", self.encode(&VERSION_BYTES)?)];
        if found < 2 {
            let row = meta.get("standing").map_err(|e| self.err(action)(e.into()))?;
            let old = row.map(|row| self.decode::<StandingV1>(row.value())).transpose()?;
            if let Some(old) = old {
                rows.push(("standing", self.encode(&Standing::from(old))?));
            }
        }
        for (key, value) in rows {
            meta.insert(key, value.as_slice()).map_err(|e| self.err(action)(e.into()))?;
        }
        Ok(())
    }
}

#[cfg(test)]
impl From<Standing> for StandingV1 {
    fn from(new: Standing) -> Self {
        Self {
            incarnation: new.incarnation,
            source_incarnation: new.source_incarnation,
            committed: new.committed,
            applied: new.applied,
            watermark: new.watermark,
            last_consistent: new.last_consistent,
            complete: new.complete,
            reconcile: new.reconcile,
            objects: new.objects,
            orphans: new.orphans,
            batches: new.batches,
            bytes: new.bytes,
            shortfalls: new.shortfalls,
            clock_offset: new.clock_offset,
            last_error: new.last_error,
        }
    }
}
