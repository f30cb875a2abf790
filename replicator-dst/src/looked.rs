//! What somebody looked at a moment ago and need not look at again.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// What a look found, and when that was.
#[derive(Debug)]
pub struct Looked<T> {
    /// For how long it is good.
    life: Duration,
    found: Mutex<Option<(Instant, T)>>,
}

impl<T: Clone> Looked<T> {
    /// Nothing yet; what a look finds is good for `life`.
    pub fn new(life: Duration) -> Self {
        Self { life, found: Mutex::new(None) }
    }

    /// What was found lately, else what `look` finds. Others wait meanwhile, and
    /// have the same.
    pub fn at(&self, now: Instant, look: impl FnOnce() -> T) -> T {
        let mut found = self.found.lock().unwrap_or_else(PoisonError::into_inner);
        match &*found {
            Some((when, value)) if now.saturating_duration_since(*when) < self.life => {
                value.clone()
            }
            _ => found.insert((now, look())).1.clone(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn looks_again_when_its_time_is_over() {
        let (looked, begin) = (Looked::new(Duration::from_secs(1)), Instant::now());
        let at = |millis, value| looked.at(begin + Duration::from_millis(millis), || value);
        assert_eq!(at(0, 1), 1);
        assert_eq!(at(999, 2), 1, "still good");
        assert_eq!(at(1000, 3), 3, "looked again");
        assert_eq!(at(500, 4), 3, "one who read the clock earlier gets the newer look");
    }
}
