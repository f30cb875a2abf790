//! Replicator side by side with `rsync -a` and `cp -a`, in one run on one
//! machine: the initial sync of many small and of few large files, and the lag
//! under steady change.
//!
//! Each program works on a freshly made ext4 (after mass deletion ext4's inode
//! allocator costs a millisecond a file), with cold caches, and rounds are
//! interleaved, so that what slows the machine down for a while slows all down.

mod lag;
mod machine;
mod measure;
mod peer;
mod report;
mod sync;

use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use clap::Parser;

use peer::Peer;
use report::Results;

/// Measures replicator beside rsync and cp. Needs root, and some 20 GiB below
/// $REPLICATOR_TEST_DIR (default /var/tmp/replicator-tests).
#[derive(Debug, Parser)]
struct Arguments {
    /// Small and short: whether it works, not how fast it is
    #[arg(long)]
    quick: bool,
    /// Rounds of each measurement
    #[arg(long, default_value_t = 3)]
    rounds: u32,
    /// Directory for RESULTS.md and results.json; without it, the table goes
    /// to standard output alone
    #[arg(long, value_name = "DIR")]
    output: Option<PathBuf>,
    /// Only measurements whose name contains this: small, large, lag
    #[arg(long, value_name = "NAME", default_value = "")]
    only: String,
}

/// How much is measured.
#[derive(Clone, Copy, Debug)]
struct Scale {
    small_files: u64,
    large_files: u64,
    large_bytes: u64,
    /// Files that are there already when the lag is measured.
    standing_files: u64,
    changes_per_second: f64,
    lag_seconds: u64,
}

const FULL: Scale = Scale {
    small_files: 100_000,
    large_files: 4,
    large_bytes: 1 << 30,
    standing_files: 20_000,
    changes_per_second: 500.0,
    lag_seconds: 30,
};

const QUICK: Scale = Scale {
    small_files: 5_000,
    large_files: 2,
    large_bytes: 64 << 20,
    standing_files: 1_000,
    changes_per_second: 500.0,
    lag_seconds: 5,
};

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    ensure!(rustix::process::geteuid().is_root(), "needs root: it makes and mounts file systems");
    ensure!(arguments.rounds > 0, "needs a round at least");
    let scale = if arguments.quick { QUICK } else { FULL };
    let rounds = if arguments.quick { 1 } else { arguments.rounds };
    let mut results = Results::new(machine::describe(), rounds, arguments.quick);

    let wanted = |name: &str| name.contains(&arguments.only);
    if wanted("small") {
        let name = format!("initial sync, {} files of 4 KiB", scale.small_files);
        let source = sync::Source::small_files(scale.small_files)?;
        measure_syncs(&mut results, &name, &source, rounds)?;
    }
    if wanted("large") {
        let mib = scale.large_bytes >> 20;
        let name =
            format!("initial sync, {} files of {mib} MiB, incompressible", scale.large_files);
        let source = sync::Source::large_files(scale.large_files, scale.large_bytes)?;
        measure_syncs(&mut results, &name, &source, rounds)?;
    }
    if wanted("lag") {
        for round in 1..=rounds {
            for peer in [Peer::Replicator, Peer::Rsync] {
                eprintln!("lag, round {round}: {}", peer.name());
                results.lags.push(lag::measure(peer, scale).context("lag")?);
            }
        }
    }
    let table = results.to_markdown();
    println!("{table}");
    if let Some(directory) = arguments.output {
        results.write(&directory, &table)?;
    }
    Ok(())
}

fn measure_syncs(
    results: &mut Results,
    name: &str,
    source: &sync::Source,
    rounds: u32,
) -> Result<()> {
    for round in 1..=rounds {
        // Another begins each round: what comes first on a machine that was
        // idle, or second on one that still writes, has it easier or harder.
        let turns = Peer::ALL.into_iter().cycle().skip(round as usize - 1).take(Peer::ALL.len());
        for peer in turns {
            eprintln!("{name}, round {round}: {}", peer.name());
            // Once is enough to know that each did the whole job.
            let run = sync::measure(name, peer, source, round == 1).context(name.to_owned())?;
            results.syncs.push(run);
        }
    }
    Ok(())
}
