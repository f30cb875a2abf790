use std::fs;

use super::*;
use crate::notify::Kind;
use crate::time::Timestamp;

fn event() -> Event {
    Event {
        id: "7".to_owned(),
        kind: Kind::Halted,
        recovered_from: None,
        time: Timestamp(0),
        side: "source",
        source_file_system_id: "fs-1".to_owned(),
        destination_file_system_id: "fs-2".to_owned(),
        status: "HALTED",
        message: "a\0b".to_owned(),
        time_since_last_sync: Some(1.5),
    }
}

fn shell(script: &str, time: Duration) -> Command {
    let words = ["/bin/sh", "-c", script].map(str::to_owned).to_vec();
    Command { words, time }
}

#[test]
fn it_has_all_in_its_environment_and_as_json() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("told");
    let script = format!(
        "{{ echo $REPLICATOR_EVENT $REPLICATOR_STATUS $REPLICATOR_TIME_SINCE_LAST_SYNC $REPLICATOR_MESSAGE; cat; }} > {}",
        file.display()
    );
    shell(&script, Duration::from_secs(60)).tell(&event()).unwrap();
    let told = fs::read_to_string(file).unwrap();
    let (words, json) = told.split_once('\n').unwrap();
    assert_eq!(words, "HALTED HALTED 1.5 a b");
    let json: serde_json::Value = serde_json::from_str(json).unwrap();
    assert_eq!(json["Event"], "HALTED");
    assert_eq!(json["Time"], "1970-01-01T00:00:00.000Z");
    assert_eq!(json["SourceFileSystemId"], "fs-1");
}

#[test]
fn one_that_hangs_is_ended_with_what_it_started() {
    let begun = Instant::now();
    let error = shell("sleep 600 & sleep 600", Duration::from_millis(300)).tell(&event());
    assert!(error.unwrap_err().contains("took longer"));
    assert!(begun.elapsed() < Duration::from_secs(60));
}

#[test]
fn one_that_fails_says_how() {
    let error = shell("exit 7", Duration::from_secs(60)).tell(&event()).unwrap_err();
    assert!(error.contains('7'), "{error}");
    let words = vec!["/nonexistent".to_owned()];
    let error = Command { words, time: Duration::from_secs(1) }.tell(&event()).unwrap_err();
    assert!(error.starts_with("cannot run /nonexistent"), "{error}");
}
