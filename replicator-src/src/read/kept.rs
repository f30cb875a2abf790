//! What the destination still has of a session that ended, as readers use it
//! (see [`replicator_common::wire::kept`]).

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use foldhash::HashMap;
use replicator_common::id::ObjectId;
use replicator_common::time::Timestamp;
use replicator_common::wire::{Hash, KeptChunk, KeptObject};

/// Small files in the destination's staging, with the hash of their content.
/// Shared by the readers.
#[derive(Debug, Default)]
pub struct KeptObjects {
    /// Whether there are any: spares readers the lock.
    any: AtomicBool,
    objects: Mutex<HashMap<ObjectId, Hash>>,
}

impl KeptObjects {
    fn lock(&self) -> MutexGuard<'_, HashMap<ObjectId, Hash>> {
        self.objects.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The destination named more of them, of which no more than `most` are
    /// noted in all.
    pub fn extend(&self, named: Vec<KeptObject>, most: usize) {
        let mut objects = self.lock();
        for KeptObject { object, hash } in named {
            if objects.len() < most {
                objects.insert(object, hash);
            }
        }
        self.any.store(!objects.is_empty(), Ordering::Release);
    }

    /// Whether the object's content there is this. Says so once: the
    /// destination uses it once.
    pub fn take(&self, object: &ObjectId, hash: &Hash) -> bool {
        if !self.any.load(Ordering::Acquire) {
            return false;
        }
        let mut objects = self.lock();
        let same = objects.get(object) == Some(hash);
        if same {
            objects.remove(object);
        }
        same
    }

    /// How many are noted.
    pub fn len(&self) -> usize {
        self.lock().len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// None of them is used from now on.
    pub fn clear(&self) {
        self.any.store(false, Ordering::Release);
        self.lock().clear();
    }
}

/// The chunks of a large file that the destination has. 44 bytes a chunk.
#[derive(Debug)]
pub struct KeptList {
    /// Size and time of the file when the transfer began that was broken off.
    pub was: (u64, Timestamp),
    /// By hash and length, then by place.
    chunks: Vec<KeptChunk>,
}

impl KeptList {
    /// Of what the destination said.
    pub fn new(was: (u64, Timestamp), mut chunks: Vec<KeptChunk>) -> Self {
        chunks.sort_unstable_by_key(|kept| (kept.chunk.hash.0, kept.chunk.length, kept.from));
        Self { was, chunks }
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.chunks.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.chunks.is_empty()
    }
}

/// Deals out the chunks of a list, each once: what is in place is overwritten.
pub struct Dealer<'a> {
    chunks: &'a [KeptChunk],
    used: Vec<bool>,
    /// Only what stands at or behind the place that it goes to.
    pub in_place: bool,
}

impl<'a> Dealer<'a> {
    /// Of a list, if there is one.
    pub fn new(list: Option<&'a KeptList>, in_place: bool) -> Self {
        let chunks = list.map_or(&[][..], |list| &list.chunks);
        Self { chunks, used: vec![false; chunks.len()], in_place }
    }

    /// Where the destination has these bytes that go to `at`: there if possible.
    pub fn deal(&mut self, hash: &Hash, length: u32, at: u64) -> Option<u64> {
        let key = |kept: &KeptChunk| (kept.chunk.hash.0, kept.chunk.length);
        let first = self.chunks.partition_point(|kept| key(kept) < (hash.0, length));
        let alike = self.chunks[first..].iter().take_while(|kept| key(kept) == (hash.0, length));
        let fits = |(_, kept): &(usize, &KeptChunk)| !self.in_place || kept.from >= at;
        let free = |(index, _): &(usize, &KeptChunk)| !self.used[first + index];
        let mut found = None;
        // A file of one chunk over and over has many that are alike.
        for (index, kept) in alike.enumerate().filter(free).filter(fits).take(1024) {
            if found.is_none() || kept.from == at {
                found = Some((index, kept.from));
            }
            if kept.from >= at {
                break;
            }
        }
        let (index, from) = found?;
        self.used[first + index] = true;
        Some(from)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use replicator_common::chunk::Chunk;

    fn list(chunks: &[(u64, u8)]) -> KeptList {
        let kept = |(from, tag): &(u64, u8)| KeptChunk {
            from: *from,
            chunk: Chunk { length: 10, hash: Hash([*tag; 32]) },
        };
        KeptList::new((0, Timestamp(0)), chunks.iter().map(kept).collect())
    }

    #[test]
    fn chunks_are_dealt_once_and_from_their_own_place_first() {
        let list = list(&[(0, 1), (10, 2), (20, 1), (30, 1)]);
        let mut dealer = Dealer::new(Some(&list), false);
        let one = Hash([1; 32]);
        assert_eq!(dealer.deal(&one, 10, 20), Some(20));
        assert_eq!(dealer.deal(&one, 10, 20), Some(0));
        assert_eq!(dealer.deal(&one, 10, 40), Some(30));
        assert_eq!(dealer.deal(&one, 10, 0), None);
        assert_eq!(dealer.deal(&Hash([2; 32]), 11, 0), None);
        let mut in_place = Dealer::new(Some(&list), true);
        assert_eq!(in_place.deal(&one, 10, 5), Some(20));
        assert_eq!(in_place.deal(&Hash([2; 32]), 10, 11), None, "overwritten by then");
    }

    #[test]
    fn content_is_taken_once_and_only_as_it_was() {
        let (kept, id) = (KeptObjects::default(), ObjectId::new(1, &[1]).unwrap());
        kept.extend(vec![KeptObject { object: id.clone(), hash: Hash([1; 32]) }], 9);
        assert!(!kept.take(&id, &Hash([2; 32])));
        assert!(kept.take(&id, &Hash([1; 32])));
        assert!(!kept.take(&id, &Hash([1; 32])));
    }
}
