//! Names that the replica's file system does not take: too long, or too many of
//! one file.
//!
//! INVARIANT (one file stops no other): a logged batch is applied whatever
//! happens, and a step that the disk refuses for good would stall the replica for
//! ever. So such names never get into a batch. They are held, named in status and
//! looked at again, and all else goes on without them.

use replicator_common::id::ObjectId;
use replicator_common::name::Name;

use super::{Failure, HoldReason, Place, PlaceSet, Tree, View, Work};
use crate::plan::Binding;

/// What names the replica's file system takes; `None` where no bound is known.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Limits {
    /// Names that a file may have at most.
    pub links: Option<u32>,
    /// Bytes that a name may have at most.
    pub name: Option<u32>,
}

impl Limits {
    /// Why the replica does not take a name, if so. Only renaming helps.
    pub fn too_long(&self, name: &Name) -> Option<String> {
        let most = self.name?;
        let long = name.as_bytes().len() > most as usize;
        long.then(|| {
            format!("the replica's file system takes names of {most} bytes at most; rename it")
        })
    }
}

impl<V: View, T: Tree> Work<'_, V, T> {
    pub(super) fn too_long(&self, name: &Name) -> Option<String> {
        self.settings.limits.too_long(name)
    }

    /// Takes names out of the batch of which a file would have too many. What a
    /// name taken out would have replaced stays, so that it may have too many in
    /// turn.
    pub(super) fn fit_links(&mut self) -> Result<(), Failure<V, T>> {
        let Some(most) = self.settings.limits.links else { return Ok(()) };
        let mut queue: Vec<ObjectId> = self.gained.keys().cloned().collect();
        while let Some(object) = queue.pop() {
            let surplus = self.surplus(&object, most as usize)?;
            let gained = self.gained.get(&object).into_iter().flat_map(PlaceSet::iter);
            let last: Vec<Place> = gained.rev().take(surplus).cloned().collect();
            for place in last {
                queue.extend(self.leave_out(&object, place, most)?);
            }
        }
        Ok(())
    }

    /// How many of the names that a file gains are too many for it, at any moment
    /// while the batch is applied: a name that goes makes room for one that comes
    /// when nothing comes to stand in its place, for then it goes first.
    fn surplus(&self, object: &ObjectId, most: usize) -> Result<usize, Failure<V, T>> {
        let gained = self.gained.get(object).map_or(0, PlaceSet::len);
        let before = self.known(object)?.map_or(0, |known| known.links as usize);
        if before + gained <= most || self.is_directory(object)? {
            return Ok(0);
        }
        let lost = self.lost.get(object);
        let free = lost
            .into_iter()
            .flat_map(PlaceSet::iter)
            .filter(|place| self.changed.get(*place).is_some_and(|binding| binding.new.is_none()));
        Ok((before + gained).saturating_sub(free.count()).saturating_sub(most).min(gained))
    }

    /// Holds a name that the batch would give. The object that keeps its own
    /// instead, if any.
    fn leave_out(
        &mut self,
        object: &ObjectId,
        place: Place,
        most: u32,
    ) -> Result<Option<ObjectId>, Failure<V, T>> {
        forget(self.gained.get_mut(object), &place);
        let error = format!(
            "the replica's file system takes {most} names of one file at most; remove some"
        );
        self.hold_entry(object, &place, HoldReason::Refused { error });
        let Some(Binding { old: Some(old), .. }) = self.changed.remove(&place) else {
            return Ok(None);
        };
        if !self.stays_under_held(&old)? {
            self.changed.insert(place, Binding { old: Some(old), new: None });
            return Ok(None);
        }
        forget(self.lost.get_mut(&old), &place);
        Ok(Some(old))
    }
}

fn forget(places: Option<&mut PlaceSet>, place: &Place) {
    if let Some(places) = places {
        places.remove(place);
    }
}
