//! `replicator-dst`: the destination's daemon.

mod daemon;
mod tokens;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Context;
use clap::{Args, CommandFactory, Parser, Subcommand};
use replicator_common::api::own::TOKEN_VALID_SECONDS;
use replicator_common::api::{Api, ApiOptions, server};
use replicator_common::config::DestinationConfig;
use replicator_common::daemon::{api_tls, check_config, end, load};
use replicator_common::logging;
use replicator_common::manual::{self, Generate};
use replicator_common::notify::Notifier;
use replicator_common::stop::Stop;
use replicator_common::supervisor::Supervisor;
use replicator_common::sys::quiet;
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
    CheckConfig {
        #[command(flatten)]
        config: Config,
        /// Prints nothing unless something is wrong with it
        #[arg(long, short)]
        quiet: bool,
    },
    /// Makes every replica read-only, as `serve` does first of all, and ends.
    ///
    /// For the time between boot and `serve`: the read-only mounts do not outlive
    /// a reboot. May be run any number of times; does nothing to what is
    /// protected, and nothing while `serve` runs on the same state directory.
    /// Fails when a replica is not there (its file system is not mounted) or
    /// cannot be protected, after it has protected the others.
    Protect(Config),
    /// Asks the running daemon for enrolment tokens, and prints them, one a line
    Token(TokenArguments),
    /// Writes shell completions or man pages, for packages
    #[command(hide = true)]
    Generate(Generate),
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
    let result = match manual::parse::<Arguments>().command {
        Command::Serve(Config { config }) => serve(&config),
        Command::CheckConfig { config, quiet } => {
            check_config::<DestinationConfig>(&config.config, quiet).map_err(Into::into)
        }
        Command::Protect(Config { config }) => protect(&config),
        Command::Token(arguments) => token(&arguments),
        Command::Generate(what) => {
            manual::generate(Arguments::command(), &what).map_err(Into::into)
        }
    };
    let error = result.err().map(|error| format!("{error:#}"));
    end("replicator-dst", error.as_deref())
}

/// Says in a line each what became of the replicas.
fn protect(path: &Path) -> anyhow::Result<()> {
    let config: DestinationConfig = load(path)?;
    let Some(all) = replicator_dst::protect::run(&config.state_dir)? else {
        println!("{}: in use by a daemon, which protects", config.state_dir.display());
        return Ok(());
    };
    let mut failed = 0;
    for (replica, outcome) in &all {
        match outcome {
            Ok(()) => println!("{}: read-only", replica.display()),
            Err(error) => {
                eprintln!("replicator-dst: {error}");
                failed += 1;
            }
        }
    }
    anyhow::ensure!(failed == 0, "{failed} of {} replicas are not protected", all.len());
    Ok(())
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
    // Before there is another thread.
    quiet::wake_gently();
    let (supervisor, _) = Supervisor::from_environment();
    let config: DestinationConfig = load(path)?;
    logging::init(&config.log, config.log_format)?;
    telemetry::install();
    let stop = Stop::on_signals().context("cannot listen for signals")?;
    // The port first: a second daemon ends here, before it touches any state.
    let bound = server::bind(config.api)?;
    let daemon = Daemon::open(&config)?;
    let options = ApiOptions::of(&config.api());
    let page = Page::new(&[Side::Destination], &config.state_dir);
    let api = Api::new(daemon.control(), daemon.registry(), options)
        .with_tokens(daemon.tokens())
        .with_metrics(page);
    let server = bound.serve_over(api, api_tls(&config.api(), &config.state_dir)?)?;
    info!(
        api = %server.address(),
        listen = %config.listen,
        state = %config.state_dir.display(),
        "serving"
    );
    tokens::offer(&config, &*daemon.control(), &*daemon.tokens());
    let notifier = Notifier::start(&config.notify, daemon.control(), Side::Destination)?;
    supervisor.ready();
    let probed = daemon.control();
    supervisor.watch(move || drop(probed.list())).context("cannot start the watchdog's thread")?;
    stop.wait();
    info!("stopping");
    supervisor.stopping();
    drop(notifier);
    server.stop();
    daemon.shutdown();
    info!("stopped");
    Ok(())
}
