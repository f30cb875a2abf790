//! When records came into the journal: how old the oldest change in a batch is.
//! Pure: the time is an argument.

use std::collections::VecDeque;
use std::time::Instant;

use replicator_common::id::Seq;

/// Times that are remembered; with more, every two become one.
const MOST: usize = 4096;

/// Records that came together.
#[derive(Clone, Copy, Debug)]
struct Came {
    first: Seq,
    last: Seq,
    at: Instant,
}

/// Times at which records were appended that are in no batch yet, in order.
///
/// INVARIANT: what it says of a record is never later than when the record
/// came: of two that become one, the earlier time counts.
#[derive(Debug, Default)]
pub struct Arrivals(VecDeque<Came>);

impl Arrivals {
    /// Records `first` to `last` come at `at`.
    pub fn came(&mut self, first: Seq, last: Seq, at: Instant) {
        if self.0.len() >= MOST {
            let pairs = self.0.make_contiguous().chunks(2);
            self.0 = pairs
                .filter_map(|pair| {
                    let (earlier, later) = (pair.first()?, pair.last()?);
                    Some(Came { last: later.last, ..*earlier })
                })
                .collect();
        }
        self.0.push_back(Came { first, last, at });
    }

    /// Records up to `seq` are in a batch: when the oldest of them came that
    /// were in none before; `None` when there is none.
    pub fn taken(&mut self, seq: Seq) -> Option<Instant> {
        let oldest = self.0.front().filter(|came| came.first <= seq)?.at;
        while self.0.front().is_some_and(|came| came.last <= seq) {
            self.0.pop_front();
        }
        if let Some(rest) = self.0.front_mut().filter(|came| came.first <= seq) {
            rest.first = Seq(seq.0 + 1);
        }
        Some(oldest)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_oldest_of_what_is_taken() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut arrivals = Arrivals::default();
        assert_eq!(arrivals.taken(Seq(9)), None);
        arrivals.came(Seq(10), Seq(19), at(1));
        arrivals.came(Seq(20), Seq(20), at(2));
        arrivals.came(Seq(30), Seq(39), at(3));
        assert_eq!(arrivals.taken(Seq(9)), None, "they come later");
        assert_eq!(arrivals.taken(Seq(15)), Some(at(1)));
        assert_eq!(arrivals.taken(Seq(15)), None, "once");
        assert_eq!(arrivals.taken(Seq(25)), Some(at(1)), "the rest of the first");
        assert_eq!(arrivals.taken(Seq(39)), Some(at(3)));
        assert_eq!(arrivals.taken(Seq(50)), None);
    }

    proptest! {
        /// Never later than the naive list says, and in bounded memory.
        #[test]
        fn never_later_than_it_was(steps in prop::collection::vec((1_u64..9, 0_u64..4), 1..400)) {
            let start = Instant::now();
            let (mut arrivals, mut naive) = (Arrivals::default(), Vec::new());
            let (mut last, mut taken) = (0, 0);
            for (number, (came, take)) in steps.into_iter().enumerate() {
                let at = start + Duration::from_secs(number as u64);
                arrivals.came(Seq(last + 1), Seq(last + came), at);
                naive.extend((last + 1..=last + came).map(|seq| (seq, at)));
                last += came;
                if take == 0 {
                    continue;
                }
                let up_to = (taken + take * 3).min(last);
                let expected = naive.iter().find(|(seq, _)| *seq > taken && *seq <= up_to).map(|(_, at)| *at);
                prop_assert_eq!(arrivals.taken(Seq(up_to)), expected);
                taken = taken.max(up_to);
            }
        }

        #[test]
        fn memory_is_bounded(many in 1_u64..40_000) {
            let mut arrivals = Arrivals::default();
            let start = Instant::now();
            for seq in 1..=many {
                arrivals.came(Seq(seq), Seq(seq), start + Duration::from_millis(seq));
                prop_assert!(arrivals.0.len() <= MOST);
            }
            prop_assert_eq!(arrivals.taken(Seq(many)), Some(start + Duration::from_millis(1)));
            prop_assert_eq!(arrivals.taken(Seq(many)), None);
        }
    }
}
