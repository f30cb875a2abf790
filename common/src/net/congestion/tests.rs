//! The controller in real connections over a line that is simulated in virtual
//! time: every run is the same.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::BytesMut;
use quinn::congestion::{ControllerFactory, CubicConfig};
use quinn::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use quinn::{ClientConfig, Dir, EndpointConfig, ServerConfig, StreamId, TransportConfig, VarInt};
use quinn_proto::{
    Connection, ConnectionHandle, DatagramEvent, Endpoint, Event, StreamEvent, WriteError,
};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use super::MeasuredConfig;
use crate::net::identity::{Fingerprint, Identity, SERVER_NAME};
use crate::net::tls::{self, Trust};
use crate::wire;

/// A line from senders to receivers; the way back is as long, and free.
#[derive(Clone, Copy)]
struct Line {
    /// Bytes a second.
    rate: u64,
    /// One way.
    delay: Duration,
    /// Each datagram is that much later at most, at random; none overtakes another.
    jitter: Duration,
    /// Bytes that wait for the line; what comes on top is lost.
    queue: u64,
    /// Share of the datagrams that is lost, each way.
    loss: f64,
}

/// 200 Mbit/s to another continent.
const FAR: Line = Line {
    rate: 25_000_000,
    delay: Duration::from_millis(50),
    jitter: Duration::ZERO,
    queue: 500_000,
    loss: 0.0,
};

struct Anyone;

impl Trust for Anyone {
    fn is_pinned(&self, _: &Fingerprint) -> bool {
        true
    }

    fn enrolment_open(&self) -> bool {
        false
    }
}

struct Host {
    endpoint: Endpoint,
    address: SocketAddr,
    connection: Option<(ConnectionHandle, Connection)>,
    stream: Option<StreamId>,
    sends: bool,
    received: u64,
}

struct Datagram {
    from: SocketAddr,
    to: SocketAddr,
    data: Vec<u8>,
}

struct Net {
    now: Instant,
    line: Line,
    random: StdRng,
    /// When the line is free again.
    free: Instant,
    /// When the last datagram arrives, in each direction.
    last: [Instant; 2],
    under_way: BinaryHeap<Reverse<(Instant, u64)>>,
    datagrams: std::collections::HashMap<u64, Datagram>,
    number: u64,
    hosts: Vec<Host>,
    /// The longest that a datagram waited for the line.
    waited: Duration,
}

fn transport(controller: Arc<dyn ControllerFactory + Send + Sync>) -> Arc<TransportConfig> {
    let mut config = TransportConfig::default();
    config
        .congestion_controller_factory(controller)
        .stream_receive_window(VarInt::from_u32(64 << 20))
        .receive_window(VarInt::from_u32(128 << 20))
        .send_window(128 << 20)
        .mtu_discovery_config(None);
    Arc::new(config)
}

impl Net {
    fn new(line: Line) -> Self {
        let now = Instant::now();
        Self {
            now,
            line,
            random: StdRng::seed_from_u64(7),
            free: now,
            last: [now; 2],
            under_way: BinaryHeap::new(),
            datagrams: std::collections::HashMap::new(),
            number: 0,
            hosts: Vec::new(),
            waited: Duration::ZERO,
        }
    }

    /// A sender of something without end, and who receives it: the latter's number.
    fn flow(&mut self, controller: Arc<dyn ControllerFactory + Send + Sync>) -> usize {
        let count = self.hosts.len() as u8;
        let address = |n: u8| SocketAddr::from(([10, 0, 0, n + 1], 1000));
        let identity = Identity::ephemeral().unwrap();
        let crypto =
            QuicServerConfig::try_from(tls::server(&identity, Arc::new(Anyone)).unwrap()).unwrap();
        let mut server = ServerConfig::with_crypto(Arc::new(crypto));
        server.transport_config(transport(controller.clone()));
        let (tls, _) = tls::client(&identity, identity.fingerprint(), wire::ALPN).unwrap();
        let mut client = ClientConfig::new(Arc::new(QuicClientConfig::try_from(tls).unwrap()));
        client.transport_config(transport(controller));
        let endpoint = |server: Option<ServerConfig>| {
            let mut config = EndpointConfig::default();
            config.rng_seed(Some([count; 32]));
            Endpoint::new(Arc::new(config), server.map(Arc::new), false, None)
        };
        let host = |endpoint, n, sends| Host {
            endpoint,
            address: address(n),
            connection: None,
            stream: None,
            sends,
            received: 0,
        };
        let mut sender = host(endpoint(None), count, true);
        let to = address(count + 1);
        sender.connection =
            Some(sender.endpoint.connect(self.now, client, to, SERVER_NAME).unwrap());
        self.hosts.push(sender);
        self.hosts.push(host(endpoint(Some(server)), count + 1, false));
        for one in 0..self.hosts.len() {
            self.drive(one);
        }
        self.hosts.len() - 1
    }

    /// Puts a datagram on the line.
    fn send(&mut self, sender: bool, datagram: Datagram) {
        if self.random.random_bool(self.line.loss) {
            return;
        }
        let mut arrives = self.now + self.line.delay;
        if sender {
            let waits = self.free.saturating_duration_since(self.now);
            if waits.as_secs_f64() * self.line.rate as f64 > self.line.queue as f64 {
                return;
            }
            self.waited = self.waited.max(waits);
            let takes = datagram.data.len() as f64 / self.line.rate as f64;
            self.free = self.free.max(self.now) + Duration::from_secs_f64(takes);
            arrives = self.free + self.line.delay;
        }
        arrives += self.line.jitter.mul_f64(self.random.random());
        let last = &mut self.last[usize::from(sender)];
        *last = arrives.max(*last);
        self.under_way.push(Reverse((*last, self.number)));
        self.datagrams.insert(self.number, datagram);
        self.number += 1;
    }

    /// Lets a host do all that it can do now.
    fn drive(&mut self, one: usize) {
        let now = self.now;
        let host = &mut self.hosts[one];
        let Some((handle, connection)) = &mut host.connection else { return };
        if connection.poll_timeout().is_some_and(|due| due <= now) {
            connection.handle_timeout(now);
        }
        while let Some(event) = connection.poll_endpoint_events() {
            if let Some(event) = host.endpoint.handle_event(*handle, event) {
                connection.handle_event(event);
            }
        }
        while let Some(event) = connection.poll() {
            match event {
                Event::Connected if host.sends => {
                    host.stream = connection.streams().open(Dir::Uni);
                }
                Event::Stream(StreamEvent::Opened { dir: Dir::Uni }) => {
                    host.stream = connection.streams().accept(Dir::Uni);
                }
                Event::ConnectionLost { reason } => panic!("{reason}"),
                _ => {}
            }
        }
        if let Some(stream) = host.stream {
            if host.sends {
                let mut stream = connection.send_stream(stream);
                while stream
                    .write(&[7; 65536])
                    .map_err(|e| assert!(matches!(e, WriteError::Blocked)))
                    .is_ok()
                {}
            } else {
                let mut stream = connection.recv_stream(stream);
                let mut chunks = stream.read(true).unwrap();
                while let Ok(Some(chunk)) = chunks.next(usize::MAX) {
                    host.received += chunk.bytes.len() as u64;
                }
                let _ = chunks.finalize();
            }
        }
        let (from, sends) = (host.address, host.sends);
        let mut sent = Vec::new();
        let mut data = Vec::new();
        while let Some(transmit) = connection.poll_transmit(now, 1, &mut data) {
            sent.push(Datagram { from, to: transmit.destination, data: std::mem::take(&mut data) });
        }
        for datagram in sent {
            self.send(sends, datagram);
        }
    }

    fn arrive(&mut self, Datagram { from, to, data }: Datagram) {
        let now = self.now;
        let one = self.hosts.iter().position(|host| host.address == to).unwrap();
        let host = &mut self.hosts[one];
        let mut answer = Vec::new();
        let event =
            host.endpoint.handle(now, from, None, None, BytesMut::from(&data[..]), &mut answer);
        match event {
            Some(DatagramEvent::NewConnection(incoming)) => {
                host.connection = host.endpoint.accept(incoming, now, &mut answer, None).ok();
            }
            Some(DatagramEvent::ConnectionEvent(_, event)) => {
                host.connection.as_mut().unwrap().1.handle_event(event);
            }
            Some(DatagramEvent::Response(_)) | None => {}
        }
        self.drive(one);
    }

    fn run(&mut self, time: Duration) {
        let end = self.now + time;
        loop {
            let timers = self.hosts.iter_mut().filter_map(|host| host.connection.as_mut());
            let timer = timers.filter_map(|(_, connection)| connection.poll_timeout()).min();
            let arrival = self.under_way.peek().map(|Reverse((at, _))| *at);
            let Some(next) = timer.into_iter().chain(arrival).min().filter(|next| *next < end)
            else {
                break;
            };
            self.now = self.now.max(next);
            if arrival.is_some_and(|arrival| arrival <= next) {
                let Reverse((_, number)) = self.under_way.pop().unwrap();
                let datagram = self.datagrams.remove(&number).unwrap();
                self.arrive(datagram);
            } else {
                for one in 0..self.hosts.len() {
                    self.drive(one);
                }
            }
        }
        self.now = end;
    }

    /// What arrived within the time, of what the line could bring, percent.
    fn share(&mut self, receiver: usize, time: Duration) -> u64 {
        let before = self.hosts[receiver].received;
        self.run(time);
        let most = self.line.rate as f64 * time.as_secs_f64();
        let share = (self.hosts[receiver].received - before) as f64 * 100.0 / most;
        share.round() as u64
    }
}

fn measured() -> Arc<dyn ControllerFactory + Send + Sync> {
    Arc::new(MeasuredConfig)
}

fn seconds(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

/// Percent of the line, the beginning included.
fn share_of(line: Line, controller: Arc<dyn ControllerFactory + Send + Sync>) -> u64 {
    let mut net = Net::new(line);
    let receiver = net.flow(controller);
    net.share(receiver, seconds(12))
}

#[test]
fn a_line_that_loses_is_used_all_the_same() {
    for (loss, least) in [(0.0, 90), (0.001, 85), (0.01, 85), (0.05, 60)] {
        let share = share_of(Line { loss, ..FAR }, measured());
        println!("{loss}: {share} %");
        assert!(share >= least, "{share} % of a line that loses {loss}");
    }
    // What this is for.
    let cubic = share_of(Line { loss: 0.01, ..FAR }, Arc::new(CubicConfig::default()));
    println!("cubic: {cubic} %");
    assert!(cubic < 10, "{cubic} %");
}

#[test]
fn lines_of_all_kinds_are_used() {
    let millis = Duration::from_millis;
    let lines = [
        ("slow", Line { rate: 125_000, queue: 20_000, ..FAR }),
        ("slow and near", Line { rate: 125_000, delay: millis(5), queue: 20_000, ..FAR }),
        ("hardly any queue", Line { queue: 60_000, ..FAR }),
        ("a satellite", Line { rate: 2_500_000, delay: millis(300), queue: 300_000, ..FAR }),
        ("trembling", Line { jitter: millis(20), ..FAR }),
        ("near", Line { delay: Duration::from_micros(100), ..FAR }),
    ];
    for (what, line) in lines {
        let mut net = Net::new(line);
        let receiver = net.flow(measured());
        net.run(seconds(5));
        let share = net.share(receiver, seconds(8));
        println!("{what}: {share} %");
        assert!(share >= 70, "{what}: {share} %");
    }
}

/// What others send beside it does not wait for long.
#[test]
fn a_deep_queue_is_not_filled() {
    let mut net = Net::new(Line { queue: 25_000_000, ..FAR });
    let receiver = net.flow(measured());
    net.run(seconds(5));
    net.waited = Duration::ZERO;
    let share = net.share(receiver, seconds(8));
    println!("{share} %, waited {:?}", net.waited);
    assert!(share >= 90, "{share} %");
    assert!(net.waited < Duration::from_millis(60), "waited {:?}", net.waited);
}

#[test]
fn two_share_a_line() {
    for second in [measured(), Arc::new(CubicConfig::default()) as Arc<_>] {
        let mut net = Net::new(FAR);
        let first = net.flow(measured());
        net.run(seconds(5));
        let other = net.flow(second);
        net.run(seconds(15));
        let before = net.hosts[other].received;
        let mine = net.share(first, seconds(15));
        let theirs = (net.hosts[other].received - before) * 100 / (15 * FAR.rate);
        println!("{mine} % and {theirs} %");
        assert!(mine + theirs >= 85, "{mine} % and {theirs} %");
        assert!(mine.min(theirs) >= 5, "{mine} % and {theirs} %");
    }
}

#[test]
fn a_line_that_changes_is_followed() {
    let mut net = Net::new(FAR);
    let receiver = net.flow(measured());
    net.run(seconds(5));
    for (rate, delay) in [(2_500_000, 50), (25_000_000, 50), (25_000_000, 150)] {
        net.line = Line { rate, delay: Duration::from_millis(delay), ..FAR };
        net.run(seconds(15));
        let share = net.share(receiver, seconds(5));
        println!("{rate} {delay}: {share} %");
        assert!(share >= 80, "{rate} B/s, {delay} ms: {share} %");
    }
}

#[test]
fn a_cut_is_survived() {
    let mut net = Net::new(FAR);
    let receiver = net.flow(measured());
    net.run(seconds(5));
    net.line.loss = 1.0;
    net.run(seconds(8));
    net.line.loss = 0.0;
    net.run(seconds(8));
    let share = net.share(receiver, seconds(5));
    println!("{share} %");
    assert!(share >= 85, "{share} %");
}
