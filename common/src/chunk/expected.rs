//! Chunks that are met again need not be searched for: when the bytes have the
//! hash of the chunk that was there, or that followed, they end where it ended.
//! They have to be hashed in any case, so the search is saved.

use std::collections::HashMap;
use std::sync::OnceLock;

use super::{Chunk, NONE, SHORT};
use crate::wire::Hash;

/// What a stream probably consists of, in order.
pub struct Expected<'a> {
    list: &'a [Chunk],
    starts: Vec<u64>,
    /// Which of them somebody has seen where they were; none when empty.
    seen: Vec<bool>,
    /// Made when something was found to be another.
    places: OnceLock<HashMap<(Hash, u32), usize>>,
}

impl<'a> Expected<'a> {
    /// Those of a list.
    pub fn new(list: &'a [Chunk]) -> Self {
        let starts = list.iter().scan(0, |at, chunk| {
            let start = *at;
            *at += u64::from(chunk.length);
            Some(start)
        });
        Self { list, starts: starts.collect(), seen: Vec::new(), places: OnceLock::new() }
    }

    /// Of these, one a chunk, somebody has seen which are where they were: they are not
    /// hashed once more.
    pub fn seen(self, seen: Vec<bool>) -> Self {
        Self { seen, ..self }
    }

    /// The chunk that begins at `at`, as somebody has [seen](Self::seen).
    pub fn seen_at(&self, at: u64) -> Option<Chunk> {
        let number = self.number_at(at)?;
        self.seen.get(number)?.then(|| self.list[number])
    }

    /// How many chunks those are.
    pub fn len(&self) -> usize {
        self.list.len()
    }

    /// Whether nothing is expected.
    pub fn is_empty(&self) -> bool {
        self.list.is_empty()
    }

    /// Where the chunk of this number began, and the chunk.
    pub fn get(&self, number: usize) -> Option<(u64, Chunk)> {
        Some((*self.starts.get(number)?, *self.list.get(number)?))
    }

    /// The number of the chunk that began at `at`.
    pub fn number_at(&self, at: u64) -> Option<usize> {
        self.starts.binary_search(&at).ok()
    }

    /// Whether a stream that has the bytes of this chunk is cut where they end, whatever
    /// follows: it is no hole, and was not cut short, by the end of the list or as what is
    /// shorter than a quarter of the `average`.
    pub fn is_regular(&self, number: usize, average: u32) -> bool {
        let long = |chunk: &Chunk| chunk.hash != NONE && chunk.length >= average / SHORT;
        number + 1 < self.list.len() && self.list.get(number).is_some_and(long)
    }

    /// The chunk that begins at `at`, where `bytes` begin, if it is the one after
    /// `last`, or the one that stood there; which becomes the `last`. One that was
    /// [seen](Self::seen) there is believed.
    ///
    /// Not one that was cut short: by the end of the list, unless `bytes` end there
    /// too, or because it is shorter than `min`.
    pub(super) fn chunk(
        &self,
        last: &mut Option<usize>,
        at: u64,
        bytes: &[u8],
        min: u32,
    ) -> Option<Chunk> {
        let same = self.number_at(at);
        if let Some(seen) = self.seen_at(at).filter(|seen| seen.length as usize <= bytes.len()) {
            *last = same;
            return Some(seen);
        }
        let next = last.map(|last| last + 1);
        let each = [next, same.filter(|same| Some(*same) != next)];
        for number in each.into_iter().flatten() {
            let Some(chunk) = self.list.get(number) else { continue };
            let whole = number + 1 < self.list.len() || bytes.len() == chunk.length as usize;
            if chunk.hash == NONE || chunk.length < min || !whole {
                continue;
            }
            let Some(bytes) = bytes.get(..chunk.length as usize) else { continue };
            if Hash::of(bytes) == chunk.hash {
                *last = Some(number);
                return Some(*chunk);
            }
        }
        None
    }

    /// Where a chunk stands that was searched for.
    pub(super) fn find(&self, chunk: &Chunk) -> Option<usize> {
        let places = self.places.get_or_init(|| {
            let each = self.list.iter().enumerate();
            each.rev().map(|(number, chunk)| ((chunk.hash, chunk.length), number)).collect()
        });
        places.get(&(chunk.hash, chunk.length)).copied()
    }
}
