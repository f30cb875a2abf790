//! The capture thread: owns the watcher, drops what lies outside the source,
//! and appends the rest to the journal.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, TrySendError, bounded, unbounded};
use replicator_common::id::{ObjectId, Seq};
use replicator_common::status::WatcherReport;
use replicator_common::time::Timestamp;

use crate::arrivals::Arrivals;
use crate::clock::Clock;
use crate::journal::{Journal, JournalError, Record};
use crate::meters::{ErrorKind, Meters, Stage};
use crate::watcher::{Change, DirectoryWatch, Queue, Waker, WatchError, Watcher};

mod members;

pub use members::Members;
use members::Recent;

/// How long one read of the watcher waits; only bounds how stale its report
/// can get, barriers and stops wake it.
const READ_WAIT: Duration = Duration::from_secs(1);

/// The least time between two flushes of the journal, unless the process ends:
/// each costs the same however little it writes, and wakes all seven threads of sled's
/// pool. It bounds what a crash loses, and a walk then takes whatever changed within two
/// seconds for doubtful ([`crate::index::known::DOUBT_NANOS`]).
const FLUSH_PAUSE: Duration = Duration::from_millis(250);

/// The queue was drained: everything before `time` is in the journal up to `seq`.
#[derive(Clone, Copy, Debug)]
pub struct Barrier {
    /// Number of the barrier's record.
    pub seq: Seq,
    /// The moment at which the drain began (see [`crate::clock`]).
    pub time: Timestamp,
}

/// Why capturing stopped.
#[derive(Debug, thiserror::Error)]
pub enum CaptureError {
    /// The watcher broke.
    #[error(transparent)]
    Watch(#[from] WatchError),
    /// The journal does not take records.
    #[error(transparent)]
    Journal(#[from] JournalError),
    /// The capture thread is gone.
    #[error("capture stopped: {0}")]
    Stopped(String),
}

/// What a capture thread that ended well leaves to the one of the next process.
#[derive(Debug)]
pub struct Left {
    /// The watcher's queue. All that was read from it is in the journal.
    pub queue: Queue,
    /// Objects whose attributes changed lately, see [`Capture::start`].
    pub recent: Vec<ObjectId>,
}

/// The running capture thread.
pub struct Capture {
    requests: Sender<Sender<Result<Barrier, String>>>,
    waker: Waker,
    stop: Arc<AtomicBool>,
    shared: Arc<Shared>,
    thread: Option<JoinHandle<Option<Thread>>>,
    flusher: Option<JoinHandle<()>>,
    directories: Arc<dyn DirectoryWatch>,
    proves: Arc<AtomicBool>,
    rescan_every: Arc<Mutex<Option<Duration>>>,
}

struct Shared {
    report: Mutex<WatcherReport>,
    events: AtomicU64,
    failed: Mutex<Option<String>>,
    /// When what is in no batch yet came.
    arrivals: Mutex<Arrivals>,
    /// Since when something waits to be flushed.
    unflushed: Mutex<Option<Instant>>,
    meters: Arc<Meters>,
}

impl Shared {
    fn arrivals(&self) -> MutexGuard<'_, Arrivals> {
        self.arrivals.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn unflushed(&self) -> MutexGuard<'_, Option<Instant>> {
        self.unflushed.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Capture {
    /// Starts the thread. `captured` gets a token whenever records were
    /// appended (it holds one at most). `recent` is what the thread of a process
    /// before this one left, whose queue `watcher` goes on with.
    pub fn start(
        watcher: Box<dyn Watcher>,
        journal: Arc<Journal>,
        members: Arc<Members>,
        captured: Sender<()>,
        clock: Arc<Clock>,
        recent: &[ObjectId],
        meters: Arc<Meters>,
    ) -> std::io::Result<Self> {
        let (requests, barriers) = unbounded();
        let (flush, flushes) = bounded(1);
        // Nothing is ever sent: it ends when `flush` does.
        let (running, ended) = bounded::<()>(0);
        let shared = Arc::new(Shared {
            report: Mutex::new(watcher.report()),
            events: AtomicU64::new(0),
            failed: Mutex::new(None),
            arrivals: Mutex::default(),
            unflushed: Mutex::default(),
            meters,
        });
        let stop = Arc::new(AtomicBool::new(false));
        let capture = Self {
            requests,
            waker: watcher.waker(),
            stop: stop.clone(),
            shared: shared.clone(),
            directories: watcher.directories(),
            proves: Arc::new(AtomicBool::new(watcher.proves())),
            rescan_every: Arc::new(Mutex::new(watcher.rescan_every())),
            thread: None,
            flusher: None,
        };
        let rescan_every = capture.rescan_every.clone();
        let proves = capture.proves.clone();
        let flusher = journal.clone();
        let failed = shared.clone();
        let mut this = capture;
        let flush_all = move || {
            for () in flushes {
                let since = failed.unflushed().take();
                match flusher.flush() {
                    Ok(_) => failed.meters.passed(Stage::Journaled, since),
                    Err(error) => {
                        tracing::error!(%error, "cannot flush the journal");
                        failed.meters.error(ErrorKind::Journal);
                        fail(&failed, &error);
                    }
                }
                let _ = ended.recv_timeout(FLUSH_PAUSE);
            }
        };
        let named = |name: &str| std::thread::Builder::new().name(name.into());
        this.flusher = Some(named("journal-flush").spawn(flush_all)?);
        let mut known = Recent::default();
        recent.iter().for_each(|object| known.add(object));
        let mut thread = Thread {
            watcher,
            journal,
            members,
            captured,
            flush: (flush, running),
            shared,
            rescan_every,
            proves,
            recent: known,
            clock,
        };
        this.thread = Some(named("capture").spawn(move || match thread.run(&barriers, &stop) {
            Ok(()) => Some(thread),
            Err(error) => {
                tracing::error!(%error, "capture stopped");
                thread.shared.meters.error(ErrorKind::Capture);
                fail(&thread.shared, &error);
                None
            }
        })?);
        Ok(this)
    }

    /// Drains the queue and returns where everything before the call stands.
    pub fn barrier(&self) -> Result<Barrier, CaptureError> {
        let (reply, answer) = bounded(1);
        let stopped = || CaptureError::Stopped(self.failure().unwrap_or_default());
        self.requests.send(reply).map_err(|_| stopped())?;
        self.waker.wake();
        answer.recv().map_err(|_| stopped())?.map_err(CaptureError::Stopped)
    }

    /// Ends the thread, and gives what the next process needs to go on where it
    /// was; `None` when this watcher cannot be handed over, or something failed.
    ///
    /// INVARIANT: nothing is read from the queue after this, and all that was
    /// read from it, as far as it concerns the source, is in the journal (not
    /// yet flushed).
    pub fn finish(mut self) -> Option<Left> {
        let thread = self.end()?;
        if self.failure().is_some() {
            return None;
        }
        let recent = thread.recent.order.into();
        Some(Left { queue: thread.watcher.hand_over()?, recent })
    }

    /// Ends both threads; gives what the first worked with when it ended well.
    fn end(&mut self) -> Option<Thread> {
        self.stop.store(true, Ordering::Release);
        self.waker.wake();
        let ended = self.thread.take().and_then(|thread| {
            thread.join().inspect_err(|_| tracing::error!("the capture thread panicked")).ok()
        });
        let mut thread = ended.flatten();
        // Its ends of the channels are what the other waits for.
        if let Some(thread) = &mut thread {
            thread.flush = (bounded(0).0, bounded(0).0);
        }
        if let Some(flusher) = self.flusher.take()
            && flusher.join().is_err()
        {
            tracing::error!("the journal's flusher panicked");
        }
        thread
    }

    /// See [`Watcher::directories`].
    pub fn directories(&self) -> Arc<dyn DirectoryWatch> {
        self.directories.clone()
    }

    /// See [`Watcher::proves`].
    pub fn proves(&self) -> bool {
        self.proves.load(Ordering::Acquire)
    }

    /// See [`Watcher::rescan_every`].
    pub fn rescan_every(&self) -> Option<Duration> {
        *self.rescan_every.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// See [`Watcher::report`].
    pub fn report(&self) -> WatcherReport {
        self.shared.report.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Changes read from the watcher so far.
    pub fn events(&self) -> u64 {
        self.shared.events.load(Ordering::Relaxed)
    }

    /// Records up to `seq` are in a batch: when the event of the oldest of them
    /// was read that were in none before.
    pub fn taken(&self, seq: Seq) -> Option<Instant> {
        self.shared.arrivals().taken(seq)
    }

    /// Why capturing stopped, if it did.
    pub fn failure(&self) -> Option<String> {
        self.shared.failed.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl Drop for Capture {
    fn drop(&mut self) {
        self.end();
    }
}

fn fail(shared: &Shared, error: &dyn std::fmt::Display) {
    *shared.failed.lock().unwrap_or_else(PoisonError::into_inner) = Some(error.to_string());
}

struct Thread {
    watcher: Box<dyn Watcher>,
    journal: Arc<Journal>,
    members: Arc<Members>,
    captured: Sender<()>,
    /// A token for each flush that is wanted, and what ends the pause after one.
    flush: (Sender<()>, Sender<()>),
    shared: Arc<Shared>,
    rescan_every: Arc<Mutex<Option<Duration>>>,
    proves: Arc<AtomicBool>,
    recent: Recent,
    clock: Arc<Clock>,
}

impl Thread {
    fn run(
        &mut self,
        barriers: &Receiver<Sender<Result<Barrier, String>>>,
        stop: &AtomicBool,
    ) -> Result<(), CaptureError> {
        let mut changes = Vec::new();
        let turns = self.shared.meters.turns();
        while !stop.load(Ordering::Acquire) {
            turns.set(Timestamp::now().as_seconds());
            self.watcher.read(READ_WAIT, &mut changes)?;
            if self.append(&mut changes)? {
                // A full channel already says what this would say.
                if let Err(TrySendError::Disconnected(())) = self.captured.try_send(()) {
                    return Ok(());
                }
            }
            self.refresh_report();
            while let Ok(reply) = barriers.try_recv() {
                let answer = self.barrier(&mut changes);
                let text = answer.as_ref().map(|b| *b).map_err(ToString::to_string);
                // The asker may be gone.
                let _ = reply.send(text);
                answer?;
            }
        }
        Ok(())
    }

    fn barrier(&mut self, changes: &mut Vec<Change>) -> Result<Barrier, CaptureError> {
        let time = self.clock.now();
        // A mark that died leaves a queue that is merely empty (trap 13).
        self.watcher.alive()?;
        self.drain(changes)?;
        let seq = self.journal.append(&[Record::Barrier { time }])?;
        self.proves.store(self.watcher.proves(), Ordering::Release);
        self.shared.meters.barrier();
        Ok(Barrier { seq, time })
    }

    /// Brings what is queued now into the journal, part by part: a queue that
    /// grew long meanwhile is never in memory as a whole.
    fn drain(&mut self, changes: &mut Vec<Change>) -> Result<(), CaptureError> {
        let mut left = self.watcher.queued()?;
        while left > 0 {
            match self.watcher.take(changes)? {
                0 => break,
                count => left = left.saturating_sub(count),
            }
            self.append(changes)?;
        }
        Ok(())
    }

    /// Appends what concerns the source; says whether there was any.
    fn append(&mut self, changes: &mut Vec<Change>) -> Result<bool, CaptureError> {
        if changes.is_empty() {
            return Ok(false);
        }
        self.shared.events.fetch_add(changes.len() as u64, Ordering::Relaxed);
        let read = Instant::now();
        let mut records: Vec<Record> = Vec::with_capacity(changes.len());
        for change in changes.drain(..) {
            self.recent.note(&change);
            self.members.keep(&change, &self.recent);
            if self.members.concerns(&change, &self.recent) {
                records.extend(self.members.record(change));
            }
        }
        if records.is_empty() {
            return Ok(false);
        }
        for record in &records {
            tracing::trace!(?record, "captured");
        }
        {
            // Held meanwhile: who takes a record from the journal finds when it came.
            let mut arrivals = self.shared.arrivals();
            let last = self.journal.append(&records)?;
            let before = last.0.saturating_sub(records.len() as u64);
            arrivals.came(Seq(before + 1), last, read);
        }
        self.shared.unflushed().get_or_insert(read);
        let _ = self.flush.0.try_send(());
        Ok(true)
    }

    fn refresh_report(&self) {
        let report = self.watcher.report();
        *self.shared.report.lock().unwrap_or_else(PoisonError::into_inner) = report;
        *self.rescan_every.lock().unwrap_or_else(PoisonError::into_inner) =
            self.watcher.rescan_every();
        self.proves.store(self.watcher.proves(), Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::watcher::What;

    fn id(number: u64) -> ObjectId {
        ObjectId::new(1, &number.to_be_bytes()).unwrap()
    }

    fn change(object: u64, via: Option<u64>, content: bool) -> Change {
        let what = What { content, attributes: true };
        Change::Object { object: id(object), via: via.map(id), what }
    }

    /// One of ours, one that is not.
    const OURS: u64 = 1;
    const FOREIGN: u64 = 2;

    struct Sieve {
        members: Members,
        recent: Recent,
    }

    impl Sieve {
        fn new() -> Self {
            let members = Members::default();
            members.add_directory(id(OURS));
            Self { members, recent: Recent::default() }
        }

        /// What the capture thread does with each change.
        fn passes(&mut self, change: &Change) -> bool {
            self.recent.note(change);
            self.members.keep(change, &self.recent);
            self.members.concerns(change, &self.recent)
        }

        /// Names are removed all over the file system.
        fn churn(&mut self) {
            for number in 0..2 * Recent::MOST as u64 {
                self.passes(&change(1000 + number, None, false));
            }
        }
    }

    #[test]
    fn trap_2_a_nameless_file_made_outside_and_linked_in_is_not_forgotten() {
        let mut sieve = Sieve::new();
        assert!(!sieve.passes(&change(10, Some(FOREIGN), true)), "still outside");
        // linkat(2): the number of links, then the entry.
        assert!(sieve.passes(&change(10, None, false)));
        assert!(sieve.passes(&change(10, Some(OURS), true)));
        sieve.churn();
        assert!(sieve.passes(&change(10, Some(FOREIGN), true)), "written where it was opened");
    }

    #[test]
    fn trap_3_what_comes_from_outside_may_differ_in_all() {
        let sieve = Sieve::new();
        let from = |from: Option<u64>| Change::Arrived {
            object: id(10),
            from: from.map(id),
            to: id(OURS),
        };
        let what = What { content: true, attributes: true };
        let all = Some(Record::Object { object: id(10), what });
        assert_eq!(sieve.members.record(from(Some(FOREIGN))), all);
        assert_eq!(sieve.members.record(from(None)), all);
        assert_eq!(sieve.members.record(from(Some(OURS))), None);
    }

    /// A queue that a process left to this one is read at once: what the index knows may
    /// be known here only later.
    #[test]
    fn nothing_is_lost_while_members_are_loading() {
        let mut sieve = Sieve::new();
        let entry = |directory| {
            let name = replicator_common::name::Name::new(b"f").unwrap();
            Change::Entry { directory: id(directory), name }
        };
        const LATER: u64 = 3;
        sieve.members.loading(true);
        assert!(sieve.passes(&entry(LATER)) && sieve.passes(&change(10, Some(LATER), true)));
        // Opened elsewhere, and linked into a directory that is not loaded yet.
        assert!(
            sieve.passes(&change(11, None, false)) && sieve.passes(&change(11, Some(LATER), true))
        );
        sieve.members.add_directory(id(LATER));
        sieve.members.loading(false);
        sieve.churn();
        assert!(sieve.passes(&entry(LATER)) && !sieve.passes(&entry(FOREIGN)));
        assert!(sieve.passes(&change(11, Some(FOREIGN), true)), "written where it was opened");
    }

    #[test]
    fn what_is_removed_is_not_kept() {
        let mut sieve = Sieve::new();
        // unlink(2): the number of links, then the entry.
        assert!(sieve.passes(&change(10, None, false)));
        assert!(sieve.passes(&change(10, Some(OURS), false)));
        assert!(!sieve.members.knows(&id(10)), "or every removed file would stay in memory");
        sieve.churn();
        assert!(!sieve.passes(&change(10, Some(FOREIGN), true)));
    }
}
