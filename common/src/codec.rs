//! The one place that knows bincode.
//!
//! bincode is unmaintained (RUSTSEC-2025-0141); keeping it behind these four
//! functions means that replacing it touches one file. Values are encoded with
//! bincode 2's standard configuration (little endian, variable-length
//! integers) through serde. Decoding never allocates more than the limit.

use serde::Serialize;
use serde::de::DeserializeOwned;

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

/// Decodes a value that fills `bytes` exactly.
pub fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, CodecError> {
    let (value, read) = bincode::serde::decode_from_slice(bytes, config())?;
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
    fn a_length_that_lies_does_not_allocate() {
        // A byte string that claims 2^40 bytes.
        let mut hostile = vec![253u8];
        hostile.extend_from_slice(&(1u64 << 40).to_le_bytes());
        assert!(decode::<serde_bytes::ByteBuf>(&hostile).is_err());
        assert!(decode::<Vec<u64>>(&hostile).is_err());
    }
}
