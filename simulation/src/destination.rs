//! The destination: its session, its applier and its store, in memory.
//!
//! What decides is the product's: [`Session`] gathers batches, [`plan`] and
//! [`execute`] apply them, [`advance`] and [`mismatch`] keep the standing, and
//! [`set_back`] reads the mark. The order of the applier's steps
//! (`replicator_dst::applier`) is repeated here, with a crash after each.

use std::collections::{BTreeMap, VecDeque};

use rand::Rng;
use rand::rngs::StdRng;
use replicator_common::id::{BatchId, Edition, Incarnation, ObjectId};
use replicator_common::name::Name;
use replicator_common::object::Kind;
use replicator_common::wire::{ContentSource, Op, SourceHello};
use replicator_dst::apply::plan::{Arrival, Staged, plan};
use replicator_dst::apply::{Place, Step, Within, execute};
use replicator_dst::history::{advance, mismatch};
use replicator_dst::mark::{Mark, Reached, Remembered, set_back};
use replicator_dst::objects::{Known, Objects};
use replicator_dst::replica::disclaim;
use replicator_dst::seal::needed_by;
use replicator_dst::session::{Session, StagedFile, StagedTransfer, WholeBatch};
use replicator_dst::store::Standing;

use crate::Never;
use crate::net::{Data, Down, Of, Up, Wire};
use crate::tree::{Model, Stop, root};
use crate::world::{Body, ROOT, inode};

/// Batches that wait for the applier at most.
const JOBS: usize = 2;

/// What the store holds.
#[derive(Clone, Debug)]
pub struct Records {
    /// Where the replica stands.
    pub standing: Standing,
    /// The objects map.
    pub rows: BTreeMap<ObjectId, Known>,
    /// The commit log.
    pub log: BTreeMap<BatchId, Vec<Step>>,
    marked: Option<Reached>,
    /// The batch that was logged last.
    sealed: Option<Edition>,
}

impl Records {
    fn new(standing: Standing) -> Self {
        let (rows, log) = (BTreeMap::new(), BTreeMap::new());
        Self { standing, rows, log, marked: None, sealed: None }
    }

    fn remembered(&self) -> Remembered {
        let last = self.log.keys().last();
        Remembered {
            committed: self.standing.committed,
            covered: self.marked,
            logged: self.sealed.filter(|sealed| Some(&sealed.batch) == last),
        }
    }
}

impl Objects for Records {
    type Error = Never;

    fn get(&self, object: &ObjectId) -> Result<Option<Known>, Never> {
        Ok(self.rows.get(object).cloned())
    }
}

/// A moment at which a test makes the applier die.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Point {
    /// Everything is in staging.
    Staged,
    /// Staging is durable.
    Synced,
    /// The commit record is durable.
    Committed,
    /// All steps are done.
    Applied,
}

#[derive(Clone, Debug)]
enum Job {
    Begin(u64, SourceHello),
    Batch(u64, Box<WholeBatch>),
}

/// What a process holds, and a crash forgets.
#[derive(Default)]
struct Process {
    session: Option<(u64, Session)>,
    /// The newest connection: older ones are replaced by it.
    accepted: u64,
    jobs: VecDeque<Job>,
    redone: bool,
    /// Logged and not applied yet.
    current: Option<(u64, BatchId, Vec<Step>)>,
    uncovered: bool,
    needed: Vec<Place>,
    marked: Option<Reached>,
    doubt: bool,
    spoilt: bool,
    /// An object was missing: the map is given up with the next session.
    distrust: bool,
}

/// The process dies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Died;

/// Why a step of the applier did not come to its end.
enum Failed {
    /// The process dies.
    Crash,
    /// The disk failed: it is tried again.
    Disk,
    /// The sync failed: the batch has to come again.
    Sync,
}

impl From<Stop> for Failed {
    fn from(stop: Stop) -> Self {
        match stop {
            Stop::Crash => Self::Crash,
            Stop::Disk => Self::Disk,
            Stop::Refused(what) => panic!("the kernel refuses: {what}"),
        }
    }
}

/// The destination.
pub struct Destination {
    /// The replica.
    pub tree: Model,
    /// The store, as it stands.
    pub now: Records,
    /// The store, as a crash leaves it.
    pub durable: Records,
    process: Option<Process>,
    /// Where to die.
    pub die_at: Option<Point>,
    /// The next sync fails.
    pub sync_fails: bool,
    /// Lives so far.
    lives: u8,
    /// Staged files so far.
    staged: u64,
    /// The replica is between two batches, and what the watermark says is told.
    pub settled: bool,
    /// It was set back, and has begun no new life since.
    back: bool,
    /// What others were told last.
    pub told: Standing,
    /// What happened last, in words.
    pub log: VecDeque<String>,
}

fn life(number: u8) -> Incarnation {
    Incarnation([number; 16])
}

fn reserved() -> Name {
    Name::new(b".replicator").unwrap()
}

impl Default for Destination {
    fn default() -> Self {
        Self::new()
    }
}

impl Destination {
    /// A new one.
    pub fn new() -> Self {
        let standing = Standing::new(life(101), false);
        let records = Records::new(standing.clone());
        let mut tree = Model::new(ROOT);
        tree.set_life(standing.incarnation);
        Self {
            tree,
            now: records.clone(),
            durable: records,
            process: None,
            die_at: None,
            sync_fails: false,
            lives: 101,
            staged: 0,
            settled: false,
            back: false,
            told: standing,
            log: VecDeque::new(),
        }
    }

    fn say(&mut self, what: impl FnOnce() -> String) {
        self.log.push_back(what());
        if self.log.len() > 40 {
            self.log.pop_front();
        }
    }

    fn write(&mut self, durable: bool, change: impl FnOnce(&mut Records)) {
        change(&mut self.now);
        if durable {
            self.durable = self.now.clone();
        }
    }

    /// Whether the map is known to be wrong: no batch describes the replica then,
    /// and it claims nothing.
    pub fn is_distrusted(&self) -> bool {
        self.process.as_ref().is_some_and(|process| process.distrust)
    }

    /// Whether its own state describes the replica: it was not set back, and no
    /// object was found missing.
    pub fn is_sound(&self) -> bool {
        !self.back && !self.is_distrusted()
    }

    /// Whether the process runs.
    pub fn runs(&self) -> bool {
        self.process.is_some()
    }

    /// Whether it has nothing to do.
    pub fn is_idle(&self) -> bool {
        let idle = |p: &Process| p.redone && p.jobs.is_empty() && p.current.is_none();
        self.process.as_ref().is_some_and(idle)
    }

    /// The process starts.
    pub fn start(&mut self) {
        let life = self.now.standing.incarnation;
        let of_one_life = self.tree.life() == Some(life);
        let back = set_back(self.tree.mark(), life, &self.now.remembered());
        if !of_one_life || back.is_some() {
            self.renounce(back.unwrap_or("of another life"));
        }
        self.process = Some(Process::default());
    }

    /// A new life. (The product keeps what the replica has and reconciles it;
    /// here it begins anew, for the checks are of what follows.)
    fn renounce(&mut self, reason: &str) {
        self.say(|| format!("a new life: {reason}"));
        self.lives += 1;
        self.back = false;
        let standing = Standing::new(life(self.lives), false);
        self.tree = Model::new(ROOT);
        self.tree.set_life(standing.incarnation);
        self.told = standing.clone();
        self.settled = false;
        self.write(true, |records| {
            *records = Records::new(standing);
        });
    }

    /// The process dies; with `power`, the machine does.
    pub fn crash(&mut self, power: bool, random: &mut StdRng) {
        self.say(|| format!("crash, of the machine: {power}"));
        self.process = None;
        self.settled = false;
        self.die_at = None;
        self.tree.fuse = None;
        self.now = self.durable.clone();
        if power {
            self.tree.cut(random);
        }
    }

    /// Puts earlier states of the state directory and of the replica back; the
    /// process is down.
    pub fn set_back(&mut self, records: Option<Records>, tree: Option<Model>) {
        self.back = true;
        self.say(|| format!("set back: {} {}", records.is_some(), tree.is_some()));
        if let Some(records) = records {
            (self.now, self.durable) = (records.clone(), records);
            self.told = self.now.standing.clone();
        }
        if let Some(tree) = tree {
            self.tree = tree;
        }
    }

    fn dies(&mut self, point: Point) -> Result<(), Failed> {
        match self.die_at {
            Some(at) if at == point => Err(Failed::Crash),
            _ => Ok(()),
        }
    }

    // ---------------------------------------------------------------- session

    /// Whether something has come that can be taken in.
    pub fn has_mail(&self, wires: &BTreeMap<u64, Wire>) -> bool {
        let Some(process) = &self.process else { return false };
        wires.iter().any(|(number, wire)| self.may_take(process, *number, wire))
    }

    fn may_take(&self, process: &Process, number: u64, wire: &Wire) -> bool {
        if !wire.accepted {
            return number > process.accepted && !wire.up.is_empty();
        }
        let open = process.session.as_ref().is_some_and(|(open, _)| *open == number);
        let some = !wire.up.is_empty() || wire.data.iter().any(|stream| !stream.is_empty());
        open && process.accepted == number && (some || wire.broken)
    }

    /// Takes in one message.
    pub fn take(
        &mut self,
        wires: &mut BTreeMap<u64, Wire>,
        random: &mut StdRng,
    ) -> Result<(), Died> {
        let Some(process) = &self.process else { return Ok(()) };
        let number = wires.iter().rev().find(|(n, wire)| self.may_take(process, **n, wire));
        let Some(number) = number.map(|(number, _)| *number) else { return Ok(()) };
        let Some(wire) = wires.get_mut(&number) else { return Ok(()) };
        let Some(process) = &mut self.process else { return Ok(()) };
        if !wire.accepted {
            if let Some(Up::Hello(hello)) = wire.up.pop_front() {
                wire.accepted = true;
                (process.accepted, process.session) = (number, None);
                process.jobs.push_back(Job::Begin(number, hello));
            }
            for (older, wire) in wires.range_mut(..number) {
                let _ = older;
                wire.broken = true;
                wire.up.clear();
            }
            return Ok(());
        }
        let mut streams: Vec<usize> =
            (0..wire.data.len()).filter(|at| !wire.data[*at].is_empty()).collect();
        if !wire.up.is_empty() {
            streams.push(wire.data.len());
        }
        if streams.is_empty() {
            // The line is gone, and all that came is taken in.
            process.session = None;
            return Ok(());
        }
        let stream = streams[random.random_range(0..streams.len())];
        if stream < wire.data.len() {
            let Some(data) = wire.data[stream].pop_front() else { return Ok(()) };
            match self.content(&data, wire, random) {
                Ok(()) => {}
                // The stager tries again.
                Err(Stop::Disk) => wire.data[stream].push_front(data),
                Err(Stop::Crash) => return Err(Died),
                Err(Stop::Refused(what)) => panic!("{what}"),
            }
        } else if let (Some(message), Some((_, session))) =
            (wire.up.pop_front(), &mut process.session)
        {
            let result = match message {
                Up::Plan(batch, ops) => session.plan(batch, ops).map(drop),
                Up::Commit(batch, header) => session.commit(batch, header),
                Up::Hello(_) => panic!("hello said twice"),
            };
            result.unwrap_or_else(|breach| panic!("an honest source: {breach}"));
        }
        self.hand_on();
        Ok(())
    }

    fn content(&mut self, data: &Data, wire: &mut Wire, random: &mut StdRng) -> Result<(), Stop> {
        if let Of::Abort(transfer) = data.of {
            let session = self.process.as_mut().and_then(|p| p.session.as_mut());
            let places = session.map(|(_, session)| session.aborted(transfer)).unwrap_or_default();
            places.iter().for_each(|place| self.tree.discard(place));
            return Ok(());
        }
        self.staged += 1;
        let name = Name::new(format!("p{}", self.staged).as_bytes()).unwrap();
        let place = Place { within: Within::Staging(0), name };
        let body = Body { content: data.content, mode: data.state.attributes.mode };
        let handle = self.tree.stage(&place, inode(&data.object), body, false, random)?;
        let file = StagedFile { place, handle, state: data.state.clone(), bytes: 4 };
        let Some((_, session)) = self.process.as_mut().and_then(|p| p.session.as_mut()) else {
            return Ok(());
        };
        match data.of {
            Of::Batch(batch, version) => {
                let late = session.packed(batch, data.object.clone(), version, file).unwrap();
                late.iter().for_each(|place| self.tree.discard(place));
            }
            Of::Transfer(transfer) => {
                let whole = StagedTransfer::Whole(file);
                session.transferred(transfer, data.object.clone(), whole).unwrap();
                wire.down.push_back(Down::Transferred(transfer));
            }
            Of::Abort(_) => {}
        }
        Ok(())
    }

    fn hand_on(&mut self) {
        let Some(process) = &mut self.process else { return };
        let Some((number, session)) = &mut process.session else { return };
        while process.jobs.len() < JOBS {
            let whole = session.next_whole();
            let whole = whole.unwrap_or_else(|breach| panic!("an honest source: {breach}"));
            let Some(whole) = whole else { break };
            process.jobs.push_back(Job::Batch(*number, Box::new(whole)));
        }
    }

    // ---------------------------------------------------------------- applier

    /// One step of the applier. An error: the process dies.
    pub fn work(
        &mut self,
        wires: &mut BTreeMap<u64, Wire>,
        random: &mut StdRng,
    ) -> Result<(), Died> {
        let result = self.step(wires, random);
        self.hand_on();
        match result {
            Ok(()) | Err(Failed::Disk | Failed::Sync) => Ok(()),
            Err(Failed::Crash) => Err(Died),
        }
    }

    fn process(&mut self) -> &mut Process {
        self.process.as_mut().unwrap()
    }

    fn step(&mut self, wires: &mut BTreeMap<u64, Wire>, random: &mut StdRng) -> Result<(), Failed> {
        if self.process.is_none() {
            return Ok(());
        }
        if !self.process().redone {
            self.redo()?;
            self.process().redone = true;
            return Ok(());
        }
        if let Some((number, batch, steps)) = self.process().current.clone() {
            self.run_steps(batch, &steps)?;
            self.dies(Point::Applied)?;
            self.process().current = None;
            self.applied();
            if self.process().distrust {
                self.end_session(number, wires);
                return Ok(());
            }
            send(wires, number, Down::Applied(batch));
            return Ok(());
        }
        match self.process().jobs.front().cloned() {
            None if random.random_bool(0.3) => self.cover(random),
            None => Ok(()),
            Some(Job::Begin(number, hello)) => {
                self.cover(random)?;
                self.process().jobs.pop_front();
                self.begin(number, &hello, wires);
                Ok(())
            }
            Some(Job::Batch(number, batch)) => {
                batch.superseded.iter().for_each(|place| self.tree.discard(place));
                match self.seal(&batch, random) {
                    Ok(steps) => {
                        self.process().jobs.pop_front();
                        send(wires, number, Down::Durable(batch.batch));
                        self.process().current = Some((number, batch.batch, steps));
                        self.dies(Point::Committed)
                    }
                    // The session ends, and the batch has to come again.
                    Err(Failed::Sync) => {
                        self.process().jobs.pop_front();
                        self.end_session(number, wires);
                        Err(Failed::Sync)
                    }
                    Err(other) => Err(other),
                }
            }
        }
    }

    fn end_session(&mut self, number: u64, wires: &mut BTreeMap<u64, Wire>) {
        if self.process().session.as_ref().is_some_and(|(open, _)| *open == number) {
            self.process().session = None;
        }
        if let Some(wire) = wires.get_mut(&number) {
            wire.broken = true;
            wire.up.clear();
            wire.data.iter_mut().for_each(VecDeque::clear);
        }
    }

    fn begin(&mut self, number: u64, hello: &SourceHello, wires: &mut BTreeMap<u64, Wire>) {
        let lost = self.process().distrust.then_some("an object is missing");
        if let Some(reason) = lost.or(mismatch(&self.now.standing, hello)) {
            self.renounce(reason);
            let process = self.process();
            process.distrust = false;
            (process.marked, process.uncovered, process.needed) = (None, false, Vec::new());
        }
        self.tree.wipe_staging();
        self.process().spoilt = false;
        if self.now.standing.source_incarnation != Some(hello.incarnation) {
            self.write(true, |records| {
                records.standing.source_incarnation = Some(hello.incarnation);
            });
        }
        let standing = self.now.standing.clone();
        self.say(|| format!("session {number} begins after {}", standing.committed));
        self.told.clone_from(&standing);
        if self.process().accepted == number {
            self.process().session = Some((number, Session::new(standing.committed)));
        }
        let (incarnation, committed) = (standing.incarnation, standing.edition());
        send(wires, number, Down::Hello { incarnation, committed });
    }

    fn redo(&mut self) -> Result<(), Failed> {
        let log = self.now.log.clone();
        for (batch, steps) in &log {
            self.run_steps(*batch, steps)?;
            self.process().uncovered = true;
        }
        self.process().doubt = false;
        self.applied();
        Ok(())
    }

    fn run_steps(&mut self, batch: BatchId, steps: &[Step]) -> Result<(), Failed> {
        if steps.is_empty() {
            return Ok(());
        }
        self.settled = false;
        self.mark(Reached::begun(batch))?;
        let mut findings = Vec::new();
        let result = execute::run(&mut self.tree, steps, &mut findings);
        // Only what was set back can have lost anything.
        assert!(findings.is_empty() || self.back, "{findings:?}\n{steps:#?}");
        if !findings.is_empty() {
            disclaim(&mut self.now.standing);
            self.process().distrust = true;
        }
        Ok(result?)
    }

    fn mark(&mut self, reached: Reached) -> Result<(), Failed> {
        let incarnation = self.now.standing.incarnation;
        self.tree.set_mark(Mark { incarnation, reached, next: None })?;
        self.process().marked = Some(reached);
        Ok(())
    }

    fn mark_next(&mut self, next: Edition) -> Result<(), Failed> {
        let incarnation = self.now.standing.incarnation;
        let found = self.tree.mark().filter(|mark| mark.incarnation == incarnation);
        let found = found.map_or(Reached::begun(BatchId(0)), |mark| mark.reached);
        let reached = self.process().marked.unwrap_or(found);
        Ok(self.tree.set_mark(Mark { incarnation, reached, next: Some(next) })?)
    }

    fn applied(&mut self) {
        let committed = self.now.standing.committed;
        self.write(false, |records| records.standing.applied = committed);
        let forth = self.told.watermark <= self.now.standing.watermark;
        assert!(forth || self.process().distrust, "the watermark moves back");
        self.told = self.now.standing.clone();
        self.settled = true;
    }

    fn sync(&mut self, random: &mut StdRng) -> Result<(), Failed> {
        if std::mem::take(&mut self.sync_fails) {
            self.say(|| "a sync fails".to_owned());
            self.tree.fail_sync(random);
            self.settled = false;
            let process = self.process();
            (process.doubt, process.spoilt) = (true, true);
            return Err(Failed::Sync);
        }
        self.tree.sync();
        Ok(())
    }

    fn cover(&mut self, random: &mut StdRng) -> Result<(), Failed> {
        if self.process().doubt {
            self.redo()?;
        }
        if !self.process().uncovered {
            return Ok(());
        }
        self.sync(random)?;
        let (applied, marked) = (self.now.standing.applied, self.process().marked);
        self.write(true, |records| {
            records.marked = marked.or(records.marked);
            records.log.retain(|batch, _| *batch > applied);
        });
        self.covered();
        self.mark_through(random)
    }

    fn mark_through(&mut self, random: &mut StdRng) -> Result<(), Failed> {
        let Some(Reached { batch, through: false }) = self.process().marked else { return Ok(()) };
        self.mark(Reached::through(batch))?;
        if let Err(error) = self.sync(random) {
            self.process().marked = Some(Reached::begun(batch));
            return Err(error);
        }
        let marked = self.process().marked;
        self.write(true, |records| records.marked = marked);
        Ok(())
    }

    fn covered(&mut self) {
        for place in std::mem::take(&mut self.process().needed) {
            self.tree.discard(&place);
        }
        self.process().uncovered = false;
    }

    fn seal(&mut self, batch: &WholeBatch, random: &mut StdRng) -> Result<Vec<Step>, Failed> {
        let next = advance(&self.now.standing, batch.batch, &batch.header).ok_or(Failed::Sync)?;
        if self.process().doubt {
            return Err(Failed::Sync);
        }
        if batch.ops.is_empty() {
            self.write(true, |records| records.standing = next);
            return Ok(Vec::new());
        }
        if self.process().spoilt {
            return Err(Failed::Sync);
        }
        let staged = self.stage_rest(batch, random)?;
        let (id, ops) = (batch.batch, batch.ops.clone());
        let planned = plan(&self.now, id, ops, &staged, &reserved(), &root());
        let planned = planned.unwrap_or_else(|error| panic!("batch {id}: {error}\n{batch:#?}"));
        self.mark_next(next.edition())?;
        self.dies(Point::Staged)?;
        self.sync(random)?;
        self.dies(Point::Synced)?;
        let (covered, marked) = (self.now.standing.applied, self.process().marked);
        let steps = planned.steps.clone();
        self.write(true, |records| {
            records.log.retain(|batch, _| *batch > covered);
            records.marked = marked.or(records.marked);
            records.log.insert(id, planned.steps);
            for (object, row) in planned.rows {
                match row {
                    Some(row) => drop(records.rows.insert(object, row)),
                    None => drop(records.rows.remove(&object)),
                }
            }
            records.sealed = Some(next.edition());
            records.standing = next;
        });
        self.covered();
        self.process().uncovered = true;
        self.process().needed = steps.iter().flat_map(needed_by).collect();
        Ok(steps)
    }

    /// Everything that needs no content from a data stream: directories.
    fn stage_rest(&mut self, batch: &WholeBatch, random: &mut StdRng) -> Result<Staged, Failed> {
        let mut staged = Staged::default();
        for (number, op) in batch.ops.iter().enumerate() {
            let Op::Put { object, state, content, new, .. } = op else { continue };
            if let Some(StagedTransfer::Whole(file)) = batch.content.get(object) {
                let (place, handle) = (file.place.clone(), file.handle.clone());
                let state = Some(file.state.clone());
                staged.insert(object.clone(), Arrival::Whole { place, handle, state });
            } else if *content == ContentSource::Unchanged && *new {
                assert_eq!(state.kind, Kind::Directory, "a new file without content: {op:?}");
                let name = Name::new(format!("d{}.{number}", batch.batch).as_bytes()).unwrap();
                let place = Place { within: Within::Staging(7), name };
                let body = Body { content: 0, mode: 0o700 };
                let handle = self.tree.stage(&place, inode(object), body, true, random)?;
                staged.insert(object.clone(), Arrival::Whole { place, handle, state: None });
            }
        }
        Ok(staged)
    }
}

fn send(wires: &mut BTreeMap<u64, Wire>, number: u64, message: Down) {
    if let Some(wire) = wires.get_mut(&number)
        && !wire.broken
    {
        wire.down.push_back(message);
    }
}
