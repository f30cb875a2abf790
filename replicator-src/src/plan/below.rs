//! Walks through what the index has below a directory, however much it is.

use replicator_common::id::ObjectId;
use replicator_common::name::Name;
use replicator_common::object::Kind;

use crate::index::{Known, View};

/// Entries that are kept for later, of all levels together, about: those of the
/// levels above are read once more when their turn comes.
const KEPT: usize = 65_536;

/// What a walk comes to.
#[derive(Debug, PartialEq, Eq)]
pub enum Step {
    /// An entry.
    Entry {
        /// Its directory.
        directory: ObjectId,
        /// Its name.
        name: Name,
        /// What it leads to.
        object: ObjectId,
        /// What the index knows of that.
        known: Option<Box<Known>>,
    },
    /// All of a directory was seen.
    Through {
        /// The directory.
        directory: ObjectId,
    },
}

/// A walk, depth first. Who walks says which directories are entered.
///
/// Memory: a page of entries for each level, and no more than [`KEPT`] and a
/// page in all.
pub struct Below<'a, V> {
    view: &'a V,
    way: Vec<Level>,
    kept: usize,
}

type Row = (Name, ObjectId, Option<Known>);

/// A directory on the way down.
struct Level {
    directory: ObjectId,
    /// Entries up to here were seen.
    seen: Option<Name>,
    /// Those after it, last first.
    page: Vec<Row>,
    /// There may be more after the page.
    more: bool,
}

impl<'a, V: View> Below<'a, V> {
    /// Of what is below `directory`.
    pub fn new(view: &'a V, directory: ObjectId) -> Self {
        let mut below = Self { view, way: Vec::new(), kept: 0 };
        below.enter(directory);
        below
    }

    /// Goes on below `directory`, and then where it was.
    pub fn enter(&mut self, directory: ObjectId) {
        if self.kept > KEPT {
            for level in &mut self.way {
                level.forget();
            }
            self.kept = 0;
        }
        self.way.push(Level { directory, seen: None, page: Vec::new(), more: true });
    }

    /// The next step; `None` at the end.
    pub fn step(&mut self) -> Result<Option<Step>, V::Error> {
        let Some(level) = self.way.last_mut() else { return Ok(None) };
        self.kept += level.fill(self.view)?;
        let Some((name, object, known)) = level.page.pop() else {
            let level = self.way.pop();
            return Ok(level.map(|Level { directory, .. }| Step::Through { directory }));
        };
        self.kept -= 1;
        level.seen = Some(name.clone());
        let directory = level.directory.clone();
        Ok(Some(Step::Entry { directory, name, object, known: known.map(Box::new) }))
    }

    /// How many entries there are, but not above `most`.
    pub fn count(mut self, most: usize) -> Result<usize, V::Error> {
        let mut count = 0;
        while let Some(step) = self.step()? {
            let Step::Entry { object, known, .. } = step else { continue };
            count += 1;
            if count == most {
                break;
            }
            if is_directory(known.as_deref()) {
                self.enter(object);
            }
        }
        Ok(count)
    }
}

impl Level {
    /// Reads the next entries if none are left; says how many it read.
    fn fill<V: View>(&mut self, view: &V) -> Result<usize, V::Error> {
        let mut from = self.seen.clone();
        while self.page.is_empty() && self.more {
            let page = view.page(&self.directory, from.as_ref())?;
            self.more = page.through.is_some();
            self.page = with_objects(view, page.entries)?;
            // Batches under way may have emptied a page.
            from = page.through;
            if self.page.is_empty() {
                self.seen.clone_from(&from);
            }
        }
        Ok(self.page.len())
    }

    /// Has its entries read again when its turn comes.
    fn forget(&mut self) {
        self.more |= !self.page.is_empty();
        self.page = Vec::new();
    }
}

/// Looks the objects up in their order, which is that of the index; gives the
/// entries last first.
fn with_objects<V: View>(view: &V, entries: Vec<(Name, ObjectId)>) -> Result<Vec<Row>, V::Error> {
    let mut objects: Vec<ObjectId> = entries.iter().map(|(_, object)| object.clone()).collect();
    objects.sort_unstable();
    objects.dedup();
    let known = view.objects(&objects)?;
    let entries = entries.into_iter().rev().map(|(name, object)| {
        let at = objects.binary_search(&object).ok();
        let known = at.and_then(|at| known[at].clone());
        (name, object, known)
    });
    Ok(entries.collect())
}

/// Whether the index knows it as a directory.
pub fn is_directory(known: Option<&Known>) -> bool {
    known.is_some_and(|known| known.state.kind == Kind::Directory)
}
