//! What is asked of a destination's replications.

use replicator_common::control::{
    Control, ControlError, CreateRequest, DeletionMode, Patience, Side,
};
use replicator_common::id::FileSystemId;
use replicator_common::status::{DesiredState, FailoverReport, Status};
use replicator_common::time::Timestamp;
use replicator_common::wire::DestinationMessage;

use super::{DestinationService, heard_from};
use crate::replica::Config;

impl Control for DestinationService {
    fn side(&self) -> Side {
        Side::Destination
    }

    fn create(&self, _: &CreateRequest) -> Result<Status, ControlError> {
        Err(ControlError::Validation(
            "a configuration is created at the source, with a token of this destination".to_owned(),
        ))
    }

    fn list(&self) -> Vec<Status> {
        let now = Timestamp::now();
        let region = &self.inner.options.region;
        let mut all: Vec<_> = self
            .inner
            .running()
            .values()
            .map(|running| running.replica.status(now, region))
            .collect();
        all.extend(self.inner.broken().values().map(|broken| broken.status(now, region)));
        all.sort_by_key(|status| status.creation_time);
        all
    }

    fn delete(
        &self,
        source: &FileSystemId,
        mode: DeletionMode,
    ) -> Result<FailoverReport, ControlError> {
        let running = self.inner.find(source)?;
        // A dead peer's connection lives until its idle timeout; its reports end
        // at once.
        let connected = mode == DeletionMode::AllConfigurations && heard_from(&running.replica);
        match mode {
            DeletionMode::AllConfigurations if !connected => {
                return Err(ControlError::Conflict(
                    "the source is not connected: use LOCAL_CONFIGURATION_ONLY to fail over without it"
                        .to_owned(),
                ));
            }
            DeletionMode::AllConfigurations => {}
            DeletionMode::LocalConfigurationOnly => {
                running.close_session("failing over");
            }
        }
        let result = self.inner.fail_over(source);
        let report = result.map_err(|error| ControlError::Internal(error.to_string()))?;
        if let Some(open) = running.session().take() {
            let report = Box::new(report.clone());
            let _ = open.say.send(DestinationMessage::FailedOver { report });
        }
        Ok(report)
    }

    fn wait(&self, _: &FileSystemId, _: Patience<'_>) -> Result<Timestamp, ControlError> {
        Err(ControlError::Conflict(
            "only the source knows what was done there: ask it to wait".to_owned(),
        ))
    }

    fn set_desired(
        &self,
        source: &FileSystemId,
        desired: DesiredState,
    ) -> Result<Status, ControlError> {
        let running = self.inner.find(source)?;
        let config = Config { desired, ..running.replica.config.clone() };
        config
            .write(&running.replica.directory)
            .map_err(|error| ControlError::Internal(error.to_string()))?;
        running.replica.shared().desired = desired;
        if desired == DesiredState::Paused {
            running.close_session("paused at the destination");
        }
        Ok(running.replica.status(Timestamp::now(), &self.inner.options.region))
    }
}
