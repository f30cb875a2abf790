//! What the destination still has of the session before: nothing of it is sent
//! again.
//!
//! No batch is built before the destination has said what there is. Small files
//! are compared by the readers as they are read. For a large one the chunks are
//! asked for when its transfer is due, and the transfer begins with the answer.
//! What is of no use is released once everything that was under way has been
//! looked at again.
//!
//! Memory: a hash for each of at most 32,768 small files, and 44 bytes a chunk
//! of as many large files as are under way.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;

use replicator_common::id::ObjectId;
use replicator_common::time::Timestamp;
use replicator_common::wire::kept::{KEPT_CHUNKS_MAX, KEPT_PACKED_MAX, KEPT_TRANSFERS_MAX};
use replicator_common::wire::{KeptChunk, KeptObject, SourceMessage};

use super::Engine;
use super::held::{Held, Transfer};
use crate::plan::HoldReason;
use crate::read::kept::{KeptList, KeptObjects};

/// After so many batches of a session nothing of the one before is used any
/// more, however much changes meanwhile.
const BATCHES: u32 = 256;
/// Batches after which all that used something is acknowledged: more than can
/// be under way.
const UNDER_WAY: u32 = 8;

/// What a session's destination has of the one before.
#[derive(Default)]
pub(crate) struct Kept {
    /// The destination has said all of it.
    told: bool,
    /// Small files, as far as they were not sent again.
    packed: Arc<KeptObjects>,
    large: BTreeMap<ObjectId, Offer>,
    /// Batches acknowledged in this session.
    batches: u32,
    /// Small files may be there that were not released.
    unreleased: bool,
}

/// Of one large file.
enum Offer {
    /// There is something.
    Told,
    /// Its chunks were asked for; these came so far.
    Asked(Vec<KeptChunk>),
    /// These are all.
    Answered(Arc<KeptList>),
}

impl Kept {
    /// The destination names what it has. What goes beyond the limits is the
    /// destination's mistake, and passed over; so is what it says after the end.
    ///
    /// INVARIANT (bounded resources): no more than the limits of
    /// [`replicator_common::wire::kept`] is noted, whatever it says.
    pub(crate) fn tell(&mut self, packed: Vec<KeptObject>, large: Vec<ObjectId>, last: bool) {
        if self.told {
            return;
        }
        self.unreleased |= !packed.is_empty();
        self.packed.extend(packed, KEPT_PACKED_MAX);
        for object in large {
            if self.large.len() < KEPT_TRANSFERS_MAX {
                self.large.entry(object).or_insert(Offer::Told);
            }
        }
        self.told = last;
    }

    /// The transfer of a large file is due: whether its chunks are to be asked
    /// for now.
    pub(crate) fn ask(&mut self, object: &ObjectId) -> bool {
        let Some(offer @ Offer::Told) = self.large.get_mut(object) else { return false };
        *offer = Offer::Asked(Vec::new());
        true
    }

    /// Some of the chunks that were asked for. What was not asked for, and what
    /// goes beyond the limit, is passed over.
    pub(crate) fn answer(
        &mut self,
        object: &ObjectId,
        was: (u64, Timestamp),
        chunks: Vec<KeptChunk>,
        last: bool,
    ) {
        let Some(offer) = self.large.get_mut(object) else { return };
        let Offer::Asked(have) = offer else { return };
        if have.len() + chunks.len() <= KEPT_CHUNKS_MAX {
            have.extend(chunks);
        }
        if last {
            let list = KeptList::new(was, std::mem::take(have));
            *offer = Offer::Answered(Arc::new(list));
        }
    }

    /// Whether a batch may be built.
    pub(crate) fn is_told(&self) -> bool {
        self.told
    }

    /// For the readers.
    pub(crate) fn packed(&self) -> &Arc<KeptObjects> {
        &self.packed
    }

    /// Large files whose chunks were asked for and that have not begun.
    pub(crate) fn asked(&self) -> usize {
        self.large.values().filter(|offer| !matches!(offer, Offer::Told)).count()
    }

    /// Whether the answer to what was asked has come.
    pub(crate) fn is_answered(&self, object: &ObjectId) -> bool {
        matches!(self.large.get(object), Some(Offer::Answered(_)))
    }

    /// Whether the answer to what was asked has not come.
    pub(crate) fn is_awaited(&self, object: &ObjectId) -> bool {
        matches!(self.large.get(object), Some(Offer::Asked(_)))
    }

    /// The chunks of a file whose transfer begins.
    pub(crate) fn begin(&mut self, object: &ObjectId) -> Option<Arc<KeptList>> {
        match self.large.remove(object)? {
            Offer::Answered(list) => Some(list).filter(|list| !list.is_empty()),
            Offer::Told | Offer::Asked(_) => None,
        }
    }

    /// A transfer came to nothing before it began: what there is of it is there
    /// still. (Else the answer to the next question is that there is nothing.)
    pub(crate) fn put_back(&mut self, object: ObjectId) {
        self.large.entry(object).or_insert(Offer::Told);
    }

    /// Small files, large ones, and chunks of these, for tests.
    pub(crate) fn size(&self) -> (usize, usize, usize) {
        let chunks = self.large.values().map(|offer| match offer {
            Offer::Told => 0,
            Offer::Asked(chunks) => chunks.len(),
            Offer::Answered(list) => list.len(),
        });
        (self.packed.len(), self.large.len(), chunks.sum())
    }

    /// A batch was acknowledged.
    pub(super) fn acknowledged(&mut self) {
        self.batches = self.batches.saturating_add(1);
        if self.batches == BATCHES {
            self.packed.clear();
        }
    }
}

impl Engine {
    /// Asks for the chunks of a large file whose transfer is due, if there are
    /// any: whether it has to wait for the answer.
    pub(super) fn ask_kept(&mut self, object: &ObjectId) -> bool {
        if self.kept.ask(object) {
            let message = SourceMessage::AskKept { object: object.clone() };
            // An error says that the session is gone, and all of this with it.
            let _ = self.session.as_ref().map(|session| session.send(&message));
        }
        self.kept.is_awaited(object)
    }

    /// A large file whose chunks were asked for and have come. Lists of what
    /// waits no more are let go.
    pub(super) fn answered(&mut self, now: Instant) -> Option<ObjectId> {
        let waits = |held: &Held| {
            matches!(held.hold.reason, HoldReason::Large { .. })
                && matches!(held.transfer, Transfer::Waiting)
        };
        let mut found = None;
        for (object, offer) in &mut self.kept.large {
            match (&offer, self.holds.get(object).filter(|held| waits(held))) {
                (Offer::Told | Offer::Asked(_), _) => {}
                (Offer::Answered(_), None) => *offer = Offer::Told,
                (Offer::Answered(_), Some(held)) if held.due <= now => {
                    found.get_or_insert_with(|| object.clone());
                }
                (Offer::Answered(_), Some(_)) => {}
            }
        }
        found
    }

    /// Tells the destination what of it will not be used: all that was under
    /// way has been looked at again, so what is left is of what changed.
    ///
    /// INVARIANT: nothing is released that a batch under way was said to use:
    /// either none is, or none of those that are has used anything.
    pub(super) fn release_kept(&mut self) {
        let Some(session) = &self.session else { return };
        let nothing = !self.kept.unreleased && self.kept.large.is_empty();
        if !self.kept.told || nothing {
            return;
        }
        let quiet = self.dirty.is_empty()
            && self.astray.is_empty()
            && self.in_flight.is_empty()
            && self.cursor >= self.journal.last();
        if self.gap.is_some() || !(quiet || self.kept.batches >= BATCHES + UNDER_WAY) {
            return;
        }
        let transfers: Vec<_> =
            self.kept.large.keys().filter(|one| !self.holds.contains_key(*one)).cloned().collect();
        let packed = std::mem::take(&mut self.kept.unreleased);
        if packed || !transfers.is_empty() {
            for object in &transfers {
                self.kept.large.remove(object);
            }
            self.kept.packed.clear();
            // As in `ask_kept`.
            let _ = session.send(&SourceMessage::Release { packed, transfers });
        }
    }
}
