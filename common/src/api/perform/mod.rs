//! The operations: a request in, an answer out, no socket.

use std::path::Path;
use std::time::Duration;

use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::route::{Operation, Own, Query, file_system_id, route};
use super::{Api, ApiError, efs, own};
use crate::control::{ControlError, CreateRequest, DeletionMode};
use crate::id::FileSystemId;
use crate::status::{DesiredState, ReplicationStatus, Status};
use crate::verification::PassOptions;

/// A successful answer.
#[derive(Clone, Debug, PartialEq)]
pub struct Answer {
    /// The HTTP status.
    pub status: u16,
    /// The body; `None` for 204.
    pub body: Option<Value>,
}

impl Answer {
    fn json(value: &impl Serialize) -> Result<Self, ApiError> {
        let body = serde_json::to_value(value)
            .map_err(|error| ApiError::internal(format!("cannot write the answer: {error}")))?;
        Ok(Self { status: 200, body: Some(body) })
    }
}

impl Api {
    /// Does what a request asks for; `target` is path and query as they stand
    /// in the request. Blocks.
    ///
    /// # Errors
    /// In EFS's classes.
    pub fn perform(&self, method: &str, target: &str, body: &[u8]) -> Result<Answer, ApiError> {
        match route(method, target)? {
            Operation::CreateReplication { source } => self.efs_create(&source, body),
            Operation::DescribeReplications(query) => {
                Answer::json(&efs::describe(self.control.list(), &query)?)
            }
            Operation::DeleteReplication { source, query } => self.efs_delete(&source, &query),
            Operation::Own(Own::Health) => Answer::json(&health(&self.control.list())),
            Operation::Own(Own::Status) => Answer::json(&self.control.list()),
            Operation::Own(Own::Create) => {
                let body: own::CreateBody = parse(body)?;
                self.create(CreateRequest {
                    source: body.source,
                    token: body.token,
                    devices: body.devices.unwrap_or(self.options.devices),
                    watcher: body.watcher.unwrap_or(self.options.watcher),
                })
            }
            Operation::Own(Own::Wait) => self.wait(&parse(body)?),
            Operation::Own(Own::Pause) => self.set_desired(&parse(body)?, DesiredState::Paused),
            Operation::Own(Own::Resume) => self.resume(parse(body)?),
            Operation::Own(Own::Failover) => {
                let body: own::FailoverBody = parse(body)?;
                let source = self.find(body.id.as_deref())?;
                Answer::json(&self.control.delete(&source, body.mode)?)
            }
            Operation::Own(Own::Token) => self.issue(&parse(body)?),
            Operation::Own(Own::Verify) => {
                let body: own::VerifyBody = parse(body)?;
                let source = self.find(body.id.as_deref())?;
                let options = PassOptions { repair: body.repair, rate: body.bytes_per_second };
                let pass = self.control.verify(&source, options)?;
                Answer::json(&own::VerifyAnswer { source_file_system_id: source.to_string(), pass })
            }
            Operation::Own(Own::Findings) => {
                let body: own::FindingsBody = parse(body)?;
                let source = self.find(body.id.as_deref())?;
                Answer::json(&self.control.findings(&source, body.pass, body.after)?)
            }
        }
    }

    /// Whether a request holds its connection for as long as it likes.
    pub(super) fn is_wait(method: &str, target: &str) -> bool {
        route(method, target) == Ok(Operation::Own(Own::Wait))
    }

    fn efs_create(&self, source: &str, body: &[u8]) -> Result<Answer, ApiError> {
        let by_path = Path::new(source).is_absolute();
        let id = if by_path { None } else { Some(file_system_id(source)?) };
        let body: efs::CreateBody = parse(body)?;
        let destination = body.destination()?;
        let Some(id) = id else {
            let token = destination.file_system_id.clone().ok_or_else(|| {
                ApiError::validation(
                    "a source given by path needs the destination's token as FileSystemId",
                )
            })?;
            return self.create(CreateRequest {
                source: source.into(),
                token,
                devices: self.options.devices,
                watcher: self.options.watcher,
            });
        };
        if self.control.list().iter().any(|status| efs::concerns(status, &id)) {
            return Err(ControlError::ReplicationAlreadyExists(format!(
                "file system {id} is in a replication configuration already"
            ))
            .into());
        }
        // Here, a directory gets its id when its replication is enabled.
        Err(ControlError::FileSystemNotFound(id).into())
    }

    fn create(&self, request: CreateRequest) -> Result<Answer, ApiError> {
        if !request.source.is_absolute() {
            return Err(ApiError::validation(format!(
                "source must be an absolute path, not {:?}",
                request.source
            )));
        }
        let status = self.control.create(&request)?;
        Answer::json(&efs::Configuration::new(&status))
    }

    fn efs_delete(&self, source: &str, query: &Query) -> Result<Answer, ApiError> {
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
        self.control.delete(&source, mode)?;
        Ok(Answer { status: 204, body: None })
    }

    fn wait(&self, body: &own::WaitBody) -> Result<Answer, ApiError> {
        let longest = own::WAIT_MAX_SECONDS as f64;
        let seconds = body.timeout_seconds.unwrap_or(longest);
        if !(0.0..=longest).contains(&seconds) {
            return Err(ApiError::validation(format!(
                "timeout_seconds must be 0 to {longest}, not {seconds}"
            )));
        }
        let source = self.find(body.id.as_deref())?;
        let reached = self.control.wait(&source, Duration::from_secs_f64(seconds))?;
        Answer::json(&own::WaitAnswer {
            source_file_system_id: source.to_string(),
            last_replicated_timestamp: efs::seconds(reached),
        })
    }

    fn set_desired(&self, body: &own::Target, desired: DesiredState) -> Result<Answer, ApiError> {
        let source = self.find(body.id.as_deref())?;
        Answer::json(&self.control.set_desired(&source, desired)?)
    }

    fn resume(&self, body: own::ResumeBody) -> Result<Answer, ApiError> {
        if !body.accept_deletions {
            return self.set_desired(&own::Target { id: body.id }, DesiredState::Enabled);
        }
        let source = self.find(body.id.as_deref())?;
        Answer::json(&self.control.accept_deletions(&source)?)
    }

    fn issue(&self, body: &own::TokenBody) -> Result<Answer, ApiError> {
        let Some(tokens) = &self.tokens else {
            return Err(ApiError::validation(
                "this daemon is a source: ask the destination's daemon for a token",
            ));
        };
        if !body.replica.is_absolute() {
            return Err(ApiError::validation(format!(
                "replica must be an absolute path, not {:?}",
                body.replica
            )));
        }
        if body.valid_seconds.is_some_and(|valid| !own::TOKEN_VALID_SECONDS.contains(&valid)) {
            return Err(ApiError::validation(format!(
                "valid_seconds must be {} to {}",
                own::TOKEN_VALID_SECONDS.start(),
                own::TOKEN_VALID_SECONDS.end()
            )));
        }
        let token = tokens.issue(body)?;
        Answer::json(&own::TokenAnswer { token, replica: body.replica.clone() })
    }

    /// The source's id of the configuration that is meant: the one with `id`
    /// at either end, or the only one.
    fn find(&self, id: Option<&str>) -> Result<FileSystemId, ApiError> {
        let all = self.control.list();
        let Some(id) = id else {
            return match &all[..] {
                [only] => Ok(only.source_file_system_id.clone()),
                [] => Err(ApiError::new(
                    404,
                    "ReplicationNotFound",
                    "there is no replication configuration here",
                )),
                several => Err(ApiError::validation(format!(
                    "there are {} replication configurations here, say which: {}",
                    several.len(),
                    several
                        .iter()
                        .map(|status| status.source_file_system_id.as_str())
                        .collect::<Vec<_>>()
                        .join(", ")
                ))),
            };
        };
        let id = file_system_id(id)?;
        let found = all.iter().find(|status| efs::concerns(status, &id));
        // An id that is not listed goes on to the control, which says what it
        // knows of it.
        Ok(found.map_or(id, |status| status.source_file_system_id.clone()))
    }
}

fn parse<T: DeserializeOwned>(body: &[u8]) -> Result<T, ApiError> {
    let body = if body.is_empty() { b"{}" } else { body };
    serde_json::from_slice(body)
        .map_err(|error| ApiError::bad_request(format!("the body is not valid: {error}")))
}

fn health(all: &[Status]) -> own::Health {
    let reasons: Vec<String> = all
        .iter()
        .filter(|status| {
            matches!(status.status, ReplicationStatus::Error | ReplicationStatus::Halted)
        })
        .map(|status| {
            let why = status.status_message.as_deref().unwrap_or("see status");
            format!("{}: {why}", status.source_file_system_id)
        })
        .collect();
    own::Health {
        healthy: reasons.is_empty(),
        configurations: all.len(),
        unhealthy_reasons: reasons,
    }
}
