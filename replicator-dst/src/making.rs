//! A configuration that is being made: remembered, so that what a process that
//! died in the middle has left in the replica is taken back by the next.

use std::path::Path;

use replicator_common::crashsafe::{self, StateFileError};
use replicator_common::sys::{place, stat};

use crate::area::{AreaError, hidden_name, remove_tree};
use crate::readonly::{self, ReadOnlyError};
use crate::replica::{CONFIG, Config};
use crate::reserve;

/// Has the form of a `config.json`.
const FILE: &str = "making.json";

/// Why what was left cannot be taken back.
#[derive(Debug, thiserror::Error)]
enum TakeBackError {
    #[error(transparent)]
    State(#[from] StateFileError),
    #[error(transparent)]
    ReadOnly(#[from] ReadOnlyError),
    #[error(transparent)]
    Area(#[from] AreaError),
}

/// Remembers, durably, that `config` is being made.
///
/// INVARIANT: called before anything is made in the replica, and [`done`] only
/// once `config.json` is durable; so what is found there without either is not
/// ours.
pub(crate) fn begin(directory: &Path, config: &Config) -> Result<(), StateFileError> {
    crashsafe::write(&directory.join(FILE), &CONFIG, config)
}

/// The configuration is made: its `config.json` is durable.
pub(crate) fn done(directory: &Path) -> Result<(), StateFileError> {
    crashsafe::remove(&directory.join(FILE))
}

/// Takes back what was made for a configuration that did not come to be. No
/// session was ever accepted for it, so nothing of anybody's is in our hidden
/// directory. What cannot be taken back now stays for the next start.
pub(crate) fn take_back(directory: &Path) {
    match try_take_back(directory) {
        Ok(false) => {}
        Ok(true) => tracing::info!(
            directory = %directory.display(),
            "a configuration whose making was interrupted is taken back"
        ),
        Err(error) => tracing::warn!(
            %error,
            directory = %directory.display(),
            "a configuration whose making was interrupted cannot be taken back"
        ),
    }
}

fn try_take_back(directory: &Path) -> Result<bool, TakeBackError> {
    let Some(config) = crashsafe::read::<Config>(&directory.join(FILE), &CONFIG)? else {
        return Ok(false);
    };
    if config.path.exists() {
        readonly::release_path(&config.path)?;
        let shown = || config.path.display();
        let root =
            place::open_directory_path(&config.path).map_err(AreaError::system("open", shown()))?;
        // Neither making nor removing our directory is to show in its times.
        let before = stat::of_fd(&root).map_err(AreaError::system("stat", shown()))?;
        remove_tree(std::os::fd::AsFd::as_fd(&root), &hidden_name(&config.source))?;
        place::set_mtime(std::os::fd::AsFd::as_fd(&root), before.mtime)
            .map_err(AreaError::system("set time of", shown()))?;
    }
    reserve::give_back(directory);
    crashsafe::remove(&directory.join("store.redb"))?;
    done(directory)?;
    Ok(true)
}
