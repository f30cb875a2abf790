//! Large files: what waits for them, and the lanes in which they travel.

use std::collections::{BTreeMap, BTreeSet};

use rand::Rng;
use rand::rngs::StdRng;
use replicator_common::id::{BatchId, ObjectId, TransferId};
use replicator_common::name::Name;
use replicator_common::object::Kind;
use replicator_common::time::Timestamp;
use replicator_common::wire::ContentSource;
use replicator_src::index::{Known, View};
use replicator_src::plan::waits::is_through;
use replicator_src::plan::{Assembly, Hold, HoldReason, Need, Outcome, Resolve};
use replicator_src::watcher::What;

use super::{Draft, File, Held, Lane, Source, Transfer, content_of, is_ours};
use crate::net::{Data, Of, STREAMS, Wire};
use crate::world::{World, inode};

impl Source {
    pub(super) fn take_holds(&mut self, holds: BTreeMap<ObjectId, Hold>, floor: Timestamp) {
        let engine = self.engine();
        for (object, hold) in holds {
            match engine.holds.get_mut(&object) {
                Some(held) => {
                    held.hold.reason = hold.reason;
                    held.hold.entries.extend(hold.entries);
                }
                None => {
                    let transfer = Transfer::Waiting;
                    let held = Held { hold, floor, transfer, touched: false };
                    engine.holds.insert(object, held);
                }
            }
        }
    }

    pub(super) fn redo_hold(&mut self, object: &ObjectId) {
        let engine = self.engine.as_mut().unwrap();
        let Some(held) = engine.holds.get(object) else { return };
        let what = What { content: true, attributes: true };
        for (directory, name) in held.hold.entries.clone() {
            engine.dirty.entry(directory, name, what);
        }
        engine.dirty.object(object.clone(), what);
    }

    /// A lane's turn: begins to read a large file, or is through with one.
    pub(super) fn lane(
        &mut self,
        world: &World,
        wires: &mut BTreeMap<u64, Wire>,
        random: &mut StdRng,
    ) {
        let engine = self.engine();
        let Some(session) = engine.session else { return };
        if engine.lanes.len() < 2 && random.random_bool(0.6) {
            let waits = |held: &&mut Held| matches!(held.transfer, Transfer::Waiting);
            let waiting = engine.holds.iter_mut();
            let next =
                waiting.map(|(object, held)| (object.clone(), held)).find(|(_, held)| waits(held));
            let Some((object, held)) = next else { return };
            let number = engine.next_transfer;
            engine.next_transfer = number.next();
            (held.touched, held.transfer) = (false, Transfer::Running(number));
            let started = engine.clock.now();
            let n = inode(&object);
            let ctime = match world.inodes.contains_key(&n) {
                true => world.changed(n),
                false => Timestamp(0),
            };
            engine.lanes.push(Lane { number, object, session, started, ctime });
            return;
        }
        if engine.lanes.is_empty() {
            return;
        }
        let lane = engine.lanes.remove(random.random_range(0..engine.lanes.len()));
        let arrived = engine.arrived.remove(&lane.number);
        let n = inode(&lane.object);
        let there = world.inodes.contains_key(&n);
        if there {
            let (state, content) = (world.state(n), world.inodes[&n].body.content);
            let data =
                Data { of: Of::Transfer(lane.number), object: lane.object.clone(), state, content };
            match wires.get_mut(&lane.session).filter(|wire| !wire.broken) {
                Some(wire) => wire.data[STREAMS - 1].push_back(data),
                None => {
                    // The engine will hear that the session is lost.
                    if let Some(held) = awaited(&mut engine.holds, &lane) {
                        held.transfer = Transfer::Waiting;
                    }
                    return;
                }
            }
        }
        let Some(held) = awaited(&mut engine.holds, &lane) else {
            if there && let Some(wire) = wires.get_mut(&lane.session) {
                abort(wire, lane.number, &lane.object, world);
            }
            return;
        };
        if !there {
            self.redo_hold(&lane.object);
            if let Some(held) = self.engine().holds.remove(&lane.object) {
                let links = self.engine().index.links(&lane.object).unwrap();
                let places = held.hold.entries.into_iter().chain(links);
                self.look_at_rest(&Resolve::default(), places.collect(), held.floor);
            }
            return;
        }
        let known = Known {
            state: world.state(n),
            ctime: world.changed(n),
            read_at: lane.started,
            version: BatchId(0),
            content: content_of(world, n),
            entry: None,
            links: 0,
            nlink: world.links(n) as u32,
        };
        let moving = known.ctime != lane.ctime;
        let file = Box::new(File { known, started: lane.started, moving });
        held.transfer = Transfer::Ready { number: lane.number, arrived, file };
        if arrived {
            self.redo_hold(&lane.object);
        }
    }

    pub(super) fn transfer_arrived(&mut self, transfer: TransferId) {
        let engine = self.engine();
        if engine.lanes.iter().any(|lane| lane.number == transfer) {
            engine.arrived.insert(transfer);
            return;
        }
        let mut found = None;
        for (object, held) in &mut engine.holds {
            if let Transfer::Ready { number, arrived, .. } = &mut held.transfer
                && *number == transfer
            {
                *arrived = true;
                found = Some(object.clone());
            }
        }
        if let Some(object) = found {
            self.redo_hold(&object);
        }
    }

    pub(super) fn reset_transfers(&mut self) {
        let engine = self.engine();
        engine.lanes.clear();
        engine.arrived.clear();
        engine.holds.values_mut().for_each(|held| held.transfer = Transfer::Waiting);
    }

    pub(super) fn take_ready(
        &mut self,
        draft: &mut Draft,
        object: &ObjectId,
        need: &Need,
        world: &World,
    ) -> bool {
        if need.kind != Kind::File || !need.content {
            return false;
        }
        if let Some((_, file)) = draft.placed.get_mut(object) {
            file.moving = true;
            return true;
        }
        let engine = self.engine();
        let Some(held) = engine.holds.get_mut(object) else { return false };
        match std::mem::replace(&mut held.transfer, Transfer::Waiting) {
            Transfer::Waiting => false,
            under_way @ (Transfer::Running(_) | Transfer::Ready { arrived: false, .. }) => {
                held.transfer = under_way;
                draft.outcomes.insert(object.clone(), Outcome::Large { size: 4 });
                held.touched |= engine.gap.is_none();
                true
            }
            Transfer::Ready { number, mut file, .. } => {
                file.moving |= held.touched;
                let n = inode(object);
                if world.inodes.contains_key(&n) {
                    file.moving |= world.changed(n) != file.known.ctime;
                    file.known.state.attributes.mode = world.inodes[&n].body.mode;
                    file.known.nlink = world.links(n) as u32;
                }
                let mut known = file.known.clone();
                known.version = draft.batch;
                let content = ContentSource::Transferred { transfer: number };
                draft.outcomes.insert(object.clone(), Outcome::Ship { known, content });
                draft.placed.insert(object.clone(), (number, *file));
                true
            }
        }
    }

    pub(super) fn settle_placed(
        &mut self,
        draft: &mut Draft,
        assembly: &Assembly,
    ) -> BTreeSet<ObjectId> {
        let mut all = BTreeSet::new();
        for (object, (_, file)) in std::mem::take(&mut draft.placed) {
            all.insert(object.clone());
            if let Some(held) = self.engine().holds.remove(&object) {
                self.look_at_rest(&draft.resolve, held.hold.entries, held.floor);
            }
            let put =
                assembly.delta.objects.iter().any(|(id, known)| *id == object && known.is_some());
            if put && file.moving {
                self.hold_again(object, &file);
                draft.span.exact = false;
            }
        }
        all
    }

    pub(super) fn hold_again(&mut self, object: ObjectId, file: &File) {
        let engine = self.engine();
        let hold = Hold { reason: HoldReason::Large { size: 4 }, entries: BTreeSet::new() };
        let transfer = Transfer::Waiting;
        let held = Held { hold, floor: file.started, transfer, touched: false };
        engine.holds.insert(object, held);
    }

    pub(super) fn release_holds(
        &mut self,
        draft: &Draft,
        assembly: &Assembly,
        placed: &BTreeSet<ObjectId>,
    ) {
        let through = |object: &ObjectId, held: &Held| {
            !placed.contains(object)
                && !assembly.holds.contains_key(object)
                && is_through(object, &held.hold.entries, &draft.resolve, &draft.outcomes)
        };
        let holds = self.engine().holds.iter();
        let gone: Vec<_> =
            holds.filter(|(o, held)| through(o, held)).map(|(o, _)| o.clone()).collect();
        for object in gone {
            let Some(mut held) = self.engine().holds.remove(&object) else { continue };
            if draft.outcomes.get(&object) == Some(&Outcome::Gone) {
                held.hold.entries.extend(self.engine().index.links(&object).unwrap());
            }
            self.look_at_rest(&draft.resolve, held.hold.entries, held.floor);
        }
    }

    pub(super) fn look_at_rest(
        &mut self,
        resolve: &Resolve,
        entries: BTreeSet<(ObjectId, Name)>,
        floor: Timestamp,
    ) {
        self.engine().owed.release(entries.iter().cloned(), floor);
        for (directory, name) in entries {
            if !resolve.bindings.contains_key(&(directory.clone(), name.clone())) {
                self.engine().dirty.entry(directory, name, What::default());
            }
        }
    }

    pub(super) fn forget_dropped(&mut self) {
        let engine = self.engine();
        let (index, flights) = (&engine.index, &engine.flights);
        let ours = |object: &ObjectId| is_ours(index, flights, object);
        let mut fewer = Vec::new();
        for (object, held) in &mut engine.holds {
            let before = held.hold.entries.len();
            held.hold.entries.retain(|(directory, _)| ours(directory));
            if held.hold.entries.len() < before {
                fewer.push(object.clone());
            }
        }
        engine.holds.retain(|object, held| !held.hold.entries.is_empty() || ours(object));
        fewer.iter().for_each(|object| self.redo_hold(object));
        self.forget_owed();
    }

    pub(super) fn forget_owed(&mut self) {
        let engine = self.engine.as_mut().unwrap();
        let (index, flights) = (&engine.index, &engine.flights);
        engine.owed.forget(|directory| !is_ours(index, flights, directory));
    }

    pub(super) fn waits(&self) -> String {
        let holds = self.engine.iter().flat_map(|engine| &engine.holds);
        let words = holds.map(|(object, held)| {
            let places = held.hold.entries.iter();
            let places = places.map(|(directory, name)| format!("{}/{name}", inode(directory)));
            let places = places.collect::<Vec<_>>().join(" ");
            let transfer = match &held.transfer {
                Transfer::Waiting => "waits",
                Transfer::Running(_) => "travels",
                Transfer::Ready { arrived: false, .. } => "was sent",
                Transfer::Ready { arrived: true, .. } => "arrived",
            };
            format!("{} ({places}) {transfer}, of {}", inode(object), held.floor.0)
        });
        words.collect::<Vec<_>>().join(", ")
    }

    /// What keeps it from being idle, in words.
    pub fn describe(&self) -> String {
        let Some(engine) = &self.engine else { return "down".to_owned() };
        let holds = self.waits();
        format!(
            "session {:?}, dirty {:?}, draft {}, gap {:?}, under way {}, holds {holds}, orphans {:?}, covered {:?}",
            engine.session,
            engine.dirty,
            engine.draft.is_some(),
            engine.gap,
            engine.flights.len(),
            engine.index.orphans(),
            engine.covered,
        )
    }
}

fn awaited<'a>(holds: &'a mut BTreeMap<ObjectId, Held>, lane: &Lane) -> Option<&'a mut Held> {
    holds
        .get_mut(&lane.object)
        .filter(|held| matches!(held.transfer, Transfer::Running(number) if number == lane.number))
}

fn abort(wire: &mut Wire, transfer: TransferId, object: &ObjectId, world: &World) {
    let state = world.state(inode(object));
    let data = Data { of: Of::Abort(transfer), object: object.clone(), state, content: 0 };
    wire.data[STREAMS - 1].push_back(data);
}
