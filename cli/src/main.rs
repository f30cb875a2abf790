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
    let arguments: Arguments = manual::parse();
    exit::speak_json(arguments.json);
    exit::report(perform(arguments))
}

fn perform(arguments: Arguments) -> anyhow::Result<()> {
    let Arguments { asking, json, command } = arguments;
    let access = || asking.access();
    match command {
        // Asks nobody.
        Command::Run(arguments) => run::run(&arguments),
        Command::CreateReplicationConfiguration(arguments) => {
            commands::create::run(&access()?, &arguments)
        }
        Command::DescribeReplicationConfigurations(arguments) => {
            commands::describe::run(&access()?, &arguments)
        }
        Command::DeleteReplicationConfiguration(arguments) => {
            commands::delete::run(&access()?, &arguments)
        }
        Command::CreateFileSystem(arguments) => {
            commands::file_systems::create(&access()?, &arguments)
        }
        Command::DescribeFileSystems => commands::file_systems::describe(&access()?),
        Command::DeleteFileSystem(arguments) => {
            commands::file_systems::delete(&access()?, &arguments)
        }
        Command::UpdateFileSystemProtection(arguments) => {
            commands::file_systems::protect(&access()?, &arguments)
        }
        Command::Failover(arguments) => commands::failover::run(access, &arguments),
        Command::Status(arguments) => status::run(&access()?, &arguments, json),
        Command::Wait(arguments) => commands::wait::run(&access()?, &arguments),
        Command::Verify(arguments) => commands::verify::run(&access()?, &arguments),
        Command::Pause(target) => commands::pause::pause(&access()?, &target),
        Command::Resume(arguments) => commands::pause::resume(&access()?, &arguments),
        Command::Generate(what) => {
            manual::generate(Arguments::command(), &what).map_err(Into::into)
        }
    }
}
