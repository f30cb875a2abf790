//! Logs: tracing's events, to standard error.

use std::io::{self, IsTerminal};

use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::MakeWriter;

use crate::config::LogFormat;

/// Why logging cannot begin.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    /// The filter is not valid.
    #[error(
        "{origin} is not a log filter: {reason} (as in \"info\" or \"warn,replicator_src=debug\")"
    )]
    Filter {
        /// Where it stands.
        origin: &'static str,
        /// What is wrong.
        reason: String,
    },
    /// Somebody was first.
    #[error("cannot set up logging: {0}")]
    Setup(String),
}

/// Logs to standard error from now on: what `RUST_LOG` says, or `default`
/// (the configuration's `log`) where it is not set or empty.
///
/// # Errors
/// When the filter is not valid.
pub fn init(default: &str, format: LogFormat) -> Result<(), LogError> {
    init_to(default, format, io::stderr)
}

/// [`init`] with another writer.
///
/// # Errors
/// When the filter is not valid.
pub fn init_to<W>(default: &str, format: LogFormat, writer: W) -> Result<(), LogError>
where
    W: for<'a> MakeWriter<'a> + Send + Sync + 'static,
{
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter(default)?)
        .with_ansi(io::stderr().is_terminal())
        .with_writer(writer);
    match format {
        LogFormat::Text => builder.try_init(),
        LogFormat::Json => builder.json().flatten_event(true).try_init(),
    }
    .map_err(|error| LogError::Setup(error.to_string()))
}

/// Checks a filter as [`init`] would, without `RUST_LOG`.
///
/// # Errors
/// When it is not valid.
pub fn check(filter: &str) -> Result<(), LogError> {
    read(filter, "log").map(drop)
}

fn filter(default: &str) -> Result<EnvFilter, LogError> {
    match std::env::var("RUST_LOG") {
        Ok(text) if !text.is_empty() => read(&text, "RUST_LOG"),
        _ => read(default, "log"),
    }
}

fn read(text: &str, origin: &'static str) -> Result<EnvFilter, LogError> {
    EnvFilter::builder()
        .parse(text)
        .map_err(|error| LogError::Filter { origin, reason: error.to_string() })
}

#[cfg(test)]
mod tests {
    #[test]
    fn filters_are_checked() {
        assert!(super::check("warn,replicator_src=debug").is_ok());
        assert!(super::check("info=what=now").is_err());
    }
}
