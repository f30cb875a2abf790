use super::super::fake::{destination, id, status};
use super::*;

const SECOND: i64 = 1_000_000_000;
const START: Timestamp = Timestamp(1_795_248_930 * SECOND);

fn at(seconds: i64) -> Timestamp {
    START.offset(seconds * SECOND)
}

/// The source reported `seconds` after the start, and had shipped `bytes`.
fn reported(seconds: i64, bytes: u64) -> Status {
    let mut status = status(1);
    let source = status.source.as_mut().unwrap();
    source.time = at(seconds);
    source.watermark = at(seconds - 2);
    source.counters.bytes_shipped = bytes;
    source.counters.records = bytes / 100;
    source.backlog_records = 7;
    status
}

fn samples(history: &History, after: u64) -> Vec<&Sample> {
    history.since(after).remove(&id(1)).unwrap_or_default()
}

fn rates(history: &History) -> Vec<Option<f64>> {
    samples(history, 0).iter().map(|sample| sample.bytes_per_second).collect()
}

#[test]
fn rates_are_differences_of_counters() {
    let mut history = History::default();
    for (seconds, bytes) in [(0, 500), (5, 1500), (5, 1500), (15, 3500), (20, 0), (30, 100)] {
        history.take(&[reported(seconds, bytes)], at(seconds));
    }
    // No word of the source is no rate, and not zero; nor is a source that counts anew.
    assert_eq!(rates(&history), [None, Some(200.0), None, Some(200.0), None, Some(10.0)]);
    let second = samples(&history, 1)[0];
    assert_eq!(second.records_per_second, Some(2.0));
    assert_eq!((second.lag, second.backlog), (Some(2.0), Some(7)));
    assert_eq!(serde_json::to_string(second).unwrap(), "[1795248935000,2.0,200.0,2.0,7]");
}

#[test]
fn an_hour_is_kept_and_what_is_gone_is_not() {
    let mut history = History::default();
    for sample in 0..SAMPLES_MAX as i64 + 10 {
        history.take(&[reported(5 * sample, 0), status(2)], at(5 * sample));
    }
    let times: Vec<_> = samples(&history, 0).iter().map(|sample| sample.time).collect();
    assert_eq!(times.len(), SAMPLES_MAX);
    assert_eq!((times[0], times[SAMPLES_MAX - 1]), (at(50), at(5 * (SAMPLES_MAX as i64 + 9))));
    assert_eq!(samples(&history, history.taken() - 2).len(), 2);
    assert_eq!(samples(&history, history.taken()).len(), 0);
    history.take(&[status(2)], at(0));
    assert_eq!(samples(&history, 0).len(), 0);
    assert_eq!(history.rings.len(), 1);
}

#[test]
fn lag_is_told_on_one_clock_and_grows_while_nobody_is_heard() {
    let mut now = reported(0, 0);
    assert_eq!(lag(&now, at(1)), Some(2.0));
    // The source is dead: the destination knows how old its watermark is.
    let mut report = destination();
    report.time = at(60);
    report.last_replicated = Some(at(-2));
    report.time_since_last_sync = Some(63.0);
    now.destination = Some(report);
    assert_eq!(lag(&now, at(60)), Some(63.0));
    // Neither has been heard of lately.
    assert_eq!(lag(&now, at(70)), Some(73.0));
    now.destination = None;
    assert_eq!(lag(&now, at(70)), Some(72.0));
    // Nothing is promised yet.
    assert_eq!(lag(&status(1), START), None);
}
