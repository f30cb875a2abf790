//! Tables and raw figures.

use std::fmt::Write;
use std::fs;
use std::path::Path;

use anyhow::Result;
use serde::Serialize;

use crate::lag::Lag;
use crate::machine::Machine;
use crate::peer::Peer;
use crate::sync::Sync;

/// Everything that was measured.
#[derive(Debug, Serialize)]
pub struct Results {
    machine: Machine,
    rounds: u32,
    quick: bool,
    /// In the order in which they ran.
    pub syncs: Vec<Sync>,
    /// In the order in which they ran.
    pub lags: Vec<Lag>,
}

impl Results {
    /// Nothing measured yet.
    pub fn new(machine: Machine, rounds: u32, quick: bool) -> Self {
        Self { machine, rounds, quick, syncs: Vec::new(), lags: Vec::new() }
    }

    /// Writes RESULTS.md and results.json.
    pub fn write(&self, directory: &Path, table: &str) -> Result<()> {
        fs::write(directory.join("RESULTS.md"), table)?;
        let raw = serde_json::to_string_pretty(self)?;
        Ok(fs::write(directory.join("results.json"), raw + "\n")?)
    }

    /// The tables, with what they were measured on.
    pub fn to_markdown(&self) -> String {
        let mut text = String::from("# Results\n\n");
        let _ = self.write_machine(&mut text);
        let mut names: Vec<&str> = self.syncs.iter().map(|sync| &*sync.measurement).collect();
        names.dedup();
        for name in names {
            let _ = self.write_sync_table(&mut text, name);
        }
        if !self.lags.is_empty() {
            let _ = self.write_lag_table(&mut text);
        }
        text
    }

    fn write_machine(&self, text: &mut String) -> std::fmt::Result {
        let Machine { processor, cores, memory, kernel, versions } = &self.machine;
        writeln!(text, "Written by `bench`; raw figures in `results.json`.\n")?;
        if self.quick {
            writeln!(text, "**A quick run: it shows that all works, not how fast it is.**\n")?;
        }
        let gib = *memory as f64 / f64::from(1 << 30);
        writeln!(text, "- {processor}, {cores} cores, {gib:.0} GiB; Linux {kernel}")?;
        for version in versions {
            writeln!(text, "- {version}")?;
        }
        writeln!(
            text,
            "- Source and replica: ext4 on loop devices over files of one disk, the replica freshly \
             made for each run; both ends on this machine. Caches dropped before each run. {} \
             interleaved rounds: median (least to most).\n\
             - \"On disk\" adds a `syncfs` to the programs that end without one; replicator ends only \
             when all is durable. Memory is the largest process's peak.\n",
            self.rounds
        )
    }

    fn write_sync_table(&self, text: &mut String, name: &str) -> std::fmt::Result {
        writeln!(text, "## {}{}\n", name[..1].to_uppercase(), &name[1..])?;
        writeln!(text, "| program | ended after, s | on disk after, s | CPU, s | memory, MiB |")?;
        writeln!(text, "|---|---|---|---|---|")?;
        for peer in Peer::ALL {
            let runs = || self.syncs.iter().filter(|s| s.measurement == name && s.peer == peer);
            let cells = [
                spread(runs().map(|run| run.seconds), 2),
                spread(runs().map(|run| run.durable_seconds), 2),
                spread(runs().map(|run| run.usage.cpu_seconds), 2),
                spread(runs().map(|run| mib(run.usage.peak_memory)), 0),
            ];
            writeln!(text, "| {} | {} |", peer.name(), cells.join(" | "))?;
        }
        writeln!(text)
    }

    fn write_lag_table(&self, text: &mut String) -> std::fmt::Result {
        let changes = self.lags.first().map_or(0, |lag| lag.changes);
        writeln!(text, "## Lag, {changes} changes of 4 KiB at 500 a second\n")?;
        writeln!(
            text,
            "From the close on the source to the right content being visible on the replica. rsync \
             runs in a loop without a pause.\n"
        )?;
        writeln!(text, "| program | p50, ms | p99, ms | most, ms | CPU, s | memory, MiB | lost |")?;
        writeln!(text, "|---|---|---|---|---|---|---|")?;
        for peer in [Peer::Replicator, Peer::Rsync] {
            let runs = || self.lags.iter().filter(|lag| lag.peer == peer);
            let cells = [
                spread(runs().map(|run| run.percentile(0.5) * 1e3), 0),
                spread(runs().map(|run| run.percentile(0.99) * 1e3), 0),
                spread(runs().map(|run| run.percentile(1.0) * 1e3), 0),
                spread(runs().map(|run| run.usage.cpu_seconds), 2),
                spread(runs().map(|run| mib(run.usage.peak_memory)), 0),
                runs().map(|run| run.lost).sum::<u64>().to_string(),
            ];
            writeln!(text, "| {} | {} |", peer.name(), cells.join(" | "))?;
        }
        Ok(())
    }
}

fn mib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}

/// Median and, of several figures, the least and the most.
fn spread(figures: impl Iterator<Item = f64>, digits: usize) -> String {
    let mut figures: Vec<f64> = figures.collect();
    figures.sort_by(f64::total_cmp);
    match figures[..] {
        [] => "–".to_owned(),
        [only] => format!("{only:.digits$}"),
        [least, .., most] => {
            let middle = figures.len() / 2;
            let median = if figures.len() % 2 == 1 {
                figures[middle]
            } else {
                (figures[middle - 1] + figures[middle]) / 2.0
            };
            format!("{median:.digits$} ({least:.digits$} to {most:.digits$})")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::spread;

    #[test]
    fn spreads() {
        assert_eq!(spread([].into_iter(), 1), "–");
        assert_eq!(spread([2.0].into_iter(), 1), "2.0");
        assert_eq!(spread([3.0, 1.0, 2.0].into_iter(), 1), "2.0 (1.0 to 3.0)");
        assert_eq!(spread([4.0, 1.0, 2.0, 3.0].into_iter(), 1), "2.5 (1.0 to 4.0)");
    }
}
