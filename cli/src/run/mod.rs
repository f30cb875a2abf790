//! `run`: source and destination in one process, joined over QUIC on loopback
//! just as between two hosts.

mod both;
mod display;
mod follow;
mod once;
mod pair;
pub mod services;
mod state;

use std::sync::Arc;

use anyhow::Context;
use replicator_common::api::{Api, ApiOptions, server};
use replicator_common::config::LogFormat;
use replicator_common::control::{Control, CreateRequest, DeletionMode};
use replicator_common::id::{BatchId, FileSystemId};
use replicator_common::logging;
use replicator_common::status::DestinationReport;
use replicator_common::stop::Stop;
use replicator_common::sys::quiet;
use replicator_common::telemetry::{self, Page, Side};
use replicator_src::engine::halt::HaltRule;

use crate::arguments::Run;
use crate::exit::{Usage, speaks_json};
use both::Both;
use display::Display;
use pair::Pair;
use services::Services;
use state::StateDirectory;

pub fn run(arguments: &Run) -> anyhow::Result<()> {
    if !arguments.api.ip().is_loopback() {
        return Err(Usage(format!(
            "--api {} can be reached from other hosts, and the API asks for no password: use a loopback address",
            arguments.api
        ))
        .into());
    }
    // Before there is another thread.
    quiet::wake_gently();
    let stop = Stop::on_signals().context("cannot listen for signals")?;
    let display = Display::new();
    logging::init_to(
        "warn",
        if speaks_json() { LogFormat::Json } else { LogFormat::Text },
        display.log_writer(),
    )?;
    telemetry::install();

    // Everything that can be refused is looked at before anything is made.
    let pair = Pair::check(&arguments.source, &arguments.replica)?;
    let directory = match &arguments.state_dir {
        Some(directory) => std::path::absolute(directory)?,
        None => state::default_directory(&pair)?,
    };
    pair.check_outside(&directory)?;
    let state = StateDirectory::open(&directory, &pair)?;
    let bound = server::bind(arguments.api)?;
    pair.make_replica()?;

    let services = Services::open(&state, halt_rule(arguments))?;
    let page = Page::new(&[Side::Source, Side::Destination], state.path());
    let outcome = replicate(arguments, &pair, &services, (bound, page), &display, &stop);
    display.note("stopping");
    services.shutdown();
    display.clear();
    drop(state);
    outcome
}

fn halt_rule(arguments: &Run) -> HaltRule {
    HaltRule {
        percent: arguments.halt_deletions_percent,
        min: arguments.halt_deletions_min,
        ..HaltRule::default()
    }
}

fn replicate(
    arguments: &Run,
    pair: &Pair,
    services: &Services,
    (bound, page): (server::Bound, Page),
    display: &Display,
    stop: &Stop,
) -> anyhow::Result<()> {
    let control: Arc<dyn Control> = Arc::new(Both::new(services.source(), services.destination()));
    let options = ApiOptions {
        watcher: arguments.watcher.into(),
        devices: arguments.devices,
        ..ApiOptions::default()
    };
    let api = Api::new(control.clone(), services.registry(), options)
        .with_tokens(services.tokens())
        .with_metrics(page);
    let server = bound.serve(api)?;
    let id = configure(arguments, pair, services, &*control, display)?;
    display.line(&format!(
        "replicating {} to {}, console and API at http://{}/",
        pair.source().display(),
        pair.replica().display(),
        server.address()
    ));
    let result = if arguments.once {
        once::run(&control, &id, display, stop)
    } else {
        follow::run(&*control, &id, pair, display, stop)
    };
    server.stop();
    result
}

/// The pair's configuration: as it was left, or a new one.
fn configure(
    arguments: &Run,
    pair: &Pair,
    services: &Services,
    control: &dyn Control,
    display: &Display,
) -> anyhow::Result<FileSystemId> {
    let at_destination: Vec<FileSystemId> =
        services.destination().list().into_iter().map(|one| one.source_file_system_id).collect();
    let mut others = Vec::new();
    for status in services.source().list() {
        let id = status.source_file_system_id;
        let path = status.source.map(|report| report.path);
        if path.is_none_or(|path| path != pair.source().display().to_string()) {
            // Made through the API.
            others.push(id);
            continue;
        }
        if at_destination.contains(&id) {
            return Ok(id);
        }
        // Failed over without the source. Nothing is lost with its half: what
        // the replica holds now decides whether it may be one again.
        services.source().delete(&id, DeletionMode::LocalConfigurationOnly)?;
        display.line(&format!("{} was failed over: a new replication begins", replica(pair)));
    }
    for status in services.destination().list() {
        let id = &status.source_file_system_id;
        if others.contains(id) {
            continue;
        }
        let begun = |destination: &DestinationReport| {
            destination.durable > BatchId(0) || destination.objects > 0
        };
        if !status.destination.as_ref().is_none_or(begun) {
            // The process before died between the making of the two halves.
            services.destination().delete(id, DeletionMode::LocalConfigurationOnly)?;
            continue;
        }
        anyhow::bail!(
            "{} is the replica of {id}, but the source's side of that replication is gone: fail it over (`replicator failover --state-dir DIR`), then run again with --reconcile",
            replica(pair)
        );
    }
    let token = services.issue_token(pair.replica(), arguments.reconcile)?;
    let status = control.create(&CreateRequest {
        source: pair.source().to_owned(),
        token,
        devices: arguments.devices,
        watcher: arguments.watcher.into(),
    })?;
    Ok(status.source_file_system_id)
}

fn replica(pair: &Pair) -> std::path::Display<'_> {
    pair.replica().display()
}
