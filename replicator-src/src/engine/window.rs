//! What the replica lost within a while, and what has not been there for long.
//! Pure: time is an argument.
//!
//! *Young* is what came to the replica a short while ago because of an event:
//! its end is no accident. What a walk found is not young, for it was there
//! before anybody looked; so neither is anything of an initial sync.
//!
//! INVARIANT: an object stays young for `window × 100 ÷ percent`. Where objects
//! come and go all the time and each lives equally long, at most
//! `window ÷ lifetime` of them end within a window; those that do not end young
//! are therefore less than the share that halts. Churn never halts, however
//! fast.

use std::collections::{HashMap, VecDeque};
use std::time::{Duration, Instant};

use replicator_common::id::{BatchId, ObjectId};
use replicator_common::time::Timestamp;

use crate::index::Noted;

/// Young objects that are known at most, some 100 bytes each; of more, those
/// that have been there longest count as old.
const YOUNG: usize = 65_536;
/// Into how many steps a window is cut: deletions of one step count as if they
/// had been at its last.
const STEPS: u32 = 64;
/// Batches that may be lost with a session: their deletions are not added to
/// others'.
const APART: usize = 4;

/// Deletions that a batch brings, or those of several within one step.
#[derive(Clone, Copy, Debug)]
struct Deleted {
    batch: BatchId,
    at: Instant,
    count: u64,
}

/// See the module.
#[derive(Debug)]
pub(super) struct Window {
    length: Duration,
    /// How long an object is young.
    youth: Duration,
    start: Instant,
    /// Oldest first. At most [`STEPS`] and a few.
    deleted: VecDeque<Deleted>,
    young: HashMap<ObjectId, Instant>,
    /// The same, oldest first, with some that are gone.
    order: VecDeque<(Instant, ObjectId)>,
    /// No longer young, and noted on disk as if they were.
    grown: Vec<ObjectId>,
}

impl Window {
    /// Of this length; `percent` (1 to 100) is the share that halts.
    pub(super) fn new(length: Duration, percent: u8, start: Instant) -> Self {
        let youth = length * 100 / u32::from(percent.max(1));
        Self {
            length,
            youth,
            start,
            deleted: VecDeque::new(),
            young: HashMap::new(),
            order: VecDeque::new(),
            grown: Vec::new(),
        }
    }

    /// Takes in what a process before this noted, given the moment `now` on its
    /// clock and on this one's.
    pub(super) fn recall(
        &mut self,
        deleted: Vec<(BatchId, Timestamp, u64)>,
        young: Vec<(ObjectId, Timestamp)>,
        now: (Instant, Timestamp),
    ) {
        // A machine that was started just now has no moment that long ago; then
        // it counts as if it were just now.
        let moment = |time: Timestamp| now.0.checked_sub(now.1.since(time)).unwrap_or(now.0);
        let deleted = deleted.into_iter();
        self.deleted =
            deleted.map(|(batch, at, count)| Deleted { batch, at: moment(at), count }).collect();
        let young = young.into_iter();
        let mut order: Vec<_> = young.map(|(object, at)| (moment(at), object)).collect();
        order.sort();
        self.young = order.iter().map(|(at, object)| (object.clone(), *at)).collect();
        self.order = order.into();
        self.expire(now.0);
    }

    /// Forgets everything.
    pub(super) fn clear(&mut self) {
        self.deleted.clear();
        self.grown.extend(self.young.drain().map(|(object, _)| object));
        self.order.clear();
    }

    /// Forgets deletions, not what is young.
    pub(super) fn forgive(&mut self) {
        self.deleted.clear();
    }

    /// A batch is about to be committed that deletes so many and brings these.
    /// Gives what is to be made durable with it.
    pub(super) fn note(
        &mut self,
        batch: BatchId,
        count: u64,
        born: Vec<ObjectId>,
        now: (Instant, Timestamp),
    ) -> Noted {
        if count > 0 {
            self.deleted.push_back(Deleted { batch, at: now.0, count });
            self.merge();
        }
        for object in &born {
            self.young.insert(object.clone(), now.0);
            self.order.push_back((now.0, object.clone()));
        }
        self.expire(now.0);
        let wall = |at: Instant| now.1.offset(-nanos(now.0.duration_since(at)));
        let deletions = self.deleted.iter().map(|one| (one.batch, wall(one.at), one.count));
        Noted {
            deletions: Some(deletions.collect()),
            at: now.1,
            born,
            gone: std::mem::take(&mut self.grown),
        }
    }

    /// Batches after `committed` never came to the replica.
    pub(super) fn lost_after(&mut self, committed: BatchId) {
        self.deleted.retain(|one| one.batch <= committed);
    }

    /// These are gone from the replica for good.
    pub(super) fn gone<'a>(&mut self, objects: impl IntoIterator<Item = &'a ObjectId>) {
        let known = objects.into_iter().filter(|object| self.young.remove(*object).is_some());
        self.grown.extend(known.cloned());
    }

    pub(super) fn is_young(&self, object: &ObjectId) -> bool {
        self.young.contains_key(object)
    }

    /// How many are young.
    pub(super) fn young(&self) -> u64 {
        self.young.len() as u64
    }

    /// Deletions within the window.
    pub(super) fn deletions(&mut self, now: Instant) -> u64 {
        self.expire(now);
        self.deleted.iter().map(|one| one.count).sum()
    }

    fn step(&self, at: Instant) -> u128 {
        let length = (self.length / STEPS).max(Duration::from_nanos(1));
        at.saturating_duration_since(self.start).as_nanos() / length.as_nanos()
    }

    /// Adds up what is of one step, but for the newest.
    fn merge(&mut self) {
        let Some(newer) = self.deleted.len().checked_sub(APART) else { return };
        let Some(older) = newer.checked_sub(1) else { return };
        let (Some(a), Some(b)) = (self.deleted.get(older), self.deleted.get(newer)) else { return };
        if self.step(a.at) == self.step(b.at) {
            let count = a.count.saturating_add(b.count);
            let sum = Deleted { count, ..*b };
            self.deleted.remove(newer);
            if let Some(slot) = self.deleted.get_mut(older) {
                *slot = sum;
            }
        }
    }

    fn expire(&mut self, now: Instant) {
        let length = self.length;
        let over = |at: Instant, limit: Duration| now.saturating_duration_since(at) > limit;
        while self.deleted.pop_front_if(|one| over(one.at, length)).is_some() {}
        while let Some((at, object)) = self.order.front() {
            if self.young.get(object) == Some(at) {
                if !over(*at, self.youth) && self.young.len() <= YOUNG {
                    break;
                }
                self.young.remove(object);
                self.grown.push(object.clone());
            }
            self.order.pop_front();
        }
        if self.order.len() > 2 * YOUNG {
            let young = &self.young;
            self.order.retain(|(at, object)| young.get(object) == Some(at));
        }
    }
}

fn nanos(duration: Duration) -> i64 {
    i64::try_from(duration.as_nanos()).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn id(number: u64) -> ObjectId {
        ObjectId::new(1, &number.to_be_bytes()).unwrap()
    }

    fn note(window: &mut Window, batch: u64, count: u64, born: &[u64], now: Instant) -> Noted {
        let born = born.iter().map(|number| id(*number)).collect();
        window.note(BatchId(batch), count, born, (now, Timestamp(1 << 60)))
    }

    #[test]
    fn deletions_count_together_within_the_window() {
        let start = Instant::now();
        let mut window = Window::new(10 * SECOND, 50, start);
        note(&mut window, 1, 3, &[], start);
        note(&mut window, 2, 4, &[], start + 6 * SECOND);
        assert_eq!(window.deletions(start + 10 * SECOND), 7);
        assert_eq!(window.deletions(start + 11 * SECOND), 4);
        assert_eq!(window.deletions(start + 17 * SECOND), 0);
    }

    #[test]
    fn many_small_deletions_take_little_memory_and_none_is_lost() {
        let start = Instant::now();
        let mut window = Window::new(640 * SECOND, 50, start);
        let mut now = start;
        for batch in 0..20_000 {
            now += SECOND / 50;
            note(&mut window, batch, 1, &[], now);
        }
        assert!(window.deleted.len() <= STEPS as usize + APART + 1, "{}", window.deleted.len());
        assert_eq!(window.deletions(now), 20_000);
        // Of a step, all go at once, with the last.
        assert_eq!(window.deletions(now + 640 * SECOND), 1);
    }

    #[test]
    fn what_a_lost_batch_would_have_deleted_does_not_count() {
        let start = Instant::now();
        let mut window = Window::new(10 * SECOND, 50, start);
        for batch in 1..=9 {
            note(&mut window, batch, 1, &[], start);
        }
        window.lost_after(BatchId(7));
        assert_eq!(window.deletions(start), 7);
    }

    #[test]
    fn what_came_lately_is_young_for_as_long_as_the_share_wants() {
        let start = Instant::now();
        let mut window = Window::new(10 * SECOND, 25, start);
        note(&mut window, 1, 0, &[1], start);
        window.deletions(start + 40 * SECOND);
        assert!(window.is_young(&id(1)) && !window.is_young(&id(2)));
        window.deletions(start + 41 * SECOND);
        assert!(!window.is_young(&id(1)));
        let noted = note(&mut window, 2, 0, &[], start + 41 * SECOND);
        assert_eq!(noted.gone, [id(1)], "so that the disk forgets it too");
    }

    #[test]
    fn churn_takes_no_memory_for_what_is_gone() {
        let start = Instant::now();
        let mut window = Window::new(600 * SECOND, 50, start);
        for number in 0..4 * YOUNG as u64 {
            note(&mut window, number, 0, &[number], start);
            window.gone(&[id(number)]);
        }
        assert_eq!(window.young(), 0);
        assert!(window.order.len() <= 2 * YOUNG + 1, "{}", window.order.len());
        for number in 0..2 * YOUNG as u64 {
            note(&mut window, number, 0, &[number], start);
        }
        assert_eq!(window.young(), YOUNG as u64);
        assert!(!window.is_young(&id(0)), "the oldest of too many are old");
    }

    #[test]
    fn another_process_goes_on_where_this_one_ended() {
        let start = Instant::now();
        let mut first = Window::new(10 * SECOND, 50, start);
        note(&mut first, 1, 5, &[1], start);
        let noted =
            first.note(BatchId(2), 6, vec![id(2)], (start + 2 * SECOND, Timestamp(1 << 60)));
        let mut next = Window::new(10 * SECOND, 50, start);
        let young = noted.born.iter().map(|object| (object.clone(), noted.at)).collect();
        let now = (start + 50 * SECOND, Timestamp(1 << 60).offset(7_000_000_000));
        next.recall(noted.deletions.unwrap(), young, now);
        assert_eq!(next.deletions(now.0), 11);
        assert_eq!(next.deletions(now.0 + 2 * SECOND), 6);
        assert!(next.is_young(&id(2)));
        next.deletions(now.0 + 14 * SECOND);
        assert!(!next.is_young(&id(2)));
    }
}
