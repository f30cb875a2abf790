//! The destination's state directory.
//!
//! | name | holds |
//! |---|---|
//! | `lock` | the process that uses it: its number, and a lock |
//! | `destination.json` | the version of the whole |
//! | `identity/` | certificate and key |
//! | `tokens.json` | enrolment tokens that were issued |
//! | `replicas/<source>/` | one configuration: `config.json`, `store.redb`, `failover.json` |

use std::path::{Path, PathBuf};

use replicator_common::crashsafe::{self, Format, StateFileError};
use replicator_common::lock::{LockError, StateLock};
use replicator_common::net::enrol::Tokens;
use replicator_common::net::identity::Fingerprint;
use replicator_common::time::Timestamp;
use serde::{Deserialize, Serialize};

use crate::replica::Config;
use crate::{failover, making};

const VERSION: Format = Format { name: "destination", version: 1 };
const TOKENS: Format = Format { name: "tokens", version: 1 };

/// Why a state directory cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// A state file.
    #[error(transparent)]
    File(#[from] StateFileError),
    /// Another process uses it.
    #[error(transparent)]
    Lock(#[from] LockError),
}

/// Takes a state directory for this process, making it if needed, and checks
/// its version.
pub fn take(directory: &Path) -> Result<StateLock, StateError> {
    crashsafe::create_directory(directory)?;
    let lock = StateLock::acquire(directory)?;
    check_version(directory)?;
    Ok(lock)
}

/// A newer program's directory is refused; an older one's would be upgraded here.
fn check_version(directory: &Path) -> Result<(), StateFileError> {
    let path = directory.join("destination.json");
    if crashsafe::read::<Timestamp>(&path, &VERSION)?.is_none() {
        crashsafe::write(&path, &VERSION, &Timestamp::now())?;
    }
    Ok(())
}

/// The configurations, by their directories. One whose failover got as far as
/// removing the configuration is none any more, and one whose making was
/// interrupted is none yet; what they left is removed. To be
/// called by the process that holds the state directory.
pub fn replicas(directory: &Path) -> Result<Vec<(PathBuf, Config)>, StateFileError> {
    let parent = directory.join("replicas");
    crashsafe::create_directory(&parent)?;
    let mut found = Vec::new();
    for entry in std::fs::read_dir(&parent).map_err(StateFileError::io("list", &parent))? {
        let path = entry.map_err(StateFileError::io("list", &parent))?.path();
        match Config::read(&path)? {
            Some(config) => {
                making::done(&path)?;
                found.push((path, config));
            }
            None => {
                making::take_back(&path);
                failover::sweep(&path)?;
            }
        }
    }
    found.sort_by_key(|(_, config)| config.creation_time);
    Ok(found)
}

/// The same without removing anything, for who only looks.
pub fn configured(directory: &Path) -> Result<Vec<(PathBuf, Config)>, StateFileError> {
    let parent = directory.join("replicas");
    let entries = match std::fs::read_dir(&parent) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(StateFileError::io("list", &parent)(error)),
    };
    let mut found = Vec::new();
    for entry in entries {
        let path = entry.map_err(StateFileError::io("list", &parent))?.path();
        found.extend(Config::read(&path)?.map(|config| (path, config)));
    }
    Ok(found)
}

/// What a token was issued for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Grant {
    /// SHA-256 of the token's secret.
    pub secret: Fingerprint,
    /// The directory that is to become the replica.
    pub path: PathBuf,
    /// It may hold something, which is to be reconciled.
    pub reconcile: bool,
}

/// The tokens issued and what for.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Grants {
    /// Who may redeem.
    pub tokens: Tokens,
    /// What for.
    pub grants: Vec<Grant>,
}

impl Grants {
    /// Reads them.
    pub fn read(directory: &Path) -> Result<Self, StateFileError> {
        Ok(crashsafe::read(&directory.join("tokens.json"), &TOKENS)?.unwrap_or_default())
    }

    /// Makes them durable.
    pub fn write(&self, directory: &Path) -> Result<(), StateFileError> {
        crashsafe::write(&directory.join("tokens.json"), &TOKENS, self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_in_use_and_a_newer_one_are_refused() {
        let directory = tempfile::tempdir().unwrap();
        let lock = take(directory.path()).unwrap();
        let error = take(directory.path()).unwrap_err().to_string();
        assert!(error.contains(&format!("process {}", std::process::id())), "{error}");
        drop(lock);
        let newer = Format { name: "destination", version: 2 };
        crashsafe::write(&directory.path().join("destination.json"), &newer, &1i64).unwrap();
        assert!(take(directory.path()).is_err());
    }
}
