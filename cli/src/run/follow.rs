//! `run` without `--once`: shows how it stands until it is told to stop.

use std::time::Duration;

use replicator_common::control::Control;
use replicator_common::id::FileSystemId;
use replicator_common::status::{ReplicationStatus, SourceReport, Status};
use replicator_common::stop::Stop;

use super::display::Display;
use super::pair::Pair;

/// How often the display is drawn anew.
pub const PERIOD: Duration = Duration::from_millis(250);
/// How often where nothing is waiting: only ages grow.
const QUIET_PERIOD: Duration = Duration::from_secs(1);

/// Returns when told to stop, or when the configuration was deleted.
pub fn run(
    control: &dyn Control,
    id: &FileSystemId,
    pair: &Pair,
    display: &Display,
    stop: &Stop,
) -> anyhow::Result<()> {
    loop {
        let period = match find(control, id) {
            Some(status) => {
                display.show(&status);
                period(&status)
            }
            None => {
                display.line(&format!(
                    "the replication configuration was deleted: {} is writable",
                    pair.replica().display()
                ));
                return Ok(());
            }
        };
        if stop.wait_for(period) {
            return Ok(());
        }
    }
}

/// Until the display is drawn again.
fn period(status: &Status) -> Duration {
    let waits = |source: &SourceReport| source.backlog_records > 0 || source.progress.is_some();
    period_of(status.status, status.source.as_ref().is_some_and(waits))
}

fn period_of(status: ReplicationStatus, waits: bool) -> Duration {
    if status == ReplicationStatus::Enabled && !waits { QUIET_PERIOD } else { PERIOD }
}

/// The configuration, as long as it is there.
pub fn find(control: &dyn Control, id: &FileSystemId) -> Option<Status> {
    control.list().into_iter().find(|status| status.source_file_system_id == *id)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_moves_is_drawn_more_often() {
        assert_eq!(period_of(ReplicationStatus::Enabled, false), QUIET_PERIOD);
        assert_eq!(period_of(ReplicationStatus::Enabled, true), PERIOD);
        assert_eq!(period_of(ReplicationStatus::Enabling, false), PERIOD);
        assert_eq!(period_of(ReplicationStatus::Error, false), PERIOD);
    }
}
