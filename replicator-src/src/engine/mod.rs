//! The one loop of a source: waits for something to happen, takes it in, and
//! builds the next batch when there is reason to.
//!
//! ```text
//! loop { event = wait(); apply(event); if may_build() { build() } }
//! ```
//!
//! One owned thread runs it; all state of the replication is in [`Engine`] and
//! changes only here. Readers, lanes, the capture thread and the link work
//! beside it and talk to it through its inbox.
//!
//! - `build`: how a batch comes about; `placing`: what it takes of large files
//!   and leaves to wait; `commit`: its end.
//! - `holds`: what waits, and the transfers of large files; `resemble`: what
//!   such a file was probably made from.
//! - `astray`: what is not where it was seen, for a source by names.
//! - `kept`: what it still has of the session before.
//! - `peer`: what the destination says.
//! - `reconcile`: a replica that was not empty.
//! - `report`: what is told of all that.
//! - [`state`]: what the loop shares with those who ask.

mod astray;
mod build;
mod commit;
mod holds;
mod kept;
mod peer;
mod placing;
mod reconcile;
mod report;
mod resemble;
pub mod state;

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, select};
use replicator_common::crashsafe::StateFileError;
use replicator_common::id::{BatchId, Incarnation, ObjectId, Seq, TransferId};
use replicator_common::name::Name;
use replicator_common::status::{DesiredState, FailoverReport};
use replicator_common::time::Timestamp;

use crate::boot::Boot;
use crate::capture::{Capture, CaptureError, Members};
use crate::clock::Clock;
use crate::index::{Index, IndexError, Mark, View};
use crate::journal::{Journal, JournalError};
use crate::plan::{Dirty, Listing, PlanError, Skip};
use crate::read::lane::{Done, Job, LaneError};
use crate::read::pool::Pool;
use crate::read::sink::{SinkError, Wired};
use crate::session::{LinkEvent, Session};
use crate::source::{Opener, SourceError, SourceTree};
use holds::Held;
use state::Shared;

/// Batches that may be under way (committed, not yet acknowledged): one that
/// the destination applies while the next is built and staged.
const IN_FLIGHT: usize = 2;
/// How often status is refreshed.
const REFRESH: Duration = Duration::from_millis(200);
/// How often the destination gets our report.
const REPORT: Duration = Duration::from_millis(500);

/// What the operator may set.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Longest time between batches; an idle source's watermark moves on at
    /// this pace.
    pub heartbeat: Duration,
    /// How long a large file must be left alone before it is sent, unless it
    /// is never left alone.
    pub settle: Duration,
    /// Objects in one batch, at most.
    pub batch_objects: usize,
    /// Content bytes of small files in one batch, at most.
    pub batch_bytes: u64,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            heartbeat: Duration::from_secs(1),
            settle: Duration::from_millis(500),
            batch_objects: 8192,
            batch_bytes: 64 << 20,
        }
    }
}

/// Where the answer to a failover goes.
pub type FailoverReply = Sender<Result<FailoverReport, String>>;

/// What can be asked of a running engine.
pub enum Command {
    /// Build a batch now, even an empty one: somebody waits for the watermark.
    Nudge,
    /// Walk the whole tree and compare.
    Rescan(String),
    /// Ask the destination to fail over, and answer with what it says within
    /// this time. After it, replication goes on.
    Delete(FailoverReply, Duration),
    /// Bring status up to date, and say when it is.
    Refresh(Sender<()>),
    /// End the loop.
    Stop,
}

/// What can happen.
pub enum Event {
    /// Something about the connection.
    Link(LinkEvent),
    /// A large file's transfer ended.
    Transfer(Box<Job>, Result<Done, LaneError>),
    /// Somebody asks.
    Command(Command),
}

impl From<LinkEvent> for Event {
    fn from(event: LinkEvent) -> Self {
        Self::Link(event)
    }
}

/// Why the loop ended. All of it is trouble with the source or its state; the
/// destination's troubles never end it.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// The index failed.
    #[error(transparent)]
    Index(#[from] IndexError),
    /// The journal failed.
    #[error(transparent)]
    Journal(#[from] JournalError),
    /// The source failed.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// Capturing failed.
    #[error(transparent)]
    Capture(#[from] CaptureError),
    /// A state file failed.
    #[error(transparent)]
    State(#[from] StateFileError),
}

impl From<PlanError<IndexError, SourceError>> for EngineError {
    fn from(error: PlanError<IndexError, SourceError>) -> Self {
        match error {
            PlanError::Index(error) => Self::Index(error),
            PlanError::Tree(error) => Self::Source(error),
        }
    }
}

/// A stretch of time in which changes may have been missed.
#[derive(Clone, Debug)]
struct Gap {
    /// Why, in words.
    reason: String,
    /// Every change before this is in the replica; the watermark waits here.
    floor: Timestamp,
    /// When it opened.
    since: Timestamp,
    /// When the walk that is to close it began.
    walk_started: Timestamp,
    /// Events were lost again while the walk ran: another walk must follow.
    again: Option<String>,
}

/// A batch that was committed and is not acknowledged.
struct InFlight {
    mark: Mark,
    /// Everything that was dirty when it was built: dirty again when it is lost.
    input: Dirty,
    /// The gap that it closed.
    closed: Option<Gap>,
    /// Objects that it drops.
    dropped: Vec<ObjectId>,
    /// Objects and bytes of regular content in it, for progress.
    progress: (u64, u64),
    committed_at: Instant,
    exact: bool,
    /// The destination said that it is durable.
    durable: bool,
    /// What was covered before it: holds again when it is lost.
    covered: Timestamp,
    /// Every change before this moment is in the replica after it.
    reached: Timestamp,
}

/// Everything of one running replication, source side.
///
/// Its `Timestamp`s are internal moments (see [`crate::clock`]), but for
/// `claimed`, which was told to others.
pub struct Engine {
    settings: Settings,
    boot: Boot,
    /// What the first walk on this boot must not take for proven.
    unproven: Option<Timestamp>,
    opener: Opener,
    tree: SourceTree,
    index: Index,
    journal: Arc<Journal>,
    capture: Capture,
    members: Arc<Members>,
    pool: Arc<Pool>,
    inbox: Receiver<Event>,
    /// For lanes to answer to.
    post: Sender<Event>,
    captured: Receiver<()>,
    shared: Arc<Shared>,
    clock: Arc<Clock>,
    session: Option<Session>,
    /// What its destination has of the session before.
    kept: kept::Kept,
    /// What is dirty and not in a batch yet.
    dirty: Dirty,
    /// What is dirty and could not be found (see [`astray`]).
    astray: Dirty,
    /// The journal is absorbed up to here.
    cursor: Seq,
    /// Records up to here are of a process before this.
    inherited: Seq,
    /// The last barrier that was read ahead of the next batch: every change
    /// before it is in a batch or dirty.
    seen: Timestamp,
    /// Every change before this moment was absorbed, and is in a batch, held,
    /// an orphan, or in an open gap.
    covered: Timestamp,
    gap: Option<Gap>,
    holds: BTreeMap<ObjectId, Held>,
    /// Transfers that are being read.
    running: HashMap<TransferId, ObjectId>,
    /// Those of them that the destination says it has.
    arrived: BTreeSet<TransferId>,
    in_flight: VecDeque<InFlight>,
    reconcile: Option<reconcile::Reconcile>,
    next_batch: BatchId,
    next_transfer: TransferId,
    lists: std::ops::Range<u64>,
    /// Chunk lists of transfers that were not placed: go with the next batch.
    dead_lists: Vec<u64>,
    /// The watermark that batches claimed so far.
    claimed: Timestamp,
    last_build: Instant,
    last_report: Instant,
    last_refresh: Instant,
    last_walk: Instant,
    totals: Mark,
    skipped: HashMap<(ObjectId, Name), Skip>,
    /// Who waits for the destination to fail over, and until when; nothing is
    /// shipped meanwhile.
    failing: Option<(FailoverReply, Instant)>,
    stopping: bool,
    /// Somebody waits for the watermark: the next heartbeat comes at once.
    urgent: bool,
    /// Bytes put on the wire by this replication, all sessions.
    wired: Arc<Wired>,
    /// Content bytes shipped by processes before this, less what this one had
    /// shipped when the count was begun anew.
    shipped_before: i128,
}

/// What an engine is made of.
pub struct Parts {
    /// Settings.
    pub settings: Settings,
    /// The start of the kernel that the source was last compared under.
    pub boot: Boot,
    /// Opens objects.
    pub opener: Opener,
    /// Looks at the source.
    pub tree: SourceTree,
    /// The index.
    pub index: Index,
    /// The journal.
    pub journal: Arc<Journal>,
    /// The capture thread.
    pub capture: Capture,
    /// What is ours.
    pub members: Arc<Members>,
    /// The readers.
    pub pool: Pool,
    /// Where events arrive.
    pub inbox: (Sender<Event>, Receiver<Event>),
    /// Where captured records are announced.
    pub captured: Receiver<()>,
    /// What is shared with those who ask.
    pub shared: Arc<Shared>,
    /// Counts the bytes put on the wire.
    pub wired: Arc<Wired>,
}

impl Engine {
    /// Puts the parts together. `reason` says why the tree must be walked at
    /// the start: nothing proves that no change was missed since the last run.
    pub fn new(parts: Parts, reason: &str) -> Result<Self, EngineError> {
        let mark = parts.index.store().mark()?;
        let now = Instant::now();
        let claimed = mark.watermark.unwrap_or(Timestamp::NEVER);
        let mut engine = Self {
            settings: parts.settings,
            unproven: parts.boot.unproven(claimed),
            boot: parts.boot,
            opener: parts.opener,
            tree: parts.tree,
            index: parts.index,
            cursor: parts.journal.trimmed(),
            inherited: parts.journal.last(),
            journal: parts.journal,
            capture: parts.capture,
            members: parts.members,
            pool: Arc::new(parts.pool),
            inbox: parts.inbox.1,
            post: parts.inbox.0,
            captured: parts.captured,
            clock: parts.shared.clock(),
            shared: parts.shared,
            session: None,
            kept: kept::Kept::default(),
            dirty: Dirty::default(),
            astray: Dirty::default(),
            covered: claimed,
            seen: Timestamp::NEVER,
            gap: None,
            holds: BTreeMap::new(),
            running: HashMap::new(),
            arrived: BTreeSet::new(),
            in_flight: VecDeque::new(),
            reconcile: None,
            next_batch: mark.batch.next(),
            next_transfer: TransferId(1),
            lists: 0..0,
            dead_lists: Vec::new(),
            claimed,
            last_build: now,
            last_report: now,
            last_refresh: now,
            last_walk: now,
            totals: mark,
            skipped: HashMap::new(),
            failing: None,
            stopping: false,
            urgent: false,
            wired: parts.wired,
            shipped_before: i128::from(mark.bytes_shipped),
        };
        engine.begin_clock()?;
        engine.greet()?;
        engine.open_gap(reason.to_owned())?;
        Ok(engine)
    }

    /// Moments of this process come after those that the last one left.
    fn begin_clock(&self) -> Result<(), EngineError> {
        let orphans = self.index.orphans()?.into_iter();
        let left = orphans.map(|(_, orphan)| orphan.since.max(orphan.floor));
        self.clock.begin_after(left.fold(self.claimed, Timestamp::max));
        Ok(())
    }

    /// The loop. Returns when it is told to stop.
    pub fn run(mut self) -> Result<(), EngineError> {
        self.refresh();
        while !self.stopping {
            if let Some(event) = self.wait() {
                self.apply(event)?;
            }
            // Take in what else is there before a batch is built.
            while let Ok(event) = self.inbox.try_recv() {
                self.apply(event)?;
            }
            self.tick()?;
            self.look_ahead()?;
            if self.may_build() {
                self.build()?;
            }
            self.publish();
        }
        self.journal.flush()?;
        Ok(())
    }

    fn wait(&self) -> Option<Event> {
        if self.may_build() {
            return None;
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
        let pulse = if idle { REFRESH } else { heartbeat.min(REFRESH) };
        let waiting = self.next_hold().into_iter().chain(self.next_recall());
        waiting.fold(pulse, Duration::min).max(Duration::from_millis(1))
    }

    fn apply(&mut self, event: Event) -> Result<(), EngineError> {
        match event {
            Event::Link(event) => self.link(event),
            Event::Transfer(job, result) => self.transfer_done(&job, result),
            Event::Command(Command::Nudge) => {
                self.urgent = true;
                Ok(())
            }
            Event::Command(Command::Rescan(reason)) => self.open_gap(reason),
            Event::Command(Command::Delete(reply, patience)) => {
                self.ask_failover(reply, patience);
                Ok(())
            }
            Event::Command(Command::Refresh(reply)) => {
                self.refresh();
                // Whoever asked may have given up waiting.
                let _ = reply.send(());
                Ok(())
            }
            Event::Command(Command::Stop) => {
                self.stopping = true;
                Ok(())
            }
        }
    }

    /// What is due by the clock.
    fn tick(&mut self) -> Result<(), EngineError> {
        if let Some(reason) = self.capture.failure() {
            return Err(CaptureError::Stopped(reason).into());
        }
        if let Some(every) = self.capture.rescan_every()
            && self.gap.is_none()
            && self.last_walk.elapsed() >= every
        {
            self.open_gap("periodic walk".to_owned())?;
        }
        self.give_up_failover();
        self.due_holds();
        self.start_transfers()?;
        self.continue_reconcile()?;
        self.release_kept();
        if self.in_flight.is_empty() && !self.may_build() {
            self.index.merge()?;
        }
        Ok(())
    }

    fn may_build(&self) -> bool {
        let due = !self.dirty.is_empty() || self.walk_ended() || self.recall_due();
        self.is_ready() && (due || self.heartbeat_due())
    }

    /// Whether a batch could be built, if there is reason to.
    fn is_ready(&self) -> bool {
        self.session.is_some()
            && self.kept.is_told()
            && self.reconcile.as_ref().is_none_or(reconcile::Reconcile::is_complete)
            && self.in_flight.len() < IN_FLIGHT
            && self.failing.is_none()
            && self.shared.desired() == DesiredState::Enabled
    }

    /// The walk is through; one more batch closes the gap.
    fn walk_ended(&self) -> bool {
        self.gap.is_some() && self.in_flight.is_empty() && self.astray.is_empty()
    }

    fn heartbeat_due(&self) -> bool {
        let due = self.urgent || self.last_build.elapsed() >= self.settings.heartbeat;
        due && self.in_flight.is_empty()
    }

    /// From now on nothing that happened since `covered` is certain, until a
    /// walk has compared the whole tree.
    fn open_gap(&mut self, reason: String) -> Result<(), EngineError> {
        tracing::info!(reason, "gap: the source must be walked");
        metrics::counter!("replicator_source_gaps_total").increment(1);
        self.shared.count(|counters| counters.gaps += 1);
        let now = self.clock.now();
        match &mut self.gap {
            Some(gap) => gap.again = Some(reason),
            None => {
                self.gap = Some(Gap {
                    reason,
                    floor: self.covered,
                    since: now,
                    walk_started: now,
                    again: None,
                });
                self.start_walk()?;
            }
        }
        Ok(())
    }

    fn start_walk(&mut self) -> Result<(), EngineError> {
        self.last_walk = Instant::now();
        self.shared.count(|counters| counters.rescans += 1);
        self.shared.begin_progress();
        let root = self.opener.root().id.clone();
        self.dirty.listings.retain(|listing| !listing.deep);
        self.dirty.listings.push_back(Listing::new(root, true));
        // No walk from the root reaches orphans.
        let orphans = self.index.orphans()?.into_iter().map(|(one, _)| Listing::new(one, true));
        self.dirty.listings.extend(orphans);
        Ok(())
    }

    /// The incarnation pair that the index describes, for greetings.
    fn peer(&self) -> Result<Option<Incarnation>, EngineError> {
        Ok(self.index.store().peer()?)
    }

    /// Whether the index knows the root: not before the first batch.
    fn root_known(&self) -> Result<bool, EngineError> {
        Ok(self.index.object(&self.opener.root().id)?.is_some())
    }
}

/// A session's end seen from inside a build: not an error of ours.
fn ended(error: &SinkError) -> String {
    error.to_string()
}
