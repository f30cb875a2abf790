//! What the engine shares with those who ask: status, greeting, wishes.
//!
//! Plain data behind one lock, held for moments; the engine fills it, the
//! service and the link read it. Waiting for a watermark is done here.

mod progress;

use std::collections::BTreeMap;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use replicator_common::control::Patience;
use replicator_common::id::{BatchId, Edition, FileSystemId, Incarnation, TransferId};
use replicator_common::net::clock::{Estimate, Exchange};
use replicator_common::status::{
    Blocker, Counters, DesiredState, DestinationReport, Link, PathError, Positions,
    ReplicationStatus, Skipped, SourceReport, StageLag, TimedError, WatcherKind, WatcherReport,
};
use replicator_common::time::Timestamp;
use replicator_common::verification::Verification;
use replicator_common::wire::{Refusal, SourceHello};

use tokio::sync::Notify;

use super::halt::{HINT, Halted, RETURN_HINT};
use crate::clock::Clock;
use crate::index::Mark;
use crate::meters::{ErrorKind, Meters};
use crate::session::Session;
use progress::Meter;

/// Examples of unreadable files that status names.
const EXAMPLES: usize = 100;
/// How often it is looked whether somebody still waits.
const LOOK: Duration = Duration::from_secs(1);

/// Shared by the engine, the service and the link.
pub struct Shared {
    inner: Mutex<Inner>,
    moved: Condvar,
    clock: Arc<Clock>,
    hurry: Arc<Notify>,
    meters: Arc<Meters>,
}

struct Inner {
    report: SourceReport,
    destination: Option<(DestinationReport, Timestamp)>,
    greeting: Option<SourceHello>,
    source: FileSystemId,
    /// Every change before this internal moment is in the replica: what
    /// waiting goes by. The report's watermark is for people and other
    /// programs, and the wall clock's.
    reached: Timestamp,
    complete: bool,
    failure: Option<String>,
    /// The first start has come to an end, whatever that was.
    opened: bool,
    refusal: Option<String>,
    /// Why nothing is shipped until the operator says so, and what to say.
    halted: Option<String>,
    /// Since when the source is not where it was.
    vanished: Option<Timestamp>,
    progress: Meter,
    /// How far the destination's clock is from the wall clock here.
    clocks: Estimate,
    closed: bool,
}

impl Shared {
    /// For the source `source` at `path`.
    pub fn new(
        source: FileSystemId,
        path: String,
        desired: DesiredState,
        mark: &Mark,
        clock: Arc<Clock>,
        meters: Arc<Meters>,
    ) -> Self {
        let now = Timestamp::now();
        let report = SourceReport {
            time: now,
            desired,
            status: ReplicationStatus::Enabling,
            message: None,
            path,
            watermark: mark.watermark.unwrap_or(Timestamp::NEVER),
            watcher: WatcherReport {
                kind: WatcherKind::Scan,
                reason: "not started".to_owned(),
                doubts: Vec::new(),
                watches: None,
            },
            positions: Positions::default(),
            lag: StageLag::default(),
            backlog_records: 0,
            store_bytes: 0,
            progress: None,
            blocked_by: Vec::new(),
            skipped: Skipped::default(),
            link: Link {
                connected: false,
                since: now,
                peer: String::new(),
                round_trip_micros: None,
                clock_offset_nanos: None,
                last_error: None,
                next_attempt: None,
            },
            counters: Counters::default(),
            last_error: None,
            verification: Default::default(),
        };
        let inner = Inner {
            report,
            destination: None,
            greeting: None,
            source,
            reached: Timestamp::NEVER,
            complete: mark.watermark.is_some(),
            failure: None,
            opened: false,
            refusal: None,
            halted: None,
            vanished: None,
            progress: Meter::default(),
            clocks: Estimate::default(),
            closed: false,
        };
        let (inner, moved) = (Mutex::new(inner), Condvar::new());
        Self { inner, moved, clock, hurry: Arc::default(), meters }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    // ------------------------------------------------------------ for the link

    /// What a new session says first; `None` when the replication has ended.
    pub fn hello(&self) -> Option<SourceHello> {
        let inner = self.lock();
        let greeting = inner.greeting.clone().filter(|_| !inner.closed)?;
        Some(SourceHello { time: Timestamp::now(), ..greeting })
    }

    /// Sets what the next session says first.
    pub fn greeting(
        &self,
        incarnation: Incarnation,
        destination_incarnation: Option<Incarnation>,
        acknowledged: Edition,
        pending: Vec<Edition>,
    ) {
        let mut inner = self.lock();
        inner.greeting = Some(SourceHello {
            source: inner.source.clone(),
            incarnation,
            destination_incarnation,
            acknowledged,
            pending,
            previous: None,
            time: Timestamp::NEVER,
        });
    }

    /// A batch was acknowledged.
    pub fn greeting_acknowledged(&self, last: Edition) {
        if let Some(greeting) = &mut self.lock().greeting {
            greeting.acknowledged = last;
            greeting.pending.retain(|pending| pending.batch > last.batch);
        }
    }

    /// A batch's delta is durable; the batch is about to be committed.
    pub fn greeting_pending(&self, next: Edition) {
        if let Some(greeting) = &mut self.lock().greeting {
            greeting.pending.retain(|pending| pending.batch < next.batch);
            greeting.pending.push(next);
        }
    }

    /// Notified when somebody waits for a connection.
    pub fn hurry(&self) -> Arc<Notify> {
        self.hurry.clone()
    }

    // ---------------------------------------------------------- for the engine

    /// What orders before and after.
    pub fn clock(&self) -> Arc<Clock> {
        self.clock.clone()
    }

    /// What is counted and timed beside status.
    pub fn meters(&self) -> &Arc<Meters> {
        &self.meters
    }

    /// What the operator asks for.
    pub fn desired(&self) -> DesiredState {
        self.lock().report.desired
    }

    /// Changes counters.
    pub fn count(&self, change: impl FnOnce(&mut Counters)) {
        change(&mut self.lock().report.counters);
    }

    /// A session is open.
    pub fn connected(&self, session: &Session) {
        let mut inner = self.lock();
        inner.refusal = None;
        inner.report.counters.sessions += 1;
        let link = &mut inner.report.link;
        link.connected = true;
        link.since = Timestamp::now();
        link.peer = session.peer();
        link.next_attempt = None;
        inner.clocks = Estimate::default();
        inner.clocks.add(&session.clocks, Instant::now());
        inner.report.link.clock_offset_nanos = inner.clocks.offset();
    }

    /// A message to the destination was answered.
    pub fn clocks(&self, exchange: &Exchange) {
        let mut inner = self.lock();
        inner.clocks.add(exchange, Instant::now());
        inner.report.link.clock_offset_nanos = inner.clocks.offset();
    }

    /// There is no session; the next is tried at `next`.
    pub fn lost(&self, reason: &str, refusal: Option<&Refusal>, next: Timestamp) {
        self.meters.error(ErrorKind::Session);
        let mut inner = self.lock();
        let now = Timestamp::now();
        inner.refusal = match refusal {
            Some(refusal @ Refusal::NoConfiguration { .. }) => Some(format!(
                "{refusal}: it was deleted or failed over there; delete the configuration here with --deletion-mode LOCAL_CONFIGURATION_ONLY"
            )),
            _ => None,
        };
        let link = &mut inner.report.link;
        if link.connected {
            link.since = now;
        }
        link.connected = false;
        link.round_trip_micros = None;
        link.last_error = Some(reason.to_owned());
        link.next_attempt = Some(next);
        inner.report.last_error = Some(TimedError { time: now, error: reason.to_owned() });
        // Not only with the engine's next refresh.
        let (status, message) = judge(&inner, true);
        inner.report.status = status;
        inner.report.message = message;
        self.moved.notify_all();
    }

    /// The destination's view arrived.
    pub fn destination_report(&self, report: DestinationReport) {
        self.lock().destination = Some((report, Timestamp::now()));
    }

    /// Bytes that had come of each large file under way, as the destination
    /// last said.
    pub fn arriving(&self) -> BTreeMap<TransferId, u64> {
        let inner = self.lock();
        let report = inner.destination.iter().flat_map(|(report, _)| &report.arriving);
        report.map(|file| (file.transfer, file.bytes)).collect()
    }

    /// Batches up to the mark's are in the replica, and with them every change
    /// before the internal moment `reached`.
    pub fn acknowledged(&self, mark: &Mark, reached: Timestamp) {
        let mut inner = self.lock();
        let inner = &mut *inner;
        // INVARIANT: a watermark ahead of the report's time says that the clock was set
        // back; so the one does not move without the other.
        inner.report.time = self.clock.wall(self.clock.now());
        inner.report.watermark =
            inner.report.watermark.max(mark.watermark.unwrap_or(Timestamp::NEVER));
        let complete = mark.watermark.is_some();
        if std::mem::replace(&mut inner.complete, complete) != complete {
            // At once: `run --once` and scripts wait for this word.
            (inner.report.status, inner.report.message) = judge(inner, true);
        }
        inner.reached = inner.reached.max(reached);
        if mark.batch == BatchId(0) {
            inner.report.watermark = Timestamp::NEVER;
        }
        let counters = &mut inner.report.counters;
        counters.bytes_changed = mark.bytes_changed;
        counters.bytes_shipped = mark.bytes_shipped;
        counters.objects_shipped = mark.objects_shipped;
        self.moved.notify_all();
    }

    /// An error that an operator should know.
    pub fn noted(&self, error: String) {
        self.lock().report.last_error = Some(TimedError { time: Timestamp::now(), error });
    }

    /// What is known of verification.
    pub fn verified(&self, verification: Verification) {
        self.lock().report.verification = verification;
    }

    /// A file could not be read.
    pub fn unreadable(&self, path: String, error: &str) {
        self.meters.error(ErrorKind::Read);
        let mut inner = self.lock();
        let list = &mut inner.report.skipped.unreadable;
        list.retain(|known| known.path != path);
        if list.len() >= EXAMPLES {
            list.remove(0);
        }
        list.push(PathError { path: path.clone(), error: error.to_owned() });
        inner.report.last_error =
            Some(TimedError { time: Timestamp::now(), error: format!("{path}: {error}") });
    }

    /// Refreshes what the engine knows; see [`Facts`].
    pub fn refresh(&self, facts: Facts) {
        let mut inner = self.lock();
        let inner = &mut *inner;
        let report = &mut inner.report;
        report.time = self.clock.wall(self.clock.now());
        report.watcher = facts.watcher;
        report.positions = facts.positions;
        report.lag = facts.lag;
        report.backlog_records = facts.backlog;
        report.store_bytes = facts.store_bytes;
        report.skipped.sockets = facts.skipped.sockets;
        report.skipped.fifos = facts.skipped.fifos;
        report.skipped.devices = facts.skipped.devices;
        report.skipped.nested_mounts = facts.skipped.nested_mounts;
        if facts.blocked_by.iter().all(|blocker| !blocker.reason.starts_with("cannot")) {
            report.skipped.unreadable.clear();
        }
        report.blocked_by = facts.blocked_by;
        report.link.round_trip_micros = facts.round_trip.map(|rtt| rtt.as_micros() as u64);
        report.counters.events = facts.events;
        report.counters.records = facts.positions.journaled.0;
        report.counters.bytes_wired = facts.wired;
        if !facts.walking {
            inner.progress.end();
        }
        report.progress = inner.progress.read();
        let (status, message) = judge(inner, facts.in_flight);
        inner.report.status = status;
        inner.report.message = message;
    }

    /// Replication has halted, or goes on.
    pub fn halted(&self, halted: Option<&Halted>) {
        let mut inner = self.lock();
        inner.halted = halted
            .map(|halted| format!("halted since {}: {}; {HINT}", halted.since, halted.reason));
        (inner.report.status, inner.report.message) = judge(&inner, true);
        self.moved.notify_all();
    }

    /// The source is not where it was; nothing runs until it is there again.
    pub fn vanished(&self, reason: &str) {
        let mut inner = self.lock();
        let now = Timestamp::now();
        inner.report.last_error = Some(TimedError { time: now, error: reason.to_owned() });
        let since = inner.vanished.get_or_insert(now).to_owned();
        // What had ended an engine before is over: nothing runs, and waits for the source.
        (inner.failure, inner.opened) = (None, true);
        inner.halted = Some(format!("halted since {since}: {reason}; {RETURN_HINT}"));
        (inner.report.status, inner.report.message) = judge(&inner, false);
        let reason = format!("halted: {reason}");
        inner.report.blocked_by = vec![Blocker { reason, path: None, bytes_left: None, since }];
        self.moved.notify_all();
    }

    /// No session is sought any more, for now.
    pub fn unlinked(&self) {
        let link = &mut self.lock().report.link;
        if std::mem::take(&mut link.connected) {
            link.since = Timestamp::now();
        }
        link.round_trip_micros = None;
    }

    /// The source is there again.
    pub fn returned(&self) {
        let mut inner = self.lock();
        if inner.vanished.take().is_some() {
            inner.halted = None;
            inner.report.blocked_by.clear();
            (inner.report.status, inner.report.message) = judge(&inner, false);
        }
    }

    /// The engine's loop ended with an error.
    pub fn failed(&self, error: String) {
        self.meters.error(ErrorKind::Engine);
        let mut inner = self.lock();
        let now = Timestamp::now();
        inner.report.last_error = Some(TimedError { time: now, error: error.clone() });
        inner.report.status = ReplicationStatus::Error;
        inner.report.message = Some(error.clone());
        (inner.failure, inner.opened) = (Some(error), true);
        self.moved.notify_all();
    }

    /// Its first start goes on for long: that is an error for as long as it does. Says
    /// whether it does.
    pub fn starts_slowly(&self, reason: String) -> bool {
        let mut inner = self.lock();
        if inner.opened {
            return false;
        }
        inner.report.last_error =
            Some(TimedError { time: Timestamp::now(), error: reason.clone() });
        inner.report.status = ReplicationStatus::Error;
        inner.report.message = Some(reason.clone());
        inner.failure = Some(reason);
        self.moved.notify_all();
        true
    }

    /// An engine runs, again perhaps: what ended the last one is over.
    pub fn started(&self) {
        let mut inner = self.lock();
        (inner.failure, inner.opened) = (None, true);
    }

    // --------------------------------------------------------- for the service

    /// The source's view.
    pub fn report(&self) -> SourceReport {
        self.lock().report.clone()
    }

    /// The destination's last report, and when it arrived.
    pub fn destination(&self) -> Option<(DestinationReport, Timestamp)> {
        self.lock().destination.clone()
    }

    /// Why replication has halted and what lets it go on, if it has.
    pub fn halt(&self) -> Option<String> {
        self.lock().halted.clone()
    }

    /// Why the engine ended, if it did.
    pub fn failure(&self) -> Option<String> {
        self.lock().failure.clone()
    }

    /// Somebody waits: a connection that is away is tried at once.
    pub fn call_now(&self) {
        if !self.lock().report.link.connected {
            self.hurry.notify_one();
        }
    }

    /// What the operator asks for from now on.
    pub fn set_desired(&self, desired: DesiredState) {
        let mut inner = self.lock();
        inner.report.desired = desired;
        // Whoever asked is answered before the engine's next refresh.
        let (status, message) = judge(&inner, true);
        inner.report.status = status;
        inner.report.message = message;
    }

    /// No session is opened any more.
    pub fn close(&self) {
        self.lock().closed = true;
        self.moved.notify_all();
    }

    /// Waits until a batch is in the replica whose barrier was drawn after the
    /// internal moment `moment`, with nothing held from before; the watermark
    /// then. `None` when patience has ended, an error when replication has.
    pub fn wait(
        &self,
        moment: Timestamp,
        patience: Patience<'_>,
    ) -> Option<Result<Timestamp, String>> {
        let deadline = Instant::now() + patience.time;
        let mut inner = self.lock();
        loop {
            if inner.reached >= moment {
                return Some(Ok(inner.report.watermark));
            }
            let stopped = inner.failure.as_ref().or(inner.refusal.as_ref());
            if let Some(failure) = stopped.or(inner.halted.as_ref()).cloned() {
                return Some(Err(failure));
            }
            if inner.closed {
                return Some(Err("the replication configuration is being deleted".to_owned()));
            }
            let left = deadline.checked_duration_since(Instant::now())?;
            if patience.gone.load(Ordering::Relaxed) {
                return None;
            }
            let waited = self.moved.wait_timeout(inner, left.min(LOOK));
            inner = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

/// What the engine knows at one moment.
pub struct Facts {
    /// The watcher.
    pub watcher: WatcherReport,
    /// Positions.
    pub positions: Positions,
    /// Lag.
    pub lag: StageLag,
    /// Records that wait.
    pub backlog: u64,
    /// Bytes of the stores.
    pub store_bytes: u64,
    /// What is passed over; examples of unreadable files are kept elsewhere.
    pub skipped: Skipped,
    /// What the watermark waits for.
    pub blocked_by: Vec<Blocker>,
    /// Round trip of the connection.
    pub round_trip: Option<Duration>,
    /// Events read.
    pub events: u64,
    /// Bytes sent.
    pub wired: u64,
    /// A gap is open.
    pub walking: bool,
    /// Batches are under way.
    pub in_flight: bool,
}

fn judge(inner: &Inner, in_flight: bool) -> (ReplicationStatus, Option<String>) {
    if let Some(failure) = inner.failure.as_ref().or(inner.refusal.as_ref()) {
        return (ReplicationStatus::Error, Some(failure.clone()));
    }
    if inner.closed {
        return (ReplicationStatus::Deleting, None);
    }
    if let Some(halted) = &inner.halted {
        return (ReplicationStatus::Halted, Some(halted.clone()));
    }
    if inner.report.desired == DesiredState::Paused {
        let status = if in_flight { ReplicationStatus::Pausing } else { ReplicationStatus::Paused };
        return (status, Some("changes are journaled, not shipped".to_owned()));
    }
    let report = &inner.report;
    let message = if !report.link.connected {
        let reason = report.link.last_error.as_deref().unwrap_or("connecting");
        Some(format!("no connection to the destination since {}: {reason}", report.link.since))
    } else if report.watermark > report.time {
        Some(format!(
            "the source's clock was set back: LastReplicatedTimestamp stays until the clock has passed {}",
            report.watermark
        ))
    } else {
        None
    };
    let status =
        if inner.complete { ReplicationStatus::Enabled } else { ReplicationStatus::Enabling };
    (status, message)
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicI64;

    use super::*;
    use crate::clock::Wall;

    /// Neither is the report's time older than the watermark that it goes with,
    /// nor is a clock that was set back passed over.
    #[test]
    fn a_clock_is_said_to_be_set_back_when_it_was() {
        let hands = Arc::new(AtomicI64::new(1_000));
        let seen = hands.clone();
        let clock = Wall::new(move || Timestamp(seen.load(Ordering::Relaxed)));
        let clock = Arc::new(Clock::new(clock));
        let id = "fs-01234567".parse().unwrap();
        let meters = Arc::new(Meters::new(&id, &id));
        let mark = |batch, watermark| Mark {
            batch: BatchId(batch),
            watermark: Some(Timestamp(watermark)),
            ..Mark::default()
        };
        let new = Mark::default();
        let shared =
            Shared::new(id, "/source".to_owned(), DesiredState::Enabled, &new, clock, meters);
        shared.lock().report.link.connected = true;
        shared.lock().report.time = Timestamp(1_000);
        hands.store(2_000, Ordering::Relaxed);
        shared.acknowledged(&mark(1, 1_900), Timestamp(1_900));
        assert_eq!(shared.report().message, None);
        hands.store(500, Ordering::Relaxed);
        shared.acknowledged(&mark(2, 1_900), Timestamp(1_950));
        shared.set_desired(DesiredState::Enabled);
        assert!(shared.report().message.is_some_and(|said| said.contains("set back")));
    }
}
