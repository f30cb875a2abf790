//! The operations: a request in, an answer out, no socket.

mod file_systems;
mod replications;
mod tags;

use std::sync::atomic::AtomicBool;
use std::time::Duration;

use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use replications::Wanted;

use super::route::{Call, Needs, Operation, file_system_id, route};
use super::{Api, ApiError, efs, own};
use crate::control::Patience;
use crate::id::FileSystemId;
use crate::status::{DesiredState, ReplicationStatus, Status};
use crate::verification::PassOptions;

/// How long a call may take: each kind has threads of its own, so that none takes all.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Pace {
    /// As long as the daemon takes to answer.
    Answers,
    /// As long as operators' file systems take: one whose server is dead hangs, and a
    /// failover must not hang with it.
    Looks,
    /// As long as the caller likes.
    Waits,
}

impl Pace {
    fn of(operation: Operation) -> Self {
        use Operation as Op;
        match operation {
            Op::Wait => Self::Waits,
            Op::CreateReplicationConfiguration
            | Op::CreateFileSystem
            | Op::DescribeFileSystems
            | Op::DeleteFileSystem
            | Op::UpdateFileSystemProtection
            | Op::TagResource
            | Op::ListTagsForResource
            | Op::UntagResource
            | Op::Create
            | Op::Token
            | Op::FileSystems
            | Op::Register => Self::Looks,
            Op::DescribeReplicationConfigurations
            | Op::DeleteReplicationConfiguration
            | Op::Health
            | Op::Status
            | Op::Pause
            | Op::Resume
            | Op::Failover
            | Op::Verify
            | Op::Findings => Self::Answers,
        }
    }
}

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
        self.perform_for(&AtomicBool::new(false), method, target, body)
    }

    /// The same for a caller who may go meanwhile: then a wait ends.
    ///
    /// # Errors
    /// As those of [`Self::perform`].
    pub fn perform_for(
        &self,
        gone: &AtomicBool,
        method: &str,
        target: &str,
        body: &[u8],
    ) -> Result<Answer, ApiError> {
        let Call { operation, argument, query, .. } = route(method, target)?;
        match operation {
            Operation::CreateReplicationConfiguration => self.efs_create(&argument, body),
            Operation::DescribeReplicationConfigurations => self.efs_describe(&query),
            Operation::DeleteReplicationConfiguration => self.efs_delete(&argument, &query),
            Operation::CreateFileSystem => self.create_file_system(body),
            Operation::DescribeFileSystems => self.describe_file_systems(&query),
            Operation::DeleteFileSystem => self.delete_file_system(&argument),
            Operation::UpdateFileSystemProtection => self.update_protection(&argument, body),
            Operation::TagResource => self.tag_resource(&argument, body),
            Operation::ListTagsForResource => self.list_tags(&argument, &query),
            Operation::UntagResource => self.untag_resource(&argument, &query),
            Operation::Health => Answer::json(&health(&self.control.list())),
            Operation::Status => Answer::json(&self.control.list()),
            Operation::Create => self.own_create(&parse(body)?),
            Operation::Wait => self.wait(&parse(body)?, gone),
            Operation::Pause => self.set_desired(&parse(body)?, DesiredState::Paused),
            Operation::Resume => self.resume(parse(body)?),
            Operation::Failover => self.failover(&parse(body)?),
            Operation::Token => self.issue(&parse(body)?),
            Operation::Verify => self.verify(&parse(body)?),
            Operation::Findings => self.findings(&parse(body)?),
            Operation::FileSystems => self.list_own(),
            Operation::Register => self.register_own(parse(body)?),
        }
    }

    /// How long a request may take.
    pub(super) fn pace(method: &str, target: &str) -> Pace {
        route(method, target).map_or(Pace::Answers, |call| Pace::of(call.operation))
    }

    /// What a request's caller must be allowed to do.
    pub(super) fn needs(method: &str, target: &str) -> Result<Needs, ApiError> {
        route(method, target).map(|call| call.needs)
    }

    fn own_create(&self, body: &own::CreateBody) -> Result<Answer, ApiError> {
        let source = body.source.to_str().unwrap_or_default();
        if !body.source.is_absolute() && source.parse::<FileSystemId>().is_err() {
            return Err(ApiError::validation(format!(
                "source must be an absolute path or a file system's id, not {:?}",
                body.source
            )));
        }
        self.create(&Wanted {
            source,
            destination: &body.token,
            devices: body.devices.unwrap_or(self.options.devices),
            watcher: body.watcher.unwrap_or(self.options.watcher),
        })
    }

    fn failover(&self, body: &own::FailoverBody) -> Result<Answer, ApiError> {
        let source = self.find(body.id.as_deref())?;
        Answer::json(&self.control.delete(&source, body.mode)?)
    }

    fn verify(&self, body: &own::VerifyBody) -> Result<Answer, ApiError> {
        if body.bytes_per_second.is_some_and(|rate| !own::VERIFY_RATE.contains(&rate)) {
            let (least, most) = (own::VERIFY_RATE.start(), own::VERIFY_RATE.end());
            let message = format!("bytes_per_second must be {least} to {most}");
            return Err(ApiError::validation(message));
        }
        let source = self.find(body.id.as_deref())?;
        let options = PassOptions { repair: body.repair, rate: body.bytes_per_second };
        let pass = self.control.verify(&source, options)?;
        Answer::json(&own::VerifyAnswer { source_file_system_id: source.to_string(), pass })
    }

    fn findings(&self, body: &own::FindingsBody) -> Result<Answer, ApiError> {
        let source = self.find(body.id.as_deref())?;
        Answer::json(&self.control.findings(&source, body.pass, body.after)?)
    }

    fn wait(&self, body: &own::WaitBody, gone: &AtomicBool) -> Result<Answer, ApiError> {
        let longest = own::WAIT_MAX_SECONDS as f64;
        let seconds = body.timeout_seconds.unwrap_or(longest);
        if !(0.0..=longest).contains(&seconds) {
            return Err(ApiError::validation(format!(
                "timeout_seconds must be 0 to {longest}, not {seconds}"
            )));
        }
        let source = self.find(body.id.as_deref())?;
        let patience = Patience { time: Duration::from_secs_f64(seconds), gone };
        let reached = self.control.wait(&source, patience)?;
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
        let registered = body.replica.to_str().and_then(|text| text.parse::<FileSystemId>().ok());
        let replica = match &registered {
            Some(id) => {
                self.registry.get(id).ok_or_else(|| ApiError::unknown_file_system(id))?.path
            }
            None => body.replica.clone(),
        };
        if !replica.is_absolute() {
            return Err(ApiError::validation(format!(
                "replica must be an absolute path or a file system's id, not {replica:?}"
            )));
        }
        if body.valid_seconds.is_some_and(|valid| !own::TOKEN_VALID_SECONDS.contains(&valid)) {
            return Err(ApiError::validation(format!(
                "valid_seconds must be {} to {}",
                own::TOKEN_VALID_SECONDS.start(),
                own::TOKEN_VALID_SECONDS.end()
            )));
        }
        let token = tokens.issue(&own::TokenBody { replica: replica.clone(), ..body.clone() })?;
        Answer::json(&own::TokenAnswer { token, replica })
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
