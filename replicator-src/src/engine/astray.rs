//! When to look again for what was not found (see [`crate::plan::recall`]).

use std::time::Duration;

use replicator_common::id::ObjectId;

use super::build::Draft;
use super::{Engine, EngineError};
use crate::plan::recall::way;
use crate::plan::{Outcome, recall};

/// How soon after a batch is looked for what it did not find, when nothing
/// else makes one.
const RECALL: Duration = Duration::from_millis(100);
/// Above this a walk is cheaper, in memory at least.
const MOST: usize = 50_000;

impl Engine {
    /// How long until what was not found is looked for.
    pub(super) fn next_recall(&self) -> Option<Duration> {
        let waits = self.is_ready() && !self.astray.is_empty();
        waits.then(|| RECALL.saturating_sub(self.last_build.elapsed()))
    }

    /// Whether it is time to look for what was not found.
    pub(super) fn recall_due(&self) -> bool {
        !self.astray.is_empty() && self.last_build.elapsed() >= RECALL
    }

    /// Makes dirty again what was not found, where it may still be found; says
    /// whether there was anything.
    pub(super) fn recall(&mut self) -> Result<bool, EngineError> {
        if self.astray.is_empty() {
            return Ok(false);
        }
        let astray = std::mem::take(&mut self.astray);
        if astray.len() > MOST {
            self.open_gap(format!("{} things were not where they were seen", astray.len()))?;
            return Ok(true);
        }
        tracing::debug!(?astray, "not where it was seen");
        let root = self.opener.root().id.clone();
        let found = recall(astray, &root, &self.index, &mut self.tree)?;
        self.dirty.merge(found);
        Ok(true)
    }

    /// Whether the batch looked at all that may hold the new name of an orphan.
    /// What is below orphans itself does not count: nobody looks there, and it
    /// would wait for what waits for it.
    pub(super) fn looked_at_all(&self, draft: &Draft) -> Result<bool, EngineError> {
        let astray = &draft.resolve.astray;
        let listed = astray.listings.iter().map(|listing| &listing.directory);
        for directory in astray.directories().into_iter().chain(listed) {
            if self.is_in_tree(directory)? {
                return Ok(false);
            }
        }
        let away = draft.outcomes.iter().filter(|(_, outcome)| **outcome == Outcome::Away);
        for (object, _) in away {
            let new = draft.resolve.asked.get(object).is_some_and(|need| need.new);
            if new || self.is_in_tree(object)? {
                return Ok(false);
            }
        }
        Ok(self.dirty.is_empty())
    }

    /// Whether looking for a held object that is away could find it.
    pub(super) fn is_worth_looking_for(&self, object: &ObjectId) -> Result<bool, EngineError> {
        let entries = self.holds.get(object).map(|held| &held.hold.entries);
        for (directory, _) in entries.into_iter().flatten() {
            if self.is_in_tree(directory)? {
                return Ok(true);
            }
        }
        self.is_in_tree(object)
    }

    fn is_in_tree(&self, object: &ObjectId) -> Result<bool, EngineError> {
        Ok(way(&self.index, &self.opener.root().id, object)?.is_some())
    }
}
