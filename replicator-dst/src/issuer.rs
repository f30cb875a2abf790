//! The destination's tokens, for who asks the API.

use std::time::Duration;

use replicator_common::api::TokenIssuer;
use replicator_common::api::own::TokenBody;
use replicator_common::control::ControlError;

use crate::service::DestinationService;

/// Issues tokens of a destination.
pub struct Issuer {
    service: DestinationService,
    valid: Duration,
}

impl Issuer {
    /// Tokens are good for `valid`, unless a request says otherwise.
    pub fn new(service: DestinationService, valid: Duration) -> Self {
        Self { service, valid }
    }
}

impl TokenIssuer for Issuer {
    fn issue(&self, request: &TokenBody) -> Result<String, ControlError> {
        let valid = request.valid_seconds.map_or(self.valid, Duration::from_secs);
        self.service
            .token(&request.replica, valid, request.reconcile)
            .map(|token| token.to_string())
            .map_err(|error| ControlError::Conflict(error.to_string()))
    }
}
