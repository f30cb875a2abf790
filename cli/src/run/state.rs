//! The state directory of a `run`: one pair, one process at a time.
//!
//! `pair` remembers the pair, `port` where the two sides meet, `lock` holds the
//! process id and is locked while it lives; `source/` and `destination/` belong
//! to the two sides.

use std::fs;
use std::net::{Ipv4Addr, UdpSocket};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail, ensure};
use replicator_common::crashsafe::{self, Format};
use replicator_common::lock::StateLock;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::pair::Pair;

const FORMAT: Format = Format { name: "run-pair", version: 1 };

const PORT: Format = Format { name: "run-port", version: 1 };

/// What `pair` holds. The digest decides: the paths may not be UTF-8 and are
/// for people.
#[derive(Debug, Serialize, Deserialize)]
struct Remembered {
    source: String,
    replica: String,
    digest: String,
}

/// A state directory that is ours while this lives.
#[derive(Debug)]
pub struct StateDirectory {
    path: PathBuf,
    _lock: StateLock,
}

impl StateDirectory {
    /// Opens or makes it, for this pair.
    pub fn open(path: &Path, pair: &Pair) -> anyhow::Result<Self> {
        let shown = path.display();
        if path.exists() {
            check_ours(path)?;
        }
        crashsafe::create_directory(path)?;
        let lock = StateLock::acquire(path)?;
        let file = path.join("pair");
        let now = remember(pair);
        match crashsafe::read::<Remembered>(&file, &FORMAT)? {
            None => crashsafe::write(&file, &FORMAT, &now)?,
            Some(then) if then.digest == now.digest => {}
            Some(then) => bail!(
                "state directory {shown} belongs to the replication of {} to {}, not of {} to {}: choose another with --state-dir",
                then.source,
                then.replica,
                now.source,
                now.replica
            ),
        }
        Ok(Self { path: path.to_owned(), _lock: lock })
    }

    /// The loopback port (UDP) on which the two sides meet: the same at each
    /// start, since the source remembers it. It is chosen below the range that
    /// the system hands out, where it would be taken by chance.
    pub fn port(&self) -> anyhow::Result<u16> {
        let file = self.path.join("port");
        if let Some(port) = crashsafe::read::<u16>(&file, &PORT)? {
            return Ok(port);
        }
        for _ in 0..1000 {
            let port = 20_000 + rand::random::<u16>() % 12_000;
            // RACE: somebody may take it before we listen there; then this
            // start fails and says so, and nothing else happens.
            if UdpSocket::bind((Ipv4Addr::LOCALHOST, port)).is_ok() {
                crashsafe::write(&file, &PORT, &port)?;
                return Ok(port);
            }
        }
        bail!("no UDP port between 20000 and 31999 is free on 127.0.0.1")
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

/// A directory of somebody else's is not filled with ours by mistake.
fn check_ours(path: &Path) -> anyhow::Result<()> {
    let shown = path.display();
    let entries = fs::read_dir(path).with_context(|| format!("cannot read {shown}"))?;
    if path.join("pair").exists() {
        return Ok(());
    }
    for entry in entries {
        let name = entry.with_context(|| format!("cannot read {shown}"))?.file_name();
        ensure!(
            name == "lock" || name == "pair.new",
            "{shown} is not a state directory of `replicator run` (it holds {name:?}): choose an empty or new one with --state-dir"
        );
    }
    Ok(())
}

/// The state directory of a pair, where none is given.
pub fn default_directory(pair: &Pair) -> anyhow::Result<PathBuf> {
    let name = format!("run-{}", &digest(pair)[..16]);
    if rustix::process::geteuid().is_root() {
        return Ok(Path::new("/var/lib/replicator").join(name));
    }
    let variable = |name| std::env::var_os(name).map(PathBuf::from).filter(|p| p.is_absolute());
    let base = variable("XDG_STATE_HOME")
        .or_else(|| variable("HOME").map(|home| home.join(".local/state")))
        .context("neither XDG_STATE_HOME nor HOME is set: give a --state-dir")?;
    Ok(base.join("replicator").join(name))
}

fn remember(pair: &Pair) -> Remembered {
    Remembered {
        source: pair.source().display().to_string(),
        replica: pair.replica().display().to_string(),
        digest: digest(pair),
    }
}

fn digest(pair: &Pair) -> String {
    let mut hash = Sha256::new();
    // No path contains NUL.
    hash.update(pair.source().as_os_str().as_bytes());
    hash.update([0]);
    hash.update(pair.replica().as_os_str().as_bytes());
    hex::encode(hash.finalize())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pair(base: &Path, replica: &str) -> Pair {
        fs::create_dir_all(base.join("source")).unwrap();
        Pair::check(&base.join("source"), &base.join(replica)).unwrap()
    }

    #[test]
    fn one_pair_one_process() {
        let base = tempfile::tempdir().unwrap();
        let base = base.path().canonicalize().unwrap();
        let (first, second) = (pair(&base, "a"), pair(&base, "b"));
        let directory = base.join("state");
        let held = StateDirectory::open(&directory, &first).unwrap();
        let error = StateDirectory::open(&directory, &first).unwrap_err().to_string();
        let expected = format!(
            "state directory {} is in use by process {}",
            directory.display(),
            std::process::id()
        );
        assert_eq!(error, expected);
        drop(held);
        drop(StateDirectory::open(&directory, &first).unwrap());
        let error = StateDirectory::open(&directory, &second).unwrap_err().to_string();
        let b = base.display();
        assert_eq!(
            error,
            format!(
                "state directory {b}/state belongs to the replication of {b}/source to {b}/a, not of {b}/source to {b}/b: choose another with --state-dir"
            )
        );
    }

    #[test]
    fn the_port_stays() {
        let base = tempfile::tempdir().unwrap();
        let pair = pair(base.path(), "a");
        let open = || StateDirectory::open(&base.path().join("state"), &pair).unwrap().port();
        assert_eq!(open().unwrap(), open().unwrap());
    }

    #[test]
    fn somebody_elses_directory_is_left_alone() {
        let base = tempfile::tempdir().unwrap();
        let pair = pair(base.path(), "a");
        let home = base.path().join("home");
        fs::create_dir(&home).unwrap();
        fs::write(home.join("letter"), "").unwrap();
        let error = StateDirectory::open(&home, &pair).unwrap_err().to_string();
        assert!(error.contains("is not a state directory"), "{error}");
        assert_eq!(fs::read_dir(&home).unwrap().count(), 1);
    }

    #[test]
    fn a_newer_version_is_refused() {
        let base = tempfile::tempdir().unwrap();
        let pair = pair(base.path(), "a");
        let directory = base.path().join("state");
        drop(StateDirectory::open(&directory, &pair).unwrap());
        let newer = Format { name: FORMAT.name, version: FORMAT.version + 1 };
        crashsafe::write(&directory.join("pair"), &newer, &remember(&pair)).unwrap();
        let error = StateDirectory::open(&directory, &pair).unwrap_err().to_string();
        assert!(error.contains("run the newer replicator"), "{error}");
    }
}
