//! Where a replica stands, as the store keeps it.

use replicator_common::id::{BatchId, BatchNonce, Edition, Incarnation};
use replicator_common::status::{Shortfalls, TimedError};
use replicator_common::time::Timestamp;
use serde::{Deserialize, Serialize};

/// Where the replica stands.
///
/// INVARIANT: `applied ≤ committed`, and `watermark` and `last_consistent`
/// belong to `committed`; they are told to others only once `applied` has
/// caught up. Neither ever moves back.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Standing {
    /// This life of the destination's state.
    pub incarnation: Incarnation,
    /// The source's life that the batch numbers belong to.
    pub source_incarnation: Option<Incarnation>,
    /// The last batch logged.
    pub committed: BatchId,
    /// Tells that batch from others of its number.
    pub nonce: BatchNonce,
    /// The last batch applied, as far as the store knows: redo begins behind it.
    pub applied: BatchId,
    /// Everything on the source before this is in the replica.
    pub watermark: Timestamp,
    /// The instant of the last exact batch.
    pub last_consistent: Option<Timestamp>,
    /// The initial sync is through.
    pub complete: bool,
    /// The replica holds what the map does not know: the source has to ask for
    /// the inventory first.
    pub reconcile: bool,
    /// Rows of the objects map.
    pub objects: u64,
    /// Of them, orphans.
    pub orphans: u64,
    /// Batches committed, and how many of them exact.
    pub batches: (u64, u64),
    /// Content bytes that changed on the source, and that travelled.
    pub bytes: (u64, u64),
    /// What the replica could not hold.
    pub shortfalls: Shortfalls,
    /// The destination's clock less the source's, nanoseconds, as last known.
    pub clock_offset: Option<i64>,
    /// The last error that an operator should know.
    pub last_error: Option<TimedError>,
}

impl Standing {
    /// Of a new replica.
    pub fn new(incarnation: Incarnation, reconcile: bool) -> Self {
        Self {
            incarnation,
            source_incarnation: None,
            committed: BatchId(0),
            nonce: BatchNonce::default(),
            applied: BatchId(0),
            watermark: Timestamp::NEVER,
            last_consistent: None,
            complete: false,
            reconcile,
            objects: 0,
            orphans: 0,
            batches: (0, 0),
            bytes: (0, 0),
            shortfalls: Shortfalls::default(),
            clock_offset: None,
            last_error: None,
        }
    }

    /// The last batch logged.
    pub fn edition(&self) -> Edition {
        Edition { batch: self.committed, nonce: self.nonce }
    }
}
