//! What was appended to a large file that the replica has: it travels at once,
//! and the rest of the file is compared later, by the hashes of its chunks.
//!
//! [`send`] believes that what the replica has of the file is still what the
//! source has, if the last chunk is. That is right for logs, and wrong for what
//! was overwritten elsewhere. So whoever places what it sent holds the file until
//! [`compare`] has looked at all of it (ARCHITECTURE.md "What is appended").
//!
//! Memory: what was appended since the last comparison, 36 bytes a chunk, and
//! [`GROWTH_MAX`] while it is read. The list of the whole file (see
//! [`super::lane`]) is only there while it is compared, and with its first tail.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use bytes::Bytes;
use replicator_common::chunk::{self, Chunk, Chunker};
use replicator_common::id::{BatchId, ObjectId, TransferId};
use replicator_common::name::Name;
use replicator_common::sys::stat::{self, Stat};
use replicator_common::time::Timestamp;
use replicator_common::wire::{
    self, APPENDED_BATCH_MAX, APPENDED_MAX, Hash, Layout, PACK_MAX, Piece, TransferBegin,
};
use rustix::fs::SeekFrom;
use rustix::io::Errno;

use super::lane::{LaneError, digest};
use super::out::Out;
use super::runs::HOLE;
use super::same;
use super::sink::Sink;
use super::small::{read_full, state_of};
use crate::clock::Clock;
use crate::index::{Content, Known, Store};
use crate::source::{Opened, Opener};

/// Bytes that are appended at once, at most: a file that grows by more is read as
/// any that changed.
pub const GROWTH_MAX: u64 = 8 << 20;
/// Bytes of one piece.
const PIECE: usize = 256 << 10;

/// The chunks of a file of which the index has a list that ends before it does.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Appended {
    /// Chunks of the index's list that still count.
    keep: usize,
    /// Where they end, bytes.
    at: u64,
    /// Those that follow them, to the end.
    chunks: Vec<Chunk>,
}

impl Appended {
    /// All of a list; its last chunk will change when something is appended.
    fn to(list: &[Chunk]) -> Self {
        let keep = list.len().saturating_sub(1);
        let at = length(&list[..keep]);
        Self { keep, at, chunks: list[keep..].to_vec() }
    }

    /// Bytes of the file.
    fn size(&self) -> u64 {
        self.at + length(&self.chunks)
    }

    /// Whether the file as known has that size.
    pub fn is_of(&self, known: &Known) -> bool {
        self.size() == known.state.size
    }

    /// Completes the index's list. One that has not what this follows becomes empty: none
    /// of its chunks would stand where they are believed to.
    pub fn complete(&self, list: &mut Vec<Chunk>) {
        if list.len() < self.keep {
            list.clear();
            return;
        }
        list.truncate(self.keep);
        list.extend_from_slice(&self.chunks);
    }

    /// The chunks from the one on that begins at `from`, if one does.
    fn from(&self, from: u64) -> Option<&[Chunk]> {
        let mut at = self.at;
        let first = self.chunks.iter().position(|chunk| {
            let here = at == from;
            at += if here { 0 } else { u64::from(chunk.length) };
            here
        })?;
        Some(&self.chunks[first..])
    }

    /// The same over the list of a comparison.
    fn since(&self, compared: &Compared) -> Option<Self> {
        let chunks = self.from(compared.from)?.to_vec();
        Some(Self { keep: compared.count - 1, at: compared.from, chunks })
    }

    /// With other chunks from the one on that begins at `at`.
    fn with(&self, last: usize, chunks: Vec<Chunk>) -> Self {
        let before = &self.chunks[..last];
        Self { chunks: [before, &chunks].concat(), ..self.clone() }
    }
}

fn length(chunks: &[Chunk]) -> u64 {
    chunks.iter().map(|chunk| u64::from(chunk.length)).sum()
}

/// A large file that has probably grown.
#[derive(Clone, Debug)]
pub struct Job {
    /// The transfer's number.
    pub transfer: TransferId,
    /// The object.
    pub object: ObjectId,
    /// A name that leads to it.
    pub hint: Option<(ObjectId, Name)>,
    /// As the replica holds it.
    pub known: Known,
    /// What of it the index's list lacks.
    pub appended: Option<Arc<Appended>>,
    /// All else was compared: with this, the file is as it was then.
    pub compared: Option<Compared>,
    /// Number for a new chunk list, if one is needed.
    pub list: u64,
    /// What plans may carry.
    pub allowance: Allowance,
    /// Tells when reading began.
    pub clock: Arc<Clock>,
}

/// How it ended.
#[derive(Clone, Debug)]
pub enum Done {
    /// What was appended was sent, or is short.
    Sent {
        /// As the index will know it; version, entry and links are open.
        known: Box<Known>,
        /// What its list lacks, unless it lacks nothing.
        appended: Option<Arc<Appended>>,
        /// Bytes that were appended.
        fresh: u64,
        /// Those bytes, of which nothing was sent: they go with the batch's plan.
        carried: Option<Carried>,
        /// It has changed since it was compared, or was not compared.
        moving: bool,
    },
    /// It was compared, and is what the replica holds.
    Same {
        /// As the index will know it.
        known: Box<Known>,
        /// It has changed since it was compared.
        moving: bool,
    },
    /// It has as many bytes as before, and was not compared.
    NotGrown,
    /// It has not grown, or not only: it must be read as a whole.
    Otherwise,
}

/// Bytes that plans may carry.
///
/// INVARIANT (bounded resources): all that is in memory at a time, and so all that one
/// batch names, is [`APPENDED_BATCH_MAX`] at most.
#[derive(Clone, Debug, Default)]
pub struct Allowance(Arc<AtomicU64>);

impl Allowance {
    /// A part of it, if that much is left.
    fn take(&self, bytes: u64) -> Option<Share> {
        let more = |used: u64| Some(used + bytes).filter(|used| *used <= APPENDED_BATCH_MAX);
        self.0.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more).ok()?;
        Some(Share { of: self.clone(), bytes })
    }
}

/// A part of an [`Allowance`], given back when it is dropped.
#[derive(Debug)]
struct Share {
    of: Allowance,
    bytes: u64,
}

impl Drop for Share {
    fn drop(&mut self) {
        self.of.0.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

/// What was appended to a file, if that is short.
#[derive(Clone, Debug)]
pub struct Carried {
    /// The batch that gave the replica's file its content.
    basis: BatchId,
    hash: Hash,
    bytes: Bytes,
    _share: Arc<Share>,
}

impl Carried {
    /// Bytes that were appended.
    pub fn length(&self) -> u64 {
        self.bytes.len() as u64
    }

    /// As a plan names it.
    pub fn named(&self) -> wire::Appended {
        let Self { basis, hash, bytes, .. } = self;
        wire::Appended { basis: *basis, hash: *hash, bytes: bytes.to_vec() }
    }
}

/// A large file that is to be compared with what the replica holds.
#[derive(Clone, Debug)]
pub struct Comparison {
    /// The object.
    pub object: ObjectId,
    /// A name that leads to it.
    pub hint: Option<(ObjectId, Name)>,
    /// As the replica holds it.
    pub known: Known,
    /// What of it the index's list lacks.
    pub appended: Option<Arc<Appended>>,
    /// Number for the list of its chunks.
    pub list: u64,
    /// Tells when reading began.
    pub clock: Arc<Clock>,
}

/// A file was found to be as the replica holds it, but for what was appended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Compared {
    /// When reading began: what was changed before was seen.
    pub started: Timestamp,
    /// The file's change time then.
    ctime: Timestamp,
    /// Where the last chunk begins that was looked at: what follows may have
    /// changed since.
    from: u64,
    /// The list of all chunks that were looked at, which is in the index: writing
    /// it takes longer than the next tail may wait.
    pub list: u64,
    /// Tells whether another is the same.
    digest: Hash,
    /// How many they are, and bytes.
    count: usize,
    size: u64,
}

/// Sends what was appended, unless it is short. Returns when all frames are queued.
pub fn send(opener: &Opener, store: &Store, sink: &Sink, job: &Job) -> Result<Done, LaneError> {
    match try_send(opener, store, sink, job) {
        // Reading it as a whole tells what it is.
        Err(LaneError::Read(_)) => {
            // What was begun; of what was not, the destination knows nothing.
            sink.abort(job.transfer)?;
            Ok(Done::Otherwise)
        }
        result => result,
    }
}

fn try_send(opener: &Opener, store: &Store, sink: &Sink, job: &Job) -> Result<Done, LaneError> {
    let Opened::Here(fd) = opener.open_content(&job.object, job.hint.as_ref())? else {
        return Ok(Done::Otherwise);
    };
    let fd = fd.as_fd();
    let before = stat::of_fd(fd)?;
    let Content::Chunks { average, list, .. } = job.known.content else {
        return Ok(Done::Otherwise);
    };
    let size = job.known.state.size;
    let grown = before.size.checked_sub(size).filter(|grown| *grown <= GROWTH_MAX);
    let Some(grown) = grown else { return Ok(Done::Otherwise) };
    if grown == 0 && job.compared.is_none() {
        return Ok(Done::NotGrown);
    }
    if before.nlink == 0 || size <= PACK_MAX || !chunk::average_suits(average, before.size) {
        return Ok(Done::Otherwise);
    }
    let appended = match &job.appended {
        Some(appended) => Appended::clone(appended),
        None => Appended::to(&store.chunks(list)?),
    };
    let Some(end) = end_of(fd, &appended, job, &before)? else { return Ok(Done::Otherwise) };
    let appended = appended.with(appended.chunks.len() - 1, cut(&end, average)?);
    let mut out = Out::new(sink, job.transfer);
    let fresh = end.slice(end.len() - grown as usize..);
    // What comes to nothing more takes nothing.
    let share = job.allowance.take(grown).filter(|_| grown <= APPENDED_MAX);
    if share.is_none() {
        put(&mut out, job, state_of(fd, &before)?, fresh.clone())?;
    }
    let after = stat::of_fd(fd)?;
    let mut state = state_of(fd, &after)?;
    state.size = before.size;
    let known = Known { state, nlink: after.nlink, ..job.known.clone() };
    let moving = job.compared.is_none_or(|compared| compared.ctime != after.ctime)
        || before.size != after.size;
    let (known, appended) = match &job.compared {
        // Its times stay those of the last reading: whoever compares the tree after
        // a crash must not take it for read.
        None => (known, Some(appended)),
        // (Without a new version, nothing would say what its list lacks.)
        Some(compared) => proven(store, (job, compared), known, &appended, moving && grown > 0)?,
    };
    let (known, appended) = (Box::new(known), appended.map(Arc::new));
    if grown == 0 {
        return Ok(Done::Same { known, moving });
    }
    let basis = job.known.version;
    let carried = share.map(|share| {
        // Of its own: `fresh` is the end of what was read.
        let bytes = Bytes::copy_from_slice(&fresh);
        Carried { basis, hash: Hash::of(&bytes), bytes, _share: Arc::new(share) }
    });
    if carried.is_none() {
        out.end(&known.state)?;
    }
    Ok(Done::Sent { known, appended, fresh: grown, carried, moving })
}

/// The file from its last known chunk on, if that is what it was, with those
/// that no comparison has seen.
fn end_of(
    fd: BorrowedFd<'_>,
    appended: &Appended,
    job: &Job,
    stat: &Stat,
) -> Result<Option<Bytes>, Errno> {
    let size = job.known.state.size;
    let Some((last, _)) = appended.chunks.split_last() else { return Ok(None) };
    let from = size.saturating_sub(u64::from(last.length));
    if appended.size() != size || last.hash == HOLE || !is_data(fd, size, stat.size)? {
        return Ok(None);
    }
    if let Some(compared) = job.compared {
        let Some(chunks) = appended.from(compared.from) else { return Ok(None) };
        let unseen = &chunks[..chunks.len() - 1];
        if !same::in_place(fd, compared.from, unseen, &AtomicBool::new(false))? {
            return Ok(None);
        }
    }
    let mut bytes = vec![0; (stat.size - from) as usize];
    if read_full(fd, &mut bytes, from)? < bytes.len() {
        return Ok(None);
    }
    let is_last = Hash::of(&bytes[..last.length as usize]) == last.hash;
    Ok(is_last.then(|| bytes.into()))
}

/// Whether a part of a file has no holes.
fn is_data(fd: BorrowedFd<'_>, from: u64, to: u64) -> Result<bool, Errno> {
    if from == to {
        return Ok(true);
    }
    match rustix::fs::seek(fd, SeekFrom::Data(from)) {
        Ok(start) if start == from => Ok(rustix::fs::seek(fd, SeekFrom::Hole(from))? >= to),
        // (NXIO: a hole to the end. Of a file system that cannot tell, all is data.)
        Ok(_) | Err(Errno::NXIO) => Ok(false),
        Err(Errno::INVAL | Errno::OPNOTSUPP) => Ok(true),
        Err(error) => Err(error),
    }
}

/// The chunks of some bytes.
fn cut(bytes: &Bytes, average: u32) -> Result<Vec<Chunk>, Errno> {
    let mut rest = &bytes[..];
    let read = |out: &mut Vec<u8>| {
        let (part, after) = rest.split_at((out.capacity() - out.len()).min(rest.len()));
        out.extend_from_slice(part);
        rest = after;
        Ok(part.len())
    };
    let mut chunks = Vec::new();
    for window in Chunker::new(read, average) {
        let window = window.map_err(|error: io::Error| errno_of(&error))?;
        let mut at = 0;
        chunks.extend(window.chunks.into_iter().map(|chunk| {
            let bytes = &window.bytes[at..at + chunk.length as usize];
            at += bytes.len();
            let zero = bytes.iter().all(|byte| *byte == 0);
            if zero { Chunk { hash: HOLE, ..chunk } } else { chunk }
        }));
    }
    Ok(chunks)
}

fn errno_of(error: &io::Error) -> Errno {
    Errno::from_io_error(error).unwrap_or(Errno::IO)
}

/// Sends a patch that leaves what is there and adds `fresh`.
fn put(
    out: &mut Out<'_>,
    job: &Job,
    state: replicator_common::object::ObjectState,
    fresh: Bytes,
) -> Result<(), LaneError> {
    out.begin(TransferBegin {
        transfer: job.transfer,
        object: job.object.clone(),
        state,
        layout: Layout::Patch,
        basis: Some(job.object.clone()),
        basis_version: job.known.version,
    })?;
    out.piece(Piece::Copy { from: 0, length: job.known.state.size })?;
    let mut at = 0;
    while at < fresh.len() {
        let range = at..fresh.len().min(at + PIECE);
        at = range.end;
        out.data(Hash::of(&fresh[range.clone()]), &fresh, range)?;
    }
    out.flush()
}

/// What the index knows of a file that was compared: as of then. Its list is that of the
/// comparison, and lacks what came since; it is written anew where nothing follows that
/// would complete it.
fn proven(
    store: &Store,
    (job, compared): (&Job, &Compared),
    known: Known,
    appended: &Appended,
    goes_on: bool,
) -> Result<(Known, Option<Appended>), LaneError> {
    let Content::Chunks { average, list, .. } = known.content else { return Ok((known, None)) };
    let since = appended.since(compared);
    let whole = since
        .as_ref()
        .is_some_and(|since| since.chunks.len() == 1 && since.size() == compared.size);
    let (list, digest, lacks) = match since {
        Some(since) if goes_on || whole => {
            (compared.list, compared.digest, (!whole).then_some(since))
        }
        _ => {
            let mut chunks = store.chunks(list)?;
            appended.complete(&mut chunks);
            if length(&chunks) != appended.size() {
                return Err(Errno::STALE.into());
            }
            store.put_chunks(job.list, &chunks)?;
            (job.list, digest(&chunks), None)
        }
    };
    let content = Content::Chunks { average, list, digest };
    let read_at = job.clock.wall(compared.started);
    Ok((Known { content, ctime: compared.ctime, read_at, ..known }, lacks))
}

/// Compares a file with what the replica holds; `None` when they differ, by more
/// than what was appended, or when that cannot be told; for one, because it is to
/// `stop`.
pub fn compare(
    opener: &Opener,
    store: &Store,
    job: &Comparison,
    stop: &AtomicBool,
) -> Result<Option<Compared>, LaneError> {
    match try_compare(opener, store, job, stop) {
        Err(LaneError::Read(_)) => Ok(None),
        result => result,
    }
}

fn try_compare(
    opener: &Opener,
    store: &Store,
    job: &Comparison,
    stop: &AtomicBool,
) -> Result<Option<Compared>, LaneError> {
    let Opened::Here(fd) = opener.open_content(&job.object, job.hint.as_ref())? else {
        return Ok(None);
    };
    let fd = fd.as_fd();
    let started = job.clock.now();
    let before = stat::of_fd(fd)?;
    let Content::Chunks { list, .. } = job.known.content else { return Ok(None) };
    let mut chunks = store.chunks(list)?;
    if let Some(appended) = &job.appended {
        appended.complete(&mut chunks);
    }
    let size = length(&chunks);
    let (Some(last), true) = (chunks.last(), size == job.known.state.size) else { return Ok(None) };
    let from = size - u64::from(last.length);
    if before.size < size || !same::in_place(fd, 0, &chunks, stop)? {
        return Ok(None);
    }
    store.put_chunks(job.list, &chunks)?;
    let (list, digest, count) = (job.list, digest(&chunks), chunks.len());
    Ok(Some(Compared { started, ctime: before.ctime, from, list, digest, count, size }))
}
