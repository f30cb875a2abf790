//! The journal, in memory.

use std::collections::BTreeMap;

use rand::Rng;
use rand::rngs::StdRng;
use replicator_common::id::Seq;
use replicator_src::journal::Record;

/// The journal.
#[derive(Clone, Debug, Default)]
pub struct Journal {
    records: BTreeMap<u64, Record>,
    pub(super) last: u64,
    /// Forgotten up to here.
    pub trimmed: u64,
}

impl Journal {
    pub(super) fn append(&mut self, record: Record) {
        self.last += 1;
        self.records.insert(self.last, record);
    }

    pub(super) fn read(&self, after: Seq) -> Vec<(Seq, Record)> {
        self.records.range(after.0 + 1..).map(|(seq, record)| (Seq(*seq), record.clone())).collect()
    }

    pub(super) fn trim(&mut self, through: Seq) {
        self.trimmed = self.trimmed.max(through.0);
        self.records.retain(|seq, _| *seq > through.0);
    }

    /// Nothing is left but barriers.
    pub fn is_empty(&self) -> bool {
        self.records.values().all(|record| matches!(record, Record::Barrier { .. }))
    }

    /// The power goes: what was not flushed may be lost.
    pub(super) fn cut(&mut self, random: &mut StdRng) {
        let keep = self.last - random.random_range(0..=self.records.len().min(5)) as u64;
        self.records.retain(|seq, _| *seq <= keep);
    }

    /// It is opened, as the product's is.
    pub(super) fn open(&mut self, floor: Seq) {
        let ends = (self.records.keys().next(), self.records.keys().next_back());
        (self.trimmed, self.last) = match ends {
            (Some(first), Some(last)) => (first - 1, *last.max(&floor.0)),
            _ => (floor.0, floor.0),
        };
    }
}
