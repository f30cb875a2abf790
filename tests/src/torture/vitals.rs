//! What the daemons need must not grow from round to round.

use std::fs;
use std::path::Path;

use crate::hosts::{Hosts, Side};

/// Rounds after which what is needed is taken for what is normal.
const WARM_UP: usize = 2;
/// By how much each figure may exceed that: memory by a cache that fills, state
/// by what a store frees late.
const MEMORY_SLACK: u64 = 48 << 20;
const STATE_SLACK: u64 = 48 << 20;

/// Figures of one side after a round.
#[derive(Clone, Copy, Debug)]
struct Figures {
    /// Resident memory after a restart in quiet, bytes.
    memory: u64,
    /// Of its state directory, bytes.
    state: u64,
    /// Open descriptors.
    descriptors: u64,
}

/// The figures of all rounds.
#[derive(Debug, Default)]
pub(super) struct Vitals {
    rounds: Vec<[Figures; 2]>,
}

impl Vitals {
    /// Takes the figures, and panics when they have grown.
    pub(super) fn check(&mut self, hosts: &Hosts) {
        let now = [Side::Source, Side::Destination].map(|side| Figures::take(hosts, side));
        self.rounds.push(now);
        eprintln!("round {}: {now:?}", self.rounds.len());
        let Some(normal) = self.rounds.get(WARM_UP) else { return };
        for (now, normal) in now.iter().zip(normal) {
            let grown = now.memory > normal.memory * 3 / 2 + MEMORY_SLACK
                || now.state > normal.state * 2 + STATE_SLACK
                || now.descriptors > normal.descriptors * 2 + 64;
            assert!(!grown, "grown from {normal:?} to {now:?}: {:#?}", self.rounds);
        }
    }
}

impl Figures {
    fn take(hosts: &Hosts, side: Side) -> Self {
        let process = format!("/proc/{}", hosts.daemon(side).id());
        let status = fs::read_to_string(format!("{process}/status")).unwrap();
        let resident = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
        let kibibytes: u64 = resident.trim().trim_end_matches(" kB").parse().unwrap();
        let descriptors = fs::read_dir(format!("{process}/fd")).unwrap().count() as u64;
        Self { memory: kibibytes << 10, state: allocated(&hosts.state_dir(side)), descriptors }
    }
}

/// Bytes that a directory's files take on the disk.
fn allocated(directory: &Path) -> u64 {
    use std::os::unix::fs::MetadataExt;
    let mut sum = 0;
    for entry in fs::read_dir(directory).unwrap().flatten() {
        // A store may remove a file of its own at this moment.
        let Ok(stat) = entry.metadata() else { continue };
        sum += if stat.is_dir() { allocated(&entry.path()) } else { stat.blocks() * 512 };
    }
    sum
}
