//! When the applier writes the mark in the replica itself (see [`crate::mark`]): before
//! the steps of a batch, when all of the next is staged, and when nothing follows.

use replicator_common::id::{BatchId, Edition};

use super::Applier;
use crate::area::AreaError;
use crate::mark::{self, Mark, Reached};
use crate::seal::SealError;

impl Applier {
    pub(super) fn mark(&mut self, reached: Reached) -> Result<(), SealError> {
        self.write_mark(reached, None)?;
        self.marked = Some(reached);
        Ok(())
    }

    /// Notes in the replica that all of a batch is staged there.
    ///
    /// INVARIANT (`mark`): after all else that the sync before its commit covers.
    pub(super) fn mark_next(&mut self, next: Edition) -> Result<(), SealError> {
        let reached = match self.marked {
            Some(reached) => reached,
            // By a process before this one.
            None => mark::read(self.replica.area.hidden())
                .map_err(AreaError::system("read", "the mark"))?
                .filter(|mark| mark.incarnation == self.standing.incarnation)
                .map_or(Reached::begun(BatchId(0)), |mark| mark.reached),
        };
        match self.write_mark(reached, Some(next)) {
            Err(SealError::Area(error)) if error.is_no_room() && self.replica.slack.spend() => {
                self.write_mark(reached, Some(next))
            }
            result => result,
        }
    }

    fn write_mark(&self, reached: Reached, next: Option<Edition>) -> Result<(), SealError> {
        let mark = Mark { incarnation: self.standing.incarnation, reached, next };
        mark::write(self.replica.area.hidden(), &mark)
            .map_err(|error| AreaError::system("write", "the mark")(error).into())
    }

    /// Nothing follows the last batch for now: the mark says that it is through.
    pub(super) fn mark_through(&mut self) -> Result<(), SealError> {
        let Some(Reached { batch, through: false }) = self.marked else { return Ok(()) };
        self.mark(Reached::through(batch))?;
        // INVARIANT (`mark`): the store hears of it only after a sync that did not fail.
        self.sync().inspect_err(|_| self.marked = Some(Reached::begun(batch)))?;
        self.replica.store.forget(self.standing.applied, self.marked)?;
        Ok(())
    }
}
