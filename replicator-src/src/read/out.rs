//! Pieces of a transfer, collected into frames.

use std::borrow::Cow;
use std::ops::Range;

use bytes::Bytes;
use replicator_common::id::TransferId;
use replicator_common::wire::{DataFrame, Hash, Piece, TransferBegin};

use super::lane::LaneError;
use super::sink::{Frame, Sink, SinkError};

/// Bytes of a frame of pieces, about.
const FRAME_DATA: usize = 448 << 10;
/// With so many it does not wait for what is read next, with which it would be copied: what
/// is read at once makes one frame.
const FRAME_LEAST: usize = 256 << 10;

/// Bytes of frames that wait for more, at most.
const TOGETHER: usize = 16 << 10;

/// The bytes of the pieces that wait for their frame.
#[derive(Default)]
enum Gathered {
    #[default]
    Nothing,
    /// Where they were read, side by side.
    Window(Bytes, Range<usize>),
    /// From several places.
    Copied(Vec<u8>),
}

impl Gathered {
    fn len(&self) -> usize {
        match self {
            Self::Nothing => 0,
            Self::Window(_, range) => range.len(),
            Self::Copied(bytes) => bytes.len(),
        }
    }

    fn add(&mut self, window: &Bytes, range: Range<usize>) {
        match self {
            Self::Nothing => *self = Self::Window(window.clone(), range),
            Self::Window(bytes, had)
                if bytes.as_ptr() == window.as_ptr() && had.end == range.start =>
            {
                had.end = range.end;
            }
            Self::Window(bytes, had) => {
                *self = Self::Copied([&bytes[had.clone()], &window[range]].concat());
            }
            Self::Copied(bytes) => bytes.extend_from_slice(&window[range]),
        }
    }

    fn take(&mut self) -> Bytes {
        match std::mem::take(self) {
            Self::Nothing => Bytes::new(),
            Self::Window(bytes, range) => bytes.slice(range),
            Self::Copied(bytes) => bytes.into(),
        }
    }
}

/// Collects pieces into frames.
pub(super) struct Out<'a> {
    sink: &'a Sink,
    stream: usize,
    transfer: TransferId,
    pieces: Vec<Piece>,
    data: Gathered,
    /// Frames that wait for those after them, to travel in one packet with them.
    waiting: Frame,
    /// Bytes of data pieces so far.
    pub(super) literal: u64,
    /// Bytes that the destination had kept.
    pub(super) kept: u64,
}

impl<'a> Out<'a> {
    pub(super) fn new(sink: &'a Sink, transfer: TransferId) -> Self {
        Self {
            sink,
            stream: sink.transfer_stream(transfer),
            transfer,
            pieces: Vec::new(),
            data: Gathered::Nothing,
            waiting: Frame::new(),
            literal: 0,
            kept: 0,
        }
    }

    pub(super) fn begin(&mut self, begin: TransferBegin) -> Result<(), LaneError> {
        let frame = self.sink.encode(&DataFrame::TransferBegin(begin))?;
        self.say(frame, false)
    }

    /// Sends frames behind those that wait, unless all are few bytes and need not go `at_once`.
    fn say(&mut self, frames: Frame, at_once: bool) -> Result<(), LaneError> {
        self.waiting.extend(frames);
        let bytes: usize = self.waiting.iter().map(Bytes::len).sum();
        if at_once || bytes > TOGETHER {
            self.sink.queue(self.stream, std::mem::take(&mut self.waiting))?;
        }
        Ok(())
    }

    /// Says that what was kept serves the transfer, which has just begun.
    pub(super) fn reuse(&mut self, in_place: bool) -> Result<(), LaneError> {
        let frame = DataFrame::TransferReuse { transfer: self.transfer, in_place };
        let frame = self.sink.encode(&frame)?;
        self.say(frame, true)
    }

    /// A chunk that travels: the bytes in this range of what was read.
    pub(super) fn data(
        &mut self,
        hash: Hash,
        window: &Bytes,
        range: Range<usize>,
    ) -> Result<(), LaneError> {
        // A chunk is far below 4 GiB.
        let length = u32::try_from(range.len()).unwrap_or(u32::MAX);
        self.literal += u64::from(length);
        let is_last = range.end == window.len();
        self.data.add(window, range);
        self.piece(Piece::Data { hash, length })?;
        if is_last && self.data.len() >= FRAME_LEAST { self.flush() } else { Ok(()) }
    }

    pub(super) fn piece(&mut self, piece: Piece) -> Result<(), LaneError> {
        if let Piece::Kept { length, .. } = &piece {
            self.kept += u64::from(*length);
        }
        self.pieces.push(piece);
        // A chunk is at most twice this, so a frame stays in its limit.
        if self.data.len() >= FRAME_DATA || self.pieces.len() >= 1024 {
            self.flush()?;
        }
        Ok(())
    }

    /// Sends what was collected.
    pub(super) fn flush(&mut self) -> Result<(), LaneError> {
        if self.sink.is_cancelled(self.transfer.0) {
            return Err(SinkError::Closed.into());
        }
        if !self.pieces.is_empty() {
            let (pieces, data) = (std::mem::take(&mut self.pieces), self.data.take());
            let (transfer, bytes) = (self.transfer, Cow::Borrowed(&data[..]));
            let frame = DataFrame::TransferPieces { transfer, pieces, data: bytes };
            let frame = self.sink.encode_around(&frame, &data)?;
            self.say(frame, false)?;
        }
        Ok(())
    }

    pub(super) fn end(
        &mut self,
        state: &replicator_common::object::ObjectState,
    ) -> Result<(), LaneError> {
        self.flush()?;
        let frame = DataFrame::TransferEnd { transfer: self.transfer, state: state.clone() };
        let frame = self.sink.encode(&frame)?;
        self.say(frame, true)
    }
}
