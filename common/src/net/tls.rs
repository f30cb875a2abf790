//! TLS 1.3 in which each side knows the other by its certificate's fingerprint.
//!
//! There is no authority and no name: the verifiers below compare the SHA-256
//! of the presented certificate with what is pinned, and check by the
//! handshake's signature that the peer holds its key. Validity dates are not
//! looked at, because a pin is revoked by removing it, not by a date.
//!
//! Sessions are never resumed, and 0-RTT is off: a resumed handshake does not
//! present the client's certificate again, so that a removed pin would go on
//! opening the door for as long as a ticket lives.

use std::fmt;
use std::sync::{Arc, OnceLock};

use rustls::client::Resumption;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::aws_lc_rs::{self, cipher_suite};
use rustls::crypto::{CryptoProvider, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{NoServerSessionStorage, ServerConfig};
use rustls::sign::SingleCertAndKey;
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, DistinguishedName, Error,
    PeerIncompatible, SignatureScheme,
};

use super::identity::{Fingerprint, Identity};
use crate::wire;

/// Whom a server lets in. Asked during each handshake, so the answers must be
/// quick (no disk, no long lock) and may change at any time.
pub trait Trust: Send + Sync {
    /// Whether the certificate is one of an enrolled peer.
    fn is_pinned(&self, fingerprint: &Fingerprint) -> bool;
    /// Whether a token that was issued is still waiting to be redeemed. Only
    /// then may an unknown certificate pass the handshake, and only to enrol.
    fn enrolment_open(&self) -> bool;
}

/// The cryptography of both sides. AES-128-GCM comes first: it is the cheapest
/// where the processor has AES, and QUIC needs it for the first packets anyway.
pub(super) fn provider() -> Arc<CryptoProvider> {
    Arc::new(CryptoProvider {
        cipher_suites: vec![
            cipher_suite::TLS13_AES_128_GCM_SHA256,
            cipher_suite::TLS13_AES_256_GCM_SHA384,
            cipher_suite::TLS13_CHACHA20_POLY1305_SHA256,
        ],
        ..aws_lc_rs::default_provider()
    })
}

/// A client's TLS for one connection to the one server with that fingerprint,
/// speaking `alpn`. The second value holds the fingerprint of whoever answered,
/// once it did, for the error message.
pub(super) fn client(
    identity: &Identity,
    server: Fingerprint,
    alpn: &[u8],
) -> Result<(ClientConfig, Arc<OnceLock<Fingerprint>>), Error> {
    let provider = provider();
    let verifier = PinnedServer::new(server);
    let seen = Arc::clone(&verifier.seen);
    let mut config = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(verifier))
        .with_client_cert_resolver(Arc::new(SingleCertAndKey::from(identity.certified())));
    config.alpn_protocols = vec![alpn.to_vec()];
    config.resumption = Resumption::disabled();
    config.enable_sni = false;
    Ok((config, seen))
}

/// A server's TLS: replication for pinned clients, and enrolment.
pub(super) fn server(identity: &Identity, trust: Arc<dyn Trust>) -> Result<ServerConfig, Error> {
    let provider = provider();
    let verifier = TrustedClients { trust, signatures: Signatures(Arc::clone(&provider)) };
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_client_cert_verifier(Arc::new(verifier))
        .with_cert_resolver(Arc::new(SingleCertAndKey::from(identity.certified())));
    config.alpn_protocols = vec![wire::ALPN.to_vec(), wire::ALPN_ENROL.to_vec()];
    config.ignore_client_order = true;
    config.send_tls13_tickets = 0;
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.max_early_data_size = 0;
    Ok(config)
}

/// Proof that the peer holds the key of the certificate it presents. Both
/// verifiers need it: a fingerprint alone is public.
pub(super) struct Signatures(Arc<CryptoProvider>);

impl Signatures {
    pub(super) fn new(provider: Arc<CryptoProvider>) -> Self {
        Self(provider)
    }

    pub(super) fn tls13(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let algorithms = &self.0.signature_verification_algorithms;
        verify_tls13_signature(message, certificate, signature, algorithms)
    }

    /// Never asked for, because TLS 1.2 is not offered; refused all the same.
    pub(super) fn tls12() -> Result<HandshakeSignatureValid, Error> {
        Err(Error::PeerIncompatible(PeerIncompatible::ServerDoesNotSupportTls12Or13))
    }

    pub(super) fn schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}

/// The methods of a verifier, of either side, that its member of [`Signatures`]
/// answers.
macro_rules! signature_checks {
    ($member:tt) => {
        fn verify_tls12_signature(
            &self,
            _: &[u8],
            _: &rustls::pki_types::CertificateDer<'_>,
            _: &rustls::DigitallySignedStruct,
        ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
            $crate::net::tls::Signatures::tls12()
        }

        fn verify_tls13_signature(
            &self,
            message: &[u8],
            certificate: &rustls::pki_types::CertificateDer<'_>,
            signature: &rustls::DigitallySignedStruct,
        ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
            self.$member.tls13(message, certificate, signature)
        }

        fn supported_verify_schemes(&self) -> Vec<rustls::SignatureScheme> {
            self.$member.schemes()
        }
    };
}
pub(super) use signature_checks;

/// The client's view: one server and no other.
pub(super) struct PinnedServer {
    expected: Fingerprint,
    seen: Arc<OnceLock<Fingerprint>>,
    signatures: Signatures,
}

impl PinnedServer {
    pub(super) fn new(expected: Fingerprint) -> Self {
        Self { expected, seen: Arc::default(), signatures: Signatures(provider()) }
    }
}

impl fmt::Debug for PinnedServer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PinnedServer({})", self.expected)
    }
}

impl ServerCertVerifier for PinnedServer {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let found = Fingerprint::of(end_entity);
        self.seen.get_or_init(|| found);
        if found == self.expected {
            Ok(ServerCertVerified::assertion())
        } else {
            Err(Error::InvalidCertificate(CertificateError::ApplicationVerificationFailure))
        }
    }

    signature_checks!(signatures);
}

/// The server's view: pinned clients, and anyone while an enrolment is open.
/// A verifier does not see the ALPN; [`super::quic::admit`] does the rest.
struct TrustedClients {
    trust: Arc<dyn Trust>,
    signatures: Signatures,
}

impl fmt::Debug for TrustedClients {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("TrustedClients")
    }
}

impl ClientCertVerifier for TrustedClients {
    fn client_auth_mandatory(&self) -> bool {
        true
    }

    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        if self.trust.is_pinned(&Fingerprint::of(end_entity)) || self.trust.enrolment_open() {
            Ok(ClientCertVerified::assertion())
        } else {
            Err(Error::InvalidCertificate(CertificateError::ApplicationVerificationFailure))
        }
    }

    signature_checks!(signatures);
}
