//! `run --once`: ends when the replica equals the source.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use replicator_common::api::efs;
use replicator_common::api::own::WAIT_MAX_SECONDS;
use replicator_common::control::{Control, ControlError, Patience};
use replicator_common::id::FileSystemId;
use replicator_common::status::{Counters, ReplicationStatus, Shortfalls, Skipped, Status};
use replicator_common::stop::Stop;
use replicator_common::time::Timestamp;
use serde::Serialize;

use super::display::Display;
use super::follow::{PERIOD, find};
use crate::exit::print;
use crate::words::several;

/// Between looks at whether the initial sync is through. Short: it is all that
/// a small tree takes.
const LOOK: Duration = Duration::from_millis(20);

/// What is printed at the end.
#[derive(Debug, Serialize)]
#[serde(rename_all = "PascalCase")]
struct Summary {
    source_file_system_id: String,
    destination_file_system_id: String,
    status: &'static str,
    /// Seconds since the epoch.
    last_replicated_timestamp: f64,
    /// How long it took.
    seconds: f64,
    /// Objects in the replica.
    objects: Option<u64>,
    counters: Counters,
    skipped: Skipped,
    shortfalls: Shortfalls,
}

/// Returns when all that was done before the end of the initial sync (or,
/// after a restart, of the rescan) is on the replica; an error where it cannot
/// equal the source.
pub fn run(
    control: &Arc<dyn Control>,
    id: &FileSystemId,
    display: &Display,
    stop: &Stop,
) -> anyhow::Result<()> {
    let start = Instant::now();
    wait_enabled(&**control, id, display, stop)?;
    let reached = wait_equal(control, id, display, stop)?;
    let status = find(&**control, id).context("the replication configuration was deleted")?;
    display.clear();
    let summary = summarise(&status, reached, start.elapsed());
    print(&summary)?;
    let unreadable = summary.skipped.unreadable.len() as u64;
    if unreadable > 0 {
        bail!(
            "{} of the source could not be read (see Skipped)",
            several(unreadable, "file", "files")
        );
    }
    Ok(())
}

fn look(
    control: &dyn Control,
    id: &FileSystemId,
    display: &Display,
    stop: &Stop,
) -> anyhow::Result<Status> {
    if stop.requested() {
        bail!("stopped before the replica equalled the source; run it again to go on");
    }
    let status = find(control, id).context("the replication configuration was deleted")?;
    if matches!(status.status, ReplicationStatus::Error | ReplicationStatus::Halted) {
        bail!("{}", status.status_message.as_deref().unwrap_or("replication failed, see the log"));
    }
    display.show(&status);
    Ok(status)
}

fn wait_enabled(
    control: &dyn Control,
    id: &FileSystemId,
    display: &Display,
    stop: &Stop,
) -> anyhow::Result<()> {
    loop {
        match look(control, id, display, stop)?.status {
            ReplicationStatus::Enabled => return Ok(()),
            ReplicationStatus::Paused => {
                bail!("replication is paused: resume it with `replicator resume` while it runs");
            }
            _ => {}
        }
        stop.wait_for(LOOK);
    }
}

fn wait_equal(
    control: &Arc<dyn Control>,
    id: &FileSystemId,
    display: &Display,
    stop: &Stop,
) -> anyhow::Result<Timestamp> {
    let answer = start_wait(control.clone(), id.clone())?;
    loop {
        match answer.recv_timeout(PERIOD) {
            Ok(result) => return Ok(result?),
            Err(RecvTimeoutError::Timeout) => {
                look(&**control, id, display, stop)?;
            }
            Err(RecvTimeoutError::Disconnected) => bail!("the wait for the replica broke off"),
        }
    }
}

/// On a thread of its own, so that a signal is heard meanwhile.
fn start_wait(
    control: Arc<dyn Control>,
    id: FileSystemId,
) -> anyhow::Result<Receiver<Result<Timestamp, ControlError>>> {
    let (sender, receiver) = channel();
    let wait = move || {
        // Nobody listens any more after a signal.
        let patience = Patience::of(Duration::from_secs(WAIT_MAX_SECONDS));
        let _ = sender.send(control.wait(&id, patience));
    };
    std::thread::Builder::new()
        .name("wait".to_owned())
        .spawn(wait)
        .context("cannot start a thread")?;
    Ok(receiver)
}

fn summarise(status: &Status, reached: Timestamp, took: Duration) -> Summary {
    let source = status.source.as_ref();
    let destination = status.destination.as_ref();
    Summary {
        source_file_system_id: status.source_file_system_id.to_string(),
        destination_file_system_id: status.destination_file_system_id.to_string(),
        status: status.status.as_str(),
        last_replicated_timestamp: efs::seconds(reached),
        seconds: took.as_secs_f64(),
        objects: destination.map(|report| report.objects),
        counters: source.map(|report| report.counters.clone()).unwrap_or_default(),
        skipped: source.map(|report| report.skipped.clone()).unwrap_or_default(),
        shortfalls: destination.map(|report| report.shortfalls.clone()).unwrap_or_default(),
    }
}
