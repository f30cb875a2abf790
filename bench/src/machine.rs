//! What was measured on.

use std::fs;
use std::process::Command;

use serde::Serialize;

/// Machine and programs.
#[derive(Debug, Serialize)]
pub struct Machine {
    /// Model of the processor.
    pub processor: String,
    /// Cores that this process may use.
    pub cores: usize,
    /// Bytes.
    pub memory: u64,
    /// Kernel release.
    pub kernel: String,
    /// Each program's own words.
    pub versions: Vec<String>,
}

/// Looks around.
pub fn describe() -> Machine {
    let field = |file: &str, name: &str| {
        let text = fs::read_to_string(file).unwrap_or_default();
        let line = text.lines().find(|line| line.starts_with(name)).unwrap_or_default();
        line.split_once(':').map_or("unknown", |(_, value)| value.trim()).to_owned()
    };
    let memory = field("/proc/meminfo", "MemTotal");
    let kib: u64 = memory.trim_end_matches(" kB").parse().unwrap_or(0);
    let replicator = replicator_tests::binary::replicator_optimised();
    Machine {
        processor: field("/proc/cpuinfo", "model name"),
        cores: std::thread::available_parallelism().map_or(0, usize::from),
        memory: kib * 1024,
        kernel: fs::read_to_string("/proc/sys/kernel/osrelease")
            .unwrap_or_default()
            .trim()
            .to_owned(),
        versions: vec![
            first_line(Command::new(replicator).arg("--version")),
            first_line(Command::new("git").args(["log", "-1", "--format=commit %h of %cs"])),
            first_line(Command::new("rsync").arg("--version")),
            first_line(Command::new("cp").arg("--version")),
            first_line(Command::new("mkfs.ext4").arg("-V")),
        ],
    }
}

fn first_line(command: &mut Command) -> String {
    let output = command.output().ok();
    let text = output.map(|output| [output.stdout, output.stderr].concat()).unwrap_or_default();
    let line = String::from_utf8_lossy(&text).lines().next().map(str::to_owned);
    line.unwrap_or_else(|| format!("{command:?}: no version"))
}
