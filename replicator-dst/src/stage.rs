//! Staging: what arrives on a data stream becomes complete files in our own
//! directory, so that applying is a rename.
//!
//! One [`Stager`] serves one data stream, on a thread of its own and in a
//! staging directory of its own. Memory is bounded by one frame, and what waits to be
//! written of large files: three mebibytes for each of up to four, and 29 more that all
//! of the process share. What a session before this one left there is used where the
//! source says so (see [`crate::kept`]).

mod behind;
mod direct;
mod early;
mod open;
mod reuse;

use std::collections::VecDeque;
use std::fs::File;
use std::io::BufWriter;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use foldhash::{HashMap, HashMapExt};
use replicator_common::id::{BatchId, ObjectId, TransferId};
use replicator_common::name::Name;
use replicator_common::object::{Kind, ObjectState};
use replicator_common::status::Shortfalls;
use replicator_common::sys::{handle, place};
use replicator_common::wire::{Hash, Layout, PACK_MAX, PackedObject, Piece, TransferBegin};
use rustix::fs::OFlags;
use rustix::io::Errno;

use crate::apply::{Place, Within};
use crate::area::{Area, AreaError};
use crate::attributes::{self, Origin};
use crate::kept::{self, Kept};
use crate::locate::Locator;
use crate::nest::{Nesting, Nests};
use crate::objects::Objects;
use crate::patch::PatchWriter;
use crate::record::RecordWriter;
use crate::session::{StagedFile, StagedTransfer};
use crate::store::{Store, StoreError};
use direct::{DIRECT_MIN, Direct};
use early::{EARLY, Early};
use reuse::Reuse;

/// The most transfers that one stream may have open.
const OPEN_MAX: usize = 256;
/// How many of them may be written past the page cache: each has a thread and three mebibytes
/// of its own.
const DIRECT_MAX: usize = 4;
/// Mode of what is not the replica's yet.
const PRIVATE: u32 = 0o600;

/// Why something was not staged.
#[derive(Debug, thiserror::Error)]
pub enum StageError {
    /// The replica's file system said no; trying again may help.
    #[error(transparent)]
    Area(#[from] AreaError),
    /// The objects map could not be read.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The source broke the protocol.
    #[error("{0}")]
    Breach(String),
    /// The transfer cannot be put together here; the source sends it anew.
    #[error("transfer {transfer}: {reason}")]
    Refused {
        /// Which.
        transfer: TransferId,
        /// Why.
        reason: String,
    },
}

/// The list of a patch that is being written, and its name in staging.
type List = (Name, PatchWriter<BufWriter<File>>);

/// A transfer that is under way.
struct Open {
    object: ObjectId,
    state: ObjectState,
    layout: Layout,
    basis: Option<OwnedFd>,
    name: Name,
    file: OwnedFd,
    list: Option<List>,
    /// Which chunks are in the file, for the next session if this one ends.
    record: RecordWriter,
    /// What was kept of a transfer before this one.
    reuse: Option<Reuse>,
    /// How literal bytes are written, and which chunks wait for that.
    direct: Option<Direct>,
    waiting: VecDeque<(u64, u32, Hash)>,
    /// Whether they may go past the page cache.
    may_bypass: bool,
    /// Bytes taken since the file was last brought to disk.
    unsynced: u64,
    /// Bytes of the object that the pieces covered so far.
    offset: u64,
    /// Bytes written to the literals of a patch.
    literal: u64,
}

/// Stages what one data stream brings.
pub struct Stager {
    area: Arc<Area>,
    store: Arc<Store>,
    locator: Locator,
    /// The last batch applied: a basis must not be older than that.
    applied: Arc<AtomicU64>,
    shard: u8,
    kept: Arc<Kept>,
    nesting: Nesting,
    early: Early,
    /// A file of this size is not too large for the replica's file system, bytes.
    holds: u64,
    open: HashMap<TransferId, Open>,
    /// What could not be held, since last taken.
    pub shortfalls: Shortfalls,
}

impl Stager {
    /// The most digits of an object in a staged name; longer ones are cut.
    pub const OBJECT_DIGITS: usize = 160;

    /// For one data stream.
    pub fn new(
        area: Arc<Area>,
        store: Arc<Store>,
        locator: Locator,
        applied: Arc<AtomicU64>,
        (kept, nests, sync_failed): (Arc<Kept>, Arc<Nests>, Arc<AtomicBool>),
        shard: u8,
    ) -> Self {
        let nesting = Nesting::new(nests, kept.clone(), shard);
        Self {
            nesting,
            early: Early::new(sync_failed),
            holds: 0,
            area,
            store,
            locator,
            applied,
            shard,
            kept,
            open: HashMap::new(),
            shortfalls: Shortfalls::default(),
        }
    }

    fn place(&self, name: &Name) -> Place {
        Place { within: Within::Staging(self.shard), name: name.clone() }
    }

    /// A staging name that says what it is, for the manifest after a crash:
    /// kind and number, then the object as far as it fits.
    fn name(&self, kind: char, of: impl std::fmt::Display, object: &ObjectId) -> Name {
        let object = object.to_file_name();
        let object = &object[..object.len().min(Self::OBJECT_DIGITS)];
        let text = format!("{kind}{of}.{}.{object}", self.kept.number());
        Name::new(text.as_bytes()).unwrap_or_else(|_| unreachable!("under 255 bytes, no slash"))
    }

    fn create(&self, name: &Name, mode: u32) -> Result<OwnedFd, AreaError> {
        let directory = self.area.staging(self.shard);
        match place::create_file_with(directory, name, mode) {
            // Of an attempt before this one, which failed half-way.
            Err(Errno::EXIST) => place::unlink(directory, name)
                .and_then(|()| place::create_file_with(directory, name, mode)),
            result => result,
        }
        .map_err(AreaError::system("create", name))
    }

    /// Removes staged files that are not needed.
    pub fn discard(area: &Area, places: &[Place]) {
        for place in places {
            // What stays is removed when the next session begins.
            match &place.within {
                Within::Staging(shard) => {
                    let _ = place::unlink(area.staging(*shard), &place.name);
                }
                Within::Nest(shard, nest) => {
                    let nest = place::open_directory(area.staging(*shard), nest);
                    let _ = nest.map(|nest| place::unlink(nest.as_fd(), &place.name));
                }
                Within::Replica(_) | Within::Orphans | Within::LostAndFound => {}
            }
        }
    }

    /// Stages a packed object, with what will be its neighbours where it is said
    /// what those are.
    pub fn pack(
        &mut self,
        batch: BatchId,
        packed: &PackedObject,
        bytes: &[u8],
        spot: Option<(&ObjectId, &Name)>,
    ) -> Result<StagedFile, StageError> {
        check_packed(packed, bytes)?;
        let mode = packed.state.attributes.mode;
        let nested = spot.and_then(|(directory, name)| {
            let create = |nest: &OwnedFd| place::create_file_with(nest.as_fd(), name, mode);
            self.nesting.create(batch, directory, name, create)
        });
        let (file, place) = match nested {
            Some(nested) => nested,
            None => {
                let name = self.name('p', batch, &packed.object);
                (self.create(&name, mode)?, self.place(&name))
            }
        };
        let written = self.fill((&file, &place), packed, bytes);
        match &written {
            Ok(staged) => self.nesting.note(&packed.object, staged),
            Err(_) => Self::discard(&self.area, &[place]),
        }
        written
    }

    /// A frame was staged.
    pub fn frame_done(&mut self) {
        self.nesting.list();
    }

    /// Whether anything waits to be written with what follows.
    pub fn is_waiting(&self) -> bool {
        self.open.values().any(Open::is_waiting)
    }

    /// Nothing more is there for now: writes all that waits to be written with what
    /// follows. What cannot be written now will be, or is told of, later.
    pub fn settle(&mut self) {
        for open in self.open.values_mut() {
            let _ = open.settle();
        }
    }

    fn fill(
        &mut self,
        (file, place): (&OwnedFd, &Place),
        packed: &PackedObject,
        bytes: &[u8],
    ) -> Result<StagedFile, StageError> {
        let name = &place.name;
        let failed = |action| AreaError::system(action, name);
        let mut from = 0;
        for extent in &packed.extents {
            let length = usize::try_from(extent.length).unwrap_or(usize::MAX);
            let part = &bytes[from..from + length];
            place::write_at(file, part, extent.offset).map_err(failed("write"))?;
            from += length;
        }
        let end = packed.extents.last().map_or(0, |extent| extent.offset + extent.length);
        if end != packed.state.size {
            place::set_size(file, packed.state.size).map_err(failed("set size of"))?;
        }
        let staged = self.finish(file, place, &packed.object, &packed.state, Origin::Ours)?;
        Ok(StagedFile { bytes: bytes.len() as u64, ..staged })
    }

    /// Gives a file that has its content all else.
    fn finish(
        &mut self,
        file: &OwnedFd,
        place: &Place,
        object: &ObjectId,
        state: &ObjectState,
        origin: Origin,
    ) -> Result<StagedFile, StageError> {
        let name = &place.name;
        attributes::apply(file.as_fd(), state, origin, &mut self.shortfalls, &|| {
            object.to_string()
        })
        .map_err(AreaError::system("set attributes of", name))?;
        let handle = handle::identify(file.as_fd()).map_err(AreaError::system("identify", name))?;
        let (place, bytes) = (place.clone(), state.size);
        Ok(StagedFile { place, handle, state: state.clone(), bytes })
    }

    /// A transfer begins.
    pub fn begin(&mut self, begin: TransferBegin) -> Result<(), StageError> {
        if self.open.len() >= OPEN_MAX || self.open.contains_key(&begin.transfer) {
            return Err(StageError::Breach(format!(
                "transfer {} is open already, or too many are",
                begin.transfer
            )));
        }
        if begin.state.kind != Kind::File {
            return Err(StageError::Breach("a transfer of what is no file".to_owned()));
        }
        let basis = self.basis(&begin)?;
        let name = self.name('t', begin.transfer, &begin.object);
        let place = self.place(&name);
        let (file, record, list) = self.create_all(&place, &begin).inspect_err(|_| {
            // Another attempt has another name.
            let twins = [kept::record_of(&place), kept::list_of(&place)];
            let all: Vec<_> = twins.into_iter().flatten().chain([place.clone()]).collect();
            Self::discard(&self.area, &all);
        })?;
        let bypassing = self.open.values().filter(|open| open.may_bypass).count();
        let may_bypass = list.is_none() && begin.state.size >= DIRECT_MIN && bypassing < DIRECT_MAX;
        let open = Open {
            direct: None,
            waiting: VecDeque::new(),
            may_bypass,
            unsynced: 0,
            object: begin.object,
            state: begin.state,
            layout: begin.layout,
            basis,
            name,
            file,
            list,
            record,
            reuse: None,
            offset: 0,
            literal: 0,
        };
        self.open.insert(begin.transfer, open);
        Ok(())
    }

    /// The files of a transfer: its bytes, their record, the list of a patch.
    fn create_all(
        &mut self,
        place: &Place,
        begin: &TransferBegin,
    ) -> Result<(OwnedFd, RecordWriter, Option<List>), AreaError> {
        self.probe_size(place, begin.state.size)?;
        let file = self.create(&place.name, PRIVATE)?;
        let record = self.begin_record(place, begin)?;
        let list = match begin.layout {
            Layout::Replace => None,
            Layout::Patch => {
                let name = kept::list_of(place).ok_or_else(|| unnamed(&place.name))?.name;
                let out = BufWriter::new(File::from(self.create(&name, PRIVATE)?));
                let writer = PatchWriter::create(out).map_err(|e| io_failed(&e, &name))?;
                Some((name, writer))
            }
        };
        Ok((file, record, list))
    }

    /// A file larger than this file system can hold is found out now, not when all of
    /// it has come, nor when a patch is applied that is logged.
    ///
    /// The file that is made for it is left to be replaced: ext4 writes all of one that
    /// was once cut to nothing when it is closed (auto_da_alloc), and holds up for as
    /// long what is staged next.
    fn probe_size(&mut self, place: &Place, size: u64) -> Result<(), AreaError> {
        if size <= self.holds {
            return Ok(());
        }
        let probe = self.create(&place.name, PRIVATE)?;
        self.holds = self.holds.max(probe_size(&probe, &place.name, size)?);
        Ok(())
    }

    /// The basis, if it is what the source believes (trap 5).
    fn basis(&self, begin: &TransferBegin) -> Result<Option<OwnedFd>, StageError> {
        let refused = |reason: &str| StageError::Refused {
            transfer: begin.transfer,
            reason: reason.to_owned(),
        };
        let Some(basis) = &begin.basis else {
            return match begin.layout {
                Layout::Replace => Ok(None),
                Layout::Patch => Err(StageError::Breach("a patch without a basis".to_owned())),
            };
        };
        if begin.layout == Layout::Patch && *basis != begin.object {
            return Err(StageError::Breach("a patch of another object".to_owned()));
        }
        let known = self.store.get(basis)?.ok_or_else(|| refused("the basis is not here"))?;
        // The map runs ahead of the replica while a batch is being applied.
        let applied = self.applied.load(Ordering::Acquire);
        if known.content != begin.basis_version || known.content.0 > applied {
            return Err(refused("the basis has another version"));
        }
        let file =
            self.locator.open::<_, StageError>(&*self.store, basis, &known, OFlags::RDONLY)?;
        file.map(Some).ok_or_else(|| refused("the basis cannot be found"))
    }

    /// Pieces of a transfer arrived, with the bytes of those that are data; all of
    /// them are, or it is one. Those of a transfer that was refused are passed over.
    ///
    /// After an error that is the file system's, the same may be tried again.
    pub fn pieces(
        &mut self,
        transfer: TransferId,
        pieces: &[Piece],
        data: &[u8],
    ) -> Result<(), StageError> {
        let Some(open) = self.open.get_mut(&transfer) else { return Ok(()) };
        let result = match pieces {
            [Piece::Data { .. }, ..] => open.data(transfer, pieces, data),
            _ => pieces.iter().try_for_each(|piece| open.add(transfer, piece)),
        };
        let result = open.without_room(transfer, result);
        if open.unsynced >= EARLY && self.early.sync(&open.file) {
            open.unsynced = 0;
        }
        if matches!(result, Err(StageError::Refused { .. })) {
            self.abort(transfer);
        }
        result
    }

    /// Writes all that waits of a transfer: what the disk has to say of it is said now.
    ///
    /// After an error that is the file system's, the same may be tried again.
    pub fn flush(&mut self, transfer: TransferId) -> Result<(), StageError> {
        let Some(open) = self.open.get_mut(&transfer) else { return Ok(()) };
        let flushed = open.flush().map_err(StageError::from);
        let result = open.without_room(transfer, flushed);
        if matches!(result, Err(StageError::Refused { .. })) {
            self.abort(transfer);
        }
        result
    }

    /// All pieces have arrived, and are [written](Self::flush); `None` for a transfer
    /// that was refused.
    pub fn end(
        &mut self,
        transfer: TransferId,
        state: ObjectState,
    ) -> Result<Option<(ObjectId, StagedTransfer)>, StageError> {
        let Some(mut open) = self.open.remove(&transfer) else { return Ok(None) };
        if open.offset != state.size || state.kind != open.state.kind {
            open.forget();
            self.discard_open(&open);
            let reason = format!("{} bytes arrived of a file of {}", open.offset, state.size);
            return Err(StageError::Refused { transfer, reason });
        }
        let list = open.list.take();
        let flushed = open.flush();
        // The record has nothing more to tell.
        open.waiting.clear();
        let places = [Some(&open.name), list.as_ref().map(|(name, _)| name)];
        let mut places: Vec<_> =
            places.into_iter().flatten().map(|name| self.place(name)).collect();
        places.extend(kept::record_of(&self.place(&open.name)));
        match flushed.map_err(StageError::from).and_then(|()| self.complete(&open, list, &state)) {
            Ok(staged) => {
                // What it needed of that is in the new file.
                let used = open.reuse.as_ref().map(Reuse::places).unwrap_or_default();
                Self::discard(&self.area, &used);
                Ok(Some((open.object.clone(), staged)))
            }
            Err(error) => {
                open.forget();
                places.extend(open.reuse.iter().flat_map(Reuse::places));
                Self::discard(&self.area, &places);
                Err(error)
            }
        }
    }

    fn complete(
        &mut self,
        open: &Open,
        list: Option<List>,
        state: &ObjectState,
    ) -> Result<StagedTransfer, StageError> {
        if let Some((name, writer)) = list {
            writer.finish().map_err(|e| io_failed(&e, &name))?;
            return Ok(StagedTransfer::Patch {
                literals: self.place(&open.name),
                list: self.place(&name),
                bytes: open.literal,
            });
        }
        place::set_size(&open.file, state.size)
            .map_err(AreaError::system("set size of", &open.name))?;
        let (file, origin) = (&open.file, open.origin());
        let place = self.place(&open.name);
        let whole = self.finish(file, &place, &open.object, state, origin)?;
        Ok(StagedTransfer::Whole(whole))
    }

    /// Bytes of the object that have come so far; `None` when it is not open here.
    pub fn staged(&self, transfer: TransferId) -> Option<u64> {
        self.open.get(&transfer).map(|open| open.offset)
    }

    /// A transfer is given up; `false` when it is not open here.
    pub fn abort(&mut self, transfer: TransferId) -> bool {
        match self.open.remove(&transfer) {
            Some(mut open) => {
                open.forget();
                self.discard_open(&open);
                true
            }
            None => false,
        }
    }

    fn discard_open(&self, open: &Open) {
        let place = self.place(&open.name);
        let mut places: Vec<_> = kept::record_of(&place).into_iter().collect();
        places.push(place);
        places.extend(open.list.as_ref().map(|(name, _)| self.place(name)));
        places.extend(open.reuse.iter().flat_map(Reuse::places));
        Self::discard(&self.area, &places);
    }
}

/// Finds out by an empty file of ours, `name`, whether the file system holds one of `size`
/// bytes; gives the size up to which it does, in bytes: what grows bit by bit, or is one
/// of many, is not probed each time.
///
/// # Errors
/// It does not, or its error.
pub(crate) fn probe_size(probe: &OwnedFd, name: &Name, size: u64) -> Result<u64, AreaError> {
    let more = size.checked_next_power_of_two().unwrap_or(size);
    if place::set_size(probe, more).is_ok() {
        return Ok(more);
    }
    place::set_size(probe, size).map_err(AreaError::system("set size of", name))?;
    Ok(size)
}

fn unnamed(name: &Name) -> AreaError {
    AreaError::system("name a file beside", name)(Errno::INVAL)
}

fn io_failed(error: &std::io::Error, name: &Name) -> AreaError {
    AreaError::system("write", name)(Errno::from_io_error(error).unwrap_or(Errno::IO))
}

fn check_packed(packed: &PackedObject, content: &[u8]) -> Result<(), StageError> {
    let breach = |what: &str| Err(StageError::Breach(format!("object {}: {what}", packed.object)));
    if packed.state.kind != Kind::File {
        return breach("packed, but no file");
    }
    if packed.state.size > PACK_MAX {
        return breach("too large to be packed");
    }
    let (mut end, mut bytes) = (0u64, 0u64);
    for extent in &packed.extents {
        let next = extent.offset.checked_add(extent.length);
        match next {
            Some(next) if extent.offset >= end && next <= packed.state.size => end = next,
            _ => return breach("extents overlap or leave the file"),
        }
        bytes += extent.length;
    }
    if bytes != content.len() as u64 {
        return breach("extents and bytes differ in length");
    }
    if Hash::of(content) != packed.hash {
        return breach("wrong hash");
    }
    Ok(())
}
