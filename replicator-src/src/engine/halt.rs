//! Deletions on a scale that looks like an accident stop replication before
//! they reach the replica, which may be the only other copy.
//!
//! What counts is the end of objects that the replica has had for long (see
//! `window`), not by how much the source shrinks: a tree whose files
//! were all removed and others put in their place has shrunk by nothing, and has
//! lost everything. Files that come and go are no accident; they never count.
//!
//! INVARIANT: a batch with which the deletions of the last while would reach the
//! share that is set is given up before its delta is prepared and its commit is
//! sent: as if the session had ended, everything that was dirty stays dirty.
//! That replication has halted is on disk, so that a restart halts as well;
//! only the operator's word removes it.

use std::collections::{BTreeSet, HashSet};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use replicator_common::crashsafe::{self, Format, StateFileError};
use replicator_common::id::{BatchId, ObjectId};
use replicator_common::object::Kind;
use replicator_common::time::Timestamp;
use rustix::fs::{Mode, OFlags};
use serde::{Deserialize, Serialize};

use super::build::Draft;
use super::window::Window;
use super::{Engine, EngineError};
use crate::index::{Noted, View};
use crate::plan::Assembly;
use crate::plan::below::{Below, Step};

/// Format of the file that says that a replication has halted. Versions: 1,
/// the first.
const FORMAT: Format = Format { name: "source-halted", version: 1 };
/// A source that is emptied halts however few objects it had, from this number
/// on, young ones apart.
const EMPTIED_MIN: u64 = 2;
/// What lets a halted replication go on.
pub const HINT: &str =
    "if the deletions are meant, let them through with `replicator resume --accept-deletions`";

/// What lets a replication go on whose source is not where it was.
pub const RETURN_HINT: &str = "the replica is as it was; mount the source there again, with `mount`, and replication goes on by itself (if it is lost, make the replica writable with `replicator failover`)";

/// When deletions halt replication.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HaltRule {
    /// At this share of the source's objects, 1 to 100; 0: never.
    pub percent: u8,
    /// Not for fewer objects than these.
    pub min: u64,
    /// Deletions count together within this time.
    pub window: Duration,
}

impl Default for HaltRule {
    fn default() -> Self {
        Self { percent: 50, min: 1000, window: Duration::from_secs(600) }
    }
}

impl HaltRule {
    /// Whether `deleted` of `objects` are too many.
    fn forbids(&self, deleted: u64, objects: u64) -> bool {
        let share = u128::from(objects) * u128::from(self.percent);
        self.percent > 0 && deleted >= self.min && u128::from(deleted) * 100 >= share
    }
}

/// That replication has halted.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Halted {
    /// Why, in words.
    pub reason: String,
    /// Since when, wall clock.
    pub since: Timestamp,
}

/// The rule, and what it goes by.
#[derive(Debug)]
pub struct Halt {
    rule: HaltRule,
    /// Where it is kept that replication has halted.
    path: PathBuf,
    halted: Option<Halted>,
    /// Deletions go through until none that were there at the operator's word
    /// are left.
    accepted: bool,
    /// Deletions that batches brought lately, and objects that do not count.
    window: Window,
    /// Orphans whose names others took: when they are dropped, they were
    /// replaced, not deleted. No more than there are orphans.
    replaced: HashSet<ObjectId>,
    /// Objects that the index still has of trees that left: counted as deleted
    /// when the tree left, not when they are dropped.
    left: u64,
}

impl Halt {
    /// With what the last process left at `path`.
    pub fn open(rule: HaltRule, path: PathBuf) -> Result<Self, StateFileError> {
        let halted = crashsafe::read(&path, &FORMAT)?;
        let window = Window::new(rule.window, rule.percent, Instant::now());
        Ok(Self { rule, path, halted, accepted: false, window, replaced: HashSet::new(), left: 0 })
    }

    /// That replication has halted, if it has.
    pub fn halted(&self) -> Option<&Halted> {
        self.halted.as_ref()
    }

    /// See [`Window::note`].
    pub(super) fn note(
        &mut self,
        batch: BatchId,
        deletions: u64,
        born: Vec<ObjectId>,
        now: (Instant, Timestamp),
    ) -> Noted {
        match self.rule.percent {
            0 => Noted::default(),
            _ => self.window.note(batch, deletions, born, now),
        }
    }

    /// See [`Window::lost_after`].
    pub(super) fn lost_after(&mut self, committed: BatchId) {
        self.window.lost_after(committed);
    }

    /// These are gone from the replica.
    pub(super) fn gone<'a>(&mut self, objects: impl IntoIterator<Item = &'a ObjectId>) {
        self.window.gone(objects);
    }

    /// The replica is compared anew: nothing is known of it.
    pub(super) fn begin_anew(&mut self) {
        self.window.clear();
        self.replaced.clear();
    }

    /// How many objects the batch deletes, young ones apart. Not one whose name
    /// leads to another object after it: it was replaced.
    pub(super) fn deletions(&self, assembly: &Assembly) -> u64 {
        let replaced = replaced_by(assembly);
        let gone = assembly.delta.objects.iter().filter(|(_, known)| known.is_none());
        gone.filter(|(object, _)| {
            !object.is_foreign()
                && !assembly.apart.contains(object)
                && !self.window.is_young(object)
                && !replaced.contains(object)
                && !self.replaced.contains(object)
        })
        .count() as u64
    }

    /// The batch is about to be committed, with the trees that leave with it and
    /// what it drops of those that left before.
    pub(super) fn leaves(&mut self, draft: &Draft, assembly: &Assembly) {
        let dropped = assembly.apart.len() as u64;
        self.left = (self.left + draft.left.all).saturating_sub(dropped);
    }

    /// Remembers which of the batch's orphans were replaced.
    pub(super) fn remember(&mut self, assembly: &Assembly) {
        let replaced = replaced_by(assembly);
        for (object, orphan) in &assembly.delta.orphans {
            if orphan.is_none() {
                self.replaced.remove(object);
            } else if replaced.contains(object) {
                self.replaced.insert(object.clone());
            }
        }
    }
}

/// Objects that end with trees that leave.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Leaving {
    all: u64,
    /// Of them, those that were not young.
    old: u64,
}

impl Leaving {
    fn count(&mut self, old: bool) {
        self.all += 1;
        self.old += u64::from(old);
    }
}

/// Objects that lose a name to another object.
fn replaced_by(assembly: &Assembly) -> BTreeSet<&ObjectId> {
    let taken = assembly.delta.entries.iter().filter(|change| change.new.is_some());
    taken.filter(|change| change.new != change.old).filter_map(|c| c.old.as_ref()).collect()
}

impl Engine {
    /// Gives the batch up, and halts, where it would delete too much. Returns
    /// the draft of a batch that may go on.
    pub(super) fn check_deletions(
        &mut self,
        mut draft: Draft,
        assembly: &Assembly,
    ) -> Result<Option<Draft>, EngineError> {
        draft.left = self.objects_of(&assembly.leaving)?;
        let Some(reason) = self.forbidden(&mut draft, assembly)? else {
            self.halt.remember(assembly);
            return Ok(Some(draft));
        };
        self.halt_for(reason)?;
        self.give_up(draft);
        // What is staged of the batch is not to meet what is built next under
        // its number: with a new session, both sides begin the batch anew.
        self.session = None;
        self.reset_transfers();
        Ok(None)
    }

    /// Why the batch must not reach the replica, if it must not.
    fn forbidden(
        &mut self,
        draft: &mut Draft,
        assembly: &Assembly,
    ) -> Result<Option<String>, EngineError> {
        let rule = self.halt.rule;
        if rule.percent == 0 || self.halt.accepted {
            return Ok(None);
        }
        let deletions = self.halt.deletions(assembly) + draft.left.old;
        draft.deletions = deletions;
        let before = self.halt.window.deletions(Instant::now());
        let deleted = before + deletions;
        if deletions > 0 && deleted >= rule.min {
            let objects = self.objects()? + before;
            if rule.forbids(deleted, objects) {
                return Ok(Some(format!(
                    "{deleted} of {objects} objects were deleted on the source within {} s, {before} of them also from the replica",
                    rule.window.as_secs()
                )));
            }
        }
        if self.empties_root(assembly)? {
            let objects = self.objects()?;
            if objects.saturating_sub(self.halt.window.young()) >= EMPTIED_MIN {
                return Ok(Some(format!(
                    "the source is empty; the replica holds {objects} objects"
                )));
            }
        }
        Ok(None)
    }

    /// Objects that the replica has, without the root.
    fn objects(&self) -> Result<u64, EngineError> {
        Ok(self.index.count()?.saturating_sub(1 + self.halt.left))
    }

    /// What was left of trees that left, by a process or a session before.
    pub(super) fn recall_leaving(&mut self) -> Result<(), EngineError> {
        let orphans = self.index.orphans()?.into_iter();
        let left: Vec<_> = orphans.filter(|(_, orphan)| orphan.left).map(|(one, _)| one).collect();
        self.leaving = !left.is_empty();
        self.halt.left = self.objects_of(&left)?.all;
        Ok(())
    }

    /// How many objects end with these directories. One of several names counts
    /// where the index has the name that it knows it by. Where nothing halts
    /// nobody asks, and a million objects take their time.
    fn objects_of(&self, directories: &[ObjectId]) -> Result<Leaving, EngineError> {
        let mut leaving = Leaving::default();
        if self.halt.rule.percent == 0 {
            return Ok(leaving);
        }
        for directory in directories {
            leaving.count(!self.halt.window.is_young(directory));
            let mut below = Below::new(&self.index, directory.clone());
            while let Some(step) = below.step()? {
                let Step::Entry { directory, name, object, known } = step else { continue };
                let Some(known) = known else { continue };
                if known.entry.is_none_or(|entry| entry == (directory, name)) {
                    leaving.count(!self.halt.window.is_young(&object));
                }
                if known.state.kind == Kind::Directory {
                    below.enter(object);
                }
            }
        }
        Ok(leaving)
    }

    /// Whether the replica's root would be empty after the batch, as the
    /// source's is now.
    fn empties_root(&self, assembly: &Assembly) -> Result<bool, EngineError> {
        let root = &self.opener.root().id;
        let changes = || assembly.delta.entries.iter().filter(|change| change.directory == *root);
        if !changes().any(|change| change.new.is_none()) || !self.root_is_empty() {
            return Ok(false);
        }
        let left = self.index.children(root)?.into_iter().map(|(name, _)| name);
        let mut left: BTreeSet<_> = left.collect();
        for change in changes() {
            match change.new {
                Some(_) => left.insert(change.name.clone()),
                None => left.remove(&change.name),
            };
        }
        Ok(left.is_empty())
    }

    /// Whether nothing stands in the source. One that cannot be read is not
    /// known to be empty.
    fn root_is_empty(&self) -> bool {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let opened = rustix::fs::openat(self.opener.root().fd(), ".", flags, Mode::empty());
        let Ok(entries) = opened.and_then(rustix::fs::Dir::new) else { return false };
        entries.into_iter().all(|entry| {
            entry.is_ok_and(|entry| matches!(entry.file_name().to_bytes(), b"." | b".."))
        })
    }

    fn halt_for(&mut self, reason: String) -> Result<(), EngineError> {
        tracing::error!(reason, "replication halted");
        self.shared.meters().halted();
        let halted = Halted { reason, since: Timestamp::now() };
        crashsafe::write(&self.halt.path, &FORMAT, &halted)?;
        self.shared.halted(Some(&halted));
        self.halt.halted = Some(halted);
        Ok(())
    }

    /// The operator's word: what was deleted so far may go.
    pub(super) fn accept_deletions(&mut self) -> Result<(), EngineError> {
        if self.halt.halted.is_none() {
            return Ok(());
        }
        tracing::warn!("deletions are accepted; replication goes on");
        crashsafe::remove(&self.halt.path)?;
        self.halt.halted = None;
        self.halt.accepted = true;
        self.shared.halted(None);
        self.urgent = true;
        Ok(())
    }

    /// A batch is about to be committed after which nothing is left of what was
    /// dirty: from here on deletions count anew.
    pub(super) fn end_acceptance(&mut self) -> Result<(), EngineError> {
        if std::mem::take(&mut self.halt.accepted) {
            tracing::info!("the accepted deletions are through");
            self.halt.window.forgive();
            self.index.store().forgive_deletions()?;
        }
        Ok(())
    }

    /// A restart does not make the guard blind: what the process before this
    /// saw counts on.
    pub(super) fn recall_deletions(&mut self) -> Result<(), EngineError> {
        let known = self.index.store().remembered()?;
        let now = (Instant::now(), self.clock.now());
        self.halt.window.recall(known.deletions, known.young, now);
        Ok(())
    }

    /// Whether deletions are accepted now.
    pub(super) fn accepts_deletions(&self) -> bool {
        self.halt.accepted
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_share_and_the_least_number_must_both_be_reached() {
        let rule = HaltRule::default();
        for (deleted, objects, expected) in [
            (999, 999, false),
            (1000, 1000, true),
            (1000, 2000, true),
            (1000, 2001, false),
            (u64::MAX, u64::MAX, true),
        ] {
            assert_eq!(rule.forbids(deleted, objects), expected, "{deleted} of {objects}");
        }
        let never = HaltRule { percent: 0, ..rule };
        assert!(!never.forbids(5000, 5000));
        let all = HaltRule { percent: 100, ..rule };
        assert!(all.forbids(5000, 5000) && !all.forbids(4999, 5000));
    }
}
