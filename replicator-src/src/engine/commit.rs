//! A batch that is assembled: its header, its delta made durable, its commit sent.

use std::collections::BTreeSet;
use std::time::Instant;

use replicator_common::id::{BatchId, BatchNonce, ObjectId};
use replicator_common::time::Timestamp;
use replicator_common::wire::{BatchHeader, FRAME_MAX, Op, PLAN_OPS_MAX, SourceMessage};

use super::build::Draft;
use super::{Engine, EngineError, Note, ended};
use crate::index::{Content, Delta, Mark, View};
use crate::ledger::{Claim, Flight, Gap, Reach};
use crate::plan::{Assembly, Dirty};
use crate::read::sink::SinkError;
use crate::session::Session;

/// Bytes of operations in one frame; an operation is shorter on the wire than
/// in memory, so the frame stays below its limit.
const PLAN_BYTES: usize = FRAME_MAX / 2;

/// A batch ready to be committed.
pub(super) struct Ready {
    pub(super) ops: Vec<Op>,
    pub(super) delta: Delta,
    pub(super) header: BatchHeader,
    pub(super) input: Dirty,
    pub(super) closed: Option<Gap>,
    pub(super) dropped: Vec<ObjectId>,
    /// How many of them count as deleted.
    pub(super) deletions: u64,
    /// Objects that are young from now on (see `window`).
    pub(super) born: Vec<ObjectId>,
    pub(super) progress: (u64, u64),
    pub(super) objects: u64,
    /// Every change before this moment was in the replica before it.
    pub(super) before: Timestamp,
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
        let before = self.reached;
        let (header, reached) = self.header(&draft, &assembly, closed.as_ref());
        let changed = replaced_content(&assembly.delta, draft.batch);
        self.spoil(&changed);
        self.halt.leaves(&draft, &assembly);
        let born = if draft.resolve.walking { Vec::new() } else { born_by(&assembly.ops) };
        for object in assembly.linked {
            self.members.add_linked(&object);
        }
        let Assembly { ops, delta, .. } = assembly;
        self.settle_forced(&ops);
        let dropped = dropped_by(&delta);
        let progress = progress_of(&delta, draft.resolve.equal);
        let objects = ops.iter().filter(|op| matches!(op, Op::Put { .. })).count() as u64;
        let (input, deletions) = (draft.input, draft.deletions);
        self.send_batch(Ready {
            ops,
            delta,
            header,
            input,
            closed,
            dropped,
            deletions,
            born,
            progress,
            objects,
            before,
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
            nonce: header.nonce,
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
        // What came to nothing was no change, of this source at least.
        let oldest = earlier(self.lost_since.take(), self.capture.taken(header.seq))
            .filter(|_| !ops.is_empty());
        self.shared.meters().shipped(ops.len(), oldest);
        let start = Instant::now();
        let subjects = self.touched.sent(&delta);
        let now = (Instant::now(), self.clock.now());
        let noted = self.halt.note(batch, ready.deletions, ready.born, now);
        self.index.prepare(delta, &noted)?;
        tracing::debug!(%batch, operations = ops.len(), took = ?start.elapsed(), "prepared");
        // From here on the destination may have it, whatever becomes of the
        // session: the next greeting must say so.
        self.shared.greeting_pending(mark.edition());
        self.totals = mark;
        self.claimed = self.claimed.max(header.watermark);
        self.next_batch = batch.next();
        let exact = header.exact.is_some();
        self.in_flight.push(Flight {
            mark,
            input,
            closed,
            dropped: dropped.into_iter().collect(),
            ops: header.ops,
            durable: false,
            before: ready.before,
            reached: ready.reached,
            note: Note { progress, committed_at: Instant::now(), oldest, exact, subjects },
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
        let floors = self.holds.values().map(|held| held.floor);
        let claim = Claim {
            span: draft.span,
            covered: self.covered,
            gap: self.gap.as_ref(),
            closed,
            proves: self.capture.proves(),
            waiting: floors.chain(self.owed.floor()).chain(self.orphan_floor(assembly)).min(),
        };
        let Reach { covered, reached, exact } = claim.reach();
        (self.covered, self.reached) = (covered, reached);
        // When the clock was set back, the claim stays until it has passed.
        let watermark = self.clock.wall(reached).max(self.claimed);
        let exact = exact.then(|| self.clock.wall(draft.span.time));
        let header = BatchHeader {
            nonce: BatchNonce::random(),
            seq: draft.span.seq,
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
        // What leaves was an orphan before, perhaps.
        let old = self.index.orphans().unwrap_or_default();
        let gone: BTreeSet<&ObjectId> = assembly
            .delta
            .orphans
            .iter()
            .filter(|(_, orphan)| orphan.is_none_or(|orphan| orphan.left))
            .map(|(object, _)| object)
            .collect();
        let old = old.iter().filter(|(object, _)| !gone.contains(object)).map(|(_, o)| *o);
        new.chain(old).filter(|orphan| !orphan.left).map(|orphan| orphan.floor).min()
    }
}

fn send_plan(
    session: &Session,
    batch: BatchId,
    mut ops: Vec<Op>,
    header: BatchHeader,
) -> Result<(), SinkError> {
    let commit = SourceMessage::Commit { batch, header };
    while !ops.is_empty() {
        let rest = ops.split_off(frame_of(&ops));
        let plan = SourceMessage::Plan { batch, ops };
        if rest.is_empty() {
            return session.send_together(&[&plan, &commit]);
        }
        session.send(&plan)?;
        ops = rest;
    }
    session.send(&commit)
}

/// How many of the operations go into one frame: few enough, and short enough
/// together (see [`PLAN_BYTES`]), but at least one.
fn frame_of(ops: &[Op]) -> usize {
    let mut bytes = 0;
    let fit = ops.iter().take(PLAN_OPS_MAX).take_while(|op| {
        bytes += op.weight();
        bytes <= PLAN_BYTES
    });
    fit.count().max(1)
}

/// Objects that come with the batch.
fn born_by(ops: &[Op]) -> Vec<ObjectId> {
    let born = ops.iter().filter_map(|op| match op {
        Op::Put { object, new: true, .. } => Some(object.clone()),
        _ => None,
    });
    born.collect()
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

/// The earlier of two moments that there may be.
pub(super) fn earlier(one: Option<Instant>, other: Option<Instant>) -> Option<Instant> {
    one.into_iter().chain(other).min()
}

#[cfg(test)]
mod tests {
    use super::*;
    use replicator_common::net::frame::{Compression, encode_frame};
    use replicator_common::object::{Attributes, Kind, ObjectState};
    use replicator_common::wire::ContentSource;

    #[test]
    fn a_plan_of_long_operations_is_cut_into_frames_that_can_be_sent() {
        let attributes =
            Attributes { mode: 0o777, uid: 0, gid: 0, mtime: Timestamp(0), xattrs: Vec::new() };
        let state = ObjectState { kind: Kind::Symlink, attributes, size: 4095, rdev: 0 };
        let link = |n: u32| Op::Put {
            object: ObjectId::new(1, &n.to_le_bytes()).unwrap(),
            state: state.clone(),
            content: ContentSource::Symlink { target: vec![b'x'; 4095] },
            new: true,
            links: 1,
        };
        let mut ops: Vec<Op> = (0..3 * PLAN_OPS_MAX as u32).map(link).collect();
        let (mut frames, mut sent) = (0, 0);
        while !ops.is_empty() {
            let rest = ops.split_off(frame_of(&ops));
            (frames, sent) = (frames + 1, sent + ops.len());
            let message = SourceMessage::Plan { batch: BatchId(1), ops };
            assert!(encode_frame(&message, Compression::Never).is_ok(), "frame {frames}");
            ops = rest;
        }
        assert_eq!(sent, 3 * PLAN_OPS_MAX);
        assert!(frames < 40, "{frames} frames for 49 MiB");
    }
}
