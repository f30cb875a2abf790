//! What the engine waits for, how long, and how soon one batch follows another.
//!
//! What changes on a source at rest travels at once. While changes go on, each batch
//! waits for those of a moment: a batch costs some 2 ms of CPU at both ends together
//! (threads that wake each other, three syncs), however little is in it, and at 500
//! changes a second that was more than a core (bench/NOTES.md).

use std::time::{Duration, Instant};

use crossbeam_channel::select;

use super::{Engine, Event};

/// How often status is refreshed.
pub(super) const REFRESH: Duration = Duration::from_millis(200);
/// Batches of what goes on changing begin no sooner one after the other.
const PACE: Duration = Duration::from_millis(10);

impl Engine {
    /// The next event; `None` when a batch may be built, or something else is due.
    pub(super) fn wait(&self) -> Option<Event> {
        if self.may_build() {
            return None;
        }
        if let Some(until) = self.paused() {
            // What is captured meanwhile is taken in then, all at once.
            return self.inbox.recv_deadline(until).ok();
        }
        let patience = self.patience();
        select! {
            recv(self.inbox) -> event => event.ok(),
            recv(self.captured) -> _ => None,
            default(patience) => None,
        }
    }

    /// How long nothing needs doing unless something happens.
    fn patience(&self) -> Duration {
        let heartbeat = self.settings.heartbeat.saturating_sub(self.last_build.elapsed());
        // While nothing may be built, or an acknowledgement is due first, the
        // heartbeat's time comes and goes without anything to do.
        let idle = !self.is_ready() || !self.in_flight.is_empty();
        let pulse = if self.told_rest && self.rests() { self.report_due() } else { REFRESH };
        let pulse = if idle { pulse } else { heartbeat.min(pulse) };
        let waiting = self.next_hold().into_iter().chain(self.next_recall());
        let waiting = waiting.chain(self.next_tail());
        waiting.fold(pulse, Duration::min).max(Duration::from_millis(1))
    }

    /// Whether nothing waits, here or at the destination: once status says so, it
    /// says next what it says now, and the report is soon enough for its clock.
    pub(super) fn rests(&self) -> bool {
        self.session.is_some()
            && self.gap.is_none()
            && self.holds.is_empty()
            && self.dirty.is_empty()
            && self.in_flight.is_empty()
    }

    /// How long what changed waits for what else changes; zero when a batch of it may
    /// be built. A walk waits for nothing, nor does who waits for the watermark.
    pub(super) fn pause(&self) -> Duration {
        if self.urgent || self.gap.is_some() || !self.dirty.listings.is_empty() {
            return Duration::ZERO;
        }
        PACE.saturating_sub(self.last_build.elapsed())
    }

    /// Until when nothing but a message needs attention, because what changed waits.
    fn paused(&self) -> Option<Instant> {
        let pause = self.pause();
        let waits = !pause.is_zero() && !self.dirty.is_empty() && self.is_ready();
        waits.then(|| Instant::now() + pause)
    }
}
