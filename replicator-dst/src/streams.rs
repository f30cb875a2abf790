//! Data streams: each is read by a task and staged by an owned thread behind a
//! bounded channel, so that a slow disk holds back QUIC's windows and not our
//! memory.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use crossbeam_channel::RecvTimeoutError;
use quinn::RecvStream;
use replicator_common::id::{BatchId, ObjectId, TransferId};
use replicator_common::net::frame::{FrameReader, decode_body, open_frame};
use replicator_common::wire::{DataFrame, PackRun, PackedObject, Piece, Refusal, contents};
use tokio::sync::mpsc;

use crate::area::AreaError;
use crate::attributes;
use crate::meters::ErrorKind;
use crate::receive::SessionError;
use crate::replica::{APPLIER_SHARD, Replica};
use crate::session::{StagedFile, StagedTransfer};
use crate::stage::{StageError, Stager};

/// Encoded frames (of at most 4 MiB) that wait for a stager.
const FRAMES_WAITING: usize = 2;
/// Files that the session is told of at once, at most.
const FILES_TOLD: usize = 128;
/// How long a stager waits for more before it writes what it has of the last frame.
const LINGER: Duration = Duration::from_millis(20);
/// First and longest pause between attempts to stage while the replica's file system takes nothing.
const RETRY: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(2));

/// An object's content, as it was packed, in staging.
pub(crate) struct PackedFile {
    pub(crate) object: ObjectId,
    pub(crate) version: u32,
    pub(crate) file: StagedFile,
}

/// What the stagers tell the session.
pub(crate) enum Event {
    /// Those of a frame together: a message for each would wake the session for each.
    Packed {
        batch: BatchId,
        files: Vec<PackedFile>,
    },
    Transferred {
        transfer: TransferId,
        object: ObjectId,
        staged: Box<StagedTransfer>,
    },
    Aborted {
        transfer: TransferId,
    },
    Refused {
        transfer: TransferId,
        reason: String,
    },
    /// A packed object finds no place here.
    Failed {
        batch: BatchId,
        object: ObjectId,
        version: u32,
        reason: String,
    },
    /// A transfer finds no place here.
    Unplaced {
        transfer: TransferId,
        reason: String,
    },
    Ended(SessionError),
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
                    let _ = failed.send(Event::Ended(SessionError::unread(error))).await;
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
        let _ = events.try_send(Event::Ended(SessionError::Refused(refusal)));
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
    let applied = replica.applied.clone();
    let shared = (replica.kept.clone(), replica.nests.clone(), replica.sync_failed.clone());
    // INVARIANT (nothing that arrived is thrown away): held while anything waits to be
    // written, also by the stager's end. So a failover finds all of it in staging.
    let mut busy: Option<Busy<'_>> = None;
    let mut stager = Stager::new(area, store, replica.locator(), applied, shared, shard);
    while let Some(frame) = next_frame(replica, queue, &mut stager, &mut busy) {
        busy.get_or_insert_with(|| Busy::new(replica));
        // Looked at after the count is raised: failover sets it, then waits
        // for the count.
        if replica.failing_over.load(Ordering::Acquire) {
            return;
        }
        replica.meters.received.increment(frame.len() as u64);
        let result = open_frame(&frame).map_err(SessionError::unread).and_then(|body| {
            let frame = decode_body(&body).map_err(SessionError::unread)?;
            stage_one(replica, &mut stager, frame, events)
        });
        let shortfalls = std::mem::take(&mut stager.shortfalls);
        attributes::merge(&mut replica.shared().standing.shortfalls, shortfalls);
        if let Err(error) = result {
            let _ = events.blocking_send(Event::Ended(error));
            return;
        }
    }
}

/// The next frame; `None` when there will be none. All is written before that is waited
/// for without end.
fn next_frame(
    replica: &Replica,
    queue: &crossbeam_channel::Receiver<Vec<u8>>,
    stager: &mut Stager,
    busy: &mut Option<Busy<'_>>,
) -> Option<Vec<u8>> {
    let mut pause = if stager.is_waiting() { LINGER } else { Duration::ZERO };
    loop {
        match queue.recv_timeout(pause) {
            Ok(frame) => return Some(frame),
            Err(RecvTimeoutError::Disconnected) => return None,
            Err(RecvTimeoutError::Timeout) => stager.settle(),
        }
        if !stager.is_waiting() {
            *busy = None;
            return queue.recv().ok();
        }
        // The disk takes nothing now. Whoever fails over does not wait for that.
        if replica.failing_over.load(Ordering::Acquire) {
            return None;
        }
        pause = RETRY.0;
    }
}

fn stage_one(
    replica: &Replica,
    stager: &mut Stager,
    frame: DataFrame<'_>,
    events: &mpsc::Sender<Event>,
) -> Result<(), SessionError> {
    let tell = |event| events.blocking_send(event).map_err(|_| SessionError::Closed);
    match frame {
        DataFrame::Pack { batch, objects, data } => {
            stage_packs(replica, stager, (batch, &[]), (&objects, &data), events)
        }
        DataFrame::PackPlaced { batch, runs, objects, data } => {
            stage_packs(replica, stager, (batch, &runs), (&objects, &data), events)
        }
        DataFrame::PackAgain { batch, objects } => {
            telling(replica, events, batch, |telling| {
                for again in objects {
                    let (object, version) = (again.object.clone(), again.version);
                    match patiently(replica, events, || stager.again(batch, &again))? {
                        Staged::Done(Some(file)) => {
                            replica.meters.reused.increment(1);
                            telling.staged(PackedFile { object, version, file })?;
                        }
                        Staged::Done(None) => {
                            // A new session tells the source anew what there is.
                            let what = format!("the content of {object} was not kept");
                            return Err(SessionError::Refused(Refusal::Unable(what)));
                        }
                        Staged::Unplaced(reason) => {
                            tell(Event::Failed { batch, object, version, reason })?;
                        }
                        Staged::Refused => {}
                    }
                }
                Ok(())
            })
        }
        DataFrame::TransferBegin(begin) => {
            match patiently(replica, events, || stager.begin(begin.clone()))? {
                Staged::Unplaced(reason) => {
                    tell(Event::Unplaced { transfer: begin.transfer, reason })
                }
                Staged::Done(()) | Staged::Refused => Ok(()),
            }
        }
        DataFrame::TransferReuse { transfer, in_place } => {
            match patiently(replica, events, || stager.reuse(transfer, in_place))? {
                Staged::Unplaced(reason) => {
                    stager.abort(transfer);
                    tell(Event::Unplaced { transfer, reason })
                }
                Staged::Done(_) | Staged::Refused => Ok(()),
            }
        }
        DataFrame::TransferPieces { transfer, pieces, data } => {
            // Part by part: one that failed half-way is written again at the same
            // place, those before it are not.
            for (pieces, data) in parts(&pieces, &data)? {
                if let Staged::Unplaced(reason) =
                    patiently(replica, events, || stager.pieces(transfer, pieces, data))?
                {
                    // What came of it makes room for others. The rest is passed over.
                    stager.abort(transfer);
                    replica.shared().arriving.remove(&transfer);
                    return tell(Event::Unplaced { transfer, reason });
                }
            }
            // One that was refused arrives no more. (There may be any number of them.)
            match stager.staged(transfer) {
                Some(bytes) => replica.shared().arriving.insert(transfer, bytes),
                None => replica.shared().arriving.remove(&transfer),
            };
            Ok(())
        }
        DataFrame::TransferEnd { transfer, state } => {
            replica.shared().arriving.remove(&transfer);
            if let Staged::Unplaced(reason) = patiently(replica, events, || stager.flush(transfer))?
            {
                stager.abort(transfer);
                return tell(Event::Unplaced { transfer, reason });
            }
            // Not repeated: the end of a transfer takes it apart.
            match stager.end(transfer, state) {
                Ok(Some((object, staged))) => {
                    tell(Event::Transferred { transfer, object, staged: Box::new(staged) })
                }
                Ok(None) => Ok(()),
                Err(StageError::Breach(reason)) => {
                    Err(SessionError::Refused(Refusal::Protocol(reason)))
                }
                Err(StageError::Refused { reason, .. }) => {
                    tell(Event::Refused { transfer, reason })
                }
                Err(error) => {
                    let reason = error.to_string();
                    replica.note_error(reason.as_str());
                    tell(Event::Unplaced { transfer, reason })
                }
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

/// Tells the session of files that were staged, many at a time.
struct Telling<'a> {
    replica: &'a Replica,
    events: &'a mpsc::Sender<Event>,
    batch: BatchId,
    files: Vec<PackedFile>,
}

impl Telling<'_> {
    fn staged(&mut self, file: PackedFile) -> Result<(), SessionError> {
        self.files.push(file);
        if self.files.len() < FILES_TOLD { Ok(()) } else { self.tell() }
    }

    fn tell(&mut self) -> Result<(), SessionError> {
        let files = std::mem::take(&mut self.files);
        if files.is_empty() {
            return Ok(());
        }
        self.replica.shared().staged_bytes += files.iter().map(|one| one.file.bytes).sum::<u64>();
        let event = Event::Packed { batch: self.batch, files };
        self.events.blocking_send(event).map_err(|_| SessionError::Closed)
    }
}

/// Stages the files of a frame. Those that were staged before an error are told of, too.
fn telling<'a>(
    replica: &'a Replica,
    events: &'a mpsc::Sender<Event>,
    batch: BatchId,
    stage: impl FnOnce(&mut Telling<'a>) -> Result<(), SessionError>,
) -> Result<(), SessionError> {
    let mut telling = Telling { replica, events, batch, files: Vec::new() };
    let staged = stage(&mut telling);
    let told = telling.tell();
    staged.and(told)
}

/// Stages small files, the first of them beside those that will be their neighbours.
fn stage_packs(
    replica: &Replica,
    stager: &mut Stager,
    (batch, runs): (BatchId, &[PackRun]),
    (objects, data): (&[PackedObject], &[u8]),
    events: &mpsc::Sender<Event>,
) -> Result<(), SessionError> {
    let packed = contents(objects, data).ok_or_else(uneven)?;
    let tell = |event| events.blocking_send(event).map_err(|_| SessionError::Closed);
    let mut spots =
        runs.iter().flat_map(|run| run.names.iter().map(move |name| (&run.directory, name)));
    telling(replica, events, batch, |telling| {
        for (packed, bytes) in packed {
            let (object, version) = (packed.object.clone(), packed.version);
            let spot = spots.next();
            match patiently(replica, events, || stager.pack(batch, packed, bytes, spot))? {
                Staged::Done(file) => {
                    replica.meters.staged.increment(1);
                    telling.staged(PackedFile { object, version, file })?;
                }
                Staged::Unplaced(reason) => {
                    tell(Event::Failed { batch, object, version, reason })?;
                }
                Staged::Refused => {}
            }
        }
        Ok(())
    })?;
    stager.frame_done();
    if spots.next().is_some() {
        let what = "a pack with more names than objects".to_owned();
        return Err(SessionError::Refused(Refusal::Protocol(what)));
    }
    Ok(())
}

/// Pieces that are staged at once, with the bytes of those that are data.
type Part<'a> = (&'a [Piece], &'a [u8]);

/// Pieces that are data and stand side by side; and each other piece.
fn parts<'a>(pieces: &'a [Piece], data: &'a [u8]) -> Result<Vec<Part<'a>>, SessionError> {
    let is_data = |piece: &Piece| matches!(piece, Piece::Data { .. });
    let (mut rest, mut parts) = (data, Vec::new());
    for part in pieces.chunk_by(|one, next| is_data(one) && is_data(next)) {
        let length = part.iter().filter(|one| is_data(one)).map(Piece::length).sum::<u64>();
        let split = usize::try_from(length).ok().and_then(|length| rest.split_at_checked(length));
        let Some((bytes, after)) = split else { return Err(uneven()) };
        parts.push((part, bytes));
        rest = after;
    }
    if rest.is_empty() { Ok(parts) } else { Err(uneven()) }
}

fn uneven() -> SessionError {
    let what = "a frame that has more bytes than it tells of, or fewer".to_owned();
    SessionError::Refused(Refusal::Protocol(what))
}

/// What came of an attempt to stage.
enum Staged<T> {
    Done(T),
    /// The source has been told to send the transfer anew.
    Refused,
    /// There is no place for it; why.
    Unplaced(String),
}

/// Tries until it works, as long as that is a matter of the whole file system:
/// one that is read-only stalls, it does not lose. What finds no place by itself
/// is given up, so that nothing waits behind it: on a full disk, deletions and
/// what is small go on.
fn patiently<T>(
    replica: &Replica,
    events: &mpsc::Sender<Event>,
    mut attempt: impl FnMut() -> Result<T, StageError>,
) -> Result<Staged<T>, SessionError> {
    let (mut stalled, mut pause, mut gave_up) = (false, RETRY.0, false);
    loop {
        let attempted = match replica.slack.restore() {
            Ok(()) => attempt(),
            Err(error) => Err(StageError::Area(AreaError::no_slack(&error))),
        };
        match attempted {
            Ok(value) => {
                if stalled {
                    replica.shared().stalled = None;
                }
                return Ok(Staged::Done(value));
            }
            Err(StageError::Breach(reason)) => {
                return Err(SessionError::Refused(Refusal::Protocol(reason)));
            }
            Err(StageError::Refused { transfer, reason }) => {
                let told = events.blocking_send(Event::Refused { transfer, reason });
                return told.map(|()| Staged::Refused).map_err(|_| SessionError::Closed);
            }
            // What is kept of large files makes room; it is sent again.
            Err(StageError::Area(error)) if error.is_no_room() && !gave_up => {
                replica.kept.give_up_transfers();
                gave_up = true;
                continue;
            }
            Err(StageError::Area(error)) if error.is_of_one_object() => {
                tracing::warn!(%error, "cannot stage, given back");
                replica.meters.error(ErrorKind::NoPlace);
                replica.note_error(error.to_string());
                return Ok(Staged::Unplaced(error.to_string()));
            }
            Err(error) => {
                tracing::warn!(%error, "cannot stage, trying again");
                replica.meters.error(ErrorKind::Stage);
                replica.shared().stalled = Some(error.to_string());
                replica.note_error(error.to_string());
                stalled = true;
            }
        }
        let failing_over = replica.failing_over.load(Ordering::Acquire);
        if replica.is_ending() || failing_over || events.is_closed() {
            return Err(SessionError::Closed);
        }
        std::thread::sleep(pause);
        pause = (pause * 2).min(RETRY.1);
    }
}
