//! The envelope of every message on a stream.
//!
//! | bytes | meaning |
//! |---|---|
//! | 4 | length of the body as it follows, little endian |
//! | 1 | how the body travels: 0 = as it is, 1 = compressed by zstd, 2 = its beginning compressed |
//! | 4 | only with 1 and 2: length of what is compressed when decompressed, little endian |
//! | 4 | only with 2: length of the compressed beginning, little endian |
//! | … | body: [`codec::encode`] of the message |
//!
//! The beginning alone is compressed where content that does not shrink follows what is
//! said of it.
//!
//! All lengths are checked against a limit ([`FRAME_MAX`] unless told) before
//! anything is allocated for them; byte strings within the body are bounded by
//! [`codec::DECODE_LIMIT`], and all of its lists together by [`SWELLING_MAX`].
//! Integrity is QUIC's; content carries its own
//! hash besides.
//!
//! Encoding and decoding are pure, so that worker threads can do them
//! ([`encode_frame`] with [`FrameWriter::write_encoded`],
//! [`FrameReader::read_encoded`] with [`decode_frame`]); small control messages
//! go through [`FrameWriter::write`] and [`FrameReader::read`].

use std::borrow::Cow;
use std::cell::RefCell;
use std::io;

use bytes::{BufMut, Bytes};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use crate::codec::{self, CodecError};
use crate::wire::FRAME_MAX;

/// Flags: the body is compressed.
const ZSTD: u8 = 1;
/// Flags: the beginning of the body is compressed.
const ZSTD_HEAD: u8 = 2;
/// Length and flags.
const HEADER: usize = 5;
/// The same with the length of the decompressed body.
const HEADER_ZSTD: usize = HEADER + 4;
/// The same with both lengths of the beginning.
const HEADER_HEAD: usize = HEADER + 8;

/// How much more memory than the longest frame the lists of a message may take.
/// Messages name few objects, or take a hundred bytes for each: of what an honest
/// peer says, xattrs swell most, to the fivefold.
pub const SWELLING_MAX: usize = 8;

/// zstd's level: the fastest of the regular ones, about 500 MB/s a core.
const LEVEL: i32 = 1;
/// Bodies below this are sent as they are: nothing to gain.
const COMPRESS_MIN: usize = 256;
/// Bodies above this are judged by a sample of this many bytes first.
const SAMPLE: usize = 12 << 10;
/// The sample is taken from this many places, evenly spread.
const SAMPLE_PARTS: usize = 3;

/// Why a frame could not be written or read. A stream on which one occurred is
/// of no further use.
#[derive(Debug, thiserror::Error)]
pub enum FrameError {
    /// A length in a header, or of a message to be sent, is above the limit.
    #[error("frame of {length} bytes, the limit is {limit}")]
    TooLong {
        /// What the header says.
        length: usize,
        /// What is allowed.
        limit: usize,
    },
    /// A flag is set that this version does not know.
    #[error("frame with unknown flags {0:#04x}")]
    UnknownFlags(u8),
    /// The stream ended, or the bytes did, within a frame.
    #[error("frame cut short")]
    Truncated,
    /// Bytes follow the frame where there should be none.
    #[error("frame with {0} bytes too many")]
    Trailing(usize),
    /// The compressed body cannot be decompressed to the length it claims.
    #[error("frame cannot be decompressed: {0}")]
    Compressed(String),
    /// The body is not a message of the expected type.
    #[error(transparent)]
    Codec(#[from] CodecError),
    /// The stream broke.
    #[error("stream: {0}")]
    Io(#[from] io::Error),
}

/// Whether to compress a body.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Compression {
    /// Send it as it is.
    Never,
    /// Compress what a sample, and then the result, shows to become at least a
    /// tenth smaller.
    #[default]
    Auto,
}

// ---------------------------------------------------------------- pure part

/// What stands before a body.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Header {
    /// Bytes of body that follow.
    length: usize,
    packing: Packing,
}

/// How a body travels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Packing {
    Plain,
    /// Compressed, from so many bytes.
    Whole {
        raw: usize,
    },
    /// The first `packed` bytes were `raw` before they were compressed.
    Head {
        raw: usize,
        packed: usize,
    },
}

impl Header {
    /// The size of the whole header, from its first [`HEADER`] bytes. Checks
    /// length and flags.
    fn size(first: &[u8; HEADER], limit: usize) -> Result<usize, FrameError> {
        let [a, b, c, d, flags] = *first;
        within([a, b, c, d], limit)?;
        match flags {
            0 => Ok(HEADER),
            ZSTD => Ok(HEADER_ZSTD),
            ZSTD_HEAD => Ok(HEADER_HEAD),
            unknown => Err(FrameError::UnknownFlags(unknown)),
        }
    }

    /// Splits a header off; `None` when there are too few bytes.
    fn parse(bytes: &[u8], limit: usize) -> Result<Option<(Self, &[u8])>, FrameError> {
        let Some((first, rest)) = bytes.split_first_chunk::<HEADER>() else {
            return Ok(None);
        };
        let [a, b, c, d, _] = *first;
        let length = within([a, b, c, d], limit)?;
        let size = Self::size(first, limit)?;
        if size == HEADER {
            return Ok(Some((Self { length, packing: Packing::Plain }, rest)));
        }
        let Some((raw, rest)) = rest.split_first_chunk::<4>() else {
            return Ok(None);
        };
        let raw = within(*raw, limit)?;
        if size == HEADER_ZSTD {
            return Ok(Some((Self { length, packing: Packing::Whole { raw } }, rest)));
        }
        let Some((packed, rest)) = rest.split_first_chunk::<4>() else {
            return Ok(None);
        };
        let packed = within(*packed, length)?;
        let whole = raw + (length - packed);
        if whole > limit {
            return Err(FrameError::TooLong { length: whole, limit });
        }
        Ok(Some((Self { length, packing: Packing::Head { raw, packed } }, rest)))
    }
}

fn within(length: [u8; 4], limit: usize) -> Result<usize, FrameError> {
    let length = u32::from_le_bytes(length) as usize;
    if length > limit { Err(FrameError::TooLong { length, limit }) } else { Ok(length) }
}

/// Encodes a message with its envelope.
///
/// # Errors
/// [`FrameError::TooLong`] when the message, before compression, is above
/// [`FRAME_MAX`]; [`FrameError::Codec`] when it cannot be expressed.
pub fn encode_frame<T: Serialize + ?Sized>(
    value: &T,
    compression: Compression,
) -> Result<Vec<u8>, FrameError> {
    let body = codec::encode(value)?;
    if body.len() > FRAME_MAX {
        return Err(FrameError::TooLong { length: body.len(), limit: FRAME_MAX });
    }
    let packed = match compression {
        Compression::Never => None,
        Compression::Auto => compress_if_it_pays(&body),
    };
    let (flags, sent) = match &packed {
        Some(packed) => (ZSTD, packed.as_slice()),
        None => (0, body.as_slice()),
    };
    let mut frame = Vec::with_capacity(HEADER_ZSTD + sent.len());
    frame.extend_from_slice(&length_bytes(sent.len()));
    frame.push(flags);
    if packed.is_some() {
        frame.extend_from_slice(&length_bytes(body.len()));
    }
    frame.extend_from_slice(sent);
    Ok(frame)
}

/// The same of a message whose content stands in `content`: the frame in parts,
/// of which those that are content are not copied, unless it is compressed. Where it
/// does not shrink, what stands before it may.
///
/// # Errors
/// As [`encode_frame`].
pub fn encode_frame_around<T: Serialize + ?Sized>(
    value: &T,
    content: &Bytes,
    compression: Compression,
) -> Result<Vec<Bytes>, FrameError> {
    // Content that a sample shows to shrink: the whole is looked at. So it is where there is
    // little content.
    let auto = compression == Compression::Auto;
    if auto && (content.len() < codec::SHARED_MIN || shrinks(content)) {
        return Ok(vec![encode_frame(value, compression)?.into()]);
    }
    let mut parts = codec::encode_around(value, content, HEADER)?;
    let length = parts.iter().map(Bytes::len).sum::<usize>() - HEADER;
    if length > FRAME_MAX {
        return Err(FrameError::TooLong { length, limit: FRAME_MAX });
    }
    let head = &parts[0][HEADER..];
    parts[0] = match auto.then(|| compress_if_it_pays(head)).flatten() {
        Some(packed) => {
            let mut first = Vec::with_capacity(HEADER_HEAD + packed.len());
            first.extend_from_slice(&length_bytes(length - head.len() + packed.len()));
            first.push(ZSTD_HEAD);
            first.extend_from_slice(&length_bytes(head.len()));
            first.extend_from_slice(&length_bytes(packed.len()));
            first.extend_from_slice(&packed);
            first.into()
        }
        None => {
            let mut first = Vec::from(std::mem::take(&mut parts[0]));
            first[..4].copy_from_slice(&length_bytes(length));
            first.into()
        }
    };
    Ok(parts)
}

/// A length that was checked against [`FRAME_MAX`], which 32 bits hold.
fn length_bytes(length: usize) -> [u8; 4] {
    const { assert!(FRAME_MAX <= u32::MAX as usize) };
    (length as u32).to_le_bytes()
}

/// Decodes a whole frame, as [`FrameReader::read_encoded`] gives it.
///
/// # Errors
/// Any [`FrameError`] but [`FrameError::Io`].
pub fn decode_frame<T: DeserializeOwned>(frame: &[u8]) -> Result<T, FrameError> {
    Ok(decode_within(frame, FRAME_MAX)?.0)
}

/// The body of a whole frame, for [`decode_body`].
///
/// # Errors
/// Any [`FrameError`] but [`FrameError::Io`] and [`FrameError::Codec`].
pub fn open_frame(frame: &[u8]) -> Result<Cow<'_, [u8]>, FrameError> {
    body_within(frame, FRAME_MAX)
}

/// Decodes a message, which may borrow from the body.
///
/// # Errors
/// [`FrameError::Codec`].
pub fn decode_body<'a, T: Deserialize<'a>>(body: &'a [u8]) -> Result<T, FrameError> {
    Ok(codec::decode_bounded(body, SWELLING_MAX * FRAME_MAX)?.0)
}

/// Decodes a whole frame. Also gives the bytes of memory that the message takes,
/// about.
fn decode_within<T: DeserializeOwned>(
    frame: &[u8],
    limit: usize,
) -> Result<(T, usize), FrameError> {
    let body = body_within(frame, limit)?;
    let (value, lists) = codec::decode_bounded(&body, SWELLING_MAX * limit)?;
    Ok((value, body.len() + lists))
}

fn body_within(frame: &[u8], limit: usize) -> Result<Cow<'_, [u8]>, FrameError> {
    let (header, body) = Header::parse(frame, limit)?.ok_or(FrameError::Truncated)?;
    match body.len().checked_sub(header.length) {
        Some(0) => {}
        Some(more) => return Err(FrameError::Trailing(more)),
        None => return Err(FrameError::Truncated),
    }
    match header.packing {
        Packing::Plain => Ok(body.into()),
        Packing::Whole { raw } => {
            let mut whole = Vec::with_capacity(raw);
            decompress_into(body, raw, &mut whole)?;
            Ok(whole.into())
        }
        Packing::Head { raw, packed } => {
            let (head, rest) = body.split_at_checked(packed).ok_or(FrameError::Truncated)?;
            // One buffer for both: their sum was held to the limit.
            let mut whole = Vec::with_capacity(raw + rest.len());
            decompress_into(head, raw, &mut whole)?;
            whole.extend_from_slice(rest);
            Ok(whole.into())
        }
    }
}

thread_local! {
    // Contexts are hundreds of kilobytes: made once a thread, not once a frame.
    static COMPRESSOR: RefCell<Option<zstd::bulk::Compressor<'static>>> = const { RefCell::new(None) };
    static DECOMPRESSOR: RefCell<Option<zstd::bulk::Decompressor<'static>>> = const { RefCell::new(None) };
}

/// The compressed body, when it is at least a tenth smaller.
fn compress_if_it_pays(body: &[u8]) -> Option<Vec<u8>> {
    if !sample_shrinks(body) {
        return None;
    }
    compress_to(body, body.len() - body.len() / 10)
}

/// Whether a sample of these bytes shrinks, or all of few.
fn shrinks(bytes: &[u8]) -> bool {
    match bytes.len() <= SAMPLE {
        true => compress_to(bytes, bytes.len() - bytes.len() / 10).is_some(),
        false => sample_shrinks(bytes),
    }
}

/// Whether it may pay to compress these bytes.
fn sample_shrinks(bytes: &[u8]) -> bool {
    bytes.len() >= COMPRESS_MIN
        && (bytes.len() <= SAMPLE || compress_to(&sample(bytes), SAMPLE - SAMPLE / 10).is_some())
}

/// Bytes from the beginning, the middle and the end, as one piece.
fn sample(body: &[u8]) -> Vec<u8> {
    let part = SAMPLE / SAMPLE_PARTS;
    let step = (body.len() - part) / (SAMPLE_PARTS - 1);
    (0..SAMPLE_PARTS).flat_map(|i| &body[i * step..i * step + part]).copied().collect()
}

/// The compressed bytes, when they fit in `room`. A compressor that fails does
/// so in not compressing: the frame then travels as it is.
fn compress_to(bytes: &[u8], room: usize) -> Option<Vec<u8>> {
    COMPRESSOR.with_borrow_mut(|slot| {
        let compressor = match slot {
            Some(compressor) => compressor,
            None => slot.insert(zstd::bulk::Compressor::new(LEVEL).ok()?),
        };
        let mut out = Vec::with_capacity(room);
        compressor.compress_to_buffer(bytes, &mut out).ok()?;
        (out.len() <= room).then_some(out)
    })
}

/// Decompresses to exactly `raw` bytes, which the caller has checked against
/// the limit; no input makes it write more than `out` has reserved.
fn decompress_into(bytes: &[u8], raw: usize, out: &mut Vec<u8>) -> Result<(), FrameError> {
    let failed = |error: io::Error| FrameError::Compressed(error.to_string());
    DECOMPRESSOR.with_borrow_mut(|slot| {
        let decompressor = match slot {
            Some(decompressor) => decompressor,
            None => slot.insert(zstd::bulk::Decompressor::new().map_err(failed)?),
        };
        decompressor.decompress_to_buffer(bytes, out).map_err(failed)?;
        match out.len() == raw {
            true => Ok(()),
            false => Err(FrameError::Compressed(format!("{} bytes, {raw} announced", out.len()))),
        }
    })
}

// ---------------------------------------------------------------- streams

/// Writes frames to a stream. Not safe to cancel: a dropped write leaves half a
/// frame on the stream.
#[derive(Debug)]
pub struct FrameWriter<W> {
    stream: W,
    compression: Compression,
    /// Frames that wait to be written with the next.
    queued: Vec<u8>,
}

impl<W: AsyncWrite + Unpin> FrameWriter<W> {
    /// A writer that compresses where it pays.
    pub fn new(stream: W) -> Self {
        Self { stream, compression: Compression::Auto, queued: Vec::new() }
    }

    /// The same with another rule.
    #[must_use]
    pub fn with_compression(mut self, compression: Compression) -> Self {
        self.compression = compression;
        self
    }

    /// Encodes and writes one message; returns the bytes it took on the wire.
    ///
    /// # Errors
    /// As [`encode_frame`], or [`FrameError::Io`].
    pub async fn write<T: Serialize + ?Sized>(&mut self, value: &T) -> Result<u64, FrameError> {
        let frame = encode_frame(value, self.compression)?;
        self.write_encoded(&frame).await
    }

    /// Writes what [`encode_frame`] made, behind what was queued; returns the bytes
    /// it took.
    ///
    /// # Errors
    /// [`FrameError::Io`].
    pub async fn write_encoded(&mut self, frame: &[u8]) -> Result<u64, FrameError> {
        if self.queued.is_empty() {
            self.stream.write_all(frame).await?;
        } else {
            self.queued.extend_from_slice(frame);
            self.flush().await?;
        }
        Ok(frame.len() as u64)
    }

    /// Encodes a message that is written with the next, or by [`Self::flush`]: what
    /// goes in one packet costs half of what goes in two.
    ///
    /// # Errors
    /// As [`encode_frame`].
    pub fn queue<T: Serialize + ?Sized>(&mut self, value: &T) -> Result<(), FrameError> {
        self.queued.append(&mut encode_frame(value, self.compression)?);
        Ok(())
    }

    /// Writes what was queued.
    ///
    /// # Errors
    /// [`FrameError::Io`].
    pub async fn flush(&mut self) -> Result<(), FrameError> {
        if !self.queued.is_empty() {
            self.stream.write_all(&self.queued).await?;
            self.queued.clear();
        }
        Ok(())
    }

    /// The stream itself, to set its priority, say.
    pub fn get_mut(&mut self) -> &mut W {
        &mut self.stream
    }

    /// Gives the stream back, to finish it.
    pub fn into_inner(self) -> W {
        self.stream
    }
}

/// Reads frames from a stream. Holds one buffer, which grows to the largest
/// frame seen and never above the limit.
#[derive(Debug)]
pub struct FrameReader<R> {
    stream: R,
    limit: usize,
    /// What is there of the frame being read.
    buffer: Vec<u8>,
    /// Bytes of memory that the last message takes.
    weight: usize,
}

impl<R: AsyncRead + Unpin> FrameReader<R> {
    /// A reader of frames up to [`FRAME_MAX`].
    pub fn new(stream: R) -> Self {
        Self::with_limit(stream, FRAME_MAX)
    }

    /// A reader that takes no body above `limit` bytes, compressed or not.
    pub fn with_limit(stream: R, limit: usize) -> Self {
        Self { stream, limit: limit.min(FRAME_MAX), buffer: Vec::new(), weight: 0 }
    }

    /// The next message; `None` when the stream ended cleanly between frames.
    ///
    /// Safe to cancel: a read that is dropped loses nothing, and the next one
    /// goes on where it stopped.
    ///
    /// # Errors
    /// Any [`FrameError`]; [`FrameError::Truncated`] when the stream ends
    /// within a frame.
    pub async fn read<T: DeserializeOwned>(&mut self) -> Result<Option<T>, FrameError> {
        if !self.fill_frame().await? {
            return Ok(None);
        }
        let message = decode_within(&self.buffer, self.limit);
        self.buffer.clear();
        let (message, weight) = message?;
        self.weight = weight;
        Ok(Some(message))
    }

    /// Bytes of memory that the message takes, about, that [`Self::read`] gave last.
    pub fn weight(&self) -> usize {
        self.weight
    }

    /// The next whole frame, envelope included, for [`decode_frame`] on another
    /// thread. Otherwise as [`Self::read`].
    ///
    /// # Errors
    /// As [`Self::read`], but for those of decoding.
    pub async fn read_encoded(&mut self) -> Result<Option<Vec<u8>>, FrameError> {
        Ok(self.fill_frame().await?.then(|| std::mem::take(&mut self.buffer)))
    }

    /// Reads until the buffer holds one frame. False when the stream ended
    /// before its first byte.
    async fn fill_frame(&mut self) -> Result<bool, FrameError> {
        if !self.fill(HEADER).await? {
            return Ok(false);
        }
        let first = self.buffer.first_chunk::<HEADER>().ok_or(FrameError::Truncated)?;
        let size = Header::size(first, self.limit)?;
        self.fill(size).await?;
        let (header, _) =
            Header::parse(&self.buffer[..size], self.limit)?.ok_or(FrameError::Truncated)?;
        self.fill(size + header.length).await
    }

    /// Reads until `target` bytes of the frame are there. False when the
    /// stream ended before its first byte.
    async fn fill(&mut self, target: usize) -> Result<bool, FrameError> {
        // Exactly: growing by doubling would pass the limit.
        self.buffer.reserve_exact(target.saturating_sub(self.buffer.len()));
        while self.buffer.len() < target {
            let missing = target - self.buffer.len();
            let mut room = (&mut self.buffer).limit(missing);
            match self.stream.read_buf(&mut room).await? {
                0 if self.buffer.is_empty() => return Ok(false),
                0 => return Err(FrameError::Truncated),
                _ => {}
            }
        }
        Ok(true)
    }

    /// Gives the stream back.
    pub fn into_inner(self) -> R {
        self.stream
    }
}

#[cfg(test)]
mod tests;
