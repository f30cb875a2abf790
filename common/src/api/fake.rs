//! A control without machinery, for tests of the API.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, Mutex};

use super::{TokenIssuer, own};
use crate::control::{Control, ControlError, CreateRequest, DeletionMode, Patience};
use crate::id::{BatchId, FileSystemId, Seq};
use crate::registry::Registry;
use crate::status::{
    Abilities, Counters, DesiredState, DestinationReport, Enforcement, EnforcementKind,
    FailoverReport, Link, Positions, ReplicationStatus, Shortfalls, Skipped, SourceReport,
    StageLag, Status, WatcherKind, WatcherReport,
};
use crate::time::Timestamp;

pub(crate) struct Fake {
    pub(crate) registry: Arc<Registry>,
    /// Holds the registry.
    pub(crate) state: tempfile::TempDir,
    pub(crate) all: Mutex<BTreeMap<FileSystemId, Status>>,
    /// What the next calls fail with.
    pub(crate) fail: Mutex<Option<fn() -> ControlError>>,
    pub(crate) created: Mutex<Vec<CreateRequest>>,
    pub(crate) deleted: Mutex<Vec<DeletionMode>>,
}

impl Default for Fake {
    fn default() -> Self {
        let state = tempfile::tempdir().unwrap();
        let registry = Arc::new(Registry::open(state.path()).unwrap());
        Self {
            registry,
            state,
            all: Mutex::default(),
            fail: Mutex::default(),
            created: Mutex::default(),
            deleted: Mutex::default(),
        }
    }
}

/// `fs-` and the number in 17 digits.
pub(crate) fn id(number: u64) -> FileSystemId {
    format!("fs-{number:017x}").parse().unwrap()
}

pub(crate) fn status(number: u64) -> Status {
    Status {
        source_file_system_id: id(number),
        destination_file_system_id: id(number + 0x1000),
        source_file_system_region: "xx-here-1".to_owned(),
        destination_file_system_region: "xx-there-2".to_owned(),
        creation_time: Timestamp(1_795_248_930_250_123_456 + number as i64),
        status: ReplicationStatus::Enabling,
        status_message: None,
        source: Some(report()),
        destination: None,
    }
}

fn report() -> SourceReport {
    SourceReport {
        time: Timestamp(1_795_248_931_000_000_000),
        desired: DesiredState::Enabled,
        status: ReplicationStatus::Enabling,
        message: None,
        path: "/data".to_owned(),
        watermark: Timestamp::NEVER,
        watcher: WatcherReport {
            kind: WatcherKind::Scan,
            reason: "asked for".to_owned(),
            doubts: Vec::new(),
            watches: None,
        },
        positions: Positions { captured: Seq(3), ..Positions::default() },
        lag: StageLag::default(),
        backlog_records: 0,
        store_bytes: 0,
        progress: None,
        blocked_by: Vec::new(),
        skipped: Skipped::default(),
        link: link(),
        counters: Counters::default(),
        last_error: None,
        verification: Default::default(),
    }
}

fn link() -> Link {
    Link {
        connected: true,
        since: Timestamp(0),
        peer: "[::1]:4481".to_owned(),
        round_trip_micros: None,
        clock_offset_nanos: None,
        last_error: None,
        next_attempt: None,
    }
}

pub(super) fn destination() -> DestinationReport {
    DestinationReport {
        time: Timestamp(1_795_248_931_000_000_000),
        path: "/replica".to_owned(),
        last_replicated: None,
        last_consistent: None,
        time_since_last_sync: None,
        applied: BatchId(0),
        durable: BatchId(0),
        objects: 0,
        orphans: 0,
        enforcement: Enforcement { kind: EnforcementKind::Mount, reason: String::new() },
        abilities: Abilities {
            chown: true,
            xattrs: true,
            privileged_xattrs: true,
            devices: true,
            handles: true,
            links_max: None,
            name_max: None,
        },
        shortfalls: Shortfalls::default(),
        staged_bytes: 0,
        arriving: Vec::new(),
        stalled: None,
        link: link(),
        last_error: None,
    }
}

impl Fake {
    pub(crate) fn with(numbers: impl IntoIterator<Item = u64>) -> Self {
        let fake = Self::default();
        fake.all.lock().unwrap().extend(numbers.into_iter().map(|n| (id(n), status(n))));
        fake
    }

    pub(crate) fn change(&self, number: u64, how: impl FnOnce(&mut Status)) {
        how(self.all.lock().unwrap().get_mut(&id(number)).unwrap());
    }

    fn check(&self) -> Result<(), ControlError> {
        self.fail.lock().unwrap().map_or(Ok(()), |error| Err(error()))
    }
}

impl Control for Fake {
    fn create(&self, request: &CreateRequest) -> Result<Status, ControlError> {
        self.check()?;
        self.created.lock().unwrap().push(request.clone());
        let mut made = status(self.all.lock().unwrap().len() as u64 + 1);
        // As the services do: what is registered keeps its id, and all is entered.
        let known = |path: &Path| self.registry.at(path).map(|record| record.id);
        made.source_file_system_id = known(&request.source).unwrap_or(made.source_file_system_id);
        self.registry.enter(&made.source_file_system_id, &request.source).unwrap();
        if let Some(replica) = request.token.strip_prefix("token-for-") {
            let id = known(Path::new(replica)).unwrap_or(made.destination_file_system_id);
            made.destination_file_system_id = id;
            self.registry.enter(&made.destination_file_system_id, Path::new(replica)).unwrap();
        }
        self.all.lock().unwrap().insert(made.source_file_system_id.clone(), made.clone());
        Ok(made)
    }

    fn list(&self) -> Vec<Status> {
        self.all.lock().unwrap().values().cloned().collect()
    }

    fn delete(
        &self,
        source: &FileSystemId,
        mode: DeletionMode,
    ) -> Result<FailoverReport, ControlError> {
        self.check()?;
        let mut all = self.all.lock().unwrap();
        // As the services do: either end names a configuration.
        let either = |one: &Status| {
            [&one.source_file_system_id, &one.destination_file_system_id].contains(&source)
        };
        let named = all.iter().find(|(_, one)| either(one)).map(|(id, _)| id.clone());
        let Some(gone) = named.and_then(|id| all.remove(&id)) else {
            return Err(ControlError::FileSystemNotFound(source.clone()));
        };
        self.deleted.lock().unwrap().push(mode);
        Ok(FailoverReport {
            source_file_system_id: gone.source_file_system_id,
            destination_file_system_id: gone.destination_file_system_id,
            path: "/replica".to_owned(),
            last_replicated: None,
            last_consistent: None,
            time_since_last_sync: None,
            lost_and_found: None,
            set_aside: 0,
            put_back: 0,
            not_replicated_records: None,
            not_replicated_paths: Vec::new(),
            warnings: Vec::new(),
        })
    }

    fn wait(
        &self,
        source: &FileSystemId,
        patience: Patience<'_>,
    ) -> Result<Timestamp, ControlError> {
        self.check()?;
        if !self.all.lock().unwrap().contains_key(source) {
            return Err(ControlError::FileSystemNotFound(source.clone()));
        }
        if patience.time.is_zero() {
            return Err(ControlError::TimedOut("not reached within 0 s".to_owned()));
        }
        Ok(Timestamp(1_795_248_930_250_000_000))
    }

    fn set_desired(
        &self,
        source: &FileSystemId,
        desired: DesiredState,
    ) -> Result<Status, ControlError> {
        self.check()?;
        let mut all = self.all.lock().unwrap();
        let status =
            all.get_mut(source).ok_or_else(|| ControlError::FileSystemNotFound(source.clone()))?;
        status.status = match desired {
            DesiredState::Enabled => ReplicationStatus::Enabled,
            DesiredState::Paused => ReplicationStatus::Paused,
        };
        Ok(status.clone())
    }
}

/// Issues tokens that say what was asked for.
pub(super) struct FakeTokens;

impl TokenIssuer for FakeTokens {
    fn issue(&self, request: &own::TokenBody) -> Result<String, ControlError> {
        Ok(format!("token-for-{}", request.replica.display()))
    }
}
