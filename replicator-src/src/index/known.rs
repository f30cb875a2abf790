//! What the index knows, as plain data.

use replicator_common::id::{BatchId, BatchNonce, Edition, ObjectId, Seq};
use replicator_common::name::Name;
use replicator_common::object::ObjectState;
use replicator_common::time::Timestamp;
use replicator_common::wire::Hash;
use serde::{Deserialize, Serialize};

/// An object as the replica holds it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Known {
    /// State as shipped.
    pub state: ObjectState,
    /// The source's change time when the object was read.
    pub ctime: Timestamp,
    /// When that reading began. A change time close to it leaves a doubt: see
    /// [`Known::doubtful`].
    pub read_at: Timestamp,
    /// The batch that last changed its content in the replica.
    pub version: BatchId,
    /// Its content as shipped.
    pub content: Content,
    /// One of its entries; the only one for directories. `None` for the root
    /// and for orphans.
    pub entry: Option<(ObjectId, Name)>,
    /// Entries it has in the replica.
    pub links: u32,
    /// Names it has on the source, in the tree or not.
    pub nlink: u32,
}

/// How close the change time and the time of reading may be before equality of
/// change times proves nothing: a write sets the change time first, copies
/// then, and queues its event last, and clocks of older kernels tick every
/// 4 ms. Two seconds are ample for both.
pub const DOUBT_NANOS: i64 = 2_000_000_000;

impl Known {
    /// Whether content may differ although change time and size are the same
    /// (trap 6: effects come before their event).
    pub fn doubtful(&self) -> bool {
        self.ctime.0 >= self.read_at.0.saturating_sub(DOUBT_NANOS)
    }

    /// Its entry, if it has one name on the source and one in the replica. (Of what
    /// was adopted nobody knows how many it has on the source until it was read.)
    pub fn only_entry(&self) -> Option<&(ObjectId, Name)> {
        self.entry.as_ref().filter(|_| (self.links, self.nlink) == (1, 1))
    }
}

/// Content as shipped.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Content {
    /// Has none: directories, device nodes.
    None,
    /// A small file, by the hash of its data extents.
    Whole(Hash),
    /// A larger file, by its chunks, which stand in a table of their own under
    /// this key (so that a delta need not carry them).
    Chunks {
        /// Average chunk size, bytes.
        average: u32,
        /// Number of the chunk list.
        list: u64,
        /// Hash over the list: tells whether content is the same.
        digest: Hash,
    },
    /// A symbolic link's target.
    Symlink(#[serde(with = "serde_bytes")] Vec<u8>),
}

/// One entry that a batch changes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EntryChange {
    /// The directory.
    pub directory: ObjectId,
    /// The name.
    pub name: Name,
    /// What the index has before the batch.
    pub old: Option<ObjectId>,
    /// What it has after.
    pub new: Option<ObjectId>,
}

/// An object that lost its last entry but lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Orphan {
    /// When it was found without an entry. Once a batch covers a moment well
    /// after this and no entry appeared, it is outside the source.
    pub since: Timestamp,
    /// Every change before this moment is in the replica all the same; the
    /// watermark waits here, unless the object has left.
    pub floor: Timestamp,
    /// It is known to have left the source, and is taken apart batch by batch
    /// (see [`mod@crate::plan::assemble`]).
    pub left: bool,
}

/// What a batch changes in the index.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Delta {
    /// Objects as they are after the batch; `None` when gone.
    pub objects: Vec<(ObjectId, Option<Known>)>,
    /// Entries as they are after the batch.
    pub entries: Vec<EntryChange>,
    /// Orphans made and resolved.
    pub orphans: Vec<(ObjectId, Option<Orphan>)>,
    /// Chunk lists that nothing refers to after the batch.
    pub dead_lists: Vec<u64>,
    /// Where the batch leaves the source.
    pub mark: Mark,
}

impl Delta {
    /// How many rows it changes, about.
    pub fn size(&self) -> usize {
        self.objects.len() + self.entries.len() + self.orphans.len() + self.dead_lists.len()
    }

    /// Chunk lists that may have come with it: garbage when it is given up, unless the
    /// index names them. (One that a comparison wrote anew is of an older version.)
    pub fn lists(&self) -> Vec<u64> {
        let known = self.objects.iter().filter_map(|(_, known)| known.as_ref());
        known
            .filter_map(|known| match known.content {
                Content::Chunks { list, .. } => Some(list),
                Content::None | Content::Whole(_) | Content::Symlink(_) => None,
            })
            .collect()
    }
}

/// Where a batch leaves the source.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mark {
    /// The batch.
    pub batch: BatchId,
    /// Tells it from others of its number.
    pub nonce: BatchNonce,
    /// The journal is covered up to here.
    pub seq: Seq,
    /// The watermark; [`Timestamp::NEVER`] before the initial sync is through.
    pub watermark: Option<Timestamp>,
    /// The last exact instant.
    pub consistent: Option<Timestamp>,
    /// Content bytes changed so far, over all batches.
    pub bytes_changed: u64,
    /// Content bytes shipped so far.
    pub bytes_shipped: u64,
    /// Objects shipped so far.
    pub objects_shipped: u64,
    /// Exact batches so far.
    pub exact_batches: u64,
}

impl Mark {
    /// The batch, as it was built.
    pub fn edition(&self) -> Edition {
        Edition { batch: self.batch, nonce: self.nonce }
    }
}
