//! One replica: its configuration, its open directories and store, and what
//! status says of it. Shared between the applier's thread, the session and the
//! service; whoever writes to the replica is the applier or a stager, no one else.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use replicator_common::crashsafe::{self, Format, StateFileError};
use replicator_common::id::{BatchId, FileSystemId, Incarnation, TransferId};
use replicator_common::net::identity::Fingerprint;
use replicator_common::status::{
    Abilities, Arriving, DesiredState, DestinationReport, Enforcement, Link, ReplicationStatus,
    SourceReport, Status, TimedError,
};
use replicator_common::sys::{handle, place};
use replicator_common::time::Timestamp;
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use crate::apply::{Place, Within};
use crate::area::{Area, AreaError, hidden_name};
use crate::kept::Kept;
use crate::locate::Locator;
use crate::looked::Looked;
use crate::mark::{self, Remembered};
use crate::meters::Meters;
use crate::nest::{self, Nests};
use crate::readonly::{Protection, ReadOnlyError};
use crate::reserve::{self, Slack};
use crate::store::{SetAsideItem, Standing, Store, StoreError};
use crate::tree;

pub(crate) const CONFIG: Format = Format { name: "replica", version: 1 };
const CONFIG_FILE: &str = "config.json";
const STORE_FILE: &str = "store.redb";
/// How often status looks at most whether the read-only protection has changed.
const ENFORCEMENT_LIFE: Duration = Duration::from_secs(1);

/// A configuration, as `config.json` keeps it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct Config {
    /// The source's file system: names the configuration.
    pub source: FileSystemId,
    /// The source's region.
    pub source_region: String,
    /// The replica's file system.
    pub destination: FileSystemId,
    /// The replica's directory.
    pub path: PathBuf,
    /// The source's certificate.
    pub peer: Fingerprint,
    /// When the configuration was made.
    pub creation_time: Timestamp,
    /// What the operator asked for.
    pub desired: DesiredState,
    /// The replica was not empty at first and is to be reconciled.
    pub reconcile: bool,
    /// Device nodes are replicated too.
    pub devices: bool,
}

impl Config {
    /// Reads the configuration in a replica's state directory.
    pub fn read(directory: &Path) -> Result<Option<Self>, StateFileError> {
        crashsafe::read(&directory.join(CONFIG_FILE), &CONFIG)
    }

    /// Writes it, durably.
    pub fn write(&self, directory: &Path) -> Result<(), StateFileError> {
        crashsafe::write(&directory.join(CONFIG_FILE), &CONFIG, self)
    }

    /// Removes it: from then on there is no such configuration.
    pub fn remove(directory: &Path) -> Result<(), StateFileError> {
        crashsafe::remove(&directory.join(CONFIG_FILE))
    }
}

/// Why a replica cannot be used.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)]
pub enum ReplicaError {
    #[error(transparent)]
    State(#[from] StateFileError),
    #[error(transparent)]
    ReadOnly(#[from] ReadOnlyError),
    #[error(transparent)]
    Area(#[from] AreaError),
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(
        "{} is not the replica that was written to: is its file system mounted?",
        path.display()
    )]
    Missing { path: PathBuf },
}

/// A moment in the life of a batch at which a test may make the applier die.
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
    /// Failover has done its n-th step.
    Failover(u8),
    /// A sync ends. Not a death: it fails, as after an error of the disk.
    Sync,
}

/// Says whether to die at a point, as `kill -9` would have it.
pub type Hook = Arc<dyn Fn(Point) -> bool + Send + Sync>;

/// How a replica is opened.
#[derive(Clone, Default)]
pub struct ReplicaOptions {
    /// Finds objects by path even where handles could be opened.
    pub by_path: bool,
    /// For tests: where to die.
    pub hook: Option<Hook>,
}

/// What changes while the replica is open.
#[derive(Debug)]
pub struct Shared {
    /// Where the replica stands, as told to others: applied, not just committed.
    pub standing: Standing,
    /// Logged, perhaps not applied yet.
    pub durable: BatchId,
    /// Why batches cannot be applied now.
    pub stalled: Option<String>,
    /// Why the last attempt to fail over did not succeed.
    pub failover_error: Option<String>,
    /// Staged content of batches that are not applied.
    pub staged_bytes: u64,
    /// Bytes staged of each transfer that is open.
    pub arriving: BTreeMap<TransferId, u64>,
    /// The connection.
    pub link: Link,
    /// The source's last word.
    pub source: Option<Box<SourceReport>>,
    /// When that report arrived.
    pub heard: Option<Instant>,
    /// What the operator asked for.
    pub desired: DesiredState,
}

/// An open replica.
pub struct Replica {
    /// Its configuration as it was when opened (`desired` is in [`Shared`]).
    pub config: Config,
    /// Its state directory.
    pub directory: PathBuf,
    /// Its own directories.
    pub area: Arc<Area>,
    /// Its store.
    pub store: Arc<Store>,
    /// What staging has of the session before.
    pub kept: Arc<Kept>,
    /// Directories that are staged with their files in them.
    pub nests: Arc<Nests>,
    /// A sync beside the applier's failed: an error is told once (trap 16), so the
    /// applier's own next one counts as failed.
    pub sync_failed: Arc<AtomicBool>,
    /// What is counted and timed beside status.
    pub meters: Meters,
    /// Space for the steps of a logged batch on a full disk.
    pub slack: Slack,
    /// What it can hold.
    pub abilities: Abilities,
    /// How it is kept read-only.
    pub protection: Protection,
    /// The last batch applied.
    pub applied: Arc<AtomicU64>,
    /// The process ends: stop waiting for anything.
    pub stopping: AtomicBool,
    /// Failover has been asked for: give up what is not committed.
    pub failing_over: AtomicBool,
    /// Threads that may be writing to staging.
    pub stagers: AtomicUsize,
    /// Frames that are being staged.
    pub busy: AtomicUsize,
    /// For tests.
    pub hook: Option<Hook>,
    /// What the protection was like a moment ago: it is in each report and each
    /// line of `run`, and a look reads all mounts of the host.
    enforcement: Looked<Enforcement>,
    shared: Mutex<Shared>,
}

impl Replica {
    /// Opens a replica: read-only to others from here on, if it was not so
    /// already.
    pub fn open(
        directory: &Path,
        config: Config,
        options: ReplicaOptions,
    ) -> Result<Arc<Self>, ReplicaError> {
        let reconcile = config.reconcile;
        let store = Store::open(&directory.join(STORE_FILE), || {
            Standing::new(Incarnation::random(), reconcile)
        })?;
        // Before anything is made or mounted there: a mount point whose file
        // system is missing must not be filled in its stead.
        let hidden = config.path.join(hidden_name(&config.source));
        if store.standing()?.committed > BatchId(0) && hidden.symlink_metadata().is_err() {
            return Err(ReplicaError::Missing { path: config.path });
        }
        let protection = Protection::establish(&config.path)?;
        let area = Arc::new(Area::open(protection.root(), &config.source)?);
        let mut standing = store.standing()?;
        settle_incarnation(&area, &store, &mut standing)?;
        let link = Link {
            connected: false,
            since: Timestamp::now(),
            peer: String::new(),
            round_trip_micros: None,
            clock_offset_nanos: standing.clock_offset,
            last_error: None,
            next_attempt: None,
        };
        reserve::keep(directory);
        reserve::keep(&area.hidden_path());
        let slack = Slack::open(&area.hidden_path());
        let told = told_before_redo(&standing);
        let mut abilities = tree::abilities(&area);
        abilities.handles &= !options.by_path;
        let shared = Shared {
            durable: standing.committed,
            stalled: None,
            failover_error: None,
            staged_bytes: 0,
            arriving: BTreeMap::new(),
            link,
            source: None,
            heard: None,
            desired: config.desired,
            standing: told,
        };
        let sync_failed = Arc::<AtomicBool>::default();
        let applied = Arc::new(AtomicU64::new(standing.applied.0));
        Ok(Arc::new(Self {
            directory: directory.to_owned(),
            kept: Arc::new(Kept::new(area.clone(), sync_failed.clone())),
            nests: Arc::new(Nests::new(area.clone(), applied.clone())),
            sync_failed,
            area,
            store: Arc::new(store),
            meters: Meters::new(&config.source, &config.destination),
            slack,
            abilities,
            protection,
            applied,
            stopping: AtomicBool::new(false),
            failing_over: AtomicBool::new(false),
            stagers: AtomicUsize::new(0),
            busy: AtomicUsize::new(0),
            hook: options.hook,
            enforcement: Looked::new(ENFORCEMENT_LIFE),
            shared: Mutex::new(shared),
            config,
        }))
    }

    /// Whether the last logged batch is applied: what is told of the replica is
    /// all that is known then.
    pub fn is_redone(&self) -> bool {
        self.applied.load(Ordering::Acquire) >= self.shared().durable.0
    }

    /// Waits until the replica is between batches, or says why it cannot be: so
    /// that who asks next finds the claims that were made before a crash. One
    /// that is not there by `until` claims nothing until it is.
    pub fn await_redo(&self, until: Instant) {
        while !self.is_redone() && self.shared().stalled.is_none() && Instant::now() < until {
            std::thread::sleep(std::time::Duration::from_millis(2));
        }
    }

    /// The changing part. A panic of another holder leaves it usable: each
    /// field is a whole by itself.
    pub fn shared(&self) -> MutexGuard<'_, Shared> {
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// For opening objects between batches.
    pub fn locator(&self) -> Locator {
        Locator::new(self.area.clone(), self.abilities.handles)
    }

    /// Whether a test wants the applier to die here.
    pub fn dies_at(&self, point: Point) -> bool {
        self.hook.as_ref().is_some_and(|hook| hook(point))
    }

    /// Whether waiting and retrying should end.
    pub fn is_ending(&self) -> bool {
        self.stopping.load(Ordering::Acquire)
    }

    /// Keeps an error that an operator should know.
    pub fn note_error(&self, error: impl Into<String>) {
        let error = TimedError { time: Timestamp::now(), error: error.into() };
        self.shared().standing.last_error = Some(error);
    }

    /// This side's view.
    pub fn report(&self, now: Timestamp) -> DestinationReport {
        let shared = self.shared();
        let standing = &shared.standing;
        DestinationReport {
            time: now,
            path: self.config.path.display().to_string(),
            last_replicated: last_replicated(standing),
            last_consistent: standing.last_consistent,
            time_since_last_sync: time_since_last_sync(standing, now),
            applied: standing.applied,
            durable: shared.durable,
            objects: standing.objects,
            orphans: standing.orphans,
            enforcement: self.enforcement(),
            abilities: self.abilities.clone(),
            shortfalls: standing.shortfalls.clone(),
            staged_bytes: shared.staged_bytes,
            arriving: shared
                .arriving
                .iter()
                .map(|(transfer, bytes)| Arriving { transfer: *transfer, bytes: *bytes })
                .collect(),
            stalled: shared.stalled.clone(),
            link: shared.link.clone(),
            last_error: standing.last_error.clone(),
        }
    }

    fn enforcement(&self) -> Enforcement {
        self.enforcement.at(Instant::now(), || self.protection.enforcement())
    }

    /// The whole, with the source's half from its last report; this side is in
    /// `region`.
    pub fn status(&self, now: Timestamp, region: &str) -> Status {
        let destination = self.report(now);
        let shared = self.shared();
        let failing = self.failing_over.load(Ordering::Acquire);
        let (status, message) = if failing {
            (ReplicationStatus::Deleting, shared.failover_error.clone())
        } else if let Some(reason) = &shared.stalled {
            (ReplicationStatus::Error, Some(reason.clone()))
        } else if shared.desired == DesiredState::Paused {
            (ReplicationStatus::Paused, None)
        } else if !shared.standing.complete {
            (ReplicationStatus::Enabling, away(&shared.link))
        } else if let Some(source) = &shared.source
            && (shared.link.connected || source.status == ReplicationStatus::Halted)
        {
            // A source that halted because it is not there ends its session
            // with that word.
            (source.status, source.message.clone())
        } else {
            (ReplicationStatus::Enabled, away(&shared.link))
        };
        Status {
            source_file_system_id: self.config.source.clone(),
            destination_file_system_id: self.config.destination.clone(),
            source_file_system_region: self.config.source_region.clone(),
            destination_file_system_region: region.to_owned(),
            creation_time: self.config.creation_time,
            status,
            status_message: message,
            source: shared.source.as_deref().cloned(),
            destination: Some(destination),
        }
    }
}

/// What may be told of a replica that was just opened. While the last logged
/// batch has to be redone, part of it may be missing, so nothing is claimed: what
/// the store holds are the claims of that batch.
fn told_before_redo(standing: &Standing) -> Standing {
    let mut told = standing.clone();
    if standing.applied < standing.committed {
        told.watermark = Timestamp::NEVER;
        told.last_consistent = None;
    }
    told
}

/// That there is no connection, since when and why. The destination cannot do
/// anything about it.
fn away(link: &Link) -> Option<String> {
    let since = || format!("the source has not been connected since {}", link.since);
    (!link.connected).then(|| match &link.last_error {
        Some(reason) => format!("{}: {reason}; it is for the source to connect", since()),
        None => format!("{}; it is for the source to connect", since()),
    })
}

/// EFS's LastReplicatedTimestamp. The source sends [`Timestamp::NEVER`] until
/// the initial sync is through; what was reached once stays, also while a
/// replica is reconciled anew.
pub fn last_replicated(standing: &Standing) -> Option<Timestamp> {
    (standing.watermark != Timestamp::NEVER).then_some(standing.watermark)
}

/// Seconds since then, by the destination's clock.
pub fn time_since_last_sync(standing: &Standing, now: Timestamp) -> Option<f64> {
    let watermark = last_replicated(standing)?;
    let here = watermark.offset(standing.clock_offset.unwrap_or(0));
    Some(now.since(here).as_secs_f64())
}

/// The replica and the state directory must be of one life (traps 14, 15).
fn settle_incarnation(
    area: &Area,
    store: &Store,
    standing: &mut Standing,
) -> Result<(), ReplicaError> {
    let found = area.incarnation()?;
    if found == Some(standing.incarnation) {
        return settle_mark(area, store, standing);
    }
    let untouched = standing.committed == BatchId(0) && standing.objects == 0;
    if found.is_some() || !untouched {
        tracing::warn!("replica and state directory are not of one life: the map is given up");
        disclaim(standing);
        renounce(area, store, standing, "the replica or the state directory was replaced")?;
    }
    area.set_incarnation(&standing.incarnation)?;
    Ok(())
}

/// What was claimed was claimed of another replica than this one. That it moves
/// back is the smaller evil.
pub fn disclaim(standing: &mut Standing) {
    standing.watermark = Timestamp::NEVER;
    standing.last_consistent = None;
}

/// They are of one life; and of one time?
fn settle_mark(area: &Area, store: &Store, standing: &mut Standing) -> Result<(), ReplicaError> {
    let found = mark::read(area.hidden()).map_err(AreaError::system("read", "the mark"))?;
    let remembered = Remembered {
        committed: standing.committed,
        covered: store.marked()?,
        logged: store.logged()?,
    };
    match mark::set_back(found, standing.incarnation, &remembered) {
        Some(reason) => {
            tracing::warn!(reason, "the map is given up");
            if reason == mark::REPLICA_SET_BACK {
                disclaim(standing);
            }
            renounce(area, store, standing, reason)
        }
        None => Ok(()),
    }
}

/// Begins a new incarnation: the replica keeps what it has, but what the map
/// said of it counts no more, and the source has to reconcile. The watermark
/// stays: what was replicated is still there.
pub fn renounce(
    area: &Area,
    store: &Store,
    standing: &mut Standing,
    reason: &str,
) -> Result<(), ReplicaError> {
    set_aside_orphans(area, store, reason)?;
    nest::dissolve(area)?;
    for shard in 0..crate::area::SHARDS {
        set_aside_half_built(area, shard, store, reason)?;
    }
    let mut next = Standing::new(Incarnation::random(), true);
    next.watermark = standing.watermark;
    next.last_consistent = standing.last_consistent;
    next.batches = standing.batches;
    next.bytes = standing.bytes;
    next.clock_offset = standing.clock_offset;
    next.last_error =
        Some(TimedError { time: Timestamp::now(), error: format!("to be reconciled: {reason}") });
    // The store first: if the file in the replica stays old, the mismatch is
    // seen again and leads here again.
    store.renounce(&next)?;
    *standing = next;
    area.set_incarnation(&standing.incarnation)?;
    Ok(())
}

/// Orphans of a map that is given up belong to nobody: to lost+found.
fn set_aside_orphans(area: &Area, store: &Store, reason: &str) -> Result<(), ReplicaError> {
    let names = place::list(area.orphans()).map_err(AreaError::system("list", "orphans"))?;
    let mut items = Vec::new();
    for (name, _) in names {
        let (_, lost) = area.lost_and_found()?;
        let to = std::os::fd::AsFd::as_fd(&*lost);
        place::rename(area.orphans(), &name, to, &name)
            .map_err(AreaError::system("set aside", &name))?;
        items.push(SetAsideItem {
            file: name.to_string(),
            object: name.to_string(),
            path: None,
            reason: format!("was being moved when {reason}"),
        });
    }
    store.note_set_aside(&items)?;
    Ok(())
}

/// A batch that was being applied puts what moves below a new directory into it
/// before the directory itself has left staging. Steps that are given up will
/// not finish that, and staging is wiped next: such a directory may hold what
/// stands nowhere else any more.
fn set_aside_half_built(
    area: &Area,
    shard: u8,
    store: &Store,
    reason: &str,
) -> Result<(), ReplicaError> {
    let staging = area.staging(shard);
    let names = place::list(staging).map_err(AreaError::system("list", "staging"))?;
    let mut items = Vec::new();
    for (name, _) in names {
        let directory = match place::open_directory(staging, &name) {
            Ok(directory) => directory,
            Err(Errno::NOTDIR | Errno::LOOP) => continue,
            Err(error) => return Err(AreaError::system("open", &name)(error).into()),
        };
        let fd = std::os::fd::AsFd::as_fd(&directory);
        if place::list(fd).map_err(AreaError::system("list", &name))?.is_empty() {
            continue;
        }
        let found = handle::identify(fd).map_err(AreaError::system("identify", &name))?;
        let (_, lost) = area.lost_and_found()?;
        let to = Place::lost(&found).name;
        place::rename(staging, &name, std::os::fd::AsFd::as_fd(&*lost), &to)
            .map_err(AreaError::system("set aside", &name))?;
        items.push(SetAsideItem {
            file: to.to_string(),
            object: found.to_string(),
            path: None,
            reason: format!("was being put together when {reason}"),
        });
    }
    store.note_set_aside(&items)?;
    Ok(())
}

/// Removes everything in staging. Only when no logged step needs any of it.
pub fn wipe_staging(area: &Area) -> Result<(), AreaError> {
    for shard in 0..crate::area::SHARDS {
        let directory = area.staging(shard);
        let names = place::list(directory)
            .map_err(AreaError::system("list", format!("staging/{shard}")))?;
        for (name, _) in names {
            crate::area::remove_tree(directory, &name)?;
        }
    }
    Ok(())
}

/// The staging directory that the applier itself uses.
pub const APPLIER_SHARD: u8 = crate::area::SHARDS - 1;

/// [`APPLIER_SHARD`] as a place's directory.
pub fn applier_staging() -> Within {
    Within::Staging(APPLIER_SHARD)
}
