//! What is to be looked at again, when, and what was seen of it so far. Pure.

use std::collections::HashSet;
use std::time::{Duration, Instant};

use replicator_common::id::ObjectId;
use replicator_common::verification::Difference;

use super::check::Item;

/// Before the first look at what the pass found different.
const FIRST: Duration = Duration::from_millis(50);
/// Between the two looks that make a difference.
const SECOND: Duration = Duration::from_millis(500);
/// Longest time between two looks.
const LONGEST: Duration = Duration::from_secs(4);
/// Looks at what keeps changing.
const LOOKS: u32 = 8;
/// How long a repair may take to show before it counts as failed.
const REPAIR: Duration = Duration::from_secs(120);

/// How far an item is.
#[derive(Clone, Debug)]
pub(super) enum Stage {
    /// Nothing is known.
    Doubt,
    /// One look has shown a difference.
    Suspect,
    /// It is being put right, since this moment.
    Repairing(Box<Difference>, Instant),
}

/// Something to be looked at again.
#[derive(Clone, Debug)]
pub(super) struct Waiting {
    pub(super) item: Item,
    pub(super) stage: Stage,
    pub(super) due: Instant,
    looks: u32,
    /// The pass goes on after this object, should it be interrupted before the
    /// item is settled.
    from: Option<ObjectId>,
    /// What came later in the pass has a higher one.
    number: u64,
}

impl Waiting {
    /// It is a difference: another look must show it too.
    pub(super) fn suspect(mut self, now: Instant) -> Self {
        self.stage = Stage::Suspect;
        self.due = now + SECOND;
        self
    }

    /// It is being put right.
    pub(super) fn repairing(mut self, difference: Difference, now: Instant) -> Self {
        let since = match self.stage {
            Stage::Repairing(_, since) => since,
            _ => now,
        };
        self.stage = Stage::Repairing(Box::new(difference), since);
        self.due = now + SECOND;
        self
    }

    /// It is a difference that cannot be put right just now.
    pub(super) fn soon(mut self, now: Instant) -> Self {
        self.due = now + FIRST;
        self
    }

    /// It could not be told now, for reasons that are not its own.
    pub(super) fn later(mut self, now: Instant) -> Self {
        self.due = now + SECOND;
        self
    }

    /// It keeps changing; `None` when that was seen often enough.
    pub(super) fn changing(mut self, now: Instant) -> Option<Self> {
        if matches!(self.stage, Stage::Repairing(..)) {
            // The repair itself is such a change.
            self.due = now + SECOND;
            return Some(self);
        }
        self.looks += 1;
        self.stage = Stage::Doubt;
        let delay = SECOND.saturating_mul(1 << self.looks.min(8)) / 2;
        self.due = now + delay.min(LONGEST);
        (self.looks < LOOKS).then_some(self)
    }

    /// Whether its repair has failed by now.
    pub(super) fn is_overdue(&self, now: Instant) -> bool {
        matches!(&self.stage, Stage::Repairing(_, since) if now > *since + REPAIR)
    }
}

/// All that waits.
#[derive(Debug, Default)]
pub(super) struct Queue {
    waiting: Vec<Waiting>,
    known: HashSet<Item>,
    next: u64,
}

impl Queue {
    /// Something differed at first sight. What waits already is not added. A pass only goes
    /// forth, so that no `from` is before an earlier one.
    pub(super) fn doubt(&mut self, item: Item, from: Option<&ObjectId>, now: Instant) {
        if self.known.insert(item.clone()) {
            let (from, number, due) = (from.cloned(), self.next, now + FIRST);
            self.next += 1;
            self.waiting.push(Waiting { item, stage: Stage::Doubt, due, looks: 0, from, number });
        }
    }

    /// Takes one that is due; it is settled unless it is put back.
    pub(super) fn take(&mut self, now: Instant) -> Option<Waiting> {
        let due = |waiting: &Waiting| waiting.due <= now;
        let at = self.waiting.iter().position(due)?;
        let waiting = self.waiting.remove(at);
        self.known.remove(&waiting.item);
        Some(waiting)
    }

    /// Puts back what was taken and is not settled.
    pub(super) fn put_back(&mut self, waiting: Waiting) {
        if self.known.insert(waiting.item.clone()) {
            self.waiting.push(waiting);
        }
    }

    pub(super) fn len(&self) -> usize {
        self.waiting.len()
    }

    pub(super) fn clear(&mut self) {
        *self = Self::default();
    }

    /// Where a pass that is interrupted now goes on, when it has come to
    /// `cursor`.
    pub(super) fn resume_at(&self, cursor: Option<&ObjectId>) -> Option<ObjectId> {
        // By number: the order of objects is the index's, which nobody knows here.
        let oldest = self.waiting.iter().min_by_key(|waiting| waiting.number);
        match oldest {
            Some(oldest) => oldest.from.clone(),
            None => cursor.cloned(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(n: u8) -> ObjectId {
        ObjectId::new(1, &[n]).unwrap()
    }

    #[test]
    fn what_is_not_settled_is_met_again_after_an_interruption() {
        let (mut queue, now) = (Queue::default(), Instant::now());
        assert_eq!(queue.resume_at(Some(&id(9))), Some(id(9)));
        // In the order of the index, which need not be that of bytes.
        queue.doubt(Item::Object(id(5)), Some(&id(6)), now);
        queue.doubt(Item::Object(id(7)), Some(&id(4)), now);
        queue.doubt(Item::Object(id(5)), Some(&id(8)), now);
        assert_eq!((queue.len(), queue.resume_at(Some(&id(9)))), (2, Some(id(6))));
        let first = queue.take(now + FIRST).unwrap();
        assert_eq!(queue.resume_at(Some(&id(9))), Some(id(4)));
        queue.put_back(first.suspect(now));
        assert_eq!(queue.resume_at(Some(&id(9))), Some(id(6)));
        queue.clear();
        queue.doubt(Item::Object(id(1)), None, now);
        queue.doubt(Item::Object(id(5)), Some(&id(6)), now);
        assert_eq!(queue.resume_at(Some(&id(9))), None, "from the very start");
        assert!(queue.take(now).is_none(), "nothing is due yet");
    }

    #[test]
    fn what_keeps_changing_is_left_alone_in_the_end() {
        let (mut queue, now) = (Queue::default(), Instant::now());
        queue.doubt(Item::Object(id(1)), None, now);
        let mut waiting = queue.take(now + FIRST).unwrap();
        let mut looks = 1;
        let mut at = now;
        while let Some(next) = waiting.changing(at) {
            assert!(next.due <= at + LONGEST && next.due > at);
            at = next.due;
            waiting = next.suspect(at);
            looks += 1;
        }
        assert_eq!(looks, LOOKS);
        assert!(at - now > Duration::from_secs(15), "longer than a change time is in doubt");
    }
}
