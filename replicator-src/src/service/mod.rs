//! A source daemon's replications: made, listed, paused, deleted.

mod census;
mod keeper;
mod replication;
mod supervise;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crossbeam_channel::RecvTimeoutError;
use replicator_common::ancestry;
use replicator_common::config::is_region;
use replicator_common::control::{
    Control, ControlError, CreateRequest, DeletionMode, Patience, Side,
};
use replicator_common::crashsafe::{self, Format, StateFileError};
use replicator_common::id::FileSystemId;
use replicator_common::lock::{LockError, StateLock};
use replicator_common::net::enrol::{self, EnrolError, EnrolRequest};
use replicator_common::net::identity::{Identity, IdentityError};
use replicator_common::net::token::Token;
use replicator_common::registry::Registry;
use replicator_common::status::{DesiredState, FailoverReport, Status};
use replicator_common::supervisor::Supervisor;
use replicator_common::time::Timestamp;
use replicator_common::verification::{Findings, PassOptions};

use crate::clock::Wall;
use crate::engine::halt::HaltRule;
use crate::engine::{self, EngineError};
use crate::handover;
use crate::index::IndexError;
use crate::journal::JournalError;
use crate::source::{Root, SourceError};
use crate::watcher::WatchError;
use replication::{Configuration, Replication};

/// The state directory's layout: 1 is the first.
const LAYOUT: Format = Format { name: "source-state", version: 1 };
/// How long the destination may take to fail over when it is asked.
const FAILOVER_TIMEOUT: Duration = Duration::from_secs(60);

/// How a source daemon is set up.
#[derive(Clone, Debug)]
pub struct SourceOptions {
    /// Certificate, configurations, journals and indexes.
    pub state_dir: PathBuf,
    /// The region that answers in EFS's form name.
    pub region: String,
    /// Longest time between batches.
    pub heartbeat: Duration,
    /// How long a large file must rest before it is shipped.
    pub settle: Duration,
    /// How often the source is walked where events do not suffice.
    pub rescan_interval: Duration,
    /// Content bytes of small files in one batch, at most.
    pub max_batch_bytes: u64,
    /// When deletions halt replication.
    pub halt: HaltRule,
    /// How often, and how fast, source and replica are compared.
    pub verify: crate::verify::Settings,
    /// Where the wall clock is read: tests set it back.
    pub wall: Wall,
    /// The file systems that have an id; `None`: the state directory's own.
    pub registry: Option<Arc<Registry>>,
    /// Threads of the network, at least one. One connection, which is one replication,
    /// keeps no more than one of them busy; several wake each other.
    pub network_threads: usize,
}

impl SourceOptions {
    /// Defaults, for a state directory.
    pub fn new(state_dir: PathBuf) -> Self {
        let engine = engine::Settings::default();
        Self {
            state_dir,
            region: "xx-local".to_owned(),
            heartbeat: engine.heartbeat,
            settle: engine.settle,
            rescan_interval: Duration::from_secs(60),
            max_batch_bytes: engine.batch_bytes,
            halt: HaltRule::default(),
            verify: crate::verify::Settings::default(),
            wall: Wall::default(),
            registry: None,
            network_threads: 2,
        }
    }
}

/// Why a source, or one of its replications, cannot be run.
#[derive(Debug, thiserror::Error)]
pub enum ServiceError {
    /// A state file.
    #[error(transparent)]
    State(#[from] StateFileError),
    /// The state directory is in use.
    #[error(transparent)]
    Lock(#[from] LockError),
    /// Certificate and key.
    #[error(transparent)]
    Identity(#[from] IdentityError),
    /// The source directory.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// The watcher.
    #[error(transparent)]
    Watch(#[from] WatchError),
    /// The journal.
    #[error(transparent)]
    Journal(#[from] JournalError),
    /// The index.
    #[error(transparent)]
    Index(#[from] IndexError),
    /// The engine.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// A thread or the runtime cannot be started.
    #[error("cannot start {what}: {source}")]
    Start {
        /// What.
        what: &'static str,
        /// What the system said.
        source: std::io::Error,
    },
    /// State and source cannot go together.
    #[error("{0}")]
    Refused(String),
}

/// How long opening the service waits for sources to be opened.
const START: Duration = Duration::from_secs(5);
/// How long a shutdown waits for replications to end: longer than one takes that sends its
/// last frame to a slow destination, and writes its state to a slow disk.
const STOP: Duration = Duration::from_secs(15);

/// A running source.
pub struct SourceService {
    options: SourceOptions,
    identity: Identity,
    runtime: tokio::runtime::Runtime,
    replications: Mutex<BTreeMap<FileSystemId, Arc<Replication>>>,
    supervisor: Arc<Supervisor>,
    registry: Arc<Registry>,
    /// Held while one is made: two of one directory would have one id.
    creating: Mutex<()>,
    /// Nothing is started any more.
    closed: AtomicBool,
    _lock: StateLock,
}

impl SourceService {
    /// Opens the state directory and starts every replication in it. One that
    /// cannot start (its source is gone, say) does not keep the others from
    /// it: its status is ERROR, or HALTED, and says why.
    pub fn open(options: SourceOptions) -> Result<Arc<Self>, ServiceError> {
        Self::open_under(options, Arc::default())
    }

    /// The same under a service manager, which keeps the watches of the
    /// replications from one process to the next: such a restart loses no event
    /// and needs no walk (see [`crate::handover`]).
    pub fn open_under(
        options: SourceOptions,
        supervisor: Arc<Supervisor>,
    ) -> Result<Arc<Self>, ServiceError> {
        crashsafe::create_directory(&options.state_dir)?;
        let lock = StateLock::acquire(&options.state_dir)?;
        let layout = options.state_dir.join("layout");
        if crashsafe::read::<u32>(&layout, &LAYOUT)?.is_none() {
            crashsafe::write(&layout, &LAYOUT, &LAYOUT.version)?;
        }
        let identity_dir = options.state_dir.join("identity");
        crashsafe::create_directory(&identity_dir)?;
        let identity = Identity::load_or_create(&identity_dir)?;
        let registry = match &options.registry {
            Some(registry) => registry.clone(),
            None => Arc::new(Registry::open(&options.state_dir)?),
        };
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(options.network_threads.max(1))
            .thread_name("source-net")
            .enable_all()
            .build()
            .map_err(|source| ServiceError::Start { what: "the network runtime", source })?;
        let service = Arc::new(Self {
            options,
            identity,
            runtime,
            replications: Mutex::default(),
            supervisor,
            registry,
            creating: Mutex::default(),
            closed: AtomicBool::new(false),
            _lock: lock,
        });
        service.load()?;
        let start = |source| ServiceError::Start { what: "the supervisor", source };
        service.supervise().map_err(start)?;
        Ok(service)
    }

    fn load(self: &Arc<Self>) -> Result<(), ServiceError> {
        let directory = self.replications_dir();
        crashsafe::create_directory(&directory)?;
        let entries =
            std::fs::read_dir(&directory).map_err(StateFileError::io("read", &directory))?;
        for entry in entries {
            let path = entry.map_err(StateFileError::io("read", &directory))?.path();
            let Some(configuration) = Configuration::load(&path)? else {
                // A creation or deletion was cut short: nothing refers to it.
                tracing::info!(path = %path.display(), "removing an unfinished configuration");
                std::fs::remove_dir_all(&path).map_err(StateFileError::io("remove", &path))?;
                continue;
            };
            let id = configuration.source.clone();
            self.enter(&configuration);
            let replication = Replication::open(path, configuration, &self.options)?;
            self.all().insert(id, replication);
        }
        self.start_all()
    }

    /// Starts each on a thread of its own: one whose file system hangs holds up none but
    /// itself. Returns when all have started, or some hang.
    fn start_all(self: &Arc<Self>) -> Result<(), ServiceError> {
        let mut starting: Vec<_> = self.all().values().cloned().collect();
        let (started, each) = crossbeam_channel::unbounded();
        for replication in starting.iter().cloned() {
            let (service, started) = (self.clone(), started.clone());
            let start = move || {
                service.start_first(&replication);
                let id = replication.configuration().source;
                // Dropped before that is known: whoever waits may end with the service.
                drop((service, replication));
                let _ = started.send(id);
            };
            let named = std::thread::Builder::new().name("start".to_owned());
            let failed = |source| ServiceError::Start { what: "a replication's start", source };
            named.spawn(start).map_err(failed)?;
        }
        drop(started);
        let until = Instant::now() + START;
        while !starting.is_empty() {
            let Ok(id) = each.recv_deadline(until) else { break };
            starting.retain(|one| one.configuration().source != id);
        }
        for replication in &starting {
            let configuration = replication.configuration();
            let (source, path) = (configuration.source, configuration.path.display());
            let reason = format!("{path} is still being opened: its file system may hang");
            if replication.shared().starts_slowly(reason) {
                tracing::error!(%source, %path, "the source, or its state, does not open");
            }
        }
        let supervisor = self.supervisor.clone();
        // Each takes what was kept for it first.
        let rest = move || {
            each.iter().for_each(drop);
            handover::discard_others(&supervisor);
        };
        if starting.is_empty() {
            rest();
            return Ok(());
        }
        let named = std::thread::Builder::new().name("starts".to_owned());
        let failed = |source| ServiceError::Start { what: "the wait for starts", source };
        named.spawn(rest).map(drop).map_err(failed)
    }

    /// One that cannot start says why in its status, and is tried again.
    fn start_first(&self, replication: &Arc<Replication>) {
        let removed = replication.hold_still();
        if *removed || self.closed.load(Ordering::SeqCst) {
            return;
        }
        if let Err(error) = self.start(replication) {
            let source = replication.configuration().source;
            tracing::error!(%source, %error, "cannot start the replication");
            replication.failed(error.to_string());
        }
        self.stop_if_closed(replication);
    }

    /// Something that was started while the service was shut down.
    fn stop_if_closed(&self, replication: &Replication) {
        if self.closed.load(Ordering::SeqCst) {
            replication.stop(&Supervisor::nobody());
        }
    }

    fn start(&self, replication: &Arc<Replication>) -> Result<(), ServiceError> {
        replication.start(&self.options, &self.identity, self.runtime.handle(), &self.supervisor)
    }

    /// The file systems that have an id.
    pub fn registry(&self) -> Arc<Registry> {
        self.registry.clone()
    }

    /// A source is a file system with an id, and stays one. Without that it is
    /// replicated all the same.
    fn enter(&self, configuration: &Configuration) {
        if let Err(error) = self.registry.enter(&configuration.source, &configuration.path) {
            tracing::warn!(source = %configuration.source, %error, "the source's id is not kept");
        }
    }

    /// Ends all replications cleanly, side by side. Blocks until their threads have ended;
    /// one that hangs is left, as by a crash.
    pub fn shutdown(&self) {
        self.closed.store(true, Ordering::SeqCst);
        let all: Vec<_> = self.all().values().cloned().collect();
        let (stopped, each) = crossbeam_channel::unbounded::<()>();
        let mut threads = Vec::new();
        for replication in all {
            let (supervisor, stopped) = (self.supervisor.clone(), stopped.clone());
            let stop = move || {
                let _still = replication.hold_still();
                replication.stop(&supervisor);
                drop(stopped);
            };
            let named = std::thread::Builder::new().name("stop".to_owned());
            match named.spawn(stop) {
                Ok(thread) => threads.push(thread),
                // The next start walks, as after a crash.
                Err(error) => tracing::error!(%error, "no thread to end a replication"),
            }
        }
        drop(stopped);
        // Nothing is ever sent: it is disconnected when all have ended.
        if let Err(RecvTimeoutError::Timeout) = each.recv_timeout(STOP) {
            tracing::error!("some replications do not end, and are left: their file systems hang");
            return;
        }
        // None of them is to run on while the process ends.
        if threads.into_iter().any(|thread| thread.join().is_err()) {
            tracing::error!("the end of a replication panicked");
        }
    }

    fn replications_dir(&self) -> PathBuf {
        self.options.state_dir.join("replications")
    }

    fn all(&self) -> MutexGuard<'_, BTreeMap<FileSystemId, Arc<Replication>>> {
        self.replications.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn get(&self, id: &FileSystemId) -> Result<Arc<Replication>, ControlError> {
        let all = self.all();
        all.values()
            .find(|replication| {
                let configuration = replication.configuration();
                configuration.source == *id || configuration.destination == *id
            })
            .cloned()
            .ok_or_else(|| ControlError::FileSystemNotFound(id.clone()))
    }

    /// Checks a source before anything is made for it.
    fn check_source(&self, request: &CreateRequest) -> Result<Root, ControlError> {
        let refuse = |error: ServiceError| ControlError::Validation(error.to_string());
        let path = std::path::absolute(&request.source)
            .map_err(|error| ControlError::Validation(error.to_string()))?;
        let root = Root::open(&path).map_err(|error| refuse(error.into()))?;
        check_state_outside(&self.options.state_dir, &path).map_err(refuse)?;
        // Not under the lock: another's file system may hang.
        let others: Vec<_> = self.all().values().cloned().collect();
        for other in others {
            let configuration = other.configuration();
            // Root directories of two file systems may have equal handles.
            let same = configuration.root == root.id
                && Root::open(&configuration.path).is_ok_and(|other| other.dev() == root.dev());
            if same {
                return Err(ControlError::ReplicationAlreadyExists(format!(
                    "{} is the source of the replication configuration of {} already",
                    path.display(),
                    configuration.source
                )));
            }
        }
        Ok(root)
    }

    fn enrol(
        &self,
        token: &Token,
        request: &EnrolRequest,
    ) -> Result<enrol::Enrolled, ControlError> {
        self.runtime.block_on(enrol::enrol(&self.identity, token, request)).map_err(|error| {
            match error {
                EnrolError::Refused(_) | EnrolError::NotOpen { .. } => {
                    ControlError::Conflict(error.to_string())
                }
                other => {
                    ControlError::Internal(format!("cannot enrol with the destination: {other}"))
                }
            }
        })
    }
}

/// Removes what no configuration refers to.
fn discard(directory: &Path) -> Result<(), StateFileError> {
    match std::fs::remove_dir_all(directory) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(StateFileError::io("remove", directory)(error))
        }
        _ => Ok(()),
    }
}

/// Our own writes would be replicated, and raise events, for ever (trap 18).
fn check_state_outside(state: &Path, source: &Path) -> Result<(), ServiceError> {
    let inside = ancestry::is_within(state, source).map_err(|error| {
        ServiceError::Refused(format!("cannot look at {}: {error}", source.display()))
    })?;
    if inside {
        return Err(ServiceError::Refused(format!(
            "the state directory {} lies inside the source {}: choose one outside",
            state.display(),
            source.display()
        )));
    }
    Ok(())
}

impl Drop for SourceService {
    fn drop(&mut self) {
        self.shutdown();
    }
}

impl Control for SourceService {
    fn side(&self) -> Side {
        Side::Source
    }

    fn create(&self, request: &CreateRequest) -> Result<Status, ControlError> {
        let token: Token = request
            .token
            .parse()
            .map_err(|error| ControlError::Validation(format!("enrolment token: {error}")))?;
        let _one = self.creating.lock().unwrap_or_else(PoisonError::into_inner);
        let root = self.check_source(request)?;
        let creation_time = Timestamp::now();
        let registered = self.registry.at(&root.path).map(|known| known.id);
        let source = registered.unwrap_or_else(FileSystemId::random);
        if self.all().contains_key(&source) {
            // Its directory is not what it was when that configuration was made.
            return Err(ControlError::ReplicationAlreadyExists(format!(
                "{source} is in a replication configuration already"
            )));
        }
        let enrolment = EnrolRequest {
            secret: token.secret,
            source: source.clone(),
            source_region: self.options.region.clone(),
            creation_time,
            devices: request.devices,
        };
        let enrolled = self.enrol(&token, &enrolment)?;
        let configuration = Configuration {
            source: source.clone(),
            destination: enrolled.destination,
            destination_region: Some(enrolled.region).filter(|region| is_region(region)),
            path: root.path.clone(),
            root_born: root.born(),
            file_system: root.file_system(),
            root: root.id,
            address: token.address.clone(),
            fingerprint: token.fingerprint,
            creation_time,
            desired: DesiredState::Enabled,
            devices: request.devices,
            watcher: request.watcher,
        };
        let internal = |error: ServiceError| ControlError::Internal(error.to_string());
        let directory = self.replications_dir().join(source.as_str());
        // Left by an earlier one of this id, whose removal broke off.
        discard(&directory).map_err(|error| internal(error.into()))?;
        configuration.save(&directory).map_err(internal)?;
        self.enter(&configuration);
        let replication =
            Replication::open(directory, configuration, &self.options).map_err(internal)?;
        // Known first: what is shut down from now on ends this one, too.
        self.all().insert(source, replication.clone());
        self.start_first(&replication);
        Ok(replication.status())
    }

    fn list(&self) -> Vec<Status> {
        let mut all: Vec<Status> = self.all().values().map(|one| one.status()).collect();
        all.sort_by_key(|status| status.creation_time);
        all
    }

    fn delete(
        &self,
        source: &FileSystemId,
        mode: DeletionMode,
    ) -> Result<FailoverReport, ControlError> {
        let replication = self.get(source)?;
        let report = match mode {
            DeletionMode::AllConfigurations => {
                replication.fail_over(FAILOVER_TIMEOUT).map_err(ControlError::Conflict)?
            }
            DeletionMode::LocalConfigurationOnly => replication.local_report(),
        };
        // Not to be started again in between.
        let mut removed = replication.hold_still();
        if *removed {
            return Err(ControlError::FileSystemNotFound(source.clone()));
        }
        replication.stop(&Supervisor::nobody());
        let id = replication.configuration().source;
        replication.remove().map_err(|error| ControlError::Internal(error.to_string()))?;
        *removed = true;
        self.all().remove(&id);
        Ok(report)
    }

    fn wait(
        &self,
        source: &FileSystemId,
        patience: Patience<'_>,
    ) -> Result<Timestamp, ControlError> {
        let begun = Instant::now();
        let replication = self.get(source)?;
        // Before the engine is told, so that the barrier comes after.
        let asked = replication.shared().clock().now();
        replication.nudge_for_wait();
        match replication.shared().wait(asked, patience) {
            Some(Ok(watermark)) => {
                replication.refresh();
                Ok(watermark)
            }
            Some(Err(reason)) => Err(ControlError::Conflict(reason)),
            None => Err(ControlError::TimedOut(format!(
                "after {:.1} s the replica is complete up to {} only{}",
                begun.elapsed().as_secs_f64(),
                replication.watermark_in_words(),
                replication.blockers_in_words(),
            ))),
        }
    }

    fn set_desired(
        &self,
        source: &FileSystemId,
        desired: DesiredState,
    ) -> Result<Status, ControlError> {
        let replication = self.get(source)?;
        if desired == DesiredState::Enabled
            && let Some(halted) = replication.shared().halt()
        {
            return Err(ControlError::Conflict(halted));
        }
        replication
            .set_desired(desired)
            .map_err(|error| ControlError::Internal(error.to_string()))?;
        Ok(replication.status())
    }

    fn accept_deletions(&self, source: &FileSystemId) -> Result<Status, ControlError> {
        let replication = self.get(source)?;
        if replication.shared().halt().is_some() && !replication.accept_deletions() {
            return Err(ControlError::Conflict(
                replication
                    .shared()
                    .halt()
                    .unwrap_or_else(|| "the replication does not run: see its status".to_owned()),
            ));
        }
        self.set_desired(source, DesiredState::Enabled)
    }

    fn verify(&self, source: &FileSystemId, options: PassOptions) -> Result<u64, ControlError> {
        self.get(source)?.verify(options).map_err(ControlError::Conflict)
    }

    fn findings(
        &self,
        source: &FileSystemId,
        pass: u64,
        after: u64,
    ) -> Result<Findings, ControlError> {
        self.get(source)?.findings(pass, after).map_err(ControlError::Conflict)
    }
}
