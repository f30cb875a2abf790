//! Nests: directories in staging in which the files of a directory that a batch
//! makes are staged side by side, under the names they will have. When the batch
//! is sealed, a nest that holds just that becomes the directory: one rename in
//! place of one for each file, which is a third of what a small file costs here.
//!
//! A name in staging (`n<batch>.<number>.<directory>`) is all there is of a nest;
//! which object stands in it under which name is listed beside it
//! (`i<batch>.<number>`, one list for each stager and batch), for a session or a
//! failover that comes after this one: [`dissolve`].
//!
//! INVARIANT (a batch is all or nothing): nothing is put into a nest once its
//! batch is being sealed (`Nests::close`); it is then a directory of the
//! replica, or about to be.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use foldhash::{HashMap, HashMapExt, HashSet};
use replicator_common::codec;
use replicator_common::id::{BatchId, ObjectId, ReplicaHandle};
use replicator_common::name::Name;
use replicator_common::object::Kind;
use replicator_common::sys::{handle, place};
use replicator_common::wire::Op;
use rustix::fs::OFlags;
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use crate::apply::plan::Staged;
use crate::apply::{Place, Within, arrivals};
use crate::area::{Area, AreaError, SHARDS};
use crate::kept::Kept;
use crate::session::{BATCHES_AHEAD_MAX, StagedFile, WholeBatch};
use crate::stage::Stager;

/// The most nests of all batches on their way, some 250 bytes of memory each; files of
/// further directories are staged without.
const NESTS_MAX: usize = 1 << 16;
/// The most bytes of one entry of a list: two names, an object's id and a handle.
const ENTRY_MAX: usize = 2 << 10;
/// The most entries of a list, and lists of a batch; what is more stays unlisted.
const LIST_MAX: usize = 1 << 16;
const LISTS_MAX: usize = 64;

/// One nest.
#[derive(Debug)]
pub struct Nest {
    shard: u8,
    name: Name,
    /// What it may become.
    directory: ObjectId,
    /// Held while a name is put into it.
    closed: Mutex<bool>,
}

impl Nest {
    /// The nest as the directory of a place.
    pub fn within(&self) -> Within {
        Within::Nest(self.shard, self.name.clone())
    }

    /// Where the nest itself stands.
    fn place(&self) -> Place {
        Place { within: Within::Staging(self.shard), name: self.name.clone() }
    }

    fn gate(&self) -> MutexGuard<'_, bool> {
        self.closed.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What stands in staging for one batch beside its files.
#[derive(Debug, Default)]
struct OfBatch {
    nests: Vec<Arc<Nest>>,
    lists: Vec<Place>,
    /// Whoever remembers any of it asks whether it is still of this.
    alive: Arc<()>,
}

/// The nests of a replica.
#[derive(Debug)]
pub struct Nests {
    area: Arc<Area>,
    /// The last batch applied.
    applied: Arc<AtomicU64>,
    batches: Mutex<BTreeMap<BatchId, OfBatch>>,
}

impl Nests {
    /// Of a replica whose directories these are.
    pub fn new(area: Arc<Area>, applied: Arc<AtomicU64>) -> Self {
        Self { area, applied, batches: Mutex::default() }
    }

    /// Whether an honest source may be sending that batch.
    fn is_near(&self, batch: BatchId) -> bool {
        let ahead = batch.0.checked_sub(self.applied.load(Ordering::Acquire));
        ahead.is_some_and(|ahead| (1..=BATCHES_AHEAD_MAX).contains(&ahead))
    }

    fn batches(&self) -> MutexGuard<'_, BTreeMap<BatchId, OfBatch>> {
        // A panic of another holder leaves lists that are whole by themselves.
        self.batches.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Closes the nests of a batch, and of all before it: nothing more is put into
    /// them. Gives those of the batch.
    fn close(&self, batch: BatchId) -> Vec<Arc<Nest>> {
        let mut batches = self.batches();
        for of in batches.range_mut(..=batch).map(|(_, of)| of) {
            of.nests.iter().for_each(|nest| *nest.gate() = true);
        }
        batches.get(&batch).map(|of| of.nests.clone()).unwrap_or_default()
    }

    /// A batch is in its place, or given up: removes what is left of its nests, and
    /// of those before it. One that still holds something stays until the session ends.
    pub fn end(&self, batch: BatchId) {
        self.close(batch);
        let ended = {
            let mut batches = self.batches();
            let later = batches.split_off(&batch.next());
            std::mem::replace(&mut *batches, later)
        };
        for OfBatch { nests, lists, .. } in ended.into_values() {
            for nest in nests {
                let _ = place::remove_directory(self.area.staging(nest.shard), &nest.name);
            }
            Stager::discard(&self.area, &lists);
        }
    }

    /// Forgets all: [`dissolve`] has taken them apart.
    pub fn clear(&self) {
        self.batches().clear();
    }

    /// The nests that become directories: of each new directory of the batch the
    /// fullest that holds nothing but what it is to hold, each under its name and
    /// in need of nothing else.
    pub fn adopt(&self, batch: &WholeBatch, staged: &Staged) -> HashMap<ObjectId, Place> {
        let nests = self.close(batch.batch);
        let mut adopted = HashMap::new();
        if nests.is_empty() {
            return adopted;
        }
        let mut made: HashSet<&ObjectId> = batch.ops.iter().filter_map(made).collect();
        for op in &batch.ops {
            // A contradiction, which the plan will tell of.
            if let Op::Adopt { object, .. } | Op::Root { object } = op {
                made.remove(object);
            }
        }
        let mut fitting: HashMap<(&Within, &ObjectId), usize> = HashMap::new();
        arrivals::each(&batch.ops, staged, |(directory, name), place| {
            if place.name == *name && matches!(place.within, Within::Nest(..)) {
                *fitting.entry((&place.within, directory)).or_default() += 1;
            }
        });
        let mut full: Vec<_> = nests
            .iter()
            .filter(|nest| made.contains(&nest.directory))
            .filter_map(|nest| Some((*fitting.get(&(&nest.within(), &nest.directory))?, nest)))
            .collect();
        full.sort_by_key(|(count, _)| std::cmp::Reverse(*count));
        for (count, nest) in full {
            if !adopted.contains_key(&nest.directory) && self.names(nest) == Some(count) {
                adopted.insert(nest.directory.clone(), nest.place());
            }
        }
        adopted
    }

    /// How many names a nest has; one that cannot be looked at is not used.
    fn names(&self, nest: &Nest) -> Option<usize> {
        let directory = place::open_directory(self.area.staging(nest.shard), &nest.name).ok()?;
        Some(place::list(directory.as_fd()).ok()?.len())
    }
}

/// The directory that an operation makes.
fn made(op: &Op) -> Option<&ObjectId> {
    match op {
        Op::Put { object, state, new: true, .. } if state.kind == Kind::Directory => Some(object),
        _ => None,
    }
}

/// An entry of a list.
#[derive(Debug, Serialize, Deserialize)]
struct Listed {
    /// The nest's name.
    nest: Name,
    /// A name in it.
    name: Name,
    /// What stands there.
    object: ObjectId,
    /// The file. INVARIANT: what stands there and is another one is no such object: a
    /// batch that was being applied may have moved what is the replica's into a nest
    /// that becomes its directory.
    handle: ReplicaHandle,
}

/// One stager's nests: those of the batch that it stages for at present.
pub struct Nesting {
    nests: Arc<Nests>,
    kept: Arc<Kept>,
    shard: u8,
    batch: BatchId,
    /// What is remembered is of this.
    of: Weak<()>,
    /// By directory.
    known: HashMap<ObjectId, Arc<Nest>>,
    /// The last one, open.
    open: Option<(Arc<Nest>, Arc<OwnedFd>)>,
    /// With its length.
    list: Option<(OwnedFd, u64)>,
    listed: usize,
    unlisted: Vec<Listed>,
}

impl Nesting {
    /// For the stager of a shard.
    pub fn new(nests: Arc<Nests>, kept: Arc<Kept>, shard: u8) -> Self {
        Self {
            nests,
            kept,
            shard,
            batch: BatchId(0),
            of: Weak::new(),
            known: HashMap::new(),
            open: None,
            list: None,
            listed: 0,
            unlisted: Vec::new(),
        }
    }

    /// Makes a file in the nest of `directory` with `create`; `None` when there is
    /// no such nest, or no such file can be: then it is staged as any other.
    pub fn create(
        &mut self,
        batch: BatchId,
        directory: &ObjectId,
        name: &Name,
        create: impl FnOnce(&OwnedFd) -> Result<OwnedFd, Errno>,
    ) -> Option<(OwnedFd, Place)> {
        let (nest, fd) = self.nest(batch, directory)?;
        let gate = nest.gate();
        if *gate {
            return None;
        }
        let file = create(&fd).ok()?;
        drop(gate);
        Some((file, Place { within: nest.within(), name: name.clone() }))
    }

    /// An object was staged, in a nest or not.
    pub fn note(&mut self, object: &ObjectId, staged: &StagedFile) {
        if let Within::Nest(_, nest) = &staged.place.within {
            let (nest, name) = (nest.clone(), staged.place.name.clone());
            let (object, handle) = (object.clone(), staged.handle.clone());
            self.unlisted.push(Listed { nest, name, object, handle });
        }
    }

    fn nest(&mut self, batch: BatchId, directory: &ObjectId) -> Option<(Arc<Nest>, Arc<OwnedFd>)> {
        self.remember(batch)?;
        if let Some((nest, fd)) = &self.open
            && nest.directory == *directory
        {
            return Some((nest.clone(), fd.clone()));
        }
        let nest = match self.known.get(directory) {
            Some(known) => known.clone(),
            None => {
                let made = self.make(batch, directory)?;
                self.known.insert(directory.clone(), made.clone());
                made
            }
        };
        let staging = self.nests.area.staging(self.shard);
        let fd = Arc::new(place::open_directory(staging, &nest.name).ok()?);
        self.open = Some((nest.clone(), fd.clone()));
        Some((nest, fd))
    }

    /// Forgets what is of another batch, or of an attempt at this one before.
    fn remember(&mut self, batch: BatchId) -> Option<()> {
        if batch == self.batch && self.of.strong_count() > 0 {
            return Some(());
        }
        self.list();
        self.known.clear();
        (self.open, self.list, self.listed) = (None, None, 0);
        if !self.nests.is_near(batch) {
            return None;
        }
        self.batch = batch;
        self.of = Arc::downgrade(&self.nests.batches().entry(batch).or_default().alive);
        Some(())
    }

    /// What keeps a nest from being made (a full disk, too many links) will be told
    /// when the file is staged without.
    fn make(&self, batch: BatchId, directory: &ObjectId) -> Option<Arc<Nest>> {
        let digits = directory.to_file_name();
        let digits = &digits[..digits.len().min(Stager::OBJECT_DIGITS)];
        let text = format!("n{batch}.{}.{digits}", self.kept.number());
        let name = Name::new(text.as_bytes()).ok()?;
        let mut batches = self.nests.batches();
        if batches.values().map(|of| of.nests.len()).sum::<usize>() >= NESTS_MAX {
            return None;
        }
        let of = batches.entry(batch).or_default();
        place::make_directory(self.nests.area.staging(self.shard), &name).ok()?;
        let (shard, directory) = (self.shard, directory.clone());
        let nest = Arc::new(Nest { shard, name, directory, closed: Mutex::new(false) });
        of.nests.push(nest.clone());
        Some(nest)
    }

    /// Lists what was put into nests since this was called last.
    ///
    /// Durability: none. What is not listed when it is needed is not known to be
    /// an object's; it is sent again, or handed over under its name.
    pub fn list(&mut self) {
        let unlisted = std::mem::take(&mut self.unlisted);
        if !unlisted.is_empty() && self.try_list(&unlisted).is_none() {
            tracing::debug!("what was staged could not be listed");
        }
    }

    fn try_list(&mut self, entries: &[Listed]) -> Option<()> {
        self.listed += entries.len();
        if self.listed > LIST_MAX {
            return None;
        }
        let mut bytes = Vec::new();
        for entry in entries {
            let entry = codec::encode(entry).ok()?;
            bytes.extend_from_slice(&u32::try_from(entry.len()).ok()?.to_le_bytes());
            bytes.extend_from_slice(&entry);
        }
        if self.list.is_none() {
            let lists = |of: &OfBatch| of.lists.len();
            if self.nests.batches().get(&self.batch).map_or(0, lists) >= LISTS_MAX {
                return None;
            }
            let text = format!("i{}.{}", self.batch, self.kept.number());
            let name = Name::new(text.as_bytes()).ok()?;
            let file = place::create_file(self.nests.area.staging(self.shard), &name).ok()?;
            let place = Place { within: Within::Staging(self.shard), name };
            self.nests.batches().entry(self.batch).or_default().lists.push(place);
            self.list = Some((file, 0));
        }
        let (file, end) = self.list.as_mut()?;
        place::write_at(&*file, &bytes, *end).ok()?;
        *end += bytes.len() as u64;
        Some(())
    }
}

impl Drop for Nesting {
    fn drop(&mut self) {
        self.list();
    }
}

/// Takes all nests apart: what is listed gets the name that it would have had in
/// staging without. Only when nobody stages, and no logged step needs any of it.
///
/// What was not listed, or finds no place beside, stays in its nest.
pub fn dissolve(area: &Area) -> Result<(), AreaError> {
    for shard in 0..SHARDS {
        let staging = area.staging(shard);
        let failed = |action| AreaError::system(action, format!("staging/{shard}"));
        let names = place::list(staging).map_err(failed("list"))?;
        for (list, _) in names.iter().filter(|(name, _)| name.as_bytes().starts_with(b"i")) {
            // The last first: a name whose object failed, or was given up, may have
            // been used again.
            for entry in read_list(area, shard, list)?.into_iter().rev() {
                take_out(staging, &entry)?;
            }
            // What stays leads to nothing any more.
            let _ = place::unlink(staging, list);
        }
        for (nest, _) in names.iter().filter(|(name, _)| is_nest(name)) {
            // One that still holds something stays.
            let _ = place::remove_directory(staging, nest);
        }
    }
    Ok(())
}

/// Gives a file in a nest a name of its own in staging.
fn take_out(staging: BorrowedFd<'_>, entry: &Listed) -> Result<(), AreaError> {
    let nest = match place::open_directory(staging, &entry.nest) {
        Ok(nest) => nest,
        // It became a directory, or was removed.
        Err(Errno::NOENT | Errno::NOTDIR) => return Ok(()),
        Err(error) => return Err(AreaError::system("open", &entry.nest)(error)),
    };
    let found = handle::identify_entry(nest.as_fd(), &entry.name);
    if found.is_ok_and(|found| found == entry.handle)
        && let Some(name) = staged_name(entry)
    {
        let _ = place::rename_no_replace(nest.as_fd(), &entry.name, staging, &name);
    }
    Ok(())
}

/// Whether a name in staging is a nest's.
pub fn is_nest(name: &Name) -> bool {
    name.as_bytes().starts_with(b"n")
}

/// `n<batch>.<number>.<directory>` and an object: `p<batch>.<number>.<object>`.
fn staged_name(entry: &Listed) -> Option<Name> {
    let nest = entry.nest.to_string();
    let (front, _) = nest.strip_prefix('n')?.rsplit_once('.')?;
    let digits = entry.object.to_file_name();
    let digits = &digits[..digits.len().min(Stager::OBJECT_DIGITS)];
    Name::new(format!("p{front}.{digits}").as_bytes()).ok()
}

/// The entries of a list, as far as it can be read.
fn read_list(area: &Area, shard: u8, list: &Name) -> Result<Vec<Listed>, AreaError> {
    let mut entries = Vec::new();
    let file = place::open_file(area.staging(shard), list, OFlags::RDONLY)
        .map_err(AreaError::system("open", list))?;
    let mut file = std::io::BufReader::new(File::from(file));
    loop {
        let mut length = [0; 4];
        if entries.len() >= LIST_MAX || file.read_exact(&mut length).is_err() {
            return Ok(entries);
        }
        let length = u32::from_le_bytes(length) as usize;
        let mut bytes = vec![0; length.min(ENTRY_MAX)];
        if length > ENTRY_MAX || file.read_exact(&mut bytes).is_err() {
            return Ok(entries);
        }
        match codec::decode(&bytes) {
            Ok(entry) => entries.push(entry),
            Err(_) => return Ok(entries),
        }
    }
}
