//! Tells people: ERROR, HALTED, a lag above a threshold, and that each is over;
//! by a webhook, by a command, or both.
//!
//! `watch` decides, purely, from how status stands; one thread looks at it
//! every second, and one a channel delivers, from a bounded queue. So neither a
//! slow receiver nor a command that hangs holds up anything.
//!
//! What was told is known in memory: after a restart what is still wrong is told
//! once more, and what had not been delivered is lost.

mod command;
mod event;
mod queue;
mod watch;
mod webhook;

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::config::NotifyConfig;
use crate::control::Control;
use crate::stop::Stop;
use crate::telemetry::Side;
use crate::time::Timestamp;

pub use event::{Event, Kind};
pub use watch::{Rule, Watch};

use queue::Queue;

/// How often status is looked at.
const PERIOD: Duration = Duration::from_secs(1);

/// Why nobody can be told.
#[derive(Debug, thiserror::Error)]
pub enum NotifyError {
    /// A file that the configuration names cannot be read.
    #[error("cannot read {}: {source}", path.display())]
    Read {
        /// Which.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// It is not what it should be.
    #[error("{}: {reason}", path.display())]
    Invalid {
        /// Which.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// No thread.
    #[error("cannot start a thread for notifications: {0}")]
    Thread(#[source] io::Error),
}

/// Whoever takes events: returns when it was told, or an error in words.
trait Channel: Send + 'static {
    /// As metrics name it.
    const NAME: &'static str;
    /// Whether what failed is tried again.
    const RETRIES: bool;

    fn tell(&self, event: &Event) -> Result<(), String>;
}

/// Running notifications. They end when this is dropped; what is not delivered
/// by then is lost.
#[derive(Default)]
pub struct Notifier {
    stop: Stop,
    queues: Vec<Arc<Queue>>,
    threads: Vec<JoinHandle<()>>,
}

impl Notifier {
    /// Checks the files that the configuration names.
    ///
    /// # Errors
    /// When one of them cannot be used.
    pub fn check(config: &NotifyConfig) -> Result<(), NotifyError> {
        webhook::Webhook::open(config)?;
        command::Command::check(config)
    }

    /// Tells of what `control` lists from now on, as `config` says; nothing
    /// when it names nobody.
    ///
    /// # Errors
    /// When a file that it names cannot be used, or there is no thread.
    pub fn start(
        config: &NotifyConfig,
        control: Arc<dyn Control>,
        side: Side,
    ) -> Result<Self, NotifyError> {
        let mut notifier = Self::default();
        // No reason not to replicate: it may be there again when it is needed.
        if let Err(error) = command::Command::check(config) {
            tracing::warn!(%error, "the notify command would fail now");
        }
        if let Some(webhook) = webhook::Webhook::open(config)? {
            notifier.add(webhook)?;
        }
        if let Some(command) = command::Command::new(config) {
            notifier.add(command)?;
        }
        if notifier.queues.is_empty() {
            return Ok(notifier);
        }
        let (stop, queues) = (notifier.stop.clone(), notifier.queues.clone());
        let mut watch = Watch::new(side, Rule::from(config));
        notifier.spawn("notify", move || {
            loop {
                for event in watch.look(&control.list(), Instant::now(), Timestamp::now()) {
                    tracing::info!(
                        event = event.kind.as_str(),
                        message = event.message,
                        "notifying"
                    );
                    let event_label = event.kind.as_str();
                    metrics::counter!("replicator_notify_events_total", "event" => event_label)
                        .increment(1);
                    queues.iter().for_each(|queue| queue.push(event.clone()));
                }
                if stop.wait_for(PERIOD) {
                    return;
                }
            }
        })?;
        Ok(notifier)
    }

    fn add<C: Channel>(&mut self, channel: C) -> Result<(), NotifyError> {
        let queue = Arc::new(Queue::new(C::NAME));
        self.queues.push(queue.clone());
        let stop = self.stop.clone();
        let name = format!("notify-{}", C::NAME);
        self.spawn(&name, move || queue::deliver(&queue, &channel, &stop))
    }

    fn spawn(
        &mut self,
        name: &str,
        body: impl FnOnce() + Send + 'static,
    ) -> Result<(), NotifyError> {
        let thread = std::thread::Builder::new().name(name.to_owned());
        self.threads.push(thread.spawn(body).map_err(NotifyError::Thread)?);
        Ok(())
    }
}

impl Drop for Notifier {
    fn drop(&mut self) {
        self.stop.request();
        self.queues.iter().for_each(|queue| queue.close());
        // Deliveries that hang are not waited for: the process is ending.
        for thread in self.threads.drain(..).filter(JoinHandle::is_finished) {
            if thread.join().is_err() {
                tracing::error!("a thread of the notifications panicked");
            }
        }
    }
}
