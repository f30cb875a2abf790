//! Waiting for events, a time, or a call from another thread.

use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec};
use rustix::io::Errno;

use super::WatchError;

/// Interrupts the `read` of the watcher that it came from. One made while no
/// `read` runs interrupts the next.
#[derive(Clone, Debug)]
pub struct Waker(Arc<OwnedFd>);

impl Waker {
    /// Interrupts.
    pub fn wake(&self) {
        // It fails only when the counter is full, and then a wake-up is pending.
        let _ = rustix::io::write(&self.0, &1u64.to_ne_bytes());
    }
}

/// The watcher's end of its [`Waker`]s.
#[derive(Debug)]
pub(super) struct Bell(Arc<OwnedFd>);

impl Bell {
    pub(super) fn new(watcher: &'static str) -> Result<Self, WatchError> {
        rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .map(|fd| Self(Arc::new(fd)))
            .map_err(failed(watcher, "make an eventfd"))
    }

    pub(super) fn waker(&self) -> Waker {
        Waker(Arc::clone(&self.0))
    }

    /// Returns when `queue` can be read, when a [`Waker`] was used, when a
    /// signal came or when `timeout` is over.
    pub(super) fn wait(
        &self,
        queue: Option<BorrowedFd<'_>>,
        timeout: Duration,
    ) -> Result<(), Errno> {
        let timeout = Timespec::try_from(timeout).ok();
        let mut fds = [PollFd::new(&*self.0, PollFlags::IN), PollFd::new(&*self.0, PollFlags::IN)];
        let mut count = 1;
        if let Some(queue) = &queue {
            fds[1] = PollFd::new(queue, PollFlags::IN);
            count = 2;
        }
        match rustix::event::poll(&mut fds[..count], timeout.as_ref()) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(error),
        }
        if !fds[0].revents().is_empty() {
            // Back to zero; a failure means that it was zero.
            let _ = rustix::io::read(&self.0, &mut [0u8; 8]);
        }
        Ok(())
    }
}

/// For `map_err`.
pub(super) fn failed(
    watcher: &'static str,
    action: &'static str,
) -> impl Fn(Errno) -> WatchError + Copy {
    move |error| WatchError::Io { watcher, action, source: error.into() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Instant;

    #[test]
    fn a_wake_up_ends_the_wait_whether_before_or_during_it() {
        let bell = Bell::new("test").unwrap();
        let long = Duration::from_secs(60);
        let start = Instant::now();
        bell.waker().wake();
        bell.wait(None, long).unwrap();
        let waker = bell.waker();
        let other = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(20));
            waker.wake();
        });
        bell.wait(None, long).unwrap();
        assert!(start.elapsed() < long / 2);
        other.join().unwrap();
        let start = Instant::now();
        bell.wait(None, Duration::from_millis(20)).unwrap();
        assert!(start.elapsed() >= Duration::from_millis(20), "used up");
    }
}
