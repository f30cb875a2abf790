//! A limit on a process's memory that the kernel keeps: what goes beyond is
//! killed, so a bound that is broken cannot pass unnoticed.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};

/// A control group with a limit on memory, removed when dropped (its processes
/// must have ended).
#[derive(Debug)]
pub struct MemoryLimit {
    group: PathBuf,
    files: &'static Files,
}

/// How a version of control groups calls what is needed.
#[derive(Debug)]
struct Files {
    limit: &'static str,
    /// Has a line `oom_kill <count>`.
    kills: &'static str,
}

const V1: Files = Files { limit: "memory.limit_in_bytes", kills: "memory.oom_control" };
const V2: Files = Files { limit: "memory.max", kills: "memory.events" };

impl MemoryLimit {
    /// A group that may hold `bytes`: what its processes allocate, and as much
    /// of the page cache as fits beside it. Needs root.
    pub fn new(bytes: u64) -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let (base, files) = base();
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let group = base.join(format!("replicator-test-{}-{number}", std::process::id()));
        fs::create_dir(&group).unwrap_or_else(|error| {
            panic!("{}: {error} (control groups with memory are needed)", group.display())
        });
        fs::write(group.join(files.limit), bytes.to_string()).unwrap();
        Self { group, files }
    }

    /// The same command, which enters the group before it begins.
    pub fn confine(&self, command: &Command) -> Command {
        let mut confined = Command::new("sh");
        confined.args(["-c", r#"echo $$ >"$0" && exec "$@""#]);
        confined.arg(self.group.join("cgroup.procs"));
        confined.arg(command.get_program()).args(command.get_args());
        for (name, value) in command.get_envs() {
            match value {
                Some(value) => confined.env(name, value),
                None => confined.env_remove(name),
            };
        }
        confined
    }

    /// How many of its processes the kernel has killed because of the limit.
    pub fn kills(&self) -> u64 {
        let text = fs::read_to_string(self.group.join(self.files.kills)).unwrap();
        let count = text.lines().find_map(|line| line.strip_prefix("oom_kill "));
        count.expect("kernels since 4.13 count them").parse().unwrap()
    }
}

impl Drop for MemoryLimit {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir(&self.group) {
            eprintln!("{} could not be removed: {error}", self.group.display());
        }
    }
}

/// Where groups with a memory controller are made.
fn base() -> (PathBuf, &'static Files) {
    let unified = Path::new("/sys/fs/cgroup");
    let has = |file: &str| fs::read_to_string(unified.join(file)).unwrap_or_default();
    if has("cgroup.controllers").split_whitespace().any(|controller| controller == "memory") {
        if !has("cgroup.subtree_control").contains("memory") {
            fs::write(unified.join("cgroup.subtree_control"), "+memory").unwrap();
        }
        return (unified.to_owned(), &V2);
    }
    (unified.join("memory"), &V1)
}

/// The most physical memory that a process has had, bytes.
pub fn peak_memory(process: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{process}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kilobytes = line.and_then(|line| line.trim().strip_suffix(" kB"));
    kilobytes.expect("Linux says it").parse::<u64>().unwrap() << 10
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::process::run_to_end;
    use std::time::Duration;

    fn allocate(mebibytes: u64) -> Command {
        let mut command = Command::new("dd");
        command.args(["if=/dev/zero", "of=/dev/null", "count=1"]);
        command.arg(format!("bs={mebibytes}M"));
        command
    }

    #[test]
    fn what_stays_below_lives_and_what_goes_beyond_is_killed() {
        let limit = MemoryLimit::new(64 << 20);
        let time = Duration::from_secs(60);
        assert_eq!(run_to_end(limit.confine(&allocate(8)), time).code, Some(0));
        assert_eq!(limit.kills(), 0);
        assert_ne!(run_to_end(limit.confine(&allocate(256)), time).code, Some(0));
        assert_eq!(limit.kills(), 1);
    }
}
