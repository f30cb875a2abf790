//! The applier: one thread a replica, which alone seals, commits and applies.
//!
//! The order within a batch, and what each part of it is for:
//! 1. new directories, links and nodes are staged beside the files that arrived;
//! 2. the batch is planned;
//! 3. `syncfs`: what is staged is durable, and so are the applied steps of the
//!    batch before, whose record may go;
//! 4. the commit record is durable: from here on the batch will be applied
//!    whatever happens, and `Durable` may be said;
//! 5. the steps are run; `Applied` may be said.
//!
//! Here are the loop and a batch's way; how it is made durable is in `commit`, how steps are
//! run, and done again after a crash, in `steps`, how a session begins in `begin`.

mod begin;
mod commit;
mod marks;
mod steps;

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender};
use replicator_common::id::{BatchId, ObjectId};
use replicator_common::pulse::{self, Heart};
use replicator_common::status::{FailoverReport, TimedError};
use replicator_common::time::Timestamp;
use replicator_common::wire::SourceHello;
use tokio::sync::{mpsc, oneshot};

use crate::apply::execute::Finding;
use crate::apply::{Place, Step};
use crate::attributes;
use crate::failover::{self, FailoverError};
use crate::mark::Reached;
use crate::meters::ErrorKind;
use crate::replica::{Point, Replica};
use crate::seal::{SealError, staged_bytes};
use crate::session::{StagedTransfer, WholeBatch};
use crate::stage::Stager;
use crate::store::{SetAsideItem, Standing, StoreError};
use crate::tree::Tree;

/// After this long without a batch, applied steps are synced and their record goes.
const IDLE: Duration = Duration::from_secs(2);
/// First and longest pause between attempts while the replica cannot take changes.
const RETRY: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(5));

/// What the applier is asked to do.
pub enum Job {
    /// A session begins: settle who knows what, clean up after the last one.
    Begin {
        /// What the source says.
        hello: Box<SourceHello>,
        /// Where the replica stands.
        reply: oneshot::Sender<Result<Standing, String>>,
    },
    /// A batch is whole.
    Batch {
        /// The batch.
        batch: Box<WholeBatch>,
        /// How far it is.
        reply: mpsc::UnboundedSender<Progress>,
    },
    /// Fail over; the last job, if it succeeds.
    Failover {
        /// How it went.
        reply: Sender<Result<FailoverReport, FailoverError>>,
    },
    /// The process ends: look at [`Replica::stopping`] now.
    Stop,
}

/// How far a batch is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Progress {
    /// It is logged.
    Durable(BatchId),
    /// It is visible.
    Applied(BatchId),
    /// The source broke a promise: nothing of the batch was done.
    Breach(String),
    /// The batch is given back; the source has to send it again.
    Unable(String),
    /// The batch is given back because these objects, each with what stood in
    /// the way, find no place here; it may come again without them.
    Returned(BatchId, Vec<(ObjectId, String)>),
}

/// Why work was given up before its end.
enum Ended {
    /// The process stops, or a test killed the applier: the thread ends at once.
    Killed,
    /// Failover has been asked for: its job is in the queue.
    FailingOver,
}

/// The applier's state.
pub struct Applier {
    pub(crate) replica: Arc<Replica>,
    pub(crate) tree: Tree,
    standing: Standing,
    /// Steps are in the log that the disk may not have seen the effects of.
    uncovered: bool,
    /// Steps are in the log that may not all have been run.
    ///
    /// INVARIANT: while it is so, nothing is committed and nothing is covered, for both
    /// remove what those steps need.
    owing: bool,
    /// Staged files that logged steps need.
    needed: Vec<Place>,
    /// When the last steps were run.
    ran: Instant,
    /// The mark that was written to the replica, by this process.
    marked: Option<Reached>,
    /// The last sync failed: the steps in the log have to be done again.
    doubt: bool,
    /// A sync failed since the session began. What the session had staged by
    /// then may be lost, whatever later syncs say (trap 16: an error is told
    /// once), so nothing of it is committed; the next session sends it again.
    spoilt: bool,
    /// The store has been, or is to be, opened again, and what it holds was not
    /// believed yet: the last commit may be in it or not.
    astray: bool,
    /// Before the next attempt of what did not work.
    pause: Duration,
    /// A file of this size is not too large for the replica's file system, bytes.
    pub(crate) holds: u64,
    /// An object that the map knows is not in the replica: what the map says
    /// can no longer be trusted, and the source has to reconcile.
    distrust: bool,
}

/// Starts the applier's thread.
pub fn spawn(replica: Arc<Replica>) -> std::io::Result<(Sender<Job>, std::thread::JoinHandle<()>)> {
    // One batch under way, one waiting: more would only be memory.
    let (jobs, queue) = crossbeam_channel::bounded(2);
    let thread = std::thread::Builder::new()
        .name(format!("apply-{}", replica.config.source))
        .spawn(move || run(replica, &queue))?;
    Ok((jobs, thread))
}

fn run(replica: Arc<Replica>, queue: &Receiver<Job>) {
    let _heart = Heart::begin(format!("the applier of {}", replica.config.source));
    let mut applier = match Applier::new(replica.clone()) {
        Ok(applier) => applier,
        Err(error) => {
            tracing::error!(%error, "the applier cannot start");
            replica.shared().stalled = Some(error.to_string());
            return;
        }
    };
    if let Err(Ended::Killed) = applier.redo() {
        return;
    }
    while !replica.is_ending() {
        pulse::beat();
        match queue.recv_timeout(IDLE) {
            Ok(Job::Begin { hello, reply }) => {
                let result = applier.begin_session(&hello).map_err(|error| error.to_string());
                if let Err(error) = &result {
                    replica.note_error(error.as_str());
                }
                let _ = reply.send(result);
            }
            Ok(Job::Batch { batch, reply }) => {
                if let Err(Ended::Killed) = applier.batch(*batch, &reply) {
                    return;
                }
            }
            Ok(Job::Failover { reply }) => {
                let result = failover::run(&replica, &mut applier.tree);
                // After an error it may be asked for again.
                let ended = matches!(result, Ok(_) | Err(FailoverError::Interrupted));
                let _ = reply.send(result);
                if ended {
                    return;
                }
            }
            Ok(Job::Stop) => {}
            Err(RecvTimeoutError::Timeout) => {
                if let Err(error) = applier.cover() {
                    applier.stall(&error);
                }
            }
            Err(RecvTimeoutError::Disconnected) => return,
        }
    }
}

impl Applier {
    fn new(replica: Arc<Replica>) -> Result<Self, StoreError> {
        let standing = replica.store.standing()?;
        let tree = Tree::new(replica.area.clone(), replica.abilities.handles);
        Ok(Self {
            replica,
            tree,
            standing,
            uncovered: false,
            owing: true,
            needed: Vec::new(),
            ran: Instant::now(),
            marked: None,
            doubt: false,
            spoilt: false,
            astray: false,
            pause: RETRY.0,
            holds: 0,
            distrust: false,
        })
    }

    fn note(&mut self, error: String) {
        self.standing.last_error = Some(TimedError { time: Timestamp::now(), error });
    }

    // --------------------------------------------------------- waiting

    fn stall(&mut self, error: &SealError) {
        tracing::warn!(%error, "the replica cannot take changes");
        self.replica.meters.error(ErrorKind::Apply);
        self.note(error.to_string());
        let mut shared = self.replica.shared();
        shared.stalled = Some(error.to_string());
        shared.standing.last_error.clone_from(&self.standing.last_error);
    }

    /// Says why nothing moves, and waits before the next attempt.
    fn wait_after(&mut self, error: &SealError) -> Result<(), Ended> {
        self.stall(error);
        if self.replica.store.has_failed()
            && let Err(error) = self.replica.store.reopen()
        {
            tracing::debug!(%error, "the store cannot be opened again yet");
        }
        let until = Instant::now() + self.pause;
        self.pause = (self.pause * 2).min(RETRY.1);
        while Instant::now() < until {
            pulse::beat();
            if self.replica.is_ending() {
                return Err(Ended::Killed);
            }
            if self.replica.failing_over.load(Ordering::Acquire) {
                return Err(Ended::FailingOver);
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }

    /// What others may know.
    fn publish(&mut self) {
        let part = std::mem::take(&mut self.tree.shortfalls);
        let mut shared = self.replica.shared();
        // Others note errors too: the newest counts.
        let time = |error: &Option<TimedError>| error.as_ref().map(|error| error.time);
        if time(&shared.standing.last_error) > time(&self.standing.last_error) {
            self.standing.last_error.clone_from(&shared.standing.last_error);
        }
        // Stagers add to the shared shortfalls, the applier to its own.
        attributes::merge(&mut shared.standing.shortfalls, part);
        self.standing.shortfalls = shared.standing.shortfalls.clone();
        self.standing.clock_offset = shared.standing.clock_offset;
        shared.standing = self.standing.clone();
        shared.durable = self.standing.committed;
        self.replica.applied.store(self.standing.applied.0, Ordering::Release);
    }

    // ---------------------------------------------------------- batches

    fn batch(
        &mut self,
        batch: WholeBatch,
        reply: &mpsc::UnboundedSender<Progress>,
    ) -> Result<(), Ended> {
        let id = batch.batch;
        let bytes: u64 = batch.content.values().map(staged_bytes).sum();
        if id != self.standing.committed.next() {
            // It followed one that was given back.
            self.discard_batch(&batch);
            return Ok(());
        }
        Stager::discard(&self.replica.area, &batch.superseded);
        let Some(steps) = self.seal_patiently(&batch, reply)? else { return Ok(()) };
        let records: Vec<_> = batch.content.values().filter_map(StagedTransfer::record).collect();
        Stager::discard(&self.replica.area, &records);
        self.replica.shared().durable = self.standing.committed;
        let _ = reply.send(Progress::Durable(id));
        if self.replica.dies_at(Point::Committed) {
            return Err(Ended::Killed);
        }
        let start = Instant::now();
        while let Err(error) = self.run_steps(id, &steps) {
            self.wait_after(&error)?;
        }
        self.owing = false;
        tracing::debug!(batch = %id, steps = steps.len(), took = ?start.elapsed(), "applied");
        self.replica.meters.apply.record(start.elapsed());
        self.replica.meters.steps.increment(steps.len() as u64);
        if self.replica.dies_at(Point::Applied) {
            return Err(Ended::Killed);
        }
        while let Err(error) = self.applied() {
            self.wait_after(&error)?;
        }
        self.replica.nests.end(id);
        {
            let mut shared = self.replica.shared();
            shared.stalled = None;
            shared.staged_bytes = shared.staged_bytes.saturating_sub(bytes);
        }
        if self.distrust {
            // Not what the batch says: no acknowledgement, and a new session,
            // which begins with an inventory.
            let reason = "the replica has lost an object and is to be reconciled".to_owned();
            let _ = reply.send(Progress::Unable(reason));
            return Ok(());
        }
        let _ = reply.send(Progress::Applied(id));
        // Heartbeats keep the queue from ever being idle.
        if self.uncovered
            && self.ran.elapsed() > IDLE
            && let Err(error) = self.cover()
        {
            self.stall(&error);
        }
        Ok(())
    }

    /// Seals a batch, waiting while the disk is full; `None` when the batch is
    /// given back.
    fn seal_patiently(
        &mut self,
        batch: &WholeBatch,
        reply: &mpsc::UnboundedSender<Progress>,
    ) -> Result<Option<Vec<Step>>, Ended> {
        loop {
            match self.seal(batch) {
                Ok(steps) => return Ok(Some(steps)),
                Err(SealError::Killed) => return Err(Ended::Killed),
                Err(SealError::Breach(reason)) => {
                    let _ = reply.send(Progress::Breach(reason));
                    return Ok(None);
                }
                Err(SealError::Unplaceable(objects)) => {
                    self.discard_batch(batch);
                    for (object, cause) in &objects {
                        tracing::warn!(%object, cause, "an object finds no place; it is given back");
                        self.replica.meters.error(ErrorKind::NoPlace);
                    }
                    let _ = reply.send(Progress::Returned(batch.batch, objects));
                    return Ok(None);
                }
                // Whether the commit is on disk, nobody knows (see `Store`). So
                // the session ends, and the next begins as after a crash.
                Err(error @ SealError::Store(_)) if self.replica.store.has_failed() => {
                    self.astray = true;
                    self.stall(&error);
                    let _ = reply.send(Progress::Unable(error.to_string()));
                    return Ok(None);
                }
                // Retrying the sync would succeed and prove nothing: the error
                // is told once. The batch has to come again, and so has what
                // waited behind it.
                Err(error @ (SealError::Sync(_) | SealError::Skipped)) => {
                    self.stall(&error);
                    let _ = reply.send(Progress::Unable(error.to_string()));
                    return Ok(None);
                }
                Err(error) => self.wait_after(&error)?,
            }
        }
    }

    /// Removes what was staged for a batch that will not be applied.
    fn discard_batch(&self, batch: &WholeBatch) {
        let area = &self.replica.area;
        let places: Vec<_> = batch.content.values().flat_map(StagedTransfer::places).collect();
        Stager::discard(area, &places);
        Stager::discard(area, &batch.superseded);
        self.discard_rest(batch);
        self.replica.nests.end(batch.batch);
        let bytes: u64 = batch.content.values().map(staged_bytes).sum();
        let mut shared = self.replica.shared();
        shared.staged_bytes = shared.staged_bytes.saturating_sub(bytes);
    }

    /// The batch is visible.
    ///
    /// Durability: none. If this is lost, the steps are redone, to no effect.
    fn applied(&mut self) -> Result<(), SealError> {
        if self.standing.applied != self.standing.committed {
            self.standing.applied = self.standing.committed;
            self.replica.store.note_standing(&self.standing)?;
        }
        self.pause = RETRY.0;
        self.publish();
        Ok(())
    }
}

/// What the manifest will say of it, where something was set aside.
pub(crate) fn set_aside_item(finding: &Finding) -> Option<SetAsideItem> {
    let Finding::SetAside { object, from, to } = finding else { return None };
    Some(SetAsideItem {
        file: to.name.to_string(),
        object: object.to_string(),
        path: None,
        reason: format!("stood unexpectedly under the name {}", from.name),
    })
}
