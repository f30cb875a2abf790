//! What Prometheus is told: the page at `/metrics`.
//!
//! It has three parts, which share no name:
//! - what the machinery counts and times by the `metrics` crate, kept by one
//!   recorder of the process ([`install`]); series of a configuration that is
//!   no more are left out (`page`);
//! - what status says, set at each scrape into a recorder of its own that ends
//!   with the scrape (`mirror`): it is never older than status, and of a
//!   deleted configuration nothing is left;
//! - what the kernel says of the process (`process`).
//!
//! [`catalogue`] names and describes every metric.

pub mod catalogue;
mod mirror;
mod page;
mod process;
mod series;

use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::time::Duration;

use metrics_exporter_prometheus::{
    BuildError, Matcher, PrometheusBuilder, PrometheusHandle, PrometheusRecorder,
};

use crate::status::Status;
use crate::time::Timestamp;

pub use series::{Series, Side};

/// How often what histograms were given is summed up where nobody scrapes: until
/// then, each value is kept.
const UPKEEP: Duration = Duration::from_secs(5);

static HANDLE: OnceLock<PrometheusHandle> = OnceLock::new();

/// Keeps from now on what the machinery counts, for the life of the process.
/// Before anything is counted; calls after the first change nothing.
pub fn install() {
    HANDLE.get_or_init(|| {
        let recorder = recorder();
        let handle = recorder.handle();
        if metrics::set_global_recorder(recorder).is_err() {
            tracing::warn!("somebody else keeps this process's metrics: most will be missing");
        }
        catalogue::describe();
        let kept = handle.clone();
        let upkeep = move || {
            loop {
                std::thread::sleep(UPKEEP);
                kept.run_upkeep();
            }
        };
        if let Err(error) = std::thread::Builder::new().name("metrics".to_owned()).spawn(upkeep) {
            tracing::warn!(%error, "histograms are summed up at scrapes only");
        }
        handle
    });
}

/// A recorder that knows the histograms' buckets.
fn recorder() -> PrometheusRecorder {
    with_buckets()
        .unwrap_or_else(|error| {
            tracing::error!(%error, "histograms have no buckets");
            PrometheusBuilder::new()
        })
        .build_recorder()
}

fn with_buckets() -> Result<PrometheusBuilder, BuildError> {
    catalogue::METRICS.iter().try_fold(PrometheusBuilder::new(), |builder, metric| {
        match metric.kind {
            catalogue::Kind::Histogram(buckets) => {
                builder.set_buckets_for_metric(Matcher::Full(metric.name.to_owned()), buckets)
            }
            _ => Ok(builder),
        }
    })
}

/// The page of one daemon.
#[derive(Clone, Debug)]
pub struct Page {
    sides: &'static [Side],
    state: PathBuf,
}

impl Page {
    /// For a daemon that is `sides`, with the state directory `state`.
    pub fn new(sides: &'static [Side], state: &Path) -> Self {
        Self { sides, state: state.to_owned() }
    }

    /// The page, given how the configurations stand now. Reads the state
    /// directory's sizes and `/proc`.
    pub fn render(&self, all: &[Status], now: Timestamp) -> String {
        let counted = HANDLE.get().map(PrometheusHandle::render).unwrap_or_default();
        let recorder = recorder();
        metrics::with_local_recorder(&recorder, || {
            catalogue::describe();
            mirror::set(all, self.sides, now);
            mirror::set_daemon(all.len(), self.sides, crate::sys::usage::of(&self.state));
        });
        let mirrored = recorder.handle().render();
        page::compose(&[&counted, &mirrored, &process::render()], all)
    }
}

#[cfg(test)]
mod tests;
