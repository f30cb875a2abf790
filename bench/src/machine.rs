//! What was measured on.

use std::fs;
use std::process::Command;

use serde::{Deserialize, Serialize};

use crate::peers::first_line;

/// The machine.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Machine {
    /// Model of the processor.
    pub processor: String,
    /// Cores that this process may use.
    pub cores: usize,
    /// Whole GiB.
    pub memory: u64,
    /// Kernel release.
    pub kernel: String,
}

/// What was measured, and beside what.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct State {
    /// The commit that was built, if it can be told.
    pub commit: String,
    /// Processes that could run, averaged over the minute before: what else the
    /// machine had to do.
    pub load: String,
}

/// Looks around.
pub fn describe() -> Machine {
    let field = |file: &str, name: &str| {
        let text = read(file);
        let line = text.lines().find(|line| line.starts_with(name)).unwrap_or_default();
        line.split_once(':').map_or("unknown", |(_, value)| value.trim()).to_owned()
    };
    let memory = field("/proc/meminfo", "MemTotal");
    let kib: u64 = memory.trim_end_matches(" kB").parse().unwrap_or(0);
    Machine {
        processor: field("/proc/cpuinfo", "model name"),
        cores: std::thread::available_parallelism().map_or(0, usize::from),
        memory: (kib + (1 << 19)) >> 20,
        kernel: read("/proc/sys/kernel/osrelease").trim().to_owned(),
    }
}

/// What is so now.
pub fn state() -> State {
    let commit = first_line(Command::new("git").args(["log", "-1", "--format=%h of %cs"]));
    let load = read("/proc/loadavg");
    State {
        commit: commit.unwrap_or_else(|| "unknown".to_owned()),
        load: load.split(' ').next().unwrap_or("unknown").to_owned(),
    }
}

fn read(file: &str) -> String {
    fs::read_to_string(file).unwrap_or_default()
}
