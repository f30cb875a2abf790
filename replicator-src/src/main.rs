//! `replicator-src`: the source's daemon.

mod daemon;

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::Context;
use clap::{CommandFactory, Parser, Subcommand};
use replicator_common::api::{Api, ApiOptions, server};
use replicator_common::config::SourceConfig;
use replicator_common::control::Control;
use replicator_common::daemon::{api_tls, check_config, end, load};
use replicator_common::logging;
use replicator_common::manual::{self, Generate};
use replicator_common::notify::Notifier;
use replicator_common::stop::Stop;
use replicator_common::supervisor::Supervisor;
use replicator_common::sys::quiet;
use replicator_common::telemetry::{self, Page, Side};
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
    /// Serves until SIGTERM or SIGINT; the second one ends it at once.
    ///
    /// Under systemd with Type=notify and FileDescriptorStoreMax= (at least one
    /// for each configuration) a restart loses no event and walks nothing.
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
        /// Prints nothing unless something is wrong with it
        #[arg(long, short)]
        quiet: bool,
    },
    /// Writes shell completions or man pages, for packages
    #[command(hide = true)]
    Generate(Generate),
}

#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

fn main() -> ExitCode {
    let result = match manual::parse::<Arguments>().command {
        Command::Serve { config } => serve(&config),
        Command::CheckConfig { config, quiet } => {
            check_config::<SourceConfig>(&config, quiet).map_err(Into::into)
        }
        Command::Generate(what) => {
            manual::generate(Arguments::command(), &what).map_err(Into::into)
        }
    };
    let error = result.err().map(|error| format!("{error:#}"));
    end("replicator-src", error.as_deref())
}

fn serve(path: &Path) -> anyhow::Result<()> {
    // Before there is another thread.
    quiet::wake_gently();
    // Before anything is opened.
    let (supervisor, trouble) = Supervisor::from_environment();
    let config: SourceConfig = load(path)?;
    logging::init(&config.log, config.log_format)?;
    telemetry::install();
    let stop = Stop::on_signals().context("cannot listen for signals")?;
    // The port first: a second daemon ends here, before it touches any state.
    let bound = server::bind(config.api)?;
    if let Some(error) = trouble {
        warn!(%error, "what the service manager passed is not used (LISTEN_FDS)");
    }
    let supervisor = Arc::new(supervisor);
    let service = SourceService::open_under(daemon::options(&config), supervisor.clone())?;
    let options = ApiOptions {
        watcher: config.watcher,
        devices: config.devices,
        ..ApiOptions::of(&config.api())
    };
    let page = Page::new(&[Side::Source], &config.state_dir);
    let api = Api::new(service.clone(), service.registry(), options).with_metrics(page);
    let server = bound.serve_over(api, api_tls(&config.api(), &config.state_dir)?)?;
    info!(api = %server.address(), state = %config.state_dir.display(), "serving");
    let notifier = Notifier::start(&config.notify, service.clone(), Side::Source)?;
    supervisor.ready();
    let probed = service.clone();
    supervisor.watch(move || drop(probed.list())).context("cannot start the watchdog's thread")?;
    stop.wait();
    info!("stopping");
    supervisor.stopping();
    drop(notifier);
    server.stop();
    service.shutdown();
    info!("stopped");
    Ok(())
}
