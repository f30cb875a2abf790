//! What verification tells: filled by its thread, read by those who ask.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use replicator_common::status::PathError;
use replicator_common::verification::{
    Difference, DifferenceKind, EXAMPLES_MAX, Findings, Verification,
};

use crate::engine::state::Shared;

/// Differences of a pass that are kept for who asked for it.
const KEPT: usize = 10_000;
/// Differences in one answer.
const ANSWERED: usize = 500;

/// The board.
pub(super) struct Board {
    inner: Mutex<Inner>,
    shared: Arc<Shared>,
}

#[derive(Default)]
struct Inner {
    verification: Verification,
    /// Differences of this pass.
    differences: VecDeque<Difference>,
    /// How many of them were there before the first that is kept.
    dropped: u64,
}

impl Board {
    pub(super) fn new(shared: Arc<Shared>, verification: Verification) -> Self {
        let inner = Inner { verification, ..Inner::default() };
        let board = Self { inner: Mutex::new(inner), shared };
        board.change(|_| {});
        board
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What the engine shares.
    pub(super) fn shared(&self) -> &Shared {
        &self.shared
    }

    /// What is known now.
    pub(super) fn verification(&self) -> Verification {
        self.lock().verification.clone()
    }

    /// Changes it.
    pub(super) fn change(&self, change: impl FnOnce(&mut Verification)) {
        let mut inner = self.lock();
        change(&mut inner.verification);
        self.shared.verified(inner.verification.clone());
    }

    /// A pass begins: what the last one found is told no more.
    pub(super) fn begin(&self) {
        let mut inner = self.lock();
        inner.differences.clear();
        inner.dropped = 0;
    }

    /// A difference is settled.
    pub(super) fn found(&self, difference: Difference) {
        let mut inner = self.lock();
        if inner.differences.len() >= KEPT {
            inner.differences.pop_front();
            inner.dropped += 1;
        }
        inner.differences.push_back(difference.clone());
        drop(inner);
        self.change(|now| {
            *match difference.kind {
                DifferenceKind::Missing => &mut now.missing,
                DifferenceKind::Extra => &mut now.extra,
                DifferenceKind::Content => &mut now.content,
                DifferenceKind::Attributes => &mut now.attributes,
            } += 1;
            now.repaired += u64::from(difference.repaired);
            if now.differences.len() >= EXAMPLES_MAX {
                now.differences.remove(0);
            }
            now.differences.push(difference);
        });
    }

    /// Something could not be read.
    pub(super) fn unreadable(&self, path: String, error: String) {
        self.change(|now| {
            // It is met again when the session was lost meanwhile.
            if now.errors.iter().any(|known| known.path == path) {
                return;
            }
            tracing::warn!(path, error, "cannot be read and was not verified");
            now.read_errors += 1;
            if now.errors.len() >= EXAMPLES_MAX {
                now.errors.remove(0);
            }
            now.errors.push(PathError { path, error });
        });
    }

    /// What pass `pass` found after the first `after` differences; `None` when
    /// it is not the last.
    pub(super) fn findings(&self, pass: u64, after: u64) -> Option<Findings> {
        let inner = self.lock();
        if inner.verification.pass != pass {
            return None;
        }
        let from = after.max(inner.dropped);
        let skip = usize::try_from(from - inner.dropped).unwrap_or(usize::MAX);
        let differences: Vec<_> =
            inner.differences.iter().skip(skip).take(ANSWERED).cloned().collect();
        let next = from + differences.len() as u64;
        let all = inner.dropped + inner.differences.len() as u64;
        Some(Findings {
            differences,
            next,
            lost: from - after,
            done: !inner.verification.running && next >= all,
            verification: inner.verification.clone(),
        })
    }
}
