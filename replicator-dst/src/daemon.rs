//! The service, as the daemon's configuration describes it.

use std::sync::Arc;

use anyhow::bail;
use replicator_common::api::TokenIssuer;
use replicator_common::config::DestinationConfig;
use replicator_common::control::Control;

/// A running destination.
pub struct Daemon {
    control: Arc<dyn Control>,
    tokens: Arc<dyn TokenIssuer>,
}

impl Daemon {
    /// Opens the state, protects every replica and listens.
    pub fn open(_config: &DestinationConfig) -> anyhow::Result<Self> {
        bail!("the service is not joined yet")
    }

    /// What the API controls.
    pub fn control(&self) -> Arc<dyn Control> {
        self.control.clone()
    }

    /// Who makes tokens.
    pub fn tokens(&self) -> Arc<dyn TokenIssuer> {
        self.tokens.clone()
    }

    /// Ends cleanly; replicas stay read-only.
    pub fn shutdown(&self) {}
}
