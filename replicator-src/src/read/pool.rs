//! The threads that read: some for small objects, one for large files, one for what
//! was appended to such, one that compares them.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, bounded, unbounded};
use replicator_common::id::{BatchId, ObjectId};
use replicator_common::pulse;
use replicator_common::sys::quiet;
use replicator_common::wire::{DataFrame, PACK_MAX};
use rustix::io::Errno;

use super::kept::KeptObjects;
use super::lane::{self, Done, Job, LaneError};
use super::sink::{Sink, SinkError};
use super::small::{self, Item, Packed};
use super::tail;
use crate::index::Store;
use crate::plan::Outcome;
use crate::source::{Opened, Opener};

/// Objects in one job: enough to fill a frame, few enough to share the work.
const JOB_ITEMS: usize = 128;
/// Content bytes after which a pack is sent. Half a mebibyte: far below the
/// frame limit with one more file of the largest packed size.
const PACK_BYTES: u64 = 512 << 10;
/// Objects of a job that are open at a time.
const AHEAD: usize = 16;
/// Jobs that wait for a reader.
const JOBS: usize = 64;

/// What reading a job gave.
pub struct Report {
    /// Outcome of each object, in no particular order.
    pub outcomes: Vec<(ObjectId, Outcome)>,
    /// Objects packed and sent.
    pub packed: u64,
}

struct SmallJob {
    number: usize,
    items: Vec<Item>,
    batch: BatchId,
    version: u32,
    sink: Sink,
    kept: Arc<KeptObjects>,
    reply: Sender<(usize, Result<Report, SinkError>)>,
}

/// Reading under way for one batch.
pub struct Reading<'a> {
    pool: &'a Pool,
    batch: BatchId,
    sink: Sink,
    kept: Arc<KeptObjects>,
    reply: Sender<(usize, Result<Report, SinkError>)>,
    replies: Receiver<(usize, Result<Report, SinkError>)>,
    jobs: usize,
}

impl Reading<'_> {
    /// Hands objects to the readers; waits only while their queue is full.
    /// `version` must grow whenever an object may be among them again.
    pub fn add(&mut self, items: Vec<Item>, version: u32) -> Result<(), SinkError> {
        let mut items = items.into_iter().peekable();
        while items.peek().is_some() {
            let part: Vec<Item> = items.by_ref().take(JOB_ITEMS).collect();
            let (sink, reply) = (self.sink.clone(), self.reply.clone());
            let (number, batch, kept) = (self.jobs, self.batch, self.kept.clone());
            let job = SmallJob { number, items: part, batch, version, sink, kept, reply };
            let queue = self.pool.small.as_ref().ok_or(SinkError::Closed)?;
            pulse::waiting(|| queue.send(job)).map_err(|_| SinkError::Closed)?;
            self.jobs += 1;
        }
        Ok(())
    }

    /// Waits for the readers; all content is on its way when this returns.
    /// An object that was handed in twice has two outcomes, the newer one last:
    /// it alone is known to be of the time after the second look.
    pub fn end(self) -> Result<Report, SinkError> {
        let Self { reply, replies, jobs, .. } = self;
        drop(reply);
        let mut reports = Vec::with_capacity(jobs);
        while let Ok((number, report)) = pulse::waiting(|| replies.recv()) {
            reports.push((number, report?));
        }
        if reports.len() < jobs {
            return Err(SinkError::Closed);
        }
        reports.sort_by_key(|(number, _)| *number);
        let mut all = Report { outcomes: Vec::new(), packed: 0 };
        for (_, report) in reports {
            all.outcomes.extend(report.outcomes);
            all.packed += report.packed;
        }
        Ok(all)
    }
}

struct LargeJob {
    job: Job,
    sink: Sink,
    reply: Box<dyn FnOnce(Job, Result<Done, LaneError>) + Send>,
}

struct TailJob {
    job: tail::Job,
    sink: Sink,
    reply: Box<dyn FnOnce(tail::Job, Result<tail::Done, LaneError>) + Send>,
}

/// How a comparison ended, and how long it took.
type Compared = (Result<Option<tail::Compared>, LaneError>, Duration);

struct CompareJob {
    job: tail::Comparison,
    reply: Box<dyn FnOnce(tail::Comparison, Compared) + Send>,
}

/// Reader threads of one source. Dropping it ends them when their work is done.
pub struct Pool {
    small: Option<Sender<SmallJob>>,
    large: Option<Sender<LargeJob>>,
    tails: Option<Sender<TailJob>>,
    comparisons: Option<Sender<CompareJob>>,
    /// What only reads ends: nobody waits for it any more.
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl Pool {
    /// Starts `readers` threads for small objects and `lanes` for large files.
    pub fn start(
        opener: &Opener,
        store: &Arc<Store>,
        readers: usize,
        lanes: usize,
    ) -> std::io::Result<Self> {
        let (small, small_jobs) = bounded::<SmallJob>(JOBS);
        // The engine bounds the transfers under way; sending must not block it.
        let (large, large_jobs) = unbounded::<LargeJob>();
        let mut threads = Vec::new();
        let stop = Arc::new(AtomicBool::new(false));
        for number in 0..readers.max(1) {
            let (jobs, opener) = (small_jobs.clone(), opener.clone());
            let builder = std::thread::Builder::new().name(format!("read-{number}"));
            threads.push(builder.spawn(move || read_small(&jobs, &opener))?);
        }
        for number in 0..lanes.max(1) {
            let (jobs, opener, store) = (large_jobs.clone(), opener.clone(), store.clone());
            let stop = stop.clone();
            let builder = std::thread::Builder::new().name(format!("lane-{number}"));
            threads.push(builder.spawn(move || read_large(&jobs, &opener, &store, &stop))?);
        }
        let (tails, tail_jobs) = unbounded::<TailJob>();
        let builder = std::thread::Builder::new().name("tail".to_owned());
        threads.push(builder.spawn({
            let (opener, store) = (opener.clone(), store.clone());
            move || read_tails(&tail_jobs, &opener, &store)
        })?);
        let (comparisons, compare_jobs) = unbounded::<CompareJob>();
        let builder = std::thread::Builder::new().name("compare".to_owned());
        threads.push(builder.spawn({
            let (opener, store, stop) = (opener.clone(), store.clone(), stop.clone());
            move || compare(&compare_jobs, &opener, &store, &stop)
        })?);
        let (small, large) = (Some(small), Some(large));
        let (tails, comparisons) = (Some(tails), Some(comparisons));
        Ok(Self { small, large, tails, comparisons, stop, threads })
    }

    /// Begins to read for a batch; what is needed is handed in as it is found.
    /// What the destination has `kept` is not sent.
    pub fn begin(&self, batch: BatchId, sink: &Sink, kept: &Arc<KeptObjects>) -> Reading<'_> {
        let (reply, replies) = unbounded();
        let (sink, kept) = (sink.clone(), kept.clone());
        Reading { pool: self, batch, sink, kept, reply, replies, jobs: 0 }
    }

    /// Starts sending a large file; `reply` is called on the lane's thread.
    pub fn transfer(
        &self,
        job: Job,
        sink: &Sink,
        reply: impl FnOnce(Job, Result<Done, LaneError>) + Send + 'static,
    ) {
        if let Some(queue) = &self.large {
            // The queue is unbounded and its threads live as long as it does,
            // so this cannot fail.
            let _ = queue.send(LargeJob { job, sink: sink.clone(), reply: Box::new(reply) });
        }
    }

    /// Starts sending what was appended to a large file, on a thread that no large
    /// file holds up; `reply` is called there.
    pub fn append(
        &self,
        job: tail::Job,
        sink: &Sink,
        reply: impl FnOnce(tail::Job, Result<tail::Done, LaneError>) + Send + 'static,
    ) {
        if let Some(queue) = &self.tails {
            let _ = queue.send(TailJob { job, sink: sink.clone(), reply: Box::new(reply) });
        }
    }

    /// Starts to compare a large file with what the replica holds, on a thread of
    /// low priority; `reply` is called there.
    pub fn compare(
        &self,
        job: tail::Comparison,
        reply: impl FnOnce(tail::Comparison, Compared) + Send + 'static,
    ) {
        if let Some(queue) = &self.comparisons {
            let _ = queue.send(CompareJob { job, reply: Box::new(reply) });
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        self.small = None;
        self.large = None;
        self.tails = None;
        self.comparisons = None;
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                tracing::error!("a reader thread panicked");
            }
        }
    }
}

fn read_small(jobs: &Receiver<SmallJob>, opener: &Opener) {
    for job in jobs {
        let result = read_job(&job, opener);
        // The engine stops listening when it gives a batch up.
        let _ = job.reply.send((job.number, result));
    }
}

fn read_job(job: &SmallJob, opener: &Opener) -> Result<Report, SinkError> {
    let mut report = Report { outcomes: Vec::new(), packed: 0 };
    let (mut pack, mut filled, mut again) = (Vec::new(), 0, Vec::new());
    let flush = |pack: &mut Vec<_>| {
        let objects = std::mem::take(pack);
        job.sink.pack(&DataFrame::Pack { batch: job.batch, objects })
    };
    let (mut ahead, mut count) = (VecDeque::new(), AHEAD);
    for (at, item) in job.items.iter().enumerate() {
        if ahead.is_empty() {
            ahead.extend(open(&job.items[at..job.items.len().min(at + count)], opener));
        }
        let opened = ahead.pop_front().unwrap_or_else(|| small::open(opener, item));
        let reading = small::read(opener, &job.kept, (item, opened), job.batch, job.version);
        report.outcomes.push((item.object.clone(), reading.outcome));
        // Of files that fill a pack soon, few are opened, for the rest is closed then.
        count = ((PACK_BYTES / 2 / reading.bytes.max(1)) as usize).clamp(1, AHEAD);
        report.packed += u64::from(reading.packed.is_some());
        match reading.packed {
            Some(Packed::Whole(packed)) => {
                // 512: an object's attributes and frame overhead, roughly.
                filled += reading.bytes + 512;
                pack.push(packed);
            }
            Some(Packed::Again(object)) => again.push(object),
            None => {}
        }
        if filled >= PACK_BYTES {
            // That may take as long as the network does. Whoever holds a file open
            // holds its room, should it be deleted.
            ahead.clear();
            flush(&mut pack)?;
            filled = 0;
        }
    }
    if !pack.is_empty() {
        flush(&mut pack)?;
    }
    // At most [`JOB_ITEMS`], whose attributes fit a frame as those of a pack do.
    if !again.is_empty() {
        job.sink.pack(&DataFrame::PackAgain { batch: job.batch, objects: again })?;
    }
    Ok(report)
}

/// Opens objects that are read one after the other, up to one that is known to be
/// large. The disk reads the others while the first is waited for, hashed and packed.
fn open(items: &[Item], opener: &Opener) -> Vec<Result<Opened, Errno>> {
    let large = |item: &&Item| item.known.as_ref().is_some_and(|k| k.state.size > PACK_MAX);
    let several = items.iter().take_while(|item| !large(item));
    let opened: Vec<_> = several.map(|item| small::open(opener, item)).collect();
    for (item, opened) in items.iter().zip(&opened).skip(1) {
        small::announce(item, opened);
    }
    opened
}

fn read_large(jobs: &Receiver<LargeJob>, opener: &Opener, store: &Store, stop: &AtomicBool) {
    for LargeJob { mut job, sink, reply } in jobs {
        let start = Instant::now();
        let done = lane::send(opener, store, &sink, &job, stop);
        job.took = start.elapsed();
        reply(job, done);
    }
}

fn read_tails(jobs: &Receiver<TailJob>, opener: &Opener, store: &Store) {
    for TailJob { job, sink, reply } in jobs {
        let done = tail::send(opener, store, &sink, &job);
        reply(job, done);
    }
}

fn compare(jobs: &Receiver<CompareJob>, opener: &Opener, store: &Store, stop: &AtomicBool) {
    quiet::background_thread();
    for CompareJob { job, reply } in jobs {
        let start = Instant::now();
        let compared = tail::compare(opener, store, &job, stop);
        reply(job, (compared, start.elapsed()));
    }
}
