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
//! - `parts`: what it is made of, what it is told, how it ends.
//! - `gap`: what it does not know for certain, and the walk that ends that.
//! - `build`: how a batch comes about; `placing`: what it takes of large files
//!   and leaves to wait; `commit`: its end.
//! - [`halt`]: deletions that look like an accident; `window`: which count.
//! - `held`, `holds`: what waits, and the transfers of large files; `resemble`: what
//!   such a file was probably made from; `tails`: those that grow.
//! - `astray`: what is not where it was seen, for a source by names.
//! - `kept`: what it still has of the session before.
//! - `refused`: what the destination has no place for now.
//! - `peer`: what the destination says.
//! - `reconcile`: a replica that was not empty.
//! - `leave`: what the next process goes on from.
//! - `report`: what is told of all that.
//! - [`verify`]: what verification asks of the loop.
//! - [`state`]: what the loop shares with those who ask.

mod astray;
mod build;
mod commit;
mod gap;
pub mod halt;
mod held;
mod holds;
pub(crate) mod kept;
pub(crate) mod leave;
mod pace;
mod parts;
mod peer;
mod placing;
mod reconcile;
mod refused;
mod report;
mod resemble;
pub mod state;
mod tails;
pub mod verify;
mod window;

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender};
use replicator_common::describe::Description;
use replicator_common::id::{BatchId, Incarnation, ObjectId, Seq, TransferId};
use replicator_common::name::Name;
use replicator_common::pulse::{self, Heart};
use replicator_common::status::{DesiredState, SourceReport};
use replicator_common::time::Timestamp;
use replicator_common::wire::SourceMessage;

use crate::boot::Boot;
use crate::capture::{Capture, CaptureError, Members};
use crate::clock::Clock;
use crate::index::{Index, Mark, View};
use crate::journal::Journal;
use crate::ledger::{Flights, Gap, Owed};
use crate::plan::{Dirty, Skip};
use crate::read::pool::Pool;
use crate::read::sink::{SinkError, Wired};
use crate::read::tail::Allowance;
use crate::session::{LinkEvent, Session};
use crate::source::{Opener, SourceTree};
use crate::watcher::What;
pub use parts::{Command, Ended, EngineError, Event, FailoverReply, Parts, Settings, Start};

use halt::Halt;
use held::Held;
use state::Shared;

/// How often the destination gets our report while changes wait or a batch is under way.
const REPORT: Duration = Duration::from_millis(500);
/// How often otherwise. By default a heartbeat comes sooner, and then the report goes with
/// it: a packet of its own wakes threads at both ends (see bench/NOTES.md).
const IDLE_REPORT: Duration = Duration::from_millis(1200);

/// How long the destination is given to hear that the source is not there.
const GOODBYE: Duration = Duration::from_secs(1);

/// What is kept of a batch under way, beside what [`crate::ledger`] does.
struct Note {
    /// Objects and bytes of regular content in it, for progress.
    progress: (u64, u64),
    committed_at: Instant,
    /// When the event of the oldest change in it was read, if any is in it.
    oldest: Option<Instant>,
    exact: bool,
    /// What it touches, where verification wants to know.
    subjects: Option<Vec<verify::Subject>>,
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
    /// Trees that left the source are still to be taken apart.
    leaving: bool,
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
    /// Every change before this moment is in the replica once all that is under
    /// way is.
    reached: Timestamp,
    gap: Option<Gap>,
    holds: BTreeMap<ObjectId, Held>,
    /// What waited and is looked at anew.
    owed: Owed,
    /// Transfers that are being read.
    running: HashMap<TransferId, ObjectId>,
    /// Those of them that the destination says it has.
    arrived: BTreeSet<TransferId>,
    /// The comparison of a large file that is under way, of how many.
    comparing: Option<u64>,
    comparisons: u64,
    /// When large files that change again and again were last read.
    rests: BTreeMap<ObjectId, tails::Rest>,
    in_flight: Flights<Note>,
    /// What the destination has no place for, until it is tried again.
    refused: BTreeMap<ObjectId, refused::Refused>,
    /// Counts readings: no two packed objects have the same version, so that one
    /// of a batch that was given back is never taken for one of the next.
    readings: u32,
    reconcile: Option<reconcile::Reconcile>,
    halt: Halt,
    next_batch: BatchId,
    next_transfer: TransferId,
    lists: std::ops::Range<u64>,
    /// Chunk lists of transfers that were not placed: go with the next batch.
    dead_lists: Vec<u64>,
    /// How many files in a row waited under a name, and were gone before their content had come.
    overtaken: HashMap<(ObjectId, Name), u32>,
    /// What plans may carry of files that grow.
    allowance: Allowance,
    /// Chunk lists of comparisons, by object, that no batch has placed yet.
    compared_lists: HashMap<ObjectId, u64>,
    /// The watermark that batches claimed so far.
    claimed: Timestamp,
    last_build: Instant,
    last_report: Instant,
    last_refresh: Instant,
    /// Nothing waited when status was refreshed.
    told_rest: bool,
    last_walk: Instant,
    totals: Mark,
    skipped: HashMap<(ObjectId, Name), Skip>,
    /// Who waits for the destination to fail over, and until when; nothing is
    /// shipped meanwhile.
    failing: Option<(FailoverReply, Instant)>,
    stopping: bool,
    /// Leave behind what the next process needs.
    handing_over: bool,
    /// The index lacks batches that the process before sent, until a session
    /// says whether they took effect: it cannot tell yet what concerns the source.
    unsettled: bool,
    /// Somebody waits for the watermark: the next heartbeat comes at once.
    urgent: bool,
    /// What changed of late, for verification.
    touched: verify::Touched,
    /// Objects to be sent again whatever the index says of them.
    forced: BTreeMap<ObjectId, What>,
    /// Who waits for the destination to describe something, in order.
    asked: VecDeque<Sender<Description>>,
    /// Bytes put on the wire by this replication, all sessions.
    wired: Arc<Wired>,
    /// Content bytes shipped by processes before this, less what this one had
    /// shipped when the count was begun anew.
    shipped_before: i128,
    /// The oldest change of batches that were lost, and are built anew: when its
    /// event was read.
    lost_since: Option<Instant>,
}

impl Engine {
    /// Puts the parts together.
    pub fn new(parts: Parts, start: Start) -> Result<Self, EngineError> {
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
            leaving: false,
            covered: claimed,
            reached: claimed,
            seen: Timestamp::NEVER,
            gap: None,
            holds: BTreeMap::new(),
            owed: Owed::default(),
            running: HashMap::new(),
            arrived: BTreeSet::new(),
            comparing: None,
            comparisons: 0,
            rests: BTreeMap::new(),
            in_flight: Flights::default(),
            refused: BTreeMap::new(),
            readings: 0,
            reconcile: None,
            halt: parts.halt,
            next_batch: mark.batch.next(),
            next_transfer: TransferId(1),
            lists: 0..0,
            dead_lists: Vec::new(),
            overtaken: HashMap::new(),
            allowance: Allowance::default(),
            compared_lists: HashMap::new(),
            claimed,
            last_build: now,
            last_report: now,
            last_refresh: now,
            told_rest: false,
            last_walk: now,
            totals: mark,
            skipped: HashMap::new(),
            failing: None,
            stopping: false,
            handing_over: false,
            unsettled: false,
            urgent: false,
            touched: verify::Touched::new(parts.ticks),
            forced: BTreeMap::new(),
            asked: VecDeque::new(),
            wired: parts.wired,
            shipped_before: i128::from(mark.bytes_shipped),
            lost_since: None,
        };
        engine.shared.halted(engine.halt.halted());
        engine.begin_clock()?;
        engine.recall_deletions()?;
        engine.recall_leaving()?;
        engine.greet()?;
        match start {
            Start::Walk(reason) => engine.open_gap(reason)?,
            Start::Resume(carried) => engine.resume(*carried)?,
        }
        Ok(engine)
    }

    /// Moments of this process come after those that the last one left.
    fn begin_clock(&self) -> Result<(), EngineError> {
        let orphans = self.index.orphans()?.into_iter();
        let left = orphans.map(|(_, orphan)| orphan.since.max(orphan.floor));
        self.clock.begin_after(left.fold(self.claimed, Timestamp::max));
        Ok(())
    }

    /// The loop. Returns when it is told to stop, or when the source is not
    /// where it was.
    pub fn run(mut self) -> Result<Ended, EngineError> {
        // What went wrong with a source that is not there went wrong because of
        // that.
        if let Err(error) = self.run_loop() {
            let vanished = !self.opener.root().still_there();
            if vanished {
                self.vanish(&error.to_string());
            }
            // Those who read for it end with it: they must not hold up the end, which
            // is to be told, for as long as a large file takes on a slow line.
            self.session = None;
            return if vanished { Ok(Ended::Vanished) } else { Err(error) };
        }
        // So that a start after a clean end finds nothing unsettled; it can do without.
        if let Err(error) = self.index.merge() {
            tracing::warn!(%error, "the next start settles what was applied last");
        }
        if self.handing_over {
            return Ok(Ended::Stopped(self.leave()?.map(Box::new)));
        }
        // Records that came after the last flush: a start after a clean end needs
        // them no less than one after a crash.
        self.journal.flush()?;
        Ok(Ended::Stopped(None))
    }

    /// Says that the source is not where it was, to the destination as well.
    fn vanish(&mut self, reason: &str) {
        tracing::error!(reason, "replication halted: the source is not there");
        self.shared.meters().halted();
        self.refresh();
        self.shared.vanished(reason);
        let report = SourceReport { time: Timestamp::now(), ..self.shared.report() };
        let said = report.time;
        let message = SourceMessage::Report(Box::new(report));
        // What is sent is lost when the session ends at once: until it is
        // answered, or nobody seems to be listening.
        let until = Instant::now() + GOODBYE;
        if self.session.as_ref().is_some_and(|session| session.send(&message).is_ok()) {
            while let Ok(event) = self.inbox.recv_deadline(until) {
                match event {
                    Event::Link(LinkEvent::Clocks { exchange, .. }) if exchange.sent == said => {
                        break;
                    }
                    Event::Link(LinkEvent::Lost { .. }) | Event::Command(Command::Stop { .. }) => {
                        break;
                    }
                    _ => {}
                }
            }
        }
    }

    fn run_loop(&mut self) -> Result<(), EngineError> {
        self.refresh();
        let _heart = Heart::begin(format!("the engine of {}", self.shared.report().path));
        while !self.stopping {
            pulse::beat();
            if let Some(event) = self.wait() {
                self.apply(event)?;
            }
            // Take in what else is there before a batch is built.
            while let Ok(event) = self.inbox.try_recv() {
                pulse::beat();
                self.apply(event)?;
            }
            self.tick()?;
            self.look_ahead()?;
            if self.may_build() {
                self.build()?;
            }
            self.publish();
        }
        Ok(())
    }

    fn apply(&mut self, event: Event) -> Result<(), EngineError> {
        match event {
            Event::Link(event) => self.link(event),
            Event::Transfer(job, result) => self.transfer_done(&job, result),
            Event::Appended(job, result) => self.tail_done(&job, result),
            Event::Compared { object, number, result, took } => {
                self.compared(&object, number, result, took)
            }
            Event::Verify(query) => self.verify(query),
            Event::Command(Command::Nudge) => {
                self.urgent = true;
                Ok(())
            }
            Event::Command(Command::Await) if !self.capture.proves() => {
                self.open_gap("asked to wait".to_owned())
            }
            Event::Command(Command::Await) => {
                self.urgent = true;
                Ok(())
            }
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
            Event::Command(Command::AcceptDeletions(reply)) => {
                self.accept_deletions()?;
                // Whoever asked may have given up waiting.
                let _ = reply.send(());
                Ok(())
            }
            Event::Command(Command::Stop { hand_over }) => {
                self.stopping = true;
                self.handing_over = hand_over;
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
        self.tend_tails()?;
        self.start_transfers()?;
        self.continue_reconcile()?;
        self.release_kept();
        if self.in_flight.is_empty() && !self.may_build() {
            // A verifier reads the stored index, without the batches over it.
            match self.touched.is_active() {
                true => self.index.merge()?,
                false => self.index.merge_many()?,
            }
        }
        Ok(())
    }

    fn may_build(&self) -> bool {
        let dirty = !self.dirty.is_empty() && !self.awaits_tails() && self.pause().is_zero();
        let due = dirty || self.leaving || self.walk_ended() || self.recall_due();
        self.is_ready() && (due || self.heartbeat_due())
    }

    /// Whether a batch could be built, if there is reason to.
    fn is_ready(&self) -> bool {
        self.session.is_some()
            && self.kept.is_told()
            && self.reconcile.as_ref().is_none_or(reconcile::Reconcile::is_complete)
            // What closes a gap is the word that all is there: it waits for nobody.
            && self.in_flight.have_room(self.walk_ended() && self.dirty.is_empty())
            && self.failing.is_none()
            && !self.too_many_refused()
            && self.halt.halted().is_none()
            && self.shared.desired() == DesiredState::Enabled
    }

    fn heartbeat_due(&self) -> bool {
        let due = self.urgent || self.last_build.elapsed() >= self.settings.heartbeat;
        due && self.in_flight.is_empty()
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
