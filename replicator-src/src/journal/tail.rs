//! The newest records of the journal, in memory. Pure.
//!
//! A record is appended here, and written to the store with others some time
//! later; the engine mostly reads it from here, and where the batch that carries
//! it is acknowledged first, the store never sees it.

use std::collections::VecDeque;

use replicator_common::id::Seq;

use super::Record;

/// Records that are kept after they were written, some 150 bytes each. As many
/// may wait to be written before whoever appends has to write them itself.
const MOST: usize = 8192;

/// See the module.
///
/// INVARIANT: all records after `first` are here, those up to `written` are in
/// the store or trimmed, and `first ≤ written + 1`: so each is in one of the two.
#[derive(Debug)]
pub(super) struct Tail {
    records: VecDeque<Record>,
    /// Number of the first of them.
    first: u64,
    /// Up to here none needs to be written.
    written: u64,
}

impl Tail {
    /// Of a store that holds all records up to `last`.
    pub(super) fn new(last: u64) -> Self {
        Self { records: VecDeque::new(), first: last + 1, written: last }
    }

    /// Number of the last record appended.
    pub(super) fn last(&self) -> u64 {
        self.first + self.records.len() as u64 - 1
    }

    /// Up to here none needs to be written.
    pub(super) fn written(&self) -> u64 {
        self.written
    }

    /// Adds records; gives the number of the last.
    pub(super) fn append(&mut self, new: &[Record]) -> u64 {
        self.records.extend(new.iter().cloned());
        self.last()
    }

    /// Whether so many wait to be written that no more should be added first.
    pub(super) fn is_full(&self) -> bool {
        self.last() - self.written >= MOST as u64
    }

    /// The next records to write, `most` at most, with the number of the first.
    pub(super) fn unwritten(&self, most: usize) -> Option<(u64, Vec<Record>)> {
        let from = self.written + 1;
        let skip = (from - self.first) as usize;
        let records: Vec<_> = self.records.iter().skip(skip).take(most).cloned().collect();
        (!records.is_empty()).then_some((from, records))
    }

    /// Records up to here are in the store.
    pub(super) fn wrote(&mut self, through: u64) {
        self.written = self.written.max(through);
        while self.records.len() > MOST && self.first <= self.written {
            self.records.pop_front();
            self.first += 1;
        }
    }

    /// Records up to here are not needed any more.
    pub(super) fn trim(&mut self, through: u64) {
        let through = through.min(self.last());
        self.written = self.written.max(through);
        while self.first <= through {
            self.records.pop_front();
            self.first += 1;
        }
    }

    /// Up to `most` records after `after`; `None` when some of them are only in
    /// the store.
    pub(super) fn read(&self, after: u64, most: usize) -> Option<Vec<(Seq, Record)>> {
        let from = after.saturating_add(1);
        let skip = usize::try_from(from.checked_sub(self.first)?).unwrap_or(usize::MAX);
        let records = self.records.iter().skip(skip).take(most).cloned();
        Some((from..).map(Seq).zip(records).collect())
    }

    /// The number before those that are here.
    pub(super) fn before(&self) -> u64 {
        self.first - 1
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use replicator_common::time::Timestamp;

    fn records(numbers: std::ops::RangeInclusive<i64>) -> Vec<Record> {
        numbers.map(|n| Record::Barrier { time: Timestamp(n) }).collect()
    }

    #[test]
    fn each_record_is_here_until_it_is_written_and_not_new_or_trimmed() {
        let mut tail = Tail::new(10);
        assert_eq!((tail.last(), tail.written(), tail.unwritten(5)), (10, 10, None));
        assert_eq!(tail.append(&records(11..=30)), 30);
        assert_eq!(tail.unwritten(5), Some((11, records(11..=15))));
        tail.wrote(15);
        assert_eq!(tail.unwritten(100), Some((16, records(16..=30))));
        assert_eq!(tail.read(9, 5), None, "in the store alone");
        assert_eq!(tail.read(12, 1), Some(vec![(Seq(13), records(13..=13)[0].clone())]));
        // What is trimmed first need not be written.
        tail.trim(20);
        assert_eq!((tail.unwritten(1), tail.before()), (Some((21, records(21..=21))), 20));
        tail.wrote(18);
        assert_eq!(tail.written(), 20);
        tail.trim(99);
        assert_eq!((tail.last(), tail.before(), tail.unwritten(1)), (30, 30, None));
        assert_eq!(tail.read(30, 5), Some(Vec::new()));
        assert_eq!(tail.append(&records(31..=31)), 31);
    }

    #[test]
    fn memory_is_bounded_by_what_waits_to_be_written() {
        let mut tail = Tail::new(0);
        for _ in 0..10 {
            tail.append(&records(1..=MOST as i64));
            assert!(tail.is_full());
            assert_eq!(tail.before(), tail.written().saturating_sub(MOST as u64));
            tail.wrote(tail.last());
            assert!(!tail.is_full() && tail.records.len() == MOST);
        }
    }
}
