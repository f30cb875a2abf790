//! The bodies of the fuzz targets that concern this crate. For tests alone.

use std::collections::HashSet;

use replicator_common::fuzzing;
use replicator_common::id::{BatchId, BatchNonce, ObjectId, Seq, TransferId};
use replicator_common::name::Name;
use replicator_common::object::{Attributes, Kind, ObjectState};
use replicator_common::time::Timestamp;
use replicator_common::wire::{Appended, BatchHeader, ContentSource, Hash, Op};

use crate::apply::{Place, Step, Within};
use crate::objects::Known;
use crate::session::{Arrival, Breach, Returned, Session, StagedFile, StagedTransfer, WholeBatch};
use crate::store::{SetAsideItem, Standing};

/// Arbitrary bytes as a row of the commit log, as one of the store's other
/// tables, and as the plan that is kept for a manifest.
pub fn log_record(bytes: &[u8]) {
    fuzzing::record::<Vec<Step>>(bytes);
    fuzzing::record::<Known>(bytes);
    fuzzing::record::<Standing>(bytes);
    fuzzing::record::<SetAsideItem>(bytes);
    fuzzing::record::<Vec<Op>>(bytes);
}

/// Arbitrary bytes as what arrives in a session, in an order that no honest
/// source would choose: an event is one byte that says which, and the bytes
/// that it needs. Returns how many batches were handed on, or the breach.
pub fn session(bytes: &[u8]) -> Result<u64, Breach> {
    let mut world = World {
        bytes: bytes.iter(),
        session: Session::new(BatchId(FIRST - 1)),
        next: FIRST,
        planned: 0,
        applied: FIRST - 1,
        returning: None,
        staged: 0,
        held: HashSet::new(),
    };
    // The first breach ends a session.
    while let Some(event) = world.byte() {
        world.event(event)?;
        assert_eq!(world.session.staged(), world.held.len(), "nobody deletes it");
    }
    Ok(world.next - FIRST)
}

/// The first batch of the session.
const FIRST: u64 = 5;

struct World<'a> {
    bytes: std::slice::Iter<'a, u8>,
    session: Session,
    /// The batch that must be handed on next.
    next: u64,
    /// The batch whose plan is sent, counted from the first.
    planned: u64,
    /// The last batch that the applier has applied.
    applied: u64,
    /// This batch, and what follows it, was given back, and the source has not
    /// said yet that it begins anew.
    returning: Option<u64>,
    /// Files that were staged.
    staged: u64,
    /// Those of them that the session has neither given back nor handed on.
    held: HashSet<Name>,
}

impl World<'_> {
    fn byte(&mut self) -> Option<u8> {
        self.bytes.next().copied()
    }

    /// A small number; zero at the end of the input.
    fn small(&mut self, below: u8) -> u8 {
        self.byte().unwrap_or(0) % below
    }

    /// Mostly the batch that comes next, sometimes one near it, seldom any.
    fn batch(&mut self) -> BatchId {
        let next = FIRST + self.planned;
        match self.byte().unwrap_or(0) {
            0..=199 => BatchId(next),
            near @ 200..=250 => BatchId((next + u64::from(near - 200)).saturating_sub(3)),
            251 => BatchId(0),
            _ => BatchId(u64::MAX),
        }
    }

    fn object(&mut self) -> ObjectId {
        let number = self.small(4);
        ObjectId::new(1, &[number]).unwrap_or_else(|| unreachable!("two bytes fit"))
    }

    fn file(&mut self) -> StagedFile {
        self.staged += 1;
        let name = Name::new(self.staged.to_string().as_bytes())
            .unwrap_or_else(|_| unreachable!("digits"));
        self.held.insert(name.clone());
        let place = Place { within: Within::Staging(0), name };
        let handle = self.object();
        StagedFile { place, handle, state: state(), bytes: 1 }
    }

    fn op(&mut self) -> Op {
        let object = self.object();
        let content = match self.small(6) {
            0 => return Op::Drop { object },
            1 => ContentSource::Unchanged,
            5 => ContentSource::Appended(Appended {
                basis: BatchId(1),
                hash: Hash([0; 32]),
                bytes: vec![0; self.small(9).into()],
            }),
            2 | 3 => ContentSource::Packed { version: self.small(3).into() },
            _ => ContentSource::Transferred { transfer: TransferId(self.small(4).into()) },
        };
        Op::Put { object, state: state(), content, new: true, links: 1 }
    }

    fn event(&mut self, event: u8) -> Result<(), Breach> {
        match event % 13 {
            0 | 1 => {
                let batch = self.batch();
                let count = self.small(4);
                let ops = (0..count).map(|_| self.op()).collect();
                let back = self.session.plan(batch, ops)?;
                self.given_back(&back);
            }
            2 => {
                let batch = self.batch();
                let (ops, packed) = (self.small(8).into(), self.small(8).into());
                self.session.commit(batch, header(ops, packed))?;
                if self.returning.is_none_or(|returned| batch.0 < returned) {
                    assert_eq!(batch.0, FIRST + self.planned, "in order");
                    self.planned += 1;
                }
            }
            3 | 4 => {
                let (batch, object) = (self.batch(), self.object());
                let version = self.small(3).into();
                let file = self.file();
                let back = self.session.packed(batch, object, version, file)?;
                self.given_back(back.as_slice());
            }
            5 => {
                let (transfer, object) = (TransferId(self.small(4).into()), self.object());
                let file = StagedTransfer::Whole(self.file());
                if let Arrival::Unwanted(back) = self.session.transferred(transfer, object, file)? {
                    self.given_back(&back);
                }
            }
            6 => {
                let transfer = TransferId(self.small(4).into());
                let back = self.session.aborted(transfer);
                self.given_back(&back);
            }
            7 => {
                let batch = self.batch();
                let back = self.session.abandon(batch)?;
                self.given_back(&back);
                if self.returning.take_if(|returned| *returned == batch.0).is_some() {
                    self.planned = batch.0 - FIRST;
                }
            }
            8 | 9 => {
                let (batch, object) = (self.batch(), self.object());
                let version = self.small(3).into();
                self.session.failed(batch, object, version, "the disk is full".to_owned())?;
            }
            // What was handed on is applied, or finds no place.
            10 if self.applied + 1 < self.next => self.applied += 1,
            11 if self.applied + 1 < self.next => {
                let returned = self.session.give_back(BatchId(self.applied + 1), Vec::new());
                self.returned(&returned);
            }
            12 => {
                let transfer = TransferId(self.small(4).into());
                self.session.transfer_failed(transfer, "the disk is full".to_owned());
            }
            _ => {}
        }
        while let Some(whole) = self.session.next_whole()? {
            self.whole(&whole);
        }
        if let Some(returned) = self.session.next_returned(BatchId(self.applied)) {
            assert!(!returned.objects.is_empty(), "nothing is in its way");
            self.returned(&returned);
        }
        Ok(())
    }

    /// A batch goes back to the source, with all that follow.
    fn returned(&mut self, returned: &Returned) {
        assert_eq!(returned.batch.0, self.applied + 1, "all before it are applied");
        self.given_back(&returned.places);
        self.next = returned.batch.0;
        self.returning = Some(returned.batch.0);
    }

    /// What is to be deleted, or handed on, is so once.
    fn given_back(&mut self, places: &[Place]) {
        for place in places {
            assert!(self.held.remove(&place.name), "{place:?} is given back twice");
        }
    }

    fn whole(&mut self, whole: &WholeBatch) {
        assert_eq!(whole.batch.0, self.next, "in order, without holes");
        assert!(self.next < FIRST + self.planned, "not before its commit");
        self.next += 1;
        assert_eq!(whole.ops.len() as u64, whole.header.ops);
        for op in &whole.ops {
            let Op::Put { object, content, .. } = op else { continue };
            let here = matches!(content, ContentSource::Unchanged | ContentSource::Appended(_));
            let named = !here;
            assert!(!named || whole.content.contains_key(object), "{object} has no content");
        }
        for staged in whole.content.values() {
            if let StagedTransfer::Whole(file) = staged {
                self.given_back(std::slice::from_ref(&file.place));
            }
        }
        self.given_back(&whole.superseded);
    }
}

fn state() -> ObjectState {
    let attributes =
        Attributes { mode: 0o600, uid: 0, gid: 0, mtime: Timestamp(0), xattrs: Vec::new() };
    ObjectState { kind: Kind::File, attributes, size: 1, rdev: 0 }
}

fn header(ops: u64, packed: u64) -> BatchHeader {
    BatchHeader {
        nonce: BatchNonce(1),
        seq: Seq(1),
        watermark: Timestamp(0),
        exact: None,
        packed,
        ops,
        complete: false,
        bytes_changed: 0,
        bytes_shipped: 0,
    }
}
