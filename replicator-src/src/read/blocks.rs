//! What of a changed chunk the replica has all the same.
//!
//! A chunk is some 16 KiB, and what a database or a virtual machine writes is 4 KiB: the
//! rest of the chunk need not travel. The index knows chunks only, so the replica is
//! asked for the hashes of its blocks, before a transfer of 128 KiB to 64 MiB of changed
//! chunks. That costs a round trip for each 8 MiB of them, and a 256th of the bytes.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use crossbeam_channel::{RecvTimeoutError, Sender, bounded};
use replicator_common::chunk::Chunk;
use replicator_common::describe::{
    ASKED_MAX, BLOCK_HASH, Describe, Description, RANGE_MAX, block_hash, blocks,
};
use replicator_common::id::{BatchId, ObjectId};
use replicator_common::wire::{Hash, Piece};

use super::kept::Dealer;
use super::lane::LaneError;
use super::out::Out;
use super::runs::Run;
use crate::engine::Event;
use crate::engine::verify::Query;

/// Changed bytes from which on the replica is asked.
const WORTH: u64 = 128 << 10;
/// Changed bytes up to which it is: a file of which more changed is another file.
const MOST: u64 = 64 << 20;
/// How long an answer is waited for at least; without one the chunks travel whole. The
/// thread that answers has no priority: where its cores are taken, a small change should
/// not wait for it.
const ANSWER: Duration = Duration::from_millis(500);
/// And so much longer for each MiB that was asked of: to send that takes as long at 32 Mbit/s.
const ANSWER_PER_MIB: Duration = Duration::from_millis(250);
/// How long all answers of a transfer are waited for: a file that goes on changing rests for a
/// multiple of the time that it took, and a lane is held up.
const ANSWERS: Duration = Duration::from_secs(4);
/// Between two looks at whether the transfer is to end.
const POLL: Duration = Duration::from_millis(100);

/// Asks the destination, by way of the engine, which has the session.
#[derive(Clone, Debug)]
pub struct Asker(pub Sender<Event>);

impl Asker {
    /// `None` without an answer: no session, a replica that is busy, or the end.
    fn ask(&self, question: Describe, until: Instant, stop: &AtomicBool) -> Option<Description> {
        let (reply, answer) = bounded(1);
        let question = Box::new(question);
        self.0.send(Event::Verify(Query::Ask { question, reply })).ok()?;
        while Instant::now() < until && !stop.load(Ordering::Relaxed) {
            match answer.recv_timeout(POLL) {
                Ok(description) => return Some(description),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return None,
            }
        }
        None
    }
}

/// A changed chunk: its number, where it stands, its bytes.
type Changed = (usize, u64, u32);

/// The hashes of the replica's blocks, by the number of the chunk that stands there now.
#[derive(Default)]
pub(super) struct Blocks(HashMap<usize, Vec<u8>>);

impl Blocks {
    /// Asks for them, of what stands where the replica's file, of this `version` and
    /// `size`, has something else.
    pub(super) fn ask(
        asker: &Asker,
        (object, version, size): (&ObjectId, BatchId, u64),
        (runs, chunks): (&[Run], &[Chunk]),
        stop: &AtomicBool,
    ) -> Self {
        let changed = changed(runs, chunks, size);
        let bytes = changed.iter().map(|(_, _, length)| u64::from(*length)).sum::<u64>();
        let mut found = Self::default();
        if !(WORTH..=MOST).contains(&bytes) {
            return found;
        }
        let (start, mut rest) = (Instant::now(), &changed[..]);
        // No question for which there is no time: the answer would be work for nobody.
        while !rest.is_empty() && start.elapsed() + POLL < ANSWERS {
            let (part, after) = rest.split_at(fits(rest));
            let runs = part.iter().map(|(_, at, length)| (*at, *length)).collect();
            let question = Describe::Blocks { object: object.clone(), version, runs };
            let until = (Instant::now() + patience(part)).min(start + ANSWERS);
            let answer = asker.ask(question, until, stop);
            let Some(Description::Blocks(Some(hashes))) = answer else { break };
            if !found.take(part, &hashes) {
                tracing::warn!("the destination described other blocks than it was asked for");
                break;
            }
            rest = after;
        }
        let known = changed.len() - rest.len();
        tracing::debug!(%object, bytes, chunks = changed.len(), known, took = ?start.elapsed(), "blocks");
        found
    }

    /// Whether nothing is known of any chunk.
    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Takes in an answer; whether it is one to these chunks.
    fn take(&mut self, part: &[Changed], mut hashes: &[u8]) -> bool {
        for (number, at, length) in part {
            let count = blocks(*at, u64::from(*length)).count();
            let Some((own, rest)) = hashes.split_at_checked(count * BLOCK_HASH) else {
                return false;
            };
            self.0.insert(*number, own.to_vec());
            hashes = rest;
        }
        hashes.is_empty()
    }

    /// Sends a chunk that stands `at` this place and has these `bytes`: what the replica
    /// has of it is copied. Says whether anything was known of it; else it is still to be
    /// sent.
    ///
    /// INVARIANT (nothing is sent twice): what differs is one piece for each run of blocks,
    /// and a transfer that was broken off after it is met again by the hash of that piece.
    pub(super) fn send(
        &self,
        number: usize,
        at: u64,
        bytes: &Bytes,
        (dealer, out): (&mut Dealer<'_>, &mut Out<'_>),
    ) -> Result<bool, LaneError> {
        let Some(hashes) = self.0.get(&number) else { return Ok(false) };
        let mut parts: Vec<(bool, std::ops::Range<usize>)> = Vec::new();
        let theirs = hashes.chunks(BLOCK_HASH);
        let mut end = 0;
        for (block, theirs) in blocks(at, bytes.len() as u64).zip(theirs) {
            let begin = end;
            // No longer than the chunk, which is in memory.
            end += (block.end - block.start) as usize;
            let same = block_hash(&bytes[begin..end])[..] == *theirs;
            match parts.last_mut() {
                Some((before, range)) if *before == same => range.end = end,
                _ => parts.push((same, begin..end)),
            }
        }
        for (same, range) in parts {
            let from = at + range.start as u64;
            if same {
                out.piece(Piece::Copy { from, length: range.len() as u64 })?;
                continue;
            }
            let hash = Hash::of(&bytes[range.clone()]);
            // A chunk is far below 4 GiB.
            let length = u32::try_from(range.len()).unwrap_or(u32::MAX);
            match dealer.deal(&hash, length, from) {
                Some(from) => out.piece(Piece::Kept { from, length, hash })?,
                None => out.data(hash, bytes, range)?,
            }
        }
        Ok(true)
    }
}

/// Chunks to send that stand within the first `size` bytes.
fn changed(runs: &[Run], chunks: &[Chunk], size: u64) -> Vec<Changed> {
    let (mut at, mut changed) = (0, Vec::new());
    for run in runs {
        match *run {
            Run::Copy { length, .. } | Run::Hole { length } => at += length,
            Run::Data { first, count, .. } => {
                for (number, chunk) in chunks.iter().enumerate().skip(first).take(count) {
                    let end = at + u64::from(chunk.length);
                    if end <= size {
                        changed.push((number, at, chunk.length));
                    }
                    at = end;
                }
            }
        }
    }
    changed
}

/// How long the answer to a question of these is waited for.
fn patience(part: &[Changed]) -> Duration {
    let bytes: u64 = part.iter().map(|(_, _, length)| u64::from(*length)).sum();
    // No more than [`RANGE_MAX`], or one chunk.
    ANSWER + ANSWER_PER_MIB * u32::try_from(bytes >> 20).unwrap_or(u32::MAX)
}

/// How many of them fit into one question: one at least.
fn fits(changed: &[Changed]) -> usize {
    let mut bytes = 0;
    let fit = changed.iter().take(ASKED_MAX).take_while(|(_, _, length)| {
        bytes += u64::from(*length);
        bytes <= RANGE_MAX
    });
    fit.count().max(1)
}
