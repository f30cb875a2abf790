//! The service, as the daemon's configuration describes it.

use replicator_common::config::SourceConfig;
use replicator_src::engine::halt::HaltRule;
use replicator_src::service::SourceOptions;
use replicator_src::verify::Settings as Verify;

/// The configuration's part that the service needs.
pub fn options(config: &SourceConfig) -> SourceOptions {
    SourceOptions {
        region: config.region.clone(),
        heartbeat: config.heartbeat.get(),
        settle: config.settle.get(),
        rescan_interval: config.rescan_interval.get(),
        max_batch_bytes: config.max_batch_bytes.get(),
        halt: HaltRule {
            percent: config.halt_deletions_percent,
            min: config.halt_deletions_min,
            window: config.halt_deletions_window.get(),
        },
        verify: Verify {
            interval: config.verify_interval.0.map(|interval| interval.get()),
            rate: config.verify_rate.get(),
        },
        ..SourceOptions::new(config.state_dir.clone())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_configurations_defaults_are_the_services() {
        let configured = options(&SourceConfig::default());
        let own = SourceOptions::new(configured.state_dir.clone());
        assert_eq!(format!("{configured:?}"), format!("{own:?}"));
    }
}
