//! A session: the asynchronous shell around [`Session`].
//!
//! Control frames are read here; each data stream is read by a task of its own
//! and staged by an owned thread behind a bounded channel, so that a slow disk
//! holds back QUIC's windows and not our memory. What is whole goes to the
//! applier.

mod greeting;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use crossbeam_channel::Sender;
use quinn::{Connection, RecvStream, SendStream};
use replicator_common::describe::{Describe, Description};
use replicator_common::id::{BatchId, SessionId};
use replicator_common::name::Name;
use replicator_common::net::frame::{FrameError, FrameReader, FrameWriter};
use replicator_common::net::quic;
use replicator_common::status::DestinationReport;
use replicator_common::sys::place;
use replicator_common::time::Timestamp;
use replicator_common::wire::kept::KEPT_TRANSFERS_MAX;
use replicator_common::wire::{BatchHeader, DestinationMessage, Op, Refusal, SourceMessage};
use tokio::sync::mpsc;

use crate::applier::{Job, Progress};
use crate::apply::Place;
use crate::area::AreaError;
use crate::describe::Describer;
use crate::kept::Kept;
use crate::meters::ErrorKind;
use crate::reconcile;
use crate::replica::{APPLIER_SHARD, Replica, applier_staging};
use crate::session::{Arrival, Breach, Returned, Session};
use crate::stage::Stager;
use crate::streams::{Event, PackedFile, spawn_stager};
pub use greeting::{Greeting, hear};
use greeting::{begin, greet, refuse};

/// Between reports of the destination while something arrives.
const REPORT: Duration = Duration::from_millis(500);
/// Between reports otherwise. By default the word that a heartbeat is durable comes
/// sooner, and the report goes with it.
const IDLE_REPORT: Duration = Duration::from_millis(1200);
/// A report that would be due so much later goes with the word that a batch is applied.
const WITH_APPLIED: Duration = Duration::from_millis(300);
/// How long what is not urgent waits for something to go with.
const HELD: Duration = Duration::from_millis(10);
/// How long a source may take to hear the last word of a failover.
const LAST_WORD: Duration = Duration::from_secs(10);
/// Staging results that wait for the session, of up to 128 files each.
const EVENTS_WAITING: usize = 64;
/// Objects of one message that gives a batch back.
const RETURNED_MAX: usize = 4096;
/// How often what was kept may be asked for in a session.
const ASKED_MAX: usize = 16 * KEPT_TRANSFERS_MAX;

/// Why a session ended.
#[derive(Debug, thiserror::Error)]
pub enum SessionError {
    /// The connection or a stream broke.
    #[error("connection: {0}")]
    Connection(#[from] quinn::ConnectionError),
    /// The connection ended, for this reason.
    #[error("{0}")]
    Ended(String),
    /// A frame could not be read or written.
    #[error(transparent)]
    Frame(#[from] FrameError),
    /// The destination refused, and has told the source.
    #[error("refused: {0}")]
    Refused(Refusal),
    /// The source went away without a word.
    #[error("the source closed the session")]
    Closed,
    /// The applier does not answer.
    #[error("the applier has ended")]
    NoApplier,
    /// The source said nothing in time.
    #[error("the source did not introduce itself")]
    Silent,
}

impl SessionError {
    /// The connection's own word of its end says more than a stream's.
    fn of(connection: &Connection, error: Self) -> Self {
        match (error, quic::ending(connection)) {
            (Self::Frame(_) | Self::Connection(_), Some(ending)) => Self::Ended(ending),
            (error, _) => error,
        }
    }

    /// A frame could not be read: the stream broke, or what came is no frame,
    /// which is the source's doing.
    pub(crate) fn unread(error: FrameError) -> Self {
        match error {
            FrameError::Io(_) => Self::Frame(error),
            error => Self::Refused(Refusal::Protocol(error.to_string())),
        }
    }
}

impl From<Breach> for SessionError {
    fn from(breach: Breach) -> Self {
        Self::Refused(Refusal::Protocol(breach.to_string()))
    }
}

/// What a session needs of the service.
pub struct SessionContext {
    /// The replica.
    pub replica: Arc<Replica>,
    /// Its applier.
    pub jobs: Sender<Job>,
    /// Asks the service to fail over; the answer is what is told to the source.
    pub fail_over: Arc<dyn Fn() -> Option<DestinationMessage> + Send + Sync>,
    /// What the service wants to be the session's last word.
    pub last_word: mpsc::UnboundedReceiver<DestinationMessage>,
    /// The session's name.
    pub session: SessionId,
}

struct Shell {
    context: SessionContext,
    connection: Connection,
    session: Session,
    writer: FrameWriter<SendStream>,
    progress: mpsc::UnboundedSender<Progress>,
    /// The last batch applied.
    applied: BatchId,
    /// Parts of plans written for a failover, see [`Shell::keep_plan`].
    kept_plans: BTreeMap<BatchId, Vec<Place>>,
    inventory: Option<Inventory>,
    /// Looks at the replica for the source's verification, once asked.
    describer: Option<Describer>,
    described: mpsc::UnboundedSender<Description>,
    /// What is said of what was kept, as it is read.
    kept: (mpsc::Sender<DestinationMessage>, mpsc::Receiver<DestinationMessage>),
    /// How often the source asked for it.
    asked: usize,
    /// Something waits to be said with what is said next, until then.
    holding: bool,
    held_until: Instant,
    /// When the last report was sent (before the first one, that it is due); whether
    /// something arrived since.
    reported: Instant,
    staging: bool,
    /// The source was told that the replica has a watermark.
    claimed: bool,
}

/// Runs a session to its end. The connection is closed by then.
pub async fn run(greeting: Greeting, context: SessionContext) -> SessionError {
    let replica = context.replica.clone();
    let connection = greeting.connection.clone();
    let error = match session(greeting, context).await {
        Ok(()) => SessionError::Closed,
        Err(error) => SessionError::of(&connection, error),
    };
    close(&connection, &error);
    if !matches!(error, SessionError::Closed) {
        replica.meters.error(ErrorKind::Session);
    }
    let mut shared = replica.shared();
    // A session that did not come about changes nothing of that.
    if std::mem::replace(&mut shared.link.connected, false) {
        shared.link.since = Timestamp::now();
    }
    shared.link.round_trip_micros = None;
    shared.link.last_error = Some(error.to_string());
    error
}

/// Ends a connection, and says why, unless it has ended: to close one that the source ended
/// would make it look as if it was ended here, and somebody had to hear of that.
pub fn close(connection: &Connection, error: &SessionError) {
    if connection.close_reason().is_some() {
        return;
    }
    let code = match error {
        SessionError::Refused(Refusal::Protocol(_)) => replicator_common::net::quic::CLOSE_PROTOCOL,
        _ => replicator_common::net::quic::CLOSE_DONE,
    };
    connection.close(code, error.to_string().as_bytes());
}

async fn session(greeting: Greeting, context: SessionContext) -> Result<(), SessionError> {
    let Greeting { hello, received, connection, reader, mut writer } = greeting;
    let standing = match begin(&context, &hello).await? {
        Ok(standing) => standing,
        Err(refusal) => return Err(refuse(&mut writer, refusal).await),
    };
    tracing::info!(
        source = %hello.source,
        peer = %connection.remote_address(),
        committed = %standing.committed,
        reconcile = standing.reconcile,
        "session begins"
    );
    let clocks = (hello.time, received);
    greet(&mut writer, &context, &connection, clocks, &standing).await?;
    let (progress, progressed) = mpsc::unbounded_channel();
    // Bounded by the questions that may wait.
    let (described, descriptions) = mpsc::unbounded_channel();
    let session = Session::new(standing.committed);
    let mut shell = Shell {
        context,
        connection,
        session,
        writer,
        progress,
        applied: standing.committed,
        kept_plans: BTreeMap::new(),
        inventory: None,
        describer: None,
        described,
        kept: mpsc::channel(1),
        asked: 0,
        holding: false,
        held_until: Instant::now(),
        reported: Instant::now().checked_sub(IDLE_REPORT).unwrap_or_else(Instant::now),
        claimed: false,
        staging: false,
    };
    let result = shell.serve(reader, progressed, descriptions).await;
    if let Err(SessionError::Refused(refusal)) = &result {
        // A courtesy: the session ends either way.
        let _ = refuse(&mut shell.writer, refusal.clone()).await;
    }
    result
}

/// Keeps what the source says of our clock: by how much it is ahead of its own;
/// and from where it says it, which may change within a connection.
fn note_clock(replica: &Replica, connection: &Connection, ahead: Option<i64>) {
    let round_trip = connection.rtt();
    let mut shared = replica.shared();
    if ahead.is_some() {
        shared.standing.clock_offset = ahead;
        shared.link.clock_offset_nanos = ahead;
    }
    shared.link.round_trip_micros = u64::try_from(round_trip.as_micros()).ok();
    shared.link.peer = connection.remote_address().to_string();
}

impl Shell {
    async fn serve(
        &mut self,
        mut reader: FrameReader<RecvStream>,
        mut progressed: mpsc::UnboundedReceiver<Progress>,
        mut descriptions: mpsc::UnboundedReceiver<Description>,
    ) -> Result<(), SessionError> {
        let (events, mut staged) = mpsc::channel(EVENTS_WAITING);
        let mut streams = 0u8;
        self.read_kept(Kept::tell);
        loop {
            let report_at = self.report_at();
            tokio::select! {
                message = reader.read::<SourceMessage>() => match message.map_err(SessionError::unread)? {
                    Some(message) => self.message(message).await?,
                    None => return Ok(()),
                },
                stream = self.connection.accept_uni() => {
                    spawn_stager(&self.context.replica, stream?, streams, events.clone());
                    streams = streams.wrapping_add(1);
                }
                Some(event) = staged.recv() => self.event(event).await?,
                Some(progress) = progressed.recv() => self.progress(progress).await?,
                Some(part) = self.kept.1.recv() => {
                    self.writer.write(&part).await?;
                }
                part = next_part(&mut self.inventory) => self.inventoried(part).await?,
                Some(description) = descriptions.recv() => {
                    let message = DestinationMessage::Described(Box::new(description));
                    self.writer.write(&message).await?;
                }
                Some(message) = self.context.last_word.recv() => {
                    return self.last_word(message).await;
                }
                () = tokio::time::sleep_until(self.held_until.into()), if self.holding => {
                    self.holding = false;
                    self.writer.flush().await?;
                }
                // A moment, and no span that begins anew with all that is heard.
                () = tokio::time::sleep_until(report_at.into()) => {
                    let report = self.context.replica.report(Timestamp::now());
                    self.report(report).await?;
                }
            }
        }
    }

    /// When the source is to be told how things are.
    fn report_at(&self) -> Instant {
        self.reported + if self.staging { REPORT } else { IDLE_REPORT }
    }

    async fn report(&mut self, report: DestinationReport) -> Result<(), SessionError> {
        self.reported = Instant::now();
        self.staging = false;
        self.writer.write(&DestinationMessage::Report(Box::new(report))).await?;
        Ok(())
    }

    async fn message(&mut self, message: SourceMessage) -> Result<(), SessionError> {
        match message {
            SourceMessage::Hello(_) => {
                Err(SessionError::Refused(Refusal::Protocol("hello said twice".to_owned())))
            }
            SourceMessage::Plan { batch, ops } => {
                // What is passed over has no bound on its number.
                if self.session.awaits(batch) {
                    self.keep_plan(batch, &ops).await;
                }
                let places = self.session.plan(batch, ops)?;
                self.discard(places).await;
                Ok(())
            }
            SourceMessage::Commit { batch, header } => self.commit(batch, header).await,
            SourceMessage::Abandon { batch } => {
                let mut places = self.session.abandon(batch)?;
                places.extend(self.kept_plans.remove(&batch).unwrap_or_default());
                self.discard(places).await;
                Ok(())
            }
            SourceMessage::Report(report) => {
                let (sent, received) = (report.time, Timestamp::now());
                let ahead = report.link.clock_offset_nanos;
                note_clock(&self.context.replica, &self.connection, ahead);
                {
                    let mut shared = self.context.replica.shared();
                    shared.source = Some(report);
                    shared.heard = Some(Instant::now());
                }
                let answered = Timestamp::now();
                let answer = DestinationMessage::Clock { sent, received, answered };
                self.writer.write(&answer).await?;
                Ok(())
            }
            SourceMessage::RequestInventory => {
                self.inventory();
                Ok(())
            }
            SourceMessage::Describe(question) => self.describe(*question),
            SourceMessage::AskKept { object } => {
                // Asking without end would make tasks without end.
                self.asked += 1;
                if self.asked > ASKED_MAX {
                    let what = "what was kept was asked for too often".to_owned();
                    return Err(SessionError::Refused(Refusal::Protocol(what)));
                }
                self.read_kept(move |kept, say| kept.chunks(&object, say));
                Ok(())
            }
            SourceMessage::Release { packed, transfers } => {
                // Failover sets it all aside, and has counted it.
                if !self.context.replica.failing_over.load(Ordering::Acquire) {
                    self.context.replica.kept.release(packed, &transfers);
                }
                Ok(())
            }
            SourceMessage::Delete => {
                let fail_over = self.context.fail_over.clone();
                let answer = tokio::task::spawn_blocking(move || fail_over()).await;
                match answer.ok().flatten() {
                    Some(message) => self.last_word(message).await,
                    None => {
                        Err(SessionError::Refused(Refusal::Unable("failover failed".to_owned())))
                    }
                }
            }
        }
    }

    /// Says it, and waits until the source has it.
    async fn last_word(&mut self, message: DestinationMessage) -> Result<(), SessionError> {
        self.writer.write(&message).await?;
        let _ = self.writer.get_mut().finish();
        let _ = tokio::time::timeout(LAST_WORD, self.writer.get_mut().stopped()).await;
        Err(SessionError::Closed)
    }

    async fn commit(&mut self, batch: BatchId, header: BatchHeader) -> Result<(), SessionError> {
        self.session.commit(batch, header)?;
        self.hand_on_whole().await
    }

    async fn hand_on_whole(&mut self) -> Result<(), SessionError> {
        // Never waits for the applier: reports must go on while it is busy or
        // stalled. Nobody else fills the queue while the session is open, so
        // room that is seen is room that stays.
        while !self.context.jobs.is_full() {
            let Some(whole) = self.session.next_whole()? else { break };
            let job = Job::Batch { batch: Box::new(whole), reply: self.progress.clone() };
            self.context.jobs.try_send(job).map_err(|_| SessionError::NoApplier)?;
        }
        self.return_hopeless().await
    }

    /// Keeps a part of a plan beside what it names, so that a failover after a
    /// crash can say what the staged files were to become. Not synced: after a
    /// power loss the staged files may be gone as well. A failure costs words in
    /// a manifest, not data.
    async fn keep_plan(&mut self, batch: BatchId, ops: &[Op]) {
        // Frames of nothing have no bound on their number.
        if ops.is_empty() {
            return;
        }
        // Plans of a session before may stand there.
        let number = self.context.replica.kept.number();
        let name = format!("plan.{batch}.{number}");
        let area = self.context.replica.area.clone();
        let Ok(record) = replicator_common::codec::encode_record(ops) else { return };
        let Ok(name) = Name::new(name.as_bytes()) else { return };
        let place = Place { within: applier_staging(), name: name.clone() };
        self.kept_plans.entry(batch).or_default().push(place);
        let _ = tokio::task::spawn_blocking(move || {
            let file = place::create_file(area.staging(APPLIER_SHARD), &name)?;
            place::write_at(&file, &record, 0)
        })
        .await;
    }

    /// Deletes what is staged and not needed, on a thread that may wait for the disk.
    async fn discard(&self, places: Vec<Place>) {
        if places.is_empty() {
            return;
        }
        let area = self.context.replica.area.clone();
        // What stays is removed when the next session begins.
        let _ = tokio::task::spawn_blocking(move || Stager::discard(&area, &places)).await;
    }

    async fn event(&mut self, event: Event) -> Result<(), SessionError> {
        self.staging = true;
        match event {
            Event::Packed { batch, files } => {
                let mut late = Vec::new();
                for PackedFile { object, version, file } in files {
                    late.extend(self.session.packed(batch, object, version, file)?);
                }
                self.discard(late).await;
                self.hand_on_whole().await
            }
            Event::Failed { batch, object, version, reason } => {
                self.session.failed(batch, object, version, reason)?;
                self.return_hopeless().await
            }
            Event::Unplaced { transfer, reason } => {
                self.session.transfer_failed(transfer, reason.clone());
                let message = DestinationMessage::TransferUnplaced { transfer, reason };
                self.writer.write(&message).await?;
                self.return_hopeless().await
            }
            Event::Transferred { transfer, object, staged } => {
                match self.session.transferred(transfer, object, *staged)? {
                    Arrival::Early => {
                        self.say_soon(&DestinationMessage::Transferred { transfer })?;
                    }
                    // That the batch is applied says it all.
                    Arrival::Awaited => {}
                    Arrival::Unwanted(places) => self.discard(places).await,
                }
                self.hand_on_whole().await
            }
            Event::Aborted { transfer } => {
                let places = self.session.aborted(transfer);
                self.discard(places).await;
                Ok(())
            }
            Event::Refused { transfer, reason } => {
                self.session.transfer_failed(transfer, reason.clone());
                let message = DestinationMessage::TransferRefused { transfer, reason };
                self.writer.write(&message).await?;
                self.return_hopeless().await
            }
            Event::Ended(error) => Err(error),
        }
    }

    async fn progress(&mut self, progress: Progress) -> Result<(), SessionError> {
        let message = match progress {
            Progress::Durable(batch) => {
                // The commit record says it all now.
                let places = self.kept_plans.remove(&batch).unwrap_or_default();
                self.discard(places).await;
                // A small batch is applied by then.
                self.say_soon(&DestinationMessage::Durable { batch })?;
                return self.hand_on_whole().await;
            }
            Progress::Applied(batch) => {
                self.applied = batch;
                DestinationMessage::Applied { batch, time: Timestamp::now() }
            }
            Progress::Breach(reason) => {
                self.context.replica.note_error(reason.as_str());
                return Err(SessionError::Refused(Refusal::Protocol(reason)));
            }
            Progress::Returned(batch, objects) => {
                let returned = self.session.give_back(batch, objects);
                return self.give_back(returned).await;
            }
            Progress::Unable(reason) => {
                return Err(SessionError::Refused(Refusal::Unable(reason)));
            }
        };
        self.writer.queue(&message)?;
        self.report_with_applied().await?;
        self.writer.flush().await?;
        self.hand_on_whole().await
    }

    /// Reports in the same packet if a report is due soon; and at once when the initial
    /// sync is through: whoever waits for that need not wait for the next report.
    async fn report_with_applied(&mut self) -> Result<(), SessionError> {
        let due = self.report_at() <= Instant::now() + WITH_APPLIED;
        if self.claimed && !due {
            return Ok(());
        }
        let report = self.context.replica.report(Timestamp::now());
        let first = !self.claimed && report.last_replicated.is_some();
        self.claimed |= first;
        if first || due { self.report(report).await } else { Ok(()) }
    }

    /// Says something together with what is said next, if that is soon.
    fn say_soon(&mut self, message: &DestinationMessage) -> Result<(), SessionError> {
        self.writer.queue(message)?;
        if !self.holding {
            (self.holding, self.held_until) = (true, Instant::now() + HELD);
        }
        Ok(())
    }

    /// Gives the next batch back when some of it found no place, and the rest is
    /// there.
    async fn return_hopeless(&mut self) -> Result<(), SessionError> {
        match self.session.next_returned(self.applied) {
            Some(returned) => self.give_back(returned).await,
            None => Ok(()),
        }
    }

    async fn give_back(&mut self, returned: Returned) -> Result<(), SessionError> {
        let Returned { batch, objects, mut places } = returned;
        for parts in self.kept_plans.split_off(&batch).into_values() {
            places.extend(parts);
        }
        self.discard(places).await;
        if let Some((_, cause)) = objects.first() {
            self.context.replica.note_error(cause.as_str());
        }
        // A message is one frame, which has a limit.
        let mut parts = objects.chunks(RETURNED_MAX).peekable();
        while let Some(part) = parts.next() {
            let last = parts.peek().is_none();
            let message = DestinationMessage::Returned { batch, objects: part.to_vec(), last };
            self.writer.write(&message).await?;
        }
        Ok(())
    }

    /// The source asks what the replica holds.
    fn describe(&mut self, question: Describe) -> Result<(), SessionError> {
        let describer = match self.describer.take() {
            Some(describer) => describer,
            None => Describer::start(self.context.replica.clone(), self.described.clone())
                .map_err(|error| SessionError::Refused(Refusal::Unable(error.to_string())))?,
        };
        let asked = describer.ask(question);
        self.describer = Some(describer);
        asked.map_err(|reason| SessionError::Refused(Refusal::Protocol(reason)))
    }

    /// Reads what was kept, beside the session, and says what it finds.
    fn read_kept(
        &self,
        read: impl FnOnce(&Kept, &mut dyn FnMut(DestinationMessage) -> bool) + Send + 'static,
    ) {
        let (kept, parts) = (self.context.replica.kept.clone(), self.kept.0.clone());
        tokio::task::spawn_blocking(move || {
            read(&kept, &mut |part| parts.blocking_send(part).is_ok());
        });
    }

    /// The source asks for a part of the inventory. It is walked once a session.
    fn inventory(&mut self) {
        let walk = self.inventory.get_or_insert_with(|| {
            let (frames, parts) = mpsc::channel(1);
            let area = self.context.replica.area.clone();
            let task = tokio::task::spawn_blocking(move || {
                reconcile::walk(&area, &mut |items, last| {
                    let part = DestinationMessage::Inventory { items, last };
                    frames.blocking_send(part).is_ok()
                })
            });
            Inventory { parts, asked: 0, task: Some(task) }
        });
        walk.asked += 1;
    }

    /// One more part of the inventory is there, or there is none any more.
    async fn inventoried(&mut self, part: Option<DestinationMessage>) -> Result<(), SessionError> {
        let Some(walk) = &mut self.inventory else { return Ok(()) };
        if let Some(part) = part {
            walk.asked -= 1;
            self.writer.write(&part).await?;
            return Ok(());
        }
        let Some(task) = walk.task.take() else { return Ok(()) };
        match task.await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(error)) => Err(SessionError::Refused(Refusal::Unable(error.to_string()))),
            Err(_) => Err(SessionError::NoApplier),
        }
    }
}

/// The walk over the replica for the source's sake. It waits while the source
/// has not asked for more.
struct Inventory {
    parts: mpsc::Receiver<DestinationMessage>,
    /// Parts that the source has asked for and not got.
    asked: u64,
    /// `None` when the walk has ended.
    task: Option<tokio::task::JoinHandle<Result<(), AreaError>>>,
}

/// The next part that was asked for; `None` when the walk has ended. Pending
/// while nothing was asked for.
async fn next_part(inventory: &mut Option<Inventory>) -> Option<DestinationMessage> {
    match inventory {
        Some(walk) if walk.asked > 0 && walk.task.is_some() => walk.parts.recv().await,
        _ => std::future::pending().await,
    }
}
