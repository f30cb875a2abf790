//! Certificates, QUIC, frames, enrolment: how two sides find, know and talk
//! to each other.
//!
//! - [`identity`]: a side's certificate and key, and the fingerprint by which
//!   the other side knows it.
//! - [`tls`]: TLS 1.3 with both certificates pinned by fingerprint.
//! - [`quic`]: endpoints, connections, who is admitted after the handshake.
//! - [`frame`]: the envelope of every message on a stream.
//! - [`https`]: TLS 1.3 of the HTTP API.
//! - [`token`]: the one line an operator carries from destination to source.
//! - [`clock`]: by how much one side's clock is ahead of the other's.
//! - [`enrol`]: how a token becomes a pair of pinned certificates.

pub mod clock;
mod congestion;
pub mod enrol;
pub mod frame;
pub mod https;
pub mod identity;
pub mod quic;
mod socket;
pub mod tls;
pub mod token;

#[cfg(test)]
mod tests;

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use self::identity::Fingerprint;

/// Why an endpoint could not be opened or a peer not be reached.
#[derive(Debug, thiserror::Error)]
pub enum NetError {
    /// Another process listens there.
    #[error("{address} (UDP) is in use by another process")]
    AddressInUse {
        /// Where we wanted to listen.
        address: SocketAddr,
    },
    /// The socket could not be opened or bound.
    #[error("cannot open a UDP socket on {address}: {source}")]
    Bind {
        /// Where.
        address: SocketAddr,
        /// What the system said.
        source: io::Error,
    },
    /// The text is not `HOST:PORT`.
    #[error(
        "{text:?} is not an address of the form HOST:PORT (an IPv6 address stands in brackets)"
    )]
    InvalidAddress {
        /// What was given.
        text: String,
    },
    /// The name has no address.
    #[error("cannot resolve {host:?}: {reason}")]
    Resolve {
        /// The `HOST:PORT` that was asked for.
        host: String,
        /// What the resolver said.
        reason: String,
    },
    /// Nobody answered.
    #[error("no answer from {address} within {} s (is it running, and does UDP get through?)", waited.as_secs())]
    TimedOut {
        /// Whom we called.
        address: SocketAddr,
        /// For how long.
        waited: Duration,
    },
    /// Another server than the pinned one answers there.
    #[error(
        "{address} has certificate {found}, expected {expected}: this is not the enrolled peer"
    )]
    WrongServer {
        /// Who answered.
        address: SocketAddr,
        /// The pinned fingerprint.
        expected: Fingerprint,
        /// The one presented.
        found: Fingerprint,
    },
    /// The peer does not know our certificate, or not for this purpose.
    #[error("{address} refuses our certificate: it is not enrolled there")]
    Refused {
        /// Who refused.
        address: SocketAddr,
    },
    /// The peer speaks no protocol version of ours.
    #[error("{address} speaks another version of the protocol")]
    Protocol {
        /// Who.
        address: SocketAddr,
    },
    /// We do not admit this peer (see [`quic::admit`]).
    #[error("peer {address} is not admitted: {reason}")]
    NotAdmitted {
        /// Who wanted in.
        address: SocketAddr,
        /// Why not.
        reason: &'static str,
    },
    /// The connection broke.
    #[error("connection with {address}: {source}")]
    Connection {
        /// With whom.
        address: SocketAddr,
        /// What quinn said.
        source: quinn::ConnectionError,
    },
    /// TLS cannot be set up with our own certificate and key.
    #[error("cannot set up TLS: {0}")]
    Tls(#[from] rustls::Error),
    /// Our own settings were rejected; a defect of ours.
    #[error("cannot set up QUIC: {0}")]
    Setup(String),
}
