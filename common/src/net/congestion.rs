//! How much may be under way on a network: measured, not guessed from losses.
//!
//! Cubic, which QUIC libraries have by default, takes each lost packet for a
//! full queue. On a path of 100 ms a loss of one packet in a thousand, which
//! long lines have without being full, then leaves 5 Mbit/s of any line, and one
//! in a hundred 1.6 Mbit/s. This controller, like BBR (draft-ietf-ccwg-bbr), has
//! a model of the path instead: the highest rate at which bytes were acknowledged
//! of late, and the shortest time that an answer took. What may be under way is
//! their product, a little more in turns to find out whether more goes, then a
//! little less, so that the queue which that made goes away again.
//!
//! A round is the time from one packet's sending to its acknowledgement. Rates
//! are means over a round: no guess about single packets, whose
//! acknowledgements come in heaps.
//!
//! INVARIANT: a round in which there was nothing to send never makes the model
//! smaller, for it measures the sender and not the path.

use std::any::Any;
use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use quinn::congestion::{Controller, ControllerFactory, ControllerMetrics};
use quinn_proto::RttEstimator;

#[cfg(test)]
mod tests;

/// What may be under way before anything is known, bytes (RFC 9002, 7.2, has
/// ten packets; as today's TCPs begin).
const INITIAL_WINDOW: u64 = 32 * 1200;
/// How many packets may be under way beyond what the path was seen to take, to
/// find out whether it takes more. They may all be lost, in between others; and
/// a receiver gives a connection up whose stream has more than 1,024 gaps
/// (`MAX_CHUNKS` in quinn-proto 0.11.19).
const SEEK_PACKETS: u64 = 512;
/// Up to so many packets under way, the beginning trebles the window with each round; from
/// then on it doubles.
const EAGER_PACKETS: u64 = 192;
/// The least that may be under way, packets: enough for a loss to be noticed.
const LEAST_PACKETS: u64 = 4;
/// For how many rounds in which there was enough to send a rate counts: one
/// whole [`CYCLE`] and some.
const RATE_ROUNDS: usize = 12;
/// For how long a shortest time counts, unless a shorter one is met: a route may
/// have become longer.
const DELAY_LIFE: Duration = Duration::from_secs(10);
/// The shortest time of a whole [`CYCLE`] is that of another route if it is so
/// many percent of the one that counts: no queue of our own lasts that long.
const OTHER_ROUTE: u32 = 130;
/// Rounds of a cycle: the first seeks more, the second lets the queue run dry
/// that it may have made, and the others keep the line busy.
const CYCLE: u32 = 8;
/// By how much the first round of a cycle exceeds the product, percent. After
/// one that made a queue overflow, the next seeks the least; after any other,
/// twice as much.
const SEEK: std::ops::RangeInclusive<u64> = 3..=25;
/// Losses, percent, by which a round is known to have sought too much.
const SEEK_LOST: u64 = 2;
/// By how much the second stays below it at most, percent.
const RECEDE: u64 = 4;
/// By how much the others exceed it, percent: delays differ from packet to packet.
const BUSY: u64 = 3;
/// Packets on top of that: acknowledgements come for several at once.
const TOGETHER_PACKETS: u64 = 4;
/// Added to the shortest time: hosts answer when they come to it, and on a path
/// of microseconds that is all the time there is.
const HOST_DELAY: Duration = Duration::from_millis(2);
/// A round lasts this long at least, or its rate would be that of a burst.
const SHORTEST_ROUND: Duration = Duration::from_millis(5);
/// Growth of the rate, percent, from one round to the next below which the line
/// seems full; and for how many rounds in a row, before the beginning ends.
const GROWTH: u64 = 125;
const FULL_ROUNDS: u32 = 3;
/// Losses in a round, percent, that are taken for a queue that overflows. Lines
/// that lose more than that by themselves are slowed down, as TCP would be.
const TOO_MANY_LOST: u64 = 10;
/// Fewer lost packets in a round are no share of anything.
const LEAST_LOST: u64 = 8;
/// What is left of the window after such a round, and how the limit that it set
/// is lifted again with each round without, percent.
const BACK: u64 = 90;
const FORTH: u64 = 102;

/// Makes [`Measured`] controllers.
#[derive(Debug, Default)]
pub struct MeasuredConfig;

impl ControllerFactory for MeasuredConfig {
    fn build(self: Arc<Self>, now: Instant, mtu: u16) -> Box<dyn Controller> {
        Box::new(Measured::new(now, u64::from(mtu)))
    }
}

/// The beginning, in which the window doubles with each round, or what follows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// The best rate so far, and for how many rounds it has hardly grown.
    Beginning { best: u64, full: u32 },
    /// Which round of a [`CYCLE`].
    Cycle(u32),
}

/// What was seen since the round began.
#[derive(Clone, Copy, Debug)]
struct Round {
    began: Instant,
    acked: u64,
    lost: u64,
    /// There was not always something to send.
    idle: bool,
    /// By how much the window grew, bytes.
    grown: u64,
    /// The network said that a queue is filling (ECN).
    marked: bool,
}

impl Round {
    fn new(began: Instant) -> Self {
        Self { began, acked: 0, lost: 0, idle: false, grown: 0, marked: false }
    }

    /// Bytes a second.
    fn rate(&self, now: Instant) -> u64 {
        let nanos = now.duration_since(self.began).as_nanos().max(1);
        u64::try_from(u128::from(self.acked) * 1_000_000_000 / nanos).unwrap_or(u64::MAX)
    }

    fn is_overflowing(&self, mtu: u64) -> bool {
        let many = self.lost >= LEAST_LOST * mtu;
        self.marked || many && self.lost_more_than(TOO_MANY_LOST)
    }

    fn lost_more_than(&self, percent: u64) -> bool {
        self.lost * 100 > (self.lost + self.acked) * percent
    }
}

/// See the module.
#[derive(Clone, Debug)]
pub struct Measured {
    mtu: u64,
    window: u64,
    phase: Phase,
    round: Round,
    /// Bytes a second, of the last rounds that count; the newest last.
    rates: VecDeque<u64>,
    /// The shortest time, and when it was met.
    delay: Option<(Duration, Instant)>,
    /// The shortest time since the cycle began.
    lately: Option<Duration>,
    /// What an overflowing queue allows, bytes.
    limit: u64,
    /// See [`SEEK`].
    seek: u64,
}

impl Measured {
    fn new(now: Instant, mtu: u64) -> Self {
        Self {
            mtu,
            window: INITIAL_WINDOW.max(LEAST_PACKETS * mtu),
            phase: Phase::Beginning { best: 0, full: 0 },
            round: Round::new(now),
            rates: VecDeque::with_capacity(RATE_ROUNDS),
            delay: None,
            lately: None,
            limit: u64::MAX,
            seek: *SEEK.end(),
        }
    }

    fn least(&self) -> u64 {
        LEAST_PACKETS * self.mtu
    }

    fn see_delay(&mut self, delay: Duration, now: Instant) {
        let stands = |(least, met): (Duration, Instant)| {
            delay > least && now.duration_since(met) < DELAY_LIFE
        };
        if !self.delay.is_some_and(stands) {
            self.delay = Some((delay, now));
        }
    }

    /// A cycle ends.
    fn see_route(&mut self, now: Instant) {
        let lately = self.lately.take();
        if let (Some((least, _)), Some(lately)) = (self.delay, lately)
            && lately > least * OTHER_ROUTE / 100 + HOST_DELAY
        {
            self.delay = Some((lately, now));
        }
    }

    /// Bytes that the path itself holds at its highest rate.
    fn product(&self) -> u64 {
        let rate = self.rates.iter().max().copied().unwrap_or(0);
        let delay = self.delay.map_or(Duration::ZERO, |(delay, _)| delay) + HOST_DELAY;
        let bytes = u128::from(rate) * delay.as_nanos() / 1_000_000_000;
        u64::try_from(bytes).unwrap_or(u64::MAX)
    }

    fn end_round(&mut self, now: Instant) {
        let round = std::mem::replace(&mut self.round, Round::new(now));
        let rate = round.rate(now);
        let best = self.rates.iter().max().copied().unwrap_or(0);
        if !round.idle || rate > best {
            if self.rates.len() == RATE_ROUNDS {
                self.rates.pop_front();
            }
            self.rates.push_back(rate);
        }
        // What the seeking round lost, which the next notices, says nothing of the others.
        let sought = matches!(self.phase, Phase::Cycle(0 | 1));
        let overflows = round.is_overflowing(self.mtu) && !sought;
        self.limit = match overflows {
            true => self.window.min(self.limit).saturating_mul(BACK) / 100,
            false => self.limit.saturating_mul(FORTH) / 100,
        }
        .max(self.least());
        self.phase = self.phase_after(&round, rate, overflows);
        tracing::trace!(
            phase = ?self.phase, rate, window = self.window, limit = self.limit, ?round, "round"
        );
        if let Phase::Cycle(at) = self.phase {
            // What the first round lost is known by the end of the second.
            if at == 2 {
                let more = (self.seek * 2).min(*SEEK.end());
                self.seek = if round.lost_more_than(SEEK_LOST) { *SEEK.start() } else { more };
            }
            if at == 0 && !round.idle {
                self.see_route(now);
            }
            self.window = self.target(at).max(self.least());
        }
    }

    /// What may be under way in a round of the cycle, bytes.
    fn target(&self, at: u32) -> u64 {
        let product = self.product();
        let share = match at {
            0 => 100 + self.seek,
            1 => 100 - self.seek.min(RECEDE),
            _ => 100 + BUSY,
        };
        let most = product.saturating_add(SEEK_PACKETS * self.mtu);
        let target = (product.saturating_mul(share) / 100).min(most);
        target.saturating_add(TOGETHER_PACKETS * self.mtu)
    }

    fn phase_after(&self, round: &Round, rate: u64, overflows: bool) -> Phase {
        match self.phase {
            _ if round.idle => self.phase,
            Phase::Cycle(at) => Phase::Cycle((at + 1) % CYCLE),
            Phase::Beginning { .. } if overflows => Phase::Cycle(1),
            Phase::Beginning { best, .. }
                if rate.saturating_mul(100) >= best.saturating_mul(GROWTH) =>
            {
                Phase::Beginning { best: rate, full: 0 }
            }
            // The queue that was made goes first.
            Phase::Beginning { full, .. } if full + 1 >= FULL_ROUNDS => Phase::Cycle(1),
            Phase::Beginning { best, full } => Phase::Beginning { best, full: full + 1 },
        }
    }
}

impl Controller for Measured {
    fn on_ack(
        &mut self,
        now: Instant,
        sent: Instant,
        bytes: u64,
        app_limited: bool,
        _rtt: &RttEstimator,
    ) {
        let delay = now.duration_since(sent);
        self.see_delay(delay, now);
        self.lately = Some(self.lately.map_or(delay, |lately| lately.min(delay)));
        self.round.acked += bytes;
        self.round.idle |= app_limited;
        if matches!(self.phase, Phase::Beginning { .. }) && !app_limited {
            // As BBR does, whose startup has a gain of 2.77: where little is under way, little
            // is in anybody's way.
            let gain = if self.window < EAGER_PACKETS * self.mtu { 2 } else { 1 };
            let most = (SEEK_PACKETS * self.mtu).saturating_sub(self.round.grown);
            let more = (bytes * gain).min(most);
            self.round.grown += more;
            self.window = self.window.saturating_add(more);
        }
        let long_enough = now.duration_since(self.round.began) >= SHORTEST_ROUND;
        if sent >= self.round.began && long_enough {
            self.end_round(now);
        }
    }

    fn on_congestion_event(
        &mut self,
        now: Instant,
        _sent: Instant,
        is_persistent_congestion: bool,
        lost_bytes: u64,
    ) {
        if is_persistent_congestion {
            // Nothing got through for long: the path may be another one.
            *self = Self::new(now, self.mtu);
            return;
        }
        self.round.lost += lost_bytes;
        self.round.marked |= lost_bytes == 0;
    }

    fn on_mtu_update(&mut self, new_mtu: u16) {
        self.mtu = u64::from(new_mtu);
        self.window = self.window.max(self.least());
    }

    fn window(&self) -> u64 {
        self.window.min(self.limit)
    }

    fn metrics(&self) -> ControllerMetrics {
        let mut metrics = ControllerMetrics::default();
        metrics.congestion_window = self.window();
        metrics
    }

    fn clone_box(&self) -> Box<dyn Controller> {
        Box::new(self.clone())
    }

    fn initial_window(&self) -> u64 {
        INITIAL_WINDOW.max(self.least())
    }

    fn into_any(self: Box<Self>) -> Box<dyn Any> {
        self
    }
}
