//! Applying a batch: a plan made of steps that can be redone from the start at
//! any time.
//!
//! [`plan`] turns a batch's operations into [`Step`]s (pure); [`execute`] runs
//! them against a [`ReplicaTree`], which is the file system
//! ([`crate::tree::Tree`]) or, in tests, a naive model that crashes at will.
//!
//! Why redo is safe (trap 8): every step names the handle of the object it
//! moves or removes, and looks for it before it acts. A step whose object is
//! not where it starts from was done before, or is undone by nothing. Handles
//! are never reused, so a name that came later is never mistaken for one that
//! was to go.

pub(crate) mod arrivals;
mod departures;
pub mod execute;
#[cfg(test)]
mod model;
pub mod plan;
mod rows;
mod slots;
#[cfg(test)]
mod tests;

use replicator_common::id::{ObjectId, ReplicaHandle};
use replicator_common::name::Name;
use replicator_common::object::ObjectState;
use replicator_common::time::Timestamp;
use serde::{Deserialize, Serialize};

/// A directory of the replica's file system, in the replica or in one of our
/// own areas.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Within {
    /// A directory of the replica.
    Replica(ReplicaHandle),
    /// `staging/N`: one directory a staging worker, so that they do not wait
    /// for each other's directory lock.
    Staging(u8),
    /// `orphans`.
    Orphans,
    /// The visible lost+found directory in the replica's root.
    LostAndFound,
    /// A directory of this name in `staging/N`, see [`crate::nest`].
    Nest(u8, Name),
}

/// A name in a directory.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Place {
    /// The directory.
    pub within: Within,
    /// The name.
    pub name: Name,
}

impl Place {
    /// A place in the orphan area.
    pub fn orphan(object: &ObjectId) -> Self {
        Self { within: Within::Orphans, name: area_name(object, "") }
    }

    /// Where an object waits within one batch, between its old and new place.
    pub fn moving(object: &ObjectId) -> Self {
        Self { within: Within::Orphans, name: area_name(object, ".moving") }
    }

    /// A place in lost+found.
    pub fn lost(object: &ObjectId) -> Self {
        Self { within: Within::LostAndFound, name: area_name(object, "") }
    }

    /// Bytes of memory beside itself, about.
    pub fn weight(&self) -> usize {
        let within = match &self.within {
            Within::Nest(_, name) => name.as_bytes().len(),
            _ => 0,
        };
        within + self.name.as_bytes().len()
    }

    /// Whether the place is in the directory that stands at `nest`.
    pub fn is_in(&self, nest: &Self) -> bool {
        match (&self.within, &nest.within) {
            (Within::Nest(shard, name), Within::Staging(staging)) => {
                (shard, name) == (staging, &nest.name)
            }
            _ => false,
        }
    }

    /// Whether the place is in one of our own areas, where nobody else puts things.
    pub fn is_private(&self) -> bool {
        !matches!(self.within, Within::Replica(_))
    }
}

/// An object's name in our own areas: at most 247 bytes with its suffix.
pub fn area_name(object: &ObjectId, suffix: &str) -> Name {
    let text = format!("{}{suffix}", object.to_file_name());
    Name::new(text.as_bytes()).unwrap_or_else(|_| unreachable!("hexadecimal digits, under 255"))
}

/// One step. Done twice it has the effect of once; see the module.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Step {
    /// `object` goes from one place to another. What may stand at `to` and be
    /// replaced is `over` alone (never a directory).
    Move {
        /// The replica's object that moves.
        object: ReplicaHandle,
        /// Where it is before.
        from: Place,
        /// Where it is after.
        to: Place,
        /// What it replaces, atomically for readers.
        over: Option<ReplicaHandle>,
    },
    /// `object` gets one more name. Replacing goes through `spare`, since
    /// `link(2)` cannot replace.
    Link {
        /// The replica's object.
        object: ReplicaHandle,
        /// Its new name.
        to: Place,
        /// What it replaces there.
        over: Option<ReplicaHandle>,
        /// A private place for the link that is renamed over `over`.
        spare: Place,
    },
    /// The name goes, if it still is a name of `object` (not a directory).
    Unlink {
        /// The replica's object.
        object: ReplicaHandle,
        /// The name.
        at: Place,
    },
    /// The directory goes; what is unexpectedly in it goes to lost+found.
    RemoveDirectory {
        /// The replica's directory.
        object: ReplicaHandle,
        /// Its name.
        at: Place,
    },
    /// The object's content is rewritten in place from a staged file.
    Rewrite {
        /// The replica's file.
        object: ReplicaHandle,
        /// The staged file, which stays until a later sync covers this step.
        from: Place,
    },
    /// The object's content is patched in place. Holds literal bytes only, so
    /// that doing it again gives the same.
    Patch {
        /// The replica's file.
        object: ReplicaHandle,
        /// Staged literal bytes.
        literals: Place,
        /// Staged list of what goes where, see [`crate::patch`].
        list: Place,
        /// The file's size after.
        size: u64,
    },
    /// The object's attributes become these.
    Attributes {
        /// The replica's object.
        object: ReplicaHandle,
        /// Kind and attributes.
        state: ObjectState,
    },
    /// A directory's time becomes what it was before the batch, of which the
    /// source knows nothing (a file in it was replaced by rename).
    Mtime {
        /// The replica's directory.
        object: ReplicaHandle,
        /// The time.
        mtime: Timestamp,
    },
    /// Does nothing: says where an object stood before the batch, for an
    /// applier that has to find objects by path.
    Hint {
        /// The replica's object.
        object: ReplicaHandle,
        /// Its place.
        at: Place,
    },
    /// The file becomes what it was up to `at`, and then these bytes, with which it ends.
    Append {
        /// The replica's file.
        object: ReplicaHandle,
        /// Where in it they begin.
        at: u64,
        /// The bytes.
        #[serde(with = "serde_bytes")]
        bytes: Vec<u8>,
    },
}

/// What came of a call that may meet another state than expected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Done.
    Done,
    /// The object or a directory of the place is not there.
    Missing,
    /// The target place is taken.
    Occupied,
    /// The directory is not empty.
    NotEmpty,
}

/// The replica's file system, as far as applying needs it.
pub trait ReplicaTree {
    /// What went wrong beyond the expected: an I/O error. The batch is redone later.
    type Error;

    /// What stands at a place; `None` too when its directory is gone.
    fn lookup(&mut self, place: &Place) -> Result<Option<ReplicaHandle>, Self::Error>;
    /// Renames. Without `replace`, only to a free place.
    fn rename(&mut self, from: &Place, to: &Place, replace: bool) -> Result<Outcome, Self::Error>;
    /// Gives an object one more name at a free place.
    fn link(&mut self, object: &ReplicaHandle, to: &Place) -> Result<Outcome, Self::Error>;
    /// Removes a name of what is not a directory.
    fn unlink(&mut self, at: &Place) -> Result<Outcome, Self::Error>;
    /// Removes an empty directory.
    fn remove_directory(&mut self, at: &Place) -> Result<Outcome, Self::Error>;
    /// The names in a directory of the replica.
    fn list(&mut self, directory: &ReplicaHandle) -> Result<Vec<Name>, Self::Error>;
    /// [`Step::Rewrite`].
    fn rewrite(&mut self, object: &ReplicaHandle, from: &Place) -> Result<Outcome, Self::Error>;
    /// [`Step::Patch`].
    fn patch(
        &mut self,
        object: &ReplicaHandle,
        literals: &Place,
        list: &Place,
        size: u64,
    ) -> Result<Outcome, Self::Error>;
    /// [`Step::Append`].
    fn append(
        &mut self,
        object: &ReplicaHandle,
        at: u64,
        bytes: &[u8],
    ) -> Result<Outcome, Self::Error>;
    /// [`Step::Attributes`]. What the file system cannot hold is counted, not an error.
    fn set_attributes(
        &mut self,
        object: &ReplicaHandle,
        state: &ObjectState,
    ) -> Result<Outcome, Self::Error>;
    /// [`Step::Mtime`].
    fn set_mtime(
        &mut self,
        object: &ReplicaHandle,
        mtime: Timestamp,
    ) -> Result<Outcome, Self::Error>;
}
