//! Logged steps: run, done again after a crash, and covered by a later sync.

use std::sync::atomic::Ordering;
use std::time::Instant;

use replicator_common::id::BatchId;
use replicator_common::sys::place;
use rustix::io::Errno;

use super::{Applier, Ended, set_aside_item};
use crate::apply::Step;
use crate::apply::execute::{self, Finding};
use crate::mark::Reached;
use crate::meters::ErrorKind;
use crate::replica::{Point, disclaim};
use crate::seal::SealError;
use crate::stage::Stager;

impl Applier {
    /// Brings the replica to the state of the last logged batch. Tries until it
    /// works, since nothing else may happen before.
    pub(super) fn redo(&mut self) -> Result<(), Ended> {
        loop {
            match self.redo_once() {
                Ok(()) => {
                    self.replica.shared().stalled = None;
                    return Ok(());
                }
                Err(error) => self.wait_after(&error)?,
            }
        }
    }

    pub(super) fn redo_once(&mut self) -> Result<(), SealError> {
        let mut steps = Vec::new();
        let mut last = BatchId(0);
        self.replica.store.each_logged(|batch, part| {
            last = batch;
            steps.extend(part);
        })?;
        if !steps.is_empty() {
            self.owing = true;
            tracing::info!(steps = steps.len(), "redoing the last batch");
            self.tree.redoing(true);
            let result = self.run_steps(last, &steps);
            self.tree.redoing(false);
            result?;
            self.uncovered = true;
        }
        self.owing = false;
        self.doubt = false;
        self.applied()?;
        Ok(())
    }

    /// Runs the steps of `batch`, whose commit is durable. On a full disk, with
    /// the space that was kept for them.
    pub(super) fn run_steps(&mut self, batch: BatchId, steps: &[Step]) -> Result<(), SealError> {
        match self.try_steps(batch, steps) {
            Err(SealError::Area(error)) if error.is_no_room() && self.replica.slack.spend() => {
                tracing::warn!(%error, "the space that is kept for steps is used");
                self.try_steps(batch, steps)
            }
            result => result,
        }
    }

    pub(super) fn try_steps(&mut self, batch: BatchId, steps: &[Step]) -> Result<(), SealError> {
        if steps.is_empty() {
            return Ok(());
        }
        // Before the first step: what a later look finds changed is marked.
        self.mark(Reached::begun(batch))?;
        self.ran = Instant::now();
        let mut findings = Vec::new();
        self.tree.learn(steps);
        let result = execute::run(&mut self.tree, steps, &mut findings);
        // Closed here, so that what was removed is freed.
        self.tree.learn(&[]);
        self.note_findings(&findings)?;
        Ok(result?)
    }

    pub(super) fn note_findings(&mut self, findings: &[Finding]) -> Result<(), SealError> {
        let mut items = Vec::new();
        for finding in findings {
            items.extend(set_aside_item(finding));
            if matches!(finding, Finding::Lost { .. }) {
                // INVARIANT (the watermark tells the truth): before anybody is told
                // of the batch. Nothing is known of the replica until it is reconciled.
                disclaim(&mut self.standing);
                self.distrust = true;
            }
            let error = finding.to_string();
            tracing::error!(error, "the replica was changed by somebody else");
            self.replica.meters.error(ErrorKind::Foreign);
            self.note(error);
        }
        if !items.is_empty() {
            self.replica.store.note_set_aside(&items)?;
        }
        Ok(())
    }

    /// After the disk failed under the store: opens it again, and believes what
    /// is in it, as after a crash.
    pub(super) fn revive_store(&mut self) -> Result<(), SealError> {
        if !self.replica.store.has_failed() && !self.astray {
            return Ok(());
        }
        self.astray = true;
        self.replica.store.reopen()?;
        self.standing = self.replica.store.standing()?;
        self.redo_once()?;
        self.astray = false;
        self.replica.shared().stalled = None;
        tracing::info!(committed = %self.standing.committed, "the store can be used again");
        Ok(())
    }

    /// Lets a later sync cover what was applied, and forgets the record.
    pub(super) fn cover(&mut self) -> Result<(), SealError> {
        self.revive_store()?;
        if self.doubt || self.owing {
            self.redo_once()?;
        }
        if !self.uncovered {
            return Ok(());
        }
        self.sync()?;
        self.replica.store.forget(self.standing.applied, self.marked)?;
        self.covered();
        self.mark_through()
    }

    pub(super) fn covered(&mut self) {
        Stager::discard(&self.replica.area, &std::mem::take(&mut self.needed));
        self.uncovered = false;
    }

    pub(super) fn sync(&mut self) -> Result<(), SealError> {
        let start = Instant::now();
        let result = place::sync_file_system(self.replica.protection.root());
        tracing::debug!(took = ?start.elapsed(), "synced");
        self.replica.meters.sync.record(start.elapsed());
        let failed = self.replica.sync_failed.swap(false, Ordering::AcqRel);
        let failed = failed || self.replica.dies_at(Point::Sync);
        let result = if failed { Err(Errno::IO) } else { result };
        result.map_err(|error| {
            self.replica.meters.error(ErrorKind::Sync);
            self.doubt = true;
            self.spoilt = true;
            SealError::Sync(error)
        })
    }
}
