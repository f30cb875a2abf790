//! The file systems that a daemon knows by an id: directories and mounts that
//! somebody registered, and those that are or were in a configuration here.
//!
//! A file system is known by its path. It keeps its id when its configuration
//! is deleted and made anew, and is forgotten by [`Registry::delete`] alone,
//! which touches nothing in it.
//!
//! All of it is one small file, `file-systems` in the daemon's state directory
//! (see [`crashsafe`]): version 1 is a list of [`FileSystem`], in JSON. It is
//! written anew with each change; a newer version is refused.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};

use crate::crashsafe::{self, Format, StateFileError};
use crate::id::FileSystemId;
use crate::time::Timestamp;

const FORMAT: Format = Format { name: "file-systems", version: 1 };
const FILE: &str = "file-systems";
/// The most that can be registered by hand: EFS's own quota.
pub const FILE_SYSTEMS_MAX: usize = 1000;

/// A file system that has an id.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileSystem {
    /// The id.
    pub id: FileSystemId,
    /// Its directory: absolute, without links.
    pub path: PathBuf,
    /// When it was registered.
    pub creation_time: Timestamp,
    /// What the client named its registration by; the id where there was none.
    pub creation_token: String,
    /// EFS's word, as it was asked for: it means nothing here.
    pub throughput_mode: ThroughputMode,
    /// Tags, without that of the path.
    pub tags: BTreeMap<String, String>,
    /// It may not become a replica (EFS's replication overwrite protection
    /// reads ENABLED). While it is one, this says what holds afterwards.
    pub protected: bool,
    /// Somebody registered it, rather than that it came with a configuration.
    pub by_hand: bool,
}

/// EFS's throughput modes that need nothing done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ThroughputMode {
    /// EFS's default.
    #[default]
    Bursting,
    /// The other one.
    Elastic,
}

/// A file system to be registered by hand.
#[derive(Clone, Debug)]
pub struct NewFileSystem {
    /// See [`FileSystem::creation_token`].
    pub creation_token: String,
    /// See [`FileSystem::path`].
    pub path: PathBuf,
    /// See [`FileSystem::throughput_mode`].
    pub throughput_mode: ThroughputMode,
    /// See [`FileSystem::tags`].
    pub tags: BTreeMap<String, String>,
}

/// Why the registry did not change.
#[derive(Debug, thiserror::Error)]
pub enum RegistryError {
    /// The token or the path is that of another.
    #[error("{what} is that of file system {id}")]
    Exists {
        /// Which of the two.
        what: String,
        /// The other.
        id: FileSystemId,
    },
    /// There is no such file system.
    #[error("file system {0} is not registered")]
    Unknown(FileSystemId),
    /// There are too many.
    #[error("{FILE_SYSTEMS_MAX} file systems are registered, which is the most there can be")]
    Full,
    /// The file.
    #[error(transparent)]
    File(#[from] StateFileError),
}

/// The file systems of one daemon.
#[derive(Debug)]
pub struct Registry {
    file: PathBuf,
    /// As the file has them, by id.
    all: Mutex<BTreeMap<FileSystemId, FileSystem>>,
}

impl Registry {
    /// Reads the registry in a state directory, which must exist.
    ///
    /// # Errors
    /// When the file is damaged or a newer program's.
    pub fn open(state_dir: &Path) -> Result<Self, StateFileError> {
        let file = state_dir.join(FILE);
        let all: Vec<FileSystem> = crashsafe::read(&file, &FORMAT)?.unwrap_or_default();
        let all = all.into_iter().map(|one| (one.id.clone(), one)).collect();
        Ok(Self { file, all: Mutex::new(all) })
    }

    /// Every one.
    pub fn list(&self) -> Vec<FileSystem> {
        self.lock().values().cloned().collect()
    }

    /// The one with this id.
    pub fn get(&self, id: &FileSystemId) -> Option<FileSystem> {
        self.lock().get(id).cloned()
    }

    /// The one at this path, which need not be free of links.
    pub fn at(&self, path: &Path) -> Option<FileSystem> {
        let resolved = path.canonicalize();
        let path = resolved.as_deref().unwrap_or(path);
        find_path(&self.lock(), path).cloned()
    }

    /// Whether no file system was made with this creation token.
    ///
    /// # Errors
    /// [`RegistryError::Exists`] when one was.
    pub fn is_new(&self, creation_token: &str) -> Result<(), RegistryError> {
        is_new(&self.lock(), creation_token)
    }

    /// Registers a file system. One that came with a configuration keeps its id.
    ///
    /// # Errors
    /// When token or path are another's, and when there are too many.
    pub fn create(&self, new: NewFileSystem) -> Result<FileSystem, RegistryError> {
        let mut all = self.lock();
        is_new(&all, &new.creation_token)?;
        let there = find_path(&all, &new.path).cloned();
        let made = match there {
            Some(other) if other.by_hand => {
                let what = new.path.display().to_string();
                return Err(RegistryError::Exists { what, id: other.id });
            }
            Some(known) => known,
            None if all.values().filter(|one| one.by_hand).count() >= FILE_SYSTEMS_MAX => {
                return Err(RegistryError::Full);
            }
            None => fresh(FileSystemId::random(), new.path),
        };
        let made = FileSystem {
            creation_token: new.creation_token,
            throughput_mode: new.throughput_mode,
            tags: new.tags,
            by_hand: true,
            ..made
        };
        self.put(&mut all, made.clone())?;
        Ok(made)
    }

    /// Remembers a file system that a configuration has, under the id that it
    /// has there, and that it is protected once it has left it.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn enter(&self, id: &FileSystemId, path: &Path) -> Result<(), RegistryError> {
        // JSON has no such path; nor has the API.
        if path.to_str().is_none() {
            return Ok(());
        }
        let mut all = self.lock();
        let known = all.get(id).cloned();
        let entered = known.clone().unwrap_or_else(|| fresh(id.clone(), path.to_owned()));
        let entered = FileSystem { protected: true, ..entered };
        if known.as_ref() == Some(&entered) {
            return Ok(());
        }
        self.put(&mut all, entered)
    }

    /// Changes one, and gives it as it is then.
    ///
    /// # Errors
    /// When there is no such file system, or the file cannot be written.
    pub fn update(
        &self,
        id: &FileSystemId,
        change: impl FnOnce(&mut FileSystem),
    ) -> Result<FileSystem, RegistryError> {
        let mut all = self.lock();
        let known = all.get(id).ok_or_else(|| RegistryError::Unknown(id.clone()))?;
        let mut changed = known.clone();
        change(&mut changed);
        self.put(&mut all, changed.clone())?;
        Ok(changed)
    }

    /// Forgets one; what it holds stays as it is.
    ///
    /// # Errors
    /// When there is no such file system, or the file cannot be written.
    pub fn delete(&self, id: &FileSystemId) -> Result<(), RegistryError> {
        let mut all = self.lock();
        let mut next = all.clone();
        next.remove(id).ok_or_else(|| RegistryError::Unknown(id.clone()))?;
        self.write(&next)?;
        *all = next;
        Ok(())
    }

    fn put(&self, all: &mut Map, one: FileSystem) -> Result<(), RegistryError> {
        let mut next = all.clone();
        next.insert(one.id.clone(), one);
        // First the file: what is told to anyone is there after a crash.
        self.write(&next)?;
        *all = next;
        Ok(())
    }

    fn write(&self, all: &Map) -> Result<(), StateFileError> {
        crashsafe::write(&self.file, &FORMAT, &all.values().collect::<Vec<_>>())
    }

    fn lock(&self) -> MutexGuard<'_, Map> {
        self.all.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

type Map = BTreeMap<FileSystemId, FileSystem>;

fn is_new(all: &Map, creation_token: &str) -> Result<(), RegistryError> {
    match all.values().find(|one| one.creation_token == creation_token) {
        Some(other) => {
            let what = format!("creation token {creation_token:?}");
            Err(RegistryError::Exists { what, id: other.id.clone() })
        }
        None => Ok(()),
    }
}

fn find_path<'a>(all: &'a Map, path: &Path) -> Option<&'a FileSystem> {
    all.values().find(|one| one.path == path)
}

fn fresh(id: FileSystemId, path: PathBuf) -> FileSystem {
    FileSystem {
        creation_token: id.to_string(),
        id,
        path,
        creation_time: Timestamp::now(),
        throughput_mode: ThroughputMode::default(),
        tags: BTreeMap::new(),
        protected: true,
        by_hand: false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn new(token: &str, path: &Path) -> NewFileSystem {
        NewFileSystem {
            creation_token: token.to_owned(),
            path: path.to_owned(),
            throughput_mode: ThroughputMode::Elastic,
            tags: BTreeMap::from([("Name".to_owned(), "data".to_owned())]),
        }
    }

    #[test]
    fn what_is_registered_is_there_after_a_restart() {
        let state = tempfile::tempdir().unwrap();
        let registry = Registry::open(state.path()).unwrap();
        let made = registry.create(new("one", Path::new("/data"))).unwrap();
        assert!(made.protected && made.by_hand);
        registry.update(&made.id, |one| one.protected = false).unwrap();
        let again = Registry::open(state.path()).unwrap();
        assert_eq!(again.get(&made.id), registry.get(&made.id));
        assert_eq!(again.at(Path::new("/data")).unwrap().id, made.id);
        assert!(!again.get(&made.id).unwrap().protected);
        again.delete(&made.id).unwrap();
        assert!(Registry::open(state.path()).unwrap().list().is_empty());
        assert!(matches!(again.delete(&made.id), Err(RegistryError::Unknown(_))));
    }

    #[test]
    fn tokens_and_paths_are_one_files_systems() {
        let state = tempfile::tempdir().unwrap();
        let registry = Registry::open(state.path()).unwrap();
        let made = registry.create(new("one", Path::new("/data"))).unwrap();
        for other in [new("one", Path::new("/other")), new("two", Path::new("/data"))] {
            let error = registry.create(other).unwrap_err();
            assert!(
                matches!(&error, RegistryError::Exists { id, .. } if *id == made.id),
                "{error}"
            );
        }
    }

    #[test]
    fn what_came_with_a_configuration_keeps_its_id_when_it_is_registered() {
        let state = tempfile::tempdir().unwrap();
        let registry = Registry::open(state.path()).unwrap();
        let id = FileSystemId::random();
        registry.enter(&id, Path::new("/replica")).unwrap();
        assert!(!registry.get(&id).unwrap().by_hand);
        let made = registry.create(new("one", Path::new("/replica"))).unwrap();
        assert_eq!((made.id.clone(), made.by_hand), (id.clone(), true));
        // As a replica again: protected afterwards, and its tags stay.
        registry.update(&id, |one| one.protected = false).unwrap();
        registry.enter(&id, Path::new("/replica")).unwrap();
        let known = registry.get(&id).unwrap();
        assert!(known.protected && known.by_hand && !known.tags.is_empty());
    }

    #[test]
    fn links_lead_to_what_is_registered() {
        let base = tempfile::tempdir().unwrap();
        let base = base.path().canonicalize().unwrap();
        std::fs::create_dir(base.join("data")).unwrap();
        std::os::unix::fs::symlink("data", base.join("link")).unwrap();
        let registry = Registry::open(&base).unwrap();
        let made = registry.create(new("one", &base.join("data"))).unwrap();
        assert_eq!(registry.at(&base.join("link")).map(|one| one.id), Some(made.id));
        assert_eq!(registry.at(&base.join("missing")), None);
    }

    #[test]
    fn a_newer_registry_is_refused_and_the_first_version_is_read() {
        let state = tempfile::tempdir().unwrap();
        let file = state.path().join(FILE);
        let newer = Format { version: FORMAT.version + 1, ..FORMAT };
        crashsafe::write(&file, &newer, &Vec::<FileSystem>::new()).unwrap();
        let error = Registry::open(state.path()).unwrap_err();
        assert!(matches!(error, StateFileError::Newer { .. }), "{error}");
        std::fs::write(&file, include_bytes!("registry-1.sample")).unwrap();
        let known = Registry::open(state.path()).unwrap().list();
        assert_eq!(known.len(), 1);
        assert_eq!(known[0].path, Path::new("/srv/data"));
        assert_eq!(known[0].tags["Name"], "data");
    }

    #[test]
    fn more_than_efss_quota_is_refused() {
        let state = tempfile::tempdir().unwrap();
        let registry = Registry::open(state.path()).unwrap();
        *registry.lock() = (0..FILE_SYSTEMS_MAX)
            .map(|n| fresh(format!("fs-{n:017x}").parse().unwrap(), format!("/{n}").into()))
            .map(|one| (one.id.clone(), FileSystem { by_hand: true, ..one }))
            .collect();
        let error = registry.create(new("one", Path::new("/data"))).unwrap_err();
        assert!(matches!(error, RegistryError::Full), "{error}");
        registry.enter(&FileSystemId::random(), Path::new("/replica")).unwrap();
    }
}
