//! What a large file's content consists of for a replica that has other content:
//! runs to copy, runs to send, holes.

use std::collections::HashMap;

use replicator_common::chunk::{self, Chunk};
use replicator_common::wire::{Hash, Layout};

use super::kept::{Dealer, KeptList};

/// Stands for the bytes of a hole in chunk lists.
pub const HOLE: Hash = chunk::NONE;

/// A run of the file: how the destination gets it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Run {
    /// As the basis has it there.
    Copy {
        /// First byte in the basis.
        from: u64,
        /// Bytes.
        length: u64,
    },
    /// Chunk by chunk.
    Data {
        /// Index of the first chunk.
        first: usize,
        /// Chunks.
        count: usize,
        /// Bytes.
        length: u64,
    },
    /// Nothing.
    Hole {
        /// Bytes.
        length: u64,
    },
}

/// Whether a file can be patched in place: what is copied stays where it is,
/// and that is at least half of it.
pub fn patches(runs: &[Run]) -> bool {
    let (mut at, mut kept) = (0, 0);
    for run in runs {
        at += match *run {
            Run::Copy { from, .. } if from != at => return false,
            Run::Copy { length, .. } => {
                kept += length;
                length
            }
            Run::Hole { length } | Run::Data { length, .. } => length,
        };
    }
    kept * 2 >= at
}

/// Bytes that the basis does not have.
pub fn literal_bytes(runs: &[Run]) -> u64 {
    runs.iter()
        .map(|run| match *run {
            Run::Data { length, .. } => length,
            Run::Copy { .. } | Run::Hole { .. } => 0,
        })
        .sum()
}

/// Which runs of the file the basis has, and where.
pub fn plan_runs(chunks: &[Chunk], basis: &[Chunk]) -> Vec<Run> {
    let mut places: HashMap<(Hash, u32), u64> = HashMap::with_capacity(basis.len());
    let mut at = 0;
    let mut same_place: HashMap<u64, Chunk> = HashMap::new();
    for chunk in basis {
        if chunk.hash != HOLE {
            places.entry((chunk.hash, chunk.length)).or_insert(at);
            same_place.insert(at, *chunk);
        }
        at += u64::from(chunk.length);
    }
    let mut runs: Vec<Run> = Vec::new();
    let mut at = 0;
    for (index, chunk) in chunks.iter().enumerate() {
        let length = u64::from(chunk.length);
        // The same place first: only then can the file be patched in place.
        let from = if same_place.get(&at) == Some(chunk) {
            Some(at)
        } else {
            places.get(&(chunk.hash, chunk.length)).copied()
        };
        let run = match from {
            _ if chunk.hash == HOLE => Run::Hole { length },
            Some(from) => Run::Copy { from, length },
            None => Run::Data { first: index, count: 1, length },
        };
        match (runs.last_mut(), run) {
            (Some(Run::Copy { from, length: have }), Run::Copy { from: next, length })
                if *from + *have == next =>
            {
                *have += length;
            }
            (Some(Run::Data { count, length: have, .. }), Run::Data { length, .. }) => {
                *count += 1;
                *have += length;
            }
            (Some(Run::Hole { length: have }), Run::Hole { length }) => *have += length,
            _ => runs.push(run),
        }
        at += length;
    }
    runs
}

/// Whether all that was kept of a file can be used without a copy of it: nothing
/// is overwritten before it has gone to its place.
pub fn fits_in_place(
    runs: &[Run],
    chunks: &[Chunk],
    kept: Option<&KeptList>,
    layout: Layout,
) -> bool {
    let mut dealer = Dealer::new(kept, false);
    let (mut at, mut literal) = (0, 0);
    for run in runs {
        match *run {
            Run::Copy { length, .. } | Run::Hole { length } => at += length,
            Run::Data { first, count, .. } => {
                for chunk in &chunks[first..first + count] {
                    let to = if layout == Layout::Patch { literal } else { at };
                    let from = dealer.deal(&chunk.hash, chunk.length, to);
                    if from.is_some_and(|from| from < to) {
                        return false;
                    }
                    at += u64::from(chunk.length);
                    literal += u64::from(chunk.length);
                }
            }
        }
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    fn list(tags: &[u8]) -> Vec<Chunk> {
        let hash = |tag: u8| if tag == 0 { HOLE } else { Hash([tag; 32]) };
        tags.iter().map(|tag| Chunk { length: 20_000, hash: hash(*tag) }).collect()
    }

    #[test]
    fn append_and_patch_stay_in_place_insertion_does_not() {
        let basis = list(&[1, 2, 3, 4, 5, 6]);
        let append = plan_runs(&list(&[1, 2, 3, 4, 5, 6, 9]), &basis);
        assert_eq!(
            append,
            [
                Run::Copy { from: 0, length: 120_000 },
                Run::Data { first: 6, count: 1, length: 20_000 }
            ]
        );
        assert!(patches(&append));
        assert!(patches(&plan_runs(&list(&[1, 2, 9, 4, 5, 6]), &basis)));
        assert!(!patches(&plan_runs(&list(&[1, 9, 2, 3, 4, 5, 6]), &basis)));
        assert!(!patches(&plan_runs(&list(&[9, 8, 7, 6, 5, 6]), &basis)));
    }

    #[test]
    fn repeated_chunks_are_taken_from_their_own_place() {
        let basis = list(&[1, 1, 1, 1]);
        let runs = plan_runs(&list(&[1, 1, 1, 1]), &basis);
        assert_eq!(runs, [Run::Copy { from: 0, length: 80_000 }]);
    }
}
