//! Where readers put encoded frames: the data streams of one session.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use replicator_common::net::frame::{Compression, FrameError, encode_frame};
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

/// The data streams of one session. Sending blocks while the network is
/// slower than the disk: each stream holds a bounded number of frames.
#[derive(Clone)]
pub struct Sink {
    streams: Arc<Vec<mpsc::Sender<Vec<u8>>>>,
    next: Arc<AtomicUsize>,
    wired: Arc<AtomicU64>,
    compression: Compression,
}

impl Sink {
    /// Over the queues of data streams. The first half carries packs, the rest
    /// transfers, so that small objects never queue behind large ones.
    pub fn new(
        streams: Vec<mpsc::Sender<Vec<u8>>>,
        wired: Arc<AtomicU64>,
        compression: Compression,
    ) -> Self {
        Self { streams: Arc::new(streams), next: Arc::default(), wired, compression }
    }

    /// Sends a pack on one of the streams for packs.
    pub fn pack(&self, frame: &DataFrame) -> Result<(), SinkError> {
        let half = (self.streams.len() / 2).max(1);
        let stream = self.next.fetch_add(1, Ordering::Relaxed) % half;
        self.send(stream, frame)
    }

    /// The stream that carries the `number`th transfer.
    pub fn transfer_stream(&self, number: u64) -> usize {
        let half = self.streams.len() / 2;
        let rest = (self.streams.len() - half).max(1);
        half + (number % rest as u64) as usize
    }

    /// Sends a frame on a stream.
    pub fn send(&self, stream: usize, frame: &DataFrame) -> Result<(), SinkError> {
        let bytes = encode_frame(frame, self.compression)?;
        self.wired.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        let queue = self.streams.get(stream).ok_or(SinkError::Closed)?;
        queue.blocking_send(bytes).map_err(|_| SinkError::Closed)
    }
}
