//! What happens, told as it happens: `GET /replicator/v1/events` answers with
//! server-sent events, which end when the client goes or the daemon stops.
//!
//! | event | data |
//! |---|---|
//! | `hello` | once, first: `Version`, `Side`, `SamplePeriod` in seconds, `SamplesMax` |
//! | `history` | at first all [`Sample`](super::history::Sample)s, then each new one: lists by the source's file system |
//! | `status` | each second, and at once after whatever was asked for: `Time` and `Configurations`, each with its `Status`, `LastReplicated` and `Lag` |
//!
//! One task asks the control for all clients together; a client that does not
//! keep up misses a status, never a sample. Comments keep a silent line alive.

use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use axum::body::Body;
use axum::http::HeaderValue;
use axum::http::header::{CACHE_CONTROL, CONTENT_TYPE};
use axum::response::Response;
use bytes::Bytes;
use futures_core::Stream;
use serde::Serialize;
use serde_json::json;
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore, mpsc, watch};
use tokio::time::{Instant, MissedTickBehavior};

use super::ApiError;
use super::efs::last_replicated;
use super::history::{History, SAMPLE_PERIOD, SAMPLES_MAX, lag};
use crate::control::Control;
use crate::status::Status;
use crate::time::Timestamp;

/// Where they are asked for.
const PATH: &str = "/replicator/v1/events";
/// Clients at once; each holds one of the server's connections.
const CLIENTS: usize = 32;
/// Between two statuses.
const PERIOD: Duration = Duration::from_secs(1);
/// After so long without anything to say, a comment is sent.
const HEARTBEAT: Duration = Duration::from_secs(10);
/// A client that takes nothing for so long is gone.
const SEND_TIME: Duration = Duration::from_secs(20);

/// Whether a request asks for them.
pub(super) fn are_asked_for(method: &str, path: &str) -> Result<bool, ApiError> {
    match (method, path) {
        ("GET", PATH) => Ok(true),
        (_, PATH) => Err(ApiError::new(
            405,
            "UnknownOperationException",
            format!("{method} cannot be used on {PATH}"),
        )),
        _ => Ok(false),
    }
}

/// The events of one daemon.
pub(super) struct Events {
    control: Arc<dyn Control>,
    history: Mutex<History>,
    /// The last `status` event.
    latest: watch::Sender<Bytes>,
    /// Somebody wants to see now what is.
    wanted: Notify,
    slots: Arc<Semaphore>,
}

impl Events {
    pub(super) fn new(control: Arc<dyn Control>) -> Arc<Self> {
        Arc::new(Self {
            control,
            history: Mutex::default(),
            latest: watch::Sender::new(Bytes::new()),
            wanted: Notify::new(),
            slots: Arc::new(Semaphore::new(CLIENTS)),
        })
    }

    /// Something was done: clients are to see it at once.
    pub(super) fn changed(&self) {
        self.wanted.notify_one();
    }

    /// Asks the control, for the history and for all clients, until `stopping`.
    pub(super) async fn watch(self: Arc<Self>, mut stopping: watch::Receiver<()>) {
        let mut second = tokio::time::interval(PERIOD);
        second.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut due = Instant::now();
        loop {
            tokio::select! {
                _ = second.tick() => {}
                () = self.wanted.notified() => {}
                _ = stopping.changed() => return,
            }
            let sample = Instant::now() >= due;
            if !sample && self.latest.receiver_count() == 0 {
                continue;
            }
            let control = self.control.clone();
            let Ok(all) = tokio::task::spawn_blocking(move || control.list()).await else {
                tracing::error!("the status could not be made");
                continue;
            };
            let now = Timestamp::now();
            if sample {
                // A tick comes a little early or late.
                due = Instant::now() + SAMPLE_PERIOD - PERIOD / 2;
                self.history.lock().unwrap_or_else(PoisonError::into_inner).take(&all, now);
            }
            self.latest.send_replace(status(&all, now));
        }
    }

    /// The answer to one client.
    pub(super) fn answer(
        self: &Arc<Self>,
        stopping: watch::Receiver<()>,
    ) -> Result<Response, ApiError> {
        let slot = self.slots.clone().try_acquire_owned().map_err(|_| ApiError::throttled())?;
        let (sender, receiver) = mpsc::channel(1);
        tokio::spawn(self.clone().tell(sender, stopping));
        let mut response = Response::new(Body::from_stream(Told { receiver, _slot: slot }));
        let headers = response.headers_mut();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("text/event-stream"));
        headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
        Ok(response)
    }

    /// Ends when the client is gone or too slow, and when the daemon stops.
    async fn tell(self: Arc<Self>, client: mpsc::Sender<Bytes>, mut stopping: watch::Receiver<()>) {
        let mut latest = self.latest.subscribe();
        let mut has = 0;
        let mut next = self.hello();
        self.changed();
        loop {
            if !send(&client, next).await {
                return;
            }
            next = tokio::select! {
                _ = stopping.changed() => return,
                () = client.closed() => return,
                changed = latest.changed() => {
                    if changed.is_err() {
                        return;
                    }
                    let status = latest.borrow_and_update().clone();
                    match self.history_after(&mut has) {
                        Some(history) => [history, status].concat().into(),
                        None => status,
                    }
                }
                () = tokio::time::sleep(HEARTBEAT) => Bytes::from_static(b": alive\n\n"),
            };
        }
    }

    fn hello(&self) -> Bytes {
        event(
            "hello",
            &json!({
                "Version": env!("CARGO_PKG_VERSION"),
                "Side": self.control.side(),
                "SamplePeriod": SAMPLE_PERIOD.as_secs(),
                "SamplesMax": SAMPLES_MAX,
            }),
        )
    }

    /// The samples that a client lacks, which `has` those before.
    fn history_after(&self, has: &mut u64) -> Option<Bytes> {
        let history = self.history.lock().unwrap_or_else(PoisonError::into_inner);
        let after = std::mem::replace(has, history.taken());
        (after < *has).then(|| event("history", &history.since(after)))
    }
}

async fn send(client: &mpsc::Sender<Bytes>, event: Bytes) -> bool {
    matches!(tokio::time::timeout(SEND_TIME, client.send(event)).await, Ok(Ok(())))
}

fn status(all: &[Status], now: Timestamp) -> Bytes {
    let configurations: Vec<_> = all
        .iter()
        .map(|status| {
            json!({
                "Status": status,
                "LastReplicated": last_replicated(status),
                "Lag": lag(status, now),
            })
        })
        .collect();
    event("status", &json!({ "Time": now, "Configurations": configurations }))
}

/// JSON holds no line end but as `\n`, so its data is one line.
fn event(name: &str, data: &impl Serialize) -> Bytes {
    match serde_json::to_string(data) {
        Ok(data) => format!("event: {name}\ndata: {data}\n\n").into(),
        Err(error) => {
            tracing::error!(%error, name, "an event cannot be written as JSON");
            Bytes::from_static(b": this cannot be told\n\n")
        }
    }
}

/// A client's body.
struct Told {
    receiver: mpsc::Receiver<Bytes>,
    _slot: OwnedSemaphorePermit,
}

impl Stream for Told {
    type Item = Result<Bytes, std::convert::Infallible>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.receiver.poll_recv(context).map(|event| event.map(Ok))
    }
}

#[cfg(test)]
mod tests;
