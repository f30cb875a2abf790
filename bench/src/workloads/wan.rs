//! The initial sync over a long path with losses.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::thread;
use std::time::Duration;

use anyhow::Result;

use super::trees::{SMALL, large_file, small_files};
use super::{Bench, Figure, Outcome, Workload};
use crate::measure::Meter;
use crate::net::Net;
use crate::peers::{Peer, Session};
use crate::site::Site;
use crate::wan::Line;

/// Bits a second.
const RATE: f64 = 200e6;
const ROUND_TRIP: Duration = Duration::from_millis(100);

/// One tree over one line.
pub struct Wan {
    name: &'static str,
    /// The share of packets that are lost, percent.
    loss: f64,
    large: bool,
}

/// Each of two trees over each of three lines.
pub fn all() -> [Wan; 6] {
    let wan = |name, loss, large| Wan { name, loss, large };
    [
        wan("wan-large-0", 0.0, true),
        wan("wan-large-0.1", 0.1, true),
        wan("wan-large-1", 1.0, true),
        wan("wan-small-0", 0.0, false),
        wan("wan-small-0.1", 0.1, false),
        wan("wan-small-1", 1.0, false),
    ]
}

fn large_bytes(bench: &Bench) -> u64 {
    bench.pick(512, 16) << 20
}

fn small_count(bench: &Bench) -> u64 {
    bench.pick(100_000, 1_000)
}

/// How long one may take: twice as long as the line needs, and some. Who is slower
/// is measured by what was carried until then.
fn limit(bench: &Bench) -> Duration {
    Duration::from_secs(bench.pick(50, 20))
}

impl Workload for Wan {
    fn name(&self) -> &'static str {
        self.name
    }

    fn title(&self, bench: &Bench) -> String {
        let what = if self.large {
            format!("a file of {} MiB", large_bytes(bench) >> 20)
        } else {
            format!("{} files of 4 KiB", small_count(bench))
        };
        format!("100 ms, 200 Mbit/s, {} % loss: initial sync of {what}, incompressible", self.loss)
    }

    fn about(&self) -> &'static str {
        "Between two network namespaces over TUN, MTU 1500; the queue before the line holds 100 ms; \
         losses both ways. The share is that of the content's bits in what the line could have carried, \
         from the first word of the connection to the end."
    }

    fn excludes(&self, peer: &dyn Peer) -> Option<&'static str> {
        if peer.name() == "lsyncd-1" {
            return Some("as lsyncd-0");
        }
        (!peer.abilities().network).then_some("has no network")
    }

    /// Two rounds of those that do not end within the limit.
    fn patience(&self) -> Duration {
        Duration::from_secs(130)
    }

    fn run(&self, bench: &Bench, peer: &dyn Peer, _first: bool) -> Result<Outcome> {
        let (source, replica) = (bench.disk().with_tree()?, bench.disk().with_tree()?);
        let bytes = if self.large {
            large_file(&source.tree().join("large"), 1, large_bytes(bench))?;
            large_bytes(bench)
        } else {
            small_files(&source.tree(), small_count(bench), true)?;
            small_count(bench) * SMALL as u64
        };
        let line =
            Line { round_trip: ROUND_TRIP, rate: RATE, loss: self.loss / 100.0, tcp: bench.tcp };
        let site = Site::new(&source.tree(), &replica.tree(), Net::long(line)?)?;
        let mut session = peer.prepare(&site)?;
        let meter = Meter::start(&site)?;
        let done = pass_within(&mut *session, &site, limit(bench))?;
        let usage = meter.stop()?;
        session.rest()?;
        // Of one that did not end nobody knows how much of it is content.
        let carried = if done { bytes } else { usage.wire_bytes };
        let share = carried as f64 * 8.0 / usage.seconds / RATE * 100.0;
        let figures = vec![
            Figure::new("ended after, s", if done { usage.seconds } else { f64::NAN }, 2),
            Figure::new("share of the line, %", share, 1),
        ];
        let mut outcome = Outcome::with_usage(figures, &usage);
        if !done {
            let limit = limit(bench);
            outcome.note =
                Some(format!("had not ended after {limit:?}; the share is of all bytes"));
        }
        Ok(outcome)
    }
}

/// A pass that is ended by force when it takes longer; says whether it ended by itself.
fn pass_within(session: &mut dyn Session, site: &Arc<Site>, limit: Duration) -> Result<bool> {
    let expired = AtomicBool::new(false);
    let (sender, receiver) = channel::<()>();
    let passed = thread::scope(|scope| {
        let expired = &expired;
        scope.spawn(move || {
            // Nothing is ever sent: the channel is closed when the pass has ended.
            if receiver.recv_timeout(limit) == Err(RecvTimeoutError::Timeout) {
                expired.store(true, Ordering::Relaxed);
                site.group.kill();
            }
        });
        let passed = session.pass();
        drop(sender);
        passed
    });
    if expired.load(Ordering::Relaxed) {
        return Ok(false);
    }
    passed.map(|()| true)
}
