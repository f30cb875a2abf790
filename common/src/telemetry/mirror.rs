//! Status as gauges, set at each scrape.
//!
//! Each side tells what it knows at first hand: the other half of a status is
//! the peer's last report, which may be old.

use super::series::{Series, Side};
use crate::status::{
    DesiredState, DestinationReport, Link, Progress, ReplicationStatus, SourceReport, StageLag,
    Status,
};
use crate::time::Timestamp;
use crate::verification::Verification;

const STATUSES: [ReplicationStatus; 7] = [
    ReplicationStatus::Enabling,
    ReplicationStatus::Enabled,
    ReplicationStatus::Pausing,
    ReplicationStatus::Paused,
    ReplicationStatus::Deleting,
    ReplicationStatus::Error,
    ReplicationStatus::Halted,
];

/// What an object counts, beside its bytes, in how much of a sync is done.
const OBJECT_BYTES: f64 = 4096.0;

/// Sets the gauges of every configuration in the present recorder.
pub fn set(all: &[Status], sides: &[Side], now: Timestamp) {
    for status in all {
        let series = Series::of(status);
        for side in sides {
            standing(status, *side, &series.with("side", side.as_str()));
            match (side, &status.source, &status.destination) {
                (Side::Source, Some(report), _) => {
                    source(report, &series, now);
                }
                (Side::Destination, _, Some(report)) => destination(report, &series),
                _ => {}
            }
        }
    }
}

/// Sets those of the daemon.
pub fn set_daemon(configurations: usize, sides: &[Side], state_bytes: u64) {
    for side in sides {
        metrics::gauge!(
            "replicator_build_info",
            "version" => env!("CARGO_PKG_VERSION"),
            "side" => side.as_str()
        )
        .set(1.0);
    }
    metrics::gauge!("replicator_configurations").set(configurations as f64);
    metrics::gauge!("replicator_state_directory_bytes").set(state_bytes as f64);
}

/// What both sides can say.
fn standing(status: &Status, side: Side, series: &Series) {
    for word in STATUSES {
        let one = series.with("status", word.as_str());
        one.set("replicator_status", flag(status.status == word));
    }
    series.set("replicator_halted", flag(status.status == ReplicationStatus::Halted));
    series.set("replicator_created_timestamp_seconds", status.creation_time.as_seconds());
    match side {
        Side::Source => {
            if let Some(report) = &status.source {
                link(&report.link, series);
            }
        }
        Side::Destination => {
            if let Some(report) = &status.destination {
                link(&report.link, series);
                let seconds = |moment: Option<Timestamp>| moment.map(Timestamp::as_seconds);
                series.set_some(
                    "replicator_last_replicated_timestamp_seconds",
                    seconds(report.last_replicated),
                );
                series.set_some(
                    "replicator_last_consistent_timestamp_seconds",
                    seconds(report.last_consistent),
                );
                series.set_some(
                    "replicator_time_since_last_sync_seconds",
                    report.time_since_last_sync,
                );
            }
        }
    }
}

fn link(link: &Link, series: &Series) {
    series.set("replicator_connection_up", flag(link.connected));
    series.set("replicator_connection_changed_timestamp_seconds", link.since.as_seconds());
    let micros = link.round_trip_micros.filter(|_| link.connected);
    series.set_some(
        "replicator_connection_round_trip_seconds",
        micros.map(|micros| micros as f64 / 1e6),
    );
    series.set_some(
        "replicator_clock_offset_seconds",
        link.clock_offset_nanos.map(|nanos| nanos as f64 / 1e9),
    );
}

fn source(report: &SourceReport, series: &Series, now: Timestamp) {
    source_watermark(report, &series.with("side", Side::Source.as_str()), now);
    let info =
        series.with("path", report.path.clone()).with("watcher", report.watcher.kind.as_str());
    info.set("replicator_source_info", 1.0);
    series.set("replicator_source_watcher_doubts", report.watcher.doubts.len() as f64);
    series.set_some("replicator_source_watches", report.watcher.watches.map(|n| n as f64));
    series.set("replicator_source_report_timestamp_seconds", report.time.as_seconds());
    series.set("replicator_source_paused", flag(report.desired == DesiredState::Paused));
    stages(report, series);
    backlog(report, series);
    skipped(report, series);
    series.set("replicator_source_store_bytes", report.store_bytes as f64);
    progress(report.progress.as_ref(), series);
    counters(report, series);
    verification(&report.verification, series);
}

/// Against this moment, not against the report's: it goes on growing when the
/// engine does not.
fn source_watermark(report: &SourceReport, series: &Series, now: Timestamp) {
    if report.watermark == Timestamp::NEVER {
        return;
    }
    series.set("replicator_last_replicated_timestamp_seconds", report.watermark.as_seconds());
    let behind = now.since(report.watermark).as_secs_f64();
    series.set("replicator_time_since_last_sync_seconds", behind);
}

fn stages(report: &SourceReport, series: &Series) {
    let StageLag { journaled, shipped, durable, applied } = report.lag;
    let positions = &report.positions;
    let stages = [
        ("captured", positions.captured, None),
        ("journaled", positions.journaled, Some(journaled)),
        ("shipped", positions.shipped, Some(shipped)),
        ("durable", positions.durable, Some(durable)),
        ("applied", positions.applied, Some(applied)),
    ];
    for (stage, position, waiting) in stages {
        let series = series.with("stage", stage);
        series.set("replicator_source_position", position.0 as f64);
        series.set_some("replicator_source_oldest_waiting_seconds", waiting);
    }
}

fn backlog(report: &SourceReport, series: &Series) {
    let large: u64 = report.blocked_by.iter().filter_map(|blocker| blocker.bytes_left).sum();
    let walk = report
        .progress
        .as_ref()
        .map_or(0, |progress| progress.bytes_found.saturating_sub(progress.bytes_done));
    series.set("replicator_source_backlog_records", report.backlog_records as f64);
    // What a walk counted has the large files in it.
    series.set("replicator_source_backlog_bytes", large.max(walk) as f64);
    series.set("replicator_source_blockers", report.blocked_by.len() as f64);
    let since = report.blocked_by.iter().map(|blocker| blocker.since).min();
    series.set_some(
        "replicator_source_blocked_since_timestamp_seconds",
        since.map(Timestamp::as_seconds),
    );
}

fn skipped(report: &SourceReport, series: &Series) {
    let skipped = &report.skipped;
    let kinds = [
        ("socket", skipped.sockets),
        ("fifo", skipped.fifos),
        ("device", skipped.devices),
        ("mount", skipped.nested_mounts.len() as u64),
        ("unreadable", skipped.unreadable.len() as u64),
    ];
    for (kind, objects) in kinds {
        series.with("kind", kind).set("replicator_source_skipped_objects", objects as f64);
    }
}

fn progress(progress: Option<&Progress>, series: &Series) {
    series.set("replicator_source_sync_running", flag(progress.is_some()));
    let Some(progress) = progress else { return };
    let weigh = |objects: u64, bytes: u64| objects as f64 * OBJECT_BYTES + bytes as f64;
    let found = weigh(progress.objects_found, progress.bytes_found);
    let done = weigh(progress.objects_done, progress.bytes_done);
    let ratio = if found > 0.0 { (done / found).min(1.0) } else { 0.0 };
    series.set("replicator_source_sync_complete_ratio", ratio);
    for (state, objects, bytes) in [
        ("found", progress.objects_found, progress.bytes_found),
        ("done", progress.objects_done, progress.bytes_done),
    ] {
        let series = series.with("state", state);
        series.set("replicator_source_sync_objects", objects as f64);
        series.set("replicator_source_sync_bytes", bytes as f64);
    }
    series.set_some("replicator_source_sync_remaining_seconds", progress.seconds_left);
}

fn counters(report: &SourceReport, series: &Series) {
    let counters = &report.counters;
    series.total("replicator_source_events_total", counters.events);
    series.total("replicator_source_journal_records_total", counters.records);
    let fuzzy = counters.batches.saturating_sub(counters.exact_batches);
    for (exactness, batches) in [("exact", counters.exact_batches), ("fuzzy", fuzzy)] {
        series.with("exactness", exactness).total("replicator_source_batches_total", batches);
    }
    series.total("replicator_source_shipped_objects_total", counters.objects_shipped);
    series.total("replicator_source_shipped_bytes_total", counters.bytes_shipped);
    series.total("replicator_source_changed_bytes_total", counters.bytes_changed);
    series.total("replicator_source_wired_bytes_total", counters.bytes_wired);
    series.total("replicator_source_sessions_total", counters.sessions);
    series.total("replicator_source_gaps_total", counters.gaps);
    series.total("replicator_source_rescans_total", counters.rescans);
}

fn verification(verification: &Verification, series: &Series) {
    let seconds = |moment: Option<Timestamp>| moment.map(Timestamp::as_seconds);
    series.set_some(
        "replicator_source_last_verified_timestamp_seconds",
        seconds(verification.last_verified_timestamp),
    );
    series.set_some(
        "replicator_source_next_verification_timestamp_seconds",
        seconds(verification.next_pass),
    );
    series.set("replicator_source_verification_running", flag(verification.running));
    for (state, objects) in [
        ("expected", verification.objects_expected),
        ("compared", verification.objects),
        ("changing", verification.changing),
        ("unreadable", verification.read_errors),
        ("repaired", verification.repaired),
    ] {
        let series = series.with("state", state);
        series.set("replicator_source_verification_objects", objects as f64);
    }
    series.set("replicator_source_verification_bytes", verification.bytes as f64);
    for (kind, found) in verification.by_kind() {
        let series = series.with("kind", kind.as_str());
        series.set("replicator_source_verification_differences", found as f64);
    }
}

fn destination(report: &DestinationReport, series: &Series) {
    let enforcement = match report.enforcement.kind {
        crate::status::EnforcementKind::Mount => "mount",
        crate::status::EnforcementKind::Permissions => "permissions",
        crate::status::EnforcementKind::None => "none",
    };
    let info = series.with("path", report.path.clone()).with("read_only", enforcement);
    info.set("replicator_destination_info", 1.0);
    series.set("replicator_destination_stalled", flag(report.stalled.is_some()));
    series.set("replicator_destination_objects", report.objects as f64);
    series.set("replicator_destination_orphans", report.orphans as f64);
    let shortfalls = &report.shortfalls;
    for (attribute, objects) in [
        ("ownership", shortfalls.ownership),
        ("mode", shortfalls.mode),
        ("xattrs", shortfalls.xattrs),
        ("devices", shortfalls.devices),
        ("times", shortfalls.times),
    ] {
        let series = series.with("attribute", attribute);
        series.set("replicator_destination_shortfalls", objects as f64);
    }
    series.set("replicator_destination_staged_bytes", report.staged_bytes as f64);
    series.set("replicator_destination_arriving_files", report.arriving.len() as f64);
    let arriving: u64 = report.arriving.iter().map(|file| file.bytes).sum();
    series.set("replicator_destination_arriving_bytes", arriving as f64);
    for (stage, batch) in [("durable", report.durable), ("applied", report.applied)] {
        series.with("stage", stage).set("replicator_destination_batch", batch.0 as f64);
    }
}

fn flag(value: bool) -> f64 {
    f64::from(u8::from(value))
}
