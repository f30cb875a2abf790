//! How a batch becomes durable.

use std::time::Instant;

use rustix::io::Errno;

use super::Applier;
use crate::apply::Step;
use crate::history::advance;
use crate::replica::Point;
use crate::seal::{SealError, needed_by};
use crate::session::WholeBatch;
use crate::store::Commit;

impl Applier {
    /// Makes a batch durable; returns the steps to run.
    pub(super) fn seal(&mut self, batch: &WholeBatch) -> Result<Vec<Step>, SealError> {
        let start = Instant::now();
        if self.astray {
            return Err(SealError::Sync(Errno::IO));
        }
        if self.doubt {
            // INVARIANT (the watermark tells the truth): also a heartbeat claims
            // that what was applied is there. The next session redoes it first.
            return Err(SealError::Sync(Errno::IO));
        }
        if self.owing {
            // A failover was asked for while they could not be run, and did not succeed.
            self.redo_once()?;
        }
        let next = advance(&self.standing, batch.batch, &batch.header).ok_or(SealError::Skipped)?;
        if batch.ops.is_empty() {
            // A heartbeat: nothing is staged, so nothing needs a sync. The
            // watermark is promised to others and must not be lost, hence the
            // durable write. That there is nothing of it to apply is noted with
            // it, unless a start would have steps to redo: until then it must
            // not tell what this claims (`replica::told_before_redo`).
            let mut next = next;
            if self.standing.applied == self.standing.committed && !self.uncovered {
                next.applied = next.committed;
            }
            self.replica.store.set_standing(&next)?;
            self.standing = next;
            return Ok(Vec::new());
        }
        if self.spoilt {
            return Err(SealError::Sync(Errno::IO));
        }
        let staged = self.stage_rest(batch)?;
        let mut planned = self.plan(batch, &staged)?;
        let steps = self.steps(batch, &mut planned)?;
        self.mark_next(next.edition())?;
        if self.replica.dies_at(Point::Staged) {
            return Err(SealError::Killed);
        }
        self.sync()?;
        if self.replica.dies_at(Point::Synced) {
            return Err(SealError::Killed);
        }
        let set_aside = self.set_aside_items(&planned);
        let mut standing = next;
        let commit = Commit {
            steps: &steps,
            rows: &planned.rows,
            set_aside: &set_aside,
            // The sync above covered everything applied before it.
            covered: self.standing.applied,
            marked: self.marked,
        };
        self.replica.store.commit(&mut standing, &commit)?;
        self.standing = standing;
        self.covered();
        self.uncovered = true;
        self.owing = true;
        self.needed = steps.iter().flat_map(needed_by).collect();
        tracing::debug!(batch = %batch.batch, took = ?start.elapsed(), "sealed");
        self.replica.meters.seal.record(start.elapsed());
        self.replica.meters.committed.increment(1);
        Ok(steps)
    }
}
