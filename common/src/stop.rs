//! How a program is told to stop: SIGINT (Ctrl-C) or SIGTERM. The first asks
//! for a clean end, the second ends the process at once.

use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::signal::unix::{Signal, SignalKind, signal};

/// Whether the program was told to stop. Clones share it.
#[derive(Clone, Debug, Default)]
pub struct Stop(Arc<State>);

#[derive(Debug, Default)]
struct State {
    requested: Mutex<bool>,
    changed: Condvar,
}

impl Stop {
    /// Listens for signals from now on, on a thread of its own.
    ///
    /// # Errors
    /// When the system has no thread or descriptor to give.
    pub fn on_signals() -> io::Result<Self> {
        let stop = Self::default();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        // Before this returns, so that no signal slips by.
        let (interrupt, terminate) = {
            let _context = runtime.enter();
            (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?)
        };
        let told = stop.clone();
        {
            let _context = runtime.enter();
            // A file that grows beyond the process' limit is an error of the call
            // (EFBIG), not the end of the process. A handler stays for good.
            drop(signal(SignalKind::from_raw(libc::SIGXFSZ))?);
        }
        std::thread::Builder::new()
            .name("signals".to_owned())
            .spawn(move || runtime.block_on(listen(told, interrupt, terminate)))?;
        Ok(stop)
    }

    /// Asks for the end, as the first signal does.
    pub fn request(&self) {
        *self.lock() = true;
        self.0.changed.notify_all();
    }

    /// Whether the end was asked for.
    pub fn requested(&self) -> bool {
        *self.lock()
    }

    /// Returns when the end was asked for.
    pub fn wait(&self) {
        let mut requested = self.lock();
        while !*requested {
            requested = self.0.changed.wait(requested).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Returns when the end was asked for (`true`) or the time is over.
    pub fn wait_for(&self, time: Duration) -> bool {
        let end = Instant::now() + time;
        let mut requested = self.lock();
        while !*requested {
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            requested = self
                .0
                .changed
                .wait_timeout(requested, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
        *requested
    }

    fn lock(&self) -> MutexGuard<'_, bool> {
        self.0.requested.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

async fn listen(stop: Stop, mut interrupt: Signal, mut terminate: Signal) {
    loop {
        let code = tokio::select! {
            _ = interrupt.recv() => 130,
            _ = terminate.recv() => 143,
        };
        if stop.requested() {
            // Everything that matters survives this: see `crashsafe` and the
            // commit log.
            std::process::exit(code);
        }
        stop.request();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_reaches_who_waits() {
        let stop = Stop::default();
        assert!(!stop.wait_for(Duration::ZERO));
        let other = stop.clone();
        let waiter = std::thread::spawn(move || other.wait());
        stop.request();
        waiter.join().unwrap();
        assert!(stop.wait_for(Duration::from_secs(60)) && stop.requested());
    }
}
