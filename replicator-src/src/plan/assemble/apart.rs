//! A directory ends, and below it is more than a batch should drop: what was
//! moved out of the source, or deleted while nothing watched. It leaves as a
//! whole, at once, and is taken apart batch by batch.
//!
//! INVARIANT (memory is bounded): of what lost its last entry, a batch drops at
//! most [`Settings::apart`] entries, however large the tree is that ended.
//!
//! INVARIANT (no state between batches is seen): a tree that left has no entry
//! from the batch on with which it does, and a failover puts it back nowhere.
//! That it is not whole any more is nobody's business.
//!
//! [`Settings::apart`]: super::Settings::apart

use std::collections::VecDeque;

use replicator_common::id::ObjectId;
use replicator_common::name::Name;
use replicator_common::object::Kind;
use replicator_common::wire::Op;

use super::detach::Lost;
use super::{Binding, Failure, Place, PlanError, Work};
use crate::index::{Orphan, View};
use crate::plan::below::{Below, Step, is_directory};
use crate::plan::tree::Tree;

impl<V: View, T: Tree> Work<'_, V, T> {
    /// An object has no entry left and never will have one: it is removed, or
    /// it leaves.
    pub(super) fn end(
        &mut self,
        object: &ObjectId,
        queue: &mut VecDeque<Lost>,
    ) -> Result<(), Failure<V, T>> {
        let room = self.settings.apart.saturating_sub(self.apart);
        let directory = self.view.kind(object).map_err(PlanError::Index)? == Some(Kind::Directory);
        // What is foreign is moved aside as a whole; what is in it is not followed.
        if directory && !object.is_foreign() {
            // What the batch takes away from there anyway costs no more for that.
            let others = |directory: &ObjectId, name: &Name| {
                !self.changed.contains_key(&(directory.clone(), name.clone()))
            };
            let below = Below::new(self.view, object.clone());
            let count = below.count(room + 1, others).map_err(PlanError::Index)?;
            if count > room {
                self.leave(object);
                return Ok(());
            }
            self.apart += count;
        }
        self.remove(object, queue)
    }

    fn leave(&mut self, object: &ObjectId) {
        let (since, floor) = (self.settings.now, self.settings.floor);
        let orphan = Orphan { since, floor, left: true };
        self.kept.insert(object.clone());
        self.out.delta.orphans.push((object.clone(), Some(orphan)));
        self.out.ops.push(Op::Leave { object: object.clone() });
        self.out.leaving.push(object.clone());
        self.out.left += 1;
    }

    /// Drops as much of a tree that left as the batch has room for, from the
    /// bottom up; at last the tree itself.
    pub(super) fn take_apart(&mut self, object: &ObjectId) -> Result<(), Failure<V, T>> {
        let mut below = Below::new(self.view, object.clone());
        // Entries that lead down to where the walk is.
        let mut way: Vec<(Place, ObjectId)> = Vec::new();
        while let Some(step) = below.step().map_err(PlanError::Index)? {
            let next = match step {
                Step::Entry { directory, name, object: child, known } => {
                    let place = (directory, name);
                    if self.changed.contains_key(&place) {
                        continue;
                    }
                    if is_directory(known.as_deref()) {
                        way.push((place, child.clone()));
                        below.enter(child);
                        continue;
                    }
                    (place, child)
                }
                Step::Through { .. } => match way.pop() {
                    Some(next) => next,
                    None => break,
                },
            };
            if self.apart >= self.settings.apart {
                self.out.left += 1;
                return Ok(());
            }
            self.cut(next)?;
        }
        self.out.delta.orphans.push((object.clone(), None));
        self.drop_apart(object.clone())
    }

    /// Takes an entry away; what has no other is dropped.
    fn cut(&mut self, (place, object): (Place, ObjectId)) -> Result<(), Failure<V, T>> {
        self.change(place, Binding { old: Some(object.clone()), new: None });
        self.apart += 1;
        self.drop_apart(object)
    }

    /// Drops what has no entry left. What was seen in it lately goes with it, as
    /// it came.
    fn drop_apart(&mut self, object: ObjectId) -> Result<(), Failure<V, T>> {
        if !self.is_detached(&object)? {
            return Ok(());
        }
        let mut queue = VecDeque::new();
        self.remove(&object, &mut queue)?;
        self.out.apart.insert(object);
        let along = self.end_taken_along(queue)?;
        self.out.apart.extend(along.into_iter().filter(|one| self.gone.contains(one)));
        Ok(())
    }
}
