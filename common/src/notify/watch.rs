//! From how status stands to what is told. Pure: time is an argument.
//!
//! Each configuration has three alarms. One is raised when its condition has
//! held for some time, and told; it is over when the condition has not held for
//! some time, and that is told. What comes and goes faster is told once.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use super::event::{Event, Kind};
use crate::config::NotifyConfig;
use crate::id::FileSystemId;
use crate::status::{ReplicationStatus, Status};
use crate::telemetry::Side;
use crate::time::Timestamp;

/// The most bytes of a message.
const MESSAGE_MAX: usize = 4096;

/// When something is told.
#[derive(Clone, Copy, Debug)]
pub struct Rule {
    /// A lag of more than this, seconds, raises an alarm; one of half of it or
    /// less lets it be over.
    pub lag: f64,
    /// How long a lag must last, and how long anything must be over.
    pub hold: Duration,
}

impl From<&NotifyConfig> for Rule {
    fn from(config: &NotifyConfig) -> Self {
        Self { lag: config.lag_threshold.get().as_secs_f64(), hold: config.hold.get() }
    }
}

/// What is known of all configurations.
pub struct Watch {
    side: Side,
    rule: Rule,
    alarms: BTreeMap<FileSystemId, [Alarm; 3]>,
}

/// One alarm of one configuration.
#[derive(Clone, Copy, Debug)]
struct Alarm {
    kind: Kind,
    /// It was told, and not that it is over.
    told: bool,
    /// Since when the condition has been other than what was told.
    since: Option<Instant>,
}

impl Alarm {
    fn new(kind: Kind) -> Self {
        Self { kind, told: false, since: None }
    }

    /// The condition is `active` at `now`. What is to be told, if anything.
    fn step(&mut self, active: bool, hold: Duration, now: Instant) -> Option<Kind> {
        if active == self.told {
            self.since = None;
            return None;
        }
        let since = *self.since.get_or_insert(now);
        if now.saturating_duration_since(since) < hold {
            return None;
        }
        self.since = None;
        self.told = active;
        Some(if active { self.kind } else { Kind::Recovered })
    }
}

impl Watch {
    /// Nothing was told yet.
    pub fn new(side: Side, rule: Rule) -> Self {
        Self { side, rule, alarms: BTreeMap::new() }
    }

    /// Looks at how all configurations stand, and says what is to be told. Of
    /// one that is no more nothing is told, and nothing known.
    pub fn look(&mut self, all: &[Status], now: Instant, time: Timestamp) -> Vec<Event> {
        self.alarms.retain(|id, _| all.iter().any(|one| one.source_file_system_id == *id));
        let mut events = Vec::new();
        for status in all {
            let lag = lag(status, self.side, time);
            let alarms = self
                .alarms
                .entry(status.source_file_system_id.clone())
                .or_insert_with(|| [Kind::Error, Kind::Halted, Kind::Lag].map(Alarm::new));
            for alarm in alarms {
                let Some(active) = is_active(alarm, status, lag, self.rule) else { continue };
                // What needs somebody is told at once.
                let at_once = active && alarm.kind != Kind::Lag;
                let hold = if at_once { Duration::ZERO } else { self.rule.hold };
                if let Some(kind) = alarm.step(active, hold, now) {
                    events.push(event(kind, alarm.kind, status, lag, self.side, time));
                }
            }
        }
        events
    }
}

/// Whether an alarm's condition holds; `None` when nobody can say now.
fn is_active(alarm: &Alarm, status: &Status, lag: Option<f64>, rule: Rule) -> Option<bool> {
    use ReplicationStatus::{Deleting, Error, Halted, Paused, Pausing};
    match alarm.kind {
        // A failover is under way: its end is no recovery.
        _ if status.status == Deleting => None,
        Kind::Error => Some(status.status == Error),
        Kind::Halted => Some(status.status == Halted),
        // Somebody wants it to fall behind.
        _ if matches!(status.status, Paused | Pausing) => None,
        _ => {
            let bound = if alarm.told { rule.lag / 2.0 } else { rule.lag };
            lag.map(|lag| lag > bound)
        }
    }
}

/// How far the replica is behind, as `side` can tell, seconds.
fn lag(status: &Status, side: Side, time: Timestamp) -> Option<f64> {
    match side {
        // Against this moment: a report that is old makes no lag less.
        Side::Source => {
            let watermark = status.source.as_ref()?.watermark;
            (watermark != Timestamp::NEVER).then(|| time.since(watermark).as_secs_f64())
        }
        Side::Destination => status.destination.as_ref()?.time_since_last_sync,
    }
}

fn event(
    kind: Kind,
    of: Kind,
    status: &Status,
    lag: Option<f64>,
    side: Side,
    time: Timestamp,
) -> Event {
    let behind = lag.map_or("not yet complete".to_owned(), |lag| format!("{lag:.0} s behind"));
    let said = status.status_message.as_deref().unwrap_or_default();
    let mut message = match (kind, of) {
        (Kind::Recovered, of) => format!("{} is over; the replica is {behind}", of.as_str()),
        (Kind::Lag, _) => format!("the replica is {behind}. {said}"),
        _ => said.to_owned(),
    };
    message.truncate(message.floor_char_boundary(MESSAGE_MAX));
    Event {
        id: hex::encode(rand::random::<[u8; 16]>()),
        kind,
        recovered_from: (kind == Kind::Recovered).then_some(of),
        time,
        side: side.as_str(),
        source_file_system_id: status.source_file_system_id.to_string(),
        destination_file_system_id: status.destination_file_system_id.to_string(),
        status: status.status.as_str(),
        message: message.trim_end().to_owned(),
        time_since_last_sync: lag,
    }
}

#[cfg(test)]
mod tests;
