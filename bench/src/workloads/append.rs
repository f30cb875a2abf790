//! A large log grows slowly.

use std::collections::VecDeque;
use std::fs::File;
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Mutex;
use std::sync::PoisonError;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use replicator_tests::stamps::steadily;
use replicator_tests::workload::content;

use super::lag::percentile;
use super::trees::large_file;
use super::{Bench, Figure, Outcome, Workload, mib, unless_follows};
use crate::disk::sync_file_system;
use crate::measure::Meter;
use crate::net::Net;
use crate::peers::Peer;
use crate::site::Site;

const PART: usize = 4096;
/// 64 KiB a second.
const PARTS_A_SECOND: f64 = 16.0;
/// Between two looks at the replica.
const POLL: Duration = Duration::from_millis(2);
/// How long what is under way may take after the last part.
const GRACE: Duration = Duration::from_secs(20);
/// Until a peer has done what it does after its first pass.
const SETTLE: Duration = Duration::from_secs(2);

/// The log.
pub struct Append;

fn size(bench: &Bench) -> u64 {
    bench.pick(1024, 64)
}

fn time(bench: &Bench) -> Duration {
    Duration::from_secs(bench.pick(30, 5))
}

/// Parts that were appended and have not been seen: number and moment.
type Pending = Mutex<VecDeque<(u64, Instant)>>;

impl Workload for Append {
    fn name(&self) -> &'static str {
        "append"
    }

    fn title(&self, bench: &Bench) -> String {
        let (size, seconds) = (size(bench), time(bench).as_secs());
        format!("64 KiB/s appended to a log of {size} MiB for {seconds} s")
    }

    fn about(&self) -> &'static str {
        "16 parts of 4 KiB a second once the log itself is on disk, opened and closed for each. Until the part can be read in \
         the replica. What does not follow is run in a loop without a pause."
    }

    fn excludes(&self, peer: &dyn Peer) -> Option<&'static str> {
        unless_follows(peer)
    }

    fn run(&self, bench: &Bench, peer: &dyn Peer, _first: bool) -> Result<Outcome> {
        let (source, replica) = (bench.disk().with_tree()?, bench.disk().with_tree()?);
        let standing = size(bench) << 20;
        large_file(&source.tree().join("log"), 1, standing)?;
        let site = Site::new(&source.tree(), &replica.tree(), Net::local()?)?;
        let mut session = peer.prepare(&site)?;
        session.follow()?;
        // A disk that still writes out the log itself would be measured.
        sync_file_system(&site.source)?;
        sync_file_system(&site.replica)?;
        thread::sleep(SETTLE);
        let meter = Meter::start(&site)?;
        let (log, copy) = (site.source.join("log"), site.replica.join("log"));
        let (parts, mut lags, lost) = grow(&log, &copy, standing, time(bench))?;
        let usage = meter.stop()?;
        session.rest()?;
        lags.sort_by(f64::total_cmp);
        let wire_bytes = if usage.wire_bytes == 0 { f64::NAN } else { usage.wire_bytes as f64 };
        let appended = parts * PART as u64;
        let figures = vec![
            Figure::new("visible p50, ms", percentile(&lags, 0.5) * 1e3, 0),
            Figure::new("visible p99, ms", percentile(&lags, 0.99) * 1e3, 0),
            Figure::new("wire / appended", wire_bytes / appended as f64, 2),
            Figure::new("CPU, % of a core", usage.cpu_seconds / usage.seconds * 100.0, 1),
            Figure::new("memory, MiB", mib(usage.peak_memory), 0),
            Figure::new("never seen", lost as f64, 0),
        ];
        Ok(Outcome { figures, note: None })
    }
}

fn part(number: u64) -> Vec<u8> {
    content::incompressible(number | 1 << 61, PART)
}

/// Appends for a time while another thread looks; gives how many parts, how long
/// each took to be seen in seconds, and how many never were.
fn grow(log: &Path, copy: &Path, standing: u64, time: Duration) -> Result<(u64, Vec<f64>, usize)> {
    let (pending, done) = (Pending::default(), AtomicBool::new(false));
    let locked = || pending.lock().unwrap_or_else(PoisonError::into_inner);
    let (parts, lags, failed) = thread::scope(|scope| {
        let watcher = scope.spawn(|| watch(copy, standing, &pending, &done));
        let mut failed = None;
        let parts = steadily(PARTS_A_SECOND, time, |number| {
            let mut pending = locked();
            let file = File::options().append(true).open(log);
            match file.and_then(|mut file| file.write_all(&part(number))) {
                Ok(()) => pending.push_back((number, Instant::now())),
                Err(error) => failed = Some(error),
            }
        });
        let end = Instant::now() + GRACE;
        while !locked().is_empty() && Instant::now() < end {
            thread::sleep(POLL);
        }
        done.store(true, Ordering::Relaxed);
        (parts, watcher.join().unwrap_or_default(), failed)
    });
    if let Some(error) = failed {
        return Err(error).with_context(|| log.display().to_string());
    }
    let lost = locked().len();
    Ok((parts, lags, lost))
}

/// Strikes parts from `pending`, in order, as they can be read.
fn watch(copy: &Path, standing: u64, pending: &Pending, done: &AtomicBool) -> Vec<f64> {
    let mut lags = Vec::new();
    let mut found = vec![0; PART];
    while !done.load(Ordering::Relaxed) {
        thread::sleep(POLL);
        let oldest = pending.lock().unwrap_or_else(PoisonError::into_inner).front().copied();
        let Some((number, appended)) = oldest else { continue };
        // Opened anew: it may be replaced by rename.
        let place = standing + number * PART as u64;
        let read = File::open(copy).and_then(|file| file.read_exact_at(&mut found, place));
        if read.is_ok() && found == part(number) {
            lags.push(appended.elapsed().as_secs_f64());
            pending.lock().unwrap_or_else(PoisonError::into_inner).pop_front();
        }
    }
    lags
}
