//! `replicator-src`: the source's daemon.

mod daemon;

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Context;
use clap::{Parser, Subcommand};
use replicator_common::api::{Api, ApiOptions, server};
use replicator_common::config::{self, SourceConfig};
use replicator_common::logging;
use replicator_common::stop::Stop;
use replicator_src::service::SourceService;
use tracing::{info, warn};

/// The source's side of replications: watches directories, and ships what
/// changes in them.
///
/// Exit status: 0 done, 1 failed, 2 wrong usage.
#[derive(Debug, Parser)]
#[command(name = "replicator-src", version)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Serves until SIGTERM or SIGINT; the second one ends it at once
    Serve {
        /// The configuration, TOML
        #[arg(long, value_name = "FILE")]
        config: PathBuf,
    },
    /// Checks a configuration, and prints it with all defaults as JSON
    CheckConfig {
        /// The configuration, TOML
        #[arg(long, value_name = "FILE")]
        config: PathBuf,
    },
}

fn main() -> ExitCode {
    let result = match Arguments::parse().command {
        Command::Serve { config } => serve(&config),
        Command::CheckConfig { config } => check_config(&config),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // When nobody reads it, the status still says so.
            let _ = writeln!(std::io::stderr(), "replicator-src: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn load(path: &Path) -> anyhow::Result<SourceConfig> {
    let config: SourceConfig = config::load(path)?;
    logging::check(&config.log).with_context(|| path.display().to_string())?;
    Ok(config)
}

fn check_config(path: &Path) -> anyhow::Result<()> {
    let text = serde_json::to_string_pretty(&load(path)?)?;
    writeln!(std::io::stdout(), "{text}").context("cannot write to standard output")
}

fn serve(path: &Path) -> anyhow::Result<()> {
    let config = load(path)?;
    logging::init(&config.log, config.log_format)?;
    let stop = Stop::on_signals().context("cannot listen for signals")?;
    // The port first: a second daemon ends here, before it touches any state.
    let bound = server::bind(config.api)?;
    if !config.api.ip().is_loopback() {
        warn!(api = %config.api, "other hosts may reach the API, which asks for no password");
    }
    let service = SourceService::open(daemon::options(&config))?;
    let options = ApiOptions {
        hosts: config.api_hosts.clone(),
        watcher: config.watcher,
        devices: config.devices,
    };
    let server = bound.serve(Api::new(service.clone(), options))?;
    info!(api = %server.address(), state = %config.state_dir.display(), "serving");
    stop.wait();
    info!("stopping");
    server.stop();
    service.shutdown();
    info!("stopped");
    Ok(())
}
