//! Large files: transfers of their own, beside the batches, as deltas against
//! what the replica holds.
//!
//! Memory: one frame of pieces, some windows (see `windows`) and the chunk lists of the
//! file and its basis (36 bytes a chunk: 2.3 MB a GiB at the smallest chunks, at most some
//! 15 MB up to 64 GiB, then 150 KB a GiB).

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use bytes::Bytes;
use replicator_common::chunk::{self, Chunk};
use replicator_common::id::{BatchId, ObjectId, TransferId};
use replicator_common::name::Name;
use replicator_common::sys::stat::{self, Stat};
use replicator_common::time::Timestamp;
use replicator_common::wire::{Hash, Layout, Piece, TransferBegin};
use rustix::io::Errno;

use super::blocks::{Asker, Blocks};
use super::kept::{Dealer, KeptList};
use super::met;
use super::out::Out;
use super::runs::{Run, fits_in_place, literal_bytes, patches, plan_runs};
use super::same;
use super::sink::{Sink, SinkError};
use super::small::{read_full, state_of};
use super::tail::Appended;
use super::windows::each_chunk;
use crate::clock::Clock;
use crate::index::{Content, IndexError, Known, Store};
use crate::source::{Opened, Opener, told};

/// A large file to send.
#[derive(Clone, Debug)]
pub struct Job {
    /// The transfer's number.
    pub transfer: TransferId,
    /// The object.
    pub object: ObjectId,
    /// A name that leads to it.
    pub hint: Option<(ObjectId, Name)>,
    /// As the replica holds it.
    pub known: Option<Known>,
    /// What of it the index's list lacks.
    pub appended: Option<Arc<Appended>>,
    /// Another object of the replica whose content resembles it.
    pub resembles: Option<(ObjectId, Known)>,
    /// Number for the new chunk list.
    pub list: u64,
    /// Send all of it, whatever the replica may hold.
    pub whole: bool,
    /// What staging has of it, or had: of a transfer that was broken off.
    pub kept: Option<Arc<KeptList>>,
    /// Asks the destination what it has.
    pub asker: Asker,
    /// Tells when reading began.
    pub clock: Arc<Clock>,
    /// How long reading and sending took, without waiting for the lane; set when
    /// it has ended.
    pub took: Duration,
}

/// How a transfer ended.
#[derive(Clone, Debug)]
pub enum Done {
    /// All was sent.
    Sent {
        /// As the index will know it; version, entry and links are open.
        known: Box<Known>,
        /// The object whose content it was built from.
        basis: Option<(ObjectId, BatchId)>,
        /// Content bytes that the replica's version did not have.
        fresh: u64,
        /// When reading began (see [`crate::clock`]).
        started: Timestamp,
        /// It changed while it was read.
        moving: bool,
    },
    /// Content is what the replica holds.
    Unchanged {
        /// As the index will know it.
        known: Box<Known>,
        /// When reading began.
        started: Timestamp,
        /// It changed while it was read.
        moving: bool,
    },
    /// The object is gone.
    Gone,
    /// It is not where it was believed to be.
    Away,
    /// It is small now.
    Small,
    /// It cannot be read.
    Unreadable(String),
}

/// Why a transfer was broken off.
#[derive(Debug, thiserror::Error)]
pub enum LaneError {
    /// The session ended.
    #[error(transparent)]
    Sink(#[from] SinkError),
    /// The index could not be read or written.
    #[error(transparent)]
    Index(#[from] IndexError),
    /// The source could not be read.
    #[error("cannot read: {0}")]
    Read(#[from] Errno),
}

/// Sends one large file. Returns when all frames are queued, or soon after it is to
/// `stop`.
pub fn send(
    opener: &Opener,
    store: &Store,
    sink: &Sink,
    job: &Job,
    stop: &AtomicBool,
) -> Result<Done, LaneError> {
    match try_send(opener, store, sink, job, stop) {
        Err(LaneError::Read(Errno::STALE | Errno::NOENT)) => {
            abort(sink, job)?;
            Ok(Done::Gone)
        }
        Err(LaneError::Read(error)) => {
            abort(sink, job)?;
            Ok(Done::Unreadable(told(error)))
        }
        result => result,
    }
}

fn abort(sink: &Sink, job: &Job) -> Result<(), SinkError> {
    sink.abort(job.transfer)
}

fn try_send(
    opener: &Opener,
    store: &Store,
    sink: &Sink,
    job: &Job,
    stop: &AtomicBool,
) -> Result<Done, LaneError> {
    let fd = match opener.open_content(&job.object, job.hint.as_ref())? {
        Opened::Here(fd) => fd,
        Opened::Gone => return Ok(Done::Gone),
        Opened::Away => return Ok(Done::Away),
    };
    let fd = fd.as_fd();
    let started = job.clock.now();
    // To be compared with change times, which are the wall clock's.
    let read_at = job.clock.wall(started);
    let before = stat::of_fd(fd)?;
    if before.nlink == 0 {
        return Ok(Done::Gone);
    }
    if before.size <= replicator_common::wire::PACK_MAX {
        return Ok(Done::Small);
    }
    let basis = Basis::choose(store, job, before.size)?;
    let average = basis.as_ref().map_or_else(|| average_of(job, before.size), |b| b.average);
    let mut out = Out::new(sink, job.transfer);
    let sent = if basis.is_none() && !changed_since_kept(job, &before) {
        Some(stream_whole(fd, &before, average, job, &mut out)?)
    } else {
        delta((fd, &before), basis.as_ref(), average, (job, stop), &mut out)?
    };
    let Some(chunks) = sent else {
        let (known, moving) = unchanged(fd, job, read_at, &before)?;
        return Ok(Done::Unchanged { known: Box::new(known), started, moving });
    };
    let after = stat::of_fd(fd)?;
    let mut state = state_of(fd, &after)?;
    state.size = chunks.iter().map(|chunk| u64::from(chunk.length)).sum();
    out.end(&state)?;
    // What is sent whole all the same may be known to the replica.
    let old = if job.whole { Basis::resembling(store, job, before.size)? } else { None };
    let fresh =
        old.map_or(out.literal + out.kept, |old| literal_bytes(&plan_runs(&chunks, &old.chunks)));
    store.put_chunks(job.list, &chunks)?;
    let content = Content::Chunks { average, list: job.list, digest: digest(&chunks) };
    let known = Known {
        state,
        ctime: after.ctime,
        read_at,
        version: BatchId(0),
        content,
        entry: None,
        links: 0,
        nlink: after.nlink,
    };
    let moving = (before.ctime, before.size) != (after.ctime, after.size);
    let basis = basis.map(|basis| (basis.object, basis.version));
    Ok(Done::Sent { known: Box::new(known), basis, fresh, started, moving })
}

/// The average size of chunks of a file that is not compared with the replica's:
/// that of a transfer before, so that its chunks are met again.
fn average_of(job: &Job, size: u64) -> u32 {
    let before = job.kept.as_ref().map(|kept| chunk::average_for(kept.was.0));
    before
        .filter(|average| chunk::average_suits(*average, size))
        .unwrap_or_else(|| chunk::average_for(size))
}

/// Whether the file is not what it was when what is kept of it was sent: then
/// it is read once more, to see what of that is where.
fn changed_since_kept(job: &Job, stat: &Stat) -> bool {
    job.kept.as_ref().is_some_and(|kept| kept.was != (stat.size, stat.mtime))
}

/// What content is built from.
struct Basis {
    object: ObjectId,
    version: BatchId,
    average: u32,
    chunks: Vec<Chunk>,
    /// It is the object itself.
    own: bool,
    /// The chunks are all of it.
    complete: bool,
}

impl Basis {
    /// Bytes that the chunks are.
    fn size(&self) -> u64 {
        self.chunks.iter().map(|chunk| u64::from(chunk.length)).sum()
    }

    fn choose(store: &Store, job: &Job, size: u64) -> Result<Option<Self>, IndexError> {
        if job.whole { Ok(None) } else { Self::resembling(store, job, size) }
    }

    /// What the replica has of the object, or of one that resembles it.
    fn resembling(store: &Store, job: &Job, size: u64) -> Result<Option<Self>, IndexError> {
        let own = job.known.as_ref().map(|known| (&job.object, known, true));
        let other = job.resembles.as_ref().map(|(object, known)| (object, known, false));
        for (object, known, own) in own.into_iter().chain(other) {
            if let Content::Chunks { average, list, .. } = known.content
                && chunk::average_suits(average, size)
            {
                let mut chunks = store.chunks(list)?;
                if let Some(appended) = job.appended.as_ref().filter(|_| own) {
                    appended.complete(&mut chunks);
                }
                // What was appended since may be known to nobody any more.
                let (object, version, complete) = (object.clone(), known.version, false);
                let basis = Self { object, version, average, chunks, own, complete };
                let complete = basis.size() == known.state.size;
                return Ok(Some(Self { complete, ..basis }));
            }
        }
        Ok(None)
    }
}

/// Attributes may have changed although content has not.
fn unchanged(
    fd: BorrowedFd<'_>,
    job: &Job,
    read_at: Timestamp,
    before: &Stat,
) -> Result<(Known, bool), LaneError> {
    let after = stat::of_fd(fd)?;
    let mut state = state_of(fd, &after)?;
    let known = job.known.clone().ok_or(Errno::STALE)?;
    // A size that changed meanwhile comes with an event of its own.
    state.size = known.state.size;
    let moving = (before.ctime, before.size) != (after.ctime, after.size);
    Ok((Known { state, ctime: after.ctime, read_at, ..known }, moving))
}

/// Sends the whole file as it is read; the chunk list comes of itself.
fn stream_whole(
    fd: BorrowedFd<'_>,
    stat: &Stat,
    average: u32,
    job: &Job,
    out: &mut Out<'_>,
) -> Result<Vec<Chunk>, LaneError> {
    let state = state_of(fd, stat)?;
    out.begin(TransferBegin {
        transfer: job.transfer,
        object: job.object.clone(),
        state,
        layout: Layout::Replace,
        basis: None,
        basis_version: BatchId(0),
    })?;
    if job.kept.is_some() {
        out.reuse(true)?;
    }
    let mut dealer = Dealer::new(job.kept.as_deref(), true);
    let (mut chunks, mut at) = (Vec::new(), 0);
    each_chunk((fd, stat), average, true, |chunk, bytes| {
        chunks.push(chunk);
        let (length, hash) = (chunk.length, chunk.hash);
        let kept = bytes.as_ref().and_then(|_| dealer.deal(&hash, length, at));
        at += u64::from(length);
        match (bytes, kept) {
            (None, _) => out.piece(Piece::Hole { length: u64::from(length) }),
            (_, Some(from)) => out.piece(Piece::Kept { from, length, hash }),
            (Some((window, range)), None) => out.data(hash, window, range),
        }
    })?;
    Ok(chunks)
}

/// Sends what neither the basis nor staging has. `None` when nothing differs
/// from the object's own content.
fn delta(
    (fd, stat): (BorrowedFd<'_>, &Stat),
    basis: Option<&Basis>,
    average: u32,
    (job, stop): (&Job, &AtomicBool),
    out: &mut Out<'_>,
) -> Result<Option<Vec<Chunk>>, LaneError> {
    // What differs is read again.
    let list = basis.map_or(&[][..], |basis| &basis.chunks);
    let mut chunks = met::chunks((fd, stat), average, list, stop)?;
    let own = basis.is_some_and(|basis| basis.own);
    if own
        && let Some(basis) = basis.filter(|basis| basis.complete)
        && (chunks == basis.chunks || same::content(fd, &chunks, &basis.chunks)?)
    {
        return Ok(None);
    }
    let runs = plan_runs(&chunks, basis.map_or(&[], |basis| &basis.chunks));
    let state = state_of(fd, stat)?;
    let layout = if own && patches(&runs) { Layout::Patch } else { Layout::Replace };
    out.begin(TransferBegin {
        transfer: job.transfer,
        object: job.object.clone(),
        state,
        layout,
        basis: basis.map(|basis| basis.object.clone()),
        basis_version: basis.map_or(BatchId(0), |basis| basis.version),
    })?;
    let blocks = match basis {
        // Of another file, nothing tells which blocks might be alike.
        Some(basis) if basis.own => {
            let of = (&basis.object, basis.version, basis.size());
            Blocks::ask(&job.asker, of, (&runs, &chunks), stop)
        }
        _ => Blocks::default(),
    };
    let kept = job.kept.as_deref();
    // Of blocks nobody knows yet where they will stand in what travels.
    let in_place = blocks.is_empty() && fits_in_place(&runs, &chunks, kept, layout);
    if kept.is_some() {
        out.reuse(in_place)?;
    }
    let dealer = Dealer::new(kept, in_place);
    send_runs(fd, &runs, &mut chunks, (dealer, layout, &blocks), out)?;
    Ok(Some(chunks))
}

/// Sends the runs, reading literal chunks a second time. A chunk that changed
/// meanwhile is sent, and listed, as it is now.
fn send_runs(
    fd: BorrowedFd<'_>,
    runs: &[Run],
    chunks: &mut [Chunk],
    (mut dealer, layout, blocks): (Dealer<'_>, Layout, &Blocks),
    out: &mut Out<'_>,
) -> Result<(), LaneError> {
    let (mut at, mut literal) = (0, 0);
    for run in runs {
        match *run {
            Run::Copy { from, length } => {
                out.piece(Piece::Copy { from, length })?;
                at += length;
            }
            Run::Hole { length } => {
                out.piece(Piece::Hole { length })?;
                at += length;
            }
            Run::Data { first, count, .. } => {
                for (number, chunk) in chunks.iter_mut().enumerate().skip(first).take(count) {
                    // Where the destination writes it.
                    let to = if layout == Layout::Patch { literal } else { at };
                    literal += u64::from(chunk.length);
                    // Kept as a whole, also where the replica's blocks are known.
                    if let Some(from) = dealer.deal(&chunk.hash, chunk.length, to) {
                        let (length, hash) = (chunk.length, chunk.hash);
                        at += u64::from(length);
                        out.piece(Piece::Kept { from, length, hash })?;
                        continue;
                    }
                    let mut bytes = vec![0; chunk.length as usize];
                    // What was cut off meanwhile reads as zeros; the event of
                    // the truncation makes the object dirty again.
                    read_full(fd, &mut bytes, at)?;
                    chunk.hash = Hash::of(&bytes);
                    let bytes = Bytes::from(bytes);
                    if !blocks.send(number, at, &bytes, (&mut dealer, &mut *out))? {
                        out.data(chunk.hash, &bytes, 0..chunk.length as usize)?;
                    }
                    at += u64::from(chunk.length);
                }
            }
        }
    }
    Ok(())
}

/// Tells whether two chunk lists are the same.
pub fn digest(chunks: &[Chunk]) -> Hash {
    let mut hasher = blake3::Hasher::new();
    for chunk in chunks {
        hasher.update(&chunk.length.to_le_bytes());
        hasher.update(&chunk.hash.0);
    }
    Hash(*hasher.finalize().as_bytes())
}
