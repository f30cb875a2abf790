//! What a batch does to the replica.

use serde::{Deserialize, Serialize};

use super::Hash;
use crate::id::{BatchId, ObjectId, ReplicaHandle, TransferId};
use crate::name::Name;
use crate::object::ObjectState;

/// One operation of a plan. Operations say target states, so that applying one
/// twice is applying it once.
///
/// The order within a batch does not matter: the destination sorts them into
/// phases.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Op {
    /// The object's state becomes this. For an object that the replica does not
    /// have, it is created (and an entry op of the same batch attaches it).
    Put {
        /// The object.
        object: ObjectId,
        /// Its attributes, kind and size after the batch.
        state: ObjectState,
        /// Where its content comes from.
        content: ContentSource,
        /// The replica does not have it yet.
        new: bool,
        /// Entries the object has after the batch, as the source's index knows;
        /// more than one means hard links.
        links: u32,
    },
    /// The entry (`directory`, `name`) becomes `new`.
    ///
    /// `old == new` restates an entry that stays, so that the destination knows
    /// one living name of an object that lost another.
    Entry {
        /// The directory; the root of the source is [`SourceHello`](super::SourceHello)'s root id,
        /// sent as [`Op::Root`] once.
        directory: ObjectId,
        /// The name.
        name: Name,
        /// What the replica has there before the batch.
        old: Option<ObjectId>,
        /// What it has after.
        new: Option<ObjectId>,
    },
    /// The object has no entry after this batch and never will again: it is
    /// dead, or outside the source tree. Whatever a directory still holds here
    /// is removed with it, except what the same batch attaches elsewhere.
    Drop {
        /// The object.
        object: ObjectId,
    },
    /// The object has no entry after this batch but lives: it is being moved.
    /// Kept in the orphan area until a later batch attaches or drops it.
    Orphan {
        /// The object.
        object: ObjectId,
    },
    /// This id of the source is the replica's root directory.
    Root {
        /// The source root's id.
        object: ObjectId,
    },
    /// Reconciliation: the replica's own object `handle` from now on is `object`.
    Adopt {
        /// The source's object, or a foreign id (see [`ObjectId::foreign`]).
        object: ObjectId,
        /// The replica's object.
        handle: ReplicaHandle,
        /// Where it stands in the replica now.
        directory: ObjectId,
        /// Under which name.
        name: Name,
        /// Its kind.
        kind: crate::object::Kind,
    },
    /// Reconciliation: the foreign object is moved to lost+found, with its
    /// subtree. Its entry is removed by an entry op of the same batch.
    SetAside {
        /// A foreign id.
        object: ObjectId,
    },
    /// The object, a directory, has no entry after this batch and never will
    /// again, as with [`Op::Drop`]; but below it is more than one batch should
    /// drop. Later batches take it apart, out of everybody's sight. A failover
    /// before they are through moves what is left to lost+found.
    Leave {
        /// The object.
        object: ObjectId,
    },
}

impl Op {
    /// Bytes that it takes in memory, about.
    pub fn weight(&self) -> usize {
        size_of::<Self>()
            + match self {
                Self::Put { object, state, content, .. } => {
                    let target = match content {
                        ContentSource::Symlink { target } => target.len(),
                        ContentSource::Appended(appended) => appended.bytes.len(),
                        ContentSource::Unchanged
                        | ContentSource::Packed { .. }
                        | ContentSource::Transferred { .. } => 0,
                    };
                    object.as_bytes().len() + state.weight() + target
                }
                Self::Entry { directory, name, old, new } => {
                    let objects = [Some(directory), old.as_ref(), new.as_ref()];
                    let objects = objects.into_iter().flatten();
                    objects.map(|object| object.as_bytes().len()).sum::<usize>()
                        + name.as_bytes().len()
                }
                Self::Adopt { object, handle, directory, name, .. } => {
                    let objects = [object, handle, directory].map(|object| object.as_bytes().len());
                    objects.iter().sum::<usize>() + name.as_bytes().len()
                }
                Self::Drop { object }
                | Self::Orphan { object }
                | Self::Leave { object }
                | Self::Root { object }
                | Self::SetAside { object } => object.as_bytes().len(),
            }
    }
}

/// Where a [`Op::Put`] takes content from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ContentSource {
    /// Only attributes change (or the object has no content: a new directory,
    /// a device node).
    Unchanged,
    /// It arrived packed, with this version.
    Packed {
        /// [`PackedObject::version`](super::PackedObject::version).
        version: u32,
    },
    /// It arrived as a finished transfer.
    Transferred {
        /// The transfer.
        transfer: TransferId,
    },
    /// A symbolic link's target.
    Symlink {
        /// Target, 1 to 4095 bytes without NUL.
        #[serde(with = "serde_bytes")]
        target: Vec<u8>,
    },
    /// What was appended to a file that the replica has; what it had stays as it is.
    Appended(Appended),
}

/// The end of a file that grew.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Appended {
    /// The batch that gave the replica's file its content: another one does not end where
    /// these bytes begin.
    pub basis: BatchId,
    /// Of the bytes.
    pub hash: Hash,
    /// All of the file from there on, [`APPENDED_MAX`] at most; as many as the file is
    /// longer than before.
    #[serde(with = "serde_bytes")]
    pub bytes: Vec<u8>,
}

/// The most bytes that [`Appended`] carries: what is longer travels as a transfer. They
/// stand in the plan, and in the destination's log.
pub const APPENDED_MAX: u64 = 64 << 10;

/// The most bytes that all [`Appended`] of a batch carry together: less than what the
/// destination keeps free for steps that it has logged.
pub const APPENDED_BATCH_MAX: u64 = 1 << 20;
