//! The configuration files of the two daemons: TOML, checked as it is read.
//!
//! A key that is unknown, of the wrong type or out of its bounds is an error
//! that names file, line and what would be right. Durations and sizes are
//! written with their unit ([`Interval`], [`Size`]). Every key has a default;
//! samples with all keys are in `deploy/config/`.

mod api;
mod destination;
mod notify;
mod source;
mod units;

pub use api::{ApiClientConfig, ApiConfig, ApiKeyConfig};
pub use destination::{DestinationConfig, ReplicaConfig};
pub use notify::NotifyConfig;
pub use source::SourceConfig;
pub use units::{Interval, Maybe, Size};

use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Deserializer, Serialize};

/// Where a daemon's HTTP API listens unless told otherwise; the endpoint that
/// the command line asks unless told otherwise is the same.
pub const DEFAULT_API: SocketAddr =
    SocketAddr::new(std::net::IpAddr::V4(std::net::Ipv4Addr::LOCALHOST), 4480);
/// The region that answers name when none is configured.
pub const DEFAULT_REGION: &str = "xx-local";
/// The largest configuration file that is read, bytes.
const FILE_MAX: u64 = 1 << 20;

/// Why a configuration cannot be used: one line for the operator.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file could not be read.
    #[error("cannot read configuration {}: {source}", path.display())]
    Read {
        /// Which file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The file's content is not valid.
    #[error("{}:{line}: {reason}", path.display())]
    Invalid {
        /// Which file.
        path: PathBuf,
        /// On which line, from 1.
        line: usize,
        /// What is wrong with it.
        reason: String,
    },
    /// Each key is valid, but they do not go together.
    #[error("{}: {reason}", path.display())]
    Contradiction {
        /// Which file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
}

/// A configuration with rules that span several keys.
pub trait Sanitize {
    /// Checks what no key can check alone.
    ///
    /// # Errors
    /// One line that says which keys contradict each other.
    fn sanitize(&self) -> Result<(), String>;
}

/// Reads and checks a configuration file.
///
/// # Errors
/// When it cannot be read or is not valid.
pub fn load<T: DeserializeOwned + Sanitize>(path: &Path) -> Result<T, ConfigError> {
    let read = |source| ConfigError::Read { path: path.to_owned(), source };
    let size = std::fs::metadata(path).map_err(read)?.len();
    if size > FILE_MAX {
        let reason = format!("{size} bytes are too many for a configuration file");
        return Err(ConfigError::Contradiction { path: path.to_owned(), reason });
    }
    parse(&std::fs::read_to_string(path).map_err(read)?, path)
}

/// Checks the text of a configuration file; `path` is what errors name.
///
/// # Errors
/// When it is not valid.
pub fn parse<T: DeserializeOwned + Sanitize>(text: &str, path: &Path) -> Result<T, ConfigError> {
    let config: T = toml::from_str(text).map_err(|error| ConfigError::Invalid {
        path: path.to_owned(),
        line: line_of(text, error.span().map_or(0, |span| span.start)),
        reason: error.message().lines().collect::<Vec<_>>().join(" "),
    })?;
    config
        .sanitize()
        .map_err(|reason| ConfigError::Contradiction { path: path.to_owned(), reason })?;
    Ok(config)
}

fn line_of(text: &str, offset: usize) -> usize {
    1 + text.bytes().take(offset).filter(|byte| *byte == b'\n').count()
}

/// How log lines look.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// One JSON object a line.
    Json,
}

fn absolute_path<'de, D: Deserializer<'de>>(deserializer: D) -> Result<PathBuf, D::Error> {
    let path = PathBuf::deserialize(deserializer)?;
    if path.is_absolute() {
        return Ok(path);
    }
    Err(serde::de::Error::custom(format!("expected an absolute path, got {path:?}")))
}

fn some_absolute_path<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<Option<PathBuf>, D::Error> {
    absolute_path(deserializer).map(Some)
}

fn percent<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u8, D::Error> {
    within(deserializer, 0, 100).map(|percent| percent as u8)
}

fn objects<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u64, D::Error> {
    within(deserializer, 1, 1_000_000_000)
}

fn within<'de, D: Deserializer<'de>>(deserializer: D, min: u64, max: u64) -> Result<u64, D::Error> {
    let number = i64::deserialize(deserializer)?;
    let valid = u64::try_from(number).ok().filter(|number| (min..=max).contains(number));
    valid.ok_or_else(|| {
        serde::de::Error::custom(format!("{number} is out of bounds (expected {min} to {max})"))
    })
}

fn region<'de, D: Deserializer<'de>>(deserializer: D) -> Result<String, D::Error> {
    let text = String::deserialize(deserializer)?;
    if is_region(&text) {
        return Ok(text);
    }
    Err(serde::de::Error::custom(format!(
        "{text:?} is not a region (expected the form of eu-central-1 or xx-local)"
    )))
}

/// EFS's pattern `[a-z]{2}-((iso[a-z]?-)|(gov-))?[a-z]+-?[0-9]?`: clients may
/// check it in answers.
pub fn is_region(text: &str) -> bool {
    let letters = |part: &str| !part.is_empty() && part.bytes().all(|b| b.is_ascii_lowercase());
    // The last part may end in a digit, with or without a dash before it.
    let body = text.strip_suffix(|c: char| c.is_ascii_digit()).unwrap_or(text);
    let body = body.strip_suffix('-').unwrap_or(body);
    match body.split('-').collect::<Vec<_>>()[..] {
        [country, place] => country.len() == 2 && letters(country) && letters(place),
        [country, kind, place] => {
            let special = kind == "gov"
                || kind
                    .strip_prefix("iso")
                    .is_some_and(|rest| rest.is_empty() || (rest.len() == 1 && letters(rest)));
            country.len() == 2 && letters(country) && special && letters(place)
        }
        _ => false,
    }
}

fn host_names<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<String>, D::Error> {
    let names = Vec::<String>::deserialize(deserializer)?;
    for name in &names {
        if !is_host_name(name) {
            return Err(serde::de::Error::custom(format!(
                "{name:?} is not a host name (letters, digits, dots and dashes, without a port)"
            )));
        }
    }
    Ok(names.into_iter().map(|name| name.to_ascii_lowercase()).collect())
}

/// Whether this can be the name of a host: at most 253 letters, digits, dots
/// and dashes.
pub(crate) fn is_host_name(name: &str) -> bool {
    (1..=253).contains(&name.len())
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-'))
}

#[cfg(test)]
mod tests;
