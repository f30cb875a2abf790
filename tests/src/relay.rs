//! A bad network: a UDP relay that stands between two daemons and does to their
//! datagrams what networks do.
//!
//! It lives in the test's process, and draws what is random from a seed, which
//! the test prints. Each client of a relay reaches the server from a port of its
//! own.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};
use std::io::ErrorKind;
use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

/// Bytes of the largest datagram.
const DATAGRAM: usize = 65_535;
/// How long a thread waits for a datagram before it looks at what else is due.
const PULSE: Duration = Duration::from_millis(1);
/// Bytes that wait for a limited line; what comes on top is lost.
const QUEUE: u64 = 256 << 10;

/// What the network does to each datagram, both ways.
#[derive(Clone, Debug, Default)]
pub struct Weather {
    /// Nothing gets through, and nobody is told.
    pub cut: bool,
    /// How long each datagram is under way.
    pub delay: Duration,
    /// Up to this much is added to [`Self::delay`], at random.
    pub jitter: Duration,
    /// The share that is lost, 0 to 1.
    pub loss: f64,
    /// The share that is held back behind those after it, 0 to 1.
    pub reordered: f64,
    /// The share that arrives twice, 0 to 1.
    pub duplicated: f64,
    /// The share in which a byte is changed, 0 to 1.
    pub corrupted: f64,
    /// The share of which only the beginning arrives, 0 to 1.
    pub truncated: f64,
    /// Bytes a second, each way.
    pub bandwidth: Option<u64>,
}

impl Weather {
    /// Nothing gets through.
    pub fn cut() -> Self {
        Self { cut: true, ..Self::default() }
    }

    /// Anything at all, at random, that a connection can live with.
    pub fn random(rng: &mut StdRng) -> Self {
        let mut share = |often: f64, most: f64| {
            if rng.random_bool(often) { rng.random_range(0.0..most) } else { 0.0 }
        };
        let millis = |share: f64| Duration::from_secs_f64(share / 1000.0);
        Self {
            cut: share(0.15, 1.0) > 0.0,
            delay: millis(share(0.5, 80.0)),
            jitter: millis(share(0.5, 20.0)),
            loss: share(0.5, 0.05),
            reordered: share(0.4, 0.1),
            duplicated: share(0.4, 0.1),
            corrupted: share(0.4, 0.03),
            truncated: share(0.4, 0.03),
            bandwidth: (share(0.3, 1.0) > 0.0).then_some(1 << 20),
        }
    }
}

/// What a relay has done so far, in datagrams.
#[derive(Debug, Default)]
pub struct Seen {
    /// Arrived at the relay.
    pub taken: AtomicU64,
    /// Were sent on, those sent twice twice.
    pub passed: AtomicU64,
}

/// A relay; ends when dropped.
#[derive(Debug)]
pub struct Relay {
    shared: Arc<Shared>,
    address: SocketAddr,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    weather: Mutex<Weather>,
    /// Faces the clients.
    front: UdpSocket,
    clients: Mutex<HashMap<SocketAddr, Arc<Client>>>,
    server: SocketAddr,
    seed: u64,
    seen: Seen,
    ends: AtomicBool,
}

#[derive(Debug)]
struct Client {
    address: SocketAddr,
    /// Faces the server. Another one after [`Relay::move_client`].
    back: Mutex<Arc<UdpSocket>>,
}

impl Relay {
    /// Between whoever sends to [`Self::address`], a free port, and `server`.
    pub fn new(server: SocketAddr, seed: u64) -> Self {
        Self::at(SocketAddr::from((Ipv4Addr::LOCALHOST, 0)), server, seed)
    }

    /// The same at an address of the caller's choice.
    pub fn at(address: SocketAddr, server: SocketAddr, seed: u64) -> Self {
        let front = socket(address);
        let address = front.local_addr().unwrap();
        let shared = Arc::new(Shared {
            weather: Mutex::default(),
            front,
            clients: Mutex::default(),
            server,
            seed,
            seen: Seen::default(),
            ends: AtomicBool::new(false),
        });
        let thread = thread::spawn({
            let shared = shared.clone();
            move || shared.there()
        });
        Self { shared, address, thread: Some(thread) }
    }

    /// Where the client sends to.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// From now on it is like this.
    pub fn set(&self, weather: Weather) {
        *lock(&self.shared.weather) = weather;
    }

    /// From now on all is well; what is delayed still arrives.
    pub fn heal(&self) {
        self.set(Weather::default());
    }

    /// From now on each client reaches the server from another port, as behind a
    /// gateway that has forgotten it.
    pub fn move_client(&self) {
        for client in lock(&self.shared.clients).values() {
            *lock(&client.back) = Arc::new(socket((Ipv4Addr::LOCALHOST, 0).into()));
        }
    }

    /// Counts.
    pub fn seen(&self) -> &Seen {
        &self.shared.seen
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.shared.ends.store(true, Ordering::Relaxed);
        let ended = self.thread.take().map(JoinHandle::join);
        if !thread::panicking() {
            ended.transpose().expect("the relay panicked");
        }
    }
}

impl Shared {
    /// Carries what clients send; begins to carry answers to each.
    fn there(&self) {
        thread::scope(|scope| {
            let mut carriers = HashMap::new();
            let mut buffer = vec![0; DATAGRAM];
            while !self.ends.load(Ordering::Relaxed) {
                if let Some((length, from)) = received(self.front.recv_from(&mut buffer)) {
                    let carrier = carriers.entry(from).or_insert_with(|| {
                        let back = Arc::new(socket((Ipv4Addr::LOCALHOST, 0).into()));
                        let client = Arc::new(Client { address: from, back: Mutex::new(back) });
                        lock(&self.clients).insert(from, client.clone());
                        let answers = client.clone();
                        scope.spawn(move || self.back(&answers));
                        Carrier::new(self, client, Way::There)
                    });
                    carrier.take(buffer[..length].to_vec());
                }
                carriers.values_mut().for_each(Carrier::send_due);
            }
        });
    }

    /// Carries what the server sends to one client.
    fn back(&self, client: &Arc<Client>) {
        let mut carrier = Carrier::new(self, client.clone(), Way::Back);
        let mut buffer = vec![0; DATAGRAM];
        while !self.ends.load(Ordering::Relaxed) {
            let back = lock(&client.back).clone();
            if let Some((length, _)) = received(back.recv_from(&mut buffer)) {
                carrier.take(buffer[..length].to_vec());
            }
            carrier.send_due();
        }
    }
}

fn received(result: std::io::Result<(usize, SocketAddr)>) -> Option<(usize, SocketAddr)> {
    result
        .map_err(|error| {
            // Refused: nobody listened where the last one was sent to.
            let usual = [
                ErrorKind::WouldBlock,
                ErrorKind::TimedOut,
                ErrorKind::Interrupted,
                ErrorKind::ConnectionRefused,
            ];
            assert!(usual.contains(&error.kind()), "relay: {error}");
        })
        .ok()
}

fn socket(address: SocketAddr) -> UdpSocket {
    let socket = UdpSocket::bind(address).unwrap_or_else(|error| panic!("{address}: {error}"));
    socket.set_read_timeout(Some(PULSE)).unwrap();
    socket
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap()
}

#[derive(Clone, Copy, Debug)]
enum Way {
    There = 1,
    Back = 2,
}

/// Carries datagrams of one client one way.
struct Carrier<'a> {
    shared: &'a Shared,
    client: Arc<Client>,
    way: Way,
    rng: StdRng,
    /// Under way: when they arrive, in which order they came.
    pending: BinaryHeap<Reverse<(Instant, u64, Vec<u8>)>>,
    count: u64,
    /// When the line has sent what it was given.
    free: Instant,
}

impl<'a> Carrier<'a> {
    fn new(shared: &'a Shared, client: Arc<Client>, way: Way) -> Self {
        let rng = StdRng::seed_from_u64(shared.seed ^ way as u64);
        let (pending, free) = (BinaryHeap::new(), Instant::now());
        Self { shared, client, way, rng, pending, count: 0, free }
    }

    fn send_due(&mut self) {
        while self.pending.peek().is_some_and(|Reverse((due, ..))| *due <= Instant::now()) {
            let Some(Reverse((_, _, datagram))) = self.pending.pop() else { break };
            self.send(&datagram);
        }
    }

    /// Decides what becomes of a datagram.
    fn take(&mut self, mut datagram: Vec<u8>) {
        self.shared.seen.taken.fetch_add(1, Ordering::Relaxed);
        let weather = lock(&self.shared.weather).clone();
        if weather.cut || self.rng.random_bool(weather.loss) {
            return;
        }
        let now = Instant::now();
        let mut due = now + weather.delay;
        if !weather.jitter.is_zero() {
            due += weather.jitter.mul_f64(self.rng.random());
        }
        if let Some(bandwidth) = weather.bandwidth {
            let takes = |bytes: u64| Duration::from_secs_f64(bytes as f64 / bandwidth as f64);
            if self.free.saturating_duration_since(now) > takes(QUEUE) {
                return;
            }
            self.free = self.free.max(now) + takes(datagram.len() as u64);
            due += self.free - now;
        }
        if self.rng.random_bool(weather.reordered) {
            due += Duration::from_millis(self.rng.random_range(1..30));
        }
        if self.rng.random_bool(weather.truncated) {
            let length = self.rng.random_range(0..=datagram.len());
            datagram.truncate(length);
        }
        if !datagram.is_empty() && self.rng.random_bool(weather.corrupted) {
            let at = self.rng.random_range(0..datagram.len());
            datagram[at] ^= self.rng.random_range(1..=u8::MAX);
        }
        if self.rng.random_bool(weather.duplicated) {
            let later = Duration::from_millis(self.rng.random_range(0..30));
            self.push(due + later, datagram.clone());
        }
        self.push(due, datagram);
    }

    fn push(&mut self, due: Instant, datagram: Vec<u8>) {
        self.count += 1;
        self.pending.push(Reverse((due, self.count, datagram)));
    }

    /// What cannot be sent is lost, as in any network.
    fn send(&self, datagram: &[u8]) {
        if lock(&self.shared.weather).cut {
            return;
        }
        let sent = match self.way {
            Way::There => lock(&self.client.back).clone().send_to(datagram, self.shared.server),
            Way::Back => self.shared.front.send_to(datagram, self.client.address),
        };
        if sent.is_ok() {
            self.shared.seen.passed.fetch_add(1, Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What arrives at a server of a thousand datagrams.
    ///
    /// No more are under way at once than a socket's buffer holds, whichever of
    /// the threads does not run for a while: what a full buffer loses, the relay
    /// would be blamed for.
    fn carried(weather: Weather) -> Vec<Vec<u8>> {
        let server = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        server.set_read_timeout(Some(Duration::from_millis(3000))).unwrap();
        let relay = Relay::new(server.local_addr().unwrap(), 7);
        relay.set(weather);
        let read = Arc::new(AtomicU64::new(0));
        let reader = thread::spawn({
            let read = read.clone();
            move || {
                let mut arrived = Vec::new();
                let mut buffer = [0; 100];
                while let Ok(length) = server.recv(&mut buffer) {
                    arrived.push(buffer[..length].to_vec());
                    read.fetch_add(1, Ordering::Relaxed);
                }
                arrived
            }
        });
        let client = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        for number in 0..1000u32 {
            client.send_to(&number.to_le_bytes().repeat(4), relay.address()).unwrap();
            let under_way = || {
                let seen = relay.seen();
                let taken = seen.taken.load(Ordering::Relaxed);
                let passed = seen.passed.load(Ordering::Relaxed);
                (u64::from(number) + 1).saturating_sub(taken)
                    + passed.saturating_sub(read.load(Ordering::Relaxed))
            };
            let since = Instant::now();
            while number % 50 == 49 && under_way() > 0 {
                assert!(since.elapsed() < Duration::from_secs(30), "a datagram was lost");
                thread::sleep(Duration::from_millis(1));
            }
        }
        reader.join().unwrap()
    }

    fn whole(datagram: &[u8]) -> bool {
        datagram.len() == 16 && datagram.chunks(4).all(|part| part == &datagram[..4])
    }

    #[test]
    fn does_what_it_is_told_and_nothing_else() {
        let [clear, cut, lossy, twice, mixed, corrupted, truncated] = [
            Weather::default(),
            Weather::cut(),
            Weather { loss: 0.5, ..Weather::default() },
            Weather { duplicated: 0.5, ..Weather::default() },
            Weather { reordered: 0.5, ..Weather::default() },
            Weather { corrupted: 0.5, ..Weather::default() },
            Weather { truncated: 0.5, ..Weather::default() },
        ]
        .map(|weather| thread::spawn(|| carried(weather)))
        .map(|running| running.join().unwrap());
        assert!(clear == (0..1000u32).map(|n| n.to_le_bytes().repeat(4)).collect::<Vec<_>>());
        assert!(cut.is_empty());
        assert!((300..700).contains(&lossy.len()) && lossy.is_sorted_by_key(|d| u32_of(d)));
        assert!((1300..1700).contains(&twice.len()), "{}", twice.len());
        assert!(mixed.len() == 1000 && !mixed.is_sorted_by_key(|d| u32_of(d)));
        for bad in [corrupted, truncated] {
            let spoilt = bad.iter().filter(|datagram| !whole(datagram)).count();
            assert!(bad.len() == 1000 && (300..700).contains(&spoilt), "{spoilt}");
        }
    }

    fn u32_of(datagram: &[u8]) -> u32 {
        u32::from_le_bytes(datagram[..4].try_into().unwrap())
    }
}
