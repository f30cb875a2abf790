//! The verifier's thread: waits for the next pass, makes it, tells of it.

mod swift;

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender};
use replicator_common::id::ObjectId;
use replicator_common::object::Kind;
use replicator_common::time::Timestamp;
use replicator_common::verification::{Difference, DifferenceKind, OBJECT_COST, PassOptions};
use replicator_common::wire::PACK_MAX;

use super::board::Board;
use super::check::{Checker, Found, Item, Verdict};
use super::look::Seen;
use super::queue::{Queue, Stage, Waiting};
use super::record::{File, Record, Running};
use super::{Request, Settings};
use crate::engine::Event;
use crate::engine::verify::Query;
use crate::index::Known;

/// Objects of one question.
const OBJECTS: usize = 128;
/// Content bytes of one question, about.
const BYTES: u64 = 4 << 20;
/// Doubts at most; then they are settled before the pass goes on.
const DOUBTS: usize = 4096;
/// How often the record is written.
const SAVE: Duration = Duration::from_secs(5);
/// Between two looks at whether something is due.
const PULSE: Duration = Duration::from_millis(20);
/// While there is no session.
const PATIENCE: Duration = Duration::from_millis(200);
/// Between two looks at whether a pass begins by itself.
const IDLE: Duration = Duration::from_secs(1);
/// The slowest that a pass goes that began by itself, bytes a second.
const SLOWEST: u64 = 1 << 20;

/// Lets time pass, or less of it when the thread is to end (see
/// [`Verifier::stop`](super::Verifier::stop)).
fn pause(time: Duration) {
    std::thread::park_timeout(time);
}

/// Why work on a pass ended before its end.
struct Stopped;

pub(super) struct Thread {
    checker: Checker,
    board: Arc<Board>,
    settings: Settings,
    file: File,
    record: Record,
    requests: Receiver<Request>,
    queue: Queue,
    /// Where the pass is.
    cursor: Option<ObjectId>,
    /// The pass has differences that stayed.
    stayed: bool,
    /// Objects whose content was found to differ.
    content: HashSet<ObjectId>,
    saved: Instant,
    pace: Pace,
}

impl Thread {
    pub(super) fn new(
        checker: Checker,
        board: Arc<Board>,
        settings: Settings,
        file: File,
        record: Record,
        requests: Receiver<Request>,
    ) -> Self {
        // From the first, for the record is written again before the pass goes on.
        let cursor = record.running.as_ref().and_then(Running::cursor);
        Self {
            checker,
            board,
            settings,
            file,
            record,
            requests,
            queue: Queue::default(),
            cursor,
            stayed: false,
            content: HashSet::new(),
            saved: Instant::now(),
            pace: Pace::new(None),
        }
    }

    /// Runs until it is told to stop.
    pub(super) fn run(mut self) {
        self.plan_next(false);
        while !self.is_stopping() {
            if self.record.running.is_none() && !self.next_begins() {
                continue;
            }
            self.checker.ticks.set_active(true);
            let ended = self.pass();
            self.queue.clear();
            self.content.clear();
            self.checker.rest();
            self.checker.ticks.set_active(false);
            // The engine may have ended.
            let _ = self.checker.post.send(Event::Verify(Query::Ended));
            if ended.is_ok() {
                self.end();
            }
        }
        self.save();
    }

    fn is_stopping(&self) -> bool {
        self.checker.stop.load(Ordering::Acquire)
    }

    // ------------------------------------------------------ between passes

    /// Waits a little for a reason to begin a pass; whether there is one.
    fn next_begins(&mut self) -> bool {
        match self.requests.recv_timeout(IDLE) {
            Ok(Request::Begin(options, reply)) => {
                self.begin_asked(options, &reply);
                return true;
            }
            Ok(Request::Stop) => return false,
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => {
                pause(PATIENCE);
                return false;
            }
        }
        let due = self.record.next.is_some_and(|next| Timestamp::now() >= next);
        // Not before there is anything to verify.
        if due && self.checker.shared.report().watermark > Timestamp::NEVER {
            self.begin(PassOptions { repair: true, rate: None }, false);
            return true;
        }
        false
    }

    fn begin_asked(&mut self, options: PassOptions, reply: &Sender<u64>) {
        self.begin(options, true);
        // Whoever asked may have given up waiting.
        let _ = reply.send(self.board.verification().pass);
    }

    fn begin(&mut self, options: PassOptions, asked: bool) {
        self.record.running = Some(Running::new(options, asked));
        self.cursor = None;
        self.queue.clear();
        self.board.begin();
        self.board.change(|now| {
            let (pass, last) = (now.pass + 1, now.last_verified_timestamp);
            let differences = std::mem::take(&mut now.differences);
            *now = replicator_common::verification::Verification {
                last_verified_timestamp: last,
                pass,
                running: true,
                started: Some(Timestamp::now()),
                differences,
                ..Default::default()
            };
        });
        tracing::info!(asked, repair = options.repair, "verification begins");
        self.save();
    }

    /// When the next pass begins by itself. `anew`: one has just ended.
    fn plan_next(&mut self, anew: bool) {
        let now = Timestamp::now();
        let Some(interval) = self.settings.interval else {
            self.record.next = None;
            return self.board.change(|now| now.next_pass = None);
        };
        let nanos = i64::try_from(interval.as_nanos()).unwrap_or(i64::MAX);
        let from = self.board.verification().started.filter(|_| anew).unwrap_or(now);
        let next = from.offset(nanos);
        // An interval that was made shorter counts, and one that was planned
        // stays planned over restarts.
        let next = self.record.next.filter(|_| !anew).map_or(next, |old| old.min(next));
        self.record.next = Some(next);
        let running = self.record.running.is_some();
        self.board.change(|now| now.next_pass = (!running).then_some(next));
        self.save();
    }

    fn end(&mut self) {
        self.record.running = None;
        let stayed = self.stayed;
        self.board.change(|now| {
            now.running = false;
            now.waiting = None;
            now.ended = Some(Timestamp::now());
            if !stayed && now.read_errors == 0 {
                now.last_verified_timestamp = now.last_verified_timestamp.max(now.started);
            }
        });
        let now = self.board.verification();
        tracing::info!(
            objects = now.objects,
            differences = now.found(),
            repaired = now.repaired,
            read_errors = now.read_errors,
            changing = now.changing,
            "verification ended"
        );
        self.board.shared().meters().verified(&now);
        self.plan_next(true);
    }

    fn save(&mut self) {
        self.saved = Instant::now();
        let cursor = self.queue.resume_at(self.cursor.as_ref());
        if let Some(running) = &mut self.record.running {
            running.set_cursor(cursor.as_ref());
        }
        self.record.verification = self.board.verification();
        if let Err(error) = self.file.write(&self.record) {
            tracing::warn!(%error, "a restart will begin this verification anew");
        }
    }

    // ------------------------------------------------------------- a pass

    fn pass(&mut self) -> Result<(), Stopped> {
        let Some(running) = self.record.running.clone() else { return Ok(()) };
        let now = self.board.verification();
        self.stayed = now.found() > now.repaired;
        self.wait_until_ready()?;
        // INVARIANT: a pass claims what the replica held when it began, so each object that
        // was acknowledged by then has a row before the first is looked at.
        while !self.checker.begin() {
            pause(PATIENCE);
            self.listen()?;
        }
        let (objects, cost) = self.measure();
        self.board.change(|now| now.objects_expected = objects);
        self.pace = Pace::new(self.rate(&running, cost));
        loop {
            self.turn()?;
            let chunk = self.chunk()?;
            let Some((last, _)) = chunk.last() else { break };
            let next = last.clone();
            while !self.examine(&chunk)? {
                pause(PATIENCE);
                self.wait_until_ready()?;
                self.turn()?;
            }
            self.cursor = Some(next);
            while self.queue.len() > DOUBTS {
                self.turn()?;
                pause(PULSE);
            }
        }
        while self.queue.len() > 0 {
            self.turn()?;
            pause(PULSE);
        }
        Ok(())
    }

    /// Waits for the initial sync to be through and the destination to be there.
    fn wait_until_ready(&mut self) -> Result<(), Stopped> {
        loop {
            let report = self.checker.shared.report();
            let why = if report.watermark == Timestamp::NEVER {
                Some("the initial sync is not through")
            } else if !report.link.connected || self.checker.abilities().is_none() {
                Some("the destination is not connected")
            } else {
                None
            };
            if self.board.verification().waiting.as_deref() != why {
                self.board.change(|now| now.waiting = why.map(str::to_owned));
            }
            if why.is_none() {
                return Ok(());
            }
            pause(PATIENCE);
            self.listen()?;
        }
    }

    /// Objects of the index, and what comparing them costs.
    fn measure(&self) -> (u64, u64) {
        let (mut objects, mut cost) = (0, 0u64);
        if let Some(snapshot) = self.checker.snapshot() {
            let counted = snapshot.each_object(|_, known| {
                objects += 1;
                let size = if known.state.kind == Kind::File { known.state.size } else { 0 };
                cost = cost.saturating_add(size.max(OBJECT_COST));
            });
            if let Err(error) = counted {
                tracing::warn!(%error, "the size of a verification is not known");
            }
        }
        (objects, cost)
    }

    /// Bytes a second: what was asked for; for a pass that began by itself, so
    /// few that it takes most of the interval.
    fn rate(&self, running: &Running, cost: u64) -> Option<u64> {
        if running.asked {
            return running.options.rate;
        }
        let seconds = self.settings.interval.unwrap_or_default().as_secs().max(1);
        let spread = cost / seconds + cost / seconds / 4;
        Some(spread.max(SLOWEST).min(self.settings.rate))
    }

    /// What is due beside the walk: requests, second looks, saving, pausing.
    fn turn(&mut self) -> Result<(), Stopped> {
        loop {
            self.listen()?;
            while let Some(waiting) = self.queue.take(Instant::now()) {
                self.settle(waiting);
                self.listen()?;
            }
            if self.saved.elapsed() >= SAVE {
                self.save();
            }
            self.pace.add(std::mem::take(&mut self.checker.read));
            let Some(rest) = self.pace.pause() else { break };
            pause(rest.min(PULSE));
        }
        if self.queue.len() == 0 {
            self.checker.ticks.settle(self.checker.ticks.now());
        }
        Ok(())
    }

    /// Hears requests: one replaces a pass that began by itself.
    fn listen(&mut self) -> Result<(), Stopped> {
        if self.is_stopping() {
            return Err(Stopped);
        }
        let Ok(request) = self.requests.try_recv() else { return Ok(()) };
        let Request::Begin(options, reply) = request else { return Err(Stopped) };
        if self.record.running.as_ref().is_some_and(|running| running.asked) {
            // Dropped: that says no.
            return Ok(());
        }
        self.begin_asked(options, &reply);
        Err(Stopped)
    }

    /// The next objects.
    fn chunk(&mut self) -> Result<Vec<(ObjectId, Known)>, Stopped> {
        loop {
            let found = self
                .checker
                .snapshot()
                .and_then(|snapshot| snapshot.objects_after(self.cursor.as_ref(), OBJECTS).ok());
            let Some(mut found) = found else {
                pause(PATIENCE);
                self.listen()?;
                continue;
            };
            let mut bytes = 0;
            let most = found.iter().position(|(_, known)| {
                bytes += if known.state.size <= PACK_MAX { known.state.size } else { 0 };
                bytes > BYTES
            });
            found.truncate(most.map_or(OBJECTS, |most| most + 1));
            return Ok(found);
        }
    }

    fn doubt(&mut self, item: Item) {
        self.queue.doubt(item, self.cursor.as_ref(), Instant::now());
    }

    fn unreadable(&self, item: &Item, error: String) {
        self.board.unreadable(self.checker.path(item), error);
    }

    // ------------------------------------------------------ the second look

    /// Looks at something in doubt, and settles it if that can be done now.
    fn settle(&mut self, waiting: Waiting) {
        let started = self.board.verification().started.unwrap_or(Timestamp::NEVER);
        let verdict = self.checker.check(&waiting.item, started);
        let now = Instant::now();
        if let Stage::Repairing(difference, _) = &waiting.stage {
            let difference = (**difference).clone();
            match &verdict {
                Verdict::Equal => return self.tell(difference, true),
                _ if waiting.is_overdue(now) => return self.tell(difference, false),
                _ => {}
            }
        }
        match verdict {
            Verdict::Equal => {}
            Verdict::NotNow => self.queue.put_back(waiting.later(now)),
            Verdict::Changing { fresh } => {
                let settled = fresh && matches!(waiting.stage, Stage::Doubt | Stage::Suspect);
                match waiting.changing(now) {
                    Some(waiting) if !settled => self.queue.put_back(waiting),
                    _ => self.board.change(|now| now.changing += 1),
                }
            }
            Verdict::Unreadable(error) => self.unreadable(&waiting.item, error),
            Verdict::Different(found) => self.different(waiting, *found, now),
        }
    }

    fn different(&mut self, waiting: Waiting, found: Found, now: Instant) {
        // A large file is met twice: for its state, and for its content.
        let content = match &waiting.item {
            Item::Object(object) | Item::Content(object, _)
                if found.kind == DifferenceKind::Content =>
            {
                Some(object.clone())
            }
            _ => None,
        };
        let known = content.as_ref().is_some_and(|object| self.content.contains(object));
        if known && matches!(waiting.stage, Stage::Suspect) {
            return;
        }
        let repair = self.record.running.as_ref().is_some_and(|running| running.options.repair);
        let difference = match &waiting.stage {
            Stage::Doubt => return self.queue.put_back(waiting.suspect(now)),
            Stage::Suspect => Difference {
                kind: found.kind,
                path: self.checker.path(&waiting.item),
                source: found.source.clone(),
                replica: found.replica.clone(),
                repaired: false,
                time: Timestamp::now(),
            },
            Stage::Repairing(difference, _) => (**difference).clone(),
        };
        if found.silent {
            // Whether it took effect, the next pass sees.
            self.checker.repair(found.repair);
            return;
        }
        if !repair {
            self.content.extend(content);
            return self.tell(difference, false);
        }
        if !self.checker.repair(found.repair) {
            // Batches are under way.
            return self.queue.put_back(waiting.soon(now));
        }
        self.content.extend(content);
        if matches!(waiting.stage, Stage::Suspect) {
            tracing::warn!(
                kind = difference.kind.as_str(),
                path = difference.path,
                source = difference.source,
                replica = difference.replica,
                "the replica differs and is put right"
            );
        }
        self.queue.put_back(waiting.repairing(difference, now));
    }

    fn tell(&mut self, difference: Difference, repaired: bool) {
        self.stayed |= !repaired;
        self.board.found(Difference { repaired, ..difference });
    }
}

fn is_small(found: &Seen) -> bool {
    found.state.kind == Kind::File && found.state.size <= PACK_MAX
}

/// Keeps a rate.
struct Pace {
    rate: Option<u64>,
    since: Instant,
    done: u64,
}

impl Pace {
    fn new(rate: Option<u64>) -> Self {
        Self { rate, since: Instant::now(), done: 0 }
    }

    fn add(&mut self, bytes: u64) {
        self.done = self.done.saturating_add(bytes);
    }

    /// How long to wait before more may be read.
    fn pause(&self) -> Option<Duration> {
        let rate = self.rate?.max(1);
        let due = Duration::from_secs_f64(self.done as f64 / rate as f64);
        due.checked_sub(self.since.elapsed()).filter(|left| !left.is_zero())
    }
}
