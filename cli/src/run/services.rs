//! The two libraries, as `run` and `failover` use them.

use std::path::Path;
use std::sync::Arc;

use anyhow::bail;
use replicator_common::api::TokenIssuer;
use replicator_common::control::Control;
use replicator_common::id::FileSystemId;
use replicator_common::status::FailoverReport;

use super::pair::Pair;
use super::state::StateDirectory;

/// The destination's part of a run's state directory.
pub const DESTINATION_DIRECTORY: &str = "destination";

/// Both services, running.
pub struct Services {
    source: Arc<dyn Control>,
    destination: Arc<dyn Control>,
    tokens: Arc<dyn TokenIssuer>,
}

impl Services {
    /// Opens both; the destination first, so that the source finds it.
    pub fn open(_state: &StateDirectory, _pair: &Pair) -> anyhow::Result<Self> {
        bail!("source and destination are not joined yet")
    }

    pub fn source(&self) -> Arc<dyn Control> {
        self.source.clone()
    }

    pub fn destination(&self) -> Arc<dyn Control> {
        self.destination.clone()
    }

    pub fn tokens(&self) -> Arc<dyn TokenIssuer> {
        self.tokens.clone()
    }

    /// A token of the destination for its source in this process.
    pub fn issue_token(&self, _replica: &Path, _reconcile: bool) -> anyhow::Result<String> {
        bail!("source and destination are not joined yet")
    }

    /// Ends both cleanly: the source first, so that it does not see its
    /// destination die.
    pub fn shutdown(&self) {}
}

/// Fails over on the destination's state, while nothing runs on it.
pub fn failover_offline(
    _state: &Path,
    _source: Option<&FileSystemId>,
) -> anyhow::Result<FailoverReport> {
    bail!("the destination is not joined yet")
}
