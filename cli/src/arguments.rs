//! The command line's grammar.

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};
use replicator_common::api::client::{Access, DEFAULT_ENDPOINT, check_endpoint};
use replicator_common::api::own::{VERIFY_RATE, WAIT_MAX_SECONDS};
use replicator_common::config::DEFAULT_API;
use replicator_common::control::{DeletionMode, WatcherChoice};
use replicator_common::id::FileSystemId;
use replicator_common::manual::Generate;
use replicator_common::net::https::Trusted;
use replicator_common::net::identity::{Fingerprint, InvalidFingerprint};

use crate::exit::Usage;

/// Continuous replication of a file system to a second one.
///
/// Each daemon, and `run`, serves a console for the browser at its API's address,
/// http://127.0.0.1:4480/ by default.
///
/// Answers go to standard output (JSON, but for `status` without --json); all
/// else goes to standard error, an error as one line. Exit status: 0 done, 1 failed, 2 wrong usage, 3 timed out.
#[derive(Debug, Parser)]
#[command(name = "replicator", version)]
pub struct Arguments {
    #[command(flatten)]
    pub asking: Asking,
    /// Prints JSON where a person would get text, a line for an error too
    #[arg(long, global = true)]
    pub json: bool,
    #[command(subcommand)]
    pub command: Command,
}

/// Which daemon is asked, and by what the two know each other.
#[derive(Debug, Args)]
pub struct Asking {
    /// The API of the daemon that is asked
    #[arg(
        long,
        global = true,
        env = "REPLICATOR_ENDPOINT",
        value_name = "URL",
        default_value = DEFAULT_ENDPOINT,
        value_parser = |text: &str| check_endpoint(text).map_err(|error| error.to_string())
    )]
    pub endpoint: String,
    /// The SHA-256 of the daemon's certificate, which it logs when it starts
    /// (for https)
    #[arg(long, global = true, env = "REPLICATOR_FINGERPRINT", value_name = "HEX")]
    #[arg(value_parser = fingerprint, conflicts_with = "ca")]
    pub fingerprint: Option<Fingerprint>,
    /// The authorities, PEM, one of which vouches for the daemon (for https)
    #[arg(long, global = true, env = "REPLICATOR_CA", value_name = "FILE")]
    pub ca: Option<PathBuf>,
    /// An access key of the daemon's API
    #[arg(long, global = true, env = "AWS_ACCESS_KEY_ID", value_name = "ID")]
    pub access_key_id: Option<String>,
    /// Its secret; in the environment, other users do not see it
    #[arg(long, global = true, env = "AWS_SECRET_ACCESS_KEY", value_name = "SECRET")]
    #[arg(hide_env_values = true)]
    pub secret_access_key: Option<String>,
    /// A certificate that the daemon's API lets in, PEM
    #[arg(long, global = true, env = "REPLICATOR_CLIENT_CERTIFICATE", value_name = "FILE")]
    pub client_certificate: Option<PathBuf>,
    /// Its key, PEM
    #[arg(long, global = true, env = "REPLICATOR_CLIENT_KEY", value_name = "FILE")]
    pub client_key: Option<PathBuf>,
}

impl Asking {
    /// The same, with what the files hold.
    pub fn access(&self) -> anyhow::Result<Access> {
        let mut access = Access::new(&self.endpoint);
        access.trusted = self.fingerprint.map(Trusted::Pinned);
        if let Some(ca) = &self.ca {
            access.trust_file(ca)?;
        }
        if self.endpoint.starts_with("https:") && access.trusted.is_none() {
            return Err(Usage(format!(
                "{} needs --fingerprint (which the daemon logs when it starts) or --ca",
                self.endpoint
            ))
            .into());
        }
        let given = |text: &Option<String>| text.clone().filter(|text| !text.is_empty());
        match (given(&self.access_key_id), given(&self.secret_access_key)) {
            (Some(id), Some(secret)) => access.sign_with(&id, &secret),
            (None, None) => {}
            _ => return Err(Usage("an access key's id and secret go together".to_owned()).into()),
        }
        match (&self.client_certificate, &self.client_key) {
            (Some(certificate), Some(key)) => access.show(certificate, key)?,
            (None, None) => {}
            _ => {
                let message = "--client-certificate and --client-key go together";
                return Err(Usage(message.to_owned()).into());
            }
        }
        Ok(access)
    }
}

/// As we write it, or as openssl does, with colons.
fn fingerprint(text: &str) -> Result<Fingerprint, String> {
    text.replace(':', "").parse().map_err(|error: InvalidFingerprint| error.to_string())
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Replicates SOURCE to REPLICA, both on this machine, until stopped
    Run(Run),
    /// Enables replication of a directory to an enrolled destination; prints
    /// EFS's configuration
    CreateReplicationConfiguration(Create),
    /// Prints EFS's configurations
    DescribeReplicationConfigurations(Describe),
    /// Deletes a configuration: fails over, the replica becomes writable
    DeleteReplicationConfiguration(Delete),
    /// Gives a directory or mount an id, under which it can be replicated
    CreateFileSystem(CreateFileSystem),
    /// Prints the file systems that have an id
    DescribeFileSystems,
    /// Forgets a file system's id; what is in it stays
    DeleteFileSystem(FileSystem),
    /// Allows that a file system becomes a replica, or forbids it
    UpdateFileSystemProtection(UpdateProtection),
    /// Makes the replica writable, and says what was and was not replicated;
    /// prints the report as JSON
    Failover(Failover),
    /// Shows the whole state of every replication
    Status(Status),
    /// Waits until all that was done on the source so far is on the replica
    Wait(Wait),
    /// Compares source and replica by content now, and puts right what differs;
    /// prints each difference as a line of JSON. Ends with 0 when nothing differed, 2
    /// when something did, 1 when something could not be read
    Verify(Verify),
    /// Stops shipping changes; they are journaled
    Pause(Target),
    /// Ships changes again
    Resume(Resume),
    /// Writes shell completions or man pages, for packages
    #[command(hide = true)]
    Generate(Generate),
}

#[derive(Debug, Args)]
pub struct Run {
    /// The directory or mount to replicate
    pub source: PathBuf,
    /// The directory or mount that becomes the replica; made when missing (its
    /// parent is not)
    pub replica: PathBuf,
    /// Where certificates, journal, index and commit log are kept; default:
    /// one directory a pair, in /var/lib/replicator for root, else in
    /// $XDG_STATE_HOME/replicator or ~/.local/state/replicator
    #[arg(long, value_name = "DIR")]
    pub state_dir: Option<PathBuf>,
    /// Loopback address and port of the HTTP API and of the console, a page for
    /// the browser; port 0 takes a free one
    #[arg(long, value_name = "ADDR:PORT", default_value_t = DEFAULT_API)]
    pub api: SocketAddr,
    /// How changes are captured
    #[arg(long, value_enum, default_value_t = Watcher::Auto)]
    pub watcher: Watcher,
    /// Stops when the replica equals the source, and prints a summary as JSON
    #[arg(long)]
    pub once: bool,
    /// Takes a REPLICA that is not empty: only differences travel, and what
    /// the source lacks is moved to lost+found
    #[arg(long)]
    pub reconcile: bool,
    /// Replicates device nodes too
    #[arg(long)]
    pub devices: bool,
    /// Halts when this share of the source's objects is deleted within ten
    /// minutes; 0: never
    #[arg(long, value_name = "PERCENT", default_value_t = 50)]
    #[arg(value_parser = clap::value_parser!(u8).range(0..=100))]
    pub halt_deletions_percent: u8,
    /// Fewer deletions than these, in objects, are no such share
    #[arg(long, value_name = "OBJECTS", default_value_t = 1000)]
    #[arg(value_parser = clap::value_parser!(u64).range(1..))]
    pub halt_deletions_min: u64,
}

#[derive(Debug, Args)]
pub struct Create {
    /// The directory or mount to replicate, on the host of the source's daemon;
    /// or its id there
    #[arg(long, value_name = "PATH|ID")]
    pub source: PathBuf,
    /// The line that the destination's daemon printed; or an id, where one
    /// daemon runs both sides
    #[arg(long, value_name = "TOKEN|ID")]
    pub destination: String,
    /// How changes are captured; default: as the daemon's configuration says
    #[arg(long, value_enum)]
    pub watcher: Option<Watcher>,
    /// Replicates device nodes too
    #[arg(long)]
    pub devices: bool,
}

#[derive(Debug, Args)]
pub struct Describe {
    /// Only the configuration that this file system (or ARN) is in, at either end
    #[arg(long, value_name = "ID")]
    pub file_system_id: Option<String>,
}

#[derive(Debug, Args)]
pub struct Delete {
    /// The source's file system (or ARN)
    #[arg(long, value_name = "ID")]
    pub source_file_system_id: String,
    /// Which sides: LOCAL_CONFIGURATION_ONLY works when the other one is dead
    #[arg(long, value_enum, default_value_t = Mode::AllConfigurations)]
    pub deletion_mode: Mode,
}

#[derive(Debug, Args)]
pub struct CreateFileSystem {
    /// The directory or mount, on the daemon's host; made when missing
    #[arg(long, value_name = "PATH")]
    pub path: PathBuf,
    /// The tag `Name`
    #[arg(long, value_name = "NAME")]
    pub name: Option<String>,
}

#[derive(Debug, Args)]
pub struct FileSystem {
    /// The file system (or its ARN)
    #[arg(long, value_name = "ID")]
    pub file_system_id: String,
}

#[derive(Debug, Args)]
pub struct UpdateProtection {
    #[command(flatten)]
    pub file_system: FileSystem,
    /// ENABLED (it may not become a replica) or DISABLED (it may)
    #[arg(long, value_name = "WORD")]
    pub replication_overwrite_protection: String,
}

#[derive(Debug, Args)]
pub struct Failover {
    /// The source's file system; may be left out where there is only one
    #[arg(long, value_name = "ID")]
    pub source_file_system_id: Option<FileSystemId>,
    /// Works on a destination's (or a run's) state directory, while no daemon
    /// runs on it
    #[arg(long, value_name = "DIR", conflicts_with = "deletion_mode")]
    pub state_dir: Option<PathBuf>,
    /// Which sides: LOCAL_CONFIGURATION_ONLY works when the source is dead
    #[arg(long, value_enum, default_value_t = Mode::AllConfigurations)]
    pub deletion_mode: Mode,
}

#[derive(Debug, Args)]
pub struct Status {
    /// Shows it anew, until stopped: in place on a terminal, else one after the
    /// other; with --json, a line each time
    #[arg(long, short)]
    pub watch: bool,
    /// With --watch: how often
    #[arg(long, value_name = "SECONDS", default_value_t = 1.0, value_parser = period)]
    pub interval: f64,
}

#[derive(Debug, Args)]
pub struct Target {
    /// The file system at either end; may be left out where there is only one
    #[arg(long, value_name = "ID")]
    pub source_file_system_id: Option<String>,
}

#[derive(Debug, Args)]
pub struct Resume {
    #[command(flatten)]
    pub target: Target,
    /// Lets the deletions through for which replication has halted
    #[arg(long)]
    pub accept_deletions: bool,
}

#[derive(Debug, Args)]
pub struct Wait {
    #[command(flatten)]
    pub target: Target,
    /// How long at most; exit status 3 when it is over
    #[arg(
        long,
        value_name = "SECONDS",
        default_value_t = WAIT_MAX_SECONDS as f64,
        value_parser = wait_seconds
    )]
    pub timeout: f64,
}

#[derive(Debug, Args)]
pub struct Verify {
    /// The file system at either end (or its ARN); may be left out where there
    /// is only one
    #[arg(value_name = "ID")]
    pub id: Option<String>,
    /// Reports what differs, and leaves it as it is
    #[arg(long)]
    pub no_repair: bool,
    /// Reads so many bytes a second at most, on either side: as in 20MiB.
    /// Default: as fast as can be
    #[arg(long, value_name = "SIZE", value_parser = rate)]
    pub rate: Option<u64>,
    /// Shows no progress
    #[arg(long, short)]
    pub quiet: bool,
}

/// Bounds of [`Verify::rate`].
type Rate = replicator_common::config::Size<{ *VERIFY_RATE.start() }, { *VERIFY_RATE.end() }>;

fn rate(text: &str) -> Result<u64, String> {
    let rate: Result<Rate, _> = serde_json::from_value(text.into());
    rate.map(Rate::get).map_err(|error| error.to_string())
}

fn period(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(seconds) if (0.1..=3600.0).contains(&seconds) => Ok(seconds),
        _ => Err("expected 0.1 to 3600 seconds".to_owned()),
    }
}

fn wait_seconds(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(seconds) if (0.0..=WAIT_MAX_SECONDS as f64).contains(&seconds) => Ok(seconds),
        _ => Err(format!("expected 0 to {WAIT_MAX_SECONDS} seconds")),
    }
}

/// [`WatcherChoice`], as clap wants it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Watcher {
    /// The best that privilege and file system allow
    Auto,
    /// One mark on the whole file system; needs root
    Fanotify,
    /// A watch on each directory
    Inotify,
    /// A periodic walk
    Scan,
}

impl From<Watcher> for WatcherChoice {
    fn from(watcher: Watcher) -> Self {
        match watcher {
            Watcher::Auto => Self::Auto,
            Watcher::Fanotify => Self::Fanotify,
            Watcher::Inotify => Self::Inotify,
            Watcher::Scan => Self::Scan,
        }
    }
}

/// [`DeletionMode`], as clap wants it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
#[value(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum Mode {
    /// Source and destination
    AllConfigurations,
    /// The side that is asked
    LocalConfigurationOnly,
}

impl From<Mode> for DeletionMode {
    fn from(mode: Mode) -> Self {
        match mode {
            Mode::AllConfigurations => Self::AllConfigurations,
            Mode::LocalConfigurationOnly => Self::LocalConfigurationOnly,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_grammar_is_sound() {
        Arguments::command().debug_assert();
    }

    #[test]
    fn endpoint_stands_anywhere() {
        let parse = |line: &[&str]| Arguments::try_parse_from(line).unwrap();
        let before = parse(&["replicator", "--endpoint", "http://a:1/", "status"]);
        let after = parse(&["replicator", "status", "--endpoint", "http://a:1"]);
        assert_eq!(before.asking.endpoint, "http://a:1");
        assert_eq!(after.asking.endpoint, "http://a:1");
    }

    #[test]
    fn credentials_go_in_pairs() {
        let access = |more: &[&str]| {
            let line = [&["replicator", "status"], more].concat();
            Arguments::try_parse_from(line).unwrap().asking.access()
        };
        let pin = "AB:".repeat(31) + "AB";
        let both = ["--access-key-id", "AK", "--secret-access-key", "s", "--fingerprint", &pin];
        let found = access(&both).unwrap();
        assert!(found.key.is_some() && matches!(found.trusted, Some(Trusted::Pinned(_))));
        assert!(access(&["--access-key-id", "AK", "--secret-access-key", ""]).is_err());
        assert!(access(&["--client-key", "/k"]).is_err());
        assert!(access(&["--ca", "/nonexistent"]).is_err());
    }

    #[test]
    fn deletion_modes_are_efs_words() {
        let line = "replicator delete-replication-configuration --source-file-system-id fs-01234567 --deletion-mode LOCAL_CONFIGURATION_ONLY";
        let Command::DeleteReplicationConfiguration(delete) =
            Arguments::try_parse_from(line.split(' ')).unwrap().command
        else {
            panic!("a deletion")
        };
        assert_eq!(delete.deletion_mode, Mode::LocalConfigurationOnly);
    }
}
