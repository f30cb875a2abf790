//! One replication: its configuration on disk, its engine and link.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crossbeam_channel::bounded;
use replicator_common::control::WatcherChoice;
use replicator_common::crashsafe::{self, Format, StateFileError};
use replicator_common::id::{FileSystemId, ObjectId};
use replicator_common::net::identity::Fingerprint;
use replicator_common::status::{DesiredState, FailoverReport, ReplicationStatus, Status};
use replicator_common::time::Timestamp;
use replicator_common::verification::{Findings, PassOptions};
use serde::{Deserialize, Serialize};

use super::keeper::{Keeper, Running};
use super::{ServiceError, SourceOptions};
use crate::clock::Clock;
use crate::engine::state::Shared;
use crate::engine::{Command, Event};
use crate::meters::Meters;
use crate::verify::Verifier;

/// Format of a configuration file. Versions: 1, the first.
const FORMAT: Format = Format { name: "source-replication", version: 1 };
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
    /// Its file system's name for itself (see [`crate::source::Root::file_system`]); not known
    /// of configurations that were made before it was kept.
    #[serde(default)]
    pub(super) file_system: Option<u64>,
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
    pub(super) directory: PathBuf,
    /// This side's.
    region: String,
    configuration: Mutex<Configuration>,
    pub(super) shared: Arc<Shared>,
    /// What keeps it running, once it was started.
    pub(super) keeper: Mutex<Option<Keeper>>,
    /// Whether its configuration is gone, so that it is not started any more. Held
    /// while it is started, stopped or removed (see [`Replication::hold_still`]).
    pub(super) removed: Mutex<bool>,
    /// What runs now: nothing while the source is not there.
    pub(super) running: Mutex<Option<Running>>,
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
            Arc::new(Meters::new(&configuration.source, &configuration.destination)),
        ));
        Ok(Arc::new(Self {
            directory,
            region: options.region.clone(),
            configuration: Mutex::new(configuration),
            shared,
            keeper: Mutex::default(),
            removed: Mutex::default(),
            running: Mutex::default(),
        }))
    }

    /// Nobody else starts, stops or removes it until this is dropped. One lock each: a
    /// file system that hangs while its source is opened holds up no other
    /// replication's failover.
    pub(super) fn hold_still(&self) -> MutexGuard<'_, bool> {
        self.removed.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Begins a pass of verification; gives its number.
    pub(super) fn verify(&self, options: PassOptions) -> Result<u64, String> {
        self.verifier()?.begin(options)
    }

    fn verifier(&self) -> Result<Arc<Verifier>, String> {
        let running = self.running();
        let verifier = running.as_ref().map(|running| running.verifier.clone());
        verifier.ok_or_else(|| "the replication does not run".to_owned())
    }

    /// What a pass of verification has found.
    pub(super) fn findings(&self, pass: u64, after: u64) -> Result<Findings, String> {
        let findings = self.verifier()?.findings(pass, after);
        findings.ok_or_else(|| format!("verification {pass} is not the last one"))
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
        if desired == DesiredState::Enabled {
            self.shared.call_now();
        }
        self.post(Command::Nudge);
        Ok(())
    }

    /// Lets the deletions through for which replication has halted; whether
    /// that was done.
    pub(super) fn accept_deletions(&self) -> bool {
        let (reply, done) = bounded(1);
        self.post(Command::AcceptDeletions(reply));
        done.recv_timeout(ANSWER).is_ok()
    }

    /// Somebody waits for the watermark: where only a walk moves it, walk now.
    pub(super) fn nudge_for_wait(&self) {
        self.shared.call_now();
        self.post(Command::Await);
    }

    /// Has status brought up to date, so that what a waiter asks for next is of
    /// the moment that it waited for.
    pub(super) fn refresh(&self) {
        let (reply, done) = crossbeam_channel::bounded(1);
        self.post(Command::Refresh(reply));
        // An engine that has ended, or is busy for long, leaves it as it was.
        let _ = done.recv_timeout(REFRESH);
    }

    pub(super) fn post(&self, command: Command) {
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

    pub(super) fn running(&self) -> MutexGuard<'_, Option<Running>> {
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
