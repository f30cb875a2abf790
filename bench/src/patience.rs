//! How many rounds a peer gets: what takes minutes a round need not take an hour.

use std::collections::HashMap;
use std::time::Duration;

/// What the rounds of one workload took so far, by peer.
#[derive(Debug)]
pub struct Patience {
    /// How long the rounds of one peer may take together, with their preparation.
    /// The first is always run.
    most: Duration,
    /// All rounds together, and the last one.
    taken: HashMap<&'static str, (Duration, Duration)>,
}

impl Patience {
    /// Nothing was run yet.
    pub fn new(most: Duration) -> Self {
        Self { most, taken: HashMap::new() }
    }

    /// Whether there is time for another round, if it takes as long as the last.
    pub fn allows(&self, peer: &str) -> bool {
        self.taken.get(peer).is_none_or(|&(all, last)| all + last <= self.most)
    }

    /// A round took so long.
    pub fn took(&mut self, peer: &'static str, time: Duration) {
        let (all, last) = self.taken.entry(peer).or_default();
        (*all, *last) = (*all + time, time);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rounds(seconds: u64) -> usize {
        let mut patience = Patience::new(Duration::from_secs(150));
        let more = || {
            let allowed = patience.allows("peer");
            patience.took("peer", Duration::from_secs(seconds));
            allowed.then_some(())
        };
        std::iter::from_fn(more).take(5).count()
    }

    #[test]
    fn who_is_slow_gets_fewer_rounds_and_each_gets_one() {
        assert_eq!((rounds(0), rounds(30), rounds(31)), (5, 5, 4));
        assert_eq!((rounds(75), rounds(76), rounds(1000)), (2, 1, 1));
    }
}
