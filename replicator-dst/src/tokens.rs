//! Enrolment tokens for the configured replicas.

use std::io::Write;
use std::path::Path;

use anyhow::{Context, bail};
use replicator_common::api::TokenIssuer;
use replicator_common::api::client::Client;
use replicator_common::api::own::TokenBody;
use replicator_common::config::{DestinationConfig, ReplicaConfig};
use replicator_common::control::Control;
use replicator_common::daemon::own_access;
use replicator_common::status::Status;
use tracing::{error, info};

/// Which tokens are asked for.
pub struct Wanted<'a> {
    /// For which replica; every configured one that has no source otherwise.
    pub replica: Option<&'a Path>,
    /// Seconds.
    pub valid_seconds: Option<u64>,
    /// Take what is not empty, whatever the configuration says.
    pub reconcile: bool,
}

/// At the start: prints a token for each configured replica without a source.
/// One that cannot be used is logged and does not hold up the others.
pub fn offer(config: &DestinationConfig, control: &dyn Control, tokens: &dyn TokenIssuer) {
    let enrolled = control.list();
    for replica in free(&config.replicas, &enrolled) {
        let body = TokenBody {
            replica: replica.path.clone(),
            valid_seconds: None,
            reconcile: replica.reconcile,
        };
        let path = replica.path.display();
        match tokens.issue(&body) {
            Ok(token) => {
                info!(replica = %path, valid = %config.token_validity, "enrol a source with the token on standard output");
                // When nobody reads it, `token` gives another.
                let _ = print(&token);
            }
            Err(error) => error!(replica = %path, %error, "no token for this replica"),
        }
    }
}

/// Asks the daemon that runs with this configuration, and prints.
pub fn ask(config: &DestinationConfig, wanted: &Wanted<'_>) -> anyhow::Result<()> {
    let access = own_access(&config.api(), &config.state_dir)?;
    let client = Client::open(&access)?;
    let configured = |path: &Path| config.replicas.iter().find(|replica| replica.path == path);
    let replicas = match wanted.replica {
        Some(path) => {
            let path = std::path::absolute(path)
                .with_context(|| format!("cannot use {}", path.display()))?;
            let reconcile = configured(&path).is_some_and(|replica| replica.reconcile);
            vec![ReplicaConfig { path, reconcile }]
        }
        None => free(&config.replicas, &client.status()?),
    };
    if replicas.is_empty() {
        bail!("no configured replica is without a source: name one with --replica");
    }
    for replica in replicas {
        let answer = client.token(&TokenBody {
            replica: replica.path,
            valid_seconds: wanted.valid_seconds,
            reconcile: replica.reconcile || wanted.reconcile,
        })?;
        print(&answer.token)?;
    }
    Ok(())
}

/// The replicas that are in no configuration.
fn free(configured: &[ReplicaConfig], enrolled: &[Status]) -> Vec<ReplicaConfig> {
    let taken = |path: &Path| {
        // The service may know it by its canonical path.
        let canonical = path.canonicalize();
        let names = [Some(path), canonical.as_deref().ok()];
        enrolled
            .iter()
            .filter_map(|status| status.destination.as_ref())
            .any(|report| names.contains(&Some(Path::new(&report.path))))
    };
    configured.iter().filter(|replica| !taken(&replica.path)).cloned().collect()
}

fn print(token: &str) -> anyhow::Result<()> {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{token}").and_then(|()| out.flush()).context("cannot write to standard output")
}
