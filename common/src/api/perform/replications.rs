//! Configurations: made, told of, deleted.

use std::path::{Path, PathBuf};

use super::{Answer, parse};
use crate::api::known::{End, Known, find};
use crate::api::route::{Query, file_system_id};
use crate::api::{Api, ApiError, efs, own};
use crate::control::{ControlError, CreateRequest, DeletionMode, WatcherChoice};
use crate::id::FileSystemId;

/// What a configuration is to be made of.
pub(super) struct Wanted<'a> {
    /// A path, an id or an ARN.
    pub(super) source: &'a str,
    /// A token, an id or an ARN.
    pub(super) destination: &'a str,
    pub(super) devices: bool,
    pub(super) watcher: WatcherChoice,
}

impl Api {
    pub(super) fn efs_create(&self, source: &str, body: &[u8]) -> Result<Answer, ApiError> {
        if !Path::new(source).is_absolute() {
            file_system_id(source)?;
        }
        let body: efs::CreateBody = parse(body)?;
        let destination = body.destination()?.file_system_id.as_deref().ok_or_else(|| {
            ApiError::validation(
                "Destinations[0].FileSystemId is needed: an enrolment token, or a file system of this daemon",
            )
        })?;
        let (devices, watcher) = (self.options.devices, self.options.watcher);
        self.create(&Wanted { source, destination, devices, watcher })
    }

    pub(super) fn create(&self, wanted: &Wanted<'_>) -> Result<Answer, ApiError> {
        let known = self.known();
        let (source, source_id) = self.source(&known, wanted.source)?;
        let token = self.token(known, wanted.destination, source_id.as_ref())?;
        let status = self.control.create(&CreateRequest {
            source,
            token,
            devices: wanted.devices,
            watcher: wanted.watcher,
        })?;
        Answer::json(&efs::Configuration::new(&status))
    }

    /// The directory that is meant as source, with its id if it has one.
    fn source(
        &self,
        known: &[Known],
        text: &str,
    ) -> Result<(PathBuf, Option<FileSystemId>), ApiError> {
        let path = Path::new(text);
        let id = match path.is_absolute() {
            true => self.registry.at(path).map(|record| record.id),
            false => Some(file_system_id(text)?),
        };
        let Some(id) = id else { return Ok((path.to_owned(), None)) };
        let one = find(known.to_vec(), &id)?;
        if one.end.is_some() {
            return Err(ApiError::already_replicated(&id));
        }
        // What is in no configuration is in the registry, or nowhere.
        let record = one.record.as_ref().ok_or_else(|| ApiError::unknown_file_system(&id))?;
        one.check_available()?;
        Ok((record.path.clone(), Some(id)))
    }

    /// The token of what is meant as destination.
    fn token(
        &self,
        known: Vec<Known>,
        text: &str,
        source: Option<&FileSystemId>,
    ) -> Result<String, ApiError> {
        if !text.starts_with("fs-") && !text.starts_with("arn:") {
            return Ok(text.to_owned());
        }
        let id = file_system_id(text)?;
        if source == Some(&id) {
            return Err(ApiError::validation(format!("{id} cannot be replicated to itself")));
        }
        let one = known.into_iter().find(|one| one.id == id);
        if one.as_ref().is_some_and(|one| one.end.is_some()) {
            return Err(ApiError::already_replicated(&id));
        }
        let found = one.as_ref().and_then(|one| Some((one, one.record.as_ref()?)));
        let (Some(tokens), Some((one, record))) = (&self.tokens, found) else {
            return Err(ApiError::new(
                404,
                "FileSystemNotFound",
                format!(
                    "file system {id} is at no destination of this daemon: give an enrolment token of its own daemon"
                ),
            ));
        };
        one.check_available()?;
        if record.protected {
            return Err(ControlError::Conflict(format!(
                "replication overwrite protection of {id} is ENABLED: it must be DISABLED first"
            ))
            .into());
        }
        let replica = record.path.clone();
        Ok(tokens.issue(&own::TokenBody { replica, valid_seconds: None, reconcile: true })?)
    }

    pub(super) fn efs_describe(&self, query: &Query) -> Result<Answer, ApiError> {
        let mut all = self.control.list();
        if let Some(text) = query.get("FileSystemId") {
            let id = file_system_id(text)?;
            all.retain(|status| efs::concerns(status, &id));
            if all.is_empty() {
                return Err(self.without_replication(&id));
            }
        }
        Answer::json(&efs::describe(all, query)?)
    }

    pub(super) fn efs_delete(&self, source: &str, query: &Query) -> Result<Answer, ApiError> {
        let source = file_system_id(source)?;
        let mode = match query.get("deletionMode") {
            None | Some("ALL_CONFIGURATIONS") => DeletionMode::AllConfigurations,
            Some("LOCAL_CONFIGURATION_ONLY") => DeletionMode::LocalConfigurationOnly,
            Some(other) => {
                return Err(ApiError::validation(format!(
                    "deletionMode must be ALL_CONFIGURATIONS or LOCAL_CONFIGURATION_ONLY, not {other:?}"
                )));
            }
        };
        // The control takes either end; EFS the source alone.
        if !self.control.list().iter().any(|one| one.source_file_system_id == source) {
            return Err(self.without_replication(&source));
        }
        self.control.delete(&source, mode).map_err(|error| match error {
            // The two sides' words differ, for they know no registry.
            ControlError::FileSystemNotFound(id) | ControlError::ReplicationNotFound(id) => {
                self.without_replication(&id)
            }
            error => error.into(),
        })?;
        Ok(Answer { status: 204, body: None })
    }

    /// Why there is no configuration with a file system.
    fn without_replication(&self, id: &FileSystemId) -> ApiError {
        match self.known().iter().find(|one| one.id == *id) {
            Some(one) if one.end == Some(End::Destination) => ApiError::new(
                404,
                "ReplicationNotFound",
                format!(
                    "file system {id} is the destination of its configuration: name the source"
                ),
            ),
            Some(_) => ControlError::ReplicationNotFound(id.clone()).into(),
            None => ApiError::unknown_file_system(id),
        }
    }
}
