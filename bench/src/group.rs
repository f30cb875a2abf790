//! A control group for all that a peer starts: it tells the processor time of
//! every process of both sides, also of those that have ended, and nothing that
//! was started outlives it.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};
use rustix::process::{Pid, Signal};

use crate::site::PREFIX;

/// Bytes of a page, as `/proc/PID/statm` counts.
const PAGE: u64 = 4096;

/// Where groups are made.
pub fn base() -> PathBuf {
    let root = Path::new("/sys/fs/cgroup");
    if is_unified() { root.to_owned() } else { root.join("cpuacct") }
}

/// Whether control groups are of version 2.
fn is_unified() -> bool {
    Path::new("/sys/fs/cgroup/cgroup.controllers").exists()
}

/// A control group, removed when dropped with all that still runs in it.
#[derive(Debug)]
pub struct Group {
    path: PathBuf,
    unified: bool,
}

impl Group {
    /// Makes an empty one. Needs root, and either version of control groups.
    pub fn new() -> Result<Self> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let (base, number) = (base(), NEXT.fetch_add(1, Ordering::Relaxed));
        let path = base.join(format!("{PREFIX}{}-{number}", std::process::id()));
        fs::create_dir(&path).with_context(|| {
            format!("{}: mount /sys/fs/cgroup writable, CPU is counted there", path.display())
        })?;
        Ok(Self { path, unified: is_unified() })
    }

    /// One that a killed bench left: what still runs in it ends when it is dropped.
    pub fn left(path: PathBuf) -> Self {
        Self { path, unified: is_unified() }
    }

    /// A process that writes `0` there enters the group.
    pub fn entrance(&self) -> Result<File> {
        let path = self.path.join("cgroup.procs");
        File::options().write(true).open(&path).with_context(|| path.display().to_string())
    }

    /// Processor time so far, user and system, of all that ran in it.
    pub fn processor_time(&self) -> Result<Duration> {
        let file = self.path.join(if self.unified { "cpu.stat" } else { "cpuacct.usage" });
        let text = fs::read_to_string(&file).with_context(|| file.display().to_string())?;
        if !self.unified {
            return Ok(Duration::from_nanos(text.trim().parse()?));
        }
        let micros = text.lines().find_map(|line| line.strip_prefix("usage_usec "));
        Ok(Duration::from_micros(micros.context("cpu.stat has no usage_usec")?.trim().parse()?))
    }

    /// Bytes that its processes hold in memory of their own now: what is backed
    /// by files, as programs and libraries are, does not count.
    pub fn memory(&self) -> u64 {
        let own = |pid: &i32| {
            let text = fs::read_to_string(format!("/proc/{pid}/statm")).ok()?;
            let mut fields = text.split(' ').skip(1).map(|field| field.parse::<u64>().ok());
            let (resident, shared) = (fields.next()??, fields.next()??);
            Some(resident.saturating_sub(shared) * PAGE)
        };
        self.processes().iter().filter_map(own).sum()
    }

    /// Ends all that runs in it.
    pub fn kill(&self) {
        for pid in self.processes().into_iter().filter_map(Pid::from_raw) {
            // One that ended meanwhile needs none.
            let _ = rustix::process::kill_process(pid, Signal::KILL);
        }
    }

    /// What runs in it.
    fn processes(&self) -> Vec<i32> {
        let text = fs::read_to_string(self.path.join("cgroup.procs")).unwrap_or_default();
        text.lines().filter_map(|line| line.parse().ok()).collect()
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        for _ in 0..200 {
            if self.processes().is_empty() && fs::remove_dir(&self.path).is_ok() {
                return;
            }
            self.kill();
            thread::sleep(Duration::from_millis(20));
        }
        eprintln!("{} could not be removed: something still runs in it", self.path.display());
    }
}
