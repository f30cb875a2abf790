//! Protects the replicas of a state directory before anything else runs on the
//! host: `replicator-dst protect`, at boot.
//!
//! A read-only mount does not outlive a reboot, and the daemon comes up late, after
//! the network. Whatever writes to a replica in between is found by verification
//! alone.

use std::path::{Path, PathBuf};

use replicator_common::lock::LockError;
use replicator_common::status::EnforcementKind;

use crate::area::hidden_name;
use crate::failover;
use crate::readonly::{Protection, ReadOnlyError};
use crate::replica::Config;
use crate::state::{self, StateError};

/// Why a replica is not protected; each names it.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)]
pub enum ProtectError {
    #[error(transparent)]
    ReadOnly(#[from] ReadOnlyError),
    #[error("{} is not the replica of {source_id}: mount its file system first", path.display())]
    Missing { path: PathBuf, source_id: String },
    #[error("{}: {reason}", path.display())]
    Weak { path: PathBuf, reason: String },
}

/// A replica's path and what became of it.
pub type Outcome = (PathBuf, Result<(), ProtectError>);

/// Protects every replica of `state_dir` that is one; `None` when a daemon runs on
/// it, which does so itself. Changes nothing in the state directory, and makes none.
///
/// # Errors
/// When the state directory cannot be read, or is a newer program's.
pub fn run(state_dir: &Path) -> Result<Option<Vec<Outcome>>, StateError> {
    if !state_dir.join("destination.json").exists() {
        return Ok(Some(Vec::new()));
    }
    // INVARIANT: held until the end. A daemon that fails a replica over meanwhile
    // would make it writable, and this read-only again, for good.
    let _lock = match state::take(state_dir) {
        Ok(lock) => lock,
        Err(StateError::Lock(LockError::InUse { .. })) => return Ok(None),
        Err(error) => return Err(error),
    };
    let all = state::configured(state_dir)?.into_iter();
    // One that is being failed over is to be writable: the daemon ends that.
    let settled = all.filter(|(at, _)| !failover::begun(at));
    Ok(Some(settled.map(|(_, config)| (config.path.clone(), protect(&config))).collect()))
}

fn protect(config: &Config) -> Result<(), ProtectError> {
    let path = &config.path;
    // A mount point whose file system is missing is not the replica, and a mount
    // over it would be in the way of that.
    if path.join(hidden_name(&config.source)).symlink_metadata().is_err() {
        let source_id = config.source.to_string();
        return Err(ProtectError::Missing { path: path.clone(), source_id });
    }
    let enforcement = Protection::establish(path)?.enforcement();
    match enforcement.kind {
        EnforcementKind::Mount => Ok(()),
        _ => Err(ProtectError::Weak { path: path.clone(), reason: enforcement.reason }),
    }
}
