//! Speed, CPU, memory and disk of each phase.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::Instant;

use anyhow::{Context, ensure};
use rand::{Rng, SeedableRng, rngs::StdRng};

use crate::store::{HALF, Kind, Rows, object_key};

/// Rows of the table: what was measured, and the outcome.
pub type Figures = Vec<(String, String)>;

/// Updates, and lookups, as parts of the number of objects.
const UPDATES: u64 = 10;
const SEED: u64 = 1;

/// Fills a new store, changes it, looks things up and scans it.
pub fn fill(kind: Kind, path: &Path, objects: u64) -> anyhow::Result<()> {
    let mut random = StdRng::seed_from_u64(SEED);
    let mut figures = Figures::new();
    let mut store = kind.open(path)?;

    let phase = Phase::begin("insert")?;
    for first in (0..objects).step_by(HALF) {
        store.commit(&Rows::of(first..objects.min(first + HALF as u64), 1))?;
    }
    phase.end(&mut figures)?;
    figures.push(("insert: disk, MiB".to_owned(), megabytes(disk(path)?)));

    let phase = Phase::begin("update")?;
    for _ in (0..objects / UPDATES).step_by(HALF) {
        let chosen = (0..HALF).map(|_| random.random_range(0..objects));
        store.commit(&Rows::of(chosen, 2))?;
    }
    phase.end(&mut figures)?;
    figures.push(("update: disk, MiB".to_owned(), megabytes(disk(path)?)));

    let phase = Phase::begin("lookup")?;
    for _ in 0..objects {
        let key = object_key(random.random_range(0..objects));
        ensure!(store.object(&key)?.is_some(), "an object is missing");
    }
    phase.end(&mut figures)?;

    let phase = Phase::begin("scan")?;
    ensure!(store.scan()? == (objects, objects), "the scan saw other than what was written");
    phase.end(&mut figures)?;

    let begin = Instant::now();
    drop(store);
    figures.push(("close, s".to_owned(), format!("{:.2}", begin.elapsed().as_secs_f64())));
    figures.push(("closed: disk, MiB".to_owned(), megabytes(disk(path)?)));
    println!("{}", serde_json::to_string(&figures)?);
    Ok(())
}

/// Opens the store in a fresh process and looks one thing up.
pub fn reopen(kind: Kind, path: &Path, objects: u64) -> anyhow::Result<()> {
    let begin = Instant::now();
    let store = kind.open(path)?;
    ensure!(store.object(&object_key(objects / 2))?.is_some(), "an object is missing");
    let seconds = begin.elapsed().as_secs_f64();
    let figures = vec![
        ("reopen, s".to_owned(), format!("{seconds:.3}")),
        ("reopen: peak memory, MiB".to_owned(), megabytes(peak_memory()?)),
    ];
    println!("{}", serde_json::to_string(&figures)?);
    Ok(())
}

struct Phase {
    name: &'static str,
    begin: Instant,
    cpu: f64,
}

impl Phase {
    fn begin(name: &'static str) -> anyhow::Result<Self> {
        // Resets the process's peak memory (proc_pid_clear_refs(5)).
        fs::write("/proc/self/clear_refs", "5").context("clear_refs")?;
        Ok(Self { name, begin: Instant::now(), cpu: cpu_seconds()? })
    }

    fn end(self, figures: &mut Figures) -> anyhow::Result<()> {
        let seconds = self.begin.elapsed().as_secs_f64();
        let cpu = cpu_seconds()? - self.cpu;
        let name = self.name;
        eprintln!("  {name}: {seconds:.1} s");
        figures.push((format!("{name}, s (CPU s)"), format!("{seconds:.1} ({cpu:.1})")));
        figures.push((format!("{name}: peak memory, MiB"), megabytes(peak_memory()?)));
        Ok(())
    }
}

fn megabytes(bytes: u64) -> String {
    (bytes >> 20).to_string()
}

/// User and system time of this process, all threads.
fn cpu_seconds() -> anyhow::Result<f64> {
    /// The kernel's unit in /proc (USER_HZ), the same on every architecture we know.
    const TICKS: f64 = 100.0;
    let stat = fs::read_to_string("/proc/self/stat")?;
    // The program's name, in parentheses, may hold anything.
    let (_, fields) = stat.rsplit_once(") ").context("/proc/self/stat")?;
    let ticks = fields.split(' ').skip(11).take(2).map(str::parse::<f64>);
    Ok(ticks.sum::<Result<f64, _>>()? / TICKS)
}

fn peak_memory() -> anyhow::Result<u64> {
    let status = fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).context("VmHWM")?;
    let kilobytes: u64 = line.trim().trim_end_matches(" kB").parse()?;
    Ok(kilobytes << 10)
}

/// Blocks allocated to a file, or to all files of a directory.
fn disk(path: &Path) -> anyhow::Result<u64> {
    let metadata = fs::symlink_metadata(path)?;
    let mut bytes = metadata.blocks() * 512;
    if metadata.is_dir() {
        for entry in fs::read_dir(path)? {
            bytes += disk(&entry?.path())?;
        }
    }
    Ok(bytes)
}
