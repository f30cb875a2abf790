//! Our own directories on the replica's file system.
//!
//! `.replicator-<source>/` in the replica's root, mode 0700, holds
//! `staging/0` … `staging/7`, `orphans` and the file `incarnation`. Beside it
//! stands, only when something had to be set aside, a visible
//! `efs-replication-lost+found-<source>-<time>/`.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use replicator_common::crashsafe::{self, Format, StateFileError};
use replicator_common::id::{FileSystemId, Incarnation, ReplicaHandle};
use replicator_common::name::Name;
use replicator_common::sys::{handle, place, proc_path, xattr};
use replicator_common::time::Timestamp;
use rustix::io::Errno;

use crate::access;

/// Says what is in a lost+found; written at failover.
pub const MANIFEST: &str = "manifest.json";
/// Directories that staging is spread over.
pub const SHARDS: u8 = 8;
const INCARNATION: Format = Format { name: "incarnation", version: 1 };

/// Why something could not be done on the replica's file system.
#[derive(Debug, thiserror::Error)]
pub enum AreaError {
    /// A system call failed.
    #[error("cannot {action} {what} in the replica: {source}{}", advice(*source))]
    System {
        /// What was tried.
        action: &'static str,
        /// On what.
        what: String,
        /// What the kernel said.
        source: Errno,
    },
    /// The incarnation file.
    #[error(transparent)]
    State(#[from] StateFileError),
}

impl AreaError {
    /// Wraps an error with what was tried on what.
    pub fn system(action: &'static str, what: impl ToString) -> impl FnOnce(Errno) -> Self {
        let what = what.to_string();
        move |source| Self::System { action, what, source }
    }

    /// What was given to the steps of a logged batch cannot be taken again.
    pub fn no_slack(error: &std::io::Error) -> Self {
        // An error that is not the kernel's is that too little is free.
        let source = Errno::from_io_error(error).unwrap_or(Errno::NOSPC);
        Self::System { action: "keep", what: "the space for what is logged".to_owned(), source }
    }

    /// Whether the error says something of the object, or of the space that is
    /// left for it, so that others may fare better (deletions above all, which
    /// make room). An error that every object would meet is waited out instead.
    pub fn is_of_one_object(&self) -> bool {
        let Self::System { source, .. } = self else { return false };
        !matches!(*source, Errno::ROFS | Errno::MFILE | Errno::NFILE | Errno::NOMEM)
    }

    /// Whether room on the disk, or of a quota, is what lacks.
    pub fn is_no_room(&self) -> bool {
        matches!(self, Self::System { source: Errno::NOSPC | Errno::DQUOT, .. })
    }
}

/// What an operator can do about an error, as the end of a sentence.
fn advice(error: Errno) -> &'static str {
    match error {
        Errno::NOSPC => "; free space on the replica's file system",
        Errno::DQUOT => "; raise the quota of the replica's file system",
        Errno::FBIG => "; the replica's file system cannot hold a file of that size",
        Errno::ROFS => "; remount the replica's file system for writing",
        Errno::IO => "; look into the kernel's log for errors of the replica's disk",
        _ => "",
    }
}

/// Our own directories, open.
#[derive(Debug)]
pub struct Area {
    root: OwnedFd,
    root_handle: ReplicaHandle,
    hidden_name: Name,
    hidden: OwnedFd,
    staging: Vec<OwnedFd>,
    orphans: OwnedFd,
    lost_prefix: String,
    lost: Mutex<Option<(Name, Arc<OwnedFd>)>>,
}

/// The hidden directory's name for a source.
pub fn hidden_name(source: &FileSystemId) -> Name {
    name(&format!(".replicator-{source}"))
}

/// How the names of lost+found directories for a source begin.
pub fn lost_prefix(source: &FileSystemId) -> String {
    format!("efs-replication-lost+found-{source}-")
}

fn name(text: &str) -> Name {
    // Ids of file systems have at most 43 characters.
    Name::new(text.as_bytes()).unwrap_or_else(|_| unreachable!("our own names are valid"))
}

impl Area {
    /// Opens the directories below the replica's writable root, making what is
    /// missing.
    pub fn open(root: BorrowedFd<'_>, source: &FileSystemId) -> Result<Self, AreaError> {
        let root = root.try_clone_to_owned().map_err(|error| {
            AreaError::system("open", ".")(Errno::from_io_error(&error).unwrap_or(Errno::IO))
        })?;
        let hidden_name = hidden_name(source);
        let hidden = directory(root.as_fd(), &hidden_name)?;
        let staging_parent = directory(hidden.as_fd(), &name("staging"))?;
        let staging = (0..SHARDS)
            .map(|shard| directory(staging_parent.as_fd(), &name(&shard.to_string())))
            .collect::<Result<_, _>>()?;
        let orphans = directory(hidden.as_fd(), &name("orphans"))?;
        let root_handle =
            handle::identify(root.as_fd()).map_err(AreaError::system("identify", "."))?;
        Ok(Self {
            root,
            root_handle,
            hidden_name,
            hidden,
            staging,
            orphans,
            lost_prefix: lost_prefix(source),
            lost: Mutex::new(None),
        })
    }

    /// The replica's root.
    pub fn root(&self) -> BorrowedFd<'_> {
        self.root.as_fd()
    }

    /// The root's handle.
    pub fn root_handle(&self) -> &ReplicaHandle {
        &self.root_handle
    }

    /// The hidden directory's name in the root.
    pub fn hidden_name(&self) -> &Name {
        &self.hidden_name
    }

    /// One of the staging directories.
    pub fn staging(&self, shard: u8) -> BorrowedFd<'_> {
        self.staging[usize::from(shard % SHARDS)].as_fd()
    }

    /// The orphan area.
    pub fn orphans(&self) -> BorrowedFd<'_> {
        self.orphans.as_fd()
    }

    /// Whether a name in the root is ours and no part of the replica.
    pub fn is_ours(&self, name: &Name) -> bool {
        *name == self.hidden_name || name.as_bytes().starts_with(self.lost_prefix.as_bytes())
    }

    /// Lost+found: the one that is there, or a new one.
    pub fn lost_and_found(&self) -> Result<(Name, Arc<OwnedFd>), AreaError> {
        let mut lost = self.lost.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((name, fd)) = lost.as_ref() {
            return Ok((name.clone(), fd.clone()));
        }
        let wanted = self.lost_name()?;
        let fd = Arc::new(directory(self.root.as_fd(), &wanted)?);
        *lost = Some((wanted.clone(), fd.clone()));
        Ok((wanted, fd))
    }

    /// What lost+found is called, or will be.
    pub fn lost_name(&self) -> Result<Name, AreaError> {
        Ok(match self.find_lost()? {
            Some(name) => name,
            None => name(&format!("{}{}", self.lost_prefix, Timestamp::now().to_compact())),
        })
    }

    /// Makes the directory of this name lost+found from now on.
    pub fn use_lost(&self, wanted: &Name) -> Result<(), AreaError> {
        let fd = Arc::new(directory(self.root.as_fd(), wanted)?);
        let mut lost = self.lost.lock().unwrap_or_else(PoisonError::into_inner);
        *lost = Some((wanted.clone(), fd));
        Ok(())
    }

    /// The newest lost+found of this source that is there and has no manifest:
    /// one that has is of a failover before, and must be left as it is.
    pub fn find_lost(&self) -> Result<Option<Name>, AreaError> {
        let names = place::list(self.root.as_fd()).map_err(AreaError::system("list", "."))?;
        let ours = |name: &Name| name.as_bytes().starts_with(self.lost_prefix.as_bytes());
        let mut found: Vec<_> = names.into_iter().map(|(name, _)| name).filter(ours).collect();
        found.sort();
        while let Some(newest) = found.pop() {
            match place::open_directory(self.root.as_fd(), &newest) {
                Ok(fd) => match place::open_path(fd.as_fd(), &name(MANIFEST)) {
                    Err(Errno::NOENT) => return Ok(Some(newest)),
                    Ok(_) => {}
                    Err(error) => return Err(AreaError::system("open", MANIFEST)(error)),
                },
                // Not a directory: somebody else's.
                Err(Errno::NOTDIR | Errno::LOOP) => {}
                Err(error) => return Err(AreaError::system("open", &newest)(error)),
            }
        }
        Ok(None)
    }

    fn incarnation_path(&self) -> PathBuf {
        self.hidden_path().join("incarnation")
    }

    /// A path on the writable side to our hidden directory, good in this process.
    pub fn hidden_path(&self) -> PathBuf {
        PathBuf::from(proc_path(self.hidden.as_fd()))
    }

    /// The incarnation that this replica says it belongs to.
    pub fn incarnation(&self) -> Result<Option<Incarnation>, AreaError> {
        Ok(crashsafe::read(&self.incarnation_path(), &INCARNATION)?)
    }

    /// Sets it, durably.
    pub fn set_incarnation(&self, incarnation: &Incarnation) -> Result<(), AreaError> {
        Ok(crashsafe::write(&self.incarnation_path(), &INCARNATION, incarnation)?)
    }

    /// Our hidden directory.
    pub fn hidden(&self) -> BorrowedFd<'_> {
        self.hidden.as_fd()
    }

    /// Removes the hidden directory with everything in it. Only for what is
    /// known to be of no more use to anybody.
    pub fn remove_hidden(&self) -> Result<(), AreaError> {
        remove_tree(self.root.as_fd(), &self.hidden_name)
    }
}

fn directory(parent: BorrowedFd<'_>, name: &Name) -> Result<OwnedFd, AreaError> {
    match access::with(&[parent], || place::make_directory(parent, name)) {
        Ok(()) | Err(Errno::EXIST) => {}
        Err(error) => return Err(AreaError::system("create", name)(error)),
    }
    let fd = place::open_directory(parent, name).map_err(AreaError::system("open", name))?;
    // A default ACL of the replica's root would be inherited by all that is
    // staged here.
    match xattr::remove(fd.as_fd(), b"system.posix_acl_default") {
        Ok(()) | Err(Errno::NOTSUP | Errno::PERM | Errno::ACCESS) => Ok(fd),
        Err(error) => Err(AreaError::system("remove the default ACL of", name)(error)),
    }
}

/// Removes a name and all below it, never following links, with descriptors
/// for one path at a time. It is no error when nothing is there.
pub fn remove_tree(parent: BorrowedFd<'_>, name: &Name) -> Result<(), AreaError> {
    match access::with(&[parent], || place::unlink(parent, name)) {
        Ok(()) | Err(Errno::NOENT) => return Ok(()),
        Err(Errno::ISDIR | Errno::PERM) => {}
        Err(error) => return Err(AreaError::system("remove", name)(error)),
    }
    let directory = place::open_directory(parent, name).map_err(AreaError::system("open", name))?;
    let names = place::list(directory.as_fd()).map_err(AreaError::system("list", name))?;
    for (child, _) in names {
        remove_tree(directory.as_fd(), &child)?;
    }
    access::with(&[parent], || place::remove_directory(parent, name))
        .map_err(AreaError::system("remove", name))
}
