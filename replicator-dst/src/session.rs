//! What has arrived in a session, and when a batch is whole. Pure.
//!
//! Streams have no order between them, so a batch is gathered from both sides:
//! its plan comes on the control stream, what the plan names comes on data
//! streams, before or after. A batch is handed on when `Commit` has come and
//! nothing that its plan names is missing; batches are handed on strictly in
//! order.

// Keys of the source's choice, at its leisure: hence std's hash, which withstands that.
use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};

use replicator_common::id::{BatchId, ObjectId, ReplicaHandle, TransferId};
use replicator_common::object::ObjectState;
use replicator_common::wire::{BatchHeader, ContentSource, Op, PLAN_OPS_MAX};

use crate::apply::Place;
use crate::kept;

/// The most operations of one batch: a plan is held in memory.
pub const BATCH_OPS_MAX: usize = 1 << 20;
/// The most packed objects of batches that are not sealed yet.
pub const PACKED_MAX: usize = 1 << 21;
/// How many batches may be on their way at once.
pub const BATCHES_AHEAD_MAX: u64 = 64;
/// The most transfers that are open or wait for their batch.
pub const TRANSFERS_MAX: usize = 1 << 16;

/// How many transfers that failed are remembered until a batch names them: one that names
/// them before it is known that they have arrived is on its way by then.
const FAILED_MAX: usize = 256;

/// The most bytes of memory that plans, and what is known of staged objects, may
/// take until their batches are handed on. An honest source has three batches
/// under way, of some 50,000 operations each at most; only the xattrs of its
/// objects can make that more than some 50 MiB.
pub const HELD_BYTES_MAX: usize = 512 << 20;

/// How the source broke the protocol. The session ends with it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[allow(missing_docs)]
pub enum Breach {
    #[error("batch {found} is out of order, {expected} is next")]
    Order { expected: BatchId, found: BatchId },
    #[error("batch {found} is too far ahead of {sealed}")]
    Ahead { sealed: BatchId, found: BatchId },
    #[error("{count} operations in one frame, the limit is {PLAN_OPS_MAX}")]
    Frame { count: usize },
    #[error("batch {batch} has more than {BATCH_OPS_MAX} operations")]
    Ops { batch: BatchId },
    #[error("batch {batch} was said to have {said} operations and has {found}")]
    Count { batch: BatchId, said: u64, found: u64 },
    #[error("batch {batch} was said to have {said} packed objects and names {found}")]
    Packed { batch: BatchId, said: u64, found: u64 },
    #[error("more than {PACKED_MAX} packed objects wait for their plans")]
    TooManyPacked,
    #[error("more than {TRANSFERS_MAX} transfers wait for their batches")]
    TooManyTransfers,
    #[error("plans and attributes of more than {} MiB wait for their batches", HELD_BYTES_MAX >> 20)]
    TooLong,
    #[error("transfer {transfer} is of another object than the plan says")]
    WrongObject { transfer: TransferId },
    #[error("transfer {transfer} ended twice")]
    EndedTwice { transfer: TransferId },
    #[error("batch {batch} names content for object {object} twice")]
    NamedTwice { batch: BatchId, object: ObjectId },
    #[error("the content that batch {batch} names for object {object} was given up or used before")]
    Gone { batch: BatchId, object: ObjectId },
}

/// A file in staging, complete but for its place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StagedFile {
    /// Where.
    pub place: Place,
    /// The staged file itself.
    pub handle: ReplicaHandle,
    /// Its state as set.
    pub state: ObjectState,
    /// Bytes it takes up.
    pub bytes: u64,
}

impl StagedFile {
    /// Bytes of memory, about.
    fn weight(&self) -> usize {
        size_of::<Self>() + self.state.weight() + self.place.weight()
    }
}

/// What a finished transfer left in staging.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StagedTransfer {
    /// A whole file.
    Whole(StagedFile),
    /// Literal bytes and their list.
    Patch {
        /// The bytes.
        literals: Place,
        /// The list.
        list: Place,
        /// Bytes they take up.
        bytes: u64,
    },
}

impl StagedTransfer {
    /// Where it is.
    pub fn places(&self) -> Vec<Place> {
        let mut places = match self {
            Self::Whole(file) => vec![file.place.clone()],
            Self::Patch { literals, list, .. } => vec![literals.clone(), list.clone()],
        };
        places.extend(self.record());
        places
    }

    /// The record of the transfer: of no use once its batch is committed.
    pub fn record(&self) -> Option<Place> {
        match self {
            Self::Whole(file) => kept::record_of(&file.place),
            Self::Patch { literals, .. } => kept::record_of(literals),
        }
    }

    /// Bytes of memory, about.
    fn weight(&self) -> usize {
        match self {
            Self::Whole(file) => file.weight(),
            Self::Patch { .. } => size_of::<Self>(),
        }
    }
}

/// A batch that can be sealed.
#[derive(Clone, Debug)]
pub struct WholeBatch {
    /// Its number.
    pub batch: BatchId,
    /// What it says of itself.
    pub header: BatchHeader,
    /// Its plan.
    pub ops: Vec<Op>,
    /// What the plan names, by object.
    pub content: HashMap<ObjectId, StagedTransfer>,
    /// Staged files that the plan does not name: earlier readings.
    pub superseded: Vec<Place>,
}

#[derive(Debug, Default)]
struct Gathering {
    ops: Vec<Op>,
    header: Option<BatchHeader>,
    packed: HashMap<(ObjectId, u32), StagedFile>,
    /// What arrived and could not be staged, with the reason.
    failed: HashMap<(ObjectId, u32), String>,
    /// What the plan names and has not arrived; filled when `header` is.
    missing_packed: HashSet<(ObjectId, u32)>,
    missing_transfers: HashSet<TransferId>,
    /// Those of them that could not be staged, with the reason, which is ours and short:
    /// the operations that name them are what counts.
    failed_transfers: HashMap<TransferId, String>,
    /// Bytes of memory that it takes: goes with it from [`Session::held`].
    weight: usize,
}

/// The session's state.
#[derive(Debug)]
pub struct Session {
    /// The last batch handed on.
    sealed: BatchId,
    /// The batch whose plan is being received.
    current: BatchId,
    batches: BTreeMap<BatchId, Gathering>,
    packed: usize,
    transfers: HashMap<TransferId, (ObjectId, StagedTransfer)>,
    /// Transfers that could not be staged, with the reason, which no batch has named yet;
    /// the oldest are forgotten.
    failed_transfers: VecDeque<(TransferId, String)>,
    /// Transfers that are still to come, and of which the batch was given back.
    unwanted: HashSet<TransferId>,
    /// Bytes of memory that all this takes.
    ///
    /// INVARIANT (bounded resources): at most [`HELD_BYTES_MAX`], and what one
    /// message adds.
    held: usize,
    /// This batch and all that follow were given back: what comes of their
    /// plans is passed over until the source says that it begins anew.
    returning: Option<BatchId>,
}

/// What becomes of a transfer that is staged as a whole.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Arrival {
    /// No batch names it yet.
    Early,
    /// A batch waits for it.
    Awaited,
    /// Its batch was given back: this is to be deleted.
    Unwanted(Vec<Place>),
}

/// A batch that is given back to the source.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Returned {
    /// Its number.
    pub batch: BatchId,
    /// What found no place, each with the reason.
    pub objects: Vec<(ObjectId, String)>,
    /// What was staged of it and of those behind it: to be deleted.
    pub places: Vec<Place>,
}

impl Session {
    /// Begins after `committed`.
    pub fn new(committed: BatchId) -> Self {
        Self {
            sealed: committed,
            current: committed.next(),
            batches: BTreeMap::new(),
            packed: 0,
            transfers: HashMap::new(),
            failed_transfers: VecDeque::new(),
            unwanted: HashSet::new(),
            held: 0,
            returning: None,
        }
    }

    fn gathering(&mut self, batch: BatchId) -> Result<&mut Gathering, Breach> {
        if batch.0 > self.sealed.0.saturating_add(BATCHES_AHEAD_MAX) {
            return Err(Breach::Ahead { sealed: self.sealed, found: batch });
        }
        Ok(self.batches.entry(batch).or_default())
    }

    /// So much more is to be held.
    fn hold(&mut self, bytes: usize) -> Result<(), Breach> {
        self.held = self.held.saturating_add(bytes);
        if self.held > HELD_BYTES_MAX { Err(Breach::TooLong) } else { Ok(()) }
    }

    fn expect(&self, batch: BatchId) -> Result<(), Breach> {
        if batch == self.current {
            Ok(())
        } else {
            Err(Breach::Order { expected: self.current, found: batch })
        }
    }

    /// Packed objects and transfers that are in staging, and not given back or
    /// handed on. For tests.
    pub(crate) fn staged(&self) -> usize {
        self.packed + self.transfers.len()
    }

    /// Whether parts of this batch's plan are wanted: they are not of one that was
    /// given back, nor out of order.
    pub fn awaits(&self, batch: BatchId) -> bool {
        batch == self.current && !self.is_returned(batch)
    }

    /// Part of a plan arrived. Returns what to delete: transfers that it names, if it
    /// is of a batch that was given back.
    pub fn plan(&mut self, batch: BatchId, ops: Vec<Op>) -> Result<Vec<Place>, Breach> {
        if self.is_returned(batch) {
            return Ok(self.pass_over(&ops, &HashMap::new()));
        }
        self.expect(batch)?;
        if ops.len() > PLAN_OPS_MAX {
            return Err(Breach::Frame { count: ops.len() });
        }
        let gathering = self.gathering(batch)?;
        if gathering.ops.len() + ops.len() > BATCH_OPS_MAX {
            return Err(Breach::Ops { batch });
        }
        let weight = ops.iter().map(Op::weight).sum();
        gathering.ops.extend(ops);
        gathering.weight += weight;
        self.hold(weight)?;
        Ok(Vec::new())
    }

    /// What the plan of a batch that was given back names is wanted no more, whether it
    /// is there or still comes, unless it `failed`. Returns what is there.
    fn pass_over(&mut self, ops: &[Op], failed: &HashMap<TransferId, String>) -> Vec<Place> {
        let mut places = Vec::new();
        for op in ops {
            let Op::Put { content: ContentSource::Transferred { transfer }, .. } = op else {
                continue;
            };
            let is_there = self.transfers.contains_key(transfer);
            places.extend(self.aborted(*transfer));
            let has_failed = failed.contains_key(transfer)
                || self.failed_transfers.iter().any(|(failed, _)| failed == transfer);
            let comes = !is_there && !has_failed;
            if comes && self.unwanted.len() < TRANSFERS_MAX {
                self.unwanted.insert(*transfer);
            }
        }
        places
    }

    /// The plan is whole.
    pub fn commit(&mut self, batch: BatchId, header: BatchHeader) -> Result<(), Breach> {
        if self.is_returned(batch) {
            return Ok(());
        }
        self.expect(batch)?;
        let ended: HashMap<_, _> =
            self.transfers.iter().map(|(id, (object, _))| (*id, object.clone())).collect();
        let failed: HashMap<_, _> = self.failed_transfers.iter().cloned().collect();
        let gathering = self.gathering(batch)?;
        let found = gathering.ops.len() as u64;
        if header.ops != found {
            return Err(Breach::Count { batch, said: header.ops, found });
        }
        let mut named = 0;
        for op in &gathering.ops {
            let Op::Put { object, content, .. } = op else { continue };
            match content {
                ContentSource::Packed { version } => {
                    named += 1;
                    let key = (object.clone(), *version);
                    if !gathering.packed.contains_key(&key) {
                        gathering.missing_packed.insert(key);
                    }
                }
                ContentSource::Transferred { transfer } => match ended.get(transfer) {
                    Some(of) if of != object => {
                        return Err(Breach::WrongObject { transfer: *transfer });
                    }
                    Some(_) => {}
                    None => {
                        gathering.missing_transfers.insert(*transfer);
                        if let Some(reason) = failed.get(transfer) {
                            gathering.failed_transfers.insert(*transfer, reason.clone());
                        }
                    }
                },
                ContentSource::Unchanged
                | ContentSource::Symlink { .. }
                | ContentSource::Appended(_) => {}
            }
        }
        // More may have been sent than the plan names: earlier readings.
        if named > header.packed {
            return Err(Breach::Packed { batch, said: header.packed, found: named });
        }
        gathering.header = Some(header);
        self.current = batch.next();
        Ok(())
    }

    /// The source gives up the batch it was sending. Returns what to delete.
    ///
    /// Packed objects of it that are still on their way will count for the
    /// batch of the same number that comes next; they do no harm there, since
    /// only what its plan names by version is used.
    ///
    /// Of a batch that was given back, nothing is deleted: what is staged now
    /// may be of its next attempt already.
    pub fn abandon(&mut self, batch: BatchId) -> Result<Vec<Place>, Breach> {
        if self.returning.take_if(|returned| *returned == batch).is_some() {
            self.current = batch;
            return Ok(Vec::new());
        }
        self.expect(batch)?;
        let gathering = self.batches.remove(&batch).unwrap_or_default();
        self.packed -= gathering.packed.len();
        self.held -= gathering.weight;
        Ok(gathering.packed.into_values().map(|file| file.place).collect())
    }

    /// A packed object is staged. Returns what to delete: it came too late, or
    /// a second time.
    pub fn packed(
        &mut self,
        batch: BatchId,
        object: ObjectId,
        version: u32,
        file: StagedFile,
    ) -> Result<Option<Place>, Breach> {
        if batch <= self.sealed {
            return Ok(Some(file.place));
        }
        if self.packed >= PACKED_MAX {
            return Err(Breach::TooManyPacked);
        }
        let key = (object, version);
        let gathering = self.gathering(batch)?;
        gathering.missing_packed.remove(&key);
        let weight = file.weight();
        gathering.weight += weight;
        let old = gathering.packed.insert(key, file);
        let gone = old.as_ref().map_or(0, StagedFile::weight);
        gathering.weight -= gone;
        self.held -= gone;
        self.packed += usize::from(old.is_none());
        self.hold(weight)?;
        Ok(old.map(|old| old.place))
    }

    /// A packed object could not be staged. If its batch turns out to need it,
    /// the batch is given back.
    pub fn failed(
        &mut self,
        batch: BatchId,
        object: ObjectId,
        version: u32,
        reason: String,
    ) -> Result<(), Breach> {
        if batch <= self.sealed {
            return Ok(());
        }
        let gathering = self.gathering(batch)?;
        if gathering.failed.len() >= PACKED_MAX {
            return Err(Breach::TooManyPacked);
        }
        let weight = size_of::<(ObjectId, u32, String)>() + reason.len();
        gathering.weight += weight;
        if let Some(old) = gathering.failed.insert((object, version), reason) {
            let gone = size_of::<(ObjectId, u32, String)>() + old.len();
            gathering.weight -= gone;
            self.held -= gone;
        }
        self.hold(weight)
    }

    /// Whether a batch is one of those that were given back.
    fn is_returned(&self, batch: BatchId) -> bool {
        self.returning.is_some_and(|returned| batch >= returned)
    }

    /// The next batch, if all that is missing of it could not be staged. Only
    /// when `applied`, the last batch applied, is the one before it: what is
    /// given back must be what follows the replica as it is.
    pub fn next_returned(&mut self, applied: BatchId) -> Option<Returned> {
        let next = self.sealed.next();
        let gathering = self.batches.get(&next).filter(|_| applied == self.sealed)?;
        let (packed, transfers) = (&gathering.missing_packed, &gathering.missing_transfers);
        let nothing_missing = packed.is_empty() && transfers.is_empty();
        if gathering.header.is_none()
            || nothing_missing
            || !packed.iter().all(|key| gathering.failed.contains_key(key))
            || !transfers.iter().all(|transfer| gathering.failed_transfers.contains_key(transfer))
        {
            return None;
        }
        let reason = |key: &(ObjectId, u32)| gathering.failed.get(key).cloned().unwrap_or_default();
        let packed = packed.iter().map(|key| (key.0.clone(), reason(key)));
        let transferred = gathering.ops.iter().filter_map(|op| match op {
            Op::Put { object, content: ContentSource::Transferred { transfer }, .. } => {
                let reason = gathering.failed_transfers.get(transfer)?;
                Some((object.clone(), reason.clone()))
            }
            _ => None,
        });
        let objects = packed.chain(transferred).collect();
        Some(self.give_back(next, objects))
    }

    /// Forgets a batch and all that follow.
    pub fn give_back(&mut self, batch: BatchId, objects: Vec<(ObjectId, String)>) -> Returned {
        let mut places = Vec::new();
        for gathering in self.batches.split_off(&batch).into_values() {
            self.packed -= gathering.packed.len();
            self.held -= gathering.weight;
            places.extend(gathering.packed.into_values().map(|file| file.place));
            places.extend(self.pass_over(&gathering.ops, &gathering.failed_transfers));
        }
        self.sealed = BatchId(batch.0 - 1);
        self.returning = Some(batch);
        Returned { batch, objects, places }
    }

    /// A transfer could not be staged. A batch that names it, or has named it, is
    /// given back.
    pub fn transfer_failed(&mut self, transfer: TransferId, reason: String) {
        if self.unwanted.remove(&transfer) {
            return;
        }
        let mut batches = self.batches.values_mut();
        if let Some(batch) = batches.find(|batch| batch.missing_transfers.contains(&transfer)) {
            batch.failed_transfers.insert(transfer, reason);
            return;
        }
        self.failed_transfers.push_back((transfer, reason));
        if self.failed_transfers.len() > FAILED_MAX {
            self.failed_transfers.pop_front();
        }
    }

    /// A transfer is staged as a whole.
    pub fn transferred(
        &mut self,
        transfer: TransferId,
        object: ObjectId,
        staged: StagedTransfer,
    ) -> Result<Arrival, Breach> {
        if self.unwanted.remove(&transfer) {
            return Ok(Arrival::Unwanted(staged.places()));
        }
        if self.transfers.len() >= TRANSFERS_MAX {
            return Err(Breach::TooManyTransfers);
        }
        // Nobody would delete what the first one left in staging.
        if self.transfers.contains_key(&transfer) {
            return Err(Breach::EndedTwice { transfer });
        }
        let mut arrival = Arrival::Early;
        for gathering in self.batches.values_mut() {
            if gathering.missing_transfers.remove(&transfer) {
                arrival = Arrival::Awaited;
            }
        }
        let weight = staged.weight();
        self.transfers.insert(transfer, (object, staged));
        self.hold(weight)?;
        Ok(arrival)
    }

    /// A transfer that had ended is given up. Returns what to delete.
    pub fn aborted(&mut self, transfer: TransferId) -> Vec<Place> {
        self.unwanted.remove(&transfer);
        let Some((_, staged)) = self.transfers.remove(&transfer) else { return Vec::new() };
        self.held -= staged.weight();
        staged.places()
    }

    /// The next batch that is whole, in order.
    pub fn next_whole(&mut self) -> Result<Option<WholeBatch>, Breach> {
        let next = self.sealed.next();
        let whole = self.batches.get(&next).is_some_and(|gathering| {
            gathering.header.is_some()
                && gathering.missing_packed.is_empty()
                && gathering.missing_transfers.is_empty()
        });
        if !whole {
            return Ok(None);
        }
        let Some(Gathering { ops, header: Some(header), mut packed, weight, .. }) =
            self.batches.remove(&next)
        else {
            return Ok(None);
        };
        self.packed -= packed.len();
        self.held -= weight;
        self.sealed = next;
        let mut content = HashMap::new();
        for op in &ops {
            let Op::Put { object, content: source, .. } = op else { continue };
            let staged = match source {
                ContentSource::Packed { version } => {
                    packed.remove(&(object.clone(), *version)).map(StagedTransfer::Whole)
                }
                ContentSource::Transferred { transfer } => match self.transfers.remove(transfer) {
                    Some((of, _)) if of != *object => {
                        return Err(Breach::WrongObject { transfer: *transfer });
                    }
                    other => other.map(|(_, staged)| {
                        self.held -= staged.weight();
                        staged
                    }),
                },
                ContentSource::Unchanged
                | ContentSource::Symlink { .. }
                | ContentSource::Appended(_) => continue,
            };
            // A transfer may be given up, or named by two batches, while a batch
            // waits. Without this the batch would be acknowledged without it.
            let Some(staged) = staged else {
                return Err(Breach::Gone { batch: next, object: object.clone() });
            };
            if content.insert(object.clone(), staged).is_some() {
                return Err(Breach::NamedTwice { batch: next, object: object.clone() });
            }
        }
        let superseded = packed.into_values().map(|file| file.place).collect();
        Ok(Some(WholeBatch { batch: next, header, ops, content, superseded }))
    }
}

#[cfg(test)]
mod tests;
