//! Errors in EFS's shape: status, class, message.

use serde_json::{Value, json};

use crate::control::ControlError;
use crate::id::FileSystemId;
use crate::registry::RegistryError;

/// Why a request was not done. The class is one of EFS's where EFS has one;
/// clients find it in the header `x-amzn-ErrorType`.
///
/// | status | classes |
/// |---|---|
/// | 400 | `BadRequest`, `ValidationException`, `UnsupportedAvailabilityZone`; `IncompleteSignature`, `RequestExpired` (clocks more than 15 minutes apart) |
/// | 403 | `MissingAuthenticationToken`, `InvalidClientTokenId`, `InvalidSignatureException`, `AccessDeniedException`, `FileSystemLimitExceeded` |
/// | 404 | `FileSystemNotFound`, `ReplicationNotFound` (the file system is known), `AccessPointNotFound`, `UnknownOperationException` |
/// | 405 | `UnknownOperationException` |
/// | 409 | `ConflictException`, `ReplicationAlreadyExists`, `FileSystemInUse`, `FileSystemAlreadyExists` (with the other's `FileSystemId`), `IncorrectFileSystemLifeCycleState` |
/// | 429, 500, 504 | `ThrottlingException`, `InternalServerError`, `TimedOut` |
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct ApiError {
    /// The HTTP status.
    pub status: u16,
    /// The class, as in `FileSystemNotFound`.
    pub class: &'static str,
    /// For people.
    pub message: String,
    /// The other file system of FileSystemAlreadyExists.
    pub file_system_id: Option<FileSystemId>,
}

impl ApiError {
    pub(super) fn new(status: u16, class: &'static str, message: impl Into<String>) -> Self {
        Self { status, class, message: message.into(), file_system_id: None }
    }

    pub(super) fn bad_request(message: impl Into<String>) -> Self {
        Self::new(400, "BadRequest", message)
    }

    pub(super) fn validation(message: impl Into<String>) -> Self {
        Self::new(400, "ValidationException", message)
    }

    pub(super) fn unknown_file_system(id: &FileSystemId) -> Self {
        ControlError::FileSystemNotFound(id.clone()).into()
    }

    pub(super) fn already_replicated(id: &FileSystemId) -> Self {
        let message = format!("file system {id} is in a replication configuration already");
        ControlError::ReplicationAlreadyExists(message).into()
    }

    pub(super) fn throttled() -> Self {
        Self::new(429, "ThrottlingException", "too many requests at once, try again later")
    }

    pub(super) fn internal(message: impl Into<String>) -> Self {
        Self::new(500, "InternalServerError", message)
    }

    /// The body.
    pub fn to_json(&self) -> Value {
        let mut body = json!({ "ErrorCode": self.class, "Message": self.message });
        if let Some(id) = &self.file_system_id {
            body["FileSystemId"] = json!(id);
        }
        body
    }
}

impl From<ControlError> for ApiError {
    fn from(error: ControlError) -> Self {
        let message = error.to_string();
        match error {
            ControlError::Validation(_) => Self::validation(message),
            ControlError::FileSystemNotFound(_) => Self::new(404, "FileSystemNotFound", message),
            ControlError::ReplicationNotFound(_) => Self::new(404, "ReplicationNotFound", message),
            ControlError::ReplicationAlreadyExists(_) => {
                Self::new(409, "ReplicationAlreadyExists", message)
            }
            ControlError::Conflict(_) => Self::new(409, "ConflictException", message),
            // Not 408, 429, 500 or 503: clients would repeat the wait.
            ControlError::TimedOut(_) => Self::new(504, "TimedOut", message),
            ControlError::Internal(_) => Self::internal(message),
        }
    }
}

impl From<RegistryError> for ApiError {
    fn from(error: RegistryError) -> Self {
        let message = error.to_string();
        match error {
            RegistryError::Exists { id, .. } => Self {
                file_system_id: Some(id),
                ..Self::new(409, "FileSystemAlreadyExists", message)
            },
            RegistryError::Unknown(_) => Self::new(404, "FileSystemNotFound", message),
            RegistryError::Full => Self::new(403, "FileSystemLimitExceeded", message),
            RegistryError::File(_) => Self::internal(message),
        }
    }
}
