//! What could not be found where it was believed to be.
//!
//! Without the right to open by handle, names lead to objects, and names are
//! out of date while renames are still to be told of. What is not found is
//! neither gone nor as it was: it stays dirty, the watermark and the closing of
//! a gap wait for it, and it is looked for again with each batch.
//!
//! This ends. Before each further look, the places by which the index knows the
//! directory are looked at from the root down. Either they lead to it, or the
//! first that does not becomes dirty: then the directory loses that entry, and
//! is found at another or becomes an orphan. What is below an orphan needs no
//! look: whatever comes back from there is compared whole (trap 3, see
//! `Resolve::root`), and else it is outside.

use std::collections::{BTreeMap, BTreeSet};

use foldhash::{HashSet, HashSetExt};
use replicator_common::id::ObjectId;
use replicator_common::name::Name;

use super::PlanError;
use super::dirty::Dirty;
use super::tree::{Lookup, Tree};
use crate::index::View;
use crate::watcher::What;

type Failure<V, T> = PlanError<<V as View>::Error, <T as Tree>::Error>;

/// Objects with what may have changed of them, and their names.
type Objects = BTreeMap<ObjectId, (What, Vec<(ObjectId, Name)>)>;

/// Entries that lead down from the root, each with the object that it leads to.
pub type Way = Vec<((ObjectId, Name), ObjectId)>;

/// What is to be looked at again of what went `astray`.
///
/// INVARIANT: the caller does this for every batch. So what is left out here,
/// because a batch under way made its directory an orphan, is in the input of
/// that batch, and dirty again if that batch is lost.
pub fn recall<V: View, T: Tree>(
    astray: Dirty,
    root: &ObjectId,
    view: &V,
    tree: &mut T,
) -> Result<Dirty, Failure<V, T>> {
    let mut work = Work { view, tree, sought: HashSet::new(), found: Dirty::default() };
    let mut left = astray;
    let objects = work.names(&mut left)?;
    let listed = left.listings.iter().map(|listing| &listing.directory);
    let directories: BTreeSet<ObjectId> =
        left.directories().into_iter().chain(listed).cloned().collect();
    let mut nowhere = HashSet::new();
    for directory in directories {
        match way(view, root, &directory).map_err(PlanError::Index)? {
            Some(way) => work.seek(way)?,
            None => drop(nowhere.insert(directory)),
        }
    }
    left.entries.retain(|(directory, _), _| !nowhere.contains(directory));
    left.listings.retain(|listing| !nowhere.contains(&listing.directory));
    for (object, (what, links)) in objects {
        // Without a name in the source it is an orphan, below one, or gone.
        let below = links.iter().any(|(directory, _)| !nowhere.contains(directory));
        if below || object == *root {
            left.object(object, what);
        }
    }
    left.merge(work.found);
    Ok(left)
}

struct Work<'a, V, T> {
    view: &'a V,
    tree: &'a mut T,
    /// Directories whose places were looked at.
    sought: HashSet<ObjectId>,
    /// Entries that lead elsewhere.
    found: Dirty,
}

impl<V: View, T: Tree> Work<'_, V, T> {
    /// An object that was not found is looked for under each of its names.
    fn names(&self, left: &mut Dirty) -> Result<Objects, Failure<V, T>> {
        let mut objects = Objects::new();
        for (object, what) in std::mem::take(&mut left.objects) {
            let links = self.view.links(&object).map_err(PlanError::Index)?;
            for (directory, name) in links.clone() {
                left.entry(directory, name, what);
            }
            objects.insert(object, (what, links));
        }
        Ok(objects)
    }

    /// Looks at each place from the root down, by which the tree learns where
    /// the directories are. The first that leads elsewhere is dirty.
    fn seek(&mut self, way: Way) -> Result<(), Failure<V, T>> {
        for ((directory, name), object) in way {
            if !self.sought.insert(object.clone()) {
                continue;
            }
            match self.tree.lookup(&directory, &name).map_err(PlanError::Tree)? {
                Lookup::Found(seen) if seen.object == object => {}
                // That it cannot be looked at is what its own look-up then says.
                Lookup::Unreadable(_) => self.tree.suppose(&object, &directory, &name),
                _ => {
                    self.found.entry(directory, name, What::default());
                    break;
                }
            }
        }
        Ok(())
    }
}

/// The way to an object as the index knows it; `None` when none leads from the
/// root to it: it is an orphan, below one, or not known (and then all of it is
/// listed once it gets known).
pub fn way<V: View>(view: &V, root: &ObjectId, object: &ObjectId) -> Result<Option<Way>, V::Error> {
    let mut way = Way::new();
    let mut trail = HashSet::new();
    let mut at = object.clone();
    while at != *root {
        let known = view.object(&at)?;
        let Some(entry) = known.and_then(|known| known.entry) else { return Ok(None) };
        if !trail.insert(at.clone()) {
            return Ok(None);
        }
        let above = entry.0.clone();
        way.push((entry, at));
        at = above;
    }
    way.reverse();
    Ok(Some(way))
}
