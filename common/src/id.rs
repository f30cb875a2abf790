//! Identities: objects, file systems, configurations, batches, positions.
//!
//! Every identity is a type of its own, so that a batch number can never be
//! taken for a journal position.

use std::cmp::Ordering;
use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use smallvec::SmallVec;

/// The most bytes an [`ObjectId`] may hold: one byte of handle type and
/// `MAX_HANDLE_SZ` (128) bytes of handle, see `name_to_handle_at(2)`.
pub const OBJECT_ID_MAX: usize = 1 + 128;

/// An object (inode) by its file handle: stable across renames, remounts and
/// restarts, and never reused (the handle holds the inode's generation).
///
/// The first byte says what the rest is: the kernel's handle type, or one of
/// the reserved values below for what the kernel gives no handle for. Objects
/// of the source and of the replica both use this form; they are never mixed:
/// see [`ReplicaHandle`].
///
/// INVARIANT: ids are ordered as keys of [`KeyOrder::Inodes`] are: by tag, then by inode
/// number, where the handle begins with it. Objects that were made together are
/// neighbours so, on disk and in a table, while the number's lowest byte, which handles
/// begin with, would scatter them.
#[derive(PartialEq, Eq, Hash)]
pub struct ObjectId(SmallVec<[u8; 24]>);

/// How a store's keys hold ids. A store keeps to the one that it was made with: to change
/// it is to write each row anew, while a failover may be waiting for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KeyOrder {
    /// As they are: the order of older stores, in which neighbours are spread over
    /// the whole table.
    Bytes,
    /// With the inode number turned around, so that the order of keys is that of ids.
    Inodes,
}

impl KeyOrder {
    /// What a store keeps the object under.
    pub fn key(self, id: &ObjectId) -> ObjectKey {
        let mut bytes = SmallVec::from_slice(&id.0);
        self.turn(&mut bytes);
        ObjectKey(bytes)
    }

    /// Reads an id back from its key; `None` when the length is wrong.
    pub fn id(self, key: &[u8]) -> Option<ObjectId> {
        let mut id = ObjectId::from_bytes(key)?;
        self.turn(&mut id.0);
        Some(id)
    }

    /// Makes an id's bytes those of its key, and the other way round.
    fn turn(self, bytes: &mut [u8]) {
        if let (Self::Inodes, Some((tag, body))) = (self, bytes.split_first_mut()) {
            let width = number_width(*tag).min(body.len());
            body[..width].reverse();
        }
    }
}

/// What a store keeps an object under.
pub struct ObjectKey(SmallVec<[u8; 24]>);

impl ObjectKey {
    /// The bytes, as many as the id has.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }
}

impl Ord for ObjectId {
    fn cmp(&self, other: &Self) -> Ordering {
        let rest = |id: &Self| id.body().get(number_width(id.tag())..).is_some();
        self.tag().cmp(&other.tag()).then_with(|| match rest(self) && rest(other) {
            // The same without a copy of either.
            true => {
                let width = number_width(self.tag());
                let of_number = self.locality().cmp(&other.locality());
                of_number.then_with(|| self.body()[width..].cmp(&other.body()[width..]))
            }
            false => {
                let key = |id| KeyOrder::Inodes.key(id);
                key(self).as_bytes().cmp(key(other).as_bytes())
            }
        })
    }
}

impl PartialOrd for ObjectId {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

/// Bytes of the inode number, with which handles begin: 32 bits in those of type 1
/// (`FILEID_INO32_GEN`), else 64.
fn number_width(tag: u8) -> usize {
    const INO32: u8 = 1;
    if tag == INO32 { 4 } else { 8 }
}

impl Clone for ObjectId {
    fn clone(&self) -> Self {
        // As one piece: the derived one copies byte by byte, and planning copies ids
        // more than it does anything else.
        Self(SmallVec::from_slice(&self.0))
    }
}

/// An [`ObjectId`] made on the replica's file system. A separate name keeps
/// signatures readable; the two come from different file systems and must not
/// be compared with each other.
pub type ReplicaHandle = ObjectId;

impl ObjectId {
    /// (No file system of Linux 6.18 uses 0xe1 or 0xe2 as a handle type.)
    /// First byte of an id made of inode number and birth time, for file
    /// systems without handles. Weaker than a handle: status says so.
    pub const TAG_INODE: u8 = 0xe1;
    /// First byte of an id for what a reconciled replica holds and the source
    /// does not know; the rest is the [`ReplicaHandle`].
    pub const TAG_FOREIGN: u8 = 0xe2;

    /// An order in which neighbours on disk mostly come one after the other: that
    /// of inode numbers, which handles begin with (those of most file systems). The
    /// order of ids rests on it.
    pub fn locality(&self) -> u64 {
        let (width, body) = (number_width(self.tag()), self.body());
        match (width, body.first_chunk(), body.first_chunk()) {
            (4, Some(number), _) => u32::from_le_bytes(*number).into(),
            (8, _, Some(number)) => u64::from_le_bytes(*number),
            // Shorter than a number.
            _ => body.iter().rev().fold(0, |number, byte| number << 8 | u64::from(*byte)),
        }
    }

    /// The inode number, where the kernel's handle says it for certain: handles
    /// of inode and generation (ext2/3/4 and others), of xfs with inode numbers
    /// of 64 bits, and of btrfs.
    pub fn inode(&self) -> Option<u64> {
        const GENERIC: (u8, usize) = (1, 8);
        const XFS: (u8, usize) = (0x81, 12);
        const BTRFS: (u8, usize) = (0x4d, 20);
        let shape = (self.tag(), self.body().len());
        matches!(shape, GENERIC | XFS | BTRFS).then(|| self.locality())
    }

    /// Builds an id from its tag and body; `None` when it is too long.
    pub fn new(tag: u8, body: &[u8]) -> Option<Self> {
        if 1 + body.len() > OBJECT_ID_MAX {
            return None;
        }
        let mut bytes = SmallVec::with_capacity(1 + body.len());
        bytes.push(tag);
        bytes.extend_from_slice(body);
        Some(Self(bytes))
    }

    /// Reads an id back from its stored bytes; `None` when the length is wrong.
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        (!bytes.is_empty() && bytes.len() <= OBJECT_ID_MAX)
            .then(|| Self(SmallVec::from_slice(bytes)))
    }

    /// The stored bytes: tag, then body.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    /// The tag: a kernel handle type or one of the `TAG_` values.
    pub fn tag(&self) -> u8 {
        self.0[0]
    }

    /// What follows the tag.
    pub fn body(&self) -> &[u8] {
        &self.0[1..]
    }

    /// The id under which a replica's own object takes part in the plan.
    pub fn foreign(handle: &ReplicaHandle) -> Option<Self> {
        Self::new(Self::TAG_FOREIGN, handle.as_bytes())
    }

    /// Whether this names a replica's object that the source never had.
    pub fn is_foreign(&self) -> bool {
        self.tag() == Self::TAG_FOREIGN
    }

    /// Lower-case hexadecimal, safe as a file name (at most 258 characters:
    /// ids longer than 120 bytes are hashed so that the name fits in 255).
    pub fn to_file_name(&self) -> String {
        if self.0.len() <= 120 {
            hex::encode(&self.0)
        } else {
            format!("h{}", blake3::hash(&self.0).to_hex())
        }
    }
}

impl fmt::Debug for ObjectId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", hex::encode(&self.0))
    }
}

impl fmt::Display for ObjectId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

impl Serialize for ObjectId {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serde_bytes::Bytes::new(&self.0).serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for ObjectId {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        crate::codec::bytes(deserializer, "an object id", |bytes| {
            Self::from_bytes(bytes).ok_or_else(|| {
                format!("object id of {} bytes, expected 1 to {OBJECT_ID_MAX}", bytes.len())
            })
        })
    }
}

macro_rules! counter {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(
            Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize,
        )]
        #[serde(transparent)]
        pub struct $name(pub u64);

        impl $name {
            /// The one after this.
            #[must_use]
            pub fn next(self) -> Self {
                Self(self.0 + 1)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}", self.0)
            }
        }
    };
}

counter!(
    /// A record's place in the journal; grows by one a record, never reused
    /// within one source incarnation. 0 stands before the first record.
    Seq
);
counter!(
    /// A batch's number within one pair of incarnations; the first is 1 and 0
    /// means that none was ever committed.
    BatchId
);
/// A random value that a batch gets each time it is built; 0 stands for one that
/// is not known, for it was built before there were nonces.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct BatchNonce(pub u64);

impl BatchNonce {
    /// A new one from the thread's cryptographic generator.
    pub fn random() -> Self {
        Self(rand::random::<u64>().max(1))
    }
}

/// A batch as it was built once. One that was lost is built anew, with other
/// content, under the same number: then its nonce is another.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Edition {
    /// Its number.
    pub batch: BatchId,
    /// Tells it from others of that number.
    pub nonce: BatchNonce,
}

impl Edition {
    /// Whether both are the same batch, as far as can be known.
    pub fn is(&self, other: &Self) -> bool {
        let unknown = BatchNonce::default();
        let same = self.nonce == other.nonce;
        self.batch == other.batch && (same || self.nonce == unknown || other.nonce == unknown)
    }
}

counter!(
    /// A large object's transfer within one session.
    TransferId
);

/// A random 128-bit value that names one life of a side's state. When a state
/// directory is lost, restored from a backup or made anew, it changes, and the
/// other side knows that nothing it remembers can be trusted.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Incarnation(#[serde(with = "hex_array")] pub [u8; 16]);

impl Incarnation {
    /// A new one from the thread's cryptographic generator.
    pub fn random() -> Self {
        Self(rand::random())
    }
}

/// A random 128-bit value that names one session between a source and a
/// destination. Whoever knows it took part in that session.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SessionId(pub [u8; 16]);

impl SessionId {
    /// A new one from the thread's cryptographic generator.
    pub fn random() -> Self {
        Self(rand::random())
    }
}

impl fmt::Debug for Incarnation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", hex::encode(self.0))
    }
}

mod hex_array {
    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    pub(super) fn serialize<S: Serializer>(value: &[u8; 16], s: S) -> Result<S::Ok, S::Error> {
        if s.is_human_readable() { hex::encode(value).serialize(s) } else { value.serialize(s) }
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(d: D) -> Result<[u8; 16], D::Error> {
        if d.is_human_readable() {
            let text = String::deserialize(d)?;
            let mut out = [0; 16];
            hex::decode_to_slice(&text, &mut out).map_err(serde::de::Error::custom)?;
            Ok(out)
        } else {
            <[u8; 16]>::deserialize(d)
        }
    }
}

/// Why a text is not a valid identity.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error(
    "{text:?} is not a file system id (expected fs- and 8 to 40 lower-case hexadecimal digits)"
)]
pub struct InvalidFileSystemId {
    /// What was given, cut where it is longer than any id.
    pub text: String,
}

/// A file system in EFS's form: `fs-` and 8 to 40 lower-case hexadecimal
/// digits; ours have 17, as Amazon's do.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct FileSystemId(String);

impl FileSystemId {
    /// Characters of what is no id that are shown.
    const SHOWN_MAX: usize = 50;

    /// A new random id of 17 digits.
    pub fn random() -> Self {
        let bytes: [u8; 9] = rand::random();
        Self(format!("fs-{}", &hex::encode(bytes)[..17]))
    }

    /// The text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for FileSystemId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for FileSystemId {
    type Err = InvalidFileSystemId;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let valid = text.strip_prefix("fs-").is_some_and(|digits| {
            (8..=40).contains(&digits.len())
                && digits.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
        });
        if valid {
            Ok(Self(text.to_owned()))
        } else {
            // It may be as long as a frame, and goes into logs and status.
            Err(InvalidFileSystemId { text: text.chars().take(Self::SHOWN_MAX).collect() })
        }
    }
}

impl Serialize for FileSystemId {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        self.0.serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for FileSystemId {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn file_system_id_accepts_only_efs_form() {
        assert!(FileSystemId::random().as_str().parse::<FileSystemId>().is_ok());
        for bad in
            ["", "fs-", "fs-1234567", "fs-0123456G", "fs-0123456A", "xs-01234567", "fs-../../x"]
        {
            assert!(bad.parse::<FileSystemId>().is_err(), "{bad}");
        }
        let long = "\u{1}".repeat(1 << 20).parse::<FileSystemId>().unwrap_err();
        assert!(long.to_string().len() < 500);
    }

    #[test]
    fn object_id_is_bounded() {
        assert!(ObjectId::new(1, &[0; 128]).is_some());
        assert!(ObjectId::new(1, &[0; 129]).is_none());
        assert!(ObjectId::from_bytes(&[]).is_none());
        assert!(ObjectId::new(1, &[7; 128]).is_some_and(|id| id.to_file_name().len() < 255));
    }

    #[test]
    fn inodes_that_are_neighbours_are_neighbours_in_a_store() {
        for (tag, width) in [(1, 4), (0x81, 8), (0x4d, 8)] {
            let id = |number: u64| {
                let bytes = [&number.to_le_bytes()[..width], &[7, 0, 0, 0]].concat();
                ObjectId::new(tag, &bytes).unwrap()
            };
            let numbers = [0xfe, 0xff, 0x100, 0x101, 0x01_0000, 0x01_0100, 0x7fff_ffff];
            let ids = numbers.map(id);
            let key = |id: &ObjectId| KeyOrder::Inodes.key(id).as_bytes().to_vec();
            assert!(ids.is_sorted(), "{ids:?}");
            assert!(ids.windows(2).all(|two| key(&two[0]) < key(&two[1])));
        }
    }

    /// Of few values, so that ids often share what they begin with; often of the
    /// lengths that file systems give.
    fn bytes() -> impl Strategy<Value = Vec<u8>> {
        let value = || prop::sample::select(vec![0, 1, 2, 0xff]);
        let length = prop_oneof![Just(9), Just(13), 1..14usize];
        length.prop_flat_map(move |length| prop::collection::vec(value(), length))
    }

    proptest! {
        #[test]
        fn an_id_is_ordered_as_its_key_is(one in bytes(), other in bytes()) {
            let id = |bytes: &[u8]| ObjectId::from_bytes(bytes).unwrap();
            let (one, other) = (id(&one), id(&other));
            let key = |id: &ObjectId| KeyOrder::Inodes.key(id).as_bytes().to_vec();
            prop_assert_eq!(one.cmp(&other), key(&one).cmp(&key(&other)));
            prop_assert_eq!(one.cmp(&other).is_eq(), one == other);
            prop_assert_eq!(KeyOrder::Inodes.id(&key(&one)), Some(one.clone()));
            let plain = KeyOrder::Bytes.key(&one);
            prop_assert_eq!(plain.as_bytes(), one.as_bytes());
        }
    }
}
