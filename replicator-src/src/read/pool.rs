//! The threads that read: some for small objects, one for large files (with one more for
//! those that it sends whole), one for what was appended to such, one that compares them.

use std::borrow::Cow;
use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use bytes::Bytes;
use crossbeam_channel::{Receiver, Sender, bounded, unbounded};
use foldhash::{HashMap, HashMapExt};
use replicator_common::id::{BatchId, ObjectId};
use replicator_common::name::Name;
use replicator_common::object::ObjectState;
use replicator_common::pulse;
use replicator_common::sys::quiet;
use replicator_common::wire::{DataFrame, PACK_MAX, PackRun, PackedObject, contents};
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
/// Objects in one job at most when they are of one new directory: what goes by one
/// stream is staged as neighbours.
const NEST_ITEMS: usize = 1024;
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
        for part in jobs(items) {
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

/// Shares objects out. Those of one new directory stay together, up to a limit.
fn jobs(items: Vec<Item>) -> Vec<Vec<Item>> {
    let mut places: HashMap<ObjectId, usize> = HashMap::new();
    let mut nests: Vec<Vec<Item>> = Vec::new();
    let mut others = Vec::new();
    for item in items {
        let Some((directory, _)) = item.spot() else {
            others.push(item);
            continue;
        };
        let place = *places.entry(directory.clone()).or_insert_with(|| {
            nests.push(Vec::new());
            nests.len() - 1
        });
        nests[place].push(item);
    }
    let mut jobs = Vec::new();
    let mut job: Vec<Item> = Vec::new();
    for nest in nests {
        for part in split(nest, NEST_ITEMS) {
            if job.len() + part.len() > NEST_ITEMS {
                jobs.push(std::mem::take(&mut job));
            }
            job.extend(part);
            if job.len() >= JOB_ITEMS {
                jobs.push(std::mem::take(&mut job));
            }
        }
    }
    jobs.push(job);
    jobs.extend(split(others, JOB_ITEMS));
    jobs.retain(|job| !job.is_empty());
    jobs
}

/// Parts of at most so many.
fn split(items: Vec<Item>, most: usize) -> impl Iterator<Item = Vec<Item>> {
    let mut items = items.into_iter();
    std::iter::from_fn(move || {
        let part: Vec<Item> = items.by_ref().take(most).collect();
        (!part.is_empty()).then_some(part)
    })
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
    let (mut pack, mut filled) = (Pack::for_items(&job.items), 0);
    let (mut again, mut again_filled) = (Vec::new(), 0);
    let stream = job.sink.pack_stream();
    let (mut ahead, mut count) = (VecDeque::new(), AHEAD);
    for (at, item) in job.items.iter().enumerate() {
        if ahead.is_empty() {
            ahead.extend(open(&job.items[at..job.items.len().min(at + count)], opener));
        }
        let opened = ahead.pop_front().unwrap_or_else(|| small::open(opener, item));
        let version = (job.batch, job.version);
        let reading = small::read(opener, &job.kept, (item, opened), version, &mut pack.data);
        report.outcomes.push((item.object.clone(), reading.outcome));
        // Of files that fill a pack soon, few are opened, for the rest is closed then.
        count = ((PACK_BYTES / 2 / reading.bytes.max(1)) as usize).clamp(1, AHEAD);
        report.packed += u64::from(reading.packed.is_some());
        match reading.packed {
            Some(Packed::Whole(packed)) => {
                filled += reading.bytes + apart(&packed.state);
                pack.push(item.spot(), packed);
            }
            Some(Packed::Again(object)) => {
                again_filled += apart(&object.state);
                again.push(object);
            }
            None => {}
        }
        if filled >= PACK_BYTES {
            // That may take as long as the network does. Whoever holds a file open
            // holds its room, should it be deleted.
            ahead.clear();
            pack.send(&job.sink, stream, job.batch)?;
            pack = Pack::for_items(&job.items[at + 1..]);
            filled = 0;
        }
        if again_filled >= PACK_BYTES {
            let objects = std::mem::take(&mut again);
            job.sink.send(stream, &DataFrame::PackAgain { batch: job.batch, objects })?;
            again_filled = 0;
        }
    }
    if !pack.objects.is_empty() {
        pack.send(&job.sink, stream, job.batch)?;
    }
    if !again.is_empty() {
        job.sink.send(stream, &DataFrame::PackAgain { batch: job.batch, objects: again })?;
    }
    Ok(report)
}

/// Bytes that an object takes in a frame beside its content, about.
fn apart(state: &ObjectState) -> u64 {
    512 + state.weight() as u64
}

/// Small objects that are to be sent together.
struct Pack {
    /// Places of the first objects, and of no others.
    runs: Vec<PackRun>,
    placed: usize,
    objects: Vec<PackedObject>,
    /// Their contents.
    data: Vec<u8>,
}

impl Pack {
    /// With room for what is read of these, if it is 4 KiB each.
    fn for_items(items: &[Item]) -> Self {
        const SMALL: usize = 4 << 10;
        let most = (PACK_BYTES + PACK_MAX) as usize;
        let count = items.iter().filter(|item| item.need.content).count();
        let data = Vec::with_capacity(count.saturating_mul(SMALL).min(most));
        Self { runs: Vec::new(), placed: 0, objects: Vec::new(), data }
    }

    fn push(&mut self, spot: Option<&(ObjectId, Name)>, packed: PackedObject) {
        if let Some((directory, name)) = spot.filter(|_| self.placed == self.objects.len()) {
            self.placed += 1;
            match self.runs.last_mut().filter(|run| run.directory == *directory) {
                Some(run) => run.names.push(name.clone()),
                None => {
                    let (directory, names) = (directory.clone(), vec![name.clone()]);
                    self.runs.push(PackRun { directory, names });
                }
            }
        }
        self.objects.push(packed);
    }

    fn send(self, sink: &Sink, stream: usize, batch: BatchId) -> Result<(), SinkError> {
        let Self { runs, objects, data: mut content, .. } = self;
        debug_assert!(contents(&objects, &content).is_some(), "objects and contents differ");
        // It waits for the network, perhaps for long, and counts by its length.
        content.shrink_to_fit();
        let content = Bytes::from(content);
        let data = Cow::Borrowed(&content[..]);
        let frame = if runs.is_empty() {
            DataFrame::Pack { batch, objects, data }
        } else {
            DataFrame::PackPlaced { batch, runs, objects, data }
        };
        sink.send_around(stream, &frame, &content)
    }
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

#[cfg(test)]
mod tests {
    use replicator_common::object::Kind;

    use super::*;
    use crate::plan::Need;

    fn item(number: u32, directory: Option<u8>) -> Item {
        let name = Name::new(format!("f{number}").as_bytes()).unwrap();
        let object = ObjectId::new(1, &number.to_be_bytes()).unwrap();
        let hint = directory.map(|n| (ObjectId::new(2, &[n]).unwrap(), name));
        let need = Need { kind: Kind::File, new: true, content: true, hint };
        Item { object, need, known: None, nested: directory.is_some() }
    }

    /// Nothing is lost or doubled, and what is of one directory is in one job.
    #[test]
    fn files_of_a_new_directory_stay_together() {
        let items: Vec<Item> = (0..5000)
            .map(|n| match n {
                // One directory that is too large for that, 30 that are not, and others.
                0..1500 => item(n, Some(0)),
                1500..4500 => item(n, Some(1 + (n % 30) as u8)),
                _ => item(n, None),
            })
            .collect();
        let shared = jobs(items.clone());
        let mut all: Vec<_> = shared.iter().flatten().map(|item| item.object.clone()).collect();
        all.sort();
        let mut wanted: Vec<_> = items.into_iter().map(|item| item.object).collect();
        wanted.sort();
        assert_eq!(all, wanted);
        assert!(shared.iter().all(|job| (1..=NEST_ITEMS).contains(&job.len())));
        let mut places: HashMap<ObjectId, Vec<usize>> = HashMap::new();
        for (number, item) in
            shared.iter().enumerate().flat_map(|(n, job)| job.iter().map(move |i| (n, i)))
        {
            if let Some((directory, _)) = item.spot() {
                places.entry(directory.clone()).or_default().push(number);
            }
        }
        for (directory, mut jobs) in places {
            jobs.dedup();
            let parts = if directory == ObjectId::new(2, &[0]).unwrap() { 2 } else { 1 };
            assert_eq!(jobs.len(), parts, "{directory}");
        }
    }
}
