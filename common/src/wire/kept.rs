//! What the destination kept of a session that ended before its batches were
//! committed, and how the next session uses it: nothing that arrived travels
//! twice.
//!
//! After its hello the destination says with [`DestinationMessage::Kept`] which
//! small objects it has in which content, and of which large ones it has parts;
//! the source sends nothing for a batch before the last of these messages. A
//! small file whose content is still the one named is sent as [`PackedAgain`].
//! Of a large one the source asks for the chunks ([`SourceMessage::AskKept`]),
//! says with [`DataFrame::TransferReuse`] that they serve a transfer, and
//! refers to them with [`Piece::Kept`]. What it has no use for it releases
//! ([`SourceMessage::Release`]).
//!
//! [`DestinationMessage::Kept`]: super::DestinationMessage::Kept
//! [`SourceMessage::AskKept`]: super::SourceMessage::AskKept
//! [`SourceMessage::Release`]: super::SourceMessage::Release
//! [`DataFrame::TransferReuse`]: super::DataFrame::TransferReuse
//! [`Piece::Kept`]: super::Piece::Kept

use serde::{Deserialize, Serialize};

use super::Hash;
use crate::chunk::Chunk;
use crate::id::ObjectId;
use crate::object::ObjectState;

/// The most objects or chunks in one message.
pub const KEPT_ITEMS_MAX: usize = 4096;
/// The most small objects that are kept.
pub const KEPT_PACKED_MAX: usize = 32 << 10;
/// The most content bytes of small objects that are kept: what three
/// batches under way and one that is being read can have.
pub const KEPT_PACKED_BYTES: u64 = 256 << 20;
/// The most large objects of which parts are kept.
pub const KEPT_TRANSFERS_MAX: usize = 64;
/// The most chunks of one large object that are told of.
pub const KEPT_CHUNKS_MAX: usize = 1 << 20;

/// A small file whose content is in staging.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeptObject {
    /// The object.
    pub object: ObjectId,
    /// Hash of its whole content, as it was read back from staging.
    pub hash: Hash,
}

/// A chunk of a large object that is in staging.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeptChunk {
    /// Where in what was kept; [`Piece::Kept`](super::Piece::Kept) repeats it.
    pub from: u64,
    /// Length and hash.
    pub chunk: Chunk,
}

/// A small file of a batch whose content the destination has.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PackedAgain {
    /// The object.
    pub object: ObjectId,
    /// As [`PackedObject::version`](super::PackedObject::version).
    pub version: u32,
    /// Its state when it was read; it has no holes.
    pub state: ObjectState,
    /// Hash of its content.
    pub hash: Hash,
}
