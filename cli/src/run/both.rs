//! Source and destination behind one control: what `run`'s API serves.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use replicator_common::control::{Control, ControlError, CreateRequest, DeletionMode, Patience};
use replicator_common::id::FileSystemId;
use replicator_common::status::{DesiredState, FailoverReport, ReplicationStatus, Status};
use replicator_common::time::Timestamp;
use replicator_common::verification::{Findings, PassOptions};

/// Both sides. The source is asked; the destination where the source's side
/// does not know or is not to take part.
pub struct Both {
    source: Arc<dyn Control>,
    destination: Arc<dyn Control>,
    /// Sources whose configurations are being deleted. One side's half goes before the
    /// other's: what the other says of that meanwhile is no error.
    deleting: Mutex<Vec<FileSystemId>>,
}

/// A deletion under way, until it is dropped.
struct Deleting<'a>(&'a Both, FileSystemId);

impl Drop for Deleting<'_> {
    fn drop(&mut self) {
        let mut all = self.0.deleting();
        // Another deletion of the same has an item of its own.
        if let Some(at) = all.iter().position(|one| *one == self.1) {
            all.swap_remove(at);
        }
    }
}

impl Both {
    pub fn new(source: Arc<dyn Control>, destination: Arc<dyn Control>) -> Self {
        Self { source, destination, deleting: Mutex::default() }
    }

    fn deleting(&self) -> MutexGuard<'_, Vec<FileSystemId>> {
        self.deleting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The source's status, with the destination's own report: it is in this
    /// process and newer than the one that came over the wire.
    fn merge(&self, status: Status) -> Status {
        self.merge_with(status, &self.destination.list())
    }

    fn merge_with(&self, mut status: Status, destinations: &[Status]) -> Status {
        let own = destinations
            .iter()
            .find(|other| other.source_file_system_id == status.source_file_system_id)
            .and_then(|other| other.destination.clone());
        status.destination = own.or(status.destination);
        if self.deleting().contains(&status.source_file_system_id) {
            (status.status, status.status_message) = (ReplicationStatus::Deleting, None);
        }
        status
    }

    fn delete_both(
        &self,
        source: &FileSystemId,
        mode: DeletionMode,
    ) -> Result<FailoverReport, ControlError> {
        let local = DeletionMode::LocalConfigurationOnly;
        if mode == DeletionMode::AllConfigurations {
            return match self.source.delete(source, mode) {
                Err(ControlError::FileSystemNotFound(_) | ControlError::ReplicationNotFound(_)) => {
                    self.destination.delete(source, local)
                }
                result => result,
            };
        }
        // The replica first: it is what the operator needs. Then the source's
        // side, which would otherwise go on shipping to nobody.
        let mut report = self.destination.delete(source, local)?;
        match self.source.delete(source, local) {
            Ok(_)
            | Err(ControlError::FileSystemNotFound(_) | ControlError::ReplicationNotFound(_)) => {}
            Err(error) => {
                report
                    .warnings
                    .push(format!("the source's configuration was not deleted: {error}"));
            }
        }
        Ok(report)
    }
}

impl Control for Both {
    fn create(&self, request: &CreateRequest) -> Result<Status, ControlError> {
        self.source.create(request).map(|status| self.merge(status))
    }

    fn list(&self) -> Vec<Status> {
        let destinations = self.destination.list();
        let mut all: Vec<Status> =
            self.source.list().into_iter().map(|one| self.merge_with(one, &destinations)).collect();
        // What only the destination knows, since the source's side is gone.
        for status in destinations {
            let id = &status.source_file_system_id;
            if !all.iter().any(|known| known.source_file_system_id == *id) {
                all.push(status);
            }
        }
        all.sort_by_key(|status| status.creation_time);
        all
    }

    fn delete(
        &self,
        source: &FileSystemId,
        mode: DeletionMode,
    ) -> Result<FailoverReport, ControlError> {
        self.deleting().push(source.clone());
        let _deleting = Deleting(self, source.clone());
        self.delete_both(source, mode)
    }

    fn wait(
        &self,
        source: &FileSystemId,
        patience: Patience<'_>,
    ) -> Result<Timestamp, ControlError> {
        self.source.wait(source, patience)
    }

    fn set_desired(
        &self,
        source: &FileSystemId,
        desired: DesiredState,
    ) -> Result<Status, ControlError> {
        self.source.set_desired(source, desired).map(|status| self.merge(status))
    }

    fn accept_deletions(&self, source: &FileSystemId) -> Result<Status, ControlError> {
        self.source.accept_deletions(source).map(|status| self.merge(status))
    }

    fn verify(&self, source: &FileSystemId, options: PassOptions) -> Result<u64, ControlError> {
        self.source.verify(source, options)
    }

    fn findings(
        &self,
        source: &FileSystemId,
        pass: u64,
        after: u64,
    ) -> Result<Findings, ControlError> {
        self.source.findings(source, pass, after)
    }
}

#[cfg(test)]
mod tests;
