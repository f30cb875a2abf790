//! What a source asks of the replica, to verify it or to send less to it, and what it
//! is told: the replica as its file system shows it, not as the destination remembers
//! it.

use std::ops::Range;

use serde::{Deserialize, Serialize};
use serde_bytes::ByteBuf;

use crate::id::{BatchId, ObjectId, ReplicaHandle};
use crate::name::Name;
use crate::object::{Kind, ObjectState};
use crate::wire::Hash;

/// The most objects, or names, of one question.
pub const ASKED_MAX: usize = 1024;
/// The most bytes of one [`Describe::Range`], or of one [`Describe::Blocks`].
pub const RANGE_MAX: u64 = 8 << 20;
/// What [`Describe::Blocks`] tells apart, bytes: what databases, file systems in files
/// and the page cache write at a time.
pub const BLOCK: u64 = 4096;
/// Bytes of a block's hash.
pub const BLOCK_HASH: usize = 16;
/// The most questions that may wait for their answers.
pub const QUESTIONS_MAX: usize = 4;
/// The most names of one answer that the source did not name.
pub const EXTRA_MAX: usize = 1024;

/// A question.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Describe {
    /// State of these objects, and content of those with `true` (as far as it
    /// is at most [`crate::wire::PACK_MAX`] bytes).
    Objects(#[serde(deserialize_with = "crate::codec::list")] Vec<(ObjectId, bool)>),
    /// A run of a file's content; at most [`RANGE_MAX`] bytes.
    Range {
        /// The file.
        object: ObjectId,
        /// First byte.
        offset: u64,
        /// Bytes.
        length: u64,
    },
    /// The names of a directory after one name and up to another.
    Entries {
        /// The directory.
        directory: ObjectId,
        /// Names after this one; all, without.
        after: Option<Name>,
        /// Up to and with this one; to the end, without.
        until: Option<Name>,
        /// What should be there, in order of names.
        #[serde(deserialize_with = "crate::codec::list")]
        expected: Vec<(Name, Expected)>,
        /// Names that are not expected are wanted too.
        list: bool,
    },
    /// Runs of a file's content, block by block: at most [`ASKED_MAX`], and
    /// [`RANGE_MAX`] bytes together. Only of one version of the content, that which
    /// the source means to change.
    Blocks {
        /// The file.
        object: ObjectId,
        /// The batch that placed its content.
        version: BatchId,
        /// First byte and bytes of each run, cut as [`blocks`] cuts it.
        #[serde(deserialize_with = "crate::codec::list")]
        runs: Vec<(u64, u32)>,
    },
}

/// What a name of the replica should lead to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Expected {
    /// To this object.
    Object(ObjectId),
    /// It should not be there.
    Nothing,
    /// Whatever is there is right: the name is on the source and does not
    /// replicate, or could not be looked at.
    Anything,
}

/// An answer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Description {
    /// To [`Describe::Objects`], in their order. There may be fewer than were
    /// asked for, but one at least: the rest is to be asked for again.
    Objects(#[serde(deserialize_with = "crate::codec::list")] Vec<Described>),
    /// To [`Describe::Range`].
    Range(RangeSeen),
    /// To [`Describe::Entries`].
    Entries(EntriesSeen),
    /// The replica cannot be looked at now; to be asked again.
    Busy,
    /// To [`Describe::Blocks`]: the hashes ([`block_hash`]) of all blocks, side by
    /// side. `None` when the content is not of that version, or cannot be read.
    Blocks(Option<ByteBuf>),
}

/// Cuts a run of a file where a block of the file begins: its first and last part may
/// be shorter than a block.
pub fn blocks(from: u64, length: u64) -> impl Iterator<Item = Range<u64>> {
    let end = from.saturating_add(length);
    let next = move |at: &u64| {
        let next = (at / BLOCK + 1).saturating_mul(BLOCK).min(end);
        (next < end).then_some(next)
    };
    std::iter::successors((from < end).then_some(from), next)
        .map(move |at| at..(at / BLOCK + 1).saturating_mul(BLOCK).min(end))
}

/// What is told of a block: the first half of its hash. Half of it is as hard to meet by
/// chance as any key of 128 bits is to guess.
pub fn block_hash(bytes: &[u8]) -> [u8; BLOCK_HASH] {
    let Hash(all) = Hash::of(bytes);
    let mut half = [0; BLOCK_HASH];
    half.copy_from_slice(&all[..BLOCK_HASH]);
    half
}

/// One object of the replica.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Described {
    /// The destination does not know of it.
    Unknown,
    /// It is known, and the replica could not make it.
    Unmade,
    /// It is known, and not there.
    Missing,
    /// It cannot be read, with what the system said.
    Unreadable(String),
    /// It is there.
    Found {
        /// State apart from content.
        state: ObjectState,
        /// Hash of its content, where that was asked for.
        hash: Option<Hash>,
        /// A symbolic link's target.
        target: Option<ByteBuf>,
    },
}

/// A run of a file in the replica.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum RangeSeen {
    /// The file is not there, or is no file.
    Missing,
    /// It cannot be read, with what the system said.
    Unreadable(String),
    /// What is there of it, up to the file's end.
    Read {
        /// Bytes.
        length: u64,
        /// Their hash.
        hash: Hash,
    },
}

/// Names of a directory in the replica, as far as they are not as expected.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum EntriesSeen {
    /// The directory is not there.
    Missing,
    /// It cannot be read, with what the system said.
    Unreadable(String),
    /// It was read.
    Read {
        /// Expected names, by their place in the question, that lead nowhere or
        /// elsewhere.
        #[serde(deserialize_with = "crate::codec::list")]
        wrong: Vec<(u32, EntrySeen)>,
        /// Names that were not expected, at most [`EXTRA_MAX`].
        #[serde(deserialize_with = "crate::codec::list")]
        extra: Vec<ExtraSeen>,
    },
}

/// What a name leads to that should lead to something else.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum EntrySeen {
    /// Nothing.
    Nothing,
    /// Another object.
    Other(ExtraSeen),
    /// It cannot be looked at.
    Unreadable(String),
}

/// A name that the source does not have.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExtraSeen {
    /// The name.
    pub name: Name,
    /// What it leads to.
    pub handle: ReplicaHandle,
    /// Of what kind that is.
    pub kind: Kind,
    /// Its size, bytes.
    pub size: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_is_cut_where_blocks_of_the_file_begin() {
        let cut = |from, length| {
            blocks(from, length).map(|block| (block.start, block.end)).collect::<Vec<_>>()
        };
        assert_eq!(cut(0, 8192), [(0, 4096), (4096, 8192)]);
        assert_eq!(cut(100, 4096), [(100, 4096), (4096, 4196)]);
        assert_eq!(cut(4095, 1), [(4095, 4096)]);
        assert_eq!(cut(4096, 1), [(4096, 4097)]);
        assert_eq!(cut(7, 0), []);
        // From the wire: any number may come.
        assert_eq!(cut(u64::MAX - 10, 100), [(u64::MAX - 10, u64::MAX)]);
    }
}
