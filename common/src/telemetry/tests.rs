use std::collections::BTreeSet;

use super::*;
use crate::api::fake::{id, status};
use crate::status::ReplicationStatus;

const SECOND: i64 = 1_000_000_000;

fn page(all: &[Status], now: Timestamp) -> String {
    let state = tempfile::tempdir().unwrap();
    Page::new(&[Side::Source, Side::Destination], state.path()).render(all, now)
}

/// The value of the only series whose line begins with `name` and has all of
/// `labels`.
fn value(page: &str, name: &str, labels: &[&str]) -> Option<f64> {
    let found: Vec<&str> = page
        .lines()
        .filter(|line| {
            line.strip_prefix(name).is_some_and(|rest| rest.starts_with(['{', ' ']))
                && labels.iter().all(|label| line.contains(label))
        })
        .collect();
    assert!(found.len() <= 1, "{name} {labels:?}: {found:?}");
    found.first().map(|line| line.rsplit(' ').next().unwrap().parse().unwrap())
}

#[test]
fn a_stalled_daemon_does_not_look_well() {
    let mut one = status(1);
    let report = one.source.as_mut().unwrap();
    report.watermark = Timestamp(100 * SECOND);
    report.time = Timestamp(101 * SECOND);
    let behind = |now: i64| {
        let page = page(std::slice::from_ref(&one), Timestamp(now * SECOND));
        value(&page, "replicator_time_since_last_sync_seconds", &["side=\"source\""])
    };
    assert_eq!(behind(102), Some(2.0));
    // The report has stayed as it was; the lag has not.
    assert_eq!(behind(3700), Some(3600.0));
}

#[test]
fn before_the_initial_sync_is_through_nothing_is_claimed() {
    let page = page(&[status(1)], Timestamp(5 * SECOND));
    assert!(!page.contains("replicator_time_since_last_sync_seconds"), "{page}");
    assert!(!page.contains("replicator_last_replicated_timestamp_seconds"));
    let labels = ["side=\"source\"", "status=\"ENABLING\""];
    assert_eq!(value(&page, "replicator_status", &labels), Some(1.0));
    assert_eq!(value(&page, "replicator_halted", &["side=\"source\""]), Some(0.0));
}

#[test]
fn a_halt_shows() {
    let mut one = status(1);
    one.status = ReplicationStatus::Halted;
    let page = page(&[one], Timestamp(0));
    let of = |word: &str| {
        value(&page, "replicator_status", &["side=\"source\"", &format!("status=\"{word}\"")])
    };
    assert_eq!((of("HALTED"), of("ENABLING")), (Some(1.0), Some(0.0)));
    assert_eq!(value(&page, "replicator_halted", &["side=\"source\""]), Some(1.0));
}

#[test]
fn of_a_deleted_configuration_nothing_is_left() {
    install();
    let (kept, deleted) = (status(0xa1), status(0xa2));
    for one in [&kept, &deleted] {
        let series = Series::of(one);
        series.counter("replicator_source_halts_total").increment(3);
        series.histogram("replicator_source_batch_seconds").record(0.2);
    }
    let both = page(&[kept.clone(), deleted.clone()], Timestamp(0));
    let label = |one: &Status| format!("{}=\"{}\"", series::SOURCE, one.source_file_system_id);
    for one in [&kept, &deleted] {
        let halts = value(&both, "replicator_source_halts_total", &[&label(one)]);
        assert_eq!(halts, Some(3.0));
    }
    let one = page(std::slice::from_ref(&kept), Timestamp(0));
    assert!(!one.contains(deleted.source_file_system_id.as_str()), "{one}");
    assert!(one.contains(&label(&kept)));
    let labels = [label(&kept), "le=\"0.25\"".to_owned()];
    let bucket = value(&one, "replicator_source_batch_seconds_bucket", &[&labels[0], &labels[1]]);
    assert_eq!(bucket, Some(1.0));
    // The source in another configuration, with another replica.
    let another = Status { destination_file_system_id: id(0xa3), ..kept.clone() };
    let again = page(std::slice::from_ref(&another), Timestamp(0));
    assert!(!again.contains(kept.destination_file_system_id.as_str()), "{again}");
    let none = page(&[], Timestamp(0));
    assert!(!none.contains(id(0xa1).as_str()));
    assert_eq!(value(&none, "replicator_configurations", &[]), Some(0.0));
}

#[test]
fn every_metric_is_described_once_and_before_its_values() {
    install();
    let page = page(&[status(1)], Timestamp(0));
    let mut described = BTreeSet::new();
    let mut family = String::new();
    for line in page.lines() {
        if let Some(rest) = line.strip_prefix("# TYPE ") {
            family = rest.split(' ').next().unwrap().to_owned();
            assert!(described.insert(family.clone()), "{family} comes twice");
            assert!(!catalogue::help(&family).is_empty(), "{family} is not in the catalogue");
        } else if !line.starts_with('#') {
            assert!(line.starts_with(&family), "{line:?} stands under {family}");
        }
    }
    assert!(described.contains("process_cpu_seconds_total"));
}

#[test]
fn labels_are_quoted() {
    let mut one = status(1);
    one.source.as_mut().unwrap().path = "/a \"b\"\nc\\d".to_owned();
    let page = page(&[one], Timestamp(0));
    let line = page.lines().find(|line| line.starts_with("replicator_source_info{")).unwrap();
    assert!(line.contains(r#"path="/a \"b\"\nc\\d","#), "{line}");
}

#[test]
fn names_follow_the_conventions() {
    let mut seen = BTreeSet::new();
    for metric in catalogue::METRICS {
        let name = metric.name;
        assert!(seen.insert(name), "{name} is listed twice");
        assert!(name.starts_with("replicator_") || name.starts_with("process_"), "{name}");
        assert!(name.bytes().all(|b| b.is_ascii_lowercase() || b == b'_'), "{name}");
        let is_counter = metric.kind == catalogue::Kind::Counter;
        assert_eq!(is_counter, name.ends_with("_total"), "{name}");
        for unit in ["_ms", "_millis", "_micros", "_nanos", "_kib", "_mib", "_percent"] {
            assert!(!name.contains(unit), "{name} is in no base unit");
        }
        assert!(metric.help.ends_with('.'), "{name}");
    }
}

/// Documentation, alert rules and dashboard name all of them, or at least no
/// others.
#[test]
fn what_is_written_of_metrics_is_true() {
    let known: BTreeSet<&str> = catalogue::METRICS.iter().map(|metric| metric.name).collect();
    let documented = named(include_str!("../../../docs/monitoring.md"));
    for name in &known {
        assert!(documented.contains(*name), "docs/monitoring.md lacks {name}");
    }
    let rules = named(include_str!("../../../deploy/prometheus/alerts.yaml"));
    let dashboard = named(include_str!("../../../deploy/grafana/replicator.json"));
    for (file, names) in
        [("docs/monitoring.md", documented), ("alerts.yaml", rules), ("replicator.json", dashboard)]
    {
        assert!(!names.is_empty(), "{file}");
        for name in names {
            assert!(known.contains(base(&name, &known)), "{file} names {name}, which there is not");
        }
    }
}

/// What a text has that looks like a metric of ours.
fn named(text: &str) -> BTreeSet<String> {
    text.split(|c: char| !c.is_ascii_alphanumeric() && c != '_')
        .filter(|word| word.starts_with("replicator_") || word.starts_with("process_"))
        .map(str::to_owned)
        .collect()
}

/// Without what a histogram's series end in.
fn base<'a>(name: &'a str, known: &BTreeSet<&str>) -> &'a str {
    ["_bucket", "_sum", "_count"]
        .iter()
        .filter_map(|suffix| name.strip_suffix(suffix))
        .find(|stem| known.contains(stem))
        .unwrap_or(name)
}
