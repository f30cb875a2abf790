//! Gaps: from the word that events were lost to the batch that closes the walk.

use std::time::Instant;

use replicator_common::id::ObjectId;

use super::{Engine, EngineError};
use crate::index::View;
use crate::ledger::{Closing, Gap};

impl Engine {
    /// From now on nothing that happened since `covered` is certain, until a
    /// walk has compared the whole tree.
    pub(super) fn open_gap(&mut self, reason: String) -> Result<(), EngineError> {
        tracing::info!(reason, "gap: the source must be walked");
        self.shared.count(|counters| counters.gaps += 1);
        let now = self.clock.now();
        if Gap::open(&mut self.gap, reason, self.covered, now) {
            self.start_walk()?;
        }
        Ok(())
    }

    pub(super) fn start_walk(&mut self) -> Result<(), EngineError> {
        self.last_walk = Instant::now();
        self.shared.count(|counters| counters.rescans += 1);
        self.shared.begin_progress();
        let again = self.gap.as_ref().is_some_and(|gap| gap.twice);
        self.capture.directories().begin_walk(again);
        let root = self.opener.root().id.clone();
        self.dirty.walk(root, self.orphans()?);
        Ok(())
    }

    /// Orphans that may come back, or may have to. What left is nobody's any
    /// more: it comes back as what is new does, and is read whole.
    pub(super) fn orphans(&self) -> Result<Vec<ObjectId>, EngineError> {
        let orphans = self.index.orphans()?.into_iter();
        Ok(orphans.filter(|(_, orphan)| !orphan.left).map(|(one, _)| one).collect())
    }

    /// The walk is through; one more batch closes the gap. (If those under way
    /// come back, what they were made of is walked again, and so is the gap open.)
    pub(super) fn walk_ended(&self) -> bool {
        self.gap.is_some() && self.astray.is_empty()
    }

    /// A walk that has seen everything closes its gap, unless events were lost
    /// again meanwhile, or may have gone unseen for want of a watch. Only the batch
    /// after the walk's end does: its barrier covers what moved from the unwalked to the walked part at the last
    /// moment (trap 11).
    pub(super) fn close_gap(&mut self, walked: bool) -> Result<Option<Gap>, EngineError> {
        let through = walked && self.dirty.is_empty() && self.astray.is_empty();
        if let Some(gap) = self.gap.as_mut().filter(|_| through)
            && self.capture.directories().found_unwatched()
        {
            gap.walk_twice();
        }
        match Gap::close(&mut self.gap, through, self.clock.now()) {
            Closing::No => Ok(None),
            Closing::Again => {
                let reason = self.gap.as_ref().map(|gap| &*gap.reason);
                tracing::info!(reason, "the walk ended, and another follows");
                self.start_walk()?;
                Ok(None)
            }
            Closing::Closed(gap) => {
                self.shared.end_progress();
                Ok(Some(gap))
            }
        }
    }
}
