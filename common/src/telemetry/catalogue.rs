//! Every metric: its name, its kind, what it says. The one list of them; that
//! docs/monitoring.md, the alert rules and the dashboard name these and no
//! others is tested.
//!
//! Labels: where it says *configuration*, `source_file_system_id` and
//! `destination_file_system_id`; where it says *side*, `side` as well, `source`
//! or `destination`, the end that speaks.

use metrics::Unit;

/// What can be done with a metric's values.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Kind {
    /// Grows, and begins at 0 anew with the process.
    Counter,
    /// Is what it is.
    Gauge,
    /// Counts values by these upper bounds.
    Histogram(&'static [f64]),
}

/// A metric.
#[derive(Clone, Copy, Debug)]
pub struct Metric {
    /// Its name, the unit in it.
    pub name: &'static str,
    /// Its kind.
    pub kind: Kind,
    /// What it says, for people.
    pub help: &'static str,
}

/// From a millisecond to an hour.
const SECONDS: &[f64] = &[
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0,
    300.0, 900.0, 3600.0,
];
/// From one thing to a hundred thousand.
const THINGS: &[f64] = &[1.0, 10.0, 100.0, 1000.0, 10_000.0, 100_000.0];

const fn counter(name: &'static str, help: &'static str) -> Metric {
    Metric { name, kind: Kind::Counter, help }
}

const fn gauge(name: &'static str, help: &'static str) -> Metric {
    Metric { name, kind: Kind::Gauge, help }
}

const fn seconds(name: &'static str, help: &'static str) -> Metric {
    Metric { name, kind: Kind::Histogram(SECONDS), help }
}

const fn things(name: &'static str, help: &'static str) -> Metric {
    Metric { name, kind: Kind::Histogram(THINGS), help }
}

/// All of them.
#[rustfmt::skip]
pub const METRICS: &[Metric] = &[
    // ------------------------------------------------------------- the daemon
    gauge("replicator_build_info", "Always 1; the program's version and the side that the daemon is are labels."),
    gauge("replicator_configurations", "Replication configurations of this daemon."),
    gauge("replicator_state_directory_bytes", "What the daemon's state directory (journal, index, commit log) takes on disk."),
    counter("process_cpu_seconds_total", "CPU time of the process, user and system."),
    gauge("process_threads", "Threads of the process."),
    gauge("process_start_time_seconds", "When the process began, seconds since the epoch."),
    gauge("process_virtual_memory_bytes", "Address space of the process."),
    gauge("process_resident_memory_bytes", "Memory of the process."),
    gauge("process_open_fds", "Open descriptors of the process."),
    gauge("process_max_fds", "Descriptors that the process may open."),
    // -------------------------------------------------- either side of each configuration
    gauge("replicator_status", "1 for the status that the configuration has on this side, 0 for all others; the status is a label."),
    gauge("replicator_halted", "1 while replication has halted: many deletions, or a source that is not there."),
    gauge("replicator_created_timestamp_seconds", "When the configuration was made, seconds since the epoch."),
    gauge("replicator_last_replicated_timestamp_seconds", "Every change on the source before this moment (source's clock, seconds since the epoch) is on the replica; absent until the initial sync is through."),
    gauge("replicator_last_consistent_timestamp_seconds", "The instant of the source (seconds since the epoch) that the last exact batch equals; absent before the first."),
    gauge("replicator_time_since_last_sync_seconds", "How far the replica is behind at the time of the scrape; absent until the initial sync is through."),
    gauge("replicator_connection_up", "1 while the two sides are connected."),
    gauge("replicator_connection_changed_timestamp_seconds", "When the connection last came or went, seconds since the epoch."),
    gauge("replicator_connection_round_trip_seconds", "Round trip between the two sides; absent while there is no connection."),
    gauge("replicator_clock_offset_seconds", "By how much the destination's clock is ahead of the source's; absent while not known."),
    counter("replicator_errors_total", "Errors by kind, as this side met them; kinds are listed in docs/monitoring.md."),
    // --------------------------------------------------------------- the source
    gauge("replicator_source_info", "Always 1; the source's path and the kind of watcher are labels."),
    gauge("replicator_source_watcher_doubts", "What the present watcher cannot see or promise; status says it in words."),
    gauge("replicator_source_watches", "Directories and files that are watched one by one, where that has a cost."),
    gauge("replicator_source_report_timestamp_seconds", "When the engine last said how it stands, seconds since the epoch; it does several times a second."),
    gauge("replicator_source_capture_timestamp_seconds", "When the capture thread last asked the kernel for events, seconds since the epoch; it does once a second at least."),
    gauge("replicator_source_barrier_timestamp_seconds", "When it was last proven that every earlier change is in the journal, seconds since the epoch: once a heartbeat while batches may be shipped."),
    gauge("replicator_source_paused", "1 while the operator wants it paused."),
    gauge("replicator_source_oldest_waiting_seconds", "How old the oldest change is that has not passed the stage; 0 when none waits."),
    seconds("replicator_source_lag_seconds", "Of each batch with changes, how long the oldest record in it took from the reading of its event to the stage (journaled: of each flush of the journal)."),
    gauge("replicator_source_position", "Number of the last record of the journal that has passed the stage."),
    gauge("replicator_source_backlog_records", "Records of the journal that are not on the replica."),
    gauge("replicator_source_backlog_bytes", "Content bytes known to wait: of large files, and of what a walk under way has counted. Of changes in the journal the size is not known before they are read."),
    gauge("replicator_source_blockers", "What the watermark waits for: numbers of things; status names them."),
    gauge("replicator_source_blocked_since_timestamp_seconds", "Since when the longest of them blocks, seconds since the epoch; absent when nothing does."),
    gauge("replicator_source_skipped_objects", "Objects that are not replicated, by kind."),
    gauge("replicator_source_store_bytes", "Size of this configuration's journal and index."),
    gauge("replicator_source_sync_running", "1 while an initial sync or a rescan runs."),
    gauge("replicator_source_sync_complete_ratio", "How much of it is done, of 1: objects and bytes, an object counting as 4096 bytes; absent when none runs."),
    gauge("replicator_source_sync_objects", "Objects of the initial sync or rescan under way: found, done."),
    gauge("replicator_source_sync_bytes", "Content bytes of the initial sync or rescan under way: found, done."),
    gauge("replicator_source_sync_remaining_seconds", "Estimated time left; absent while not known."),
    counter("replicator_source_events_total", "Events read from the kernel."),
    counter("replicator_source_journal_records_total", "Records in the journal since the configuration was made."),
    counter("replicator_source_batches_total", "Batches acknowledged, by exactness: exact or fuzzy."),
    counter("replicator_source_shipped_objects_total", "Objects whose state travelled, since the configuration was made."),
    counter("replicator_source_shipped_bytes_total", "Content bytes that travelled, compressed, since the configuration was made."),
    counter("replicator_source_changed_bytes_total", "Content bytes that changed, since the configuration was made."),
    counter("replicator_source_wired_bytes_total", "Bytes of all frames sent."),
    counter("replicator_source_sessions_total", "Sessions opened."),
    counter("replicator_source_gaps_total", "Stretches in which events may have been lost (overflow, downtime, doubt)."),
    counter("replicator_source_rescans_total", "Walks of the source begun: the initial sync, those that close gaps, periodic ones."),
    counter("replicator_source_halts_total", "Times that replication halted."),
    seconds("replicator_source_batch_seconds", "From a batch's commit to its acknowledgement."),
    things("replicator_source_batch_operations", "Operations in a batch."),
    gauge("replicator_source_last_verified_timestamp_seconds", "The source as of this moment (seconds since the epoch) was compared with the replica and found right or put right; absent before the first pass."),
    gauge("replicator_source_next_verification_timestamp_seconds", "When the next pass begins by itself, seconds since the epoch; absent while one runs, and when none does."),
    gauge("replicator_source_verification_running", "1 while a pass runs."),
    gauge("replicator_source_verification_objects", "Objects of the present pass or of the last: expected, compared, changing (passed over), unreadable, repaired."),
    gauge("replicator_source_verification_bytes", "Content bytes compared in the present pass or the last, of one side."),
    gauge("replicator_source_verification_differences", "Differences of the present pass or of the last, by kind."),
    counter("replicator_source_verification_passes_total", "Passes that came to their end."),
    counter("replicator_source_verification_differences_total", "Differences of the passes that came to their end, by kind."),
    // ---------------------------------------------------------- the destination
    gauge("replicator_destination_info", "Always 1; the replica's path and how it is kept read-only are labels."),
    gauge("replicator_destination_stalled", "1 while batches cannot be applied."),
    gauge("replicator_destination_objects", "Objects in the replica."),
    gauge("replicator_destination_orphans", "Objects without a name, which are being moved."),
    gauge("replicator_destination_shortfalls", "Objects with attributes that the replica could not take, by attribute."),
    gauge("replicator_destination_staged_bytes", "Bytes staged and not applied."),
    gauge("replicator_destination_arriving_files", "Large files that are arriving."),
    gauge("replicator_destination_arriving_bytes", "Bytes of them that are staged."),
    gauge("replicator_destination_batch", "Number of the last batch that has passed the stage: durable, applied."),
    counter("replicator_destination_received_bytes_total", "Bytes of data frames received."),
    counter("replicator_destination_staged_objects_total", "Small objects staged."),
    counter("replicator_destination_reused_objects_total", "Small objects that an earlier session had staged, and that did not travel again."),
    counter("replicator_destination_committed_batches_total", "Batches committed: durable, to be applied."),
    counter("replicator_destination_applied_steps_total", "Steps by which batches were applied."),
    seconds("replicator_destination_seal_seconds", "From a whole batch to its being durable."),
    seconds("replicator_destination_sync_seconds", "Calls of syncfs on the replica's file system."),
    seconds("replicator_destination_apply_seconds", "From a durable batch to its being visible in the replica."),
    // ------------------------------------------------------------ notifications
    counter("replicator_notify_events_total", "Events that were to be told, by event; of the daemons only."),
    counter("replicator_notify_delivered_total", "Events delivered, by channel: webhook, command."),
    counter("replicator_notify_failures_total", "Attempts to deliver an event that failed."),
    counter("replicator_notify_dropped_total", "Events dropped: too many waited, or nobody took one for a day."),
    gauge("replicator_notify_pending", "Events that wait to be delivered."),
];

/// What a metric says; empty for one that is not in the list.
pub fn help(name: &str) -> &'static str {
    METRICS.iter().find(|metric| metric.name == name).map_or("", |metric| metric.help)
}

/// Tells the present recorder of all of them.
pub fn describe() {
    for Metric { name, kind, help } in METRICS.iter().copied() {
        let unit = unit(name);
        match kind {
            Kind::Counter => metrics::describe_counter!(name, unit, help),
            Kind::Gauge => metrics::describe_gauge!(name, unit, help),
            Kind::Histogram(_) => metrics::describe_histogram!(name, unit, help),
        }
    }
}

/// As the name says.
fn unit(name: &str) -> Unit {
    let name = name.strip_suffix("_total").unwrap_or(name);
    match name.rsplit('_').next() {
        Some("seconds") => Unit::Seconds,
        Some("bytes") => Unit::Bytes,
        _ => Unit::Count,
    }
}
