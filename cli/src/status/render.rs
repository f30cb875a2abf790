//! A status as a page of text. Pure: the time is an argument.

use std::time::Duration;

use replicator_common::api::efs::last_replicated;
use replicator_common::status::{
    Blocker, DestinationReport, EnforcementKind, Link, PathError, Progress, SourceReport, Status,
};
use replicator_common::time::Timestamp;

use super::verified;
use crate::exit::shown;
use crate::words::{bytes, count, rate, seconds, several, time};

/// A report of the other side is called old after this.
const OLD: Duration = Duration::from_secs(10);
/// Paths shown of a longer list.
const PATHS: usize = 5;

/// Every configuration.
pub fn page(all: &[Status], now: Timestamp) -> String {
    if all.is_empty() {
        return "no replication configuration here".to_owned();
    }
    all.iter().map(|status| one(status, now)).collect::<Vec<_>>().join("\n\n")
}

/// Rows of a label and a value; a row without a label continues the last.
pub(super) struct Rows(pub(super) Vec<String>);

impl Rows {
    pub(super) fn add(&mut self, label: &str, value: impl AsRef<str>) {
        let row = format!("  {label:<15} {}", shown(value.as_ref()));
        self.0.push(row.trim_end().to_owned());
    }

    /// One row a value, the first with the label.
    pub(super) fn list(&mut self, label: &str, values: impl IntoIterator<Item = String>) {
        for (at, value) in values.into_iter().enumerate() {
            self.add(if at == 0 { label } else { "" }, value);
        }
    }
}

fn one(status: &Status, now: Timestamp) -> String {
    let word = status.status.as_str();
    let head = match &status.status_message {
        Some(message) => format!("{word}: {message}"),
        None => word.to_owned(),
    };
    let mut rows = Rows(vec![format!(
        "{} → {}  {}",
        status.source_file_system_id,
        status.destination_file_system_id,
        shown(&head)
    )]);
    let (source, destination) = (status.source.as_ref(), status.destination.as_ref());
    rows.add("source", place(source.map(|s| (s.path.as_str(), s.time)), now));
    rows.add("replica", place(destination.map(|d| (d.path.as_str(), d.time)), now));
    rows.add("since", status.creation_time.to_rfc3339());
    watermark(&mut rows, status, now);
    if let Some(source) = source {
        changes(&mut rows, source);
    }
    if let Some(destination) = destination {
        replica(&mut rows, destination);
    }
    if let Some(source) = source {
        verified::rows(&mut rows, &source.verification, now);
    }
    // The other side's word is of a time when there was a connection.
    let links = [source.map(|s| &s.link), destination.map(|d| &d.link)];
    let links = || links.into_iter().flatten();
    if let Some(link) = links().find(|link| !link.connected).or(links().next()) {
        rows.add("link", connection(link, now));
    }
    let errors = [
        ("source error", source.and_then(|s| s.last_error.as_ref())),
        ("replica error", destination.and_then(|d| d.last_error.as_ref())),
    ];
    for (label, error) in errors {
        if let Some(error) = error {
            rows.add(label, format!("{} ({})", error.error, ago(error.time, now)));
        }
    }
    rows.0.join("\n")
}

fn place(report: Option<(&str, Timestamp)>, now: Timestamp) -> String {
    match report {
        None => "never heard of".to_owned(),
        Some((path, made)) if now.since(made) > OLD => {
            format!("{path} (last heard of {}; what stands here of it is as old)", ago(made, now))
        }
        Some((path, _)) => path.to_owned(),
    }
}

pub(crate) fn ago(then: Timestamp, now: Timestamp) -> String {
    format!("{} ago", time(now.since(then)))
}

/// What is replicated, and what holds it up.
fn watermark(rows: &mut Rows, status: &Status, now: Timestamp) {
    let replicated = match (last_replicated(status), &status.source, &status.destination) {
        (None, ..) => "nothing is promised before the initial sync is done".to_owned(),
        // On the clock that made it, unless that is the clock of long ago.
        (Some(moment), Some(source), _)
            if source.watermark == moment && now.since(source.time) <= OLD =>
        {
            format!("every change before {moment}, {} ago", time(source.time.since(moment)))
        }
        (Some(moment), _, Some(DestinationReport { time_since_last_sync: Some(age), .. })) => {
            format!("every change before {moment}, {} ago", seconds(*age))
        }
        (Some(moment), ..) => format!("every change before {moment}"),
    };
    rows.add("replicated", replicated);
    if let Some(moment) = status.destination.as_ref().and_then(|d| d.last_consistent) {
        rows.add("consistent", format!("equal to the source as of {moment}"));
    }
    if let Some(source) = &status.source {
        rows.list("blocked by", source.blocked_by.iter().map(|b| blocker(b, source.time)));
        if let Some(progress) = &source.progress {
            rows.add("progress", self::progress(progress));
        }
    }
}

fn blocker(blocker: &Blocker, now: Timestamp) -> String {
    let mut text = blocker.reason.clone();
    if let Some(path) = &blocker.path {
        text.push_str(&format!(" {path}"));
    }
    if let Some(left) = blocker.bytes_left {
        text.push_str(&format!(", {} left", bytes(left)));
    }
    text.push_str(&format!(", for {}", time(now.since(blocker.since))));
    text
}

/// Progress in one line.
pub fn progress(progress: &Progress) -> String {
    let so_far = if progress.walk_complete { "" } else { " found so far" };
    let left = match progress.seconds_left {
        Some(left) => format!("{} left", seconds(left)),
        None => "time left unknown".to_owned(),
    };
    format!(
        "{} of {} files, {} of {}{so_far}, {}/s, {} files/s, {left}",
        count(progress.objects_done),
        count(progress.objects_found),
        bytes(progress.bytes_done),
        bytes(progress.bytes_found),
        bytes(rate(progress.bytes_per_second)),
        count(rate(progress.objects_per_second)),
    )
}

/// The source's half.
fn changes(rows: &mut Rows, source: &SourceReport) {
    rows.add(
        "backlog",
        format!(
            "{}, stores {}",
            several(source.backlog_records, "record", "records"),
            bytes(source.store_bytes)
        ),
    );
    let (p, lag) = (&source.positions, &source.lag);
    rows.list(
        "positions",
        [
            format!("captured  {}", p.captured),
            format!("journaled {}, {} behind", p.journaled, seconds(lag.journaled)),
            format!("shipped   {}, {} behind", p.shipped, seconds(lag.shipped)),
            format!("durable   {}, {} behind", p.durable, seconds(lag.durable)),
            format!("applied   {}, {} behind", p.applied, seconds(lag.applied)),
        ],
    );
    let watches = match source.watcher.watches {
        Some(watches) => format!(", {}", several(watches, "watch", "watches")),
        None => String::new(),
    };
    let watcher = &source.watcher;
    rows.add("watcher", format!("{} ({}){watches}", watcher.kind.as_str(), watcher.reason));
    rows.list("doubts", watcher.doubts.iter().cloned());
    traffic(rows, source);
    skipped(rows, source);
}

fn traffic(rows: &mut Rows, source: &SourceReport) {
    let counters = &source.counters;
    let ratio = if counters.bytes_changed == 0 {
        String::new()
    } else {
        let ratio = counters.bytes_shipped as f64 / counters.bytes_changed as f64;
        format!(" (shipped ÷ changed: {ratio:.3})")
    };
    rows.list(
        "traffic",
        [
            format!(
                "{} changed, {} shipped{ratio}, {} on the wire",
                bytes(counters.bytes_changed),
                bytes(counters.bytes_shipped),
                bytes(counters.bytes_wired)
            ),
            format!(
                "{}, {}, {}",
                several(counters.events, "event", "events"),
                several(counters.records, "record", "records"),
                several(counters.objects_shipped, "object shipped", "objects shipped")
            ),
            format!(
                "{}, {} of them exact; {}, {}, {}",
                several(counters.batches, "batch", "batches"),
                count(counters.exact_batches),
                several(counters.gaps, "gap", "gaps"),
                several(counters.rescans, "rescan", "rescans"),
                several(counters.sessions, "session", "sessions")
            ),
        ],
    );
}

fn skipped(rows: &mut Rows, source: &SourceReport) {
    let skipped = &source.skipped;
    let kinds = [
        (skipped.sockets, "socket", "sockets"),
        (skipped.fifos, "FIFO", "FIFOs"),
        (skipped.devices, "device node (see --devices)", "device nodes (see --devices)"),
    ];
    let mut lines: Vec<String> = kinds
        .into_iter()
        .filter(|(number, ..)| *number > 0)
        .map(|(number, one, many)| several(number, one, many))
        .collect();
    lines.extend(
        skipped
            .nested_mounts
            .iter()
            .map(|path| format!("{path}: another file system, not entered")),
    );
    rows.list("skipped", lines);
    rows.list("not readable", paths(&skipped.unreadable));
}

/// The destination's half.
fn replica(rows: &mut Rows, report: &DestinationReport) {
    let word = match report.enforcement.kind {
        EnforcementKind::Mount => "by mount",
        EnforcementKind::Permissions => "BY PERMISSIONS ONLY",
        EnforcementKind::None => "NOT ENFORCED",
    };
    rows.add("read-only", format!("{word} ({})", report.enforcement.reason));
    rows.add(
        "held",
        format!(
            "{}, {} staged, {} being moved; batch {} durable, {} applied",
            several(report.objects, "object", "objects"),
            bytes(report.staged_bytes),
            count(report.orphans),
            report.durable,
            report.applied
        ),
    );
    if let Some(reason) = &report.stalled {
        rows.add("STALLED", reason);
    }
    let abilities = &report.abilities;
    let lacking: Vec<&str> = [
        (abilities.chown, "owners"),
        (abilities.xattrs, "xattrs"),
        (abilities.privileged_xattrs, "privileged xattrs"),
        (abilities.devices, "device nodes"),
        (abilities.handles, "file handles"),
    ]
    .into_iter()
    .filter_map(|(able, name)| (!able).then_some(name))
    .collect();
    if !lacking.is_empty() {
        rows.add("cannot hold", lacking.join(", "));
    }
    let shortfalls = &report.shortfalls;
    let lost: Vec<String> = [
        (shortfalls.ownership, "owner or group"),
        (shortfalls.mode, "mode"),
        (shortfalls.xattrs, "xattrs"),
        (shortfalls.devices, "device node"),
        (shortfalls.times, "times"),
    ]
    .into_iter()
    .filter(|(number, _)| *number > 0)
    .map(|(number, what)| format!("{what} of {}", several(number, "object", "objects")))
    .collect();
    rows.list("NOT HELD", lost);
    rows.list("", paths(&shortfalls.examples));
}

fn connection(link: &Link, now: Timestamp) -> String {
    let since = time(now.since(link.since));
    let mut text = if link.connected {
        format!("connected with {} for {since}", link.peer)
    } else {
        format!("NOT CONNECTED with {} for {since}", link.peer)
    };
    if let Some(micros) = link.round_trip_micros {
        text.push_str(&format!(", round trip {:.1} ms", micros as f64 / 1e3));
    }
    if let Some(nanos) = link.clock_offset_nanos {
        text.push_str(&format!(", replica's clock {:+.1} ms", nanos as f64 / 1e6));
    }
    if let Some(error) = link.last_error.as_ref().filter(|_| !link.connected) {
        text.push_str(&format!(": {error}"));
    }
    if let Some(next) = link.next_attempt.filter(|_| !link.connected) {
        text.push_str(&match next.since(now) {
            Duration::ZERO => "; trying now".to_owned(),
            wait => format!("; next attempt in {}", time(wait)),
        });
    }
    text
}

pub(super) fn paths(all: &[PathError]) -> Vec<String> {
    let mut lines: Vec<String> =
        all.iter().rev().take(PATHS).map(|one| format!("{}: {}", one.path, one.error)).collect();
    if all.len() > PATHS {
        lines.push(format!("… and {} more, see --json", count((all.len() - PATHS) as u64)));
    }
    lines
}

#[cfg(test)]
mod tests;
