//! The control API over HTTP: EFS's replication operations at EFS's paths,
//! wire-compatible, and our own beside them under `/replicator/v1/`.
//!
//! | method and path | does |
//! |---|---|
//! | `POST /2015-02-01/file-systems/{id}/replication-configuration` | CreateReplicationConfiguration, see [`efs`] |
//! | `GET /2015-02-01/file-systems/replication-configurations` | DescribeReplicationConfigurations |
//! | `DELETE /2015-02-01/file-systems/{id}/replication-configuration` | DeleteReplicationConfiguration |
//! | `GET /replicator/v1/health` | [`own::Health`]; an answer means that the daemon lives |
//! | `GET /replicator/v1/status` | every [`Status`](crate::status::Status) |
//! | `POST /replicator/v1/replications` | [`own::CreateBody`] → EFS's configuration |
//! | `POST /replicator/v1/wait` | [`own::WaitBody`] → [`own::WaitAnswer`] |
//! | `POST /replicator/v1/pause` | [`own::Target`] → `Status` |
//! | `POST /replicator/v1/resume` | [`own::ResumeBody`] → `Status` |
//! | `POST /replicator/v1/failover` | [`own::FailoverBody`] → [`FailoverReport`](crate::status::FailoverReport) |
//! | `POST /replicator/v1/verify` | [`own::VerifyBody`] → [`own::VerifyAnswer`]: a pass begins; sources only |
//! | `POST /replicator/v1/findings` | [`own::FindingsBody`] → [`Findings`](crate::verification::Findings) of a pass |
//! | `GET /metrics` | the page for Prometheus, see [`crate::telemetry`] |
//! | `POST /replicator/v1/tokens` | [`own::TokenBody`] → [`own::TokenAnswer`]; destinations only |
//!
//! Errors of both halves have EFS's shape. There is no authentication: the
//! server listens on loopback unless the configuration says otherwise, and
//! refuses what a web page could have sent (see `guard`).
//!
//! [`Api::perform`] is the whole API without a socket; [`server`] is the shell.

pub mod client;
pub mod efs;
mod error;
mod guard;
mod limit;
mod metrics;
pub mod own;
mod perform;
mod route;
pub mod server;

use std::sync::Arc;

use crate::control::{Control, ControlError, WatcherChoice};
use crate::telemetry::Page;

pub use error::ApiError;
pub use perform::Answer;

/// Makes enrolment tokens: what a destination can do beyond [`Control`].
pub trait TokenIssuer: Send + Sync + 'static {
    /// A new one-line token for a replica, which is made when it is missing.
    ///
    /// # Errors
    /// When the replica cannot be used or is in a configuration already.
    fn issue(&self, request: &own::TokenBody) -> Result<String, ControlError>;
}

/// What the API needs to know beside what it controls.
#[derive(Clone, Debug)]
pub struct ApiOptions {
    /// Names, beside `localhost` and addresses, under which clients may call;
    /// lower case.
    pub hosts: Vec<String>,
    /// The watcher of a configuration whose creation names none.
    pub watcher: WatcherChoice,
    /// Whether a configuration whose creation does not say has device nodes.
    pub devices: bool,
}

impl Default for ApiOptions {
    fn default() -> Self {
        Self { hosts: Vec::new(), watcher: WatcherChoice::Auto, devices: false }
    }
}

/// The API of one daemon.
pub struct Api {
    control: Arc<dyn Control>,
    tokens: Option<Arc<dyn TokenIssuer>>,
    page: Option<Page>,
    options: ApiOptions,
}

impl Api {
    /// The API of what `control` controls.
    pub fn new(control: Arc<dyn Control>, options: ApiOptions) -> Self {
        Self { control, tokens: None, page: None, options }
    }

    /// The same, with enrolment tokens.
    #[must_use]
    pub fn with_tokens(self, tokens: Arc<dyn TokenIssuer>) -> Self {
        Self { tokens: Some(tokens), ..self }
    }

    /// The same, with a page for Prometheus.
    #[must_use]
    pub fn with_metrics(self, page: Page) -> Self {
        Self { page: Some(page), ..self }
    }
}

#[cfg(test)]
pub(crate) mod fake;
#[cfg(test)]
mod tests;
