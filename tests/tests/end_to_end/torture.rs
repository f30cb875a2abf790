//! Daemons are killed at random instants, and nothing is lost.

use replicator_tests::torture::Torture;

/// Of the run that is a part of every test run; `just torture` takes longer.
const SECONDS: u64 = 12;

#[test]
fn killed_at_random_instants() {
    Torture::from_environment(SECONDS).run();
}
