//! Data streams: each is read by a task and staged by an owned thread behind a
//! bounded channel, so that a slow disk holds back QUIC's windows and not our
//! memory.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use quinn::RecvStream;
use replicator_common::id::{BatchId, ObjectId, TransferId};
use replicator_common::net::frame::{FrameReader, decode_frame};
use replicator_common::wire::{DataFrame, Refusal};
use tokio::sync::mpsc;

use crate::attributes;
use crate::receive::SessionError;
use crate::replica::{APPLIER_SHARD, Replica};
use crate::session::{StagedFile, StagedTransfer};
use crate::stage::{StageError, Stager};

/// Encoded frames (of at most 4 MiB) that wait for a stager.
const FRAMES_WAITING: usize = 2;
/// Between attempts to stage while the disk is full.
const RETRY: Duration = Duration::from_millis(500);

/// What the stagers tell the session.
pub(crate) enum Event {
    Packed { batch: BatchId, object: ObjectId, version: u32, file: Box<StagedFile> },
    Transferred { transfer: TransferId, object: ObjectId, staged: Box<StagedTransfer> },
    Aborted { transfer: TransferId },
    Refused { transfer: TransferId, reason: String },
    Failed(SessionError),
}

/// Reads a data stream on a task and stages it on a thread.
pub(crate) fn spawn_stager(
    replica: &Arc<Replica>,
    stream: RecvStream,
    number: u8,
    events: mpsc::Sender<Event>,
) {
    let (frames, queue) = crossbeam_channel::bounded::<Vec<u8>>(FRAMES_WAITING);
    let failed = events.clone();
    tokio::spawn(async move {
        let mut reader = FrameReader::new(stream);
        loop {
            match reader.read_encoded().await {
                Ok(Some(frame)) => {
                    let frames = frames.clone();
                    // Blocks while the disk is slow; that is what stops the
                    // source, by QUIC's flow control.
                    let sent = match frames.try_send(frame) {
                        Ok(()) => true,
                        Err(crossbeam_channel::TrySendError::Full(frame)) => {
                            let sending = tokio::task::spawn_blocking(move || frames.send(frame));
                            matches!(sending.await, Ok(Ok(())))
                        }
                        Err(crossbeam_channel::TrySendError::Disconnected(_)) => false,
                    };
                    if !sent {
                        return;
                    }
                }
                Ok(None) => return,
                Err(error) => {
                    let _ = failed.send(Event::Failed(SessionError::unread(error))).await;
                    return;
                }
            }
        }
    });
    let replica = replica.clone();
    // The applier's own staging directory stays its own.
    let shard = number % APPLIER_SHARD;
    let at_work = AtWork::new(&replica);
    let spawned = std::thread::Builder::new().name(format!("stage-{number}")).spawn({
        let events = events.clone();
        move || {
            let _at_work = at_work;
            stage_all(&replica, shard, &queue, &events);
        }
    });
    if let Err(error) = spawned {
        tracing::error!(%error, "no thread for a data stream");
        let refusal = Refusal::Unable(format!("no thread for a data stream: {error}"));
        let _ = events.try_send(Event::Failed(SessionError::Refused(refusal)));
    }
}

/// Counts a stager while it handles a frame.
struct Busy<'a>(&'a Replica);

impl<'a> Busy<'a> {
    fn new(replica: &'a Replica) -> Self {
        replica.busy.fetch_add(1, Ordering::AcqRel);
        Self(replica)
    }
}

impl Drop for Busy<'_> {
    fn drop(&mut self) {
        self.0.busy.fetch_sub(1, Ordering::AcqRel);
    }
}

/// Counts a stager while it may write to staging.
struct AtWork(Arc<Replica>);

impl AtWork {
    fn new(replica: &Arc<Replica>) -> Self {
        replica.stagers.fetch_add(1, Ordering::AcqRel);
        Self(replica.clone())
    }
}

impl Drop for AtWork {
    fn drop(&mut self) {
        self.0.stagers.fetch_sub(1, Ordering::AcqRel);
    }
}

fn stage_all(
    replica: &Arc<Replica>,
    shard: u8,
    queue: &crossbeam_channel::Receiver<Vec<u8>>,
    events: &mpsc::Sender<Event>,
) {
    let (area, store) = (replica.area.clone(), replica.store.clone());
    let (applied, kept) = (replica.applied.clone(), replica.kept.clone());
    let mut stager = Stager::new(area, store, replica.locator(), applied, kept, shard);
    for frame in queue {
        let _busy = Busy::new(replica);
        // Looked at after the count is raised: failover sets it, then waits
        // for the count.
        if replica.failing_over.load(Ordering::Acquire) {
            return;
        }
        metrics::counter!("replicator_destination_received_bytes_total")
            .increment(frame.len() as u64);
        let result = match decode_frame::<DataFrame>(&frame) {
            Ok(frame) => stage_one(replica, &mut stager, frame, events),
            Err(error) => Err(SessionError::unread(error)),
        };
        let shortfalls = std::mem::take(&mut stager.shortfalls);
        attributes::merge(&mut replica.shared().standing.shortfalls, shortfalls);
        if let Err(error) = result {
            let _ = events.blocking_send(Event::Failed(error));
            return;
        }
    }
}

fn stage_one(
    replica: &Replica,
    stager: &mut Stager,
    frame: DataFrame,
    events: &mpsc::Sender<Event>,
) -> Result<(), SessionError> {
    let tell = |event| events.blocking_send(event).map_err(|_| SessionError::Closed);
    match frame {
        DataFrame::Pack { batch, objects } => {
            for packed in objects {
                let Some(file) = patiently(replica, events, || stager.pack(batch, &packed))? else {
                    continue;
                };
                replica.shared().staged_bytes += file.bytes;
                metrics::counter!("replicator_destination_staged_objects_total").increment(1);
                let (object, version) = (packed.object, packed.version);
                tell(Event::Packed { batch, object, version, file: Box::new(file) })?;
            }
            Ok(())
        }
        DataFrame::PackAgain { batch, objects } => {
            for again in objects {
                let Some(file) = patiently(replica, events, || stager.again(batch, &again))? else {
                    continue;
                };
                let Some(file) = file else {
                    // A new session tells the source anew what there is.
                    let what = format!("the content of {} was not kept", again.object);
                    return Err(SessionError::Refused(Refusal::Unable(what)));
                };
                replica.shared().staged_bytes += file.bytes;
                metrics::counter!("replicator_destination_reused_objects_total").increment(1);
                let (object, version) = (again.object, again.version);
                tell(Event::Packed { batch, object, version, file: Box::new(file) })?;
            }
            Ok(())
        }
        DataFrame::TransferBegin(begin) => {
            patiently(replica, events, || stager.begin(begin.clone())).map(drop)
        }
        DataFrame::TransferReuse { transfer, in_place } => {
            patiently(replica, events, || stager.reuse(transfer, in_place)).map(drop)
        }
        DataFrame::TransferPieces { transfer, pieces } => {
            // One by one: a piece that failed half-way is written again at the
            // same place, those before it are not.
            for piece in &pieces {
                patiently(replica, events, || {
                    stager.pieces(transfer, std::slice::from_ref(piece))
                })?;
            }
            if let Some(bytes) = stager.staged(transfer) {
                replica.shared().arriving.insert(transfer, bytes);
            }
            Ok(())
        }
        DataFrame::TransferEnd { transfer, state } => {
            replica.shared().arriving.remove(&transfer);
            // Not repeated: the end of a transfer takes it apart.
            match stager.end(transfer, state) {
                Ok(Some((object, staged))) => {
                    tell(Event::Transferred { transfer, object, staged: Box::new(staged) })
                }
                Ok(None) => Ok(()),
                Err(StageError::Breach(reason)) => {
                    Err(SessionError::Refused(Refusal::Protocol(reason)))
                }
                Err(error) => tell(Event::Refused { transfer, reason: error.to_string() }),
            }
        }
        DataFrame::TransferAbort { transfer } => {
            replica.shared().arriving.remove(&transfer);
            if stager.abort(transfer) {
                return Ok(());
            }
            tell(Event::Aborted { transfer })
        }
    }
}

/// Tries until it works, as long as trying again may help: a full disk stalls,
/// it does not lose. `None` for a transfer that was refused.
fn patiently<T>(
    replica: &Replica,
    events: &mpsc::Sender<Event>,
    mut attempt: impl FnMut() -> Result<T, StageError>,
) -> Result<Option<T>, SessionError> {
    let mut stalled = false;
    loop {
        match attempt() {
            Ok(value) => {
                if stalled {
                    replica.shared().stalled = None;
                }
                return Ok(Some(value));
            }
            Err(StageError::Breach(reason)) => {
                return Err(SessionError::Refused(Refusal::Protocol(reason)));
            }
            Err(StageError::Refused { transfer, reason }) => {
                let told = events.blocking_send(Event::Refused { transfer, reason });
                return told.map(|()| None).map_err(|_| SessionError::Closed);
            }
            Err(error) => {
                tracing::warn!(%error, "cannot stage, trying again");
                if matches!(&error, StageError::Area(error) if error.is_no_room()) {
                    replica.kept.give_up_transfers();
                }
                replica.shared().stalled = Some(error.to_string());
                replica.note_error(error.to_string());
                stalled = true;
            }
        }
        let failing_over = replica.failing_over.load(Ordering::Acquire);
        if replica.is_ending() || failing_over || events.is_closed() {
            return Err(SessionError::Closed);
        }
        std::thread::sleep(RETRY);
    }
}
