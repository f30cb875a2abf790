//! Raw figures: everything that was measured, and on what.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use serde::Serialize;

use crate::disk::Kind;
use crate::machine::Machine;
use crate::tables;
use crate::wan::Tcp;
use crate::workloads::Outcome;

/// A peer as it was measured.
#[derive(Debug, Serialize)]
pub struct PeerReport {
    /// As the tables call it.
    pub name: &'static str,
    /// In its own words; `None` when it is not installed.
    pub version: Option<String>,
    /// How it was run.
    pub settings: &'static str,
}

/// A workload as it was measured.
#[derive(Debug, Serialize)]
pub struct WorkloadReport {
    /// As `--only` calls it.
    pub name: &'static str,
    /// What it is, with its size.
    pub title: String,
    /// How it is measured.
    pub about: &'static str,
    /// Peers that had no part in it, with the reason.
    pub excluded: Vec<(&'static str, &'static str)>,
    /// In the order in which they ran.
    pub runs: Vec<Run>,
}

/// One run of one peer.
#[derive(Debug, Serialize)]
pub struct Run {
    /// Which.
    pub peer: &'static str,
    /// From 1.
    pub round: u32,
    /// What it gave.
    pub result: RunResult,
}

/// What a run gave.
#[derive(Debug, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum RunResult {
    /// Figures.
    Measured(Outcome),
    /// Nothing: the program is not there.
    NotInstalled,
    /// Nothing but this error.
    Failed(String),
}

/// Everything.
#[derive(Debug, Serialize)]
pub struct Results {
    /// Where.
    pub machine: Machine,
    /// Of source and replica.
    pub file_system: Kind,
    /// How TCP found its pace over a long path.
    pub tcp: Tcp,
    /// Version of the program that made it, in its own words.
    pub file_system_maker: String,
    /// Rounds of each workload.
    pub rounds: u32,
    /// Small sizes: whether it works, not how fast it is.
    pub quick: bool,
    /// Who took part.
    pub peers: Vec<PeerReport>,
    /// In the order in which they ran.
    pub workloads: Vec<WorkloadReport>,
}

impl Results {
    /// Writes RESULTS.md and results.json.
    pub fn write(&self, directory: &Path) -> Result<()> {
        fs::create_dir_all(directory).with_context(|| directory.display().to_string())?;
        let raw = serde_json::to_string_pretty(self)? + "\n";
        for (name, text) in [("RESULTS.md", tables::markdown(self)), ("results.json", raw)] {
            let path = directory.join(name);
            fs::write(&path, text).with_context(|| path.display().to_string())?;
        }
        Ok(())
    }
}
