//! The runbook's way back (docs/disaster-recovery.md): b replicates to a after a's
//! failover to b, and then a to b again, each time with what the other has.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use replicator_tests::loopback::{Site, replicate};
use replicator_tests::mounts::Scratch;
use replicator_tests::process::{Daemon, free_port};
use replicator_tests::scenario::patience;
use replicator_tests::serial;
use serde_json::json;

const ASIDE: &str = "efs-replication-lost+found-";

/// Every file of a tree with its content; what was set aside apart.
fn files(root: &Path) -> (BTreeMap<PathBuf, String>, Vec<String>) {
    let (mut here, mut aside) = (BTreeMap::new(), Vec::new());
    let mut directories = vec![root.to_owned()];
    while let Some(directory) = directories.pop() {
        for entry in fs::read_dir(directory).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                // Not staging.
                if !path.file_name().unwrap().as_encoded_bytes().starts_with(b".replicator-") {
                    directories.push(path);
                }
                continue;
            }
            let (name, content) =
                (path.strip_prefix(root).unwrap().to_owned(), fs::read_to_string(&path).unwrap());
            match name.to_str().unwrap().starts_with(ASIDE) {
                true if !name.ends_with("manifest.json") => aside.push(content),
                true => {}
                false => drop(here.insert(name, content)),
            }
        }
    }
    (here, aside)
}

/// The planned failover, once all is there.
fn fail_over(source: &Daemon) {
    source.wait(patience());
    source.request("POST", "/replicator/v1/failover", Some(json!({}))).unwrap();
}

#[test]
fn there_and_back_again() {
    let _share = serial::share();
    let scratch = Scratch::new("fail-back");
    let [a, b] = ["a", "b"].map(|name| Site::new(&scratch.path().join(name)));
    let (on_a, on_b) = (a.path("data"), b.path("replica"));
    fs::create_dir_all(on_a.join("directory")).unwrap();
    for name in ["kept", "changed", "directory/removed"] {
        fs::write(on_a.join(name), format!("{name} by a")).unwrap();
    }
    let (mut a_source, a_destination) = (a.source(free_port(), ""), a.destination(free_port()));
    let (mut b_source, b_destination) = (b.source(free_port(), ""), b.destination(free_port()));

    replicate(&a_source, &on_a, &b_destination, &on_b);
    a_source.wait_enabled(patience());
    fail_over(&a_source);
    // b is in use; and something is written on a that b never gets.
    fs::write(on_b.join("changed"), "changed by b").unwrap();
    fs::remove_file(on_b.join("directory/removed")).unwrap();
    fs::write(on_b.join("new"), "new by b").unwrap();
    fs::write(on_a.join("late"), "late by a").unwrap();

    replicate(&b_source, &on_b, &a_destination, &on_a);
    b_source.wait_enabled(patience());
    b_source.wait(patience());
    let (there, aside) = files(&on_a);
    assert_eq!(there, files(&on_b).0);
    assert_eq!(there[Path::new("changed")], "changed by b");
    let mut aside = aside;
    aside.sort();
    assert_eq!(aside, ["directory/removed by a", "late by a"], "what b lacks is not lost");
    let refused = fs::write(on_a.join("new"), "by a").unwrap_err();
    assert_eq!(refused.raw_os_error(), Some(rustix::io::Errno::ROFS.raw_os_error()));

    fail_over(&b_source);
    fs::write(on_a.join("back"), "back on a").unwrap();
    replicate(&a_source, &on_a, &b_destination, &on_b);
    a_source.wait_enabled(patience());
    a_source.wait(patience());
    let (there, _) = files(&on_b);
    assert_eq!(there, files(&on_a).0);
    assert_eq!(there[Path::new("back")], "back on a");
    for daemon in [a_source, b_source, a_destination, b_destination] {
        assert!(daemon.terminate().success());
    }
}
