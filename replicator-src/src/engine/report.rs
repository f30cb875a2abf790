//! What the engine tells of itself.

use std::time::{Duration, Instant};

use replicator_common::id::ObjectId;
use replicator_common::name::Name;
use replicator_common::status::{Blocker, Positions, Skipped, SourceReport, StageLag};
use replicator_common::time::Timestamp;
use replicator_common::wire::SourceMessage;

use super::held::Transfer;
use super::pace::REFRESH;
use super::state::Facts;
use super::{Engine, IDLE_REPORT, REPORT};
use crate::index::View;
use crate::plan::{HoldReason, Skip};

/// Blockers and nested mounts that status names.
const EXAMPLES: usize = 100;
/// Why a file that grew waits.
const COMPARED: &str = "large file: what was appended is sent at once, the rest is to be compared";
/// Deepest path that is spelt out.
const DEPTH: usize = 4096;

/// Why something that the destination has no place for waits.
fn refused(cause: &str) -> String {
    format!("has no place at the destination: {cause}; it is tried again")
}

impl Engine {
    /// Until the destination is to be told how things are.
    pub(super) fn report_due(&self) -> Duration {
        let idle = self.in_flight.is_empty() && self.journal.changes() == 0;
        let every = if idle { IDLE_REPORT } else { REPORT };
        every.saturating_sub(self.last_report.elapsed())
    }

    /// Refreshes status, and tells the destination, when it is time to.
    pub(super) fn publish(&mut self) {
        if self.last_refresh.elapsed() >= REFRESH {
            self.refresh();
        }
        if self.report_due() == Duration::ZERO
            && let Some(session) = &self.session
        {
            self.last_report = Instant::now();
            // Its time is that of sending: it comes back, to compare clocks.
            let report = SourceReport { time: Timestamp::now(), ..self.shared.report() };
            let report = Box::new(report);
            // The link tells when the session has ended.
            let _ = session.send(&SourceMessage::Report(report));
        }
    }

    /// Brings status up to date.
    pub(super) fn refresh(&mut self) {
        self.last_refresh = Instant::now();
        self.told_rest = self.rests();
        let facts = self.facts();
        self.shared.refresh(facts);
    }

    fn facts(&self) -> Facts {
        let applied = self.journal.trimmed();
        let shipped = self.in_flight.back().map_or(applied, |batch| batch.mark.seq);
        let durable = self
            .in_flight
            .iter()
            .filter(|batch| batch.durable)
            .map(|batch| batch.mark.seq)
            .next_back()
            .unwrap_or(applied);
        let positions = Positions {
            captured: self.journal.last(),
            // (What is acknowledged before it was written never is.)
            journaled: self.journal.flushed().max(self.journal.trimmed()),
            shipped,
            durable: durable.max(applied),
            applied,
        };
        Facts {
            watcher: self.capture.report(),
            positions,
            lag: self.lag(),
            backlog: self.journal.changes(),
            store_bytes: self.journal.size() + self.index.store().size(),
            skipped: self.skipped_report(),
            blocked_by: self.blockers(),
            round_trip: self.session.as_ref().map(crate::session::Session::round_trip),
            events: self.capture.events(),
            wired: self.wired.frames(),
            walking: self.gap.is_some(),
            in_flight: !self.in_flight.is_empty(),
        }
    }

    /// Ages of the oldest change that has not passed each stage, from the times
    /// of barriers: what is covered by none younger waits at least since then.
    fn lag(&self) -> StageLag {
        let now = self.clock.now();
        let dirty = !self.dirty.is_empty() || !self.astray.is_empty();
        let waiting = self.cursor < self.journal.last() || dirty;
        let age = |since: Timestamp| now.since(since).as_secs_f64();
        let oldest = |pending: bool| match self.in_flight.iter().find(|b| !(pending && b.durable)) {
            Some(batch) => batch.note.committed_at.elapsed().as_secs_f64(),
            None => 0.0,
        };
        let shipped =
            if waiting && self.covered > Timestamp::NEVER { age(self.covered) } else { 0.0 };
        let held = self.holds.values().map(|held| age(held.since)).fold(0.0, f64::max);
        StageLag {
            journaled: 0.0,
            shipped: shipped.max(held),
            durable: oldest(true),
            applied: oldest(false).max(shipped).max(held),
        }
    }

    fn blockers(&self) -> Vec<Blocker> {
        let mut blockers = Vec::new();
        let arriving = self.shared.arriving();
        if let Some(halted) = self.halt.halted() {
            let reason = format!("halted: {}", halted.reason);
            blockers.push(Blocker { reason, path: None, bytes_left: None, since: halted.since });
        }
        if let Some(gap) = &self.gap {
            let reason = format!("walk of the source: {}", gap.reason);
            blockers.push(Blocker {
                reason,
                path: None,
                bytes_left: None,
                since: self.clock.wall(gap.since),
            });
        }
        for (object, held) in self.holds.iter().take(EXAMPLES) {
            let (reason, bytes_left) = match &held.hold.reason {
                HoldReason::Refused { error } => (refused(error), None),
                HoldReason::Unreadable { error } => (format!("cannot be read: {error}"), None),
                HoldReason::Large { size } => {
                    let came = held.transfer.number().and_then(|n| arriving.get(&n).copied());
                    let sent = match &held.transfer {
                        Transfer::Ready { arrived: true, .. } => *size,
                        _ => came.unwrap_or(0),
                    };
                    let refused = self.refused.get(object).map(|one| refused(&one.cause));
                    match held.tail.as_ref().filter(|tail| tail.is_alive()) {
                        // (What was appended is there soon, or already.)
                        Some(_) if refused.is_none() => (COMPARED.to_owned(), None),
                        _ => {
                            let reason = refused.unwrap_or_else(|| "large file".to_owned());
                            (reason, Some(size.saturating_sub(sent)))
                        }
                    }
                }
            };
            let path = match held.hold.entries.first() {
                Some((directory, name)) => self.path_of_entry(directory, name),
                None => self.path_of(object),
            };
            let since = self.clock.wall(held.since);
            blockers.push(Blocker { reason, path: Some(path), bytes_left, since });
        }
        blockers
    }

    fn skipped_report(&self) -> Skipped {
        let mut report = Skipped::default();
        for ((directory, name), skip) in &self.skipped {
            match skip {
                Skip::Socket => report.sockets += 1,
                Skip::Fifo => report.fifos += 1,
                Skip::Device => report.devices += 1,
                Skip::Mount if report.nested_mounts.len() < EXAMPLES => {
                    report.nested_mounts.push(self.path_of_entry(directory, name));
                }
                Skip::Mount | Skip::Reserved => {}
            }
        }
        report.nested_mounts.sort();
        report
    }

    /// An entry's path relative to the source, as far as the index knows it.
    pub(super) fn path_of_entry(&self, directory: &ObjectId, name: &Name) -> String {
        let parent = self.path_of(directory);
        if parent.is_empty() { name.to_string() } else { format!("{parent}/{name}") }
    }

    /// An object's path relative to the source, as far as the index knows it;
    /// empty for the root.
    pub(super) fn path_of(&self, object: &ObjectId) -> String {
        let mut parts = Vec::new();
        let mut at = object.clone();
        while at != self.opener.root().id && parts.len() < DEPTH {
            let Ok(Some(known)) = self.index.object(&at) else {
                parts.push(format!("(object {at})"));
                break;
            };
            let Some((directory, name)) = known.entry else { break };
            parts.push(name.to_string());
            at = directory;
        }
        parts.reverse();
        parts.join("/")
    }
}
