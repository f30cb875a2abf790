//! The source's tree, looked at through descriptors.
//!
//! Objects are opened by handle where that is allowed, and otherwise by the
//! names that lead to them, one component at a time, each step checked by
//! handle. Links are never followed.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use foldhash::HashMap;
use replicator_common::id::ObjectId;
use replicator_common::name::Name;
use replicator_common::object::Kind;
use replicator_common::sys::stat::Stat;
use replicator_common::sys::{handle, place, stat};
use replicator_common::time::Timestamp;
use rustix::fs::{Mode, OFlags, RawDir};
use rustix::io::Errno;

pub use crate::places::{Opened, Places};
use crate::plan::{Fate, Listed, Lookup, Seen, Skip, Tree};
use crate::watcher::DirectoryWatch;

/// Directories whose descriptors are kept open between look-ups.
const OPEN_DIRECTORIES: usize = 512;

/// Bytes that one system call reads of a directory, as the C library's `readdir` has it.
const LIST_BUFFER: usize = 32 << 10;

/// `statfs(2)` of ext2, ext3 and ext4.
const EXT: u64 = 0xef53;
/// `statfs(2)` of btrfs.
const BTRFS: u64 = 0x9123_683e;

/// Why the source could not be looked at.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    /// The source cannot be used at all.
    #[error("{}: {reason}", path.display())]
    Unusable {
        /// The source's path.
        path: PathBuf,
        /// What to do about it, in words.
        reason: String,
    },
    /// One call failed.
    #[error("cannot {action} {what}: {}", told(*source))]
    Call {
        /// What was tried.
        action: &'static str,
        /// On what: an object's id, or an entry.
        what: String,
        /// What the system said.
        source: Errno,
    },
}

impl SourceError {
    fn call(action: &'static str, what: impl ToString) -> impl FnOnce(Errno) -> Self {
        move |source| Self::Call { action, what: what.to_string(), source }
    }
}

/// What the system said, and what an operator can do about it.
pub fn told(error: Errno) -> String {
    let advice = match error {
        Errno::ACCESS | Errno::PERM => {
            "; let the daemon's user read it, or give the daemon CAP_DAC_READ_SEARCH"
        }
        Errno::IO => "; look into the kernel's log for errors of the source's disk",
        _ => "",
    };
    format!("{error}{advice}")
}

/// The root of a source: pinned by a descriptor, so that the file system
/// cannot be unmounted under the watcher (trap 13).
pub struct Root {
    fd: OwnedFd,
    /// The root directory's id.
    pub id: ObjectId,
    /// The path it was opened by, for messages.
    pub path: PathBuf,
    /// The mount that entries must be on to be entered.
    mount_id: u64,
    /// Device of the root, used where the kernel tells no mount ids.
    dev: u64,
    /// Objects can be opened by handle.
    by_handle: bool,
    /// The root directory is the root of an ext2/3/4 file system, whose
    /// `lost+found` belongs to the file system itself.
    own_lost_and_found: bool,
    /// Nothing of the file system lies outside the source.
    whole: bool,
}

impl Root {
    /// Opens the source at `path`, which must be a directory.
    pub fn open(path: &Path) -> Result<Self, SourceError> {
        let unusable = |reason: String| SourceError::Unusable { path: path.to_owned(), reason };
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let fd = rustix::fs::open(path, flags, Mode::empty()).map_err(|error| {
            unusable(match error {
                Errno::NOENT => "the source does not exist".to_owned(),
                Errno::NOTDIR => "the source is not a directory".to_owned(),
                other => format!("the source cannot be opened: {other}"),
            })
        })?;
        let id = handle::identify(fd.as_fd())
            .map_err(|error| unusable(format!("the source has no identity: {error}")))?;
        let data = stat::of_fd(&fd).map_err(|error| unusable(error.to_string()))?;
        let by_handle = handle::open(fd.as_fd(), &id, OFlags::PATH).is_ok();
        let own_lost_and_found =
            data.ino == 2 && rustix::fs::fstatfs(&fd).is_ok_and(|fs| fs.f_type as u64 == EXT);
        Ok(Self {
            fd,
            id,
            path: path.to_owned(),
            mount_id: data.mount_id,
            dev: data.dev,
            by_handle,
            own_lost_and_found,
            whole: is_root_inode(&data),
        })
    }

    /// The pinned descriptor.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// Device number of the root's file system, while it is mounted.
    pub fn dev(&self) -> u64 {
        self.dev
    }

    /// When the root directory was made, where the file system keeps that:
    /// tells file systems apart whose roots have equal handles.
    pub fn born(&self) -> Option<Timestamp> {
        stat::of_fd(&self.fd).ok().and_then(|data| data.btime)
    }

    /// What the file system itself is called, where that lasts: its UUID, cut to
    /// 64 bits, of ext2/3/4 and btrfs. Others say the device's number, or nothing.
    pub fn file_system(&self) -> Option<u64> {
        let kind = rustix::fs::fstatfs(&self.fd).ok()?.f_type as u64;
        let lasts = matches!(kind, EXT | BTRFS);
        lasts.then(|| rustix::fs::fstatvfs(&self.fd).ok().map(|data| data.f_fsid)).flatten()
    }

    /// Whether objects can be opened by handle; else names lead to them.
    pub fn by_handle(&self) -> bool {
        self.by_handle
    }

    /// Whether the path still leads to this very directory (trap 13): not so
    /// when it was unmounted, mounted over or replaced. Root directories of two
    /// file systems may have equal handles; their devices differ as long as
    /// both are mounted.
    pub fn still_there(&self) -> bool {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        rustix::fs::open(&self.path, flags, Mode::empty())
            .and_then(|fd| Ok((handle::identify(fd.as_fd())?, stat::of_fd(&fd)?.dev)))
            .is_ok_and(|found| found == (self.id.clone(), self.dev))
    }

    /// Whether the source is a whole file system as mounted: then nothing on it
    /// lies outside.
    pub fn is_file_system_root(&self) -> bool {
        self.whole
    }

    /// Whether something is on another mount than the root.
    pub fn elsewhere(&self, data: &stat::Stat) -> bool {
        if self.mount_id != 0 && data.mount_id != 0 {
            data.mount_id != self.mount_id
        } else {
            data.dev != self.dev
        }
    }
}

/// Root directories have a fixed inode number: 2 on ext2/3/4, 1 on tmpfs. Others
/// (xfs's varies, btrfs's subvolumes all have 256) are not taken for roots;
/// their events are looked at one by one.
fn is_root_inode(data: &stat::Stat) -> bool {
    data.ino <= 2
}

/// What does not replicate, by the operator's choice or ours.
#[derive(Clone, Debug, Default)]
pub struct Filter {
    /// Device nodes replicate.
    pub devices: bool,
    /// The name of the hidden directory that the destination keeps in the
    /// replica's root; must never be met in the source.
    pub reserved: Option<Name>,
}

/// Opens objects of a source.
#[derive(Clone)]
pub struct Opener {
    root: Arc<Root>,
    places: Arc<Places>,
}

impl Opener {
    /// For a source.
    pub fn new(root: Arc<Root>, places: Arc<Places>) -> Self {
        Self { root, places }
    }

    /// The root it opens below.
    pub fn root(&self) -> &Root {
        &self.root
    }

    /// Opens an object; `hint` is a name that led to it.
    pub fn open(
        &self,
        object: &ObjectId,
        hint: Option<&(ObjectId, Name)>,
        flags: OFlags,
    ) -> Result<Opened, Errno> {
        if !self.root.by_handle {
            return self.open_by_name(object, hint, flags);
        }
        match handle::open(self.root.fd(), object, flags | OFlags::NOFOLLOW) {
            Ok(fd) => Ok(Opened::Here(fd)),
            Err(Errno::STALE | Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => Ok(Opened::Gone),
            Err(error) => Err(error),
        }
    }

    fn open_by_name(
        &self,
        object: &ObjectId,
        hint: Option<&(ObjectId, Name)>,
        flags: OFlags,
    ) -> Result<Opened, Errno> {
        if let Some((directory, name)) = hint
            && let Opened::Here(directory) = self.directory(directory)?
        {
            let flags = flags | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NONBLOCK;
            match rustix::fs::openat(&directory, name.as_bytes(), flags, Mode::empty()) {
                Ok(fd) if handle::identify(fd.as_fd())? == *object => return Ok(Opened::Here(fd)),
                Ok(_) | Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => {}
                Err(error) => return Err(error),
            }
        }
        // Of directories alone, other places are known.
        match self.directory(object)? {
            Opened::Here(fd) if flags.contains(OFlags::PATH) => {
                let own = fd.try_clone();
                own.map(Opened::Here).map_err(|_| Errno::MFILE)
            }
            Opened::Here(fd) => place::reopen((*fd).as_fd(), flags).map(Opened::Here),
            Opened::Gone => Ok(Opened::Gone),
            Opened::Away => Ok(Opened::Away),
        }
    }

    /// A directory, by the names that lead to it. `O_PATH`.
    fn directory(&self, id: &ObjectId) -> Result<Opened<Arc<OwnedFd>>, Errno> {
        self.places.directory(self.root.fd(), &self.root.id, id)
    }

    /// A directory that left the source needs no descriptor any more.
    pub fn forget(&self, object: &ObjectId) {
        if !self.root.by_handle {
            self.places.forget(object);
        }
    }

    /// Flags for reading content without leaving a trace in access times,
    /// where that is allowed.
    pub fn open_content(
        &self,
        object: &ObjectId,
        hint: Option<&(ObjectId, Name)>,
    ) -> Result<Opened, Errno> {
        let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
        match self.open(object, hint, flags | OFlags::NOATIME) {
            Err(Errno::PERM) => self.open(object, hint, flags),
            result => result,
        }
    }
}

/// [`Tree`] of the real source.
pub struct SourceTree {
    opener: Opener,
    filter: Filter,
    watch: Arc<dyn DirectoryWatch>,
    directories: Mutex<Directories>,
    /// Directories that could not be listed since the last look, with the error.
    troubles: Mutex<Vec<(ObjectId, String)>>,
    /// Objects whose fate could not be told since the last look, with the error.
    doubts: Vec<(ObjectId, String)>,
}

/// What is remembered of directories between look-ups.
#[derive(Default)]
struct Directories {
    open: HashMap<ObjectId, Arc<OwnedFd>>,
    /// The one that was found gone last: its handle leads nowhere any more, and a batch
    /// asks for each of the entries that it had.
    gone: Option<ObjectId>,
}

impl SourceTree {
    /// Over a source; `watch` is told of each directory before it is listed.
    pub fn new(opener: Opener, filter: Filter, watch: Arc<dyn DirectoryWatch>) -> Self {
        let (directories, troubles) = (Mutex::default(), Mutex::default());
        Self { opener, filter, watch, directories, troubles, doubts: Vec::new() }
    }

    /// Opens what it needs.
    pub fn opener(&self) -> &Opener {
        &self.opener
    }

    /// The directory's descriptor: `O_PATH` where names lead to it.
    fn directory(&self, id: &ObjectId) -> Result<Opened<Arc<OwnedFd>>, SourceError> {
        let failed = SourceError::call("open directory", id);
        if !self.opener.root.by_handle {
            return self.opener.directory(id).map_err(failed);
        }
        {
            let Directories { open, gone } = &*self.directories();
            if let Some(fd) = open.get(id) {
                return Ok(Opened::Here(fd.clone()));
            }
            if gone.as_ref() == Some(id) {
                return Ok(Opened::Gone);
            }
        }
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let fd = match self.opener.open(id, None, flags).map_err(failed)? {
            Opened::Here(fd) => Arc::new(fd),
            Opened::Gone => {
                self.directories().gone = Some(id.clone());
                return Ok(Opened::Gone);
            }
            Opened::Away => return Ok(Opened::Away),
        };
        let mut known = self.directories();
        if known.open.len() >= OPEN_DIRECTORIES {
            known.open.clear();
        }
        known.open.insert(id.clone(), fd.clone());
        Ok(Opened::Here(fd))
    }

    fn directories(&self) -> MutexGuard<'_, Directories> {
        self.directories.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The same, to be listed.
    fn readable(&self, id: &ObjectId) -> Result<Opened<Arc<OwnedFd>>, SourceError> {
        let found = self.directory(id)?;
        match found {
            Opened::Here(fd) if !self.opener.root.by_handle => {
                let flags = OFlags::RDONLY | OFlags::DIRECTORY;
                place::reopen((*fd).as_fd(), flags)
                    .map(|fd| Opened::Here(Arc::new(fd)))
                    .map_err(SourceError::call("open directory", id))
            }
            found => Ok(found),
        }
    }

    /// Directories that could not be listed since the last call, with the error.
    pub fn take_troubles(&mut self) -> Vec<(ObjectId, String)> {
        // A file system of another machine may have said so for a moment.
        self.directories().gone = None;
        std::mem::take(self.troubles.get_mut().unwrap_or_else(PoisonError::into_inner))
    }

    /// Objects without a name whose fate could not be told since the last call,
    /// with the error.
    pub fn take_doubts(&mut self) -> Vec<(ObjectId, String)> {
        std::mem::take(&mut self.doubts)
    }

    fn try_fate(&self, object: &ObjectId) -> Result<Fate, Errno> {
        let fd = match self.opener.open(object, None, OFlags::PATH)? {
            Opened::Here(fd) => fd,
            Opened::Gone => return Ok(Fate::Dead),
            // Nothing tells whether it lives under another name; it waits as
            // an orphan until every event has been seen.
            Opened::Away => return Ok(Fate::Alive),
        };
        let nlink = stat::of_fd(&fd)?.nlink;
        Ok(if nlink == 0 { Fate::Dead } else { Fate::Alive })
    }

    /// A directory that cannot be listed is passed over (what the replica has
    /// of it stays) and remembered.
    fn trouble(&self, directory: &ObjectId, error: impl ToString) -> Listed {
        let trouble = (directory.clone(), error.to_string());
        self.troubles.lock().unwrap_or_else(PoisonError::into_inner).push(trouble);
        Listed::Gone
    }

    /// Closes the directories kept open, so that removed ones are let go.
    pub fn forget_open(&mut self) {
        *self.directories() = Directories::default();
    }

    /// See [`Tree::prober`]. Of files and symbolic links alone.
    ///
    /// The inode number has to do where the handle holds it: a number that was
    /// given anew comes with a change time that is later than any reading of the
    /// object before, so whoever compares that too (and knows that the change
    /// time of that object was well before its reading) is not misled.
    fn probe(&self, directory: BorrowedFd<'_>, name: &Name, object: &ObjectId) -> Option<Stat> {
        let stat = stat::of_entry(directory, name).ok()?;
        let plain = matches!(stat.kind, Kind::File | Kind::Symlink);
        let reserved = self.filter.reserved.as_ref() == Some(name);
        if !plain || reserved || self.opener.root().elsewhere(&stat) {
            return None;
        }
        let linked = stat.nlink > 1;
        let same = match object.inode() {
            Some(inode) if !linked => inode == stat.ino,
            _ => handle::identify_entry(directory, name).ok()? == *object,
        };
        if same && linked {
            self.watch.linked(directory, name, object);
        }
        same.then_some(stat)
    }

    fn skip(&self, directory: &ObjectId, name: &Name, data: &stat::Stat) -> Option<Skip> {
        let root = self.opener.root();
        let own = root.own_lost_and_found && name.as_bytes() == b"lost+found";
        if *directory == root.id && own {
            return Some(Skip::Reserved);
        }
        match data.kind {
            Kind::Socket => Some(Skip::Socket),
            Kind::Fifo => Some(Skip::Fifo),
            kind if kind.is_device() && !self.filter.devices => Some(Skip::Device),
            _ if root.elsewhere(data) => Some(Skip::Mount),
            _ => None,
        }
    }
}

impl Tree for SourceTree {
    type Error = SourceError;

    fn lookup(&mut self, directory: &ObjectId, name: &Name) -> Result<Lookup, SourceError> {
        let fd = match self.directory(directory) {
            Ok(Opened::Here(fd)) => fd,
            Ok(Opened::Gone) => return Ok(Lookup::Absent),
            Ok(Opened::Away) => return Ok(Lookup::Away),
            Err(error) => return Ok(Lookup::Unreadable(error.to_string())),
        };
        // RACE: between the two calls the name may come to mean another
        // object, and the stat is of the other. The event of that change is
        // behind us in the queue, so the entry is looked at again.
        let found = handle::identify_entry(fd.as_fd(), name)
            .and_then(|object| Ok((object, stat::of_entry(fd.as_fd(), name)?)));
        let (object, stat) = match found {
            Ok(found) => found,
            Err(Errno::NOENT | Errno::STALE | Errno::NOTDIR) => return Ok(Lookup::Absent),
            Err(error) => return Ok(Lookup::Unreadable(told(error))),
        };
        if self.filter.reserved.as_ref() == Some(name) {
            // Only this replication's destination makes a directory of that
            // name: the replica is in the source (trap 18).
            let path = self.opener.root().path.clone();
            let reason = "the replica lies inside the source".to_owned();
            return Err(SourceError::Unusable { path, reason });
        }
        if let Some(skip) = self.skip(directory, name, &stat) {
            return Ok(Lookup::Skipped(skip));
        }
        if stat.kind == Kind::Directory {
            self.watch.found(&object);
            if !self.opener.root.by_handle {
                self.opener.places.learn(&object, directory, name);
            }
        } else if stat.nlink > 1 {
            self.watch.linked(fd.as_fd(), name, &object);
        }
        Ok(Lookup::Found(Seen { object, stat }))
    }

    fn prober(&self, directory: &ObjectId) -> impl Fn(&Name, &ObjectId) -> Option<Stat> {
        let fd = match self.directory(directory) {
            Ok(Opened::Here(fd)) => Some(fd),
            // It is looked at once more, and then the reason counts.
            Ok(Opened::Gone | Opened::Away) | Err(_) => None,
        };
        move |name, object| self.probe(fd.as_ref()?.as_fd(), name, object)
    }

    fn list(&self, directory: &ObjectId, most: usize) -> Result<Listed, SourceError> {
        let fd = match self.readable(directory) {
            Ok(Opened::Here(fd)) => fd,
            Ok(Opened::Gone) => return Ok(Listed::Gone),
            Ok(Opened::Away) => return Ok(Listed::Away),
            Err(error) => return Ok(self.trouble(directory, error)),
        };
        self.watch.before_listing(fd.as_fd(), directory);
        match names_in(&fd, most) {
            Ok(Some(names)) => Ok(Listed::Names(names)),
            Ok(None) => Ok(Listed::Many),
            // A directory that is removed while it is read ends so.
            Err(Errno::NOENT | Errno::STALE) => Ok(Listed::Gone),
            Err(error) => Ok(self.trouble(directory, told(error))),
        }
    }

    fn suppose(&mut self, object: &ObjectId, directory: &ObjectId, name: &Name) {
        let Opener { root, places } = &self.opener;
        if !root.by_handle && places.find(object).is_none() {
            places.learn(object, directory, name);
        }
    }

    fn fate(&mut self, object: &ObjectId) -> Result<Fate, SourceError> {
        self.try_fate(object).or_else(|error| {
            // One object that cannot be looked at must not stop the rest. As
            // long as nobody knows, it is not dead: it is asked for again, and
            // waits as an orphan until every event of a new name has been seen.
            self.doubts.push((object.clone(), error.to_string()));
            Ok(Fate::Alive)
        })
    }
}

/// All names in a directory, in the file system's order; `None` if they are more than
/// `most`.
fn names_in(directory: &OwnedFd, most: usize) -> Result<Option<Vec<Name>>, Errno> {
    // A place to read on of its own: others may read the same directory.
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let fd = rustix::fs::openat(directory, c".", flags, Mode::empty())?;
    let mut buffer = Vec::with_capacity(LIST_BUFFER);
    let mut entries = RawDir::new(fd, buffer.spare_capacity_mut());
    let mut names = Vec::new();
    while let Some(entry) = entries.next() {
        let entry = match entry {
            Ok(entry) => entry,
            Err(Errno::INTR) => continue,
            Err(error) => return Err(error),
        };
        // (What is no name are the directory itself and the one above.)
        names.extend(Name::new(entry.file_name().to_bytes()).ok());
        if names.len() > most {
            return Ok(None);
        }
    }
    Ok(Some(names))
}

#[cfg(test)]
mod tests;
