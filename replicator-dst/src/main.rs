//! `replicator-dst`: the destination's daemon.

mod daemon;
mod tokens;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Context;
use clap::{Args, Parser, Subcommand};
use replicator_common::api::own::TOKEN_VALID_SECONDS;
use replicator_common::api::{Api, ApiOptions, server};
use replicator_common::config::DestinationConfig;
use replicator_common::daemon::{check_config, end, load};
use replicator_common::logging;
use replicator_common::notify::Notifier;
use replicator_common::stop::Stop;
use replicator_common::supervisor::Supervisor;
use replicator_common::telemetry::{self, Page, Side};
use tracing::info;

use daemon::Daemon;

/// The destination's side of replications: keeps replicas.
///
/// Exit status: 0 done, 1 failed, 2 wrong usage.
#[derive(Debug, Parser)]
#[command(name = "replicator-dst", version)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Serves until SIGTERM or SIGINT; the second one ends it at once. Prints
    /// an enrolment token for each configured replica that has no source yet
    Serve(Config),
    /// Checks a configuration, and prints it with all defaults as JSON
    CheckConfig(Config),
    /// Asks the running daemon for enrolment tokens, and prints them, one a line
    Token(TokenArguments),
}

#[derive(Debug, Args)]
struct Config {
    /// The configuration, TOML
    #[arg(long, value_name = "FILE")]
    config: PathBuf,
}

#[derive(Debug, Args)]
struct TokenArguments {
    #[command(flatten)]
    config: Config,
    /// The directory that becomes the replica; default: every configured one
    /// that has no source yet
    #[arg(long, value_name = "PATH")]
    replica: Option<PathBuf>,
    /// How long a token can be used; default: as the configuration says
    #[arg(
        long,
        alias = "valid-seconds",
        value_name = "SECONDS",
        value_parser = clap::value_parser!(u64).range(*TOKEN_VALID_SECONDS.start()..=*TOKEN_VALID_SECONDS.end())
    )]
    valid: Option<u64>,
    /// Take a directory that is not empty: only differences travel, and what
    /// the source lacks is moved to lost+found
    #[arg(long)]
    reconcile: bool,
}

#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

fn main() -> ExitCode {
    let result = match Arguments::parse().command {
        Command::Serve(Config { config }) => serve(&config),
        Command::CheckConfig(Config { config }) => {
            check_config::<DestinationConfig>(&config).map_err(Into::into)
        }
        Command::Token(arguments) => token(&arguments),
    };
    let error = result.err().map(|error| format!("{error:#}"));
    end("replicator-dst", error.as_deref())
}

fn token(arguments: &TokenArguments) -> anyhow::Result<()> {
    let config: DestinationConfig = load(&arguments.config.config)?;
    let wanted = tokens::Wanted {
        replica: arguments.replica.as_deref(),
        valid_seconds: arguments.valid,
        reconcile: arguments.reconcile,
    };
    tokens::ask(&config, &wanted)
}

fn serve(path: &Path) -> anyhow::Result<()> {
    let (supervisor, _) = Supervisor::from_environment();
    let config: DestinationConfig = load(path)?;
    logging::init(&config.log, config.log_format)?;
    telemetry::install();
    let stop = Stop::on_signals().context("cannot listen for signals")?;
    // The port first: a second daemon ends here, before it touches any state.
    let bound = server::bind(config.api)?;
    let daemon = Daemon::open(&config)?;
    let options = ApiOptions { hosts: config.api_hosts.clone(), ..ApiOptions::default() };
    let page = Page::new(&[Side::Destination], &config.state_dir);
    let api = Api::new(daemon.control(), options).with_tokens(daemon.tokens()).with_metrics(page);
    let server = bound.serve(api)?;
    info!(
        api = %server.address(),
        listen = %config.listen,
        state = %config.state_dir.display(),
        "serving"
    );
    tokens::offer(&config, &*daemon.control(), &*daemon.tokens());
    let notifier = Notifier::start(&config.notify, daemon.control(), Side::Destination)?;
    supervisor.ready();
    stop.wait();
    info!("stopping");
    supervisor.stopping();
    drop(notifier);
    server.stop();
    daemon.shutdown();
    info!("stopped");
    Ok(())
}
