//! What staging still has of a session that ended: used by the next, so that
//! nothing that arrived travels twice.
//!
//! It stays where it is, under the names it was staged with, so that a failover
//! at any moment finds it as it finds all else in staging. Here is only the
//! memory of it: bounded by the limits in [`replicator_common::wire::kept`].
//!
//! INVARIANT (reuse trusts no content that may not be on disk): what is kept is
//! believed by its hash alone. What this process staged since its last failed
//! sync reads back as it will be synced; after a failed sync nothing is kept
//! (trap 16). What an earlier process staged is read back from disk, not from
//! memory, where pages stand that a failed sync gave up. And what is told to the
//! source is told under the source's own object ids, to the incarnation that
//! sent it: nobody learns of another's content.

use std::collections::{BTreeMap, HashMap};
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use replicator_common::id::ObjectId;
use replicator_common::name::Name;
use replicator_common::sys::{place, stat};
use replicator_common::time::Timestamp;
use replicator_common::wire::kept::{
    KEPT_ITEMS_MAX, KEPT_PACKED_BYTES, KEPT_PACKED_MAX, KEPT_TRANSFERS_MAX,
};
use replicator_common::wire::{DestinationMessage, Hash, KeptChunk, KeptObject, PACK_MAX};
use rustix::fs::OFlags;
use rustix::io::Errno;

use crate::apply::{Place, Within};
use crate::area::{Area, AreaError, SHARDS, remove_tree};
use crate::failover::decode_hex;
use crate::nest;
use crate::record;
use crate::stage::Stager;

/// A small file in staging, with its content's hash.
#[derive(Clone, Debug)]
pub struct Packed {
    /// Where.
    pub place: Place,
    hash: Hash,
    size: u64,
}

/// What is in staging of a large object.
#[derive(Clone, Debug)]
pub struct Parts {
    /// Its bytes.
    pub content: Place,
    /// Which they are.
    pub record: Place,
}

impl Parts {
    /// All of its files: the list of a patch too.
    pub fn places(&self) -> Vec<Place> {
        let list = list_of(&self.content);
        [Some(self.content.clone()), Some(self.record.clone()), list]
            .into_iter()
            .flatten()
            .collect()
    }
}

/// The record of the transfer whose bytes stand there.
pub fn record_of(content: &Place) -> Option<Place> {
    twin(content, 'r')
}

/// The list of a patch whose bytes stand there.
pub fn list_of(content: &Place) -> Option<Place> {
    twin(content, 'l')
}

/// The file beside a transfer's content that belongs to it. Only staging has such:
/// in a nest stand names of the user's.
fn twin(content: &Place, kind: char) -> Option<Place> {
    if !matches!(content.within, Within::Staging(_)) {
        return None;
    }
    let text = content.name.to_string();
    let rest = text.strip_prefix('t')?;
    let name = Name::new(format!("{kind}{rest}").as_bytes()).ok()?;
    Some(Place { within: content.within.clone(), name })
}

/// What is kept of one replica.
#[derive(Debug)]
pub struct Kept {
    area: Arc<Area>,
    /// The next number of a staged name. INVARIANT: above all in staging, so
    /// that nothing that is kept is overwritten.
    next: AtomicU64,
    state: Mutex<State>,
    /// Held by who reads what was kept: one at a time, for the memory of it.
    reading: Mutex<()>,
    /// See [`crate::replica::Replica::sync_failed`].
    sync_failed: Arc<AtomicBool>,
}

#[derive(Debug, Default)]
struct State {
    /// Numbers from here on are of this process.
    ours: Option<u64>,
    /// Small files whose content was not read yet.
    unread: Vec<(u64, ObjectId, Place)>,
    packed: HashMap<ObjectId, Packed>,
    transfers: BTreeMap<ObjectId, (u64, Parts)>,
    /// Plans of batches that did not come to be, for a failover's manifest.
    plans: Vec<Place>,
}

/// A file found in staging.
struct Found {
    number: u64,
    place: Place,
    size: u64,
}

impl Kept {
    /// Of a replica whose directories these are.
    pub fn new(area: Arc<Area>, sync_failed: Arc<AtomicBool>) -> Self {
        let (state, reading) = (Mutex::default(), Mutex::default());
        Self { area, next: AtomicU64::new(1), state, reading, sync_failed }
    }

    /// A number for a staged name: unique in staging.
    pub fn number(&self) -> u64 {
        self.next.fetch_add(1, Ordering::AcqRel)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // A panic of another holder leaves lists that are whole by themselves.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Forgets everything: staging was wiped.
    pub fn clear(&self) {
        let mut state = self.state();
        // Whatever is staged from now on is of this process.
        let ours = state.ours.or_else(|| Some(self.next.load(Ordering::Acquire)));
        *state = State { ours, ..State::default() };
    }

    /// A session begins: looks at what the one before left in staging, and
    /// removes what cannot be used. Only when no logged step needs any of it,
    /// and nobody stages.
    pub fn collect(&self) -> Result<(), AreaError> {
        nest::dissolve(&self.area)?;
        let mut found = Sorted::default();
        let mut highest = 0;
        for shard in 0..SHARDS {
            let directory = self.area.staging(shard);
            let names = place::list(directory)
                .map_err(AreaError::system("list", format!("staging/{shard}")))?;
            for (name, _) in names {
                let place = Place { within: Within::Staging(shard), name };
                let number = number_in(&place.name);
                highest = highest.max(number.unwrap_or(0));
                let size = stat::of_entry(directory, &place.name).map_or(0, |stat| stat.size);
                match number {
                    Some(number) => found.add(Found { number, place, size }),
                    None => found.useless.push(place),
                }
            }
        }
        let next = self.next.fetch_max(highest + 1, Ordering::AcqRel).max(highest + 1);
        let mut state = self.state();
        let ours = *state.ours.get_or_insert(next);
        *state = State { ours: Some(ours), ..State::default() };
        found.packed(&mut state);
        found.transfers(&self.area, &mut state);
        state.plans = std::mem::take(&mut found.plans);
        for place in found.useless {
            if let Within::Staging(shard) = place.within {
                remove_tree(self.area.staging(shard), &place.name)?;
            }
        }
        Ok(())
    }

    /// Says what is there, after reading all of the small files. Ends when
    /// `say` gives `false`.
    pub fn tell(&self, say: &mut dyn FnMut(DestinationMessage) -> bool) {
        let _reading = self.reading.lock().unwrap_or_else(PoisonError::into_inner);
        let (unread, ours) = {
            let mut state = self.state();
            (std::mem::take(&mut state.unread), state.ours.unwrap_or(0))
        };
        // What is not on disk yet cannot be dropped from memory either.
        let doubted = unread.iter().any(|(number, ..)| *number < ours);
        let synced = !doubted || place::sync_file_system(self.area.root()).is_ok();
        if !synced {
            // It is told once, and was told here.
            self.sync_failed.store(true, Ordering::Release);
        }
        let mut part = Vec::new();
        for (number, object, place) in unread {
            let doubted = number < ours;
            if doubted && !synced {
                continue;
            }
            let Some((hash, size)) = self.hash(&place, doubted) else { continue };
            part.push(KeptObject { object: object.clone(), hash });
            self.state().packed.insert(object, Packed { place, hash, size });
            if part.len() >= KEPT_ITEMS_MAX {
                let packed = std::mem::take(&mut part);
                if !say(DestinationMessage::Kept { packed, transfers: Vec::new(), last: false }) {
                    return;
                }
            }
        }
        let transfers: Vec<_> = self.state().transfers.keys().cloned().collect();
        tracing::info!(packed = self.state().packed.len(), large = transfers.len(), "kept");
        say(DestinationMessage::Kept { packed: part, transfers, last: true });
    }

    /// Opens a staged file, also one whose mode would not let an unprivileged
    /// destination: whoever uses it sets the mode again.
    pub fn open(&self, place: &Place, flags: OFlags) -> Result<OwnedFd, Errno> {
        let Within::Staging(shard) = place.within else { return Err(Errno::NOENT) };
        let directory = self.area.staging(shard);
        match place::open_file(directory, &place.name, flags) {
            Err(Errno::ACCESS) => {
                let path = place::open_path(directory, &place.name)?;
                place::set_mode(std::os::fd::AsFd::as_fd(&path), 0o600)?;
                place::open_file(directory, &place.name, flags)
            }
            result => result,
        }
    }

    fn hash(&self, place: &Place, doubted: bool) -> Option<(Hash, u64)> {
        let file = self.open(place, OFlags::RDONLY).ok()?;
        if doubted {
            place::forget_cached(&file);
        }
        let size = stat::of_fd(&file).ok()?.size;
        let mut bytes = vec![0; usize::try_from(size).ok().filter(|_| size <= PACK_MAX)?];
        let read = place::read_at(&file, &mut bytes, 0).ok()?;
        (read == bytes.len()).then(|| (Hash::of(&bytes), size))
    }

    /// Says which chunks of a large object are there. Of what an earlier process
    /// staged, each was read back.
    pub fn chunks(&self, object: &ObjectId, say: &mut dyn FnMut(DestinationMessage) -> bool) {
        let _reading = self.reading.lock().unwrap_or_else(PoisonError::into_inner);
        let (was, chunks) = self.read_chunks(object).unwrap_or_default();
        let mut parts = chunks.chunks(KEPT_ITEMS_MAX).peekable();
        let mut more = true;
        while more {
            let chunks = parts.next().unwrap_or_default().to_vec();
            more = parts.peek().is_some();
            let object = object.clone();
            if !say(DestinationMessage::KeptChunks { object, was, chunks, last: !more }) {
                return;
            }
        }
    }

    fn read_chunks(&self, object: &ObjectId) -> Option<((u64, Timestamp), Vec<KeptChunk>)> {
        let (number, parts) = self.state().transfers.get(object).cloned()?;
        let ours = self.state().ours.unwrap_or(0);
        let file = self.open(&parts.record, OFlags::RDWR).ok()?;
        let was = record::header(&file)?.was;
        let mut chunks = record::chunks(&file).ok()?;
        if number < ours {
            let content = self.open(&parts.content, OFlags::RDONLY).ok()?;
            rustix::fs::fdatasync(&content).ok()?;
            place::forget_cached(&content);
            chunks.retain(|kept| read_chunk(&content, kept).is_some());
            // The file may become this process's own.
            record::rewrite(&file, &chunks).ok()?;
        }
        Some((was, chunks))
    }

    /// Hands out a small file that has this content; it is handed out once.
    pub fn claim(&self, object: &ObjectId, hash: &Hash, size: u64) -> Option<Packed> {
        let mut state = self.state();
        let packed = state.packed.get(object)?;
        if (&packed.hash, packed.size) != (hash, size) {
            return None;
        }
        state.packed.remove(object)
    }

    /// Takes back one that could not be used yet.
    pub fn give_back(&self, object: ObjectId, packed: Packed) {
        self.state().packed.insert(object, packed);
    }

    /// Hands out what there is of a large object.
    pub fn take(&self, object: &ObjectId) -> Option<Parts> {
        self.state().transfers.remove(object).map(|(_, parts)| parts)
    }

    /// The source has no use for these.
    pub fn release(&self, packed: bool, transfers: &[ObjectId]) {
        let mut places = Vec::new();
        {
            let mut state = self.state();
            if packed {
                places.extend(state.packed.drain().map(|(_, packed)| packed.place));
                places.extend(state.unread.drain(..).map(|(_, _, place)| place));
                places.append(&mut state.plans);
            }
            for object in transfers {
                let parts = state.transfers.remove(object);
                places.extend(parts.into_iter().flat_map(|(_, parts)| parts.places()));
            }
        }
        Stager::discard(&self.area, &places);
    }

    /// The disk is full: what is kept of large objects must not be why. The
    /// source sends them whole.
    pub fn give_up_transfers(&self) {
        let all: Vec<_> = self.state().transfers.keys().cloned().collect();
        self.release(false, &all);
    }
}

/// The bytes of a chunk, if they are what its hash says.
pub fn read_chunk(file: &OwnedFd, kept: &KeptChunk) -> Option<Vec<u8>> {
    let mut bytes = vec![0; kept.chunk.length as usize];
    let read = place::read_at(file, &mut bytes, kept.from).ok()?;
    (read == bytes.len() && Hash::of(&bytes) == kept.chunk.hash).then_some(bytes)
}

/// The unique number in a staged name: `p5.12.…` has 12.
fn number_in(name: &Name) -> Option<u64> {
    name.to_string().split('.').nth(if is_plan(name) { 2 } else { 1 })?.parse().ok()
}

fn is_plan(name: &Name) -> bool {
    name.as_bytes().starts_with(b"plan.")
}

/// The object in a staged name, unless it had to be cut or hashed there.
fn object_in(name: &Name) -> Option<ObjectId> {
    let text = name.to_string();
    let digits = text.rsplit('.').next()?;
    if digits.len() >= Stager::OBJECT_DIGITS {
        return None;
    }
    ObjectId::from_bytes(&decode_hex(digits)?)
}

/// What staging has, by what it may serve for.
#[derive(Default)]
struct Sorted {
    small: Vec<Found>,
    large: Vec<Found>,
    /// Files that belong to those.
    twins: BTreeMap<Place, u64>,
    plans: Vec<Place>,
    useless: Vec<Place>,
}

impl Sorted {
    fn add(&mut self, found: Found) {
        match found.place.name.as_bytes() {
            _ if is_plan(&found.place.name) => self.plans.push(found.place),
            [b'p', ..] => self.small.push(found),
            [b't', ..] => self.large.push(found),
            [b'r' | b'l', ..] => drop(self.twins.insert(found.place, found.size)),
            _ => self.useless.push(found.place),
        }
    }

    /// The newest of each object, within the limits.
    fn packed(&mut self, state: &mut State) {
        self.small.sort_unstable_by_key(|found| std::cmp::Reverse(found.number));
        let mut bytes = 0;
        let mut seen = std::collections::HashSet::new();
        for Found { number, place, size } in std::mem::take(&mut self.small) {
            match object_in(&place.name) {
                Some(object)
                    if state.unread.len() < KEPT_PACKED_MAX
                        && bytes + size <= KEPT_PACKED_BYTES
                        && seen.insert(object.clone()) =>
                {
                    bytes += size;
                    state.unread.push((number, object, place));
                }
                _ => self.useless.push(place),
            }
        }
    }

    /// Of each object the one with the most in it, and the newest of these.
    fn transfers(&mut self, area: &Area, state: &mut State) {
        self.large.sort_unstable_by_key(|found| std::cmp::Reverse(found.number));
        let mut lengths = HashMap::new();
        for Found { number, place, .. } in std::mem::take(&mut self.large) {
            let known = record_of(&place).and_then(|record| {
                let length = *self.twins.get(&record)?;
                Some((object_of_record(area, &record)?, length, record))
            });
            let Some((object, length, record)) = known else {
                self.useless.push(place);
                continue;
            };
            let better = lengths.get(&object).is_none_or(|best| length > *best);
            let room = state.transfers.len() < KEPT_TRANSFERS_MAX;
            if !better || !(room || state.transfers.contains_key(&object)) {
                self.useless.push(place);
                continue;
            }
            lengths.insert(object.clone(), length);
            let parts = Parts { content: place, record };
            if let Some((_, worse)) = state.transfers.insert(object, (number, parts)) {
                self.useless.push(worse.content);
            }
        }
        for (_, parts) in state.transfers.values() {
            for place in parts.places() {
                self.twins.remove(&place);
            }
        }
        self.useless.extend(std::mem::take(&mut self.twins).into_keys());
    }
}

fn object_of_record(area: &Area, record: &Place) -> Option<ObjectId> {
    let Within::Staging(shard) = record.within else { return None };
    let file = place::open_file(area.staging(shard), &record.name, OFlags::RDONLY).ok()?;
    record::header(file).map(|header| header.object)
}
