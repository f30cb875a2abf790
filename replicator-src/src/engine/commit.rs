//! A batch that is assembled: its header, its delta made durable, its commit sent.

use std::collections::BTreeSet;
use std::time::Instant;

use replicator_common::id::{BatchId, ObjectId};
use replicator_common::time::Timestamp;
use replicator_common::wire::{BatchHeader, Op, PLAN_OPS_MAX, SourceMessage};

use super::build::Draft;
use super::{Engine, EngineError, Gap, InFlight, ended};
use crate::index::{Content, Delta, Mark, View};
use crate::plan::{Assembly, Dirty};
use crate::read::sink::SinkError;
use crate::session::Session;

/// A batch ready to be committed.
pub(super) struct Ready {
    pub(super) ops: Vec<Op>,
    pub(super) delta: Delta,
    pub(super) header: BatchHeader,
    pub(super) input: Dirty,
    pub(super) closed: Option<Gap>,
    pub(super) dropped: Vec<ObjectId>,
    pub(super) progress: (u64, u64),
    pub(super) objects: u64,
    /// What was covered before it.
    pub(super) covered: Timestamp,
    /// Every change before this moment is in the replica after it.
    pub(super) reached: Timestamp,
}

impl Engine {
    pub(super) fn commit(
        &mut self,
        draft: Draft,
        assembly: Assembly,
        closed: Option<Gap>,
    ) -> Result<(), EngineError> {
        let covered = self.covered;
        let (header, reached) = self.header(&draft, &assembly, closed.as_ref());
        let changed = replaced_content(&assembly.delta, draft.batch);
        self.spoil(&changed);
        for object in assembly.linked {
            self.members.add_linked(object);
        }
        let Assembly { ops, delta, .. } = assembly;
        self.settle_forced(&ops);
        let dropped = dropped_by(&delta);
        let progress = progress_of(&delta, draft.resolve.equal);
        let objects = ops.iter().filter(|op| matches!(op, Op::Put { .. })).count() as u64;
        let input = draft.input;
        self.send_batch(Ready {
            ops,
            delta,
            header,
            input,
            closed,
            dropped,
            progress,
            objects,
            covered,
            reached,
        })
    }

    /// Makes a batch's delta durable, then commits it to the destination.
    ///
    /// INVARIANT (trap 5): the order of these two.
    pub(super) fn send_batch(&mut self, ready: Ready) -> Result<(), EngineError> {
        let Ready { ops, mut delta, header, input, closed, dropped, progress, .. } = ready;
        let batch = self.next_batch;
        let mark = Mark {
            batch,
            seq: header.seq,
            watermark: (header.watermark > Timestamp::NEVER).then_some(header.watermark),
            consistent: header.exact.or(self.totals.consistent),
            bytes_changed: self.totals.bytes_changed + header.bytes_changed,
            bytes_shipped: self.totals.bytes_shipped + header.bytes_shipped,
            objects_shipped: self.totals.objects_shipped + ready.objects,
            exact_batches: self.totals.exact_batches + u64::from(header.exact.is_some()),
        };
        delta.mark = mark;
        delta.dead_lists.append(&mut self.dead_lists);
        metrics::histogram!("replicator_source_batch_operations").record(ops.len() as f64);
        let start = Instant::now();
        let subjects = self.touched.sent(&delta);
        self.index.prepare(delta)?;
        tracing::debug!(%batch, operations = ops.len(), took = ?start.elapsed(), "prepared");
        // From here on the destination may have it, whatever becomes of the
        // session: the next greeting must say so.
        self.shared.greeting_pending(batch);
        self.totals = mark;
        self.claimed = self.claimed.max(header.watermark);
        self.next_batch = batch.next();
        self.in_flight.push_back(InFlight {
            mark,
            input,
            closed,
            dropped,
            progress,
            committed_at: Instant::now(),
            exact: header.exact.is_some(),
            durable: false,
            covered: ready.covered,
            reached: ready.reached,
            subjects,
        });
        let sent = match &self.session {
            Some(session) => send_plan(session, batch, ops, header),
            None => Err(SinkError::Closed),
        };
        if let Err(error) = sent {
            // The link tells of the end too; then the batch is settled.
            tracing::debug!(reason = ended(&error), "the session ended at commit");
        }
        Ok(())
    }

    /// What the batch says of itself, and the internal moment that it reaches.
    pub(super) fn header(
        &mut self,
        draft: &Draft,
        assembly: &Assembly,
        closed: Option<&Gap>,
    ) -> (BatchHeader, Timestamp) {
        let base = match (&self.gap, closed) {
            (Some(gap), _) => gap.floor,
            // Where only a walk proves anything, it proves it for the moment
            // at which it began.
            (None, Some(gap)) if !self.capture.proves() => gap.walk_started,
            (None, None) if !self.capture.proves() => self.covered,
            _ => draft.time,
        };
        self.covered = self.covered.max(base);
        let waiting = self.holds.values().map(|held| held.floor);
        let orphans = self.orphan_floor(assembly);
        let reached = waiting.chain(orphans).fold(base, Timestamp::min);
        // When the clock was set back, the claim stays until it has passed.
        let watermark = self.clock.wall(reached).max(self.claimed);
        let quiet = self.holds.is_empty() && assembly.orphans == 0 && self.gap.is_none();
        let exact =
            (draft.exact && quiet && self.capture.proves() && closed.is_none_or(|_| draft.exact))
                .then(|| self.clock.wall(draft.time));
        let header = BatchHeader {
            seq: draft.seq,
            watermark,
            exact,
            packed: draft.packed,
            ops: assembly.ops.len() as u64,
            complete: watermark > Timestamp::NEVER,
            bytes_changed: draft.fresh + packed_content(&assembly.delta, draft.batch),
            // Not of this batch alone: what travels for later ones, and what
            // was sent in vain, is counted when it is sent.
            bytes_shipped: self.shipped().saturating_sub(self.totals.bytes_shipped),
        };
        (header, reached)
    }

    /// Content bytes shipped since the configuration was made.
    pub(super) fn shipped(&self) -> u64 {
        let all = self.shipped_before + i128::from(self.wired.content());
        u64::try_from(all).unwrap_or(0)
    }

    /// Where orphans that are left hold the watermark.
    pub(super) fn orphan_floor(&self, assembly: &Assembly) -> Option<Timestamp> {
        if assembly.orphans == 0 {
            return None;
        }
        let new = assembly.delta.orphans.iter().filter_map(|(_, orphan)| *orphan);
        let old = self.index.orphans().unwrap_or_default();
        let gone: BTreeSet<&ObjectId> = assembly
            .delta
            .orphans
            .iter()
            .filter(|(_, orphan)| orphan.is_none())
            .map(|(object, _)| object)
            .collect();
        let old = old.iter().filter(|(object, _)| !gone.contains(object)).map(|(_, o)| *o);
        new.chain(old).map(|orphan| orphan.floor).min()
    }
}

fn send_plan(
    session: &Session,
    batch: BatchId,
    mut ops: Vec<Op>,
    header: BatchHeader,
) -> Result<(), SinkError> {
    while !ops.is_empty() {
        let rest = ops.split_off(ops.len().min(PLAN_OPS_MAX));
        session.send(&SourceMessage::Plan { batch, ops })?;
        ops = rest;
    }
    session.send(&SourceMessage::Commit { batch, header })
}

/// Objects that go with the batch.
pub(super) fn dropped_by(delta: &Delta) -> Vec<ObjectId> {
    let gone = delta.objects.iter().filter(|(_, known)| known.is_none());
    gone.map(|(object, _)| object.clone()).collect()
}

/// Objects whose content in the replica changes with the batch, or that go.
fn replaced_content(delta: &Delta, batch: BatchId) -> BTreeSet<ObjectId> {
    delta
        .objects
        .iter()
        .filter(|(_, known)| known.as_ref().is_none_or(|known| known.version == batch))
        .map(|(object, _)| object.clone())
        .collect()
}

/// Content bytes of the small files whose content changes with the batch.
fn packed_content(delta: &Delta, batch: BatchId) -> u64 {
    let fresh = delta.objects.iter().filter_map(|(_, known)| known.as_ref());
    fresh
        .filter(|known| known.version == batch && matches!(known.content, Content::Whole(_)))
        .map(|known| known.state.size)
        .sum()
}

fn progress_of(delta: &Delta, equal: (u64, u64)) -> (u64, u64) {
    let fresh = delta.objects.iter().filter_map(|(_, known)| known.as_ref());
    fresh.fold(equal, |(objects, bytes), known| {
        let size = if matches!(known.content, Content::None) { 0 } else { known.state.size };
        (objects + 1, bytes + size)
    })
}
