//! Whether the process' main loops are alive: what the service manager's
//! watchdog is told (see [`crate::supervisor`]).
//!
//! Each loop that the process cannot do without has a [`Heart`], on the thread
//! that runs it, and lets it [`beat`] whenever it comes round; so does what takes
//! long on that thread, whenever it gets on: a slow line or a large file is no
//! loop that hangs. The registry is the process' own, as its threads are.

use std::cell::RefCell;
use std::fs;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, Weak};
use std::time::{Duration, Instant};

/// In the place of the last beat, while a loop waits; later than any.
const WAITING: u64 = u64::MAX;

static HEARTS: Mutex<Vec<Weak<Beats>>> = Mutex::new(Vec::new());

thread_local! {
    /// That of this thread.
    static OWN: RefCell<Option<Arc<Beats>>> = const { RefCell::new(None) };
}

#[derive(Debug)]
struct Beats {
    name: String,
    /// Milliseconds since the first heart was made.
    last: AtomicU64,
}

/// A loop that is watched while this lives, on the thread that began it.
#[derive(Debug)]
pub struct Heart(Weak<Beats>);

impl Heart {
    /// This thread's loop begins.
    pub fn begin(name: impl Into<String>) -> Self {
        let beats = Arc::new(Beats { name: name.into(), last: AtomicU64::new(now()) });
        let mut hearts = HEARTS.lock().unwrap_or_else(PoisonError::into_inner);
        hearts.retain(|heart| heart.strong_count() > 0);
        let watched = Arc::downgrade(&beats);
        hearts.push(watched.clone());
        OWN.set(Some(beats));
        Self(watched)
    }
}

impl Drop for Heart {
    fn drop(&mut self) {
        OWN.with_borrow_mut(|own| {
            own.take_if(|beats| std::ptr::eq(Arc::as_ptr(beats), self.0.as_ptr()))
        });
    }
}

/// This thread's loop comes round, or gets on with something long. Does nothing on
/// a thread without a loop.
pub fn beat() {
    OWN.with_borrow(|own| {
        if let Some(beats) = own {
            beats.last.store(now(), Ordering::Relaxed);
        }
    });
}

/// Waits for something that ends by itself, with limits of its own: the network,
/// which is given up when it is silent and may be as slow as it likes. This
/// thread's loop need not come round meanwhile.
pub fn waiting<T>(wait: impl FnOnce() -> T) -> T {
    OWN.with_borrow(|own| {
        if let Some(beats) = own {
            beats.last.store(WAITING, Ordering::Relaxed);
        }
    });
    let result = wait();
    beat();
    result
}

/// The first loop whose heart has not beaten for longer than `patience`, and for
/// how long.
pub fn stopped(patience: Duration) -> Option<(String, Duration)> {
    let hearts = HEARTS.lock().unwrap_or_else(PoisonError::into_inner);
    hearts.iter().filter_map(Weak::upgrade).find_map(|heart| {
        let silent = now().saturating_sub(heart.last.load(Ordering::Relaxed));
        let silent = Duration::from_millis(silent);
        (silent > patience).then(|| (heart.name.clone(), silent))
    })
}

/// Whether a thread of this process waits for a disk (or a file server) without
/// being interruptible. A loop that waits for it is not to blame, and a process
/// that is killed then does not end either.
pub fn waits_for_disk() -> bool {
    let Ok(threads) = fs::read_dir("/proc/self/task") else { return false };
    threads.flatten().any(|thread| {
        let stat = fs::read_to_string(thread.path().join("stat")).unwrap_or_default();
        is_uninterruptible(&stat)
    })
}

/// By a line of proc_pid_stat(5); the name, in parentheses, may contain anything.
fn is_uninterruptible(stat: &str) -> bool {
    stat.rsplit_once(") ").is_some_and(|(_, rest)| rest.starts_with('D'))
}

fn now() -> u64 {
    static START: OnceLock<Instant> = OnceLock::new();
    START.get_or_init(Instant::now).elapsed().as_millis() as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_heart_is_watched_while_it_lives() {
        let heart = Heart::begin("a loop");
        std::thread::sleep(Duration::from_millis(60));
        let named = |found: Option<(String, Duration)>| found.map(|(name, _)| name);
        assert_eq!(named(stopped(Duration::from_millis(20))).as_deref(), Some("a loop"));
        beat();
        assert_eq!(named(stopped(Duration::from_millis(40))), None);
        waiting(|| {
            std::thread::sleep(Duration::from_millis(60));
            assert_eq!(stopped(Duration::from_millis(20)), None, "who waits needs not beat");
        });
        std::thread::sleep(Duration::from_millis(60));
        drop(heart);
        assert_eq!(stopped(Duration::from_millis(20)), None, "who ended needs not beat");
        beat();
    }

    #[test]
    fn states_of_threads() {
        assert!(is_uninterruptible("12 (a) D) D 1 1 1 0"));
        assert!(!is_uninterruptible("12 (a) D 1) S 1 1 1 0"));
        assert!(!is_uninterruptible(""));
    }
}
