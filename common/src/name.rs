//! A directory entry's name.

use std::ffi::OsStr;
use std::fmt;
use std::os::unix::ffi::OsStrExt;

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use smallvec::SmallVec;

/// The most bytes a name may hold (`NAME_MAX`).
pub const NAME_MAX: usize = 255;

/// One component of a path: 1 to 255 bytes of any value but `/` and NUL, and
/// neither `.` nor `..`.
///
/// INVARIANT (no stranger gets in): a value of this type cannot leave the
/// directory it is used in. Deserialising checks it, so that a name from the
/// wire or from disk is safe by its type.
///
/// Most names are short, and are kept in place: planning copies each several times.
#[derive(PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Name(SmallVec<[u8; 24]>);

impl Clone for Name {
    fn clone(&self) -> Self {
        // As one piece: the derived one copies byte by byte.
        Self(SmallVec::from_slice(&self.0))
    }
}

/// Why some bytes are not a name.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("{} is not a valid entry name", String::from_utf8_lossy(.bytes).escape_debug())]
pub struct InvalidName {
    /// What was given.
    pub bytes: Vec<u8>,
}

impl Name {
    /// Checks and wraps the bytes of a name.
    pub fn new(bytes: &[u8]) -> Result<Self, InvalidName> {
        let valid = !bytes.is_empty()
            && bytes.len() <= NAME_MAX
            && bytes != b"."
            && bytes != b".."
            && !bytes.iter().any(|b| matches!(b, b'/' | 0));
        if valid {
            Ok(Self(SmallVec::from_slice(bytes)))
        } else {
            Err(InvalidName { bytes: bytes[..bytes.len().min(NAME_MAX)].to_vec() })
        }
    }

    /// The bytes, as the kernel knows them.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    /// For calls that take a path.
    pub fn as_os_str(&self) -> &OsStr {
        OsStr::from_bytes(&self.0)
    }
}

impl AsRef<OsStr> for Name {
    fn as_ref(&self) -> &OsStr {
        self.as_os_str()
    }
}

impl AsRef<std::path::Path> for Name {
    fn as_ref(&self) -> &std::path::Path {
        self.as_os_str().as_ref()
    }
}

impl TryFrom<&OsStr> for Name {
    type Error = InvalidName;

    fn try_from(value: &OsStr) -> Result<Self, Self::Error> {
        Self::new(value.as_bytes())
    }
}

impl fmt::Debug for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0.escape_ascii())
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&String::from_utf8_lossy(&self.0))
    }
}

impl Serialize for Name {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serde_bytes::Bytes::new(&self.0).serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for Name {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        crate::codec::bytes(deserializer, "an entry's name", Self::new)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_cannot_leave_its_directory() {
        for bad in [&b""[..], b".", b"..", b"a/b", b"/", b"a\0b", &[b'x'; 256]] {
            assert!(Name::new(bad).is_err());
        }
        for good in [&b"a"[..], b"...", b".a", b"\xff\xfe", b"a b\n", &[b'x'; 255]] {
            assert!(Name::new(good).is_ok());
        }
    }

    #[test]
    fn deserialising_checks() {
        let hostile = crate::codec::encode(&serde_bytes::Bytes::new(b"../../etc/passwd")).unwrap();
        assert!(crate::codec::decode::<Name>(&hostile).is_err());
    }
}
