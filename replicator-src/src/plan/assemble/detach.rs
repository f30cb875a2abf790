//! What loses its last entry: it is dead, on its way, or outside.

use std::collections::VecDeque;

use replicator_common::id::ObjectId;
use replicator_common::object::Kind;
use replicator_common::wire::Op;

use super::{Binding, Failure, Outcome, Place, PlanError, Work};
use crate::index::store::dead_list;
use crate::index::{Orphan, View};
use crate::plan::resolve::entries_of;
use crate::plan::tree::{Fate, Tree};

/// Who lost an entry because what it was in ended.
pub(super) struct Lost {
    object: ObjectId,
    /// The index had it there, so it was counted with what it was in.
    counted: bool,
}

impl<V: View, T: Tree> Work<'_, V, T> {
    /// Follows every object that lost an entry: what has none left is dead, on
    /// its way, or outside.
    pub(super) fn detach(&mut self) -> Result<(), Failure<V, T>> {
        let mut lost: Vec<ObjectId> = self.lost.keys().cloned().collect();
        // The order of index and objects map, whose neighbours are on one page.
        lost.sort_unstable();
        lost.append(&mut self.loose);
        let mut inside = VecDeque::new();
        for object in lost {
            if self.is_detached(&object)? && !self.keep_living(&object)? {
                self.end(&object, &mut inside)?;
            }
            while let Some(lost) = inside.pop_front() {
                if self.is_detached(&lost.object)? && !self.keep_living(&lost.object)? {
                    self.end_with(&lost, &mut inside)?;
                }
            }
        }
        Ok(())
    }

    /// Ends what lost its last entry with what it was in.
    fn end_with(&mut self, lost: &Lost, queue: &mut VecDeque<Lost>) -> Result<(), Failure<V, T>> {
        // One of its names may be elsewhere, and wait.
        if self.has_a_place(&lost.object) && self.keep_living(&lost.object)? {
            return Ok(());
        }
        match lost.counted {
            true => self.remove(&lost.object, queue),
            false => self.end(&lost.object, queue),
        }
    }

    /// What was taken along has no entry in the tree, or it would have been seen
    /// by now: nobody asks whether it lives. Gives what was removed.
    pub(super) fn end_taken_along(
        &mut self,
        mut queue: VecDeque<Lost>,
    ) -> Result<Vec<ObjectId>, Failure<V, T>> {
        let mut ended = Vec::new();
        while let Some(lost) = queue.pop_front() {
            if self.is_detached(&lost.object)? {
                self.end_with(&lost, &mut queue)?;
                ended.push(lost.object);
            }
        }
        Ok(ended)
    }

    /// Whether the object has no entry after the batch, and nothing was done
    /// about that yet.
    pub(super) fn is_detached(&self, object: &ObjectId) -> Result<bool, Failure<V, T>> {
        Ok(!self.is_decided(object) && self.links_after(object)?.is_empty())
    }

    /// INVARIANT: a batch names the end of an object once.
    fn is_decided(&self, object: &ObjectId) -> bool {
        self.gone.contains(object) || self.kept.contains(object)
    }

    /// Makes an orphan of an object without entries that is still alive; says
    /// whether it is.
    fn keep_living(&mut self, object: &ObjectId) -> Result<bool, Failure<V, T>> {
        if !self.is_known(object)? || self.was_found_gone(object) {
            return Ok(false);
        }
        if self.tree_fate(object)? != Fate::Alive {
            return Ok(false);
        }
        if self.is_directory(object)? {
            self.out.orphaned.push(object.clone());
        }
        let (since, floor) = (self.settings.now, self.settings.floor);
        let orphan = Orphan { since, floor, left: false };
        self.kept.insert(object.clone());
        self.out.delta.orphans.push((object.clone(), Some(orphan)));
        self.out.ops.push(Op::Orphan { object: object.clone() });
        self.out.orphans += 1;
        Ok(true)
    }

    /// Whether who was to read it found that it is no more: it does not come back,
    /// and need not be asked for again. Where names lead to objects that proves
    /// less.
    fn was_found_gone(&self, object: &ObjectId) -> bool {
        self.resolve.root.is_none() && matches!(self.outcomes.get(object), Some(Outcome::Gone))
    }

    fn tree_fate(&mut self, object: &ObjectId) -> Result<Fate, Failure<V, T>> {
        if object.is_foreign() {
            return Ok(Fate::Dead);
        }
        self.tree.fate(object).map_err(PlanError::Tree)
    }

    /// Drops an object; a directory's remaining entries go with it, and their
    /// objects are followed in turn.
    pub(super) fn remove(
        &mut self,
        object: &ObjectId,
        queue: &mut VecDeque<Lost>,
    ) -> Result<(), Failure<V, T>> {
        self.gone.insert(object.clone());
        let known = self.known(object)?;
        if let Some(known) = &known {
            self.out.delta.dead_lists.extend(dead_list(Some(known), None));
            self.out.delta.objects.push((object.clone(), None));
            self.out.ops.push(if object.is_foreign() {
                Op::SetAside { object: object.clone() }
            } else {
                Op::Drop { object: object.clone() }
            });
            if known.state.kind != Kind::Directory {
                return Ok(());
            }
        }
        // An object that the replica never had just does not come to be; an
        // entry of it elsewhere is dirty on its own account.
        for (name, child) in self.view.children(object).map_err(PlanError::Index)? {
            let place = (object.clone(), name);
            if self.changed.contains_key(&place) {
                continue;
            }
            self.change(place, Binding { old: Some(child.clone()), new: None });
            queue.push_back(Lost { object: child, counted: true });
        }
        // Entries that were seen in it before it went away lead nowhere now.
        let inside: Vec<(Place, ObjectId)> = entries_of(&self.changed, object)
            .filter_map(|(place, binding)| Some((place.clone(), binding.new.clone()?)))
            .collect();
        for (place, new) in inside {
            self.unbind(place, &new);
            queue.push_back(Lost { object: new, counted: false });
        }
        Ok(())
    }

    /// Orphans of earlier batches: attached now, dead, outside, or still waiting.
    pub(super) fn settle_orphans(&mut self) -> Result<(), Failure<V, T>> {
        let mut queue = VecDeque::new();
        let mut left = Vec::new();
        for (object, orphan) in self.view.orphans().map_err(PlanError::Index)? {
            let attached = self.gained.get(&object).is_some_and(|places| !places.is_empty());
            if attached || self.gone.contains(&object) {
                self.out.delta.orphans.push((object, None));
                continue;
            }
            if self.kept.contains(&object) {
                continue;
            }
            if orphan.left {
                left.push(object);
                continue;
            }
            let outside = self.settings.outside_before.is_some_and(|moment| orphan.since < moment)
                && !self.has_a_place(&object);
            if outside || self.tree_fate(&object)? == Fate::Dead {
                self.end(&object, &mut queue)?;
                if self.gone.contains(&object) {
                    self.out.delta.orphans.push((object.clone(), None));
                }
            } else {
                self.out.orphans += 1;
            }
        }
        self.end_taken_along(queue)?;
        // With the room that is left.
        for object in left {
            self.take_apart(&object)?;
        }
        Ok(())
    }
}
