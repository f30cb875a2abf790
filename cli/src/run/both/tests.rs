use super::*;
use std::sync::Mutex;

use replicator_common::status::ReplicationStatus;

/// One side: knows a configuration or not, and remembers what was asked.
#[derive(Default)]
struct Side {
    known: Mutex<Vec<FileSystemId>>,
    deletions: Mutex<Vec<DeletionMode>>,
    broken: bool,
    /// Is asked while this side's half is being deleted.
    asked: Mutex<Option<std::sync::Weak<Both>>>,
    /// What it said.
    answered: Mutex<Vec<Status>>,
}

fn id() -> FileSystemId {
    "fs-01234567".parse().unwrap()
}

impl Side {
    fn knowing() -> Arc<Self> {
        Arc::new(Self { known: Mutex::new(vec![id()]), ..Self::default() })
    }

    fn deletions(&self) -> Vec<DeletionMode> {
        self.deletions.lock().unwrap().clone()
    }
}

impl Control for Side {
    fn create(&self, _: &CreateRequest) -> Result<Status, ControlError> {
        Err(ControlError::Validation("not here".to_owned()))
    }

    fn list(&self) -> Vec<Status> {
        let status = |id: &FileSystemId| Status {
            source_file_system_id: id.clone(),
            destination_file_system_id: "fs-89abcdef".parse().unwrap(),
            source_file_system_region: "xx-local".to_owned(),
            destination_file_system_region: "xx-local".to_owned(),
            creation_time: Timestamp(0),
            status: ReplicationStatus::Enabled,
            status_message: None,
            source: None,
            destination: None,
        };
        self.known.lock().unwrap().iter().map(status).collect()
    }

    fn delete(
        &self,
        source: &FileSystemId,
        mode: DeletionMode,
    ) -> Result<FailoverReport, ControlError> {
        self.deletions.lock().unwrap().push(mode);
        if let Some(both) = self.asked.lock().unwrap().as_ref().and_then(std::sync::Weak::upgrade) {
            *self.answered.lock().unwrap() = both.list();
        }
        if self.broken {
            return Err(ControlError::Internal("disk full".to_owned()));
        }
        let mut known = self.known.lock().unwrap();
        if !known.contains(source) {
            return Err(ControlError::FileSystemNotFound(source.clone()));
        }
        known.clear();
        Ok(FailoverReport {
            source_file_system_id: source.clone(),
            destination_file_system_id: "fs-89abcdef".parse().unwrap(),
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

    fn wait(&self, _: &FileSystemId, _: Patience<'_>) -> Result<Timestamp, ControlError> {
        Ok(Timestamp(1))
    }

    fn set_desired(&self, id: &FileSystemId, _: DesiredState) -> Result<Status, ControlError> {
        self.list().pop().ok_or_else(|| ControlError::FileSystemNotFound(id.clone()))
    }
}

use DeletionMode::{AllConfigurations, LocalConfigurationOnly};

#[test]
fn failover_goes_through_the_source() {
    let (source, destination) = (Side::knowing(), Side::knowing());
    let both = Both::new(source.clone(), destination.clone());
    assert_eq!(both.list().len(), 1, "one configuration, though both sides know it");
    both.delete(&id(), AllConfigurations).unwrap();
    assert_eq!(source.deletions(), [AllConfigurations]);
    assert!(destination.deletions().is_empty(), "the source asks the destination");
}

#[test]
fn who_looks_while_one_half_is_gone_sees_deleting() {
    let (source, destination) = (Side::knowing(), Side::knowing());
    let both = Arc::new(Both::new(source.clone(), destination));
    *source.asked.lock().unwrap() = Some(Arc::downgrade(&both));
    both.delete(&id(), LocalConfigurationOnly).unwrap();
    let seen: Vec<_> = source.answered.lock().unwrap().iter().map(|one| one.status).collect();
    assert_eq!(seen, [ReplicationStatus::Deleting]);
    source.known.lock().unwrap().push(id());
    assert_eq!(both.list()[0].status, ReplicationStatus::Enabled, "the next is none of it");
}

#[test]
fn a_source_that_knows_nothing_is_passed_over() {
    let destination = Side::knowing();
    let both = Both::new(Arc::new(Side::default()), destination.clone());
    assert_eq!(both.list().len(), 1);
    both.delete(&id(), AllConfigurations).unwrap();
    assert_eq!(destination.deletions(), [LocalConfigurationOnly]);
    let error = both.delete(&id(), AllConfigurations).unwrap_err();
    assert!(matches!(error, ControlError::FileSystemNotFound(_)));
}

#[test]
fn local_deletion_hands_the_replica_over_whatever_the_source_says() {
    let (source, destination) = (Side::knowing(), Side::knowing());
    let both = Both::new(source.clone(), destination.clone());
    assert!(both.delete(&id(), LocalConfigurationOnly).unwrap().warnings.is_empty());
    assert_eq!(source.deletions(), [LocalConfigurationOnly]);
    assert_eq!(destination.deletions(), [LocalConfigurationOnly]);

    let broken = Arc::new(Side { broken: true, ..Side::default() });
    let both = Both::new(broken, Side::knowing());
    let report = both.delete(&id(), LocalConfigurationOnly).unwrap();
    assert_eq!(report.warnings, ["the source's configuration was not deleted: disk full"]);
}
