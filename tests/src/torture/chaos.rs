//! Kills daemons at moments that are worth it, and starts them again.

use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use rand::Rng;
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;

use super::witness::{Witness, read_log};
use crate::hosts::{Hosts, Side};
use crate::stamps::Stamper;

/// Between two looks at what is claimed.
const LOOK: Duration = Duration::from_millis(15);

/// When the daemon is killed.
#[derive(Clone, Copy, Debug)]
enum Moment {
    /// After a time at work.
    After(Duration),
    /// While a large file is arriving, or after some time without one.
    Arriving,
    /// Within the first moments of its life, so often one after the other.
    Young(u32),
}

/// Both daemons, and who kills them.
pub(super) struct Chaos {
    pub(super) hosts: Hosts,
    /// Daemons killed so far.
    pub(super) kills: u64,
    witness: Witness,
    replica: PathBuf,
    rng: StdRng,
}

impl Chaos {
    pub(super) fn new(hosts: Hosts, replica: &Path, rng: StdRng) -> Self {
        let replica = replica.to_owned();
        Self { hosts, kills: 0, witness: Witness::default(), replica, rng }
    }

    /// Waits for a moment, at most `limit`, kills somebody, checks what was
    /// claimed, and starts all that lies dead.
    pub(super) fn strike(&mut self, stamper: &Stamper, limit: Duration) {
        let moment = self.moment();
        let victims: &[Side] = [
            &[Side::Source][..],
            &[Side::Destination],
            &[Side::Source, Side::Destination],
            &[Side::Destination, Side::Source],
        ]
        .choose(&mut self.rng)
        .unwrap();
        self.await_moment(moment, stamper, limit);
        for side in victims {
            self.kill(*side);
        }
        if victims.contains(&Side::Destination) {
            // Nobody writes to it now.
            self.witness.hold(stamper, &self.replica, "after the destination was killed");
        }
        if self.rng.random_ratio(1, 4) {
            thread::sleep(Duration::from_millis(self.rng.random_range(0..300)));
        }
        let young = if let Moment::Young(times) = moment { times } else { 0 };
        for _ in 0..young {
            victims.iter().for_each(|side| self.hosts.spawn(*side));
            thread::sleep(Duration::from_micros(self.rng.random_range(0..250_000)));
            victims.iter().for_each(|side| self.kill(*side));
        }
        victims.iter().for_each(|side| self.hosts.spawn(*side));
        self.look(stamper);
    }

    fn moment(&mut self) -> Moment {
        let rng = &mut self.rng;
        match rng.random_range(0..10) {
            0..3 => Moment::After(Duration::from_millis(rng.random_range(0..400))),
            3..5 => Moment::After(Duration::from_millis(rng.random_range(300..2000))),
            5..8 => Moment::Arriving,
            _ => Moment::Young(rng.random_range(1..4)),
        }
    }

    fn await_moment(&mut self, moment: Moment, stamper: &Stamper, limit: Duration) {
        let time = match moment {
            Moment::After(time) => time,
            Moment::Arriving => Duration::from_secs(2),
            Moment::Young(_) => Duration::ZERO,
        };
        let end = Instant::now() + time.min(limit);
        while Instant::now() < end {
            thread::sleep(LOOK.min(end.saturating_duration_since(Instant::now())));
            let arriving = self.look(stamper);
            if arriving && matches!(moment, Moment::Arriving) {
                thread::sleep(Duration::from_millis(self.rng.random_range(0..40)));
                return;
            }
        }
    }

    /// Looks at what the destination claims; whether a large file is arriving.
    fn look(&mut self, stamper: &Stamper) -> bool {
        let Some(status) = self.hosts.daemon(Side::Destination).try_status() else { return false };
        let Some(report) = status.destination else { return false };
        if self.witness.claimed(report.last_replicated) {
            self.witness.hold(stamper, &self.replica, "while the destination runs");
        }
        !report.arriving.is_empty()
    }

    /// Kills a daemon that must be running.
    pub(super) fn kill(&mut self, side: Side) {
        let log = self.hosts.daemon(side).output();
        self.hosts.kill(side);
        self.kills += 1;
        read_log(&log);
    }

    /// Starts what does not run and waits for all.
    pub(super) fn revive(&mut self) {
        for side in [Side::Destination, Side::Source] {
            if !self.hosts.is_started(side) {
                self.hosts.spawn(side);
            }
            self.hosts.wait_ready(side);
        }
    }

    /// Holds the last claim against the replica.
    pub(super) fn held(&mut self, stamper: &Stamper) {
        self.look(stamper);
        self.witness.hold(stamper, &self.replica, "when all was replicated");
        for side in [Side::Source, Side::Destination] {
            read_log(&self.hosts.daemon(side).output());
        }
    }
}
