//! The two libraries, as `run` and `failover` use them.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use replicator_common::api::TokenIssuer;
use replicator_common::config::DEFAULT_REGION;
use replicator_common::control::Control;
use replicator_common::id::FileSystemId;
use replicator_common::registry::Registry;
use replicator_common::status::FailoverReport;
use replicator_dst::issuer::Issuer;
use replicator_dst::service::{DestinationOptions, DestinationService, ServiceError};
use replicator_dst::suitable::Unsuitable;
use replicator_src::engine::halt::HaltRule;
use replicator_src::service::{SourceOptions, SourceService};
use tokio::runtime::{Builder, Runtime};

use super::state::StateDirectory;

/// The destination's part of a run's state directory.
pub const DESTINATION_DIRECTORY: &str = "destination";
/// The source's part.
const SOURCE_DIRECTORY: &str = "source";
/// How long a token can be used that goes from one side to the other within
/// this process.
const TOKEN_VALID: Duration = Duration::from_secs(600);
/// Of each of the two services: there is one connection.
const NETWORK_THREADS: usize = 1;

/// Both services, running.
pub struct Services {
    source: Arc<SourceService>,
    destination: DestinationService,
    /// The destination's network.
    runtime: Runtime,
}

impl Services {
    /// Opens both; the destination first, so that the source finds it.
    pub fn open(state: &StateDirectory, halt: HaltRule) -> anyhow::Result<Self> {
        // One for both: an id means the same at either side.
        let registry = Arc::new(Registry::open(state.path())?);
        let listen = SocketAddr::from((Ipv4Addr::LOCALHOST, state.port()?));
        let runtime = Builder::new_multi_thread()
            .worker_threads(NETWORK_THREADS)
            .thread_name("destination-net")
            .enable_all()
            .build()
            .context("cannot start the network's threads")?;
        let options = DestinationOptions {
            state_dir: state.path().join(DESTINATION_DIRECTORY),
            listen,
            advertise: None,
            region: DEFAULT_REGION.to_owned(),
            hook: None,
            registry: Some(registry.clone()),
        };
        let destination = {
            let _context = runtime.enter();
            DestinationService::open(options)?
        };
        // A daemon goes on with its other replicas; here there is no other.
        if let Some((_, reason)) = destination.unopened().pop() {
            runtime.block_on(destination.shutdown());
            bail!(reason);
        }
        let options = SourceOptions::new(state.path().join(SOURCE_DIRECTORY));
        let (registry, network_threads) = (Some(registry), NETWORK_THREADS);
        match SourceService::open(SourceOptions { halt, registry, network_threads, ..options }) {
            Ok(source) => Ok(Self { source, destination, runtime }),
            Err(error) => {
                runtime.block_on(destination.shutdown());
                Err(error.into())
            }
        }
    }

    pub fn source(&self) -> Arc<dyn Control> {
        self.source.clone()
    }

    pub fn destination(&self) -> Arc<dyn Control> {
        Arc::new(self.destination.clone())
    }

    pub fn registry(&self) -> Arc<Registry> {
        self.source.registry()
    }

    pub fn tokens(&self) -> Arc<dyn TokenIssuer> {
        Arc::new(Issuer::new(self.destination.clone(), TOKEN_VALID))
    }

    /// A token of the destination for its source in this process.
    pub fn issue_token(&self, replica: &Path, reconcile: bool) -> anyhow::Result<String> {
        match self.destination.token(replica, TOKEN_VALID, reconcile) {
            Ok(token) => Ok(token.to_string()),
            Err(error @ ServiceError::Unsuitable(Unsuitable::NotEmpty { .. })) => bail!(
                "{error} with --reconcile: only differences travel, and what the source lacks is moved to lost+found"
            ),
            Err(error) => Err(error.into()),
        }
    }

    /// Ends both cleanly: the source first, so that it does not see its
    /// destination die.
    pub fn shutdown(&self) {
        self.source.shutdown();
        self.runtime.block_on(self.destination.shutdown());
    }
}

/// Fails over on the destination's state, while nothing runs on it.
pub fn failover_offline(
    state: &Path,
    source: Option<&FileSystemId>,
) -> anyhow::Result<FailoverReport> {
    // Opening makes what is missing: not in somebody else's directory.
    ensure!(
        state.join("destination.json").exists(),
        "{} is not the state directory of a destination or a run",
        state.display()
    );
    Ok(replicator_dst::failover::offline(state, source)?)
}
