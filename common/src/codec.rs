//! The one place that knows bincode.
//!
//! bincode is unmaintained (RUSTSEC-2025-0141); keeping it behind these
//! functions means that replacing it touches one file. Values are encoded with
//! bincode 2's standard configuration (little endian, variable-length
//! integers) through serde. One byte string never allocates more than the limit;
//! what lists take is bounded where bytes come from a peer, see
//! [`decode_bounded`].

use std::cell::Cell;
use std::fmt;
use std::marker::PhantomData;

use bytes::{Bytes, BytesMut};
use serde::de::{DeserializeOwned, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize};

/// The most bytes one encoded value may have: frames and records are both
/// below it (see [`crate::wire::FRAME_MAX`]).
pub const DECODE_LIMIT: usize = 16 << 20;

/// Why a value could not be encoded or decoded.
#[derive(Debug, thiserror::Error)]
pub enum CodecError {
    /// The value cannot be expressed; a defect of ours, not of the input.
    #[error("cannot encode: {0}")]
    Encode(#[from] bincode::error::EncodeError),
    /// The bytes are not a value of that type.
    #[error("cannot decode: {0}")]
    Decode(#[from] bincode::error::DecodeError),
    /// The value ended before the bytes did.
    #[error("cannot decode: {0} bytes left over")]
    Trailing(usize),
    /// A record's checksum or its length is wrong.
    #[error("record is damaged ({0})")]
    Damaged(&'static str),
    /// A record was written by a version of replicator that this one does not know.
    #[error("record has version {found}, this program knows up to {known}")]
    Version {
        /// What the record says.
        found: u8,
        /// The newest that is understood here.
        known: u8,
    },
}

fn config() -> bincode::config::Configuration<
    bincode::config::LittleEndian,
    bincode::config::Varint,
    bincode::config::Limit<DECODE_LIMIT>,
> {
    bincode::config::standard().with_limit::<DECODE_LIMIT>()
}

/// Encodes a value.
pub fn encode<T: Serialize + ?Sized>(value: &T) -> Result<Vec<u8>, CodecError> {
    encode_behind(&[], value)
}

/// Room that is made for a value at once: most rows and small messages are shorter. bincode's
/// own vector begins with none, and grows five times for a row.
const ROOM_BYTES: usize = 256;

/// Encodes a value behind other bytes.
fn encode_behind<T: Serialize + ?Sized>(head: &[u8], value: &T) -> Result<Vec<u8>, CodecError> {
    let mut bytes = Vec::with_capacity(ROOM_BYTES);
    bytes.extend_from_slice(head);
    bincode::serde::encode_into_writer(value, Behind(&mut bytes), config())?;
    Ok(bytes)
}

struct Behind<'a>(&'a mut Vec<u8>);

impl bincode::enc::write::Writer for Behind<'_> {
    fn write(&mut self, bytes: &[u8]) -> Result<(), bincode::error::EncodeError> {
        self.0.extend_from_slice(bytes);
        Ok(())
    }
}

/// Byte strings from this length on are referred to by [`encode_around`].
pub(crate) const SHARED_MIN: usize = 1 << 10;

/// Encodes a value behind `reserved` bytes for the caller to fill. What of it are
/// byte strings within `shared`, and not short, is not copied: the parts, one
/// after the other, are what [`encode`] would give.
pub fn encode_around<T: Serialize + ?Sized>(
    value: &T,
    shared: &Bytes,
    reserved: usize,
) -> Result<Vec<Bytes>, CodecError> {
    let head = BytesMut::zeroed(reserved);
    let mut writer = Around { shared, head, parts: Vec::with_capacity(3) };
    bincode::serde::encode_into_writer(value, &mut writer, config())?;
    writer.cut();
    Ok(writer.parts)
}

/// Collects what [`encode_around`] gives.
struct Around<'a> {
    shared: &'a Bytes,
    head: BytesMut,
    parts: Vec<Bytes>,
}

impl Around<'_> {
    fn cut(&mut self) {
        if !self.head.is_empty() {
            self.parts.push(self.head.split().freeze());
        }
    }
}

impl bincode::enc::write::Writer for Around<'_> {
    fn write(&mut self, bytes: &[u8]) -> Result<(), bincode::error::EncodeError> {
        if bytes.len() >= SHARED_MIN && self.shared.as_ptr_range().contains(&bytes.as_ptr()) {
            self.cut();
            self.parts.push(self.shared.slice_ref(bytes));
        } else {
            self.head.extend_from_slice(bytes);
        }
        Ok(())
    }
}

/// Decodes a value that fills `bytes` exactly.
pub fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, CodecError> {
    decode_borrowed(bytes)
}

/// The same of a value that may borrow from `bytes`.
pub fn decode_borrowed<'a, T: Deserialize<'a>>(bytes: &'a [u8]) -> Result<T, CodecError> {
    let (value, read) = bincode::serde::borrow_decode_from_slice(bytes, config())?;
    match bytes.len() - read {
        0 => Ok(value),
        left => Err(CodecError::Trailing(left)),
    }
}

/// Reads a byte string and makes a value of it, without a copy in between where
/// the format lends one. `expecting` says what it is, for errors.
///
/// # Errors
/// Those of the format, and what `make` says.
pub fn bytes<'de, D: Deserializer<'de>, T, E: fmt::Display>(
    from: D,
    expecting: &'static str,
    make: impl FnOnce(&[u8]) -> Result<T, E>,
) -> Result<T, D::Error> {
    from.deserialize_bytes(ByteString { expecting, make })
}

struct ByteString<F> {
    expecting: &'static str,
    make: F,
}

impl<'de, T, E: fmt::Display, F: FnOnce(&[u8]) -> Result<T, E>> Visitor<'de> for ByteString<F> {
    type Value = T;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.expecting)
    }

    fn visit_bytes<R: serde::de::Error>(self, bytes: &[u8]) -> Result<T, R> {
        (self.make)(bytes).map_err(R::custom)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<T, A::Error> {
        // In text formats byte strings are lists of numbers.
        let mut bytes = Vec::new();
        while let Some(byte) = items.next_element()? {
            bytes.push(byte);
        }
        self.visit_bytes(&bytes)
    }
}

// ------------------------------------------------------------------ lists

thread_local! {
    /// What the lists of the value that is being decoded may still take; `None`
    /// where they are not bounded.
    static ROOM: Cell<Option<usize>> = const { Cell::new(None) };
}

/// Puts back what [`ROOM`] was, also when decoding panics.
struct Bounded(Option<usize>);

impl Bounded {
    fn by(room: usize) -> Self {
        Self(ROOM.replace(Some(room)))
    }
}

impl Drop for Bounded {
    fn drop(&mut self) {
        ROOM.set(self.0);
    }
}

/// As [`decode_borrowed`], of bytes that come from a peer. Also gives the bytes of
/// memory that the value's lists take, as far as they are marked with [`list`].
///
/// INVARIANT (bounded resources): these are at most `room`. An item of a list may
/// be one byte and take a hundred and more in memory, so that a bound on the bytes
/// alone bounds little.
pub fn decode_bounded<'a, T: Deserialize<'a>>(
    bytes: &'a [u8],
    room: usize,
) -> Result<(T, usize), CodecError> {
    let _bounded = Bounded::by(room);
    let value = decode_borrowed(bytes)?;
    Ok((value, room - ROOM.get().unwrap_or(0)))
}

/// For `#[serde(deserialize_with = "…")]` at each list of a message.
///
/// # Errors
/// When the lists of the value take more than [`decode_bounded`] was told.
pub fn list<'de, D: Deserializer<'de>, T: Deserialize<'de>>(from: D) -> Result<Vec<T>, D::Error> {
    from.deserialize_seq(List(PhantomData))
}

struct List<T>(PhantomData<T>);

impl<'de, T: Deserialize<'de>> Visitor<'de> for List<T> {
    type Value = Vec<T>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a list")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Vec<T>, A::Error> {
        let mut list = Vec::with_capacity(take_room::<T, _>(items.size_hint())?);
        while let Some(item) = items.next_element()? {
            list.push(item);
        }
        Ok(list)
    }
}

/// For how many items there may be a place at once. Where lists are bounded, that
/// is for all of them: bincode, which alone is read so, says their number first.
fn take_room<T, E: serde::de::Error>(count: Option<usize>) -> Result<usize, E> {
    /// A number that may be a lie: what is really there makes room for more.
    const UNPROVEN_BYTES: usize = 64 << 10;
    let size = size_of::<T>().max(1);
    let Some(room) = ROOM.get() else {
        return Ok(count.unwrap_or(0).min(UNPROVEN_BYTES / size));
    };
    let count = count.ok_or_else(|| E::custom("a list that does not say its length"))?;
    let left = count.checked_mul(size).and_then(|bytes| room.checked_sub(bytes));
    let left = left.ok_or_else(|| {
        E::custom(format!("a list of {count} items, and room for {}", room / size))
    })?;
    ROOM.set(Some(left));
    Ok(count)
}

/// Version of [`encode_record`]'s envelope. Versions so far:
/// 1: version byte, first four bytes of the BLAKE3 hash of the body, body.
pub const RECORD_VERSION: u8 = 1;

/// Encodes a value for disk: version, checksum, body.
pub fn encode_record<T: Serialize + ?Sized>(value: &T) -> Result<Vec<u8>, CodecError> {
    let mut record = encode_behind(&[RECORD_VERSION, 0, 0, 0, 0], value)?;
    if let Some((head, body)) = record.split_first_chunk_mut::<5>() {
        head[1..].copy_from_slice(&blake3::hash(body).as_bytes()[..4]);
    }
    Ok(record)
}

/// Reads what [`encode_record`] wrote, checking version and checksum.
pub fn decode_record<T: DeserializeOwned>(record: &[u8]) -> Result<T, CodecError> {
    let Some((&version, rest)) = record.split_first() else {
        return Err(CodecError::Damaged("empty"));
    };
    if version != RECORD_VERSION {
        return Err(CodecError::Version { found: version, known: RECORD_VERSION });
    }
    let Some((sum, body)) = rest.split_at_checked(4) else {
        return Err(CodecError::Damaged("too short"));
    };
    if sum != &blake3::hash(body).as_bytes()[..4] {
        return Err(CodecError::Damaged("checksum"));
    }
    decode(body)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flipped_bit_is_found() {
        let record = encode_record(&(7u64, "text")).unwrap();
        assert_eq!(decode_record::<(u64, String)>(&record).unwrap(), (7, "text".to_owned()));
        for i in 0..record.len() * 8 {
            let mut bad = record.clone();
            bad[i / 8] ^= 1 << (i % 8);
            assert!(decode_record::<(u64, String)>(&bad).is_err(), "bit {i}");
        }
    }

    #[test]
    fn what_is_shared_is_not_copied() {
        let shared = Bytes::from((0..5000u32).map(|n| n as u8).collect::<Vec<_>>());
        let value = |bytes: &[u8]| (7u32, serde_bytes::ByteBuf::from(bytes), "text");
        let other = serde_bytes::Bytes::new(&[9; 3000]);
        for (from, to) in [(0, 5000), (100, 3000), (10, 20), (5000, 5000)] {
            let part = &shared[from..to];
            let parts =
                encode_around(&(7u32, serde_bytes::Bytes::new(part), "text", other), &shared, 3)
                    .unwrap();
            let whole = parts.concat();
            let copied = encode(&(value(part).0, value(part).1, value(part).2, other)).unwrap();
            assert_eq!((&whole[..3], &whole[3..]), (&[0; 3][..], &copied[..]));
            let is_shared = parts.iter().any(|p| p.as_ptr() == part.as_ptr());
            assert_eq!(is_shared, part.len() >= SHARED_MIN, "{from} to {to}");
        }
    }

    #[test]
    fn byte_strings_are_the_same_in_each_format() {
        #[derive(Debug, PartialEq)]
        struct Short(Vec<u8>);

        impl<'de> Deserialize<'de> for Short {
            fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
                let short = |bytes: &[u8]| match bytes.len() {
                    0..=3 => Ok(Self(bytes.to_vec())),
                    many => Err(format!("{many} bytes")),
                };
                bytes(from, "three bytes at most", short)
            }
        }

        let encoded = |bytes: &[u8]| encode(&serde_bytes::Bytes::new(bytes)).unwrap();
        assert_eq!(decode::<Short>(&encoded(&[1, 2])).unwrap(), Short(vec![1, 2]));
        let error = decode::<Short>(&encoded(&[1; 4])).unwrap_err().to_string();
        assert!(error.contains("4 bytes"), "{error}");
        assert_eq!(serde_json::from_str::<Short>("[7, 8, 9]").unwrap(), Short(vec![7, 8, 9]));
        assert!(serde_json::from_str::<Short>("[1, 2, 3, 4]").is_err());
        assert!(serde_json::from_str::<Short>("true").is_err());
    }

    #[test]
    fn lists_are_bounded_where_a_bound_is_given() {
        #[derive(Serialize, Deserialize)]
        struct Lists(#[serde(deserialize_with = "list")] Vec<u64>);

        let bytes = encode(&[Lists(vec![1; 6]), Lists(vec![2; 4])]).unwrap();
        let decode_within = |room| decode_bounded::<[Lists; 2]>(&bytes, room);
        let (lists, taken) = decode_within(100).unwrap();
        assert_eq!((lists[0].0.len(), lists[1].0.len(), taken), (6, 4, 80));
        assert!(decode_within(80).is_ok() && decode_within(79).is_err());
        // Elsewhere they are not.
        assert!(decode::<[Lists; 2]>(&bytes).is_ok());
        let json = serde_json::from_str::<Lists>("[1, 2]").unwrap();
        assert_eq!(json.0, [1, 2]);
    }

    #[test]
    fn a_length_that_lies_does_not_allocate() {
        // A byte string that claims 2^40 bytes.
        let mut hostile = vec![253u8];
        hostile.extend_from_slice(&(1u64 << 40).to_le_bytes());
        assert!(decode::<serde_bytes::ByteBuf>(&hostile).is_err());
        assert!(decode::<Vec<u64>>(&hostile).is_err());
    }
}
