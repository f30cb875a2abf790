//! The service manager (systemd): is told how the daemon is, its watchdog too, and
//! keeps descriptors for the next process, see `sd_notify(3)`.
//!
//! What it keeps it keeps over a restart of the service, by default not over a
//! stop (`FileDescriptorStorePreserve=`), and only as many as the unit's
//! `FileDescriptorStoreMax=` says.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::pipe::PipeFlags;
use sd_notify::NotifyState;

use crate::pulse;
use crate::sys::passed;

/// How long the manager may take to have read what it was told.
const HEARD: Duration = Duration::from_secs(5);

/// The service manager, or nobody.
#[derive(Debug, Default)]
pub struct Supervisor {
    /// Somebody listens.
    present: bool,
    /// What it kept for this process and nobody has asked for yet.
    kept: Mutex<Vec<(String, OwnedFd)>>,
}

impl Supervisor {
    /// Nobody: nothing is told, and nothing kept.
    pub fn nobody() -> Self {
        Self::default()
    }

    /// As the environment says. Takes the descriptors that were passed, so it
    /// must come first in the program, before anything is opened.
    ///
    /// What is wrong with them is the second part: nothing was taken then.
    pub fn from_environment() -> (Self, Option<io::Error>) {
        let (kept, error) = match passed::take() {
            Ok(kept) => (kept, None),
            Err(error) => (Vec::new(), Some(error)),
        };
        let present = std::env::var_os("NOTIFY_SOCKET").is_some();
        (Self { present, kept: Mutex::new(kept) }, error)
    }

    /// Whether there is one that could keep a descriptor.
    pub fn is_present(&self) -> bool {
        self.present
    }

    /// The service works.
    pub fn ready(&self) {
        self.tell(&[NotifyState::Ready]);
    }

    /// The service begins to stop.
    pub fn stopping(&self) {
        self.tell(&[NotifyState::Stopping]);
    }

    /// Tells the manager's watchdog (`WatchdogSec=`) that the process lives, from
    /// now on: as long as every heart beats (see [`pulse`]) and `probe` returns,
    /// which asks what an operator would ask. When one of them does not, nothing
    /// is told any more, and the manager kills the process and starts it again.
    ///
    /// # Errors
    /// When the system has no thread to give.
    pub fn watch(&self, probe: impl Fn() + Send + 'static) -> io::Result<()> {
        let Some(period) = sd_notify::watchdog_enabled().filter(|_| self.present) else {
            return Ok(());
        };
        let named = std::thread::Builder::new().name("watchdog".to_owned());
        named.spawn(move || watch(period, probe)).map(drop)
    }

    /// Takes what was kept under a name that begins with `prefix`.
    pub fn take(&self, prefix: &str) -> Vec<(String, OwnedFd)> {
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        kept.extract_if(.., |(name, _)| name.starts_with(prefix)).collect()
    }

    /// Has the manager keep a descriptor under a name (up to 255 characters,
    /// no colon), and waits until it has it.
    ///
    /// # Errors
    /// When it cannot be told. Whether its store had room, nobody says.
    pub fn keep(&self, name: &str, fd: BorrowedFd<'_>) -> io::Result<()> {
        if !self.present {
            return Err(io::ErrorKind::NotFound.into());
        }
        sd_notify::notify_with_fds(&[NotifyState::FdStore, NotifyState::FdName(name)], &[fd])?;
        self.wait_until_heard()
    }

    /// Has the manager let go of what it keeps under a name: it passes a copy,
    /// and keeps its own for the process after.
    pub fn forget(&self, name: &str) {
        self.tell(&[NotifyState::FdStoreRemove, NotifyState::FdName(name)]);
    }

    /// Returns when the manager has read all messages before, or takes too long.
    /// A message of a process that has ended cannot be told to be of this
    /// service, and is dropped.
    fn wait_until_heard(&self) -> io::Result<()> {
        let (ours, theirs) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC)?;
        sd_notify::notify_with_fds(&[NotifyState::Custom("BARRIER=1")], &[theirs.as_fd()])?;
        drop(theirs);
        // The manager closes its end, which hangs ours up. Before systemd 246 it
        // knows no barrier, and closes what it does not expect.
        let mut waited = [PollFd::new(&ours, PollFlags::empty())];
        let patience = Timespec::try_from(HEARD).ok();
        rustix::io::retry_on_intr(|| rustix::event::poll(&mut waited, patience.as_ref()))?;
        Ok(())
    }

    fn tell(&self, what: &[NotifyState<'_>]) {
        if self.present {
            tell(what);
        }
    }
}

/// Never ends: a process that ends takes the thread along.
fn watch(period: Duration, probe: impl Fn()) {
    loop {
        probe();
        match pulse::stopped(period / 2) {
            Some((name, silent)) if !pulse::waits_for_disk() => {
                tracing::error!(?silent, "{name} does not come round: the watchdog is not told");
            }
            _ => tell(&[NotifyState::Watchdog]),
        }
        std::thread::sleep(period / 4);
    }
}

fn tell(what: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(what) {
        tracing::warn!(%error, "the service manager cannot be told {what:?}");
    }
}
