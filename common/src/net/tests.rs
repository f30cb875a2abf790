//! Two endpoints on loopback: who gets in, who does not, and what arrives.

use std::collections::HashSet;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use quinn::{Connection, Endpoint};
use rand::{RngCore, SeedableRng, rngs::StdRng};
use serde_bytes::ByteBuf;
use tokio::sync::mpsc;

use super::enrol::{self, EnrolAnswer, EnrolError, EnrolRefusal, EnrolRequest, Enrolled, Tokens};
use super::frame::{Compression, FrameError, FrameReader, FrameWriter, encode_frame};
use super::identity::{Fingerprint, Identity};
use super::quic::{self, Admission};
use super::tls::Trust;
use super::token::{Secret, Token};
use super::*;
use crate::id::FileSystemId;
use crate::time::Timestamp;
use crate::wire::{self, Hash};

#[derive(Default)]
struct Guest {
    pinned: Mutex<HashSet<Fingerprint>>,
    open: AtomicBool,
}

impl Guest {
    fn pin(&self, identity: &Identity) {
        self.pinned.lock().unwrap().insert(identity.fingerprint());
    }

    fn unpin(&self, identity: &Identity) {
        self.pinned.lock().unwrap().remove(&identity.fingerprint());
    }
}

impl Trust for Guest {
    fn is_pinned(&self, fingerprint: &Fingerprint) -> bool {
        self.pinned.lock().unwrap().contains(fingerprint)
    }

    fn enrolment_open(&self) -> bool {
        self.open.load(Ordering::SeqCst)
    }
}

type Accepted = Result<(Connection, Admission), NetError>;

/// A server that accepts, and passes on what came of it.
struct Server {
    identity: Identity,
    address: SocketAddr,
    guests: Arc<Guest>,
    accepted: mpsc::UnboundedReceiver<Accepted>,
    _endpoint: Endpoint,
}

impl Server {
    fn start() -> Self {
        Self::start_as(Identity::ephemeral().unwrap(), "127.0.0.1:0")
    }

    fn start_as(identity: Identity, address: &str) -> Self {
        let guests = Arc::new(Guest::default());
        let endpoint = quic::listen(address.parse().unwrap(), &identity, guests.clone()).unwrap();
        let address = endpoint.local_addr().unwrap();
        let (send, accepted) = mpsc::unbounded_channel();
        let (listener, trust) = (endpoint.clone(), guests.clone());
        tokio::spawn(async move {
            while let Some(incoming) = listener.accept().await {
                if send.send(quic::accept(incoming, &*trust).await).is_err() {
                    return;
                }
            }
        });
        Self { identity, address, guests, accepted, _endpoint: endpoint }
    }

    async fn call(&self, client: &Identity, alpn: &[u8]) -> Result<Connection, NetError> {
        self.call_expecting(client, self.identity.fingerprint(), alpn).await
    }

    async fn call_expecting(
        &self,
        client: &Identity,
        server: Fingerprint,
        alpn: &[u8],
    ) -> Result<Connection, NetError> {
        let endpoint = quic::client_endpoint(self.address)?;
        let near = quic::connect(&endpoint, client, self.address, server, alpn).await?;
        quic::accepted(&near).await.map(|()| near)
    }

    async fn next(&mut self) -> Accepted {
        tokio::time::timeout(Duration::from_secs(5), self.accepted.recv()).await.unwrap().unwrap()
    }

    /// Both ends of an admitted session.
    async fn session(&mut self) -> (Connection, Connection) {
        let client = Identity::ephemeral().unwrap();
        self.guests.pin(&client);
        let near = self.call(&client, wire::ALPN).await.unwrap();
        let (far, admission) = self.next().await.unwrap();
        assert_eq!(admission, Admission::Session(client.fingerprint()));
        (near, far)
    }
}

fn stranger() -> Identity {
    Identity::ephemeral().unwrap()
}

// ---------------------------------------------------------------- who gets in

#[tokio::test]
async fn pinned_peers_meet() {
    let mut server = Server::start();
    let (near, _far) = server.session().await;
    assert_eq!(quic::peer_fingerprint(&near), Some(server.identity.fingerprint()));
    assert_eq!(quic::alpn(&near).as_deref(), Some(wire::ALPN));
}

#[tokio::test]
async fn ipv6_works_too() {
    if std::net::UdpSocket::bind("[::1]:0").is_err() {
        eprintln!("skipped: this machine has no IPv6");
        return;
    }
    let mut server = Server::start_as(stranger(), "[::1]:0");
    server.session().await;
}

#[tokio::test]
async fn an_unknown_client_is_refused_in_the_handshake() {
    let mut server = Server::start();
    for alpn in [wire::ALPN, wire::ALPN_ENROL] {
        let error = server.call(&stranger(), alpn).await.unwrap_err();
        assert!(matches!(error, NetError::Refused { address } if address == server.address));
        let error = server.next().await.unwrap_err();
        assert!(matches!(error, NetError::Connection { .. }), "{error}");
    }
}

#[tokio::test]
async fn a_stranger_may_enrol_while_an_enrolment_is_open_and_do_nothing_else() {
    let mut server = Server::start();
    server.guests.open.store(true, Ordering::SeqCst);
    let client = stranger();
    let _near = server.call(&client, wire::ALPN_ENROL).await.unwrap();
    let (_far, admission) = server.next().await.unwrap();
    assert_eq!(admission, Admission::Enrolment(client.fingerprint()));

    // The handshake lets it pass, the look after the handshake does not.
    let error = match server.call(&client, wire::ALPN).await {
        Ok(near) => quic::explain(server.address, near.closed().await),
        Err(error) => error,
    };
    assert!(matches!(error, NetError::Refused { .. }), "{error}");
    let error = server.next().await.unwrap_err();
    assert!(matches!(error, NetError::NotAdmitted { reason: "not enrolled", .. }), "{error}");
}

#[tokio::test]
async fn another_server_is_not_talked_to() {
    let mut server = Server::start();
    let (client, expected) = (stranger(), stranger().fingerprint());
    server.guests.pin(&client);
    let error = server.call_expecting(&client, expected, wire::ALPN).await.unwrap_err();
    let found = server.identity.fingerprint();
    assert!(
        matches!(error, NetError::WrongServer { expected: e, found: f, .. } if e == expected && f == found),
        "{error}"
    );
    assert!(server.next().await.is_err());
}

#[tokio::test]
async fn a_certificate_without_its_key_opens_nothing() {
    let mut server = Server::start();
    let known = stranger();
    server.guests.pin(&known);
    let thief = Identity::forged(&known, &stranger());
    assert!(server.call(&thief, wire::ALPN).await.is_err());
    assert!(server.next().await.is_err());

    let thief = Identity::forged(&server.identity, &stranger());
    let false_server = Server::start_as(thief, "127.0.0.1:0");
    false_server.guests.pin(&known);
    let error = false_server.call(&known, wire::ALPN).await.unwrap_err();
    assert!(matches!(error, NetError::Connection { .. }), "{error}");
}

#[tokio::test]
async fn a_client_without_a_certificate_is_refused() {
    let mut server = Server::start();
    server.guests.open.store(true, Ordering::SeqCst);
    let fingerprint = server.identity.fingerprint();
    let (mut tls, _) = tls::client(&stranger(), fingerprint, wire::ALPN_ENROL).unwrap();
    tls.client_auth_cert_resolver = Arc::new(NoCertificate);
    let crypto = quinn::crypto::rustls::QuicClientConfig::try_from(tls).unwrap();
    let config = quinn::ClientConfig::new(Arc::new(crypto));
    let endpoint = quic::client_endpoint(server.address).unwrap();
    let connecting = endpoint.connect_with(config, server.address, "replicator").unwrap();
    let error = match connecting.await {
        Ok(connection) => connection.closed().await,
        Err(error) => error,
    };
    assert!(matches!(quic::explain(server.address, error), NetError::Refused { .. }));
    assert!(server.next().await.is_err());
}

#[derive(Debug)]
struct NoCertificate;

impl rustls::client::ResolvesClientCert for NoCertificate {
    fn resolve(
        &self,
        _: &[&[u8]],
        _: &[rustls::SignatureScheme],
    ) -> Option<Arc<rustls::sign::CertifiedKey>> {
        None
    }

    fn has_certs(&self) -> bool {
        false
    }
}

#[tokio::test]
async fn a_removed_pin_closes_the_door_at_once() {
    let mut server = Server::start();
    let client = stranger();
    server.guests.pin(&client);
    let endpoint = quic::client_endpoint(server.address).unwrap();
    let (address, fingerprint) = (server.address, server.identity.fingerprint());
    let call = async || {
        let near = quic::connect(&endpoint, &client, address, fingerprint, wire::ALPN).await?;
        quic::accepted(&near).await
    };
    for _ in 0..2 {
        call().await.unwrap();
        server.next().await.unwrap();
    }
    server.guests.unpin(&client);
    let error = call().await.unwrap_err();
    assert!(matches!(error, NetError::Refused { .. }), "{error}");
}

/// The first words travel with the certificate; that it is not taken is their answer.
#[tokio::test]
async fn who_is_refused_learns_it_in_place_of_an_answer() {
    let mut server = Server::start();
    let stranger = stranger();
    let endpoint = quic::client_endpoint(server.address).unwrap();
    let expected = server.identity.fingerprint();
    let near = quic::connect(&endpoint, &stranger, server.address, expected, wire::ALPN);
    let near = near.await.unwrap();
    let ask = async {
        let (mut send, mut receive) = near.open_bi().await?;
        let _ = send.write_all(b"let me in").await;
        let mut answer = [0];
        receive.read(&mut answer).await.map_err(|_| near.close_reason().unwrap())
    };
    let error = quic::answer_of(&near, ask).await.unwrap_err();
    assert!(matches!(error, NetError::Refused { address } if address == server.address), "{error}");
    assert!(server.next().await.is_err());
}

#[tokio::test]
async fn another_protocol_version_is_named() {
    let server = Server::start();
    let client = stranger();
    server.guests.pin(&client);
    let error = server.call(&client, b"replicator/999").await.unwrap_err();
    assert!(matches!(error, NetError::Protocol { .. }), "{error}");
}

// ---------------------------------------------------------------- addresses

#[tokio::test]
async fn a_port_in_use_is_named() {
    let server = Server::start();
    let error = quic::listen(server.address, &stranger(), server.guests.clone()).unwrap_err();
    assert!(matches!(error, NetError::AddressInUse { address } if address == server.address));
    assert!(error.to_string().contains(&server.address.to_string()), "{error}");
}

#[tokio::test]
async fn silence_is_named() {
    let silent = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
    let address = silent.local_addr().unwrap();
    let endpoint = quic::client_endpoint(address).unwrap();
    let (client, server) = (stranger(), stranger().fingerprint());
    let patience = Duration::from_millis(300);
    let error =
        quic::connect_within(patience, &endpoint, &client, address, server, wire::ALPN).await;
    assert!(matches!(error, Err(NetError::TimedOut { address: a, .. }) if a == address));
}

#[tokio::test]
async fn names_are_resolved_or_the_error_says_which() {
    let addresses = quic::resolve("127.0.0.1:4481").await.unwrap();
    assert_eq!(addresses, ["127.0.0.1:4481".parse().unwrap()]);
    for bad in ["127.0.0.1", "host:", "::1:4481", "host:0", ""] {
        let error = quic::resolve(bad).await.unwrap_err();
        assert!(matches!(error, NetError::InvalidAddress { .. }), "{bad}: {error}");
    }
    let error = quic::resolve("no-such-host.invalid:1").await.unwrap_err();
    assert!(error.to_string().contains("no-such-host.invalid:1"), "{error}");
}

#[tokio::test]
async fn a_name_with_several_addresses_is_reached_at_the_one_that_answers() {
    let mut server = Server::start();
    let client = stranger();
    server.guests.pin(&client);
    let name = format!("localhost:{}", server.address.port());
    let fingerprint = server.identity.fingerprint();
    let near = quic::dial(&client, &name, fingerprint, wire::ALPN).await.unwrap();
    let (far, _) = server.next().await.unwrap();
    // The connection outlives the endpoint that `dial` made for it.
    far.open_uni().await.unwrap().write_all(b"x").await.unwrap();
    near.accept_uni().await.unwrap();
}

// ---------------------------------------------------------------- what arrives

#[tokio::test]
async fn garbage_on_a_stream_is_an_error_and_no_more() {
    let mut server = Server::start();
    let (near, far) = server.session().await;
    let mut random = StdRng::seed_from_u64(7);
    for _ in 0..50 {
        let mut bytes = vec![0; 64];
        random.fill_bytes(&mut bytes);
        let mut stream = near.open_uni().await.unwrap();
        stream.write_all(&bytes).await.unwrap();
        stream.finish().unwrap();
        let mut reader = FrameReader::new(far.accept_uni().await.unwrap());
        assert!(reader.read::<wire::SourceMessage>().await.is_err());
    }
    // The connection is as good as before.
    let mut writer = FrameWriter::new(near.open_uni().await.unwrap());
    writer.write(&wire::SourceMessage::RequestInventory).await.unwrap();
    let mut reader = FrameReader::new(far.accept_uni().await.unwrap());
    let message = reader.read::<wire::SourceMessage>().await.unwrap().unwrap();
    assert!(matches!(message, wire::SourceMessage::RequestInventory));
}

#[tokio::test]
async fn a_reset_stream_and_a_closed_connection_are_errors() {
    let mut server = Server::start();
    let (near, far) = server.session().await;
    let mut stream = near.open_uni().await.unwrap();
    stream.write_all(&[100, 0, 0]).await.unwrap();
    let mut reader = FrameReader::new(far.accept_uni().await.unwrap());
    stream.reset(quic::CLOSE_PROTOCOL).unwrap();
    assert!(matches!(reader.read::<u8>().await, Err(FrameError::Io(_))));

    let mut stream = near.open_uni().await.unwrap();
    stream.write_all(&[100]).await.unwrap();
    let mut reader = FrameReader::new(far.accept_uni().await.unwrap());
    near.close(quic::CLOSE_DONE, b"");
    assert!(matches!(reader.read::<u8>().await, Err(FrameError::Io(_))));
}

const PIECES: u64 = 64;

async fn send_some(near: Connection, stream: u64) {
    let mut writer = FrameWriter::new(near.open_uni().await.unwrap());
    for piece in (stream..PIECES).step_by(wire::DATA_STREAMS) {
        let mut bytes = vec![0; 1 << 20];
        StdRng::seed_from_u64(piece).fill_bytes(&mut bytes);
        let value = (piece, Hash::of(&bytes).0, ByteBuf::from(bytes));
        writer.write(&value).await.unwrap();
    }
    let mut stream = writer.into_inner();
    stream.finish().unwrap();
    stream.stopped().await.unwrap();
}

async fn receive_some(stream: quinn::RecvStream) -> Vec<u64> {
    let mut reader = FrameReader::new(stream);
    let mut seen = Vec::new();
    while let Some(frame) = reader.read::<(u64, [u8; 32], ByteBuf)>().await.unwrap() {
        let (piece, hash, bytes) = frame;
        assert_eq!(Hash::of(&bytes).0, hash);
        seen.push(piece);
    }
    seen
}

/// Sends 64 MiB over a session with the server, and sees that they arrive.
async fn carry(server: &mut Server) {
    let (near, far) = server.session().await;
    let streams = 0..wire::DATA_STREAMS as u64;
    let senders: Vec<_> =
        streams.map(|stream| tokio::spawn(send_some(near.clone(), stream))).collect();
    let mut receivers = Vec::new();
    for _ in 0..wire::DATA_STREAMS {
        receivers.push(tokio::spawn(receive_some(far.accept_uni().await.unwrap())));
    }
    let mut seen = Vec::new();
    for receiver in receivers {
        seen.extend(receiver.await.unwrap());
    }
    for sender in senders {
        sender.await.unwrap();
    }
    seen.sort_unstable();
    assert_eq!(seen, (0..PIECES).collect::<Vec<_>>());
    // Large packets were used, and no black hole made quinn fall back.
    let path = near.stats().path;
    assert_eq!(path.current_mtu, quic::LOOPBACK_MTU);
    // A receiver that is not scheduled for a while loses some.
    assert!(path.lost_packets < path.sent_packets / 2, "{path:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sixty_four_mebibytes_through_four_streams_arrive_intact() {
    carry(&mut Server::start()).await;
}

/// What is sent at once fits into one send, however loopback is written, and whatever the
/// server takes for its path.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn loopback_by_any_name_is_loopback() {
    if std::net::UdpSocket::bind("[::]:0").is_err() {
        eprintln!("skipped: this machine has no IPv6");
        return;
    }
    for host in ["127.0.0.1", "::ffff:127.0.0.1", "::1"] {
        let mut server = Server::start_as(stranger(), "[::]:0");
        server.address.set_ip(host.parse().unwrap());
        let carried = tokio::time::timeout(Duration::from_secs(60), carry(&mut server)).await;
        assert!(carried.is_ok(), "{host}: 64 MiB took more than a minute");
    }
}

#[tokio::test]
async fn a_frame_above_the_limit_is_refused_before_it_is_read() {
    let mut server = Server::start();
    let (near, far) = server.session().await;
    let mut stream = near.open_uni().await.unwrap();
    stream.write_all(&(wire::FRAME_MAX as u32 + 1).to_le_bytes()).await.unwrap();
    stream.write_all(&[0]).await.unwrap();
    let mut reader = FrameReader::new(far.accept_uni().await.unwrap());
    let error = reader.read::<ByteBuf>().await.unwrap_err();
    assert!(matches!(error, FrameError::TooLong { .. }), "{error}");

    let largest = ByteBuf::from(vec![1; wire::FRAME_MAX - 5]);
    let frame = encode_frame(&largest, Compression::Never).unwrap();
    let mut writer = FrameWriter::new(near.open_uni().await.unwrap());
    let writing = tokio::spawn(async move { writer.write_encoded(&frame).await.map(|_| writer) });
    let mut reader = FrameReader::new(far.accept_uni().await.unwrap());
    assert_eq!(reader.read::<ByteBuf>().await.unwrap().unwrap(), largest);
    writing.await.unwrap().unwrap();
}

// ---------------------------------------------------------------- enrolment

fn request(secret: Secret) -> EnrolRequest {
    EnrolRequest {
        secret,
        source: FileSystemId::random(),
        source_region: "local".to_owned(),
        creation_time: Timestamp(1),
        devices: false,
    }
}

/// What a destination does with each peer that wants to enrol.
async fn answer_next(server: &mut Server, tokens: &mut Tokens, enrolled: &Enrolled) {
    let (connection, admission) = server.next().await.unwrap();
    let Admission::Enrolment(peer) = admission else { panic!("{admission:?}") };
    let (request, responder) = enrol::receive(&connection).await.unwrap();
    let answer = match tokens.redeem(&request.secret, peer, Timestamp(1)) {
        Ok(_) => {
            server.guests.pinned.lock().unwrap().insert(peer);
            EnrolAnswer::Accepted(enrolled.clone())
        }
        Err(reason) => EnrolAnswer::Refused { reason },
    };
    server.guests.open.store(tokens.open(Timestamp(1)), Ordering::SeqCst);
    responder.answer(&answer).await.unwrap();
}

#[tokio::test]
async fn a_token_enrols_one_source() {
    let mut server = Server::start();
    let mut tokens = Tokens::default();
    let secret = Secret::random();
    tokens.issue(&secret, Timestamp(100), Timestamp(0));
    server.guests.open.store(true, Ordering::SeqCst);
    let enrolled = Enrolled {
        destination: FileSystemId::random(),
        region: "local".to_owned(),
        path: "/replica".to_owned(),
        reconcile: false,
    };
    let token = Token {
        address: server.address.to_string(),
        fingerprint: server.identity.fingerprint(),
        secret,
    };
    let (client, other) = (stranger(), stranger());

    let guess = request(Secret::random());
    let (result, ()) = tokio::join!(
        enrol::enrol(&other, &token, &guess),
        answer_next(&mut server, &mut tokens, &enrolled)
    );
    assert!(matches!(result, Err(EnrolError::Refused(EnrolRefusal::WrongSecret))), "{result:?}");

    // The second time stands for an answer that was lost.
    let good = request(secret);
    for _ in 0..2 {
        let (result, ()) = tokio::join!(
            enrol::enrol(&client, &token, &good),
            answer_next(&mut server, &mut tokens, &enrolled)
        );
        assert_eq!(result.unwrap(), enrolled);
    }
    server.call(&client, wire::ALPN).await.unwrap();
    server.next().await.unwrap();

    // Nothing waits any more: strangers end in the handshake.
    let error = enrol::enrol(&other, &token, &good).await.unwrap_err();
    assert!(matches!(error, EnrolError::NotOpen { .. }), "{error}");
}
