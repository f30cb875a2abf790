//! How soon one batch follows another.
//!
//! What changes on a source at rest travels at once. While changes go on, each batch
//! waits for those of a moment: a batch costs some 2 ms of CPU at both ends together
//! (threads that wake each other, three syncs), however little is in it, and at 500
//! changes a second that was more than a core (bench/NOTES.md).

use std::time::{Duration, Instant};

use super::Engine;

/// Batches of what goes on changing begin no sooner one after the other.
const PACE: Duration = Duration::from_millis(10);

impl Engine {
    /// How long what changed waits for what else changes; zero when a batch of it may
    /// be built. A walk waits for nothing, nor does who waits for the watermark.
    pub(super) fn pause(&self) -> Duration {
        if self.urgent || self.gap.is_some() || !self.dirty.listings.is_empty() {
            return Duration::ZERO;
        }
        PACE.saturating_sub(self.last_build.elapsed())
    }

    /// Until when nothing but a message needs attention, because what changed waits.
    pub(super) fn paused(&self) -> Option<Instant> {
        let pause = self.pause();
        let waits = !pause.is_zero() && !self.dirty.is_empty() && self.is_ready();
        waits.then(|| Instant::now() + pause)
    }
}
