//! Raw figures: everything that was measured, and on what. A run of some workloads
//! replaces theirs, and leaves the others' as they were.

use std::collections::HashMap;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use crate::disk::Kind;
use crate::machine::{Machine, State};
use crate::tables;
use crate::wan::Tcp;
use crate::workloads::Outcome;

/// A peer as it was measured.
#[derive(Debug, Serialize, Deserialize)]
pub struct PeerReport {
    /// As the tables call it.
    pub name: String,
    /// In its own words; `None` when it is not installed.
    pub version: Option<String>,
    /// How it was run.
    pub settings: String,
}

/// A workload as it was measured.
#[derive(Debug, Serialize, Deserialize)]
pub struct WorkloadReport {
    /// As `--only` calls it.
    pub name: String,
    /// What it is, with its size.
    pub title: String,
    /// How it is measured.
    pub about: String,
    /// What was measured, and beside what else.
    pub state: State,
    /// Rounds of each peer, unless it took long.
    pub rounds: u32,
    /// Peers that had no part in it, with the reason.
    pub excluded: Vec<(String, String)>,
    /// In the order in which they ran.
    pub runs: Vec<Run>,
}

/// One run of one peer.
#[derive(Debug, Serialize, Deserialize)]
pub struct Run {
    /// Which.
    pub peer: String,
    /// From 1.
    pub round: u32,
    /// What it gave.
    pub result: RunResult,
}

/// What a run gave.
#[derive(Debug, Serialize, Deserialize)]
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
#[derive(Debug, Serialize, Deserialize)]
pub struct Results {
    /// Where.
    pub machine: Machine,
    /// Of source and replica.
    pub file_system: Kind,
    /// How TCP found its pace over a long path.
    pub tcp: Tcp,
    /// Version of the program that made it, in its own words.
    pub file_system_maker: String,
    /// Small sizes: whether it works, not how fast it is.
    pub quick: bool,
    /// Who took part.
    pub peers: Vec<PeerReport>,
    /// In the order in which they are listed.
    pub workloads: Vec<WorkloadReport>,
}

impl Results {
    /// What a directory has of runs before this one on the same machine, with the
    /// same settings; of others, nothing can be set beside what is measured now, nor
    /// of a peer that has become another.
    pub fn continued(self, directory: &Path) -> Self {
        let text = fs::read_to_string(directory.join("results.json")).unwrap_or_default();
        match serde_json::from_str::<Self>(&text) {
            Ok(mut before) if before.is_comparable(&self) => {
                let told = |peer: &PeerReport| (peer.version.clone(), peer.settings.clone());
                let old: HashMap<_, _> =
                    before.peers.iter().map(|peer| (peer.name.clone(), told(peer))).collect();
                let changed = |name: &str| {
                    let now = self.peers.iter().find(|peer| peer.name == name).map(told);
                    now.is_some_and(|now| old.get(name) != Some(&now))
                };
                for workload in &mut before.workloads {
                    workload.runs.retain(|run| !changed(&run.peer));
                }
                let is_now = |name: &str| self.peers.iter().any(|peer| peer.name == name);
                let others = before.peers.into_iter().filter(|peer| !is_now(&peer.name));
                let others: Vec<_> = others.collect();
                let peers = self.peers.into_iter().chain(others).collect();
                Self { peers, workloads: before.workloads, ..self }
            }
            _ => self,
        }
    }

    fn is_comparable(&self, other: &Self) -> bool {
        let settings = |all: &Self| (all.file_system, all.tcp, all.quick);
        self.machine == other.machine
            && settings(self) == settings(other)
            && self.file_system_maker == other.file_system_maker
    }

    /// Puts a workload in its place among those of the list `order`.
    pub fn put(&mut self, report: WorkloadReport, order: &[&str]) {
        self.workloads.retain(|other| other.name != report.name);
        self.workloads.push(report);
        self.workloads.sort_by_key(|one| order.iter().position(|name| *name == one.name));
    }

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

#[cfg(test)]
mod tests {
    use super::*;

    fn workload(name: &str, rounds: u32) -> WorkloadReport {
        let state = State { commit: "unknown".to_owned(), load: "0".to_owned() };
        let figure = crate::workloads::Figure::new("time, s", f64::NAN, 2);
        let outcome = Outcome { figures: vec![figure], note: None };
        let run = Run { peer: "peer".to_owned(), round: 1, result: RunResult::Measured(outcome) };
        let (title, about) = (String::new(), String::new());
        let (name, excluded, runs) = (name.to_owned(), Vec::new(), vec![run]);
        WorkloadReport { name, title, about, state, rounds, excluded, runs }
    }

    fn results(kind: Kind) -> Results {
        Results {
            machine: crate::machine::describe(),
            file_system: kind,
            tcp: Tcp::Cubic,
            file_system_maker: String::new(),
            quick: false,
            peers: Vec::new(),
            workloads: Vec::new(),
        }
    }

    #[test]
    fn what_was_measured_before_stays_where_it_can_be_compared() {
        let directory = tempfile::tempdir().unwrap();
        let mut first = results(Kind::Ext4);
        first.put(workload("b", 1), &["a", "b", "c"]);
        first.put(workload("c", 1), &["a", "b", "c"]);
        first.write(directory.path()).unwrap();
        let mut second = results(Kind::Ext4).continued(directory.path());
        second.put(workload("a", 2), &["a", "b", "c"]);
        second.put(workload("b", 2), &["a", "b", "c"]);
        let told: Vec<_> = second.workloads.iter().map(|w| (&*w.name, w.rounds)).collect();
        assert_eq!(told, [("a", 2), ("b", 2), ("c", 1)]);
        assert_eq!(results(Kind::Xfs).continued(directory.path()).workloads.len(), 0);
        assert_eq!(results(Kind::Ext4).continued(Path::new("/nowhere")).workloads.len(), 0);
    }
}
