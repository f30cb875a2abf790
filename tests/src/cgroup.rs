//! A limit on the memory of a program under test. A program that takes more is
//! killed by the kernel, which the test sees.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

/// Where cgroups are mounted.
const ROOT: &str = "/sys/fs/cgroup";
/// How long the processes of a group may take to be gone.
const GONE_LIMIT: Duration = Duration::from_secs(10);

/// A cgroup with a limit on memory, the page cache of its files included (which
/// the kernel takes back when it is needed). Removed when dropped; whoever is in
/// it must have ended.
#[derive(Debug)]
pub struct MemoryLimit {
    path: PathBuf,
}

impl MemoryLimit {
    /// Of this many bytes.
    pub fn new(bytes: u64) -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let name = format!("replicator-tests-{}-{number}", std::process::id());
        let first = Path::new(ROOT).join("memory");
        let (base, file) = if first.is_dir() {
            (first, "memory.limit_in_bytes")
        } else {
            let base = PathBuf::from(ROOT);
            // It is on already where something else uses it.
            let _ = fs::write(base.join("cgroup.subtree_control"), "+memory");
            (base, "memory.max")
        };
        let path = base.join(name);
        fs::create_dir(&path).unwrap_or_else(|error| {
            panic!("{}: {error}; this test limits memory by a cgroup", path.display())
        });
        let group = Self { path };
        fs::write(group.path.join(file), bytes.to_string()).unwrap_or_else(|error| {
            panic!("{}: {error}; this test needs the memory controller", group.path.display())
        });
        group
    }

    /// Puts a command's process into the group before it begins. (By a shell:
    /// what runs between fork and exec here must not allocate.)
    pub fn wrap(&self) -> Vec<String> {
        let procs = self.path.join("cgroup.procs");
        let script = format!("echo $$ > {} && exec \"$@\"", procs.display());
        ["sh", "-c", &script, "sh"].map(str::to_owned).into()
    }

    /// Bytes of the group's programs that the kernel cannot take back: their own
    /// memory.
    pub fn in_use(&self) -> u64 {
        let text = fs::read_to_string(self.path.join("memory.stat")).unwrap();
        let words = text.lines().filter_map(|line| line.split_once(' '));
        let own = words.filter(|(key, _)| matches!(*key, "rss" | "anon"));
        own.map(|(_, bytes)| bytes.trim().parse::<u64>().unwrap()).sum()
    }
}

impl Drop for MemoryLimit {
    fn drop(&mut self) {
        let begin = Instant::now();
        while let Err(error) = fs::remove_dir(&self.path) {
            if begin.elapsed() > GONE_LIMIT {
                eprintln!("{} could not be removed: {error}", self.path.display());
                return;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    /// Fills as much memory as it is told to, in mebibytes.
    fn fill(group: &MemoryLimit, mebibytes: u32) -> bool {
        let wrap = group.wrap();
        let script = format!("head -c {mebibytes}M /dev/zero | tail -c {mebibytes}M > /dev/null");
        let mut command = Command::new(&wrap[0]);
        command.args(&wrap[1..]).args(["bash", "-o", "pipefail", "-c", &script]);
        command.status().unwrap().success()
    }

    #[test]
    fn who_takes_more_is_killed() {
        crate::mounts::require_root();
        let group = MemoryLimit::new(64 << 20);
        assert!(fill(&group, 8));
        assert!(!fill(&group, 100));
    }
}
