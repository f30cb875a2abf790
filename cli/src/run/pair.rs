//! SOURCE and REPLICA: looked at before anything is made.

use std::ffi::OsStr;
use std::fs;
use std::io;
use std::path::{Component, Path, PathBuf};

use anyhow::{Context, bail, ensure};
use replicator_common::ancestry::is_within;

/// Two directories that can be replicated from one to the other.
#[derive(Debug)]
pub struct Pair {
    source: PathBuf,
    replica: PathBuf,
}

impl Pair {
    /// Checks what the operator gave. REPLICA may be missing.
    pub fn check(source: &Path, replica: &Path) -> anyhow::Result<Self> {
        let source = existing_directory("source", source)?;
        let replica = possible_directory("replica", replica)?;
        let there = deepest_existing(&replica)?;
        if there == replica && same(&source, &replica)? {
            bail!("source and replica are the same directory, {}", source.display());
        }
        ensure!(
            !within(there, &source)?,
            "replica {} lies inside the source {}: it would replicate itself",
            replica.display(),
            source.display()
        );
        ensure!(
            !(there == replica && within(&source, &replica)?),
            "source {} lies inside the replica {}: replication would overwrite it",
            source.display(),
            replica.display()
        );
        // Not a whole path: a typing error or a missing mount is no replica.
        let parent = replica.parent().unwrap_or(Path::new("/"));
        ensure!(
            parent.is_dir(),
            "replica {} cannot be made: {} does not exist",
            replica.display(),
            parent.display()
        );
        Ok(Self { source, replica })
    }

    /// Checks that a state directory (which may be missing) lies in neither.
    pub fn check_outside(&self, state: &Path) -> anyhow::Result<()> {
        let state = possible_directory("state directory", state)?;
        let there = deepest_existing(&state)?;
        for (role, directory) in [("source", &self.source), ("replica", &self.replica)] {
            // A replica that is still missing may be made around the state
            // directory's place.
            let inside =
                state.starts_with(directory) || (directory.exists() && within(there, directory)?);
            ensure!(
                !inside,
                "state directory {} lies inside the {role} {}: choose another with --state-dir",
                state.display(),
                directory.display()
            );
        }
        Ok(())
    }

    /// Makes the replica's directory when it is missing.
    pub fn make_replica(&self) -> anyhow::Result<()> {
        match fs::create_dir(&self.replica) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(error)
                .with_context(|| format!("cannot make replica {}", self.replica.display())),
            _ => Ok(()),
        }
    }

    /// Where changes come from; canonical.
    pub fn source(&self) -> &Path {
        &self.source
    }

    /// Where they go; canonical.
    pub fn replica(&self) -> &Path {
        &self.replica
    }
}

fn existing_directory(role: &str, path: &Path) -> anyhow::Result<PathBuf> {
    let found = match fs::metadata(path) {
        Ok(found) => found,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            bail!("{role} {} does not exist", path.display())
        }
        Err(error) => {
            return Err(error).with_context(|| format!("cannot read {role} {}", path.display()));
        }
    };
    ensure!(found.is_dir(), "{role} {} is not a directory", path.display());
    fs::read_dir(path).with_context(|| format!("cannot read {role} {}", path.display()))?;
    path.canonicalize().with_context(|| format!("cannot resolve {role} {}", path.display()))
}

/// The canonical path of a directory that exists or could be made.
fn possible_directory(role: &str, path: &Path) -> anyhow::Result<PathBuf> {
    let path = std::path::absolute(path)
        .with_context(|| format!("cannot use {role} {}", path.display()))?;
    let mut missing: Vec<&OsStr> = Vec::new();
    let mut there = path.as_path();
    loop {
        match fs::symlink_metadata(there) {
            Ok(_) => break,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => {
                return Err(error).with_context(|| format!("cannot use {role} {}", path.display()));
            }
        }
        let Some(Component::Normal(name)) = there.components().next_back() else {
            bail!("{role} {} cannot be made: `..` of what does not exist", path.display());
        };
        missing.push(name);
        there = there.parent().unwrap_or(Path::new("/"));
    }
    let found = fs::metadata(there)
        .with_context(|| format!("{role} {}: cannot follow {}", path.display(), there.display()))?;
    ensure!(found.is_dir(), "{role} {}: {} is not a directory", path.display(), there.display());
    let mut resolved = there
        .canonicalize()
        .with_context(|| format!("cannot resolve {role} {}", path.display()))?;
    resolved.extend(missing.into_iter().rev());
    Ok(resolved)
}

fn deepest_existing(path: &Path) -> anyhow::Result<&Path> {
    path.ancestors()
        .find(|ancestor| ancestor.exists())
        .with_context(|| format!("no part of {} can be read", path.display()))
}

fn within(inner: &Path, outer: &Path) -> anyhow::Result<bool> {
    is_within(inner, outer).with_context(|| {
        format!("cannot tell whether {} lies inside {}", inner.display(), outer.display())
    })
}

fn same(a: &Path, b: &Path) -> anyhow::Result<bool> {
    Ok(within(a, b)? && within(b, a)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(source: &Path, replica: &Path) -> String {
        format!("{:#}", Pair::check(source, replica).unwrap_err())
    }

    #[test]
    fn what_is_refused_and_why() {
        let base = tempfile::tempdir().unwrap();
        let base = base.path().canonicalize().unwrap();
        let (source, replica) = (base.join("source"), base.join("replica"));
        let b = base.display();
        assert_eq!(refused(&source, &replica), format!("source {b}/source does not exist"));
        fs::write(&source, "").unwrap();
        assert_eq!(refused(&source, &replica), format!("source {b}/source is not a directory"));
        fs::remove_file(&source).unwrap();
        fs::create_dir_all(source.join("sub")).unwrap();

        let inside = format!(
            "replica {b}/source/sub/new/er lies inside the source {b}/source: it would replicate itself"
        );
        assert_eq!(refused(&source, &source.join("sub/new/er")), inside);
        assert!(!source.join("sub/new").exists(), "nothing was made");
        assert_eq!(
            refused(&source.join("sub"), &source),
            format!(
                "source {b}/source/sub lies inside the replica {b}/source: replication would overwrite it"
            )
        );
        assert_eq!(
            refused(&source, &source.join("sub/..")),
            format!("source and replica are the same directory, {b}/source")
        );
        fs::write(&replica, "").unwrap();
        assert_eq!(
            refused(&source, &replica),
            format!("replica {b}/replica: {b}/replica is not a directory")
        );
        fs::remove_file(&replica).unwrap();
        std::os::unix::fs::symlink("nowhere", &replica).unwrap();
        assert!(refused(&source, &replica).contains("cannot follow"), "dangling link");
        assert!(refused(&source, &base.join("none/../../x")).contains("cannot be made"));
        assert_eq!(
            refused(&source, &base.join("none/x")),
            format!("replica {b}/none/x cannot be made: {b}/none does not exist")
        );
    }

    #[test]
    fn a_missing_replica_is_made_and_links_are_resolved() {
        let base = tempfile::tempdir().unwrap();
        let base = base.path().canonicalize().unwrap();
        fs::create_dir_all(base.join("real")).unwrap();
        fs::create_dir(base.join("source")).unwrap();
        std::os::unix::fs::symlink("real", base.join("link")).unwrap();
        let pair = Pair::check(&base.join("source"), &base.join("link/a")).unwrap();
        assert_eq!(pair.replica(), base.join("real/a"));
        pair.make_replica().unwrap();
        pair.make_replica().unwrap();
        assert!(base.join("real/a").is_dir());
    }

    #[test]
    fn state_lies_outside_of_both() {
        let base = tempfile::tempdir().unwrap();
        let base = base.path().canonicalize().unwrap();
        fs::create_dir(base.join("source")).unwrap();
        let pair = Pair::check(&base.join("source"), &base.join("replica")).unwrap();
        for bad in ["source", "source/state", "replica/state", "replica"] {
            let error = pair.check_outside(&base.join(bad)).unwrap_err().to_string();
            assert!(error.contains("lies inside the"), "{bad}: {error}");
        }
        pair.check_outside(&base.join("state")).unwrap();
    }
}
