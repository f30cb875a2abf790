//! From one process to the next without a walk (see [`crate::handover`]).

use replicator_common::id::{BatchId, ObjectId};

use super::{Engine, EngineError, reconcile};
use crate::handover::{Carried, MOST, Rest};
use crate::index::{IndexError, Store};
use crate::journal::Record;
use crate::plan::Dirty;

impl Engine {
    /// Goes on where the process before ended.
    pub(super) fn resume(&mut self, mut carried: Carried) -> Result<(), EngineError> {
        tracing::info!(carried = carried.len(), "the watch went on meanwhile: no walk is needed");
        self.unsettled = !self.index.store().pending()?.is_empty();
        self.dirty = carried.dirty();
        self.skipped = carried.skipped.into_iter().collect();
        Ok(())
    }

    /// Ends capturing; gives what the next process needs to go on here, or says
    /// in the log why it must walk.
    pub(super) fn leave(mut self) -> Result<Option<Rest>, EngineError> {
        let result = self.carry();
        let Self { capture, journal, index, members, clock, .. } = self;
        let left = capture.finish();
        // The end of the journal, which is known by it also when all that was
        // before is trimmed. (The capture thread, which alone appends, has ended.)
        let seq = journal.append(&[Record::Barrier { time: clock.now() }])?;
        // After capturing has ended: what it read must be on disk before anybody
        // is told that the queue holds the rest.
        journal.flush()?;
        // Likewise: it adds to them.
        let linked = members.linked(MOST);
        let reason = match (result?, left) {
            (Err(reason), _) => reason,
            (_, None) => "its watcher cannot be taken over",
            (Ok(mut carried), Some(left)) if linked.is_some() => {
                carried.recent = left.recent;
                carried.linked = linked.unwrap_or_default();
                let batch = newest(index.store())?;
                return Ok(Some(Rest { queue: left.queue, carried, seq, batch }));
            }
            _ => "too many files have names outside the source",
        };
        tracing::info!(reason, "the next start must walk the source");
        Ok(None)
    }

    /// What neither journal nor index tells; else why that is not enough.
    fn carry(&mut self) -> Result<Result<Carried, &'static str>, EngineError> {
        if let Err(reason) = self.is_certain()? {
            return Ok(Err(reason));
        }
        let skipped = std::mem::take(&mut self.skipped).into_iter().collect();
        let mut carried = Carried { skipped, ..Carried::default() };
        carried.set_dirty(self.all_dirty());
        Ok(if carried.len() > MOST { Err("too much is under way") } else { Ok(carried) })
    }

    /// Everything that is not in the replica for certain, as far as the journal
    /// does not tell it.
    fn all_dirty(&mut self) -> Dirty {
        let held: Vec<ObjectId> = self.holds.keys().cloned().collect();
        held.iter().for_each(|object| self.redo_hold(object));
        let mut dirty = std::mem::take(&mut self.dirty);
        dirty.merge(std::mem::take(&mut self.astray));
        // Their records may have been trimmed with earlier batches, and held.
        for batch in self.in_flight.iter() {
            dirty.merge(batch.input.clone());
        }
        dirty
    }

    /// Whether all that happened until now was seen, and is in the replica, the
    /// journal, the index or memory; else why not.
    fn is_certain(&self) -> Result<Result<(), &'static str>, EngineError> {
        // A gap that a batch under way closes is open until it is acknowledged.
        let closing = self.in_flight.iter().any(|batch| batch.closed.is_some());
        let reconciling =
            self.reconcile.as_ref().is_some_and(|state| !reconcile::Reconcile::is_complete(state));
        Ok(if self.gap.is_some() || closing {
            Err("a walk is under way")
        } else if reconciling || self.index.store().reconciling()? {
            Err("a reconciliation is under way")
        } else if self.failing.is_some() {
            Err("a failover is under way")
        } else if !self.capture.proves() {
            Err("its watcher does not see all changes")
        } else if !self.opener.root().by_handle() {
            Err("objects are found by name")
        } else if !self.root_known()? || self.totals.watermark.is_none() {
            Err("the initial sync is not through")
        } else {
            Ok(())
        })
    }
}

/// The last batch that the index was made durable for, acknowledged or not.
pub(crate) fn newest(store: &Store) -> Result<BatchId, IndexError> {
    let pending = store.pending()?.last().map(|delta| delta.mark.batch);
    Ok(store.mark()?.batch.max(pending.unwrap_or(BatchId(0))))
}
