//! The control API over HTTP and HTTPS: EFS's operations at EFS's paths,
//! wire-compatible (see [`efs`]), and our own beside them under `/replicator/v1/`.
//!
//! | method and path | does |
//! |---|---|
//! | `POST /2015-02-01/file-systems/{id}/replication-configuration` | CreateReplicationConfiguration |
//! | `GET /2015-02-01/file-systems/replication-configurations` | DescribeReplicationConfigurations |
//! | `DELETE /2015-02-01/file-systems/{id}/replication-configuration` | DeleteReplicationConfiguration |
//! | `POST /2015-02-01/file-systems` | CreateFileSystem |
//! | `GET /2015-02-01/file-systems` | DescribeFileSystems |
//! | `DELETE /2015-02-01/file-systems/{id}` | DeleteFileSystem |
//! | `PUT /2015-02-01/file-systems/{id}/protection` | UpdateFileSystemProtection |
//! | `POST /2015-02-01/resource-tags/{id}` | TagResource |
//! | `GET /2015-02-01/resource-tags/{id}` | ListTagsForResource |
//! | `DELETE /2015-02-01/resource-tags/{id}` | UntagResource |
//! | `GET /replicator/v1/health` | [`own::Health`]; an answer means that the daemon lives |
//! | `GET /` | the console, a page for people (`console`) |
//! | `GET /replicator/v1/events` | what happens, as it happens: server-sent events (`events`) |
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
//! | `GET /replicator/v1/file-systems` | every [`own::FileSystem`] |
//! | `POST /replicator/v1/file-systems` | [`own::RegisterBody`] → [`own::FileSystem`] |
//!
//! Errors of both halves have EFS's shape: [`ApiError`] lists them. Who may ask is
//! said in [`auth`]; what a web page other than the console could have sent is
//! refused (see `guard`).
//!
//! A new operation is a row of the table in `route` and an arm of
//! [`Api::perform`].
//!
//! [`Api::perform`] is the whole API without a socket; [`server`] is the shell.

pub mod auth;
pub mod client;
mod console;
pub mod efs;
mod error;
mod events;
mod guard;
mod history;
mod known;
mod metrics;
pub mod own;
mod perform;
mod route;
pub mod server;

use std::sync::Arc;

use auth::Credentials;

use crate::config::{ApiConfig, DEFAULT_REGION};
use crate::control::{Control, ControlError, WatcherChoice};
use crate::registry::Registry;
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
    /// The region of file systems that are in no configuration.
    pub region: String,
    /// Who is let in.
    pub credentials: Credentials,
}

impl Default for ApiOptions {
    fn default() -> Self {
        Self {
            hosts: Vec::new(),
            watcher: WatcherChoice::Auto,
            devices: false,
            region: DEFAULT_REGION.to_owned(),
            credentials: Credentials::default(),
        }
    }
}

impl ApiOptions {
    /// What a daemon's configuration says of them.
    pub fn of(config: &ApiConfig<'_>) -> Self {
        Self {
            hosts: config.hosts.to_vec(),
            region: config.region.to_owned(),
            credentials: config.credentials(),
            ..Self::default()
        }
    }
}

/// The API of one daemon.
pub struct Api {
    control: Arc<dyn Control>,
    registry: Arc<Registry>,
    tokens: Option<Arc<dyn TokenIssuer>>,
    page: Option<Page>,
    options: ApiOptions,
}

impl Api {
    /// The API of what `control` controls, which enters its file systems in
    /// `registry`.
    pub fn new(control: Arc<dyn Control>, registry: Arc<Registry>, options: ApiOptions) -> Self {
        Self { control, registry, tokens: None, page: None, options }
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
