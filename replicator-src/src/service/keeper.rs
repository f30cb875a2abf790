//! What runs of one replication, and what keeps it running: an engine and a
//! link while the source is there, and a look every now and then while it is
//! not.
//!
//! INVARIANT: nothing of a source that is not the one that was replicated is
//! read: its root's identity is compared before anything is opened, and the
//! engine, which pins that root, ends when the path leads elsewhere.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, bounded, unbounded};
use replicator_common::id::{BatchId, ObjectId};
use replicator_common::name::Name;
use replicator_common::net::identity::Identity;
use replicator_common::object::Kind;
use replicator_common::status::WatcherKind;
use replicator_common::supervisor::Supervisor;
use replicator_common::sys::place;
use replicator_common::time::Timestamp;

use super::replication::{Configuration, Replication};
use super::{ServiceError, SourceOptions, census, check_state_outside};
use crate::boot::Boot;
use crate::capture::{Capture, Members};
use crate::engine::halt::Halt;
use crate::engine::verify::Ticks;
use crate::engine::{self, Command, Ended, Engine, Event, Parts, Start};
use crate::handover::{self, Carried, Rest};
use crate::index::{Index, Known, Store};
use crate::journal::Journal;
use crate::read::pool::Pool;
use crate::read::sink::Wired;
use crate::session::{self, Remote};
use crate::source::{Filter, Opener, Places, Root, SourceError, SourceTree};
use crate::verify::{self, Verifier};
use crate::watcher::{self, DirectoryWatch, Watcher};

/// Threads that read small objects. On two cores and a disk that is not in the
/// cache, two of four wait for the disk at any time; more gave nothing.
const READERS: usize = 4;
/// Threads that send large files.
const LANES: usize = 1;
/// How often a source that is not there is looked for.
const LOOK: Duration = Duration::from_secs(1);
/// How often a source that came back may fail to start before that is an error.
const TRIES: u32 = 10;

/// How long an engine that is told to stop may go on to send before its
/// connection is taken away.
const LAST_FRAME: Duration = Duration::from_secs(5);

/// What keeps a replication running.
pub(super) struct Keeper {
    /// Ends with what the next process needs to go on without a walk.
    thread: JoinHandle<Option<Box<Rest>>>,
    stopping: Arc<AtomicBool>,
    /// Wakes the thread when it is dropped.
    wake: Sender<()>,
}

/// What runs while the source is there.
pub(super) struct Running {
    pub(super) post: Sender<Event>,
    link: tokio::task::JoinHandle<()>,
    census: Option<(JoinHandle<()>, Arc<AtomicBool>)>,
    /// Ends before what it reads is opened again.
    _loading: Option<Loading>,
    pub(super) verifier: Arc<Verifier>,
}

/// What a start takes.
#[derive(Clone)]
struct Means {
    options: SourceOptions,
    identity: Identity,
    runtime: tokio::runtime::Handle,
    supervisor: Arc<Supervisor>,
}

/// Why a source cannot be started.
enum NotStarted {
    /// It is not there. That may end by itself.
    Vanished(String),
    /// Something else.
    Failed(ServiceError),
}

impl<E: Into<ServiceError>> From<E> for NotStarted {
    fn from(error: E) -> Self {
        match error.into() {
            ServiceError::Source(error @ SourceError::Unusable { .. }) => {
                Self::Vanished(error.to_string())
            }
            error => Self::Failed(error),
        }
    }
}

impl Replication {
    /// Starts watching and shipping, as soon as the source is there.
    pub(super) fn start(
        self: &Arc<Self>,
        options: &SourceOptions,
        identity: &Identity,
        runtime: &tokio::runtime::Handle,
        supervisor: &Arc<Supervisor>,
    ) -> Result<(), ServiceError> {
        let means = Means {
            supervisor: supervisor.clone(),
            options: options.clone(),
            identity: identity.clone(),
            runtime: runtime.clone(),
        };
        let engine = match self.assemble(&means) {
            Ok(engine) => Some(engine),
            Err(NotStarted::Vanished(reason)) => {
                tracing::error!(reason, "replication halted: the source is not there");
                self.shared.vanished(&reason);
                None
            }
            Err(NotStarted::Failed(error)) => return Err(error),
        };
        let stopping = Arc::new(AtomicBool::new(false));
        let (wake, woken) = bounded(0);
        let (this, flag) = (self.clone(), stopping.clone());
        let thread = std::thread::Builder::new()
            .name("engine".to_owned())
            .spawn(move || this.keep(engine, &means, &flag, &woken))
            .map_err(|source| ServiceError::Start { what: "the engine", source })?;
        let keeper = Keeper { thread, stopping, wake };
        *self.keeper.lock().unwrap_or_else(PoisonError::into_inner) = Some(keeper);
        Ok(())
    }

    /// Whether it ended by itself, or could not be started: with an error. One
    /// whose source is not there has not ended: it looks for it.
    pub(super) fn has_ended(&self) -> bool {
        match &*self.keeper.lock().unwrap_or_else(PoisonError::into_inner) {
            Some(keeper) => keeper.thread.is_finished(),
            None => self.shared.failure().is_some(),
        }
    }

    /// Ends everything that runs, cleanly; what the next process needs to go on
    /// without a walk is left to it where the service manager keeps the watch.
    /// Repeatable.
    pub(super) fn stop(&self, supervisor: &Supervisor) {
        let keeper = self.keeper.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Some(Keeper { thread, stopping, wake }) = keeper else { return };
        // First the flag, then the word: an engine that starts meanwhile sees
        // the one or gets the other.
        stopping.store(true, Ordering::SeqCst);
        drop(wake);
        if let Some(running) = &*self.running() {
            running.verifier.stop();
        }
        self.post(Command::Stop { hand_over: supervisor.is_present() });
        // It may be handing frames to a destination that takes none.
        let until = Instant::now() + LAST_FRAME;
        while !thread.is_finished() && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(2));
        }
        if let Some(running) = &*self.running() {
            running.link.abort();
        }
        match thread.join() {
            Ok(None) => {}
            Ok(Some(rest)) => {
                let source = self.configuration().source;
                match handover::leave(&self.directory, &source, &rest, supervisor) {
                    Ok(()) => tracing::info!(%source, "the watch goes on without us"),
                    Err(reason) => tracing::warn!(%source, reason, "the next start must walk"),
                }
            }
            Err(_) => tracing::error!("the engine panicked"),
        }
        self.end_running();
    }

    fn keep(
        self: &Arc<Self>,
        mut engine: Option<Engine>,
        means: &Means,
        stopping: &AtomicBool,
        woken: &Receiver<()>,
    ) -> Option<Box<Rest>> {
        let mut failures = 0;
        while !stopping.load(Ordering::SeqCst) {
            let Some(engine) = engine.take() else {
                // Only ever disconnected, which ends the wait.
                let _ = woken.recv_timeout(LOOK);
                if !stopping.load(Ordering::SeqCst) {
                    engine = self.look_again(means, &mut failures);
                }
                if failures >= TRIES {
                    return None;
                }
                continue;
            };
            match engine.run() {
                Ok(Ended::Stopped(rest)) => return rest,
                Ok(Ended::Vanished) => self.end_running(),
                Err(error) => {
                    tracing::error!(%error, "replication stopped");
                    self.shared.failed(error.to_string());
                    return None;
                }
            }
        }
        None
    }

    /// Starts when the source is there again.
    fn look_again(self: &Arc<Self>, means: &Means, failures: &mut u32) -> Option<Engine> {
        match self.assemble(means) {
            Ok(engine) => {
                tracing::info!("the source is there again");
                *failures = 0;
                Some(engine)
            }
            Err(NotStarted::Vanished(reason)) => {
                self.shared.vanished(&reason);
                None
            }
            Err(NotStarted::Failed(error)) => {
                // What ran before may not have let go of everything yet.
                *failures += 1;
                tracing::warn!(%error, "cannot start the replication");
                if *failures >= TRIES {
                    self.shared.failed(error.to_string());
                }
                None
            }
        }
    }

    fn end_running(&self) {
        let Some(running) = self.running().take() else { return };
        let Running { link, census, verifier, .. } = running;
        verifier.stop();
        if let Some((thread, stop)) = census {
            stop.store(true, Ordering::Release);
            thread.thread().unpark();
            if thread.join().is_err() {
                tracing::error!("the census panicked");
            }
        }
        link.abort();
        self.shared.unlinked();
    }

    /// Opens everything, and starts all but the engine's loop.
    fn assemble(self: &Arc<Self>, means: &Means) -> Result<Engine, NotStarted> {
        let configuration = self.configuration();
        let options = &means.options;
        let root = Arc::new(Root::open(&configuration.path)?);
        check_identity(&root, &configuration)?;
        check_state_outside(&options.state_dir, &configuration.path)?;
        if self.shared.failure().is_some() {
            forget_journal(&self.directory);
        }
        let store = Arc::new(Store::open(&self.directory.join("index.redb"))?);
        let mark = store.mark()?;
        self.shared.returned();
        self.shared.acknowledged(&mark, Timestamp::NEVER);
        let used = store.highest_seq()?;
        let journal = Arc::new(Journal::open(&self.directory.join("journal"), used)?);
        let members = Arc::new(Members::default());
        let (announce, captured) = bounded(1);
        let newest = engine::leave::newest(&store)?;
        let left = handover::take(&self.directory, &configuration.source, &means.supervisor)?
            .filter(|rest| is_the_state_of(rest, &journal, newest));
        let (places, rescan_interval) = (Arc::<Places>::default(), options.rescan_interval);
        let settings = watcher::Settings { rescan_interval, places: places.clone() };
        let (watcher, carried) = open_watcher(&root, &configuration, &settings, left)?;
        let _loading =
            if root.is_file_system_root() || watcher.report().kind != WatcherKind::Fanotify {
                members.everything();
                None
            } else {
                let linked = carried.iter().flat_map(|carried| &carried.linked);
                members.take_over_linked(linked.copied());
                Some(load_members(&root, &store, &members)?)
            };
        let recent = carried.as_ref().map_or(&[][..], |carried| &carried.recent);
        let (clock, marks) = (self.shared.clock(), members.clone());
        let meters = self.shared.meters().clone();
        let capture =
            Capture::start(watcher, journal.clone(), marks, announce, clock, recent, meters)
                .map_err(failed("the capture thread"))?;
        let opener = Opener::new(root.clone(), places);
        let watch = Arc::new(Joining { members: members.clone(), inner: capture.directories() });
        let filter = Filter {
            devices: configuration.devices,
            reserved: Name::new(format!(".replicator-{}", configuration.source).as_bytes()).ok(),
        };
        // Verification looks and watches nothing.
        let idle = SourceTree::new(opener.clone(), filter.clone(), Arc::new(NoWatch));
        let tree = SourceTree::new(opener.clone(), filter, watch);
        let ticks = Arc::<Ticks>::default();
        let pool = Pool::start(&opener, &store, READERS, LANES).map_err(failed("readers"))?;
        let inbox = unbounded();
        let wired = Arc::<Wired>::default();
        let reason = if mark.watermark.is_some() { "restart" } else { "initial sync" };
        let reason = match journal.damage() {
            Some(damage) => format!("{reason}, and {damage}"),
            None => reason.to_owned(),
        };
        let parts = Parts {
            settings: engine_settings(options),
            boot: Boot::open(&self.directory.join("boot"))?,
            opener,
            tree,
            index: Index::new(store.clone())?,
            journal,
            capture,
            members,
            pool,
            inbox: inbox.clone(),
            captured,
            shared: self.shared.clone(),
            halt: Halt::open(options.halt, self.directory.join("halted"))?,
            wired: wired.clone(),
            ticks: ticks.clone(),
        };
        // Where nothing is walked, there is no end to tell the way to. Where all
        // was counted and shipped before, that is near enough, and counting anew
        // would take as long as the walk.
        let counts = carried.is_none() && mark.watermark.is_none();
        if !counts {
            self.shared.found(store.snapshot()?.count()?, 0, true);
        }
        let start = carried.map_or(Start::Walk(reason), |carried| Start::Resume(Box::new(carried)));
        let engine = Engine::new(parts, start)?;
        let link = self.start_link(means, &configuration, wired, inbox.0.clone());
        let census = match counts {
            true => Some(census::start(root, self.shared.clone()).map_err(failed("the census"))?),
            false => None,
        };
        let parts = verify::Parts {
            settings: options.verify,
            tree: idle,
            store,
            post: inbox.0.clone(),
            ticks,
            shared: self.shared.clone(),
        };
        let verifier = Verifier::start(parts, &self.directory).map_err(failed("the verifier"))?;
        self.shared.started();
        *self.running() =
            Some(Running { post: inbox.0, link, census, _loading, verifier: Arc::new(verifier) });
        Ok(engine)
    }

    fn start_link(
        &self,
        means: &Means,
        configuration: &Configuration,
        wired: Arc<Wired>,
        post: Sender<Event>,
    ) -> tokio::task::JoinHandle<()> {
        let remote = Remote {
            address: configuration.address.clone(),
            fingerprint: configuration.fingerprint,
        };
        let shared = self.shared.clone();
        let (events, inbox) = unbounded();
        // The link's events and the engine's are of different types; this
        // thread joins them. It ends with the link.
        std::thread::spawn(move || {
            for event in inbox {
                if post.send(Event::Link(event)).is_err() {
                    return;
                }
            }
        });
        let link = session::Link {
            identity: means.identity.clone(),
            remote,
            wired,
            hurry: shared.hurry(),
            silence: session::SILENCE,
        };
        let hello = move || shared.hello();
        means.runtime.spawn(session::run(link, hello, events))
    }
}

fn failed(what: &'static str) -> impl FnOnce(std::io::Error) -> ServiceError {
    move |source| ServiceError::Start { what, source }
}

/// After a failure, which may have been the disk's: what could not be written of the journal
/// is still in the kernel's cache, and would be taken for what is on disk. (Of the index,
/// whoever opens it sees to that.)
fn forget_journal(directory: &std::path::Path) {
    if let Ok(file) = std::fs::File::open(directory.join("journal/db")) {
        place::forget_cached(&file);
    }
}

fn engine_settings(options: &SourceOptions) -> engine::Settings {
    engine::Settings {
        heartbeat: options.heartbeat,
        settle: options.settle,
        batch_bytes: options.max_batch_bytes,
        ..engine::Settings::default()
    }
}

/// Whether this is the directory that was replicated, and not an empty mount
/// point, or another file system whose root has the same handle.
fn check_identity(root: &Root, configuration: &Configuration) -> Result<(), NotStarted> {
    let named = configuration.file_system;
    let same = root.id == configuration.root
        && root.born() == configuration.root_born
        && named.is_none_or(|named| root.file_system() == Some(named));
    if same {
        return Ok(());
    }
    Err(NotStarted::Vanished(format!(
        "{} is not the directory that was replicated: another file system is mounted there, or none",
        configuration.path.display()
    )))
}

/// Whether journal and index are those that the process before left: neither
/// was replaced, nor set aside as damaged.
fn is_the_state_of(rest: &Rest, journal: &Journal, newest: BatchId) -> bool {
    let same = (journal.last(), newest) == (rest.seq, rest.batch) && journal.damage().is_none();
    if !same {
        tracing::warn!("journal and index are not as the process before left them");
    }
    same
}

/// The watcher that the process before left, with what else it left; else a new
/// one.
fn open_watcher(
    root: &Root,
    configuration: &Configuration,
    settings: &watcher::Settings,
    left: Option<Rest>,
) -> Result<(Box<dyn Watcher>, Option<Carried>), ServiceError> {
    let choice = configuration.watcher;
    if let Some(Rest { queue, carried, .. }) = left {
        match watcher::resume(root.fd(), &root.path, choice, settings, queue) {
            Ok(watcher) => return Ok((watcher, Some(carried))),
            Err(error) => {
                tracing::warn!(%error, "the watch of the process before is not taken over");
            }
        }
    }
    Ok((watcher::open(root.fd(), &root.path, choice, settings)?, None))
}

/// The capture thread must know which directories are ours before the first
/// event: those of the index now, others as they are listed. Only where a mark
/// tells of the whole file system, and the source is a part of that; a watch on
/// each directory tells of what is or was ours, also of files that are open
/// under names in directories that are gone.
///
/// A million of them take most of a second, so a thread of its own adds them, and
/// until it is through whatever happens on the file system counts as ours.
fn load_members(
    root: &Root,
    store: &Store,
    members: &Arc<Members>,
) -> Result<Loading, ServiceError> {
    members.add_directory(root.id.clone());
    members.loading(true);
    let (snapshot, pending) = (store.snapshot()?, store.pending()?);
    let members = members.clone();
    let load = move || {
        let add = |object: ObjectId, known: &Known| {
            if known.state.kind == Kind::Directory {
                members.add_directory(object);
            } else if known.nlink > known.links {
                members.add_linked(&object);
            }
        };
        if let Err(error) = snapshot.each_object(|object, known| add(object, &known)) {
            tracing::warn!(%error, "what the index knows is not known to the watcher");
            members.everything();
        }
        // What was sent and not acknowledged may turn out to be in the replica; then
        // it is not listed any more.
        for (object, known) in pending.into_iter().flat_map(|delta| delta.objects) {
            known.iter().for_each(|known| add(object.clone(), known));
        }
        members.loading(false);
    };
    let named = std::thread::Builder::new().name("members".to_owned());
    let thread = named.spawn(load).map_err(failed("the loading of members"))?;
    Ok(Loading(Some(thread)))
}

/// The thread that loads members; dropping this waits for its end.
struct Loading(Option<JoinHandle<()>>);

impl Drop for Loading {
    fn drop(&mut self) {
        if self.0.take().is_some_and(|thread| thread.join().is_err()) {
            tracing::error!("the loading of what the index knows panicked");
        }
    }
}

/// For looking at directories that others watch.
struct NoWatch;

impl DirectoryWatch for NoWatch {
    fn before_listing(&self, _: std::os::fd::BorrowedFd<'_>, _: &ObjectId) {}
}

/// A directory joins the known set, then the watcher's, before it is listed.
struct Joining {
    members: Arc<Members>,
    inner: Arc<dyn DirectoryWatch>,
}

impl DirectoryWatch for Joining {
    fn before_listing(&self, directory: std::os::fd::BorrowedFd<'_>, id: &ObjectId) {
        self.members.add_directory(id.clone());
        self.inner.before_listing(directory, id);
    }

    fn begin_walk(&self, again: bool) {
        self.inner.begin_walk(again);
    }

    fn found_unwatched(&self) -> bool {
        self.inner.found_unwatched()
    }

    fn found(&self, id: &ObjectId) {
        self.members.add_directory(id.clone());
    }

    fn linked(&self, directory: std::os::fd::BorrowedFd<'_>, name: &Name, id: &ObjectId) {
        self.members.add_linked(id);
        self.inner.linked(directory, name, id);
    }
}
