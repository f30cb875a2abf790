//! A side's identity: a self-signed certificate and its key.
//!
//! Nobody signs these certificates and no name in them is believed: the other
//! side knows a certificate by its SHA-256, its [`Fingerprint`], which travels
//! by a [token](super::token) and is pinned from then on. A certificate
//! therefore never expires by itself; to revoke it, its pin is removed.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;

use rcgen::{CertificateParams, DistinguishedName, DnType, KeyPair, PKCS_ECDSA_P256_SHA256};
use rustls::crypto::aws_lc_rs::sign::any_supported_type;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::sign::CertifiedKey;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use sha2::{Digest, Sha256};

use crate::crashsafe::{self, Format, StateFileError};

/// Name of the identity's file in a state directory.
pub const FILE_NAME: &str = "identity";
/// The name in every certificate. Not believed by anyone, but TLS wants one.
pub(super) const SERVER_NAME: &str = "replicator";
/// Versions so far: 1: certificate and key (PKCS #8), both PEM.
const FORMAT: Format = Format { name: "identity", version: 1 };

/// Why there is no identity.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    /// The file cannot be read or written, or its frame is damaged.
    #[error(transparent)]
    File(#[from] StateFileError),
    /// The file can be read, but what is in it is no certificate with its key.
    #[error(
        "{} holds no usable identity: {reason}; restore it from a backup, or remove it and enrol anew",
        path.display()
    )]
    Unusable {
        /// Which file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// A new certificate could not be made.
    #[error("cannot make a certificate: {0}")]
    Generate(#[from] rcgen::Error),
}

/// A certificate's name: the SHA-256 of its DER form. Written as 64 lower-case
/// hexadecimal digits.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Fingerprint(pub [u8; 32]);

impl Fingerprint {
    /// The fingerprint of a certificate in DER form.
    pub fn of(certificate: &[u8]) -> Self {
        Self(Sha256::digest(certificate).into())
    }
}

impl fmt::Display for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex::encode(self.0))
    }
}

impl fmt::Debug for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Why a text is not a fingerprint.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("{text:?} is not a certificate fingerprint (expected 64 hexadecimal digits)")]
pub struct InvalidFingerprint {
    /// What was given.
    pub text: String,
}

impl FromStr for Fingerprint {
    type Err = InvalidFingerprint;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let mut bytes = [0; 32];
        hex::decode_to_slice(text, &mut bytes)
            .map_err(|_| InvalidFingerprint { text: text.to_owned() })?;
        Ok(Self(bytes))
    }
}

impl Serialize for Fingerprint {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        if serializer.is_human_readable() {
            serializer.collect_str(self)
        } else {
            self.0.serialize(serializer)
        }
    }
}

impl<'de> Deserialize<'de> for Fingerprint {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        if deserializer.is_human_readable() {
            String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
        } else {
            <[u8; 32]>::deserialize(deserializer).map(Self)
        }
    }
}

/// A certificate (ECDSA P-256, self-signed) with its key.
#[derive(Clone)]
pub struct Identity {
    certified: Arc<CertifiedKey>,
    fingerprint: Fingerprint,
}

/// What the file holds.
#[derive(Serialize, Deserialize)]
struct Stored {
    certificate: String,
    key: String,
}

impl Identity {
    /// The identity kept in the state directory `directory`, which must exist;
    /// one is made at first use. Not safe against a second process doing the
    /// same at once: the state directory's lock is.
    ///
    /// # Errors
    /// A file that is damaged, of a newer version, or whose key is not the
    /// certificate's is an error and is never replaced: peers have it pinned.
    pub fn load_or_create(directory: &Path) -> Result<Self, IdentityError> {
        let path = directory.join(FILE_NAME);
        if let Some(stored) = crashsafe::read::<Stored>(&path, &FORMAT)? {
            return Self::from_stored(&stored)
                .map_err(|reason| IdentityError::Unusable { path, reason });
        }
        let stored = generate()?;
        let identity = Self::from_stored(&stored)
            .map_err(|reason| IdentityError::Unusable { path: path.clone(), reason })?;
        // Before it is shown to anyone: else a crash forgets what a peer pinned.
        crashsafe::write(&path, &FORMAT, &stored)?;
        Ok(identity)
    }

    /// A new identity that is kept nowhere: for tests, and for measurements.
    ///
    /// # Errors
    /// Only when the cryptographic library fails.
    pub fn ephemeral() -> Result<Self, IdentityError> {
        Self::from_stored(&generate()?)
            .map_err(|reason| IdentityError::Unusable { path: PathBuf::new(), reason })
    }

    fn from_stored(stored: &Stored) -> Result<Self, String> {
        let certificate = CertificateDer::from_pem_slice(stored.certificate.as_bytes())
            .map_err(|error| format!("certificate: {error}"))?;
        let key = PrivateKeyDer::from_pem_slice(stored.key.as_bytes())
            .map_err(|error| format!("key: {error}"))?;
        let key = any_supported_type(&key).map_err(|error| format!("key: {error}"))?;
        let fingerprint = Fingerprint::of(&certificate);
        let certified = CertifiedKey::new(vec![certificate], key);
        certified.keys_match().map_err(|error| format!("key of another certificate: {error}"))?;
        Ok(Self { certified: Arc::new(certified), fingerprint })
    }

    /// What a thief of a certificate (which is public) could build: it with a
    /// key that is not its own.
    #[cfg(test)]
    pub(super) fn forged(certificate: &Self, key: &Self) -> Self {
        let certified =
            CertifiedKey::new(certificate.certified.cert.clone(), key.certified.key.clone());
        Self { certified: Arc::new(certified), fingerprint: certificate.fingerprint }
    }

    /// By what peers know it.
    pub fn fingerprint(&self) -> Fingerprint {
        self.fingerprint
    }

    /// Certificate and key as rustls wants them.
    pub(super) fn certified(&self) -> Arc<CertifiedKey> {
        Arc::clone(&self.certified)
    }
}

impl fmt::Debug for Identity {
    /// Never shows the key.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Identity({})", self.fingerprint)
    }
}

fn generate() -> Result<Stored, rcgen::Error> {
    let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
    let mut parameters = CertificateParams::new(vec![SERVER_NAME.to_owned()])?;
    let mut name = DistinguishedName::new();
    name.push(DnType::CommonName, SERVER_NAME);
    parameters.distinguished_name = name;
    let certificate = parameters.self_signed(&key)?;
    Ok(Stored { certificate: certificate.pem(), key: key.serialize_pem() })
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn is_made_once_and_kept_private() {
        let directory = tempfile::tempdir().unwrap();
        let first = Identity::load_or_create(directory.path()).unwrap();
        let second = Identity::load_or_create(directory.path()).unwrap();
        assert_eq!(first.fingerprint(), second.fingerprint());
        let mode = fs::metadata(directory.path().join(FILE_NAME)).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        assert_ne!(first.fingerprint(), Identity::ephemeral().unwrap().fingerprint());
    }

    #[test]
    fn damage_is_an_error_and_never_overwritten() {
        let directory = tempfile::tempdir().unwrap();
        Identity::load_or_create(directory.path()).unwrap();
        let path = directory.path().join(FILE_NAME);
        let good = fs::read(&path).unwrap();
        for damaged in [&good[..good.len() / 2], b"", b"-----BEGIN CERTIFICATE-----\n"] {
            fs::write(&path, damaged).unwrap();
            let error = Identity::load_or_create(directory.path()).unwrap_err();
            assert!(error.to_string().contains("identity"), "{error}");
            assert_eq!(fs::read(&path).unwrap(), damaged);
        }
    }

    #[test]
    fn a_key_of_another_certificate_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let (one, other) = (generate().unwrap(), generate().unwrap());
        let mixed = Stored { certificate: one.certificate, key: other.key };
        let path = directory.path().join(FILE_NAME);
        crashsafe::write(&path, &FORMAT, &mixed).unwrap();
        let error = Identity::load_or_create(directory.path()).unwrap_err();
        assert!(error.to_string().contains("another certificate"), "{error}");
    }

    #[test]
    fn fingerprint_forms() {
        let fingerprint = Fingerprint::of(b"certificate");
        assert_eq!(fingerprint.to_string().parse(), Ok(fingerprint));
        assert!("abc".parse::<Fingerprint>().is_err());
        let json = serde_json::to_string(&fingerprint).unwrap();
        assert_eq!(json, format!("\"{fingerprint}\""));
        assert_eq!(serde_json::from_str::<Fingerprint>(&json).unwrap(), fingerprint);
        let binary = crate::codec::encode(&fingerprint).unwrap();
        assert_eq!(binary, fingerprint.0);
        assert_eq!(crate::codec::decode::<Fingerprint>(&binary).unwrap(), fingerprint);
    }
}
