//! Staging from what a session before this one had staged.

use std::os::fd::OwnedFd;

use replicator_common::chunk::Chunk;
use replicator_common::id::{BatchId, TransferId};
use replicator_common::sys::place;
use replicator_common::wire::{KeptChunk, PACK_MAX, PIECE_MAX, PackedAgain, Piece, TransferBegin};
use rustix::fs::OFlags;

use super::{Open, StageError, Stager, unnamed};
use crate::apply::{Place, Within};
use crate::area::AreaError;
use crate::attributes::Origin;
use crate::kept::{self, Packed, Parts};
use crate::record::{Header, RecordWriter};
use crate::session::StagedFile;

/// What was kept of an object and serves a transfer of it.
pub(super) enum Reuse {
    /// It is the transfer's own file.
    InPlace,
    /// It stands beside it until the transfer ends.
    Beside { content: OwnedFd, parts: Parts },
}

impl Reuse {
    /// The files that are of no use after the transfer.
    pub(super) fn places(&self) -> Vec<Place> {
        match self {
            Self::InPlace => Vec::new(),
            Self::Beside { parts, .. } => parts.places(),
        }
    }
}

impl Stager {
    /// Stages a small object whose content is in staging already. `None` when it
    /// is not, which the source was told otherwise.
    pub fn again(
        &mut self,
        batch: BatchId,
        again: &PackedAgain,
    ) -> Result<Option<StagedFile>, StageError> {
        let state = &again.state;
        if state.kind != replicator_common::object::Kind::File || state.size > PACK_MAX {
            let what = format!("object {} of batch {batch}: not packed before", again.object);
            return Err(StageError::Breach(what));
        }
        let Some(packed) = self.kept.claim(&again.object, &again.hash, state.size) else {
            return Ok(None);
        };
        let staged = self.renew(again, &packed);
        if staged.is_err() {
            self.kept.give_back(again.object.clone(), packed);
        }
        staged.map(Some)
    }

    fn renew(&mut self, again: &PackedAgain, packed: &Packed) -> Result<StagedFile, StageError> {
        let name = &packed.place.name;
        let Within::Staging(shard) = packed.place.within else { return Err(unnamed(name).into()) };
        let file = place::open_path(self.area.staging(shard), name)
            .map_err(AreaError::system("open", name))?;
        self.finish(&file, &packed.place, &again.object, &again.state, Origin::Any)
    }

    pub(super) fn begin_record(
        &self,
        content: &Place,
        begin: &TransferBegin,
    ) -> Result<RecordWriter, AreaError> {
        let name = kept::record_of(content).ok_or_else(|| unnamed(&content.name))?.name;
        let file = self.create(&name, super::PRIVATE)?;
        let was = (begin.state.size, begin.state.attributes.mtime);
        let header = Header { object: begin.object.clone(), was };
        RecordWriter::create(file, &header).map_err(AreaError::system("write", &name))
    }

    /// What was kept of the object serves this transfer, which has just begun.
    pub fn reuse(&mut self, transfer: TransferId, in_place: bool) -> Result<(), StageError> {
        let Some(open) = self.open.get(&transfer) else { return Ok(()) };
        if open.offset != 0 || open.reuse.is_some() {
            let what = format!("transfer {transfer} has begun without what was kept");
            return Err(StageError::Breach(what));
        }
        let refused = |reason: String| StageError::Refused { transfer, reason };
        let result = match self.kept.take(&open.object) {
            None => Err(refused("nothing is kept of the object".to_owned())),
            Some(parts) => self.take_over(transfer, &parts, in_place).map_err(|error| {
                Self::discard(&self.area, &parts.places());
                refused(format!("what was kept cannot be used: {error}"))
            }),
        };
        if result.is_err() {
            self.abort(transfer);
        }
        result
    }

    fn take_over(
        &mut self,
        transfer: TransferId,
        parts: &Parts,
        in_place: bool,
    ) -> Result<(), AreaError> {
        let ours = self.area.staging(self.shard);
        let Some(open) = self.open.get_mut(&transfer) else { return Ok(()) };
        let Within::Staging(shard) = parts.content.within else {
            return Err(unnamed(&parts.content.name));
        };
        let theirs = self.area.staging(shard);
        let name = &parts.content.name;
        let flags = if in_place { OFlags::RDWR } else { OFlags::RDONLY };
        let content =
            self.kept.open(&parts.content, flags).map_err(AreaError::system("open", name))?;
        if !in_place {
            open.reuse = Some(Reuse::Beside { content, parts: parts.clone() });
            return Ok(());
        }
        let place = Place { within: Within::Staging(self.shard), name: open.name.clone() };
        let record = kept::record_of(&place).ok_or_else(|| unnamed(name))?.name;
        let file = place::open_file(theirs, &parts.record.name, OFlags::RDWR)
            .map_err(AreaError::system("open", &parts.record.name))?;
        // Over the empty ones of this transfer. A crash between the two costs
        // what was kept, and no more.
        place::rename(theirs, &parts.record.name, ours, &record)
            .map_err(AreaError::system("rename", &record))?;
        place::rename(theirs, name, ours, &open.name).map_err(AreaError::system("rename", name))?;
        if let Some(list) = kept::list_of(&parts.content) {
            let _ = place::unlink(theirs, &list.name);
        }
        let was = (open.state.size, open.state.attributes.mtime);
        let header = Header { object: open.object.clone(), was };
        let resumed = RecordWriter::resume(file, &header);
        open.record = resumed.map_err(AreaError::system("write", &record))?;
        open.file = content;
        // (A piece of no bytes may have come before.)
        open.forget();
        open.reuse = Some(Reuse::InPlace);
        Ok(())
    }
}

impl Open {
    pub(super) fn is_in_place(&self) -> bool {
        matches!(self.reuse, Some(Reuse::InPlace))
    }

    /// Whether the file may have attributes of before.
    pub(super) fn origin(&self) -> Origin {
        if self.is_in_place() { Origin::Any } else { Origin::Ours }
    }

    /// The bytes of a [`Piece::Kept`]; the transfer is refused when they are not
    /// what the source believes.
    pub(super) fn kept_bytes(
        &self,
        transfer: TransferId,
        piece: &Piece,
    ) -> Result<Vec<u8>, StageError> {
        let Piece::Kept { from, length, hash } = *piece else { return Ok(Vec::new()) };
        let file = match &self.reuse {
            None => {
                let what = format!("transfer {transfer} uses what was not kept for it");
                return Err(StageError::Breach(what));
            }
            Some(Reuse::InPlace) => &self.file,
            Some(Reuse::Beside { content, .. }) => content,
        };
        let end = from.checked_add(u64::from(length));
        if length as usize > PIECE_MAX || end.is_none_or(|end| end > i64::MAX as u64) {
            return Err(StageError::Breach(format!("a kept piece of {length} bytes at {from}")));
        }
        let kept = KeptChunk { from, chunk: Chunk { length, hash } };
        kept::read_chunk(file, &kept).ok_or_else(|| StageError::Refused {
            transfer,
            reason: "what was kept is not what the source was told".to_owned(),
        })
    }

    /// A transfer that needs room for a second copy of what was kept, and has
    /// none, is begun anew without it.
    pub(super) fn without_room(
        &self,
        transfer: TransferId,
        result: Result<(), StageError>,
    ) -> Result<(), StageError> {
        match result {
            Err(StageError::Area(error))
                if error.is_no_room() && matches!(self.reuse, Some(Reuse::Beside { .. })) =>
            {
                let reason = format!("no room beside what was kept: {error}");
                Err(StageError::Refused { transfer, reason })
            }
            result => result,
        }
    }
}
