//! The wire format between source and destination.
//!
//! One QUIC connection a configuration, ALPN [`ALPN`]. The source opens one
//! bidirectional **control stream** ([`SourceMessage`] one way,
//! [`DestinationMessage`] the other) and [`DATA_STREAMS`] unidirectional
//! **data streams** ([`DataFrame`]) in parallel. Each stream is a sequence of
//! frames (see [`crate::net::frame`] for the envelope). QUIC's TLS 1.3 guards
//! frames in flight; content carries a BLAKE3 hash from the place where it was
//! read to the place where it is staged.
//!
//! Order between streams is not defined. What a batch needs is therefore
//! counted: [`BatchHeader::packed`] says how many packed objects must have
//! arrived before the batch may be sealed.
//!
//! # The life of a batch
//! 1. The source sends packed objects of batch N on data streams, and large
//!    objects as transfers of their own that belong to no batch.
//! 2. It sends [`SourceMessage::Plan`] frames for N, then
//!    [`SourceMessage::Commit`]. Before Commit, its index's delta for N is
//!    durable on the source (else a lost acknowledgement loses changes).
//! 3. The destination waits for all packed objects, syncs, logs the batch,
//!    applies it and answers [`DestinationMessage::Applied`].
//!
//! Batches commit strictly in order of their ids, without holes. What had
//! arrived of a batch whose session ended serves the next session: see [`kept`].

pub mod kept;
pub mod op;

pub use kept::{KeptChunk, KeptObject, PackedAgain};
pub use op::{APPENDED_BATCH_MAX, APPENDED_MAX, Appended, ContentSource, Op};

use std::borrow::Cow;

use serde::{Deserialize, Serialize};
use serde_bytes::ByteBuf;

use crate::id::{
    BatchId, BatchNonce, Edition, FileSystemId, Incarnation, ObjectId, ReplicaHandle, Seq,
    SessionId, TransferId,
};
use crate::name::Name;
use crate::object::ObjectState;
use crate::status::SourceReport;
use crate::time::Timestamp;

/// ALPN of a replication connection; the number is the protocol's version.
///
/// 1: the first. 2: sessions have names; what finds no place is given
/// back; what was staged when a session ended is used by the next ([`kept`]);
/// verification; the destination says what names its file system takes. 3:
/// greetings name batches by [`Edition`]; the bytes of a frame's pieces stand
/// together behind them. 4: [`Op::Leave`]. 5: [`Describe::Blocks`](crate::describe::Describe::Blocks).
/// 6: [`DataFrame::PackPlaced`]. 7: a batch may name a transfer that has not arrived;
/// it is given back if that fails. 8: [`ContentSource::Appended`]. 9: contents of packs stand
/// behind their objects, and the beginning of a frame may be compressed alone.
pub const ALPN: &[u8] = b"replicator/9";
/// ALPN of an enrolment connection.
pub const ALPN_ENROL: &[u8] = b"replicator-enrol/1";
/// The most bytes of one frame's body, compressed or not.
pub const FRAME_MAX: usize = 4 << 20;
/// The most bytes of control-plane body: plans are cut to stay below it.
pub const PLAN_OPS_MAX: usize = 4096;
/// Data streams a connection has.
pub const DATA_STREAMS: usize = 4;
/// Files up to this many bytes travel whole, packed many to a frame; larger
/// ones travel as transfers and as deltas.
pub const PACK_MAX: u64 = 256 << 10;
/// The most content bytes of one [`Piece`].
pub const PIECE_MAX: usize = 1 << 20;

/// A BLAKE3 hash.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Hash(pub [u8; 32]);

impl Hash {
    /// The hash of some content.
    pub fn of(bytes: &[u8]) -> Self {
        Self(*blake3::hash(bytes).as_bytes())
    }
}

impl std::fmt::Debug for Hash {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", hex::encode(&self.0[..8]))
    }
}

/// A run of bytes in a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Extent {
    /// First byte.
    pub offset: u64,
    /// Bytes.
    pub length: u64,
}

// ---------------------------------------------------------------- control

/// From the source, on the control stream.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum SourceMessage {
    /// The first message of a session.
    Hello(SourceHello),
    /// Part of batch `batch`'s plan; at most [`PLAN_OPS_MAX`] operations.
    Plan {
        /// The batch it belongs to.
        batch: BatchId,
        /// What to do.
        #[serde(deserialize_with = "crate::codec::list")]
        ops: Vec<Op>,
    },
    /// The plan is whole: seal, make durable, apply.
    Commit {
        /// The batch.
        batch: BatchId,
        /// What the batch says of itself.
        header: BatchHeader,
    },
    /// Gives up everything sent for a batch that was not yet committed; its id
    /// will be used again.
    Abandon {
        /// The batch.
        batch: BatchId,
    },
    /// The source's view, for the destination's status; sent at least once a
    /// second, also when nothing changes. Its arrival says that the source lives.
    Report(Box<SourceReport>),
    /// Asks for one more part of the inventory of a replica that is to be
    /// reconciled, the first time for its first. Each is answered by one
    /// [`DestinationMessage::Inventory`], but none that follows the last part:
    /// so the source never has more of it than it asked for.
    RequestInventory,
    /// The configuration is deleted on the source with `ALL_CONFIGURATIONS`:
    /// fail over now. Answered by [`DestinationMessage::FailedOver`].
    Delete,
    /// Asks what the replica holds, to verify it. Answered by one
    /// [`DestinationMessage::Described`], in the order of the questions, of which
    /// at most [`QUESTIONS_MAX`](crate::describe::QUESTIONS_MAX) may wait.
    Describe(Box<crate::describe::Describe>),
    /// Asks for the chunks that were kept of a large object; answered by one or
    /// more [`DestinationMessage::KeptChunks`].
    AskKept {
        /// One that [`DestinationMessage::Kept`] named.
        object: ObjectId,
    },
    /// What was kept of these is of no use: it may be removed.
    Release {
        /// All small objects that were not sent again.
        packed: bool,
        /// Large ones.
        #[serde(deserialize_with = "crate::codec::list")]
        transfers: Vec<ObjectId>,
    },
}

/// The source introduces itself.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct SourceHello {
    /// The source's file system; names the configuration.
    pub source: FileSystemId,
    /// The source's file system region, owner and so on are in the configuration;
    /// this names this life of the source's state.
    pub incarnation: Incarnation,
    /// The destination's incarnation as last known; `None` at first contact.
    pub destination_incarnation: Option<Incarnation>,
    /// The last batch of which an acknowledgement arrived.
    pub acknowledged: Edition,
    /// Batches after it whose index delta is durable on the source but whose
    /// acknowledgement never arrived, oldest first.
    #[serde(deserialize_with = "crate::codec::list")]
    pub pending: Vec<Edition>,
    /// The session that this process had last, as [`DestinationHello::session`]
    /// named it. It shows that a session that looks open at the destination is
    /// the newcomer's own: that one is replaced at once, another's only when it
    /// is dead.
    pub previous: Option<SessionId>,
    /// The source's clock at sending.
    pub time: Timestamp,
}

/// What a batch says of itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BatchHeader {
    /// Tells it from others of the same number. The source has made it durable
    /// with the index's delta; the destination does so with the commit record.
    pub nonce: BatchNonce,
    /// The journal is covered up to here.
    pub seq: Seq,
    /// After this batch, every change whose system call returned on the source
    /// before this moment is in the replica. [`Timestamp::NEVER`] while the
    /// initial sync runs. Held back by gaps, held objects and orphans; never
    /// smaller than the batch before said.
    pub watermark: Timestamp,
    /// When the replica after this batch equals the source at one instant:
    /// that instant.
    pub exact: Option<Timestamp>,
    /// Packed objects sent for this batch on data streams (each (object,
    /// version) once).
    pub packed: u64,
    /// Operations in the plan.
    pub ops: u64,
    /// The initial sync is through with this batch.
    pub complete: bool,
    /// Content bytes that change with this batch (see
    /// [`Counters`](crate::status::Counters)).
    pub bytes_changed: u64,
    /// Content bytes that travelled since the batch before, for whichever batch.
    pub bytes_shipped: u64,
}

/// From the destination, on the control stream.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum DestinationMessage {
    /// The answer to [`SourceMessage::Hello`].
    Hello(DestinationHello),
    /// Batch `batch` and all before it are durable and visible in the replica.
    Applied {
        /// The batch.
        batch: BatchId,
        /// The destination's clock.
        time: Timestamp,
    },
    /// All packed objects and the plan of `batch` are durable, not yet applied.
    Durable {
        /// The batch.
        batch: BatchId,
    },
    /// The destination's view for the source's status; once a second or so.
    Report(Box<crate::status::DestinationReport>),
    /// A part of the replica's inventory, parents before children.
    Inventory {
        /// Some of the replica's entries.
        #[serde(deserialize_with = "crate::codec::list")]
        items: Vec<InventoryItem>,
        /// Nothing follows.
        last: bool,
    },
    /// The transfer's content could not be staged from its basis (the basis is
    /// not what the source believes): send it again without one.
    TransferRefused {
        /// The transfer.
        transfer: TransferId,
        /// Why.
        reason: String,
    },
    /// All of a transfer's content is staged: a batch that places it will not
    /// wait for it. (Not said where a batch waits for it already.)
    Transferred {
        /// The transfer.
        transfer: TransferId,
    },
    /// Failover is done.
    FailedOver {
        /// What a person is told.
        report: Box<crate::status::FailoverReport>,
    },
    /// The destination ends the session and says why.
    Refused(Refusal),
    /// At once after each [`SourceMessage::Report`]: by how much the clocks are
    /// apart (see [`crate::net::clock`]).
    Clock {
        /// The report's time.
        sent: Timestamp,
        /// When it arrived, by the destination's clock.
        received: Timestamp,
        /// When this was sent, by the destination's clock.
        answered: Timestamp,
    },
    /// `batch` and all that follow are given back: these objects of it find no
    /// place in the replica (its disk is full, the file is larger than it can
    /// hold, a transfer that the batch names was refused, …). All before it are applied. The source says
    /// [`SourceMessage::Abandon`] for `batch`, and plans it and what follows
    /// anew without these objects, which it tries again later.
    Returned {
        /// The batch.
        batch: BatchId,
        /// Objects, each with the reason.
        #[serde(deserialize_with = "crate::codec::list")]
        objects: Vec<(ObjectId, String)>,
        /// No further message names more of them.
        last: bool,
    },
    /// The transfer finds no place in the replica, and nothing is left of it:
    /// to be begun anew later.
    TransferUnplaced {
        /// The transfer.
        transfer: TransferId,
        /// Why.
        reason: String,
    },
    /// The answer to [`SourceMessage::Describe`].
    Described(Box<crate::describe::Description>),
    /// After the hello: what staging still has of the session before. At least
    /// one of these, with [`kept::KEPT_ITEMS_MAX`] objects at most in each.
    Kept {
        /// Small files.
        #[serde(deserialize_with = "crate::codec::list")]
        packed: Vec<KeptObject>,
        /// Large ones of which there are parts.
        #[serde(deserialize_with = "crate::codec::list")]
        transfers: Vec<ObjectId>,
        /// Nothing follows.
        last: bool,
    },
    /// The answer to [`SourceMessage::AskKept`].
    KeptChunks {
        /// The object.
        object: ObjectId,
        /// Its size and time when the transfer began that was broken off.
        /// When the file still has both, what was kept is its beginning.
        was: (u64, Timestamp),
        /// Some of the chunks, of content that was there when it was looked at;
        /// at most [`kept::KEPT_ITEMS_MAX`].
        #[serde(deserialize_with = "crate::codec::list")]
        chunks: Vec<KeptChunk>,
        /// Nothing follows.
        last: bool,
    },
}

/// The destination introduces itself.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct DestinationHello {
    /// The replica's file system.
    pub destination: FileSystemId,
    /// This session.
    pub session: SessionId,
    /// This life of the destination's state.
    pub incarnation: Incarnation,
    /// The last batch that is durable here (it will be applied before the next).
    pub committed: Edition,
    /// The watermark that the replica stands at.
    pub watermark: Timestamp,
    /// The replica was not empty when the configuration was made, and has not
    /// been reconciled yet: the source must ask for the inventory first.
    pub reconcile: bool,
    /// The destination's clock at sending.
    pub time: Timestamp,
    /// [`SourceHello::time`] as received.
    pub echo: Timestamp,
    /// The destination's clock when it received that.
    pub received: Timestamp,
    /// What the replica can hold.
    pub abilities: crate::status::Abilities,
}

/// One entry of a replica that is to be reconciled.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct InventoryItem {
    /// The replica's directory; `None` is the root itself (one item, name unused).
    pub parent: Option<ReplicaHandle>,
    /// Its name there.
    pub name: Name,
    /// The object.
    pub handle: ReplicaHandle,
    /// State apart from content.
    pub state: ObjectState,
    /// Names the object has, in the replica or elsewhere: one with several may
    /// come several times.
    pub links: u32,
    /// Content: hash of small files, chunks of larger ones, target of symlinks.
    pub content: InventoryContent,
}

/// The content of an [`InventoryItem`].
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum InventoryContent {
    /// Has none.
    None,
    /// Hash of the whole content of a file up to [`PACK_MAX`] bytes.
    Hash(Hash),
    /// Chunks of a larger file as [`crate::chunk`] cuts it with this average;
    /// long lists are continued by further items for the same handle.
    Chunks {
        /// Average size of the chunker, bytes.
        average: u32,
        /// The chunks in order.
        #[serde(deserialize_with = "crate::codec::list")]
        chunks: Vec<crate::chunk::Chunk>,
        /// Another item for the same handle follows with more chunks.
        more: bool,
    },
    /// A symbolic link's target.
    Symlink(ByteBuf),
}

/// Why the destination refuses a session.
#[derive(Clone, Debug, Serialize, Deserialize, thiserror::Error)]
pub enum Refusal {
    /// There is no such configuration here (it was deleted, or failed over).
    #[error("the destination has no replication configuration for {source_id}")]
    NoConfiguration {
        /// The source's file system.
        source_id: FileSystemId,
    },
    /// Another source with the same certificate has a session of this
    /// configuration, and is alive: one of the two is a copy.
    #[error(
        "another source with this one's identity is connected, from {peer}: one of the two is a copy (of a machine or a state directory); stop it and delete its state directory"
    )]
    Busy {
        /// Its address.
        peer: String,
    },
    /// The source broke the protocol.
    #[error("protocol error: {0}")]
    Protocol(String),
    /// The replica cannot take batches now; the source retries with backoff.
    #[error("the replica cannot take changes: {0}")]
    Unable(String),
}

// ------------------------------------------------------------------- data

/// From the source, on a data stream. Content is borrowed: from what was read at
/// the one end, from the frame at the other.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum DataFrame<'a> {
    /// Small objects of a batch, many to a frame.
    Pack {
        /// The batch they belong to.
        batch: BatchId,
        /// The objects.
        #[serde(deserialize_with = "crate::codec::list")]
        objects: Vec<PackedObject>,
        /// Their contents, one after the other; see [`contents`].
        #[serde(borrow, with = "serde_bytes")]
        data: Cow<'a, [u8]>,
    },
    /// A large object's transfer starts. All its frames are on one stream.
    TransferBegin(TransferBegin),
    /// Its next pieces, in order of offset, without holes between them.
    TransferPieces {
        /// The transfer.
        transfer: TransferId,
        /// The pieces.
        #[serde(deserialize_with = "crate::codec::list")]
        pieces: Vec<Piece>,
        /// The bytes of all [`Piece::Data`], one after the other.
        #[serde(borrow, with = "serde_bytes")]
        data: Cow<'a, [u8]>,
    },
    /// All pieces were sent.
    TransferEnd {
        /// The transfer.
        transfer: TransferId,
        /// State at the end of reading, which [`Op::Put`] repeats or updates.
        state: ObjectState,
    },
    /// The transfer is given up (the object died or is read again).
    TransferAbort {
        /// The transfer.
        transfer: TransferId,
    },
    /// Small objects of a batch whose content the destination kept, each once.
    PackAgain {
        /// The batch they belong to; they count among its packed objects.
        batch: BatchId,
        /// The objects.
        #[serde(deserialize_with = "crate::codec::list")]
        objects: Vec<PackedAgain>,
    },
    /// Follows [`DataFrame::TransferBegin`]: what was kept of the object serves
    /// this transfer, whose pieces may be [`Piece::Kept`].
    TransferReuse {
        /// The transfer.
        transfer: TransferId,
        /// What was kept becomes the transfer's own file, so that chunks that
        /// stay where they are need not be written again. Then no
        /// [`Piece::Kept`] is from before the place that it goes to.
        in_place: bool,
    },
    /// Small objects of a batch as in [`DataFrame::Pack`], and for the first of them
    /// the names that the batch will most likely give them, in directories that it
    /// will most likely make. So they can be staged side by side in what becomes
    /// their directory. Only a hint: what counts is the plan.
    PackPlaced {
        /// The batch they belong to.
        batch: BatchId,
        /// Names for the first objects, in the order of these.
        #[serde(deserialize_with = "crate::codec::list")]
        runs: Vec<PackRun>,
        /// The objects.
        #[serde(deserialize_with = "crate::codec::list")]
        objects: Vec<PackedObject>,
        /// As in [`DataFrame::Pack`].
        #[serde(borrow, with = "serde_bytes")]
        data: Cow<'a, [u8]>,
    },
}

/// Names of packed objects that follow one another in a frame and belong in one
/// directory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PackRun {
    /// The directory.
    pub directory: ObjectId,
    /// A name for each of the next objects.
    #[serde(deserialize_with = "crate::codec::list")]
    pub names: Vec<Name>,
}

/// A small regular file: content and attributes, staged as one. The content stands
/// behind all objects of the frame: what is said of objects is compressed well by
/// itself, and content that is not is sent from where it was read.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct PackedObject {
    /// The object.
    pub object: ObjectId,
    /// Grows with each reading of the object within a batch; the plan names
    /// the one that counts.
    pub version: u32,
    /// Its state when it was read.
    pub state: ObjectState,
    /// Where data lies; all else are holes. Ordered, not overlapping.
    #[serde(deserialize_with = "crate::codec::list")]
    pub extents: Vec<Extent>,
    /// Hash of the extents' bytes, one after the other.
    pub hash: Hash,
}

impl PackedObject {
    /// Bytes of content in the frame; `None` when what a peer said adds up to more than
    /// there can be.
    pub fn length(&self) -> Option<usize> {
        let mut lengths = self.extents.iter().map(|extent| usize::try_from(extent.length).ok());
        lengths.try_fold(0usize, |sum, length| sum.checked_add(length?))
    }
}

/// Each object of a pack with its content, the extents' bytes one after the other.
/// `None` when the frame has more bytes than its objects, or fewer.
pub fn contents<'a>(
    objects: &'a [PackedObject],
    data: &'a [u8],
) -> Option<impl Iterator<Item = (&'a PackedObject, &'a [u8])>> {
    let sum = objects.iter().try_fold(0usize, |sum, object| sum.checked_add(object.length()?));
    let mut rest = data;
    (sum == Some(data.len())).then(|| {
        objects.iter().map_while(move |object| {
            let (bytes, after) = rest.split_at_checked(object.length()?)?;
            rest = after;
            Some((object, bytes))
        })
    })
}

/// How a transfer becomes content at the destination.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Layout {
    /// A new file is built in staging and replaces the object's old one.
    Replace,
    /// Literal bytes are kept in staging and written into the object in place
    /// when the batch is applied. All copies stay at their offset.
    Patch,
}

/// The first frame of a transfer.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct TransferBegin {
    /// Its number; pieces refer to it.
    pub transfer: TransferId,
    /// The object.
    pub object: ObjectId,
    /// State when reading began.
    pub state: ObjectState,
    /// How content is put together.
    pub layout: Layout,
    /// The object from whose present content in the replica [`Piece::Copy`]
    /// copies: itself, or the one that stood under its name before.
    pub basis: Option<ObjectId>,
    /// The batch that last changed the basis' content, as the source believes.
    /// The destination keeps the same number in its objects map and refuses the
    /// transfer when they differ. 0 without a basis.
    pub basis_version: BatchId,
}

/// A run of a transferred file's content.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Piece {
    /// The next bytes of the frame's `data`.
    Data {
        /// Their hash.
        hash: Hash,
        /// How many, at most [`PIECE_MAX`].
        length: u32,
    },
    /// The same bytes as the basis has there.
    Copy {
        /// Where in the basis.
        from: u64,
        /// How many.
        length: u64,
    },
    /// A hole.
    Hole {
        /// How many bytes.
        length: u64,
    },
    /// Bytes that were kept of a transfer before this one
    /// ([`DataFrame::TransferReuse`]). Looked at before they are used: when they
    /// are not what the hash says, the transfer is refused.
    Kept {
        /// Where in what was kept ([`KeptChunk::from`]).
        from: u64,
        /// How many bytes, at most [`PIECE_MAX`].
        length: u32,
        /// Their hash.
        hash: Hash,
    },
}

impl Piece {
    /// Bytes of the file that this piece covers.
    pub fn length(&self) -> u64 {
        match self {
            Self::Copy { length, .. } | Self::Hole { length } => *length,
            Self::Data { length, .. } | Self::Kept { length, .. } => u64::from(*length),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::object::{Attributes, Kind};

    fn packed(lengths: &[u64]) -> PackedObject {
        let attributes =
            Attributes { mode: 0, uid: 0, gid: 0, mtime: Timestamp::NEVER, xattrs: Vec::new() };
        let extents = lengths.iter().map(|length| Extent { offset: 0, length: *length });
        PackedObject {
            object: ObjectId::new(1, &[1]).unwrap(),
            version: 0,
            state: ObjectState { kind: Kind::File, attributes, size: 0, rdev: 0 },
            extents: extents.collect(),
            hash: Hash::of(b""),
        }
    }

    #[test]
    fn contents_of_a_pack_are_told_apart_and_add_up() {
        let objects = [packed(&[2, 1]), packed(&[]), packed(&[3])];
        let of = |objects: &[PackedObject], data: &[u8]| {
            let each = contents(objects, data)?;
            Some(each.map(|(_, bytes)| bytes.to_vec()).collect::<Vec<_>>())
        };
        let three = vec![b"abc".to_vec(), Vec::new(), b"def".to_vec()];
        assert_eq!(of(&objects, b"abcdef"), Some(three));
        assert_eq!(of(&objects, b"abcde"), None);
        assert_eq!(of(&objects, b"abcdefg"), None);
        assert_eq!(of(&[], b""), Some(Vec::new()));
        assert_eq!(of(&[], b"a"), None);
        for lengths in [&[u64::MAX][..], &[u64::MAX, 1], &[u64::MAX, u64::MAX, 4]] {
            assert_eq!(of(&[packed(lengths)], b"ab"), None, "{lengths:?}");
        }
    }
}
