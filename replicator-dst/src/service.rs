//! The destination as a service: tokens, enrolment, sessions, control.

mod control;
mod enrolment;

use std::collections::HashMap;
use std::net::SocketAddr;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crossbeam_channel::Sender;
use quinn::{Connection, ConnectionError, Endpoint};
use replicator_common::control::ControlError;
use replicator_common::crashsafe::{self, StateFileError};
use replicator_common::id::{FileSystemId, SessionId};
use replicator_common::lock::StateLock;
use replicator_common::net::NetError;
use replicator_common::net::identity::{Fingerprint, Identity, IdentityError};
use replicator_common::net::quic::{self, Admission, CLOSE_DONE};
use replicator_common::net::token::{Secret, Token};
use replicator_common::registry::Registry;
use replicator_common::status::FailoverReport;
use replicator_common::time::Timestamp;
use replicator_common::wire::{DestinationMessage, Refusal};
use tokio::sync::mpsc;

use crate::applier::{self, Job};
use crate::book::Book;
use crate::broken::Broken;
use crate::failover::{self, FailoverError};
use crate::receive::{self, Greeting, SessionContext};
use crate::replica::{Config, Hook, Replica, ReplicaError, ReplicaOptions};
use crate::state::{self, Grant, Grants, StateError};
use crate::suitable::{self, Unsuitable};

/// How long stagers and the applier may take to come to an end.
const QUIET: Duration = Duration::from_secs(10);
/// How long the start waits for batches that have to be redone.
const REDO: Duration = Duration::from_secs(5);
/// How long the endpoint may take to say that its connections are closed. It
/// would go on for three round trips in case the word is lost; then a source
/// finds out by itself.
const FAREWELL: Duration = Duration::from_millis(20);

/// How a destination is set up.
#[derive(Clone)]
pub struct DestinationOptions {
    /// Where its state is kept.
    pub state_dir: PathBuf,
    /// The UDP address it listens on.
    pub listen: SocketAddr,
    /// `HOST:PORT` that tokens name, when it differs from `listen`.
    pub advertise: Option<String>,
    /// The region that it says it is in.
    pub region: String,
    /// For tests: where to die.
    pub hook: Option<Hook>,
    /// The file systems that have an id; `None`: the state directory's own.
    pub registry: Option<Arc<Registry>>,
}

/// Why a destination cannot be opened, or not do what it was asked.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)]
pub enum ServiceError {
    #[error(transparent)]
    State(#[from] StateError),
    #[error(transparent)]
    Replica(#[from] ReplicaError),
    #[error(transparent)]
    Identity(#[from] IdentityError),
    #[error(transparent)]
    Net(#[from] NetError),
    #[error(transparent)]
    Unsuitable(#[from] Unsuitable),
    #[error(
        "replication overwrite protection of {id} ({path}) is ENABLED: set it to DISABLED first",
        path = path.display()
    )]
    Protected { id: FileSystemId, path: PathBuf },
    #[error("cannot end the failover that was begun: {0}")]
    Failover(#[from] Box<FailoverError>),
    #[error("cannot start a thread: {0}")]
    Thread(std::io::Error),
}

impl From<StateFileError> for ServiceError {
    fn from(error: StateFileError) -> Self {
        Self::State(error.into())
    }
}

/// How long a source may be silent and still be asked: it reports once a second.
const SILENCE: Duration = Duration::from_secs(2);

/// Whether the source speaks after this call began.
fn heard_from(replica: &Replica) -> bool {
    let begin = Instant::now();
    while begin.elapsed() < SILENCE {
        let shared = replica.shared();
        if !shared.link.connected {
            return false;
        }
        if shared.heard.is_some_and(|heard| heard > begin) {
            return true;
        }
        drop(shared);
        std::thread::sleep(Duration::from_millis(20));
    }
    false
}

/// How long a session that looks open may be silent before another source takes
/// its place. A living one answers our reports, one a second, within a round
/// trip.
const ALIVE: Duration = Duration::from_millis(2500);

/// A session that is or was open.
struct Open {
    name: SessionId,
    connection: Connection,
    /// The way to say its last word.
    say: mpsc::UnboundedSender<DestinationMessage>,
}

/// Whether anything arrives on a connection from now on, for a while. (Not
/// whether the source speaks: it may be busy. That its host answers is enough.)
async fn is_alive(connection: &Connection) -> bool {
    let until = Instant::now() + ALIVE;
    let begin = connection.stats().udp_rx.datagrams;
    while connection.close_reason().is_none() && Instant::now() < until {
        if connection.stats().udp_rx.datagrams > begin {
            return true;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    false
}

/// One configuration that runs.
struct Running {
    replica: Arc<Replica>,
    jobs: Sender<Job>,
    thread: Mutex<Option<JoinHandle<()>>>,
    /// The last session, unless it was closed here.
    session: Mutex<Option<Open>>,
    /// Held while one decides whether to take the other's place.
    succession: tokio::sync::Mutex<()>,
    /// Held by the session: the next one waits until it has ended.
    gate: tokio::sync::Mutex<()>,
}

impl Running {
    fn session(&self) -> MutexGuard<'_, Option<Open>> {
        self.session.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A new session takes the place of the last one, which may hang on a
    /// connection that is long dead. Not if that is alive and another's: then
    /// there are two sources with one identity, and each would undo what the
    /// other does.
    async fn succeed(
        &self,
        greeting: &Greeting,
        name: SessionId,
        connection: &Connection,
    ) -> Result<mpsc::UnboundedReceiver<DestinationMessage>, Refusal> {
        let _one = self.succession.lock().await;
        let last = self.session().as_ref().map(|open| (open.name, open.connection.clone()));
        if let Some((name, connection)) = last
            && greeting.hello.previous != Some(name)
            && is_alive(&connection).await
        {
            return Err(Refusal::Busy { peer: connection.remote_address().to_string() });
        }
        let (say, last_word) = mpsc::unbounded_channel();
        let open = Open { name, connection: connection.clone(), say };
        if let Some(old) = self.session().replace(open) {
            old.connection.close(CLOSE_DONE, b"replaced by a newer session");
        }
        Ok(last_word)
    }

    /// Says whether somebody may have to hear of it still: not where the connection has
    /// broken, or the source has ended it.
    fn close_session(&self, why: &str) -> bool {
        let Some(open) = self.session().take() else { return false };
        let reason = open.connection.close_reason();
        let listens = matches!(reason, None | Some(ConnectionError::LocallyClosed));
        open.connection.close(CLOSE_DONE, why.as_bytes());
        listens
    }
}

struct Inner {
    options: DestinationOptions,
    replicas: ReplicaOptions,
    identity: Identity,
    endpoint: Endpoint,
    book: Arc<Book>,
    registry: Arc<Registry>,
    running: Mutex<HashMap<FileSystemId, Arc<Running>>>,
    /// Those that cannot be opened now. None is among the running ones too.
    broken: Mutex<HashMap<FileSystemId, Broken>>,
    /// Held while one of them is tried again.
    reviving: Mutex<()>,
    _lock: StateLock,
}

/// A destination. Cheap to clone.
#[derive(Clone)]
pub struct DestinationService {
    inner: Arc<Inner>,
}

impl DestinationService {
    /// Opens the state directory, ends failovers that were interrupted, brings
    /// every replica to a state between batches, and listens. A replica that
    /// cannot be opened does not keep the others from it: its status is ERROR
    /// and says why. To be called within a tokio runtime.
    pub fn open(options: DestinationOptions) -> Result<Self, ServiceError> {
        let replicas = ReplicaOptions { by_path: false, hook: options.hook.clone() };
        Self::open_with(options, replicas)
    }

    /// [`Self::open`], with a say in how replicas are opened.
    pub fn open_with(
        options: DestinationOptions,
        replicas: ReplicaOptions,
    ) -> Result<Self, ServiceError> {
        let lock = state::take(&options.state_dir)?;
        let identity_dir = options.state_dir.join("identity");
        crashsafe::create_directory(&identity_dir)?;
        let identity = Identity::load_or_create(&identity_dir)?;
        let book = Arc::new(Book::new(Grants::read(&options.state_dir)?));
        let registry = match &options.registry {
            Some(registry) => registry.clone(),
            None => Arc::new(Registry::open(&options.state_dir)?),
        };
        let (mut running, mut broken) = (HashMap::new(), HashMap::new());
        for (directory, config) in state::replicas(&options.state_dir)? {
            let source = config.source.clone();
            book.pin(&config);
            enter(&registry, &config);
            match start_or_end(&directory, config.clone(), replicas.clone()) {
                Ok(Some(one)) => drop(running.insert(source, one)),
                Ok(None) => book.unpin(&source),
                Err(error) => {
                    drop(broken.insert(source, Broken::new(directory, config, &error)));
                }
            }
        }
        let until = Instant::now() + REDO;
        running.values().for_each(|one| one.replica.await_redo(until));
        let endpoint = quic::listen(options.listen, &identity, book.clone())?;
        let inner = Arc::new(Inner {
            options,
            replicas,
            identity,
            endpoint,
            book,
            registry,
            running: Mutex::new(running),
            broken: Mutex::new(broken),
            reviving: Mutex::default(),
            _lock: lock,
        });
        tokio::spawn(accept_loop(Arc::downgrade(&inner), inner.endpoint.clone()));
        Ok(Self { inner })
    }

    /// Configurations whose replica cannot be opened, and why.
    pub fn unopened(&self) -> Vec<(FileSystemId, String)> {
        let broken = self.inner.broken();
        broken.iter().map(|(source, one)| (source.clone(), one.error.error.clone())).collect()
    }

    /// The file systems that have an id.
    pub fn registry(&self) -> Arc<Registry> {
        self.inner.registry.clone()
    }

    /// The address that is listened on.
    pub fn local_address(&self) -> Option<SocketAddr> {
        self.inner.endpoint.local_addr().ok()
    }

    /// Issues a token by which a source may make `replica` its replica, once,
    /// within `valid`. The directory is made if it is missing, and must be
    /// empty unless `reconcile`.
    pub fn token(
        &self,
        replica: &Path,
        valid: Duration,
        reconcile: bool,
    ) -> Result<Token, ServiceError> {
        let inner = &self.inner;
        let path = suitable::prepare(replica)?;
        inner.check(&path, reconcile)?;
        let secret = Secret::random();
        let now = Timestamp::now();
        let expires = now.offset(i64::try_from(valid.as_nanos()).unwrap_or(i64::MAX));
        let mut grants = inner.book.grants();
        let mut next = grants.clone();
        next.tokens.issue(&secret, expires, now);
        next.grants.push(Grant { secret: Fingerprint::of(&secret.0), path, reconcile });
        next.write(&inner.options.state_dir)?;
        *grants = next;
        let address = match &inner.options.advertise {
            Some(address) => address.clone(),
            None => self.local_address().unwrap_or(inner.options.listen).to_string(),
        };
        Ok(Token { address, fingerprint: inner.identity.fingerprint(), secret })
    }

    /// Stops: sessions are closed, the batch under way is finished or will be
    /// redone. Replicas stay read-only.
    pub async fn shutdown(&self) {
        let all: Vec<_> = self.inner.running().drain().map(|(_, running)| running).collect();
        let mut somebody = false;
        for running in &all {
            running.replica.stopping.store(true, Ordering::Release);
            somebody |= running.close_session("the destination stops");
            // A full queue wakes it as well.
            let _ = running.jobs.try_send(Job::Stop);
        }
        self.inner.endpoint.close(CLOSE_DONE, b"the destination stops");
        let _ = tokio::task::spawn_blocking(move || {
            for running in all {
                let thread = running.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
                if let Some(thread) = thread {
                    let _ = thread.join();
                }
            }
        })
        .await;
        if somebody {
            let _ = tokio::time::timeout(FAREWELL, self.inner.endpoint.wait_idle()).await;
        }
    }
}

/// A replica is a file system with an id, and stays one: protected, once it is
/// none any more. Without that it is a replica all the same.
fn enter(registry: &Registry, config: &Config) {
    if let Err(error) = registry.enter(&config.destination, &config.path) {
        tracing::warn!(replica = %config.destination, %error, "the replica's id is not kept");
    }
}

/// Starts a replica; `None` when its failover had begun and is ended now.
fn start_or_end(
    directory: &Path,
    config: Config,
    options: ReplicaOptions,
) -> Result<Option<Arc<Running>>, ServiceError> {
    if failover::begun(directory) {
        tracing::warn!(source = %config.source, "ending an interrupted failover");
        failover::open_and_run(directory, config).map_err(Box::new)?;
        return Ok(None);
    }
    start(directory, config, options).map(Some)
}

fn start(
    directory: &Path,
    config: Config,
    options: ReplicaOptions,
) -> Result<Arc<Running>, ServiceError> {
    let replica = Replica::open(directory, config, options)?;
    let (jobs, thread) = applier::spawn(replica.clone()).map_err(ServiceError::Thread)?;
    Ok(Arc::new(Running {
        replica,
        jobs,
        thread: Mutex::new(Some(thread)),
        session: Mutex::new(None),
        succession: tokio::sync::Mutex::new(()),
        gate: tokio::sync::Mutex::new(()),
    }))
}

async fn accept_loop(inner: std::sync::Weak<Inner>, endpoint: Endpoint) {
    while let Some(incoming) = endpoint.accept().await {
        let Some(inner) = inner.upgrade() else { return };
        tokio::spawn(async move {
            match quic::accept(incoming, &*inner.book).await {
                Ok((connection, Admission::Session(peer))) => {
                    inner.serve(connection, &peer).await;
                }
                Ok((connection, Admission::Enrolment(peer))) => {
                    if let Err(error) = inner.enrol(&connection, peer).await {
                        tracing::warn!(%error, "enrolment failed");
                    }
                    connection.close(CLOSE_DONE, b"");
                }
                Err(error) => tracing::info!(%error, "a connection was not admitted"),
            }
        });
    }
}

impl Inner {
    fn running(&self) -> MutexGuard<'_, HashMap<FileSystemId, Arc<Running>>> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn broken(&self) -> MutexGuard<'_, HashMap<FileSystemId, Broken>> {
        self.broken.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tries to open a replica that could not be opened: what stood in the way
    /// may be gone.
    fn revive(&self, source: &FileSystemId) -> Result<(), String> {
        // Others' disks may hang: who is not broken does not wait for them.
        if !self.broken().contains_key(source) {
            return Ok(());
        }
        let _one = self.reviving.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(broken) = self.broken().get(source).cloned() else { return Ok(()) };
        let Broken { directory, config, .. } = broken;
        match start_or_end(&directory, config.clone(), self.replicas.clone()) {
            Ok(Some(running)) => {
                tracing::info!(%source, "the replica can be opened again");
                self.running().insert(source.clone(), running);
            }
            Ok(None) => self.book.unpin(source),
            Err(error) => {
                let reason = error.to_string();
                self.broken().insert(source.clone(), Broken::new(directory, config, &error));
                return Err(reason);
            }
        }
        self.broken().remove(source);
        Ok(())
    }

    fn find(&self, source: &FileSystemId) -> Result<Arc<Running>, ControlError> {
        self.revive(source).map_err(ControlError::Conflict)?;
        self.running()
            .get(source)
            .cloned()
            .ok_or_else(|| ControlError::ReplicationNotFound(source.clone()))
    }

    /// Whether a directory may become a replica here.
    fn check(&self, path: &Path, reconcile: bool) -> Result<(), ServiceError> {
        let mut others: Vec<_> =
            self.running().values().map(|running| running.replica.config.path.clone()).collect();
        others.extend(self.broken().values().map(|broken| broken.config.path.clone()));
        suitable::check(path, &self.options.state_dir, &others, reconcile)?;
        // What came with a configuration has no say: whoever asks to reconcile it
        // has given his consent.
        match self.registry.at(path).filter(|known| known.by_hand && known.protected) {
            Some(known) => Err(ServiceError::Protected { id: known.id, path: known.path }),
            None => Ok(()),
        }
    }

    async fn serve(self: Arc<Self>, connection: Connection, peer: &Fingerprint) {
        let error = match receive::hear(connection.clone()).await {
            Ok(greeting) => match self.clone().choose(&greeting, peer).await {
                Ok(running) => return self.run_session(connection, greeting, running).await,
                Err(refusal) => greeting.refuse(refusal).await,
            },
            Err(error) => error,
        };
        tracing::info!(reason = %error, "no session");
        receive::close(&connection, &error);
    }

    /// The configuration that a greeting is for.
    async fn choose(
        self: Arc<Self>,
        greeting: &Greeting,
        peer: &Fingerprint,
    ) -> Result<Arc<Running>, Refusal> {
        let source_id = greeting.hello.source.clone();
        if !self.book.may_speak_for(peer, &source_id) {
            return Err(Refusal::NoConfiguration { source_id });
        }
        if self.broken().contains_key(&source_id) {
            let (inner, id) = (self.clone(), source_id.clone());
            let revived = tokio::task::spawn_blocking(move || inner.revive(&id)).await;
            let failed = |_| Err("the destination failed".to_owned());
            revived.unwrap_or_else(failed).map_err(Refusal::Unable)?;
        }
        let running = self.running().get(&source_id).cloned();
        running.ok_or(Refusal::NoConfiguration { source_id })
    }

    async fn run_session(
        self: Arc<Self>,
        connection: Connection,
        greeting: Greeting,
        running: Arc<Running>,
    ) {
        let name = SessionId::random();
        let last_word = match running.succeed(&greeting, name, &connection).await {
            Ok(last_word) => last_word,
            Err(refusal) => {
                let error = greeting.refuse(refusal).await;
                running.replica.note_error(format!(
                    "a source that has this one's identity and is not it was refused at {}",
                    connection.remote_address()
                ));
                tracing::warn!(peer = %connection.remote_address(), reason = %error, "no session");
                return receive::close(&connection, &error);
            }
        };
        let _gate = running.gate.lock().await;
        let source = running.replica.config.source.clone();
        let fail_over = {
            let (inner, source) = (Arc::downgrade(&self), source.clone());
            move || {
                let report = inner.upgrade()?.fail_over(&source);
                report
                    .inspect_err(|error| tracing::error!(%error, "failover"))
                    .ok()
                    .map(|report| DestinationMessage::FailedOver { report: Box::new(report) })
            }
        };
        let context = SessionContext {
            replica: running.replica.clone(),
            jobs: running.jobs.clone(),
            fail_over: Arc::new(fail_over),
            last_word,
            session: name,
        };
        let error = receive::run(greeting, context).await;
        tracing::info!(%source, reason = %error, "session ended");
    }

    /// Fails over; the session, if any, stays open to be told.
    fn fail_over(&self, source: &FileSystemId) -> Result<FailoverReport, FailoverError> {
        let running = self.running().get(source).cloned();
        let running = running.ok_or_else(|| FailoverError::NotFound(Some(source.clone())))?;
        let replica = &running.replica;
        replica.failing_over.store(true, Ordering::Release);
        let until = Instant::now() + QUIET;
        while replica.busy.load(Ordering::Acquire) > 0 && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(5));
        }
        let (reply, answer) = crossbeam_channel::bounded(1);
        running.jobs.send(Job::Failover { reply }).map_err(|_| FailoverError::NoApplier)?;
        let report = answer.recv().map_err(|_| FailoverError::NoApplier)?.inspect_err(|error| {
            let error = format!("failover did not succeed and is to be asked for again: {error}");
            replica.shared().failover_error = Some(error.clone());
            replica.note_error(error);
        })?;
        self.running().remove(source);
        self.book.unpin(source);
        tracing::info!(%source, "failed over");
        Ok(report)
    }
}

/// An open directory's identity, for comparing paths by what they lead to.
pub(crate) fn same(a: impl AsFd, b: impl AsFd) -> bool {
    use replicator_common::sys::stat::of_fd;
    matches!((of_fd(a), of_fd(b)), (Ok(a), Ok(b)) if (a.dev, a.ino) == (b.dev, b.ino))
}
