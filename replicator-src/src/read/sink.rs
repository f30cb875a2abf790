//! Where readers put encoded frames: the data streams of one session.

use std::collections::HashSet;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use replicator_common::id::TransferId;
use replicator_common::net::frame::{Compression, FrameError, encode_frame, encode_frame_around};
use replicator_common::wire::DataFrame;
use tokio::sync::mpsc;

/// Why a frame was not taken.
#[derive(Debug, thiserror::Error)]
pub enum SinkError {
    /// The session ended.
    #[error("the session ended")]
    Closed,
    /// The frame cannot be expressed; a defect of ours.
    #[error(transparent)]
    Frame(#[from] FrameError),
}

/// What was put on the wire by a replication, over all its sessions.
#[derive(Debug, Default)]
pub struct Wired {
    frames: AtomicU64,
    content: AtomicU64,
}

impl Wired {
    /// A frame of `bytes` that carries no content.
    pub fn frame(&self, bytes: usize) {
        self.frames.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    /// A frame of `bytes`, compressed, that carries `content` bytes of files.
    fn data(&self, bytes: usize, content: u64) {
        self.frame(bytes);
        // What a frame is longer than its content is not content's cost.
        self.content.fetch_add(content.min(bytes as u64), Ordering::Relaxed);
    }

    /// Content of so many bytes goes with a plan.
    pub fn carried(&self, content: u64) {
        self.content.fetch_add(content, Ordering::Relaxed);
    }

    /// Bytes of all frames.
    pub fn frames(&self) -> u64 {
        self.frames.load(Ordering::Relaxed)
    }

    /// Bytes that content took, as compressed, sent in vain or not.
    pub fn content(&self) -> u64 {
        self.content.load(Ordering::Relaxed)
    }
}

/// Content bytes in a frame, before compression.
fn content_of(frame: &DataFrame<'_>) -> u64 {
    match frame {
        DataFrame::Pack { data, .. }
        | DataFrame::PackPlaced { data, .. }
        | DataFrame::TransferPieces { data, .. } => data.len() as u64,
        DataFrame::PackAgain { .. }
        | DataFrame::TransferBegin(_)
        | DataFrame::TransferReuse { .. }
        | DataFrame::TransferEnd { .. }
        | DataFrame::TransferAbort { .. } => 0,
    }
}

fn unsendable(error: &FrameError) {
    tracing::error!(%error, "a frame that cannot be sent");
}

/// Set in the numbers of transfers that bring what was appended to a file: all
/// that is said of one, also much later, goes on one stream.
pub const APPENDED: u64 = 1 << 63;

/// An encoded frame, in parts.
pub type Frame = Vec<Bytes>;

/// The data streams of one session. Sending blocks while the network is
/// slower than the disk: each stream holds a bounded number of frames.
#[derive(Clone)]
pub struct Sink {
    streams: Arc<Vec<mpsc::Sender<Frame>>>,
    next: Arc<AtomicUsize>,
    wired: Arc<Wired>,
    compression: Compression,
    /// Transfers of which the destination wants no more.
    cancelled: Arc<Mutex<HashSet<u64>>>,
}

impl Sink {
    /// Over the queues of data streams. The first half carries packs, the rest
    /// transfers, so that small objects never queue behind large ones.
    pub fn new(
        streams: Vec<mpsc::Sender<Frame>>,
        wired: Arc<Wired>,
        compression: Compression,
    ) -> Self {
        Self {
            streams: Arc::new(streams),
            next: Arc::default(),
            wired,
            compression,
            cancelled: Arc::default(),
        }
    }

    /// One of the streams for packs, each in its turn.
    pub fn pack_stream(&self) -> usize {
        let half = (self.streams.len() / 2).max(1);
        self.next.fetch_add(1, Ordering::Relaxed) % half
    }

    /// The stream that carries a transfer: what was appended to a file goes with
    /// what is small, and does not queue behind large files.
    pub fn transfer_stream(&self, transfer: TransferId) -> usize {
        let half = self.streams.len() / 2;
        if transfer.0 & APPENDED != 0 {
            return (transfer.0 % half.max(1) as u64) as usize;
        }
        let rest = (self.streams.len() - half).max(1);
        half + (transfer.0 % rest as u64) as usize
    }

    /// Tells the destination to forget a transfer.
    pub fn abort(&self, transfer: TransferId) -> Result<(), SinkError> {
        self.send(self.transfer_stream(transfer), &DataFrame::TransferAbort { transfer })
    }

    /// The destination wants no more of the `number`th transfer.
    pub fn cancel(&self, number: u64) {
        self.cancelled.lock().unwrap_or_else(PoisonError::into_inner).insert(number);
    }

    /// Whether the destination wants no more of a transfer.
    pub fn is_cancelled(&self, number: u64) -> bool {
        self.cancelled.lock().unwrap_or_else(PoisonError::into_inner).contains(&number)
    }

    /// Sends a frame on a stream.
    pub fn send(&self, stream: usize, frame: &DataFrame<'_>) -> Result<(), SinkError> {
        let frame = self.encode(frame)?;
        self.queue(stream, frame)
    }

    /// Sends a frame whose content stands in `content`, which is not copied.
    pub fn send_around(
        &self,
        stream: usize,
        frame: &DataFrame<'_>,
        content: &Bytes,
    ) -> Result<(), SinkError> {
        let frame = self.encode_around(frame, content)?;
        self.queue(stream, frame)
    }

    /// Makes a frame ready for [`Self::queue`].
    pub(super) fn encode(&self, frame: &DataFrame<'_>) -> Result<Frame, SinkError> {
        let bytes = encode_frame(frame, self.compression).inspect_err(unsendable)?;
        Ok(self.wire(vec![bytes.into()], frame))
    }

    /// The same of one whose content stands in `content`.
    pub(super) fn encode_around(
        &self,
        frame: &DataFrame<'_>,
        content: &Bytes,
    ) -> Result<Frame, SinkError> {
        let parts = encode_frame_around(frame, content, self.compression);
        Ok(self.wire(parts.inspect_err(unsendable)?, frame))
    }

    fn wire(&self, parts: Frame, frame: &DataFrame<'_>) -> Frame {
        self.wired.data(parts.iter().map(Bytes::len).sum(), content_of(frame));
        parts
    }

    /// Sends a frame, or several one after the other.
    pub(super) fn queue(&self, stream: usize, frames: Frame) -> Result<(), SinkError> {
        let queue = self.streams.get(stream).ok_or(SinkError::Closed)?;
        queue.blocking_send(frames).map_err(|_| SinkError::Closed)
    }
}
