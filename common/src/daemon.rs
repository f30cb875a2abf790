//! What the two daemons' programs do alike.

use std::io::{self, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

use rustls::ServerConfig;
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::api::client::Access;
use crate::config::{
    self, ApiConfig, ConfigError, DestinationConfig, NotifyConfig, Sanitize, SourceConfig,
};
use crate::logging::{self, LogError};
use crate::net::https::{self, CERTIFICATE_FILE, Certificate, CertificateError, Trusted};
use crate::net::identity::Fingerprint;
use crate::notify::{Notifier, NotifyError};

/// A daemon's configuration.
pub trait DaemonConfig: DeserializeOwned + Serialize + Sanitize {
    /// The log filter.
    fn log(&self) -> &str;
    /// What concerns the API.
    fn api(&self) -> ApiConfig<'_>;

    /// Whom to tell when something is wrong.
    fn notify(&self) -> &NotifyConfig;
}

impl DaemonConfig for SourceConfig {
    fn log(&self) -> &str {
        &self.log
    }

    fn api(&self) -> ApiConfig<'_> {
        self.api()
    }

    fn notify(&self) -> &NotifyConfig {
        &self.notify
    }
}

impl DaemonConfig for DestinationConfig {
    fn log(&self) -> &str {
        &self.log
    }

    fn api(&self) -> ApiConfig<'_> {
        self.api()
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
    /// It holds secrets that are none.
    #[error(
        "{} holds secrets of access keys, and everybody may read it: chmod o-rwx it",
        path.display()
    )]
    Readable {
        /// The configuration's file.
        path: PathBuf,
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
    if !config.api().keys.is_empty() && is_open_to_others(path) {
        return Err(CheckError::Readable { path: path.to_owned() });
    }
    Ok(config)
}

fn is_open_to_others(path: &Path) -> bool {
    // It has just been read; if it is gone, nobody reads it.
    std::fs::metadata(path).is_ok_and(|found| found.permissions().mode() & 0o007 != 0)
}

/// Checks a configuration, and prints it with all defaults as JSON unless `quiet`.
///
/// # Errors
/// When it is not valid.
pub fn check_config<T: DaemonConfig>(path: &Path, quiet: bool) -> Result<(), CheckError> {
    let config = load::<T>(path)?;
    Notifier::check(config.notify())?;
    if quiet {
        return Ok(());
    }
    let text = serde_json::to_string_pretty(&config)?;
    writeln!(io::stdout(), "{text}").map_err(CheckError::Print)
}

/// TLS of a daemon's API, when the configuration asks for it; says in the log by
/// which fingerprint clients may know it.
///
/// # Errors
/// When the certificate cannot be read or made.
pub fn api_tls(
    config: &ApiConfig<'_>,
    state_dir: &Path,
) -> Result<Option<Arc<ServerConfig>>, CertificateError> {
    if !config.tls {
        return Ok(None);
    }
    let certificate = match (config.certificate, config.private_key) {
        (Some(certificate), Some(key)) => Certificate::read(certificate, key)?,
        _ => {
            let names = https::names(config.address.ip(), config.hosts);
            Certificate::load_or_create(state_dir, &names)?
        }
    };
    tracing::info!(
        fingerprint = %certificate.fingerprint(),
        "the API speaks HTTPS: clients know it by this fingerprint"
    );
    Ok(Some(https::server(&certificate, !config.clients.is_empty())?))
}

/// Why a program of ours cannot ask the daemon beside it.
#[derive(Debug, thiserror::Error)]
pub enum OwnAccessError {
    /// The daemon's certificate cannot be read.
    #[error(transparent)]
    Certificate(#[from] CertificateError),
    /// The configuration's credentials are of no use to it.
    #[error(
        "this needs an [[api_key]] that is not read_only: add one to the configuration, and restart the daemon"
    )]
    NoKey,
}

/// How a program of ours on this host asks the daemon that runs with this
/// configuration: with its first access key that may change something.
///
/// # Errors
/// When the certificate cannot be read, or there are credentials and no such key.
pub fn own_access(config: &ApiConfig<'_>, state_dir: &Path) -> Result<Access, OwnAccessError> {
    let scheme = if config.tls { "https" } else { "http" };
    let mut access = Access::new(&format!("{scheme}://{}", reachable(config.address)));
    if config.tls {
        let made = state_dir.join(CERTIFICATE_FILE);
        let certificates = https::read_certificates(config.certificate.unwrap_or(&made))?;
        access.trusted = certificates.first().map(|own| Trusted::Pinned(Fingerprint::of(own)));
    }
    match config.keys.iter().find(|key| !key.read_only) {
        Some(key) => access.sign_with(&key.id, key.secret.reveal()),
        None if config.keys.is_empty() && config.clients.is_empty() => {}
        None => return Err(OwnAccessError::NoKey),
    }
    Ok(access)
}

/// An address that listens everywhere is reached on loopback.
fn reachable(address: SocketAddr) -> SocketAddr {
    let ip = match address.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(ip) if ip.is_unspecified() => Ipv6Addr::LOCALHOST.into(),
        ip => ip,
    };
    SocketAddr::new(ip, address.port())
}

/// How `program` ends: with one line for the operator when it failed, which
/// says what `error` does.
pub fn end(program: &str, error: Option<&str>) -> ExitCode {
    let Some(error) = error else { return ExitCode::SUCCESS };
    // When nobody reads it, the status still says so.
    let _ = writeln!(io::stderr(), "{program}: {error}");
    ExitCode::FAILURE
}
