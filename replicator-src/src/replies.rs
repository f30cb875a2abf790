//! What a destination may say, given what was said to it. Pure: the engine asks
//! before it acts, and the fuzz target `replies` tries all orders.
//!
//! The destination is pinned, and need not be honest. A [`Breach`] ends the
//! session, and nothing of the message counts. See also
//! [`Flights`](crate::ledger::Flights), which knows what was sent.

use std::collections::VecDeque;

use replicator_common::id::BatchId;
use replicator_common::wire::InventoryItem;

/// How the destination broke the protocol. The session ends with it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[allow(missing_docs)]
pub enum Breach {
    #[error("it acknowledges batch {batch}, and {next} is the next")]
    NotSent { batch: BatchId, next: BatchId },
    #[error("it gives batch {batch} back, which is not the oldest under way")]
    NotOldest { batch: BatchId },
    #[error("it gives more objects back than batch {batch} has")]
    TooManyNamed { batch: BatchId },
    #[error("it sends an inventory that was not asked for")]
    Inventory,
}

/// A part of the inventory, and whether it is the last.
type Part = (Vec<InventoryItem>, bool);

/// Parts of the destination's inventory.
///
/// INVARIANT (bounded resources): no more of them wait than were asked for.
#[derive(Debug, Default)]
pub struct Parts {
    /// Asked for, and not there.
    asked: usize,
    /// There, and not taken.
    waiting: VecDeque<Part>,
}

impl Parts {
    /// One more is asked for.
    pub fn ask(&mut self) {
        self.asked += 1;
    }

    /// One arrived.
    pub fn arrived(&mut self, items: Vec<InventoryItem>, last: bool) -> Result<(), Breach> {
        self.asked = self.asked.checked_sub(1).ok_or(Breach::Inventory)?;
        self.waiting.push_back((items, last));
        Ok(())
    }

    /// The next one, in the order in which they came.
    pub fn take(&mut self) -> Option<Part> {
        self.waiting.pop_front()
    }

    /// How many wait.
    pub fn waiting(&self) -> usize {
        self.waiting.len()
    }
}
