//! Errors in EFS's shape: status, class, message.

use serde_json::{Value, json};

use crate::control::ControlError;

/// Why a request was not done. The class is one of EFS's where EFS has one;
/// clients find it in the header `x-amzn-ErrorType`.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct ApiError {
    /// The HTTP status.
    pub status: u16,
    /// The class, as in `FileSystemNotFound`.
    pub class: &'static str,
    /// For people.
    pub message: String,
}

impl ApiError {
    pub(super) fn new(status: u16, class: &'static str, message: impl Into<String>) -> Self {
        Self { status, class, message: message.into() }
    }

    pub(super) fn bad_request(message: impl Into<String>) -> Self {
        Self::new(400, "BadRequest", message)
    }

    pub(super) fn validation(message: impl Into<String>) -> Self {
        Self::new(400, "ValidationException", message)
    }

    pub(super) fn throttled() -> Self {
        Self::new(429, "ThrottlingException", "too many requests at once, try again later")
    }

    pub(super) fn internal(message: impl Into<String>) -> Self {
        Self::new(500, "InternalServerError", message)
    }

    /// The body.
    pub fn to_json(&self) -> Value {
        json!({ "ErrorCode": self.class, "Message": self.message })
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
