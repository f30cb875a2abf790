//! The service, as the daemon's configuration describes it.

use std::sync::Arc;

use anyhow::Context;
use replicator_common::api::TokenIssuer;
use replicator_common::config::DestinationConfig;
use replicator_common::control::Control;
use replicator_common::registry::Registry;
use replicator_dst::issuer::Issuer;
use replicator_dst::service::{DestinationOptions, DestinationService};
use tokio::runtime::{Builder, Runtime};

/// A running destination.
pub struct Daemon {
    service: DestinationService,
    tokens: Arc<Issuer>,
    runtime: Runtime,
}

impl Daemon {
    /// Opens the state, protects every replica and listens.
    pub fn open(config: &DestinationConfig) -> anyhow::Result<Self> {
        let runtime = Builder::new_multi_thread()
            .thread_name("destination-net")
            .enable_all()
            .build()
            .context("cannot start the network's threads")?;
        let options = DestinationOptions {
            state_dir: config.state_dir.clone(),
            listen: config.listen,
            advertise: Some(address(config)),
            region: config.region.clone(),
            hook: None,
            registry: None,
        };
        let service = {
            let _context = runtime.enter();
            DestinationService::open(options)?
        };
        let tokens = Arc::new(Issuer::new(service.clone(), config.token_validity.get()));
        Ok(Self { service, tokens, runtime })
    }

    /// What the API controls.
    pub fn control(&self) -> Arc<dyn Control> {
        Arc::new(self.service.clone())
    }

    /// The file systems that have an id.
    pub fn registry(&self) -> Arc<Registry> {
        self.service.registry()
    }

    /// Who makes tokens.
    pub fn tokens(&self) -> Arc<dyn TokenIssuer> {
        self.tokens.clone()
    }

    /// Ends cleanly; replicas stay read-only.
    pub fn shutdown(&self) {
        self.runtime.block_on(self.service.shutdown());
    }
}

/// What tokens name: as configured, or this host's name where it listens on
/// all addresses.
fn address(config: &DestinationConfig) -> String {
    if let Some(address) = &config.advertise {
        return address.clone();
    }
    if !config.listen.ip().is_unspecified() {
        return config.listen.to_string();
    }
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let name = match name.trim() {
        "" => "localhost",
        name => name,
    };
    format!("{name}:{}", config.listen.port())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_name_an_address_that_can_be_reached() {
        let mut config = DestinationConfig::default();
        assert!(address(&config).ends_with(":4481") && !address(&config).starts_with('['));
        config.listen = "[2001:db8::1]:7".parse().unwrap();
        assert_eq!(address(&config), "[2001:db8::1]:7");
        config.advertise = Some("replica.example.org:9".to_owned());
        assert_eq!(address(&config), "replica.example.org:9");
    }
}
