//! The network between the two ends: a loopback of its own, or a long path
//! between two hosts. Nothing else uses it, so its counters are the peer's.

use std::fs::File;
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;

use anyhow::{Context, Result, anyhow, ensure};
use rustix::thread::LinkNameSpaceType;

use crate::site::PREFIX;
use crate::wan::{Line, Wan};

/// The loopback, in every namespace.
const LOOPBACK: &str = "lo";
/// The long path's device on both hosts.
pub const LONG: &str = "wan";

/// A network namespace, removed when dropped.
#[derive(Debug)]
pub struct Namespace {
    name: String,
}

impl Namespace {
    fn new(label: &str) -> Result<Self> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let name = format!("{PREFIX}{}-{label}-{number}", std::process::id());
        ip(&["netns", "add", &name])?;
        let namespace = Self { name };
        namespace.ip(&["link", "set", LOOPBACK, "up"])?;
        Ok(namespace)
    }

    /// `ip` with these arguments in it.
    pub fn ip(&self, arguments: &[&str]) -> Result<()> {
        ip(&[&["-n", &self.name][..], arguments].concat())
    }

    /// Who enters this is in it.
    pub fn entrance(&self) -> Result<File> {
        let path = PathBuf::from("/run/netns").join(&self.name);
        File::open(&path).with_context(|| path.display().to_string())
    }

    /// Does something in it, on a thread of its own: entering cannot be taken back.
    pub fn inside<T: Send>(&self, act: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        let entrance = self.entrance()?;
        thread::scope(|scope| {
            let inside = scope.spawn(move || {
                let kind = Some(LinkNameSpaceType::Network);
                rustix::thread::move_into_link_name_space(entrance.as_fd(), kind)?;
                act()
            });
            inside.join().map_err(|_| anyhow!("panicked in the namespace {}", self.name))?
        })
    }

    /// Bytes that a device has sent, headers included.
    fn sent(&self, device: &str) -> Result<u64> {
        const FILE: &str = "/proc/thread-self/net/dev";
        let text = self.inside(|| std::fs::read_to_string(FILE).context(FILE))?;
        let line =
            text.lines().find_map(|line| line.trim().strip_prefix(device)?.strip_prefix(':'));
        let field = line.and_then(|line| line.split_whitespace().nth(8));
        field.with_context(|| format!("{FILE} has no device {device}"))?.parse().context(FILE)
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        if let Err(error) = ip(&["netns", "delete", &self.name]) {
            eprintln!("{error:#}");
        }
    }
}

/// Both ends' places in it.
#[derive(Debug)]
pub struct Net {
    /// Where the source's programs run.
    pub source: Arc<Namespace>,
    /// Where the replica's run; the same on a loopback.
    pub destination: Arc<Namespace>,
    /// The destination's address.
    pub address: &'static str,
    wan: Option<Wan>,
}

impl Net {
    /// Both ends on one host.
    pub fn local() -> Result<Self> {
        let namespace = Arc::new(Namespace::new("local")?);
        Ok(Self {
            source: namespace.clone(),
            destination: namespace,
            address: "127.0.0.1",
            wan: None,
        })
    }

    /// Two hosts far apart.
    pub fn long(line: Line) -> Result<Self> {
        let source = Arc::new(Namespace::new("source")?);
        let destination = Arc::new(Namespace::new("destination")?);
        let wan = Wan::between(&source, &destination, line)?;
        Ok(Self { source, destination, address: "10.77.0.2", wan: Some(wan) })
    }

    /// Whether the ends are two hosts.
    pub fn is_long(&self) -> bool {
        self.wan.is_some()
    }

    /// Bytes that were sent between the ends so far, both ways, with the headers
    /// of IP and what is above it.
    pub fn wire_bytes(&self) -> Result<u64> {
        if self.is_long() {
            return Ok(self.source.sent(LONG)? + self.destination.sent(LONG)?);
        }
        self.source.sent(LOOPBACK)
    }
}

fn ip(arguments: &[&str]) -> Result<()> {
    let output = Command::new("ip").args(arguments).output();
    let output = output.context("ip (Debian package iproute2) cannot be started")?;
    let told = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "ip {}: {}", arguments.join(" "), told.trim());
    Ok(())
}
