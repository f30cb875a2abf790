//! What status says of verification.

use replicator_common::time::Timestamp;
use replicator_common::verification::{Difference, Verification};

use super::render::{Rows, ago, paths};
use crate::words::{bytes, count, several, time};

/// Differences shown.
const DIFFERENCES: usize = 5;

/// Rows of it.
pub(super) fn rows(rows: &mut Rows, now: &Verification, time_now: Timestamp) {
    let mut head = match now.last_verified_timestamp {
        Some(moment) => format!("up to {moment}, {}", ago(moment, time_now)),
        None => "never".to_owned(),
    };
    if let Some(next) = now.next_pass.filter(|_| !now.running) {
        head.push_str(&format!("; next pass in {}", time(next.since(time_now))));
    }
    let mut lines = vec![head];
    if now.running {
        let share = 100.0 * now.objects as f64 / now.objects_expected.max(1) as f64;
        lines.push(format!(
            "pass {} runs: {:.0} %, {} of {}, {}",
            now.pass,
            share.min(100.0),
            count(now.objects),
            several(now.objects_expected, "object", "objects"),
            bytes(now.bytes)
        ));
    }
    lines.extend(now.waiting.as_ref().map(|why| format!("waits: {why}")));
    if now.found() + now.changing + now.read_errors > 0 {
        lines.push(format!(
            "pass {}: {} missing, {} extra, {} content, {} attributes, {} of them repaired; {} changing, {} not readable",
            now.pass,
            count(now.missing),
            count(now.extra),
            count(now.content),
            count(now.attributes),
            count(now.repaired),
            count(now.changing),
            count(now.read_errors)
        ));
    }
    rows.list("verified", lines);
    rows.list(
        "differed",
        now.differences.iter().rev().take(DIFFERENCES).map(|one| difference(one, time_now)),
    );
    rows.list("not verified", paths(&now.errors));
}

fn difference(one: &Difference, now: Timestamp) -> String {
    let path = if one.path.is_empty() { "(the root)" } else { &one.path };
    let word = if one.repaired { "repaired" } else { "NOT REPAIRED" };
    let (kind, source, replica) = (one.kind.as_str(), &one.source, &one.replica);
    format!("{kind} {path}: {source}; replica: {replica}; {word} ({})", ago(one.time, now))
}

#[cfg(test)]
mod tests {
    use super::*;
    use replicator_common::verification::DifferenceKind;

    #[test]
    fn a_pass_in_words() {
        const SECOND: i64 = 1_000_000_000;
        let at = Timestamp(1_795_248_930 * SECOND);
        let text = |now: &Verification| {
            let mut all = Rows(Vec::new());
            rows(&mut all, now, at);
            all.0.join("\n")
        };
        assert_eq!(text(&Verification::default()), "  verified        never");
        let difference = Difference {
            kind: DifferenceKind::Content,
            path: "a/b".to_owned(),
            source: "1 bytes".to_owned(),
            replica: "2 bytes".to_owned(),
            repaired: true,
            time: at.offset(-5 * SECOND),
        };
        let now = Verification {
            last_verified_timestamp: Some(at.offset(-3600 * SECOND)),
            pass: 3,
            running: true,
            objects: 10,
            objects_expected: 40,
            content: 1,
            repaired: 1,
            differences: vec![difference],
            ..Verification::default()
        };
        assert_eq!(
            text(&now),
            "  verified        up to 2026-11-21T07:15:30.000Z, 1 h 0 min ago
                  pass 3 runs: 25 %, 10 of 40 objects, 0 B
                  pass 3: 0 missing, 0 extra, 1 content, 0 attributes, 1 of them repaired; 0 changing, 0 not readable
  differed        CONTENT a/b: 1 bytes; replica: 2 bytes; repaired (5.0 s ago)"
        );
    }
}
