//! `run` without `--once`: shows how it stands until it is told to stop.

use std::time::Duration;

use replicator_common::control::Control;
use replicator_common::id::FileSystemId;
use replicator_common::status::Status;
use replicator_common::stop::Stop;

use super::display::Display;
use super::pair::Pair;

/// How often the display is drawn anew.
pub const PERIOD: Duration = Duration::from_millis(250);

/// Returns when told to stop, or when the configuration was deleted.
pub fn run(
    control: &dyn Control,
    id: &FileSystemId,
    pair: &Pair,
    display: &Display,
    stop: &Stop,
) -> anyhow::Result<()> {
    loop {
        match find(control, id) {
            Some(status) => display.show(&status),
            None => {
                display.line(&format!(
                    "the replication configuration was deleted: {} is writable",
                    pair.replica().display()
                ));
                return Ok(());
            }
        }
        if stop.wait_for(PERIOD) {
            return Ok(());
        }
    }
}

/// The configuration, as long as it is there.
pub fn find(control: &dyn Control, id: &FileSystemId) -> Option<Status> {
    control.list().into_iter().find(|status| status.source_file_system_id == *id)
}
