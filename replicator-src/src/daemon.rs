//! The service, as the daemon's configuration describes it.

use std::sync::Arc;

use anyhow::bail;
use replicator_common::config::SourceConfig;
use replicator_common::control::Control;

/// A running source.
pub struct Daemon {
    control: Arc<dyn Control>,
}

impl Daemon {
    /// Opens the state and resumes every replication.
    pub fn open(_config: &SourceConfig) -> anyhow::Result<Self> {
        bail!("the service is not joined yet")
    }

    /// What the API controls.
    pub fn control(&self) -> Arc<dyn Control> {
        self.control.clone()
    }

    /// Ends cleanly.
    pub fn shutdown(&self) {}
}
