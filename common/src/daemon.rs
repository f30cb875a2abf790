//! What the two daemons' programs do alike.

use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::config::{self, ConfigError, DestinationConfig, NotifyConfig, Sanitize, SourceConfig};
use crate::logging::{self, LogError};
use crate::notify::{Notifier, NotifyError};

/// A daemon's configuration.
pub trait DaemonConfig: DeserializeOwned + Serialize + Sanitize {
    /// The log filter.
    fn log(&self) -> &str;

    /// Whom to tell when something is wrong.
    fn notify(&self) -> &NotifyConfig;
}

impl DaemonConfig for SourceConfig {
    fn log(&self) -> &str {
        &self.log
    }

    fn notify(&self) -> &NotifyConfig {
        &self.notify
    }
}

impl DaemonConfig for DestinationConfig {
    fn log(&self) -> &str {
        &self.log
    }

    fn notify(&self) -> &NotifyConfig {
        &self.notify
    }
}

/// Why a configuration cannot be used, or not be shown.
#[derive(Debug, thiserror::Error)]
pub enum CheckError {
    /// It is not valid.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// Its log filter is not.
    #[error("{}", path.display())]
    Log {
        /// The configuration's file.
        path: PathBuf,
        /// What is wrong.
        source: LogError,
    },
    /// A file that it names for notifications cannot be used.
    #[error("notify: {0}")]
    Notify(#[from] NotifyError),
    /// It cannot be written as JSON.
    #[error("cannot show the configuration")]
    Json(#[from] serde_json::Error),
    /// Nobody takes it.
    #[error("cannot write to standard output: {0}")]
    Print(io::Error),
}

/// Reads and checks a configuration, its log filter included.
///
/// # Errors
/// When it is not valid.
pub fn load<T: DaemonConfig>(path: &Path) -> Result<T, CheckError> {
    let config: T = config::load(path)?;
    let named = |source| CheckError::Log { path: path.to_owned(), source };
    logging::check(config.log()).map_err(named)?;
    Ok(config)
}

/// Checks a configuration, and prints it with all defaults as JSON.
///
/// # Errors
/// When it is not valid.
pub fn check_config<T: DaemonConfig>(path: &Path) -> Result<(), CheckError> {
    let config = load::<T>(path)?;
    Notifier::check(config.notify())?;
    let text = serde_json::to_string_pretty(&config)?;
    writeln!(io::stdout(), "{text}").map_err(CheckError::Print)
}

/// How `program` ends: with one line for the operator when it failed, which
/// says what `error` does.
pub fn end(program: &str, error: Option<&str>) -> ExitCode {
    let Some(error) = error else { return ExitCode::SUCCESS };
    // When nobody reads it, the status still says so.
    let _ = writeln!(io::stderr(), "{program}: {error}");
    ExitCode::FAILURE
}
