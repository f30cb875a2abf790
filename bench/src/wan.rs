//! A long path between two hosts: a TUN device on each, and threads here that
//! carry packets between them with the delay, the rate and the losses of a line.
//! (netem, which does the same in the kernel, is missing from many kernels.)

use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use clap::ValueEnum;
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use rustix::event::{PollFd, PollFlags, Timespec};
use serde::{Deserialize, Serialize};

use crate::net::{LONG, Namespace};

/// Bytes of the largest packet.
const MTU: usize = 1500;
/// How long a thread waits before it looks whether it is to end.
const PULSE: Duration = Duration::from_millis(100);

/// How TCP finds its pace. Machines differ in what they have as a default, and over
/// a long path with losses everything depends on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Tcp {
    /// Linux's own default.
    Cubic,
    /// Where it is set by hand; takes losses for what they are.
    Bbr,
}

impl Tcp {
    /// As the kernel calls it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Cubic => "cubic",
            Self::Bbr => "bbr",
        }
    }
}

/// What a line is like, either way.
#[derive(Clone, Copy, Debug)]
pub struct Line {
    /// There and back.
    pub round_trip: Duration,
    /// Bits a second.
    pub rate: f64,
    /// The share of packets that are lost, 0 to 1.
    pub loss: f64,
    /// How TCP finds its pace on it.
    pub tcp: Tcp,
}

/// A line that works; ends when dropped.
#[derive(Debug)]
pub struct Wan {
    ends: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl Wan {
    /// Lays it.
    pub fn between(source: &Namespace, destination: &Namespace, line: Line) -> Result<Self> {
        let here = Arc::new(device(source, "10.77.0.1", line.tcp)?);
        let there = Arc::new(device(destination, "10.77.0.2", line.tcp)?);
        let mut wan = Self { ends: Arc::default(), threads: Vec::new() };
        for (from, to, seed) in [(&here, &there, 1), (&there, &here, 2)] {
            let (sender, receiver) = channel();
            let (from, to) = (from.clone(), to.clone());
            let (reader_ends, writer_ends) = (wan.ends.clone(), wan.ends.clone());
            let taker = Taker::new(line, seed, sender);
            wan.threads.push(thread::spawn(move || take(&from, taker, &reader_ends)));
            wan.threads.push(thread::spawn(move || deliver(&to, &receiver, &writer_ends)));
        }
        Ok(wan)
    }
}

impl Drop for Wan {
    fn drop(&mut self) {
        self.ends.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                eprintln!("a thread of the long path panicked");
            }
        }
    }
}

/// Makes the device, gives it its address; it goes when the file is closed.
fn device(namespace: &Namespace, address: &str, tcp: Tcp) -> Result<File> {
    let file = namespace.inside(|| {
        let file = File::options().read(true).write(true).open("/dev/net/tun");
        let file = file.context("/dev/net/tun (the module `tun` is needed)")?;
        attach(&file).context("TUNSETIFF")?;
        Ok(file)
    })?;
    rustix::io::ioctl_fionbio(&file, true)?;
    namespace.ip(&["address", "add", &format!("{address}/32"), "dev", LONG])?;
    namespace.ip(&["link", "set", LONG, "mtu", &MTU.to_string(), "txqueuelen", "1000", "up"])?;
    // By the route: a namespace may not choose what the host has not allowed.
    let route = ["route", "add", "10.77.0.0/24", "dev", LONG, "src", address];
    namespace.ip(&[&route[..], &["congctl", tcp.as_str()]].concat())?;
    Ok(file)
}

/// Makes `file` a TUN device of the thread's network namespace.
fn attach(file: &File) -> std::io::Result<()> {
    /// `struct ifreq`.
    #[repr(C)]
    struct Request {
        name: [u8; libc::IFNAMSIZ],
        flags: libc::c_short,
        rest: [u8; 22],
    }
    let mut request = Request {
        name: [0; libc::IFNAMSIZ],
        flags: (libc::IFF_TUN | libc::IFF_NO_PI) as libc::c_short,
        rest: [0; 22],
    };
    request.name[..LONG.len()].copy_from_slice(LONG.as_bytes());
    // SAFETY: TUNSETIFF reads and writes one `struct ifreq`, which lives through
    // the call and is as large as the kernel's (40 bytes).
    let result = unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF as _, &raw mut request) };
    if result < 0 { Err(std::io::Error::last_os_error()) } else { Ok(()) }
}

/// Decides what becomes of each packet.
struct Taker {
    line: Line,
    rng: SmallRng,
    /// When the line has sent what it was given.
    free: Instant,
    sender: Sender<(Instant, Vec<u8>)>,
}

impl Taker {
    fn new(line: Line, seed: u64, sender: Sender<(Instant, Vec<u8>)>) -> Self {
        Self { line, rng: SmallRng::seed_from_u64(seed), free: Instant::now(), sender }
    }

    fn take(&mut self, packet: &[u8]) {
        let now = Instant::now();
        let waits = self.free.saturating_duration_since(now);
        // The queue before the line holds what it sends in one round trip.
        if waits > self.line.round_trip || self.rng.random_bool(self.line.loss) {
            return;
        }
        let takes = Duration::from_secs_f64(packet.len() as f64 * 8.0 / self.line.rate);
        self.free = self.free.max(now) + takes;
        // Nobody listens any more only when all ends.
        let _ = self.sender.send((self.free + self.line.round_trip / 2, packet.to_vec()));
    }
}

fn take(mut from: &File, mut taker: Taker, ends: &AtomicBool) {
    let mut buffer = [0; 1 << 16];
    while !ends.load(Ordering::Relaxed) {
        match from.read(&mut buffer) {
            Ok(length) => taker.take(&buffer[..length]),
            Err(error) if error.kind() == ErrorKind::WouldBlock => wait_readable(from),
            // The device is not up yet, or goes.
            Err(_) => thread::sleep(Duration::from_millis(1)),
        }
    }
}

fn wait_readable(file: &File) {
    let limit = Timespec { tv_sec: 0, tv_nsec: PULSE.as_nanos() as i64 };
    let _ = rustix::event::poll(
        &mut [PollFd::from_borrowed_fd(file.as_fd(), PollFlags::IN)],
        Some(&limit),
    );
}

fn deliver(mut to: &File, receiver: &Receiver<(Instant, Vec<u8>)>, ends: &AtomicBool) {
    while !ends.load(Ordering::Relaxed) {
        match receiver.recv_timeout(PULSE) {
            Ok((due, packet)) => {
                thread::sleep(due.saturating_duration_since(Instant::now()));
                // What cannot be written is lost, as in any network.
                let _ = to.write(&packet);
            }
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => return,
        }
    }
}
