//! What is to be delivered, and the loop that does it.

use std::collections::VecDeque;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::{Channel, Event};
use crate::stop::Stop;

/// Events that wait at most; with more the oldest is dropped, and counted.
const MOST: usize = 1000;
/// First and longest pause before what failed is tried again.
const PAUSE: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(300));
/// How long an event is tried.
const PATIENCE: Duration = Duration::from_secs(24 * 3600);

/// A bounded queue of events.
pub(super) struct Queue {
    name: &'static str,
    inner: Mutex<Inner>,
    changed: Condvar,
}

#[derive(Default)]
struct Inner {
    events: VecDeque<Event>,
    closed: bool,
}

impl Queue {
    pub(super) fn new(name: &'static str) -> Self {
        // Shown from 0 on.
        for name in [DELIVERED, FAILED, DROPPED].map(|metric| counter(metric, name)) {
            name.increment(0);
        }
        let queue = Self { name, inner: Mutex::default(), changed: Condvar::new() };
        queue.show(&queue.lock());
        queue
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn show(&self, inner: &Inner) {
        metrics::gauge!("replicator_notify_pending", "channel" => self.name)
            .set(inner.events.len() as f64);
    }

    /// Adds an event; never waits.
    pub(super) fn push(&self, event: Event) {
        let mut inner = self.lock();
        if inner.events.len() >= MOST {
            inner.events.pop_front();
            self.dropped("too many wait");
        }
        inner.events.push_back(event);
        self.show(&inner);
        self.changed.notify_all();
    }

    /// The oldest, which stays; waits until there is one. `None` at the end.
    fn first(&self) -> Option<Event> {
        let mut inner = self.lock();
        loop {
            if inner.closed {
                return None;
            }
            if let Some(event) = inner.events.front() {
                return Some(event.clone());
            }
            inner = self.changed.wait(inner).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// This one is done with. (It may have been dropped meanwhile.)
    fn done(&self, id: &str) {
        let mut inner = self.lock();
        if inner.events.front().is_some_and(|event| event.id == id) {
            inner.events.pop_front();
        }
        self.show(&inner);
    }

    fn dropped(&self, why: &str) {
        tracing::warn!(channel = self.name, why, "a notification is dropped");
        counter(DROPPED, self.name).increment(1);
    }

    pub(super) fn close(&self) {
        let mut inner = self.lock();
        inner.closed = true;
        if !inner.events.is_empty() {
            tracing::warn!(
                channel = self.name,
                events = inner.events.len(),
                "notifications are not delivered"
            );
        }
        self.changed.notify_all();
    }
}

const DELIVERED: &str = "replicator_notify_delivered_total";
const FAILED: &str = "replicator_notify_failures_total";
const DROPPED: &str = "replicator_notify_dropped_total";

fn counter(name: &'static str, channel: &'static str) -> metrics::Counter {
    metrics::counter!(name, "channel" => channel)
}

/// Delivers what is in the queue, in order, until the end.
pub(super) fn deliver<C: Channel>(queue: &Queue, channel: &C, stop: &Stop) {
    while let Some(event) = queue.first() {
        let begun = Instant::now();
        let mut pause = PAUSE.0;
        loop {
            let Err(error) = channel.tell(&event) else {
                counter(DELIVERED, C::NAME).increment(1);
                break;
            };
            counter(FAILED, C::NAME).increment(1);
            tracing::warn!(
                channel = C::NAME,
                event = event.kind.as_str(),
                error,
                "a notification failed"
            );
            if !C::RETRIES {
                break;
            }
            if begun.elapsed() >= PATIENCE {
                queue.dropped("nobody took it for a day");
                break;
            }
            if stop.wait_for(pause) {
                return;
            }
            pause = (pause * 2).min(PAUSE.1);
        }
        queue.done(&event.id);
    }
}
