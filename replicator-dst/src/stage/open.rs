//! A transfer under way: how its pieces become the bytes of its files.

use replicator_common::id::TransferId;
use replicator_common::sys::place;
use replicator_common::wire::{Extent, Hash, Layout, PIECE_MAX, Piece};

use super::direct::Direct;
use super::{Open, StageError, io_failed};
use crate::area::AreaError;
use crate::patch::PatchPiece;

/// Chunks of a transfer that wait to be written at most: twice what fills all that may wait
/// (some 64 of the average length a mebibyte).
const WAITING_MAX: usize = 4096;

impl Open {
    pub(super) fn add(&mut self, transfer: TransferId, piece: &Piece) -> Result<(), StageError> {
        let length = piece.length();
        if self.offset.checked_add(length).is_none_or(|end| end > i64::MAX as u64) {
            return Err(StageError::Breach(format!("transfer {transfer} has no end")));
        }
        // What follows looks at the file, or is noted in order.
        self.settle()?;
        let failed = |action| AreaError::system(action, &self.name);
        let target = Extent { offset: self.offset, length };
        match piece {
            Piece::Data { .. } => {
                return Err(StageError::Breach(format!(
                    "transfer {transfer}: no bytes of a piece"
                )));
            }
            Piece::Kept { from, hash, .. } => {
                let bytes = self.kept_bytes(transfer, piece)?;
                let at = self.literal_at();
                if !(self.is_in_place() && *from == at) {
                    place::write_at(&self.file, &bytes, at).map_err(failed("write"))?;
                    self.record.push(at, bytes.len() as u32, hash).map_err(failed("write"))?;
                }
                self.literal(length)?;
            }
            Piece::Hole { .. } => {
                if let Some((name, list)) = &mut self.list {
                    list.push(&PatchPiece { target, literal: None })
                        .map_err(|e| io_failed(&e, name))?;
                } else if self.is_in_place() {
                    place::punch(&self.file, self.offset, length).map_err(failed("punch"))?;
                    self.record.void(self.offset, length).map_err(failed("write"))?;
                }
            }
            Piece::Copy { from, .. } => match (&self.basis, self.layout) {
                (None, _) => {
                    return Err(StageError::Breach("a copy without a basis".to_owned()));
                }
                (Some(_), Layout::Patch) if *from != self.offset => {
                    return Err(StageError::Breach("a patch moves bytes".to_owned()));
                }
                (Some(_), Layout::Patch) => {}
                // No file has these bytes: trying again would not help.
                (Some(_), Layout::Replace)
                    if from.checked_add(length).is_none_or(|end| end > i64::MAX as u64) =>
                {
                    return Err(StageError::Breach(format!("transfer {transfer} copies nothing")));
                }
                (Some(basis), Layout::Replace) => {
                    let copied = place::copy_range(basis, *from, &self.file, self.offset, length)
                        .map_err(failed("copy into"))?;
                    if copied != length {
                        let reason = "the basis is shorter than that".to_owned();
                        return Err(StageError::Refused { transfer, reason });
                    }
                    if self.is_in_place() {
                        self.record.void(self.offset, length).map_err(failed("write"))?;
                    }
                }
            },
        }
        self.offset += length;
        Ok(())
    }

    /// Bytes that came, of several pieces: they stand side by side here, too, and
    /// are written by one call.
    pub(super) fn data(
        &mut self,
        transfer: TransferId,
        pieces: &[Piece],
        data: &[u8],
    ) -> Result<(), StageError> {
        if self.offset.checked_add(data.len() as u64).is_none_or(|end| end > i64::MAX as u64) {
            return Err(StageError::Breach(format!("transfer {transfer} has no end")));
        }
        check_data(transfer, pieces, data)?;
        let mut at = self.literal_at();
        self.write(data, at)?;
        // One entry of a patch's list, as one write will do it.
        self.literal(data.len() as u64)?;
        // From here on it is taken: the same does not come again.
        self.unsynced += data.len() as u64;
        self.offset += data.len() as u64;
        for piece in pieces {
            if let Piece::Data { hash, length } = piece {
                self.waiting.push_back((at, *length, *hash));
                at += u64::from(*length);
            }
        }
        // What cannot be noted now is noted later, or is sent again to a session that
        // needs it.
        let _ = self.note_written();
        // Of honest pieces, so many are more than wait to be written.
        if self.waiting.len() > WAITING_MAX {
            let _ = self.settle();
            self.waiting.truncate(WAITING_MAX);
        }
        Ok(())
    }

    /// Writes literal bytes, or has them wait to be written with more.
    fn write(&mut self, bytes: &[u8], at: u64) -> Result<(), AreaError> {
        if self.may_bypass && self.direct.is_none() {
            self.direct = Direct::open(&self.file);
            self.may_bypass = self.direct.is_some();
        }
        let written = match &mut self.direct {
            Some(direct) => direct.write(bytes, at),
            None => place::write_at(&self.file, bytes, at),
        };
        written.map_err(AreaError::system("write", &self.name))
    }

    /// INVARIANT: the record names no chunk that is not in the file yet.
    fn note_written(&mut self) -> Result<(), AreaError> {
        let done = self.direct.as_ref().map_or(u64::MAX, Direct::done);
        while let Some((at, length, hash)) = self.waiting.front()
            && at + u64::from(*length) <= done
        {
            let pushed = self.record.push(*at, *length, hash);
            pushed.map_err(AreaError::system("write", &self.name))?;
            self.waiting.pop_front();
        }
        Ok(())
    }

    /// Whether anything waits to be written.
    pub(super) fn is_waiting(&self) -> bool {
        self.direct.as_ref().is_some_and(Direct::is_waiting)
    }

    /// Writes all that waits, and notes it.
    pub(super) fn settle(&mut self) -> Result<(), AreaError> {
        let flushed = self.flush();
        let noted = self.note_written();
        flushed.and(noted)
    }

    /// Writes all that waits.
    pub(super) fn flush(&mut self) -> Result<(), AreaError> {
        let flushed = self.direct.as_mut().map_or(Ok(()), Direct::flush);
        flushed.map_err(AreaError::system("write", &self.name))
    }

    /// Nobody needs what waits.
    pub(super) fn forget(&mut self) {
        self.direct = None;
        self.waiting.clear();
    }

    /// Where the next literal bytes are written.
    fn literal_at(&self) -> u64 {
        if self.list.is_some() { self.literal } else { self.offset }
    }

    /// So many literal bytes were written, and belong at the present offset.
    fn literal(&mut self, length: u64) -> Result<(), StageError> {
        let (at, target) = (self.literal_at(), Extent { offset: self.offset, length });
        if let Some((name, list)) = &mut self.list {
            list.push(&PatchPiece { target, literal: Some(at) })
                .map_err(|e| io_failed(&e, name))?;
            self.literal += length;
        }
        Ok(())
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        // For the next session. What is not written has not arrived.
        let _ = self.settle();
    }
}

/// Whether `data` is what the pieces, all of them data, say.
fn check_data(transfer: TransferId, pieces: &[Piece], data: &[u8]) -> Result<(), StageError> {
    let breach = |what: &str| Err(StageError::Breach(format!("transfer {transfer}: {what}")));
    let mut rest = data;
    for piece in pieces {
        let Piece::Data { hash, length } = piece else { return breach("a piece without bytes") };
        let length = *length as usize;
        if length > PIECE_MAX {
            return breach("a piece that is too long");
        }
        let Some((bytes, after)) = rest.split_at_checked(length) else {
            return breach("pieces and bytes differ in length");
        };
        if Hash::of(bytes) != *hash {
            return breach("wrong hash");
        }
        rest = after;
    }
    if rest.is_empty() { Ok(()) } else { breach("pieces and bytes differ in length") }
}
