//! Replicator side by side with the programs that people use for the same, in one
//! run on one machine.
//!
//! Each works on a freshly made file system, in a network namespace and a control
//! group of its own. Rounds are interleaved, so that what slows the machine down
//! for a while slows all down.

mod disk;
mod group;
mod http;
mod machine;
mod measure;
mod net;
mod patience;
mod peers;
mod report;
mod site;
mod tables;
mod wan;
mod workloads;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use clap::Parser;

use disk::Kind;
use patience::Patience;
use peers::Peer;
use report::{PeerReport, Results, Run, RunResult, WorkloadReport};
use wan::Tcp;
use workloads::{Bench, Workload};

/// Measures replicator beside its peers. Needs root, and some 20 GiB below
/// $REPLICATOR_TEST_DIR (default /var/tmp/replicator-tests).
#[derive(Debug, Parser)]
struct Arguments {
    /// Small, short and in one round: whether it works, not how fast it is
    #[arg(long)]
    quick: bool,
    /// Rounds of each workload; fewer for a peer that takes minutes for one
    #[arg(long, default_value_t = 5, conflicts_with = "quick")]
    #[arg(value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// Only these workloads; `lag` means each whose name begins with `lag-`
    #[arg(long, value_name = "WORKLOAD,..", value_delimiter = ',')]
    only: Vec<String>,
    /// Only these peers
    #[arg(long, value_name = "PEER,..", value_delimiter = ',')]
    peers: Vec<String>,
    /// What source and replica are on
    #[arg(long, value_enum, default_value_t = Kind::Ext4)]
    file_system: Kind,
    /// How TCP finds its pace over a long path
    #[arg(long, value_enum, default_value_t = Tcp::Cubic)]
    tcp: Tcp,
    /// Directory of RESULTS.md and results.json, in which each workload that was
    /// measured takes its place; without it, tables go to standard output alone
    #[arg(long, value_name = "DIR")]
    output: Option<PathBuf>,
    /// Names workloads and peers, and measures nothing
    #[arg(long)]
    list: bool,
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    let workloads = chosen_workloads(&arguments.only)?;
    let peers = chosen_peers(&arguments.peers)?;
    let bench = Bench { quick: arguments.quick, kind: arguments.file_system, tcp: arguments.tcp };
    if arguments.list {
        list(&bench, &workloads, &peers);
        return Ok(());
    }
    ensure!(rustix::process::geteuid().is_root(), "needs root: it makes and mounts file systems");
    ensure!(
        !cfg!(debug_assertions) || std::env::var_os("REPLICATOR_BIN_DIR").is_some(),
        "not optimised: add --release, or set REPLICATOR_BIN_DIR to where optimised programs are"
    );
    measure(&arguments, bench, workloads, &peers)
}

/// Runs all, and reports after each workload.
fn measure(
    arguments: &Arguments,
    bench: Bench,
    workloads: Vec<Box<dyn Workload>>,
    peers: &[Box<dyn Peer>],
) -> Result<()> {
    site::sweep();
    let rounds = if bench.quick { 1 } else { arguments.rounds };
    let mut results = begin(bench, peers);
    if let Some(directory) = &arguments.output {
        results = results.continued(directory);
    }
    let all = workloads::all();
    let order: Vec<&str> = all.iter().map(|workload| workload.name()).collect();
    for mut workload in workloads {
        let report = run(&bench, &mut *workload, peers, rounds)
            .with_context(|| format!("the workload {}", workload.name()))?;
        results.put(report, &order);
        if let Some(directory) = &arguments.output {
            results.write(directory)?;
        }
    }
    println!("{}", tables::markdown(&results));
    Ok(())
}

fn begin(bench: Bench, peers: &[Box<dyn Peer>]) -> Results {
    let report = |peer: &dyn Peer| PeerReport {
        name: peer.name().to_owned(),
        version: peer.version(),
        settings: peer.settings().to_owned(),
    };
    let maker = Command::new(format!("mkfs.{}", bench.kind.as_str())).arg("-V").output();
    let told = maker.map(|output| [output.stdout, output.stderr].concat()).unwrap_or_default();
    Results {
        machine: machine::describe(),
        file_system: bench.kind,
        tcp: bench.tcp,
        file_system_maker: String::from_utf8_lossy(&told).lines().next().unwrap_or("").to_owned(),
        quick: bench.quick,
        peers: peers.iter().map(|peer| report(&**peer)).collect(),
        workloads: Vec::new(),
    }
}

/// All rounds of one workload.
fn run(
    bench: &Bench,
    workload: &mut dyn Workload,
    peers: &[Box<dyn Peer>],
    rounds: u32,
) -> Result<WorkloadReport> {
    let excludes = |peer: &dyn Peer| {
        let wrong_disk = peer.abilities().only_on.is_some_and(|kind| kind != bench.kind);
        workload.excludes(peer).or(wrong_disk.then_some("needs another file system"))
    };
    let (out, taking): (Vec<&Box<dyn Peer>>, Vec<_>) =
        peers.iter().partition(|peer| excludes(&***peer).is_some());
    let reason = |peer: &dyn Peer| Some((peer.name().to_owned(), excludes(peer)?.to_owned()));
    let excluded = out.iter().filter_map(|peer| reason(&***peer)).collect();
    let state = machine::state();
    eprintln!("{}: {}", workload.name(), workload.title(bench));
    workload.prepare(bench)?;
    let (mut runs, mut patience) = (Vec::new(), Patience::new(workload.patience()));
    for round in 1..=rounds {
        // Another begins each round: what comes first on a machine that was idle,
        // or second on one that still writes, has it easier or harder.
        let turns = taking.iter().cycle().skip(round as usize - 1).take(taking.len());
        for peer in turns.filter(|peer| patience.allows(peer.name())).collect::<Vec<_>>() {
            let start = Instant::now();
            runs.push(run_once(bench, workload, &***peer, round));
            patience.took(peer.name(), start.elapsed());
        }
    }
    Ok(WorkloadReport {
        name: workload.name().to_owned(),
        title: workload.title(bench),
        about: workload.about().to_owned(),
        state,
        rounds,
        excluded,
        runs,
    })
}

/// One run; an error of one peer does not end the others' runs.
fn run_once(bench: &Bench, workload: &dyn Workload, peer: &dyn Peer, round: u32) -> Run {
    let start = Instant::now();
    let result = if peer.version().is_none() {
        RunResult::NotInstalled
    } else {
        // What the tests' crate makes of errors are panics.
        match catch_unwind(AssertUnwindSafe(|| workload.run(bench, peer, round == 1))) {
            Ok(Ok(outcome)) => RunResult::Measured(outcome),
            Ok(Err(error)) => RunResult::Failed(format!("{error:#}")),
            Err(_) => RunResult::Failed("panicked, see standard error".to_owned()),
        }
    };
    let told = match &result {
        RunResult::Measured(_) => "measured".to_owned(),
        RunResult::NotInstalled => "not installed".to_owned(),
        RunResult::Failed(error) => format!("failed: {error}"),
    };
    let seconds = start.elapsed().as_secs_f64();
    eprintln!("  round {round}, {}: {told} ({seconds:.1} s with its preparation)", peer.name());
    Run { peer: peer.name().to_owned(), round, result }
}

fn chosen_workloads(only: &[String]) -> Result<Vec<Box<dyn Workload>>> {
    let all = workloads::all();
    let is_meant = |only: &str, name: &str| {
        name == only || name.strip_prefix(only).is_some_and(|rest| rest.starts_with('-'))
    };
    for wanted in only {
        let known = all.iter().any(|workload| is_meant(wanted, workload.name()));
        ensure!(known, "no workload is called {wanted}; --list names them");
    }
    let wanted = |workload: &dyn Workload| {
        let (name, optional) = (workload.name(), workload.is_optional());
        (only.is_empty() && !optional)
            || only.iter().any(|only| only == name || (!optional && is_meant(only, name)))
    };
    Ok(all.into_iter().filter(|workload| wanted(&**workload)).collect())
}

fn chosen_peers(only: &[String]) -> Result<Vec<Box<dyn Peer>>> {
    let all = peers::all();
    for wanted in only {
        let known = all.iter().any(|peer| peer.name() == wanted);
        ensure!(known, "no peer is called {wanted}; --list names them");
    }
    let wanted = |name: &str| only.is_empty() || only.iter().any(|only| only == name);
    Ok(all.into_iter().filter(|peer| wanted(peer.name())).collect())
}

fn list(bench: &Bench, workloads: &[Box<dyn Workload>], peers: &[Box<dyn Peer>]) {
    println!("Workloads:");
    for workload in workloads {
        println!("  {:16} {}", workload.name(), workload.title(bench));
    }
    println!("Peers:");
    for peer in peers {
        let version = peer.version().unwrap_or_else(|| "not installed".to_owned());
        println!("  {:16} {version}", peer.name());
    }
}
