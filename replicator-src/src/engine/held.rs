//! What waits, as plain data.

use std::time::{Duration, Instant};

use replicator_common::id::{BatchId, ObjectId, TransferId};
use replicator_common::time::Timestamp;

use super::tails::{Placing, Tail};
use crate::index::Known;
use crate::plan::Hold;
use crate::read::tail::Carried;

/// A hold with its history.
pub(super) struct Held {
    pub(super) hold: Hold,
    /// Every change of it before this is in the replica.
    pub(super) floor: Timestamp,
    /// Since when it waits.
    pub(super) since: Timestamp,
    /// When to act on it.
    pub(super) due: Instant,
    pub(super) transfer: Transfer,
    /// An event of its content came after the transfer began: change times
    /// alone do not tell (trap 6: effects come before their event).
    pub(super) touched: bool,
    /// The destination refused to build it from a basis: it is sent whole.
    pub(super) whole: bool,
    /// Its transfer uses what the destination kept of one before.
    pub(super) reuses: bool,
    /// Of a file that may just have grown.
    pub(super) tail: Option<Tail>,
    /// The replica has the file, of which something else waits.
    pub(super) known: bool,
}

/// How far a held large file's transfer is.
pub(super) enum Transfer {
    /// Waits for its turn.
    Waiting,
    /// Is being read and sent.
    Running { number: TransferId, basis: Option<ObjectId> },
    /// Was handed to the network; once it has arrived, the next batch places it.
    /// (A batch that places it sooner would wait for it, and all that is small
    /// with the batch; a short tail goes with the batch itself.)
    Ready {
        number: TransferId,
        arrived: bool,
        basis: Option<(ObjectId, BatchId)>,
        done: Box<ReadyFile>,
        took: Duration,
    },
}

impl Held {
    /// An event may have been of its content.
    pub(super) fn touch(&mut self, touched: bool) {
        self.touched |= touched;
        if let Some(tail) = self.tail.as_mut().filter(|_| touched) {
            tail.touch();
        }
    }
}

impl Transfer {
    /// Whether content is still on its way.
    pub(super) fn is_under_way(&self) -> bool {
        matches!(self, Self::Running { .. } | Self::Ready { arrived: false, .. })
    }

    /// Whether it is complete at the destination.
    pub(super) fn has_arrived(&self) -> bool {
        matches!(self, Self::Ready { arrived: true, .. })
    }

    /// Its number, once it has begun.
    pub(super) fn number(&self) -> Option<TransferId> {
        match self {
            Self::Waiting => None,
            Self::Running { number, .. } | Self::Ready { number, .. } => Some(*number),
        }
    }
}

/// A large file whose content is at the destination.
pub(super) struct ReadyFile {
    pub(super) known: Known,
    /// Content bytes that the replica's version did not have.
    pub(super) fresh: u64,
    pub(super) started: Timestamp,
    pub(super) moving: bool,
    /// Its chunk list, if it is a new one.
    pub(super) list: Option<u64>,
    /// Only what was appended is at the destination, beside what it had.
    pub(super) tail: Option<Placing>,
}

impl ReadyFile {
    /// What was appended, where nothing was sent of it yet.
    pub(super) fn carried(&self) -> Option<&Carried> {
        self.tail.as_ref()?.carried.as_ref()
    }
}
