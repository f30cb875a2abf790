//! What is dirty: journal records merged, so that a thing that changed a
//! thousand times is looked at once.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;

use replicator_common::id::ObjectId;
use replicator_common::name::Name;

use crate::journal::Record;
use crate::watcher::What;

/// A directory whose entries are all dirty.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listing {
    /// The directory.
    pub directory: ObjectId,
    /// Its known subdirectories too, and every object in it is compared with
    /// the index: a rescan. Otherwise only what the index does not know is
    /// descended into.
    pub deep: bool,
    /// Names that are still to be looked at, where a batch was full before the
    /// directory was through; `None` when it was not read yet.
    pub rest: Option<Rest>,
}

/// The last of a directory's names.
///
/// Memory: the names are there once for all copies (what is dirty, what each
/// batch under way was made from), however large the directory is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rest {
    names: Arc<[Name]>,
    from: usize,
    stage: Stage,
}

/// What is to be done with the names.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Stage {
    /// Each is looked at by itself.
    Each,
    /// They are the source's, to be compared with those that the index has after
    /// this one; most will turn out to be equal (see [`super::survey`]).
    Compare(Option<Name>),
}

impl Rest {
    /// All of them, to be looked at one by one.
    pub fn all(names: Vec<Name>) -> Self {
        Self { names: names.into(), from: 0, stage: Stage::Each }
    }

    /// All that the source has, to be compared with the index.
    pub fn to_compare(names: Vec<Name>) -> Self {
        Self { names: names.into(), from: 0, stage: Stage::Compare(None) }
    }

    /// Without the first `count`, those up to `name`, which were compared.
    pub fn compared(&self, count: usize, name: Name) -> Self {
        Self { stage: Stage::Compare(Some(name)), ..self.after(count) }
    }

    /// The name up to which the names were compared with the index.
    pub fn compared_to(&self) -> Option<&Name> {
        match &self.stage {
            Stage::Each => None,
            Stage::Compare(name) => name.as_ref(),
        }
    }

    /// Whether each of the names is to be looked at, and none beside them.
    pub fn is_each(&self) -> bool {
        self.stage == Stage::Each
    }

    /// The names.
    pub fn names(&self) -> &[Name] {
        self.names.get(self.from..).unwrap_or_default()
    }

    /// Without the first `count`.
    pub fn after(&self, count: usize) -> Self {
        Self { names: self.names.clone(), from: self.from + count, stage: self.stage.clone() }
    }
}

impl Listing {
    /// A directory that was not read yet.
    pub fn new(directory: ObjectId, deep: bool) -> Self {
        Self { directory, deep, rest: None }
    }
}

/// A set of dirty entries, objects and directories.
#[derive(Clone, Debug, Default)]
pub struct Dirty {
    /// Entries to look at, with what may have changed of the object there.
    pub entries: BTreeMap<(ObjectId, Name), What>,
    /// Objects to look at.
    pub objects: BTreeMap<ObjectId, What>,
    /// Directories to list; worked from the front.
    pub listings: VecDeque<Listing>,
}

impl Dirty {
    /// Whether nothing is dirty.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty() && self.objects.is_empty() && self.listings.is_empty()
    }

    /// Entries and objects, for bounds.
    pub fn len(&self) -> usize {
        self.entries.len() + self.objects.len()
    }

    /// Merges a journal record. Gaps and barriers concern the engine.
    pub fn absorb(&mut self, record: &Record) {
        match record {
            Record::Entry { directory, name } => {
                self.entry(directory.clone(), name.clone(), What::default());
            }
            Record::Named { directory, name, what } => {
                self.entry(directory.clone(), name.clone(), *what);
            }
            Record::Object { object, what } => self.object(object.clone(), *what),
            Record::Gap { .. } | Record::Barrier { .. } => {}
        }
    }

    /// Marks an entry.
    pub fn entry(&mut self, directory: ObjectId, name: Name, what: What) {
        join(self.entries.entry((directory, name)).or_default(), what);
    }

    /// Marks an object.
    pub fn object(&mut self, object: ObjectId, what: What) {
        join(self.objects.entry(object).or_default(), what);
    }

    /// Marks a directory to be listed, unless it is marked so already.
    pub fn listing(&mut self, listing: Listing) {
        if !self.listings.contains(&listing) {
            self.listings.push_back(listing);
        }
    }

    /// Marks all that `other` marks.
    pub fn merge(&mut self, other: Self) {
        for ((directory, name), what) in other.entries {
            self.entry(directory, name, what);
        }
        for (object, what) in other.objects {
            self.object(object, what);
        }
        self.listings.extend(other.listings);
    }

    /// Directories that entries lie in.
    pub fn directories(&self) -> BTreeSet<&ObjectId> {
        self.entries.keys().map(|(directory, _)| directory).collect()
    }
}

/// Both, together.
pub fn join(into: &mut What, what: What) {
    into.content |= what.content;
    into.attributes |= what.attributes;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn copies_of_a_large_directory_share_its_names() {
        let names: Vec<_> = ["a", "b", "c"].map(|n| Name::new(n.as_bytes()).unwrap()).into();
        let all = Rest::all(names.clone());
        let directory = ObjectId::new(1, &[1]).unwrap();
        let mut dirty = Dirty::default();
        let rest = Some(all.after(1));
        dirty.listings.push_back(Listing { directory, deep: false, rest });
        let copy = dirty.clone();
        let rest = copy.listings[0].rest.as_ref().unwrap();
        assert_eq!(rest.names(), &names[1..]);
        assert!(std::ptr::eq(&rest.names()[0], &all.names()[1]), "copied name by name");
        assert!(rest.after(2).names().is_empty() && rest.after(9).names().is_empty());
    }
}
