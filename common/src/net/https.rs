//! TLS 1.3 of the HTTP API: certificates with names and authorities for those
//! clients that go by them, and fingerprints for those that pin.
//!
//! A server without a certificate of its own makes a self-signed one, once, and
//! keeps it in the state directory as two PEM files, [`CERTIFICATE_FILE`] (which
//! clients may be given as the authority to trust) and [`KEY_FILE`]. To have
//! other names in it, remove both.

use std::fmt;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rcgen::{
    CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, KeyPair,
    PKCS_ECDSA_P256_SHA256,
};
use rustls::client::{Resumption, WebPkiServerVerifier};
use rustls::crypto::aws_lc_rs::sign::any_supported_type;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{NoServerSessionStorage, ServerConfig};
use rustls::sign::{CertifiedKey, SingleCertAndKey};
use rustls::{ClientConfig, DistinguishedName as Subject, Error, RootCertStore};

use super::identity::Fingerprint;
use super::tls::{PinnedServer, Signatures, provider, signature_checks};
use crate::crashsafe::{self, StateFileError};

/// The certificate that the server made for itself.
pub const CERTIFICATE_FILE: &str = "api-certificate.pem";
/// Its key.
pub const KEY_FILE: &str = "api-key.pem";
const ALPN: &[u8] = b"http/1.1";

/// Why there is no certificate.
#[derive(Debug, thiserror::Error)]
pub enum CertificateError {
    /// A file is not what it should be.
    #[error("{}: {reason}", path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// A file of ours cannot be written.
    #[error(transparent)]
    State(#[from] StateFileError),
    /// No certificate can be made.
    #[error("cannot make a certificate: {0}")]
    Make(#[from] rcgen::Error),
    /// They are of no use for TLS.
    #[error("cannot use the certificate: {0}")]
    Tls(#[from] Error),
}

/// A certificate, with what leads to its authority, and its key.
#[derive(Clone)]
pub struct Certificate(Arc<CertifiedKey>);

impl fmt::Debug for Certificate {
    /// Never shows the key.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Certificate({})", self.fingerprint())
    }
}

impl Certificate {
    /// Reads a certificate and its key, both PEM.
    ///
    /// # Errors
    /// When they cannot be read, or are not each other's.
    pub fn read(certificate: &Path, key: &Path) -> Result<Self, CertificateError> {
        let chain = read_certificates(certificate)?;
        let wrong =
            |path: &Path, reason: String| CertificateError::File { path: path.to_owned(), reason };
        let secret = PrivateKeyDer::from_pem_file(key)
            .map_err(|error| wrong(key, format!("no private key: {error}")))?;
        let secret = any_supported_type(&secret)
            .map_err(|error| wrong(key, format!("no private key that can be used: {error}")))?;
        let certified = CertifiedKey::new(chain, secret);
        certified
            .keys_match()
            .map_err(|error| wrong(key, format!("key of another certificate: {error}")))?;
        Ok(Self(Arc::new(certified)))
    }

    /// The one that is kept in `directory`; made, for these names and
    /// addresses, at first use.
    ///
    /// # Errors
    /// When it cannot be made or read.
    pub fn load_or_create(directory: &Path, names: &[String]) -> Result<Self, CertificateError> {
        let (certificate, key) = (directory.join(CERTIFICATE_FILE), directory.join(KEY_FILE));
        if !certificate.exists() {
            let secret = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
            let made = parameters(names)?.self_signed(&secret)?;
            // The certificate last: where it is, its key is.
            crashsafe::replace(&key, secret.serialize_pem().as_bytes())?;
            crashsafe::replace(&certificate, made.pem().as_bytes())?;
        }
        Self::read(&certificate, &key)
    }

    /// By what clients that pin know it.
    pub fn fingerprint(&self) -> Fingerprint {
        Fingerprint::of(self.0.cert.first().map_or(&[], |certificate| certificate.as_ref()))
    }

    fn resolver(&self) -> Arc<SingleCertAndKey> {
        Arc::new(SingleCertAndKey::from(self.0.clone()))
    }
}

/// The certificates of a PEM file, one at least.
///
/// # Errors
/// When there is none.
pub fn read_certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, CertificateError> {
    let wrong = |reason: String| CertificateError::File { path: path.to_owned(), reason };
    let all: Vec<_> = CertificateDer::pem_file_iter(path)
        .and_then(Iterator::collect)
        .map_err(|error| wrong(format!("no certificates: {error}")))?;
    if all.is_empty() {
        return Err(wrong("holds no certificate".to_owned()));
    }
    Ok(all)
}

fn parameters(names: &[String]) -> Result<CertificateParams, rcgen::Error> {
    let mut parameters = CertificateParams::new(names)?;
    let mut name = DistinguishedName::new();
    name.push(DnType::CommonName, "replicator API");
    parameters.distinguished_name = name;
    parameters.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
    parameters.use_authority_key_identifier_extension = true;
    Ok(parameters)
}

/// What a certificate of a server at `address` is for: the names by which
/// clients may call it.
pub fn names(address: IpAddr, hosts: &[String]) -> Vec<String> {
    let own = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let own = own.trim().to_ascii_lowercase();
    let mut names = vec!["localhost".to_owned(), "127.0.0.1".to_owned(), "::1".to_owned()];
    names.extend(Some(own).filter(|name| crate::config::is_host_name(name)));
    names.extend(Some(address.to_string()).filter(|_| !address.is_unspecified()));
    names.extend(hosts.iter().cloned());
    names.sort_unstable();
    names.dedup();
    names
}

/// A server's TLS. With `clients`, those that have a certificate may show it;
/// whose it is, the API looks at.
///
/// # Errors
/// When the certificate is of no use.
pub fn server(certificate: &Certificate, clients: bool) -> Result<Arc<ServerConfig>, Error> {
    let builder = ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])?;
    let builder = if clients {
        builder.with_client_cert_verifier(Arc::new(AnyClient(Signatures::new(provider()))))
    } else {
        builder.with_no_client_auth()
    };
    let mut config = builder.with_cert_resolver(certificate.resolver());
    config.alpn_protocols = vec![ALPN.to_vec()];
    // A resumed handshake shows no certificate of the client.
    config.send_tls13_tickets = 0;
    config.session_storage = Arc::new(NoServerSessionStorage {});
    Ok(Arc::new(config))
}

/// What a client takes for the server it means.
#[derive(Clone, Debug)]
pub enum Trusted {
    /// The one with this certificate, whatever its name.
    Pinned(Fingerprint),
    /// Those with the endpoint's name that one of these authorities vouches for.
    Authorities(Vec<CertificateDer<'static>>),
}

/// A client's TLS.
///
/// # Errors
/// When an authority's certificate is none.
pub fn client(trusted: &Trusted, own: Option<&Certificate>) -> Result<Arc<ClientConfig>, Error> {
    let builder = ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .dangerous();
    let builder = match trusted {
        Trusted::Pinned(fingerprint) => {
            builder.with_custom_certificate_verifier(Arc::new(PinnedServer::new(*fingerprint)))
        }
        Trusted::Authorities(authorities) => {
            let mut roots = RootCertStore::empty();
            for authority in authorities {
                roots.add(authority.clone())?;
            }
            let verifier = WebPkiServerVerifier::builder_with_provider(Arc::new(roots), provider())
                .build()
                .map_err(|error| Error::General(error.to_string()))?;
            builder.with_custom_certificate_verifier(verifier)
        }
    };
    let mut config = match own {
        Some(own) => builder.with_client_cert_resolver(own.resolver()),
        None => builder.with_no_client_auth(),
    };
    config.alpn_protocols = vec![ALPN.to_vec()];
    config.resumption = Resumption::disabled();
    Ok(Arc::new(config))
}

/// Lets every client in that holds the key of the certificate it shows, and
/// every one that shows none: it may have an access key.
struct AnyClient(Signatures);

impl fmt::Debug for AnyClient {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("AnyClient")
    }
}

impl ClientCertVerifier for AnyClient {
    fn client_auth_mandatory(&self) -> bool {
        false
    }

    fn root_hint_subjects(&self) -> &[Subject] {
        &[]
    }

    fn verify_client_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        Ok(ClientCertVerified::assertion())
    }

    signature_checks!(0);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_certificate_is_made_once_with_a_private_key() {
        use std::os::unix::fs::PermissionsExt;
        let directory = tempfile::tempdir().unwrap();
        let names = names("192.0.2.7".parse().unwrap(), &["replica.example.org".to_owned()]);
        for name in ["192.0.2.7", "localhost", "replica.example.org"] {
            assert!(names.iter().any(|other| other == name), "{name} in {names:?}");
        }
        let first = Certificate::load_or_create(directory.path(), &names).unwrap();
        let second = Certificate::load_or_create(directory.path(), &[]).unwrap();
        assert_eq!(first.fingerprint(), second.fingerprint());
        let mode = std::fs::metadata(directory.path().join(KEY_FILE)).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        assert!(!format!("{first:?}").contains("PRIVATE"));
    }

    #[test]
    fn files_that_do_not_go_together_are_named() {
        let (one, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        Certificate::load_or_create(one.path(), &[]).unwrap();
        Certificate::load_or_create(other.path(), &[]).unwrap();
        let certificate = one.path().join(CERTIFICATE_FILE);
        for (key, said) in [
            (other.path().join(KEY_FILE), "key of another certificate"),
            (certificate.clone(), "no private key"),
            (one.path().join("missing"), "no private key"),
        ] {
            let error = Certificate::read(&certificate, &key).unwrap_err().to_string();
            assert!(error.contains(said) && error.contains(key.to_str().unwrap()), "{error}");
        }
        assert!(read_certificates(&one.path().join(KEY_FILE)).is_err());
    }
}
