//! Many seeds, or the one that `REPLICATOR_SEED` names.

use replicator_simulation::run::run;

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|text| text.parse().expect("a number"))
}

#[test]
fn whatever_fails_the_promises_hold() {
    if let Some(seed) = number("REPLICATOR_SEED") {
        run(seed);
        return;
    }
    let seeds = number("REPLICATOR_SEEDS").unwrap_or(2000);
    let mut steps = 0;
    for seed in 0..seeds {
        steps += u64::from(run(seed));
    }
    println!("{seeds} seeds, {steps} steps");
}
