//! Files that take another's name before their content is whole.
//!
//! Who writes a new version beside the old one and renames it over the old one never
//! shows half of it. What is written may have been seen, and replicated, while it
//! was short: then the replica has the file already, and its name alone would put the
//! beginning of the new version in the place of the old one, for as long as
//! the rest travels.

use std::collections::BTreeMap;

use foldhash::HashMap;
use replicator_common::id::ObjectId;

use super::{Binding, Failure, HoldReason, Outcome, Place, PlanError, Work};
use crate::index::View;
use crate::plan::tree::Tree;
use crate::plan::waits::brings_content;

/// A file that waits for its content.
pub(super) struct Waiting {
    reason: HoldReason,
    /// Under the names that it has: it gets no others that are free.
    stays: bool,
}

impl<V: View, T: Tree> Work<'_, V, T> {
    /// Finds the files that take no other's name until their content is there.
    ///
    /// INVARIANT (trap 10): where a file of the replica gives way to another, the other
    /// one's content is as it was when it was read, and not still on its way. But for
    /// files that would lose all of their names in the replica by waiting: their old
    /// names are others' by now, as where a log is rotated or two files change
    /// places. And but for names under which one file is replaced by the next before it
    /// has travelled: there the watermark would wait for ever.
    pub(super) fn find_waiting(&self) -> Result<BTreeMap<ObjectId, Waiting>, Failure<V, T>> {
        let mut waiting = BTreeMap::new();
        for (object, reason) in self.travelling() {
            if self.is_known(object)? {
                waiting.insert(object.clone(), Waiting { reason, stays: true });
            }
        }
        if waiting.is_empty() {
            return Ok(waiting);
        }
        for (place, Binding { old, new }) in &self.resolve.bindings {
            if let Some(new) = new
                && (old.is_none() || self.resolve.overtaken.contains(place))
                && let Some(waiting) = waiting.get_mut(new)
            {
                waiting.stays = false;
            }
        }
        // Who cannot wait takes a name, under which another may have waited.
        loop {
            let before = waiting.len();
            for object in waiting.keys().cloned().collect::<Vec<_>>() {
                if waiting[&object].stays && !self.keeps_a_name(&object, &waiting)? {
                    waiting.remove(&object);
                }
            }
            if waiting.len() == before {
                return Ok(waiting);
            }
        }
    }

    /// For whom an entry waits, and why.
    pub(super) fn waits<'b>(
        &self,
        (place, binding): (&Place, &Binding),
        waiting: &'b BTreeMap<ObjectId, Waiting>,
    ) -> Result<Option<(&'b ObjectId, &'b HoldReason)>, Failure<V, T>> {
        let find = |it: &Option<ObjectId>| waiting.get_key_value(it.as_ref()?);
        let Some(old) = &binding.old else { return Ok(None) };
        let one = match binding.new {
            None => find(&binding.old).filter(|(_, waiting)| waiting.stays),
            Some(_) if self.resolve.overtaken.contains(place) => None,
            Some(_) if self.stays_under_held(old)? => find(&binding.new),
            Some(_) => None,
        };
        Ok(one.map(|(object, waiting)| (object, &waiting.reason)))
    }

    /// Whether a name of it waited before this batch, and still does: it is somewhere.
    pub(super) fn has_a_place(&self, object: &ObjectId) -> bool {
        self.resolve.named.contains(object) && self.still_waits(object)
    }

    /// Whether its content waited before this batch, and still does. What is not where
    /// names led to may be gone, as those names are.
    fn still_waits(&self, object: &ObjectId) -> bool {
        self.resolve.under_way.contains_key(object)
            && !brings_content(object, self.resolve, self.outcomes)
            && self.outcomes.get(object) != Some(&Outcome::Away)
    }

    /// Objects whose content is still to come after this batch, and why.
    fn travelling(&self) -> HashMap<&ObjectId, HoldReason> {
        let earlier = self.resolve.under_way.iter().filter(|(object, _)| self.still_waits(object));
        let mut travelling: HashMap<_, _> =
            earlier.map(|(object, reason)| (object, reason.clone())).collect();
        travelling.extend(self.outcomes.iter().filter_map(|(object, outcome)| {
            let wanted = self.resolve.asked.wants_content(object);
            let reason = match outcome {
                Outcome::Large { size } => HoldReason::Large { size: *size },
                Outcome::Unreadable { error } if wanted => {
                    HoldReason::Unreadable { error: error.clone() }
                }
                Outcome::Refused { error } if wanted => {
                    HoldReason::Refused { error: error.clone() }
                }
                _ => return None,
            };
            Some((object, reason))
        }));
        travelling
    }

    /// Whether one of the names that the object has in the replica is free for it: in
    /// a directory that stays where it is, and nothing else gets it with this batch.
    fn keeps_a_name(
        &self,
        object: &ObjectId,
        waiting: &BTreeMap<ObjectId, Waiting>,
    ) -> Result<bool, Failure<V, T>> {
        for place in self.links_before(object)? {
            let taken = match self.resolve.bindings.get(&place) {
                Some(binding) => match &binding.new {
                    Some(new) if new != object => {
                        !self.is_held(new, &place)?
                            && self.waits((&place, binding), waiting)?.is_none()
                    }
                    _ => false,
                },
                None => false,
            };
            if !taken && !self.leaves(&place.0)? {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Whether a directory is moved or removed by this batch.
    fn leaves(&self, directory: &ObjectId) -> Result<bool, Failure<V, T>> {
        let known = self.view.object(directory).map_err(PlanError::Index)?;
        let Some(at) = known.and_then(|known| known.entry) else { return Ok(false) };
        let binding = self.resolve.bindings.get(&at);
        Ok(binding.is_some_and(|binding| binding.new.as_ref() != Some(directory)))
    }
}
