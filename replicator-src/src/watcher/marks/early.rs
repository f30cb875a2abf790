//! Marks on new directories, as soon as it is known that they are there.
//!
//! Whatever stands in a directory when it is listed is found, for it is marked
//! before. What came and went before that can matter all the same: a file of the
//! source that got a name in it, was changed through that name and lost it
//! again. No other mark tells of that. A batch may list a directory long after
//! it was made (hours, while the destination is away), so that is too late: the
//! thread that reads the event marks it at once, with what stands below it.
//!
//! What is done between a directory's making and the reading of its event goes
//! unseen if it leaves nothing behind there; status says so.

use std::os::fd::{AsFd, OwnedFd};

use replicator_common::id::ObjectId;
use replicator_common::name::Name;
use replicator_common::sys::fanotify::{Event, Place, bits};
use replicator_common::sys::{handle, place, stat};
use rustix::fs::{Dir, FileType, Mode, OFlags};
use rustix::io::Errno;

use super::{Directories, MASK};
use crate::places::Opened;

/// Directories that are marked for one event at most: the queue must not fill up
/// meanwhile. Those beyond are marked when they are listed.
const DIRECTORIES: usize = 64;
/// Names that are looked at in one of them, at most.
const NAMES: usize = 4096;

const PATH: OFlags =
    OFlags::PATH.union(OFlags::DIRECTORY).union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC);

impl Directories {
    /// Takes in where an event says that directories came from and went.
    pub(super) fn follow(&self, event: &Event) {
        if !event.is(bits::ONDIR) {
            return;
        }
        let Some(target) = &event.target else { return };
        let came = match &event.new {
            None if event.is(bits::CREATE) => event.place.as_ref(),
            None if event.is(bits::RENAME) => return self.left(target),
            Some(new) => Some(new),
            None => None,
        };
        if let Some(place) = came
            && !self.state().marked.contains(target)
        {
            // What cannot be opened is gone, elsewhere, or forbidden: whoever
            // lists it marks it, or says that it cannot be marked.
            let _ = self.open(target, place).and_then(|found| match found {
                Some(directory) => self.mark_early(directory, target.clone()),
                None => Ok(()),
            });
        }
    }

    /// A directory was moved out. If somebody has listed it, it is a matter of
    /// [`DirectoryWatch::forget`](crate::watcher::DirectoryWatch::forget).
    fn left(&self, id: &ObjectId) {
        let mut state = self.state();
        if state.early.remove(id) {
            state.marked.remove(id);
            state.strays |= self.unmark(id, MASK).is_err();
        }
    }

    /// A directory that has just got a place; `None` when it has left it.
    fn open(&self, id: &ObjectId, place: &Place) -> Result<Option<OwnedFd>, Errno> {
        match handle::open(self.root.fd(), id, PATH) {
            Ok(directory) => return Ok(Some(directory)),
            Err(Errno::PERM) => {}
            Err(error) => return Err(error),
        }
        let Some(name) = &place.name else { return Ok(None) };
        let above = self.places.directory(self.root.fd(), self.root.id(), &place.directory)?;
        let Opened::Here(above) = above else { return Ok(None) };
        let directory = rustix::fs::openat(&above, name.as_bytes(), PATH, Mode::empty())?;
        if handle::of_fd(directory.as_fd())? != *id {
            return Ok(None);
        }
        self.learn(id, &place.directory, name);
        Ok(Some(directory))
    }

    /// For what will be made in it. Whoever has looked at it since knows better.
    fn learn(&self, id: &ObjectId, directory: &ObjectId, name: &Name) {
        if self.places.find(id).is_none() {
            self.places.learn(id, directory, name);
        }
    }

    /// Marks a directory and those below it: what was made in it before it had
    /// its mark was told to nobody.
    fn mark_early(&self, directory: OwnedFd, id: ObjectId) -> Result<(), Errno> {
        let mut found = vec![(directory, id)];
        let mut left = DIRECTORIES;
        while let Some((directory, id)) = found.pop() {
            if !self.mark_one(&directory, &id)? {
                continue;
            }
            for name in names_of_directories(&directory)? {
                if left == 0 {
                    break;
                }
                let Some((below, below_id)) = step(&directory, &name)? else { continue };
                left -= 1;
                self.learn(&below_id, &id, &name);
                found.push((below, below_id));
            }
        }
        Ok(())
    }

    /// Says whether it had no mark before.
    fn mark_one(&self, directory: &OwnedFd, id: &ObjectId) -> Result<bool, Errno> {
        let mut state = self.state();
        if state.marked.contains(id) {
            return Ok(false);
        }
        self.group.mark_directory(directory.as_fd(), MASK)?;
        state.marked.insert(id.clone());
        state.early.insert(id.clone());
        Ok(true)
    }
}

/// A directory in another, unless it is the root of another mount.
fn step(directory: &OwnedFd, name: &Name) -> Result<Option<(OwnedFd, ObjectId)>, Errno> {
    let below = match rustix::fs::openat(directory, name.as_bytes(), PATH, Mode::empty()) {
        Ok(below) => below,
        Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => return Ok(None),
        Err(error) => return Err(error),
    };
    let (here, there) = (stat::of_fd(directory)?, stat::of_fd(&below)?);
    let same = if here.mount_id != 0 && there.mount_id != 0 {
        here.mount_id == there.mount_id
    } else {
        here.dev == there.dev
    };
    let id = handle::of_fd(below.as_fd())?;
    Ok(same.then_some((below, id)))
}

/// Names that are, or may be, of directories.
fn names_of_directories(directory: &OwnedFd) -> Result<Vec<Name>, Errno> {
    let fd = place::reopen(directory.as_fd(), OFlags::RDONLY | OFlags::DIRECTORY)?;
    let mut names = Vec::new();
    for entry in Dir::new(fd)?.take(NAMES) {
        let entry = entry?;
        if matches!(entry.file_type(), FileType::Directory | FileType::Unknown)
            // Not `.` and `..`.
            && let Ok(name) = Name::new(entry.file_name().to_bytes())
        {
            names.push(name);
        }
    }
    Ok(names)
}
