//! What the destination knows of each object of the source.

use replicator_common::id::{BatchId, ObjectId, ReplicaHandle};
use replicator_common::name::Name;
use replicator_common::object::Kind;
use serde::{Deserialize, Serialize};

/// One row of the objects map: source object → replica object.
///
/// INVARIANT: the rows say how the replica is once every logged batch has been
/// applied. They change in the transaction that logs the batch, so that map and
/// log can never disagree; who needs the replica itself to be that far (the
/// basis of a transfer) asks for the applied position too.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Known {
    /// The replica's object; `None` when the replica could not make it (a
    /// device node without the right to), which status counts.
    pub handle: Option<ReplicaHandle>,
    /// What it is.
    pub kind: Kind,
    /// Where it stands.
    pub position: Position,
    /// Entries it has.
    pub links: u32,
    /// The batch that last changed its content.
    pub content: BatchId,
}

/// Where an object stands.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Position {
    /// It is the replica's root.
    Root,
    /// Under this entry; exact for directories and for files of one entry,
    /// one of several otherwise.
    Entry(Entry),
    /// In the orphan area; `was` is the last entry it had, where failover puts
    /// it back.
    Orphan {
        /// That entry; `None` for one that never had any, and for one that has
        /// left the source and is being taken apart.
        was: Option<Entry>,
    },
}

impl Position {
    /// The entry, for what has one.
    pub fn entry(&self) -> Option<&Entry> {
        match self {
            Self::Entry(entry) => Some(entry),
            Self::Root | Self::Orphan { .. } => None,
        }
    }
}

/// A directory of the source and a name in it.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Entry {
    /// The directory.
    pub directory: ObjectId,
    /// The name.
    pub name: Name,
}

/// Read access to the objects map.
pub trait Objects {
    /// Why a row could not be read.
    type Error;

    /// The row of an object.
    fn get(&self, object: &ObjectId) -> Result<Option<Known>, Self::Error>;
}

/// How deep a chain of parents may be before it is taken for a loop. Linux
/// bounds no depth, but a path this deep costs its maker as many `mkdirat`.
pub const DEPTH_MAX: usize = 1 << 20;

/// The names from the root down to `object`; `None` when the chain is broken
/// (an orphan above it, a row missing).
pub fn path_of<O: Objects>(objects: &O, object: &ObjectId) -> Result<Option<Vec<Name>>, O::Error> {
    let mut names = Vec::new();
    let mut at = object.clone();
    while names.len() < DEPTH_MAX {
        match objects.get(&at)?.map(|known| known.position) {
            Some(Position::Root) => {
                names.reverse();
                return Ok(Some(names));
            }
            Some(Position::Entry(entry)) => {
                names.push(entry.name);
                at = entry.directory;
            }
            Some(Position::Orphan { .. }) | None => return Ok(None),
        }
    }
    Ok(None)
}
