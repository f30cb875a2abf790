//! QUIC endpoints and connections: [`listen`] and [`accept`] at the
//! destination, [`dial`] (or [`connect`] on an endpoint of one's own) at the
//! source.
//!
//! # Memory
//! A connection buffers at most its receive window of data that the
//! application has not read, and its send window of data that the peer has not
//! acknowledged: 128 MiB each across a network (10 Gbit/s × 100 ms =
//! 125 MB), 20 MiB and 16 MiB on loopback. Only a slow reader, or a sender that
//! is faster than the path, reaches them. An endpoint's receive buffer has room for
//! 31 MiB, of which 2 MiB are ever filled (a datagram, or those that the kernel puts
//! together, are 64 KiB at most).
//!
//! # Where the time goes
//! On loopback the cost is packets, so they are as large as is safe (see
//! [`LOOPBACK_MTU`]) and leave by segmentation offload. (Where the interface was given a
//! smaller MTU they are lost, until QUIC takes that for a black hole, and sends short
//! ones.) Across a network the path's MTU is discovered. For long paths the kernel should
//! allow socket buffers of [`SOCKET_BUFFER`] (`net.core.rmem_max`, `net.core.wmem_max`).
//! Clients may change address in the middle of a connection.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::sync::Arc;
use std::time::Duration;

use quinn::crypto::rustls::{HandshakeData, QuicClientConfig, QuicServerConfig};
use quinn::rustls::pki_types::CertificateDer;
use quinn::udp::{UdpSockRef, UdpSocketState};
use quinn::{
    AckFrequencyConfig, ClientConfig, Connection, ConnectionError, Endpoint, EndpointConfig,
    Incoming, MtuDiscoveryConfig, ServerConfig, TransportConfig, VarInt,
};
use tokio::time::Instant;

use super::NetError;
use super::congestion::MeasuredConfig;
use super::identity::{Fingerprint, Identity, SERVER_NAME};
use super::socket::Limited;
use super::tls::{self, Trust};
use crate::wire;

/// How long [`connect`] waits for the handshake and the server's consent.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// A connection on which nothing arrived for this long is dead, in
/// milliseconds.
pub const IDLE_TIMEOUT_MILLIS: u32 = 15_000;
/// How often an idle connection is kept alive; four may be lost in a row.
pub const KEEP_ALIVE: Duration = Duration::from_secs(3);
/// The largest UDP payload sent on loopback, bytes: the headers of a handshake's packets
/// tell lengths below 16,384 only. Longer ones gained little more (bench/NOTES.md).
pub const LOOPBACK_MTU: u16 = 16_000;
/// Packets of that length which are handed to the kernel at once: 64,000 bytes.
const LOOPBACK_PACKETS: usize = 4;
/// The longest UDP payload, bytes: an offloaded send above it fails without an error.
const SEND_MAX: usize = 65_507;
const _: () = assert!(LOOPBACK_MTU as usize * LOOPBACK_PACKETS <= SEND_MAX);
/// What a reader on loopback may leave unread of one stream, bytes. quinn copies all that
/// waits of a stream whenever that is more than 2048 packets: when those were shorter, with
/// a window of 16 MiB, a slow disk cost half of the receiver's time in copies. And what
/// waits for long is no longer in the processor's cache.
const LOOPBACK_STREAM_WINDOW: u32 = 4 << 20;
/// The same of all streams: what is said of the session finds room beside full data
/// streams.
const LOOPBACK_WINDOW: u32 = (wire::DATA_STREAMS as u32 + 1) * LOOPBACK_STREAM_WINDOW;
/// Socket buffers asked for, bytes. The kernel silently grants less when its
/// limit is lower.
pub const SOCKET_BUFFER: usize = 8 << 20;
/// Handshakes in flight at a server; those above are dropped, and tried again
/// by the client.
const MAX_INCOMING: usize = 256;
/// Between attempts at the several addresses of a name, so that the first gets
/// its chance before the next is tried beside it.
const STAGGER: Duration = Duration::from_millis(300);

/// Application close code: the connection is no longer needed.
pub const CLOSE_DONE: VarInt = VarInt::from_u32(0);
/// Application close code: the peer is not admitted.
pub const CLOSE_REFUSED: VarInt = VarInt::from_u32(1);
/// Application close code: the peer broke the protocol.
pub const CLOSE_PROTOCOL: VarInt = VarInt::from_u32(2);

/// TLS alerts by which a peer says that it does not take our certificate:
/// bad_certificate to access_denied, and certificate_required.
const ALERTS_REFUSED: [u64; 8] = [42, 43, 44, 45, 46, 48, 49, 116];
/// TLS alert no_application_protocol.
const ALERT_NO_PROTOCOL: u64 = 120;
/// QUIC's transport error for a TLS alert is this plus the alert (RFC 9001, 4.8).
const CRYPTO_ERROR: u64 = 0x100;

// ---------------------------------------------------------------- settings

/// What lies between two peers.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Path {
    Loopback,
    Network,
}

impl Path {
    fn to(address: IpAddr) -> Self {
        if address.to_canonical().is_loopback() { Self::Loopback } else { Self::Network }
    }
}

/// Asks the peer to acknowledge every tenth packet at once in place of every second:
/// what it has to say itself, a batch that is applied mostly, carries the
/// acknowledgement of small ones.
fn acknowledgements() -> AckFrequencyConfig {
    let mut config = AckFrequencyConfig::default();
    config.ack_eliciting_threshold(VarInt::from_u32(9));
    config
}

fn transport(path: Path) -> Arc<TransportConfig> {
    let mut config = TransportConfig::default();
    config
        .max_concurrent_bidi_streams(VarInt::from_u32(4))
        .max_concurrent_uni_streams(VarInt::from_u32(16))
        .datagram_receive_buffer_size(None)
        .max_idle_timeout(Some(VarInt::from_u32(IDLE_TIMEOUT_MILLIS).into()))
        .keep_alive_interval(Some(KEEP_ALIVE))
        // On loopback too: a receiver that is not scheduled for a while overflows its
        // socket, and cubic takes a third of the window back for it.
        .congestion_controller_factory(Arc::new(MeasuredConfig))
        .ack_frequency_config(Some(acknowledgements()));
    match path {
        Path::Loopback => {
            let mut discovery = MtuDiscoveryConfig::default();
            discovery.upper_bound(LOOPBACK_MTU);
            config
                .initial_mtu(LOOPBACK_MTU)
                .mtu_discovery_config(Some(discovery))
                .stream_receive_window(VarInt::from_u32(LOOPBACK_STREAM_WINDOW))
                .receive_window(VarInt::from_u32(LOOPBACK_WINDOW))
                .send_window(16 << 20);
        }
        Path::Network => {
            config
                .stream_receive_window(VarInt::from_u32(64 << 20))
                .receive_window(VarInt::from_u32(128 << 20))
                .send_window(128 << 20);
        }
    }
    Arc::new(config)
}

/// `path` is the one whose [`transport`] its connections have.
fn endpoint(
    address: SocketAddr,
    path: Path,
    server: Option<ServerConfig>,
) -> Result<Endpoint, NetError> {
    let failed = |source: io::Error| match source.kind() {
        io::ErrorKind::AddrInUse => NetError::AddressInUse { address },
        _ => NetError::Bind { address, source },
    };
    let socket = UdpSocket::bind(address).map_err(failed)?;
    enlarge_buffers(&socket);
    let mut config = EndpointConfig::default();
    // What we are ready to receive, whatever the path: the sender chooses.
    config
        .max_udp_payload_size(LOOPBACK_MTU)
        .map_err(|error| NetError::Setup(error.to_string()))?;
    let runtime =
        quinn::default_runtime().ok_or_else(|| NetError::Setup("no async runtime".to_owned()))?;
    let mut socket = runtime.wrap_udp_socket(socket).map_err(failed)?;
    if path == Path::Loopback {
        socket = Arc::new(Limited::new(socket, LOOPBACK_PACKETS));
    }
    Endpoint::new_with_abstract_socket(config, server, socket, runtime).map_err(failed)
}

/// Enlarges what a burst may fill. A refusal costs speed, not correctness.
fn enlarge_buffers(socket: &UdpSocket) {
    let enlarged = UdpSocketState::new(UdpSockRef::from(socket)).and_then(|state| {
        state.set_send_buffer_size(UdpSockRef::from(socket), SOCKET_BUFFER)?;
        state.set_recv_buffer_size(UdpSockRef::from(socket), SOCKET_BUFFER)?;
        state.recv_buffer_size(UdpSockRef::from(socket))
    });
    match enlarged {
        Ok(granted) if granted < SOCKET_BUFFER => {
            tracing::debug!(granted, wanted = SOCKET_BUFFER, "net.core.rmem_max limits the socket");
        }
        Ok(_) => {}
        Err(error) => tracing::debug!(%error, "socket buffers stay as they are"),
    }
}

// ---------------------------------------------------------------- server

/// Opens a server's endpoint on a UDP address. Each [`Incoming`] it yields is
/// to be given to [`accept`], in a task of its own: a peer that dawdles in its
/// handshake must not hold up the next one.
///
/// # Errors
/// [`NetError::AddressInUse`] names the address; other errors say what the
/// system or TLS said.
pub fn listen(
    address: SocketAddr,
    identity: &Identity,
    trust: Arc<dyn Trust>,
) -> Result<Endpoint, NetError> {
    let tls = tls::server(identity, trust)?;
    let crypto =
        QuicServerConfig::try_from(tls).map_err(|error| NetError::Setup(error.to_string()))?;
    let path = Path::to(address.ip());
    let mut config = ServerConfig::with_crypto(Arc::new(crypto));
    config.transport_config(transport(path)).migration(true).max_incoming(MAX_INCOMING);
    endpoint(address, path, Some(config))
}

/// What an admitted peer may do, and who it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Admission {
    /// A pinned peer that speaks [`wire::ALPN`].
    Session(Fingerprint),
    /// A peer that speaks [`wire::ALPN_ENROL`]: pinned, or unknown while an
    /// enrolment is open. It may present a token and nothing else.
    Enrolment(Fingerprint),
}

/// Finishes the handshake and decides on admission, before anything that the
/// peer sent on a stream is looked at.
///
/// # Errors
/// [`NetError::NotAdmitted`] when the peer may not do what it asks for;
/// [`NetError::Connection`] when the handshake fails, which is where an unknown
/// certificate usually ends.
pub async fn accept(
    incoming: Incoming,
    trust: &dyn Trust,
) -> Result<(Connection, Admission), NetError> {
    let address = incoming.remote_address();
    let connection = incoming.await.map_err(|source| NetError::Connection { address, source })?;
    let admission = admit(&connection, trust)?;
    Ok((connection, admission))
}

/// Decides what the peer of a finished handshake may do. A peer that may do
/// nothing finds its connection closed with [`CLOSE_REFUSED`].
///
/// The handshake alone does not decide, because the TLS verifier does not see
/// the ALPN, and because a pin can be removed while a handshake is under way.
///
/// # Errors
/// [`NetError::NotAdmitted`].
pub fn admit(connection: &Connection, trust: &dyn Trust) -> Result<Admission, NetError> {
    decide(peer_fingerprint(connection), alpn(connection).as_deref(), trust).map_err(|reason| {
        connection.close(CLOSE_REFUSED, reason.as_bytes());
        NetError::NotAdmitted { address: connection.remote_address(), reason }
    })
}

fn decide(
    peer: Option<Fingerprint>,
    alpn: Option<&[u8]>,
    trust: &dyn Trust,
) -> Result<Admission, &'static str> {
    let peer = peer.ok_or("no certificate")?;
    let pinned = trust.is_pinned(&peer);
    match alpn {
        Some(wire::ALPN) if pinned => Ok(Admission::Session(peer)),
        Some(wire::ALPN) => Err("not enrolled"),
        // A pinned peer may ask again: the answer to its enrolment was lost.
        Some(wire::ALPN_ENROL) if pinned || trust.enrolment_open() => {
            Ok(Admission::Enrolment(peer))
        }
        Some(wire::ALPN_ENROL) => Err("no enrolment is open"),
        _ => Err("unknown protocol"),
    }
}

/// The certificate by which the peer authenticated; `None` before the end of
/// the handshake.
pub fn peer_fingerprint(connection: &Connection) -> Option<Fingerprint> {
    let chain = connection.peer_identity()?.downcast::<Vec<CertificateDer<'static>>>().ok()?;
    chain.first().map(|certificate| Fingerprint::of(certificate))
}

/// The protocol agreed on.
pub fn alpn(connection: &Connection) -> Option<Vec<u8>> {
    connection.handshake_data()?.downcast::<HandshakeData>().ok()?.protocol
}

// ---------------------------------------------------------------- client

/// Opens an endpoint for connections to `server`, and to others of its family that are
/// on loopback where it is, or not where it is not.
///
/// # Errors
/// [`NetError::Bind`] when the system gives no socket.
pub fn client_endpoint(server: SocketAddr) -> Result<Endpoint, NetError> {
    let path = Path::to(server.ip());
    let local: IpAddr = match (server, path) {
        // Loopback stays on loopback: nobody else can reach the socket.
        (SocketAddr::V4(_), Path::Loopback) => Ipv4Addr::LOCALHOST.into(),
        (SocketAddr::V6(v6), Path::Loopback) if v6.ip().is_loopback() => Ipv6Addr::LOCALHOST.into(),
        (SocketAddr::V4(_), _) => Ipv4Addr::UNSPECIFIED.into(),
        (SocketAddr::V6(_), _) => Ipv6Addr::UNSPECIFIED.into(),
    };
    endpoint(SocketAddr::new(local, 0), path, None)
}

/// Connects to the server with that fingerprint. Whether it takes our certificate is
/// known a round trip later: what is sent until then arrives with the certificate, and
/// its answer is to be awaited with [`answer_of`].
///
/// # Errors
/// [`NetError::TimedOut`] after [`CONNECT_TIMEOUT`]; [`NetError::WrongServer`] when it is
/// another; [`NetError::Protocol`] when it does not speak `alpn`.
pub async fn connect(
    endpoint: &Endpoint,
    identity: &Identity,
    address: SocketAddr,
    server: Fingerprint,
    alpn: &[u8],
) -> Result<Connection, NetError> {
    connect_within(CONNECT_TIMEOUT, endpoint, identity, address, server, alpn).await
}

/// [`connect`] with a patience of one's own.
pub(super) async fn connect_within(
    patience: Duration,
    endpoint: &Endpoint,
    identity: &Identity,
    address: SocketAddr,
    server: Fingerprint,
    alpn: &[u8],
) -> Result<Connection, NetError> {
    let (tls, seen) = tls::client(identity, server, alpn)?;
    let crypto =
        QuicClientConfig::try_from(tls).map_err(|error| NetError::Setup(error.to_string()))?;
    let mut config = ClientConfig::new(Arc::new(crypto));
    config.transport_config(transport(Path::to(address.ip())));
    let handshake = async {
        endpoint
            .connect_with(config, address, SERVER_NAME)
            .map_err(|error| NetError::Setup(error.to_string()))?
            .await
            .map_err(|source| explain(address, source))
    };
    let result = tokio::time::timeout(patience, handshake)
        .await
        .unwrap_or(Err(NetError::TimedOut { address, waited: patience }));
    match (result, seen.get()) {
        (Err(NetError::Connection { .. }), Some(&found)) if found != server => {
            Err(NetError::WrongServer { address, expected: server, found })
        }
        (result, _) => result,
    }
}

/// Awaits the answer to the first words on a connection that was just opened.
///
/// # Errors
/// [`NetError::Refused`] when the server does not take our certificate;
/// [`NetError::TimedOut`] when it has not said that it does after [`CONNECT_TIMEOUT`];
/// [`NetError::Connection`] when the connection ended until then. What came of `answer` else
/// is for the caller.
pub async fn answer_of<T, E>(
    connection: &Connection,
    answer: impl Future<Output = Result<T, E>>,
) -> Result<Result<T, E>, NetError> {
    let address = connection.remote_address();
    let mut answer = std::pin::pin!(answer);
    tokio::select! {
        biased;
        answer = &mut answer => {
            let ended = connection.close_reason().filter(|_| !is_confirmed(connection));
            return match (answer, ended) {
                (Err(_), Some(reason)) => Err(explain(address, reason)),
                (answer, _) => Ok(answer),
            };
        }
        accepted = accepted(connection) => accepted?,
    }
    Ok(answer.await)
}

/// Waits until the server has taken our certificate; errors as of [`answer_of`].
pub(super) async fn accepted(connection: &Connection) -> Result<(), NetError> {
    let address = connection.remote_address();
    tokio::time::timeout(CONNECT_TIMEOUT, confirmed(connection))
        .await
        .map_err(|_| NetError::TimedOut { address, waited: CONNECT_TIMEOUT })?
        .map_err(|source| explain(address, source))
}

fn is_confirmed(connection: &Connection) -> bool {
    connection.stats().frame_rx.handshake_done > 0
}

/// Waits until the server has checked our certificate. A TLS 1.3 client is done
/// before that; the server's HANDSHAKE_DONE frame tells (RFC 9001, 4.1.2).
/// quinn has no event for it, only a count.
async fn confirmed(connection: &Connection) -> Result<(), ConnectionError> {
    let mut pause = Duration::from_micros(200);
    while !is_confirmed(connection) {
        tokio::select! {
            error = connection.closed() => return Err(error),
            () = tokio::time::sleep(pause) => pause = (pause * 2).min(Duration::from_millis(20)),
        }
    }
    Ok(())
}

/// Why a connection ended, in words for people; `None` while it is open. What a
/// stream says of it is only that it is gone.
pub fn ending(connection: &Connection) -> Option<String> {
    let peer = connection.remote_address();
    Some(match connection.close_reason()? {
        ConnectionError::TimedOut => {
            let seconds = IDLE_TIMEOUT_MILLIS / 1000;
            format!("nothing was heard from {peer} for {seconds} s")
        }
        ConnectionError::ApplicationClosed(close) if !close.reason.is_empty() => {
            let reason = String::from_utf8_lossy(&close.reason);
            format!("{peer} ended the connection: {reason}")
        }
        ConnectionError::Reset => format!("{peer} knows nothing of the connection any more"),
        other => format!("connection with {peer}: {other}"),
    })
}

/// Finds the words for the ways in which a peer can turn us away.
pub fn explain(address: SocketAddr, source: ConnectionError) -> NetError {
    match &source {
        ConnectionError::ConnectionClosed(close) => {
            match u64::from(close.error_code).wrapping_sub(CRYPTO_ERROR) {
                ALERT_NO_PROTOCOL => NetError::Protocol { address },
                alert if ALERTS_REFUSED.contains(&alert) => NetError::Refused { address },
                _ => NetError::Connection { address, source },
            }
        }
        ConnectionError::ApplicationClosed(close) if close.error_code == CLOSE_REFUSED => {
            NetError::Refused { address }
        }
        ConnectionError::VersionMismatch => NetError::Protocol { address },
        _ => NetError::Connection { address, source },
    }
}

/// The addresses of `HOST:PORT`, in the resolver's order, at least one.
///
/// # Errors
/// [`NetError::InvalidAddress`] or [`NetError::Resolve`].
pub async fn resolve(host_port: &str) -> Result<Vec<SocketAddr>, NetError> {
    check_host_port(host_port)?;
    let failed = |reason: String| NetError::Resolve { host: host_port.to_owned(), reason };
    let addresses: Vec<SocketAddr> = tokio::net::lookup_host(host_port)
        .await
        .map_err(|error| failed(error.to_string()))?
        .collect();
    if addresses.is_empty() { Err(failed("it has no address".to_owned())) } else { Ok(addresses) }
}

/// Whether a text has the form `HOST:PORT` with a port that can be called.
///
/// # Errors
/// [`NetError::InvalidAddress`].
pub fn check_host_port(text: &str) -> Result<(), NetError> {
    let valid = text.rsplit_once(':').is_some_and(|(host, port)| {
        let bracketed = host.strip_prefix('[').and_then(|rest| rest.strip_suffix(']'));
        let named = match bracketed {
            Some(inner) => inner.parse::<Ipv6Addr>().is_ok(),
            None => {
                let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b'_');
                (1..=253).contains(&host.len()) && host.bytes().all(plain)
            }
        };
        named && port.parse::<u16>().is_ok_and(|port| port != 0)
    });
    if valid { Ok(()) } else { Err(NetError::InvalidAddress { text: text.to_owned() }) }
}

/// Resolves `HOST:PORT` and connects to the first of its addresses that
/// answers, on an endpoint of its own (kept alive by the connection). Further
/// addresses are tried beside the first after a moment, so that a name with a
/// dead IPv6 address does not cost the whole timeout.
///
/// Its first answer is to be awaited with [`answer_of`].
///
/// # Errors
/// As [`resolve`] and [`connect`]; when all addresses fail, the error that says
/// more than "no answer", if there is one.
pub async fn dial(
    identity: &Identity,
    host_port: &str,
    server: Fingerprint,
    alpn: &[u8],
) -> Result<Connection, NetError> {
    let begin = Instant::now();
    let mut attempts = tokio::task::JoinSet::new();
    for (i, address) in (0u32..).zip(resolve(host_port).await?) {
        let (identity, alpn) = (identity.clone(), alpn.to_vec());
        attempts.spawn(async move {
            tokio::time::sleep_until(begin + STAGGER * i).await;
            let endpoint = client_endpoint(address)?;
            connect(&endpoint, &identity, address, server, &alpn).await
        });
    }
    let mut telling = None;
    while let Some(attempt) = attempts.join_next().await {
        match attempt {
            Ok(Ok(connection)) => return Ok(connection),
            Ok(Err(error)) => {
                if telling.is_none() || !matches!(error, NetError::TimedOut { .. }) {
                    telling = Some(error);
                }
            }
            Err(panicked) => telling = Some(NetError::Setup(panicked.to_string())),
        }
    }
    Err(telling.unwrap_or_else(|| NetError::Setup("no address was tried".to_owned())))
}
