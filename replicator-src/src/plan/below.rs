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
/// Memory: a page of entries for each level, and no more than 65,536 entries and a
/// page in all.
pub struct Below<'a, V> {
    view: &'a V,
    way: Vec<Level>,
    kept: usize,
    /// See [`KEPT`].
    most: usize,
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
        let mut below = Self { view, way: Vec::new(), kept: 0, most: KEPT };
        below.enter(directory);
        below
    }

    /// Goes on below `directory`, and then where it was.
    pub fn enter(&mut self, directory: ObjectId) {
        if self.kept > self.most {
            for level in &mut self.way {
                level.forget();
            }
            self.kept = 0;
        }
        self.way.push(Level { directory, seen: None, page: Vec::new(), more: true });
    }

    /// The next step; `None` at the end.
    pub fn step(&mut self) -> Result<Option<Step>, V::Error> {
        self.step_among(&|_, _| true)
    }

    /// The next step, as if there were no entries but those `of` which that is true.
    fn step_among(
        &mut self,
        of: &impl Fn(&ObjectId, &Name) -> bool,
    ) -> Result<Option<Step>, V::Error> {
        let Some(level) = self.way.last_mut() else { return Ok(None) };
        self.kept += level.fill(self.view, of)?;
        let Some((name, object, known)) = level.page.pop() else {
            let level = self.way.pop();
            return Ok(level.map(|Level { directory, .. }| Step::Through { directory }));
        };
        self.kept -= 1;
        level.seen = Some(name.clone());
        let directory = level.directory.clone();
        Ok(Some(Step::Entry { directory, name, object, known: known.map(Box::new) }))
    }

    /// How many entries there are `of` which that is true, in directories that are
    /// reached by such, but not above `most`.
    pub fn count(
        mut self,
        most: usize,
        of: impl Fn(&ObjectId, &Name) -> bool,
    ) -> Result<usize, V::Error> {
        let mut count = 0;
        while let Some(step) = self.step_among(&of)? {
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
    fn fill<V: View>(
        &mut self,
        view: &V,
        of: &impl Fn(&ObjectId, &Name) -> bool,
    ) -> Result<usize, V::Error> {
        let mut from = self.seen.clone();
        let mut read = 0;
        while self.page.is_empty() && self.more {
            let mut page = view.page(&self.directory, from.as_ref())?;
            page.entries.retain(|(name, _)| of(&self.directory, name));
            self.more = page.through.is_some();
            self.page = with_objects(view, page.entries)?;
            read = self.page.len();
            // Batches under way may have emptied a page.
            from = page.through;
            if self.page.is_empty() {
                self.seen.clone_from(&from);
            }
        }
        Ok(read)
    }

    /// Has its entries read again when its turn comes.
    fn forget(&mut self) {
        self.more |= !self.page.is_empty();
        self.page = Vec::new();
    }
}

/// Looks the objects up in their order, mostly that of the index; gives the
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

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use proptest::prelude::*;
    use replicator_common::id::BatchId;
    use replicator_common::object::{Attributes, ObjectState};
    use replicator_common::time::Timestamp;
    use replicator_common::wire::Hash;

    use super::*;
    use crate::index::{Content, Orphan, Page};

    /// Entries by directory; pages of two, of which some are empty, as where
    /// batches under way removed what was there.
    #[derive(Default)]
    struct Pages(BTreeMap<ObjectId, BTreeMap<Name, ObjectId>>);

    fn id(n: u16) -> ObjectId {
        ObjectId::new(1, &n.to_be_bytes()).unwrap()
    }

    impl View for Pages {
        type Error = std::convert::Infallible;

        fn object(&self, object: &ObjectId) -> Result<Option<Known>, Self::Error> {
            let kind = if self.0.contains_key(object) { Kind::Directory } else { Kind::File };
            let attributes =
                Attributes { mode: 0o644, uid: 0, gid: 0, mtime: Timestamp(0), xattrs: Vec::new() };
            Ok(Some(Known {
                state: ObjectState { kind, attributes, size: 0, rdev: 0 },
                ctime: Timestamp(0),
                read_at: Timestamp(0),
                version: BatchId(1),
                content: Content::Whole(Hash::of(b"")),
                entry: None,
                links: 1,
                nlink: 1,
            }))
        }

        fn entry(&self, _: &ObjectId, _: &Name) -> Result<Option<ObjectId>, Self::Error> {
            unreachable!("a walk reads pages")
        }

        fn children(&self, _: &ObjectId) -> Result<Vec<(Name, ObjectId)>, Self::Error> {
            unreachable!("a walk reads pages")
        }

        fn page(&self, directory: &ObjectId, after: Option<&Name>) -> Result<Page, Self::Error> {
            let all = self.0.get(directory).into_iter().flatten();
            let mut rest = all.filter(|(name, _)| after.is_none_or(|after| *name > after));
            let entries: Vec<_> = rest.by_ref().take(2).collect();
            let through = rest.next().and(entries.last()).map(|(name, _)| (*name).clone());
            let there = entries.into_iter().filter(|(name, _)| name.as_bytes().len() != 3);
            let entries = there.map(|(name, object)| (name.clone(), object.clone())).collect();
            Ok(Page { entries, through })
        }

        fn links(&self, _: &ObjectId) -> Result<Vec<(ObjectId, Name)>, Self::Error> {
            unreachable!("a walk reads pages")
        }

        fn orphans(&self) -> Result<Vec<(ObjectId, Orphan)>, Self::Error> {
            Ok(Vec::new())
        }
    }

    proptest! {
        #[test]
        fn every_entry_is_come_to_once_however_little_is_kept(
            entries in prop::collection::vec((any::<u16>(), 0..1200u16), 0..40),
            most in 0..5usize,
        ) {
            let mut pages = Pages::default();
            let mut expected = BTreeSet::new();
            // Each hangs below one made before it, and may get others below it.
            for (n, (above, name)) in (1u16..).zip(entries) {
                let above = id(above % n);
                let name = Name::new(name.to_string().as_bytes()).unwrap();
                let gone = name.as_bytes().len() == 3;
                let held = pages.0.get(&above).is_some_and(|held| held.contains_key(&name));
                let reached = above == id(0) || expected.iter().any(|(_, _, one)| *one == above);
                if held || !reached {
                    continue;
                }
                pages.0.entry(above.clone()).or_default().insert(name.clone(), id(n));
                if !gone {
                    expected.insert((above, name, id(n)));
                }
            }
            let mut below = Below { most, ..Below::new(&pages, id(0)) };
            let (mut seen, mut through, mut inside) = (BTreeSet::new(), Vec::new(), vec![id(0)]);
            while let Some(step) = below.step().unwrap() {
                match step {
                    Step::Entry { directory, name, object, known } => {
                        prop_assert_eq!(Some(&directory), inside.last());
                        prop_assert!(seen.insert((directory, name, object.clone())), "twice");
                        if is_directory(known.as_deref()) {
                            inside.push(object.clone());
                            below.enter(object);
                        }
                    }
                    Step::Through { directory } => {
                        prop_assert_eq!(Some(directory.clone()), inside.pop());
                        through.push(directory);
                    }
                }
            }
            prop_assert!(inside.is_empty());
            prop_assert_eq!(&seen, &expected);
            let count = Below::new(&pages, id(0)).count(7, |_, _| true).unwrap();
            prop_assert_eq!(count, expected.len().min(7));
            // Without some, and what only those lead to.
            let of = |_: &ObjectId, name: &Name| !name.as_bytes()[0].is_multiple_of(3);
            let (mut reached, mut wanted, mut grown) = (BTreeSet::from([id(0)]), 0, true);
            while grown {
                let kept = expected.iter().filter(|(above, name, _)| {
                    reached.contains(above) && of(above, name)
                });
                let next: BTreeSet<_> = kept.clone().map(|(_, _, one)| one.clone()).collect();
                wanted = kept.count();
                grown = !next.is_subset(&reached);
                reached.extend(next);
            }
            let count = Below::new(&pages, id(0)).count(usize::MAX, of).unwrap();
            prop_assert_eq!(count, wanted);
        }
    }
}
