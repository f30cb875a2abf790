//! Time, processor time and memory of processes.

use std::fs::File;
use std::io;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde::Serialize;

/// What a process used, with the children that it waited for.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Usage {
    /// Seconds of processor time, user and system.
    pub cpu_seconds: f64,
    /// Largest resident size of one process, bytes.
    pub peak_memory: u64,
}

/// Runs a command to its end, which must be with one of these exit statuses;
/// its output goes to the file `log`.
pub fn run(command: &mut Command, accepted: &[i32], log: &Path) -> Result<(Duration, Usage)> {
    let output = File::create(log)?;
    command.stdin(Stdio::null()).stdout(output.try_clone()?).stderr(output);
    let start = Instant::now();
    let child = command.spawn().with_context(|| format!("{command:?}"))?;
    let (status, usage) = wait_with_usage(child.id())?;
    let time = start.elapsed();
    let succeeded = libc::WIFEXITED(status) && accepted.contains(&libc::WEXITSTATUS(status));
    ensure!(succeeded, "{command:?} failed: {}", std::fs::read_to_string(log)?);
    Ok((time, usage))
}

/// Reaps a child; gives its wait status and what it used. The standard
/// library's `wait` does not tell the latter.
fn wait_with_usage(pid: u32) -> io::Result<(i32, Usage)> {
    let (mut status, mut usage) = (0, std::mem::MaybeUninit::<libc::rusage>::uninit());
    // SAFETY: both pointers are to values that live through the call.
    let reaped = unsafe { libc::wait4(pid as i32, &raw mut status, 0, usage.as_mut_ptr()) };
    if reaped < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: wait4 has filled it, since it did not fail.
    let usage = unsafe { usage.assume_init() };
    let seconds = |time: libc::timeval| time.tv_sec as f64 + time.tv_usec as f64 / 1e6;
    let usage = Usage {
        cpu_seconds: seconds(usage.ru_utime) + seconds(usage.ru_stime),
        peak_memory: usage.ru_maxrss as u64 * 1024,
    };
    Ok((status, usage))
}

/// What a running process has used so far.
pub fn usage_of(pid: u32) -> Result<Usage> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
    // The name may hold anything, spaces and parentheses too.
    let after_name = stat.rsplit_once(") ").context("no name in stat")?.1;
    let fields: Vec<&str> = after_name.split(' ').collect();
    // Fields 14 and 15 of the whole line, in ticks of 10 ms.
    let ticks = fields[11].parse::<u64>()? + fields[12].parse::<u64>()?;
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).context("no VmHWM")?;
    let kib: u64 = peak.trim().trim_end_matches(" kB").parse()?;
    Ok(Usage { cpu_seconds: ticks as f64 / 100.0, peak_memory: kib * 1024 })
}

/// Writes everything out and forgets it: what is read next comes from disk.
pub fn drop_caches() -> Result<()> {
    rustix::fs::sync();
    std::fs::write("/proc/sys/vm/drop_caches", "3").context("drop_caches")
}

/// Makes a file system durable; gives the time it took.
pub fn sync_file_system(path: &Path) -> Result<Duration> {
    let start = Instant::now();
    rustix::fs::syncfs(File::open(path)?)?;
    Ok(start.elapsed())
}
