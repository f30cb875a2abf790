//! The one place that knows bincode.
//!
//! bincode is unmaintained (RUSTSEC-2025-0141); keeping it behind these four
//! functions means that replacing it touches one file. Values are encoded with
//! bincode 2's standard configuration (little endian, variable-length
//! integers) through serde. Decoding never allocates more than the limit.

use bytes::{Bytes, BytesMut};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

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
    Ok(bincode::serde::encode_to_vec(value, config())?)
}

/// Byte strings from this length on are referred to by [`encode_around`].
const SHARED_MIN: usize = 1 << 10;

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

/// Version of [`encode_record`]'s envelope. Versions so far:
/// 1: version byte, first four bytes of the BLAKE3 hash of the body, body.
pub const RECORD_VERSION: u8 = 1;

/// Encodes a value for disk: version, checksum, body.
pub fn encode_record<T: Serialize + ?Sized>(value: &T) -> Result<Vec<u8>, CodecError> {
    let body = encode(value)?;
    let mut record = Vec::with_capacity(5 + body.len());
    record.push(RECORD_VERSION);
    record.extend_from_slice(&blake3::hash(&body).as_bytes()[..4]);
    record.extend_from_slice(&body);
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
    fn a_length_that_lies_does_not_allocate() {
        // A byte string that claims 2^40 bytes.
        let mut hostile = vec![253u8];
        hostile.extend_from_slice(&(1u64 << 40).to_le_bytes());
        assert!(decode::<serde_bytes::ByteBuf>(&hostile).is_err());
        assert!(decode::<Vec<u64>>(&hostile).is_err());
    }
}
