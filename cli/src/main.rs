//! `replicator`: continuous replication from the command line.
//!
//! `run` does it all in one process; the other commands ask running daemons
//! over their HTTP API. Answers go to standard output (JSON, but for `status`
//! without `--json`), all else goes to standard error. Exit status: 0 done,
//! 1 failed, 2 wrong usage (or, of `verify`, something differed), 3 timed out.

mod arguments;
mod commands;
mod exit;
mod run;
mod status;
mod words;

use std::process::ExitCode;

use clap::CommandFactory;
use replicator_common::manual;

use arguments::{Arguments, Command};

#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

fn main() -> ExitCode {
    let Arguments { endpoint, json, command } = manual::parse();
    let endpoint = &endpoint;
    let result = match command {
        Command::Run(arguments) => run::run(&arguments),
        Command::CreateReplicationConfiguration(arguments) => {
            commands::create::run(endpoint, &arguments)
        }
        Command::DescribeReplicationConfigurations(arguments) => {
            commands::describe::run(endpoint, &arguments)
        }
        Command::DeleteReplicationConfiguration(arguments) => {
            commands::delete::run(endpoint, &arguments)
        }
        Command::Failover(arguments) => commands::failover::run(endpoint, &arguments),
        Command::Status(arguments) => status::run(endpoint, &arguments, json),
        Command::Wait(arguments) => commands::wait::run(endpoint, &arguments),
        Command::Verify(arguments) => commands::verify::run(endpoint, &arguments),
        Command::Pause(target) => commands::pause::pause(endpoint, &target),
        Command::Resume(arguments) => commands::pause::resume(endpoint, &arguments),
        Command::Generate(what) => {
            manual::generate(Arguments::command(), &what).map_err(Into::into)
        }
    };
    exit::report(result, json)
}
