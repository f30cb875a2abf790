//! Time, processor time, memory and traffic of all that runs at a site.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::Result;
use serde::Serialize;

use crate::site::Site;

/// How often memory is looked at.
const SAMPLE: Duration = Duration::from_millis(50);

/// What a peer used, both ends together.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Usage {
    /// Wall-clock time.
    pub seconds: f64,
    /// Processor time, user and system, of every process.
    pub cpu_seconds: f64,
    /// The most memory of their own that its processes held at once, bytes.
    pub peak_memory: u64,
    /// Bytes that the network between the ends carried, headers included.
    pub wire_bytes: u64,
}

/// A measurement that is under way.
pub struct Meter {
    site: Arc<Site>,
    start: Instant,
    cpu: Duration,
    wire: u64,
    peak: Arc<AtomicU64>,
    ends: Arc<AtomicBool>,
    sampler: JoinHandle<()>,
}

impl Meter {
    /// Begins.
    pub fn start(site: &Arc<Site>) -> Result<Self> {
        let (peak, ends) = <(Arc<AtomicU64>, Arc<AtomicBool>)>::default();
        let (cpu, wire) = (site.group.processor_time()?, site.net.wire_bytes()?);
        let sampler = thread::spawn({
            let (site, peak, ends) = (site.clone(), peak.clone(), ends.clone());
            move || {
                while !ends.load(Ordering::Relaxed) {
                    peak.fetch_max(site.group.memory(), Ordering::Relaxed);
                    thread::park_timeout(SAMPLE);
                }
            }
        });
        Ok(Self { site: site.clone(), start: Instant::now(), cpu, wire, peak, ends, sampler })
    }

    /// Ends.
    pub fn stop(self) -> Result<Usage> {
        let seconds = self.start.elapsed().as_secs_f64();
        let cpu = self.site.group.processor_time()? - self.cpu;
        let wire_bytes = self.site.net.wire_bytes()? - self.wire;
        self.ends.store(true, Ordering::Relaxed);
        self.sampler.thread().unpark();
        if self.sampler.join().is_err() {
            eprintln!("the sampler of memory panicked");
        }
        let peak_memory = self.peak.load(Ordering::Relaxed);
        Ok(Usage { seconds, cpu_seconds: cpu.as_secs_f64(), peak_memory, wire_bytes })
    }
}
