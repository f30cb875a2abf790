//! What of the file system is ours, and what may be.

use std::collections::{HashSet, VecDeque};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{PoisonError, RwLock};

use replicator_common::id::ObjectId;
use replicator_common::wire::Hash;

use crate::journal::Record;
use crate::watcher::{Change, What};

/// Which directories and objects are ours. Written by the engine, read by the
/// capture thread for each event.
///
/// INVARIANT (traps 2, 4): a directory joins before it is listed, an object
/// before it is read; so an event that is dropped because nothing in it is
/// known happened before the listing or reading that sees its effect.
#[derive(Default)]
pub struct Members {
    /// Everything that the watcher tells of may be ours.
    all: AtomicBool,
    /// So it is for now: those that the index knows are still being added. (One that
    /// leaves the source before it is added is known for longer than needed: its
    /// events become records, which the engine drops.)
    loading: AtomicBool,
    directories: RwLock<HashSet<ObjectId>>,
    /// Objects with names (or open descriptors) that may lie outside: all that have
    /// several names, while a walk has not come to each. By a short hash, for they
    /// may be millions. (Another object of the same hash is looked at for nothing.)
    linked: RwLock<HashSet<u64>>,
}

/// The same in each process and version: it is handed over.
fn short(id: &ObjectId) -> u64 {
    let [a, b, c, d, e, f, g, h, ..] = Hash::of(id.as_bytes()).0;
    u64::from_le_bytes([a, b, c, d, e, f, g, h])
}

impl Members {
    /// Everything that the watcher tells of may concern the source.
    pub fn everything(&self) {
        self.all.store(true, Ordering::Release);
    }

    /// The same for as long as members are `loading`.
    pub fn loading(&self, loading: bool) {
        self.loading.store(loading, Ordering::Release);
    }

    /// A directory belongs to the source from now on.
    pub fn add_directory(&self, id: ObjectId) {
        if !self.all.load(Ordering::Acquire) {
            self.directories.write().unwrap_or_else(PoisonError::into_inner).insert(id);
        }
    }

    /// Whether the object may be known as ours.
    pub fn knows(&self, id: &ObjectId) -> bool {
        self.is_anything() || self.has_directory(id) || self.has_linked(id)
    }

    /// Whether all counts as ours, for good or for now.
    fn is_anything(&self) -> bool {
        self.all.load(Ordering::Acquire) || self.loading.load(Ordering::Acquire)
    }

    /// An object is no longer part of the source.
    pub fn remove(&self, id: &ObjectId) {
        self.directories.write().unwrap_or_else(PoisonError::into_inner).remove(id);
        self.linked.write().unwrap_or_else(PoisonError::into_inner).remove(&short(id));
    }

    /// An object can be reached by names that the tree does not show.
    pub fn add_linked(&self, id: &ObjectId) {
        self.take_over_linked([short(id)]);
    }

    /// What [`Self::linked`] of the process before said.
    pub fn take_over_linked(&self, hashes: impl IntoIterator<Item = u64>) {
        if !self.all.load(Ordering::Acquire) {
            self.linked.write().unwrap_or_else(PoisonError::into_inner).extend(hashes);
        }
    }

    fn has_directory(&self, id: &ObjectId) -> bool {
        self.directories.read().unwrap_or_else(PoisonError::into_inner).contains(id)
    }

    fn has_linked(&self, id: &ObjectId) -> bool {
        let linked = self.linked.read().unwrap_or_else(PoisonError::into_inner);
        !linked.is_empty() && linked.contains(&short(id))
    }

    /// Objects with names that may lie outside, hashed; at most `most`, else `None`.
    pub fn linked(&self, most: usize) -> Option<Vec<u64>> {
        let linked = self.linked.read().unwrap_or_else(PoisonError::into_inner);
        (linked.len() <= most).then(|| linked.iter().copied().collect())
    }

    /// Keeps for good what [`Recent`] would forget: an object that got a name
    /// while nothing said where, and is now seen to have one in the source. It
    /// may have been opened elsewhere (O_TMPFILE), and the kernel goes on
    /// telling where it was opened, not where it stands.
    pub(super) fn keep(&self, change: &Change, recent: &Recent) {
        // A removed name has its object told twice in the same way; what is
        // being removed need not be kept.
        if let Change::Object { object, via: Some(via), what } = change
            && what.content
            && recent.contains(object)
            && (self.is_anything() || self.has_directory(via))
        {
            self.add_linked(object);
        }
    }

    /// Whether a rename led into the source.
    fn is_from_outside(&self, from: Option<&ObjectId>) -> bool {
        let ours = |from| self.all.load(Ordering::Acquire) || self.has_directory(from);
        !from.is_some_and(ours)
    }

    /// The record of a change that concerns the source, when it needs one.
    pub(super) fn record(&self, change: Change) -> Option<Record> {
        Some(match change {
            Change::Entry { directory, name } => Record::Entry { directory, name },
            Change::Object { object, what, via: _ } => Record::Object { object, what },
            Change::Named { directory, name, what } => Record::Named { directory, name, what },
            // What it was outside is not known: all of it may differ. Of a
            // directory, what is below was told for as long as it was ours, and
            // is looked at as new after that.
            Change::Arrived { object, from, to: _ } if self.is_from_outside(from.as_ref()) => {
                let what = What { content: true, attributes: true };
                Record::Object { object, what }
            }
            Change::Arrived { .. } => return None,
            Change::Gap { reason } => Record::Gap { reason },
        })
    }

    /// Whether a change may concern the source. An object that was reached
    /// through a foreign directory, or through none, counts when it is known
    /// to have names outside; a change of attributes is always let through
    /// when nothing says where (that is how a new hard link shows).
    pub(super) fn concerns(&self, change: &Change, recent: &Recent) -> bool {
        if self.is_anything() {
            return true;
        }
        match change {
            Change::Gap { .. } => true,
            Change::Entry { directory, .. } | Change::Named { directory, .. } => {
                self.has_directory(directory)
            }
            Change::Arrived { to, .. } => self.has_directory(to),
            Change::Object { object, via, .. } => {
                via.as_ref().is_none_or(|via| self.has_directory(via))
                    || self.has_directory(object)
                    || recent.contains(object)
                    || self.has_linked(object)
            }
        }
    }
}

/// Objects whose attributes changed lately without a word where: a hard link
/// to one of ours may just have been made outside. Bridges the moment until
/// the engine has looked and says so by [`Members::add_linked`], or until the
/// event of the new name says so ([`Members::keep`]).
#[derive(Default)]
pub(super) struct Recent {
    pub(super) order: VecDeque<ObjectId>,
    set: HashSet<ObjectId>,
}

impl Recent {
    pub(super) const MOST: usize = 8192;

    pub(super) fn note(&mut self, change: &Change) {
        if let Change::Object { object, via: None, .. } = change {
            self.add(object);
        }
    }

    pub(super) fn add(&mut self, object: &ObjectId) {
        if self.set.insert(object.clone()) {
            self.order.push_back(object.clone());
        }
        if self.order.len() > Self::MOST
            && let Some(oldest) = self.order.pop_front()
        {
            self.set.remove(&oldest);
        }
    }

    pub(super) fn contains(&self, object: &ObjectId) -> bool {
        self.set.contains(object)
    }
}
