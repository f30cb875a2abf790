//! How many end-to-end tests run at once, over all test processes.
//!
//! `cargo test` runs tests as threads of one process after the other (how many
//! threads, `.cargo/config.toml` says), `cargo nextest` as many processes at once;
//! each of ours keeps two or three busy programs. Locks on files hold for both. A slot is one share of the
//! machine; a test that measures time takes all of them. Test runs that need
//! not wait for each other have locks in directories of their own:
//! `REPLICATOR_TEST_LOCKS` names one.

use std::fs::File;
use std::path::PathBuf;
use std::thread;
use std::time::Duration;

use rustix::fs::FlockOperation;

/// Tests that run at once: most of them wait most of the time. More would not
/// make two cores faster, only every timeout harder to meet.
const SLOTS: usize = 4;

/// A share of the machine, given back when dropped.
#[must_use = "the share is given back when this is dropped"]
#[derive(Debug)]
pub struct Share {
    _locks: Vec<File>,
}

/// Waits for one share.
pub fn share() -> Share {
    loop {
        // Behind the gate, so that one who wants all is not starved.
        let gate = open("gate");
        rustix::fs::flock(&gate, FlockOperation::LockExclusive).unwrap();
        for slot in 0..SLOTS {
            let file = open(&format!("slot-{slot}"));
            if rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive).is_ok() {
                return Share { _locks: vec![file] };
            }
        }
        drop(gate);
        thread::sleep(Duration::from_millis(50));
    }
}

/// Waits until no other end-to-end test runs, and keeps it so.
pub fn alone() -> Share {
    let gate = open("gate");
    rustix::fs::flock(&gate, FlockOperation::LockExclusive).unwrap();
    let locks = (0..SLOTS).map(|slot| {
        let file = open(&format!("slot-{slot}"));
        rustix::fs::flock(&file, FlockOperation::LockExclusive).unwrap();
        file
    });
    Share { _locks: locks.collect() }
}

fn open(name: &str) -> File {
    let directory = std::env::var_os("REPLICATOR_TEST_LOCKS")
        .map_or_else(|| PathBuf::from("/run/lock/replicator-tests"), PathBuf::from);
    std::fs::create_dir_all(&directory).unwrap();
    File::options().create(true).truncate(false).write(true).open(directory.join(name)).unwrap()
}
