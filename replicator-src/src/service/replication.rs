//! One replication: its configuration on disk, its engine and link.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use crossbeam_channel::{Sender, bounded, unbounded};
use replicator_common::control::WatcherChoice;
use replicator_common::crashsafe::{self, Format, StateFileError};
use replicator_common::id::{FileSystemId, ObjectId};
use replicator_common::name::Name;
use replicator_common::net::frame::Compression;
use replicator_common::net::identity::{Fingerprint, Identity};
use replicator_common::object::Kind;
use replicator_common::status::{
    DesiredState, FailoverReport, ReplicationStatus, Status, WatcherKind,
};
use replicator_common::time::Timestamp;
use serde::{Deserialize, Serialize};

use super::{ServiceError, SourceOptions, census};
use crate::boot::Boot;
use crate::capture::{Capture, Members};
use crate::clock::Clock;
use crate::engine::state::Shared;
use crate::engine::{self, Command, Engine, Event, Parts};
use crate::index::{Index, Store};
use crate::journal::Journal;
use crate::read::pool::Pool;
use crate::read::sink::Wired;
use crate::session::{self, Remote};
use crate::source::{Filter, Opener, Places, Root, SourceTree};
use crate::watcher::{self, DirectoryWatch};

/// Format of a configuration file. Versions: 1, the first.
const FORMAT: Format = Format { name: "source-replication", version: 1 };
/// Threads that read small objects. On two cores and a disk that is not in the
/// cache, two of four wait for the disk at any time; more gave nothing.
const READERS: usize = 4;
/// Threads that send large files.
const LANES: usize = 1;
/// How long a waiter is kept for status to be brought up to date.
const REFRESH: Duration = Duration::from_secs(1);
/// How much longer than the engine we wait for the engine's answer.
const ANSWER: Duration = Duration::from_secs(5);
/// Paths that a failover report names.
const PATHS: usize = 1000;

/// A replication configuration as the source keeps it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Configuration {
    pub(super) source: FileSystemId,
    pub(super) destination: FileSystemId,
    /// What the destination says its region is; not known of configurations
    /// that were made before it was kept.
    #[serde(default)]
    pub(super) destination_region: Option<String>,
    #[serde(with = "path_bytes")]
    pub(super) path: PathBuf,
    /// The root directory's id: another directory under the same path is not
    /// this source.
    #[serde(with = "object_hex")]
    pub(super) root: ObjectId,
    /// When it was made, where the file system keeps that.
    pub(super) root_born: Option<Timestamp>,
    pub(super) address: String,
    pub(super) fingerprint: Fingerprint,
    pub(super) creation_time: Timestamp,
    pub(super) desired: DesiredState,
    pub(super) devices: bool,
    pub(super) watcher: WatcherChoice,
}

impl Configuration {
    /// From a replication's directory; `None` when there is none yet.
    pub(super) fn load(directory: &Path) -> Result<Option<Self>, StateFileError> {
        crashsafe::read(&directory.join("configuration"), &FORMAT)
    }

    pub(super) fn save(&self, directory: &Path) -> Result<(), ServiceError> {
        crashsafe::create_directory(directory)?;
        Ok(crashsafe::write(&directory.join("configuration"), &FORMAT, self)?)
    }
}

/// One replication, running or not.
pub(super) struct Replication {
    directory: PathBuf,
    /// This side's.
    region: String,
    configuration: Mutex<Configuration>,
    shared: Arc<Shared>,
    running: Mutex<Option<Running>>,
}

struct Running {
    post: Sender<Event>,
    engine: JoinHandle<()>,
    link: tokio::task::JoinHandle<()>,
    census: Option<(JoinHandle<()>, Arc<AtomicBool>)>,
}

impl Replication {
    pub(super) fn open(
        directory: PathBuf,
        configuration: Configuration,
        options: &SourceOptions,
    ) -> Result<Arc<Self>, ServiceError> {
        let shared = Arc::new(Shared::new(
            configuration.source.clone(),
            configuration.path.display().to_string(),
            configuration.desired,
            &Default::default(),
            Arc::new(Clock::new(options.wall.clone())),
        ));
        Ok(Arc::new(Self {
            directory,
            region: options.region.clone(),
            configuration: Mutex::new(configuration),
            shared,
            running: Mutex::default(),
        }))
    }

    /// Starts watching and shipping.
    pub(super) fn start(
        self: &Arc<Self>,
        options: &SourceOptions,
        identity: &Identity,
        runtime: &tokio::runtime::Handle,
    ) -> Result<(), ServiceError> {
        let configuration = self.configuration();
        let root = Arc::new(Root::open(&configuration.path)?);
        if root.id != configuration.root || root.born() != configuration.root_born {
            return Err(ServiceError::Refused(format!(
                "{} is not the directory that was replicated: another file system is mounted there, or none",
                configuration.path.display()
            )));
        }
        let store = Arc::new(Store::open(&self.directory.join("index.redb"))?);
        let mark = store.mark()?;
        self.shared.acknowledged(&mark, Timestamp::NEVER);
        let journal = Arc::new(Journal::open(&self.directory.join("journal"), mark.seq)?);
        let members = Arc::new(Members::default());
        let settings = watcher::Settings { rescan_interval: options.rescan_interval };
        let watcher = watcher::open(root.fd(), &root.path, configuration.watcher, &settings)?;
        if root.is_file_system_root() || watcher.report().kind != WatcherKind::Fanotify {
            members.everything();
        } else {
            load_members(&root, &store, &members)?;
        }
        let (captured, announced) = bounded(1);
        let start = |what| move |source| ServiceError::Start { what, source };
        let capture = Capture::start(
            watcher,
            journal.clone(),
            members.clone(),
            captured,
            self.shared.clock(),
        )
        .map_err(start("the capture thread"))?;
        let opener = Opener::new(root.clone(), Arc::<Places>::default());
        let watch = Arc::new(Joining { members: members.clone(), inner: capture.directories() });
        let filter = Filter {
            devices: configuration.devices,
            reserved: Name::new(format!(".replicator-{}", configuration.source).as_bytes()).ok(),
        };
        let tree = SourceTree::new(opener.clone(), filter, watch);
        let pool = Pool::start(&opener, &store, READERS, LANES).map_err(start("readers"))?;
        let inbox = unbounded();
        let wired = Arc::<Wired>::default();
        let reason = if mark.watermark.is_some() { "restart" } else { "initial sync" };
        let reason = match journal.damage() {
            Some(damage) => format!("{reason}, and {damage}"),
            None => reason.to_owned(),
        };
        let engine = Engine::new(
            Parts {
                settings: engine::Settings {
                    heartbeat: options.heartbeat,
                    settle: options.settle,
                    batch_bytes: options.max_batch_bytes,
                    ..engine::Settings::default()
                },
                boot: Boot::open(&self.directory.join("boot"))?,
                opener,
                tree,
                index: Index::new(store)?,
                journal,
                capture,
                members,
                pool,
                inbox: inbox.clone(),
                captured: announced,
                shared: self.shared.clone(),
                wired: wired.clone(),
            },
            &reason,
        )?;
        let link = self.start_link(identity, runtime, wired, inbox.0.clone());
        let shared = self.shared.clone();
        let engine = std::thread::Builder::new()
            .name("engine".to_owned())
            .spawn(move || {
                if let Err(error) = engine.run() {
                    tracing::error!(%error, "replication stopped");
                    shared.failed(error.to_string());
                }
            })
            .map_err(start("the engine"))?;
        let census = census::start(root, self.shared.clone()).map_err(start("the census"))?;
        *self.running() = Some(Running { post: inbox.0, engine, link, census: Some(census) });
        Ok(())
    }

    fn start_link(
        &self,
        identity: &Identity,
        runtime: &tokio::runtime::Handle,
        wired: Arc<Wired>,
        post: Sender<Event>,
    ) -> tokio::task::JoinHandle<()> {
        let configuration = self.configuration();
        let remote =
            Remote { address: configuration.address, fingerprint: configuration.fingerprint };
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
        let hello = move || shared.hello();
        let identity = identity.clone();
        runtime.spawn(session::run(identity, remote, hello, wired, Compression::Auto, events))
    }

    /// Ends everything that runs, cleanly. Repeatable.
    pub(super) fn stop(&self) {
        let Some(running) = self.running().take() else { return };
        // The engine may have ended by itself.
        let _ = running.post.send(Event::Command(Command::Stop));
        if let Some((thread, stop)) = running.census {
            stop.store(true, Ordering::Release);
            let _ = thread.join();
        }
        if running.engine.join().is_err() {
            tracing::error!("the engine panicked");
        }
        running.link.abort();
    }

    /// Asks the destination to fail over and returns its report, filled up with
    /// what this side knows was not replicated.
    pub(super) fn fail_over(&self, timeout: Duration) -> Result<FailoverReport, String> {
        let hint = "; when the destination cannot be reached, delete with --deletion-mode LOCAL_CONFIGURATION_ONLY on each side";
        let (reply, answer) = bounded(1);
        let post = self.running().as_ref().map(|running| running.post.clone());
        let post = post.ok_or_else(|| format!("the replication does not run{hint}"))?;
        post.send(Event::Command(Command::Delete(reply, timeout)))
            .map_err(|_| format!("the replication does not run{hint}"))?;
        let mut report = answer
            .recv_timeout(timeout + ANSWER)
            .map_err(|_| format!("the destination does not answer{hint}"))?
            .map_err(|reason| format!("{reason}{hint}"))?;
        let (records, paths) = self.unreplicated();
        report.not_replicated_records = Some(records);
        report.not_replicated_paths = paths;
        Ok(report)
    }

    /// What the source alone can say when only its own configuration goes.
    pub(super) fn local_report(&self) -> FailoverReport {
        let configuration = self.configuration();
        let report = self.shared.report();
        let (records, paths) = self.unreplicated();
        let known = (report.watermark > Timestamp::NEVER).then_some(report.watermark);
        FailoverReport {
            source_file_system_id: configuration.source,
            destination_file_system_id: configuration.destination,
            path: report.path,
            last_replicated: known,
            last_consistent: None,
            time_since_last_sync: known.map(|t| Timestamp::now().since(t).as_secs_f64()),
            lost_and_found: None,
            set_aside: 0,
            put_back: 0,
            not_replicated_records: Some(records),
            not_replicated_paths: paths,
            warnings: vec![
                "only the source's configuration was deleted; the replica stays read-only until its own is"
                    .to_owned(),
            ],
        }
    }

    /// Records that wait, and the paths that blockers name.
    fn unreplicated(&self) -> (u64, Vec<String>) {
        let report = self.shared.report();
        let paths = report.blocked_by.iter().filter_map(|blocker| blocker.path.clone());
        (report.backlog_records, paths.take(PATHS).collect())
    }

    /// Removes all state of it. It must be stopped.
    pub(super) fn remove(&self) -> Result<(), ServiceError> {
        self.shared.close();
        // The configuration goes first: a directory without one is leftovers.
        crashsafe::remove(&self.directory.join("configuration"))?;
        std::fs::remove_dir_all(&self.directory)
            .map_err(StateFileError::io("remove", &self.directory))?;
        Ok(())
    }

    pub(super) fn set_desired(&self, desired: DesiredState) -> Result<(), ServiceError> {
        let mut configuration = self.lock_configuration();
        configuration.desired = desired;
        configuration.save(&self.directory)?;
        drop(configuration);
        self.shared.set_desired(desired);
        self.post(Command::Nudge);
        Ok(())
    }

    /// Somebody waits for the watermark: where only a walk moves it, walk now.
    pub(super) fn nudge_for_wait(&self) {
        let scan =
            self.shared.report().watcher.kind == replicator_common::status::WatcherKind::Scan;
        self.post(if scan { Command::Rescan("asked to wait".to_owned()) } else { Command::Nudge });
    }

    /// Has status brought up to date, so that what a waiter asks for next is of
    /// the moment that it waited for.
    pub(super) fn refresh(&self) {
        let (reply, done) = crossbeam_channel::bounded(1);
        self.post(Command::Refresh(reply));
        // An engine that has ended, or is busy for long, leaves it as it was.
        let _ = done.recv_timeout(REFRESH);
    }

    fn post(&self, command: Command) {
        if let Some(running) = &*self.running() {
            // An engine that has ended says so in status.
            let _ = running.post.send(Event::Command(command));
        }
    }

    pub(super) fn failed(&self, error: String) {
        self.shared.failed(error);
    }

    pub(super) fn shared(&self) -> &Shared {
        &self.shared
    }

    pub(super) fn configuration(&self) -> Configuration {
        self.lock_configuration().clone()
    }

    fn lock_configuration(&self) -> MutexGuard<'_, Configuration> {
        self.configuration.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn running(&self) -> MutexGuard<'_, Option<Running>> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn watermark_in_words(&self) -> String {
        match self.shared.report().watermark {
            Timestamp::NEVER => "nothing (the initial sync is not through)".to_owned(),
            moment => moment.to_string(),
        }
    }

    pub(super) fn blockers_in_words(&self) -> String {
        let report = self.shared.report();
        let names: Vec<String> = report
            .blocked_by
            .iter()
            .take(3)
            .map(|blocker| match &blocker.path {
                Some(path) => format!("{} ({path})", blocker.reason),
                None => blocker.reason.clone(),
            })
            .collect();
        match (names.is_empty(), report.message) {
            (true, None) => String::new(),
            (true, Some(message)) => format!("; {message}"),
            (false, _) => format!("; it waits for: {}", names.join(", ")),
        }
    }

    /// Everything about it that this side knows.
    pub(super) fn status(&self) -> Status {
        let configuration = self.configuration();
        let source = self.shared.report();
        Status {
            source_file_system_id: configuration.source,
            destination_file_system_id: configuration.destination,
            destination_file_system_region: configuration
                .destination_region
                .unwrap_or_else(|| self.region.clone()),
            source_file_system_region: self.region.clone(),
            creation_time: configuration.creation_time,
            status: self.shared.failure().map_or(source.status, |_| ReplicationStatus::Error),
            status_message: source.message.clone(),
            source: Some(source),
            destination: self.shared.destination().map(|(report, _)| report),
        }
    }
}

/// The capture thread must know which directories are ours before the first
/// event: those of the index now, others as they are listed. Only where a mark
/// tells of the whole file system, and the source is a part of that; a watch on
/// each directory tells of what is or was ours, also of files that are open
/// under names in directories that are gone.
fn load_members(root: &Root, store: &Store, members: &Members) -> Result<(), ServiceError> {
    members.add_directory(root.id.clone());
    store.snapshot()?.each_object(|object, known| {
        if known.state.kind == Kind::Directory {
            members.add_directory(object);
        } else if known.nlink > known.links {
            members.add_linked(object);
        }
    })?;
    Ok(())
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

    fn found(&self, id: &ObjectId) {
        self.members.add_directory(id.clone());
    }

    fn linked(&self, directory: std::os::fd::BorrowedFd<'_>, name: &Name, id: &ObjectId) {
        self.members.add_linked(id.clone());
        self.inner.linked(directory, name, id);
    }
}

mod path_bytes {
    //! A path that may not be UTF-8, as text where it is.
    use std::ffi::OsString;
    use std::os::unix::ffi::OsStringExt;
    use std::path::{Path, PathBuf};

    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    #[derive(Serialize, Deserialize)]
    #[serde(untagged)]
    enum Form {
        Text(String),
        Bytes(Vec<u8>),
    }

    pub(super) fn serialize<S: Serializer>(path: &Path, s: S) -> Result<S::Ok, S::Error> {
        match path.to_str() {
            Some(text) => Form::Text(text.to_owned()),
            None => Form::Bytes(path.as_os_str().as_encoded_bytes().to_vec()),
        }
        .serialize(s)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(d: D) -> Result<PathBuf, D::Error> {
        Ok(match Form::deserialize(d)? {
            Form::Text(text) => text.into(),
            Form::Bytes(bytes) => OsString::from_vec(bytes).into(),
        })
    }
}

mod object_hex {
    //! An object's id as hexadecimal text.
    use replicator_common::id::ObjectId;
    use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error};

    pub(super) fn serialize<S: Serializer>(id: &ObjectId, s: S) -> Result<S::Ok, S::Error> {
        id.to_string().serialize(s)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(d: D) -> Result<ObjectId, D::Error> {
        let bytes = hex::decode(String::deserialize(d)?).map_err(D::Error::custom)?;
        ObjectId::from_bytes(&bytes).ok_or_else(|| D::Error::custom("not an object id"))
    }
}
