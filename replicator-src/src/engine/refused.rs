//! What the destination has no place for now: its disk is full, the file is
//! larger than it can hold. Such objects are held like what cannot be read, and
//! tried again at growing intervals; all else goes on without them.

use std::time::{Duration, Instant};

use replicator_common::id::{BatchId, ObjectId, TransferId};
use replicator_common::wire::SourceMessage;

use super::held::Transfer;
use super::{Engine, EngineError};
use crate::index::View;
use crate::meters::ErrorKind;
use crate::plan::Outcome;

/// First and longest pause before an object is tried again.
const PAUSE: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(30));
/// Objects that may wait for their next try at a time: beyond that nothing is
/// shipped, so that a full disk costs the journal and not memory.
const MOST: usize = 4096;
/// Bytes of the destination's words that are kept of each.
const CAUSE_MAX: usize = 512;

/// An object that found no place.
pub(super) struct Refused {
    /// What the destination said.
    pub(super) cause: String,
    /// When it is tried again.
    pub(super) due: Instant,
    pause: Duration,
}

impl Engine {
    /// Whether so many objects wait that nothing more is shipped for now.
    pub(super) fn too_many_refused(&self) -> bool {
        let now = Instant::now();
        self.refused.len() >= MOST && self.refused.values().all(|one| one.due > now)
    }

    /// Notes that an object found no place; says when it is tried again.
    fn note_refused(&mut self, object: ObjectId, mut cause: String) -> Instant {
        cause.truncate(cause.floor_char_boundary(CAUSE_MAX));
        let last = self.refused.get(&object).map(|one| one.pause);
        let pause = last.map_or(PAUSE.0, |last| (last * 2).min(PAUSE.1));
        let due = Instant::now() + pause;
        let path = self.path_of_held(&object);
        self.shared.noted(format!("{path}: the destination {cause}"));
        self.refused.insert(object, Refused { cause, due, pause });
        due
    }

    /// What comes of an object that is not to be tried again yet.
    pub(super) fn still_refused(&self, object: &ObjectId) -> Option<Outcome> {
        let one = self.refused.get(object).filter(|one| one.due > Instant::now())?;
        Some(Outcome::Refused { error: one.cause.clone() })
    }

    /// A batch was applied: what is not held any more has found its place.
    pub(super) fn forget_refused(&mut self) {
        let now = Instant::now();
        let holds = &self.holds;
        self.refused.retain(|object, one| one.due > now || holds.contains_key(object));
    }

    /// The destination gave a batch back, and all that follow it; it may (see
    /// [`crate::ledger::Flights::may_return`]).
    ///
    /// INVARIANT (bounded resources): only what the replica was to have is
    /// noted, however many names the destination makes up.
    pub(super) fn returned(
        &mut self,
        batch: BatchId,
        objects: Vec<(ObjectId, String)>,
        last: bool,
    ) -> Result<(), EngineError> {
        tracing::warn!(%batch, objects = objects.len(), "the destination has no place for some of it");
        self.shared.meters().error(ErrorKind::NoPlace);
        for (object, cause) in objects {
            // (Not what a batch behind it drops: nobody tries that again.)
            if self.index.object(&object)?.is_some() {
                self.note_refused(object, cause);
            }
        }
        if !last {
            return Ok(());
        }
        // All before it were acknowledged.
        self.settle(BatchId(batch.0.saturating_sub(1)))?;
        self.next_batch = batch;
        if let Some(session) = &self.session {
            // An error says that the session has ended; then nothing is left of
            // the batch anyway.
            let _ = session.send(&SourceMessage::Abandon { batch });
        }
        Ok(())
    }

    /// The destination has no place for a large file.
    pub(super) fn transfer_unplaced(&mut self, number: TransferId, cause: &str) {
        tracing::warn!(%number, cause, "the destination has no place for a large file");
        self.shared.meters().error(ErrorKind::NoPlace);
        if let Some(session) = &self.session {
            // Nobody would keep what is still to come.
            session.sink.cancel(number.0);
        }
        self.running.remove(&number);
        let held = self.holds.iter().find(|(_, held)| held.transfer.number() == Some(number));
        let Some(object) = held.map(|(object, _)| object.clone()) else { return };
        let due = self.note_refused(object.clone(), cause.to_owned());
        if let Some(held) = self.holds.get_mut(&object) {
            let transfer = std::mem::replace(&mut held.transfer, Transfer::Waiting);
            held.due = due;
            held.tail = None;
            self.discard(transfer);
        }
    }

    /// The path of an object that may be held, or known, or neither.
    fn path_of_held(&self, object: &ObjectId) -> String {
        match self.holds.get(object).and_then(|held| held.hold.entries.first()) {
            Some((directory, name)) => self.path_of_entry(directory, name),
            None => self.path_of(object),
        }
    }
}
