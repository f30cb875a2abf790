//! State of another version, as after an upgrade that is taken back.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use replicator_tests::hosts::{Hosts, Side};
use replicator_tests::process::run_to_end;

/// Both daemons refuse what a newer program wrote, in one line that says what to do,
/// and touch nothing of it; with what was saved before, all goes on.
#[test]
fn newer_state_is_refused_and_left_as_it_is() {
    let mut hosts = Hosts::enrolled();
    for side in Side::BOTH {
        hosts.terminate(side);
    }
    for (side, file) in [(Side::Source, "layout"), (Side::Destination, "destination.json")] {
        let state = hosts.state_dir(side);
        let path = find_layout(&state, file);
        let saved = fs::read(&path).unwrap();
        fs::write(&path, of_next_version(&saved)).unwrap();
        let before = contents(&state);
        let ended = run_to_end(hosts.serving(side), Duration::from_secs(30));
        assert_eq!(ended.code, Some(1), "{ended:?}");
        let said: Vec<_> = ended.stderr.lines().collect();
        assert!(said.len() == 1 && said[0].contains("run the newer replicator"), "{ended:?}");
        assert!(said[0].contains(path.to_str().unwrap()), "{ended:?}");
        assert_eq!(contents(&state), before, "something was touched");
        fs::write(&path, saved).unwrap();
    }
    for side in Side::BOTH {
        hosts.start(side);
    }
    fs::write(hosts.source().join("after"), "the way back").unwrap();
    hosts.settle(&"the older version again");
}

/// The file with the version of the whole.
fn find_layout(state: &Path, name: &str) -> PathBuf {
    let path = state.join(name);
    assert!(path.is_file(), "no {name} in {:?}", contents(state).keys());
    path
}

/// The same content, as a program of the next version would have written it.
fn of_next_version(file: &[u8]) -> Vec<u8> {
    let text = std::str::from_utf8(file).unwrap();
    let (head, body) = text.split_once('\n').unwrap();
    let words: Vec<_> = head.split(' ').collect();
    let next = words[2].parse::<u32>().unwrap() + 1;
    format!("{} {} {next} {}\n{body}", words[0], words[1], words[3]).into_bytes()
}

/// All files but the lock, which names the last process.
fn contents(directory: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut all = BTreeMap::new();
    for entry in fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            all.extend(contents(&path));
        } else if path.file_name().unwrap() != "lock" {
            all.insert(path.clone(), fs::read(&path).unwrap());
        }
    }
    all
}
