//! What was claimed, held against what is there.

use std::path::Path;

use replicator_common::time::Timestamp;

use crate::stamps::Stamper;

/// What must never stand in a log when daemons are only killed: an error, a
/// panic, or that one side's memory is not believed.
const FORBIDDEN: [&str; 5] =
    ["ERROR", "panicked", "is given up", "do not fit together", "are not of one life"];

/// Panics when a daemon had to say what it must not.
#[track_caller]
pub(super) fn read_log(log: &str) {
    let bad = |line: &&str| FORBIDDEN.iter().any(|word| line.contains(word));
    let found: Vec<_> = log.lines().filter(bad).collect();
    assert!(found.is_empty(), "a log says:\n{}\nin\n{log}", found.join("\n"));
}

/// Remembers the last claim.
#[derive(Debug, Default)]
pub(super) struct Witness {
    last: Option<Timestamp>,
}

impl Witness {
    /// The destination claims this; whether it is new.
    pub(super) fn claimed(&mut self, claim: Option<Timestamp>) -> bool {
        let Some(claim) = claim else {
            // Not known yet, or not known again: a claim that was made stays.
            assert_eq!(self.last, None, "the watermark was taken back");
            return false;
        };
        assert!(claim <= Timestamp::now(), "a claim about the future: {claim}");
        assert!(self.last.is_none_or(|last| claim >= last), "{:?} and then {claim}", self.last);
        self.last.replace(claim) != Some(claim)
    }

    /// Panics when the last claim is not true of the replica.
    #[track_caller]
    pub(super) fn hold(&self, stamper: &Stamper, replica: &Path, when: &str) {
        let Some(claim) = self.last else { return };
        let broken = stamper.broken_claims(&replica.join("stamped"), claim);
        assert!(broken.is_empty(), "{when}: {claim} was claimed, but:\n{}", broken.join("\n"));
    }
}
