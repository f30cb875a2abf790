//! A batch that is built is made durable, and sent.

use std::collections::BTreeMap;

use replicator_common::id::{BatchNonce, ObjectId};
use replicator_common::time::Timestamp;
use replicator_common::wire::BatchHeader;
use replicator_src::index::{Index, Mark, Noted, View};
use replicator_src::ledger::{Claim, Flight, Gap, Reach};
use replicator_src::plan::Assembly;

use super::{Draft, Source};
use crate::net::{Up, Wire};
use crate::store::Store;
use crate::world::inode;

impl Source {
    pub(super) fn commit(
        &mut self,
        draft: Draft,
        assembly: Assembly,
        closed: Option<Gap>,
        wires: &mut BTreeMap<u64, Wire>,
    ) -> Option<Timestamp> {
        let engine = self.engine();
        let covered = engine.covered;
        let floors = engine.holds.values().map(|held| held.floor);
        let orphans = orphan_floor(&engine.index, &assembly);
        let claim = Claim {
            span: draft.span,
            covered,
            gap: engine.gap.as_ref(),
            closed: closed.as_ref(),
            proves: true,
            waiting: floors.chain(engine.owed.floor()).chain(orphans).min(),
        };
        let reach = claim.reach();
        let before = std::mem::replace(&mut engine.reached, reach.reached);
        engine.covered = reach.covered;
        let Reach { reached, exact, .. } = reach;
        let watermark = engine.clock.wall(reached).max(engine.claimed);
        self.built += 1;
        let (nonce, engine) = (BatchNonce(self.built), self.engine());
        let header = BatchHeader {
            nonce,
            seq: draft.span.seq,
            watermark,
            exact: exact.then(|| engine.clock.wall(draft.span.time)),
            packed: draft.packed,
            ops: assembly.ops.len() as u64,
            complete: watermark > Timestamp::NEVER,
            bytes_changed: 0,
            bytes_shipped: 0,
        };
        let gone = assembly.delta.objects.iter().filter(|(_, known)| known.is_none()).cloned();
        let flight = Flight {
            mark: Mark::default(),
            input: draft.input,
            closed,
            dropped: gone.map(|(object, _)| object).collect(),
            ops: header.ops,
            durable: false,
            before,
            reached,
            note: (),
        };
        let exact = header.exact;
        self.send_batch(assembly, header, flight, wires);
        exact
    }

    /// The order of these two is the invariant of trap 5.
    pub(super) fn send_batch(
        &mut self,
        assembly: Assembly,
        header: BatchHeader,
        flight: Flight<()>,
        wires: &mut BTreeMap<u64, Wire>,
    ) {
        let life = self.life();
        let Assembly { mut ops, mut delta, .. } = assembly;
        // They come in no particular order; a seed must give the same run.
        ops.sort_by_cached_key(|op| format!("{op:?}"));
        let waits = self.waits();
        let engine = self.engine();
        let batch = engine.next_batch;
        let before = engine.totals.edition();
        let mark = Mark {
            batch,
            nonce: header.nonce,
            seq: header.seq,
            watermark: (header.watermark > Timestamp::NEVER).then_some(header.watermark),
            consistent: header.exact.or(engine.totals.consistent),
            ..engine.totals
        };
        delta.mark = mark;
        engine.index.prepare(delta.clone(), &Noted::default()).unwrap();
        engine.greeting.pending.push(mark.edition());
        engine.totals = mark;
        engine.claimed = engine.claimed.max(header.watermark);
        engine.next_batch = batch.next();
        engine.flights.push(Flight { mark, ..flight });
        let session = engine.session;
        if let Some(wire) = session.and_then(|number| wires.get_mut(&number))
            && !wire.broken
        {
            wire.up.push_back(Up::Plan(batch, ops));
            wire.up.push_back(Up::Commit(batch, header.clone()));
        }
        self.say(|| {
            let changed = delta.entries.iter().map(|change| {
                let to = change.new.as_ref().map_or(0, inode);
                format!("{}/{}={to}", inode(&change.directory), change.name)
            });
            let changed = changed.collect::<Vec<_>>().join(" ");
            format!("batch {batch} claims {:?}, holds {waits}: {changed}", header.watermark)
        });
        let mut next = self.expected[&(life, before)].after(&delta);
        next.watermark = mark.watermark;
        self.expected.insert((life, mark.edition()), next);
    }
}

/// Where orphans that are left hold the watermark.
fn orphan_floor(index: &Index<Store>, assembly: &Assembly) -> Option<Timestamp> {
    if assembly.orphans == 0 {
        return None;
    }
    let mut all: BTreeMap<ObjectId, _> = index.orphans().unwrap().into_iter().collect();
    for (object, orphan) in &assembly.delta.orphans {
        match orphan {
            Some(orphan) => drop(all.insert(object.clone(), *orphan)),
            None => drop(all.remove(object)),
        }
    }
    all.values().filter(|orphan| !orphan.left).map(|orphan| orphan.floor).min()
}
