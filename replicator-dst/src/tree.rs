//! The replica's file system, as applying sees it.
//!
//! Objects are opened by handle. Where that is not possible (no
//! `CAP_DAC_READ_SEARCH`, no handles), they are looked for under the places
//! that the plan's steps and hints name, one component at a time, and a place
//! counts only when the handle found there is the one wanted.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::rc::Rc;
use std::sync::Arc;

use replicator_common::id::ReplicaHandle;
use replicator_common::name::Name;
use replicator_common::object::ObjectState;
use replicator_common::status::{Abilities, Shortfalls};
use replicator_common::sys::mount::{self, CapabilitySet};
use replicator_common::sys::{handle, place, stat};
use replicator_common::time::Timestamp;
use rustix::fs::OFlags;
use rustix::io::Errno;

use crate::access;
use crate::apply::{Outcome, Place, ReplicaTree, Step, Within};
use crate::area::{Area, AreaError};
use crate::attributes::{self, Origin};
use crate::patch;

/// Directories kept open between steps; above it all are closed.
const CACHE_MAX: usize = 512;

/// What the replica can hold and how it can be reached.
pub fn abilities(area: &Area) -> Abilities {
    let can = |capability| mount::has_capability(capability).unwrap_or(false);
    let handles = handle::open(area.root(), area.root_handle(), OFlags::PATH).is_ok();
    let xattrs = rustix::fs::flistxattr(area.root(), &mut [0u8; 0]) != Err(Errno::NOTSUP);
    Abilities {
        chown: can(CapabilitySet::CHOWN),
        xattrs,
        privileged_xattrs: xattrs && can(CapabilitySet::SYS_ADMIN),
        devices: can(CapabilitySet::MKNOD),
        handles,
    }
}

/// The real [`ReplicaTree`].
pub struct Tree {
    area: Arc<Area>,
    by_handle: bool,
    cache: HashMap<ReplicaHandle, Rc<OwnedFd>>,
    hints: HashMap<ReplicaHandle, Vec<Place>>,
    /// What could not be held, since last taken.
    pub shortfalls: Shortfalls,
}

impl Tree {
    /// Over a replica. `by_handle` as [`Abilities::handles`] says.
    pub fn new(area: Arc<Area>, by_handle: bool) -> Self {
        Self {
            area,
            by_handle,
            cache: HashMap::new(),
            hints: HashMap::new(),
            shortfalls: Shortfalls::default(),
        }
    }

    /// Learns from a batch's steps where objects may stand.
    pub fn learn(&mut self, steps: &[Step]) {
        self.cache.clear();
        self.hints.clear();
        if self.by_handle {
            return;
        }
        for step in steps {
            let places: &[(&ReplicaHandle, &Place)] = match step {
                Step::Move { object, from, to, .. } => &[(object, from), (object, to)],
                Step::Link { object, to, .. } => &[(object, to)],
                Step::RemoveDirectory { object, at } | Step::Hint { object, at } => &[(object, at)],
                Step::Unlink { .. }
                | Step::Rewrite { .. }
                | Step::Patch { .. }
                | Step::Attributes { .. }
                | Step::Mtime { .. } => &[],
            };
            for (object, place) in places {
                self.hint(object, place);
            }
        }
    }

    /// Adds one place where an object may stand.
    pub fn hint(&mut self, object: &ReplicaHandle, place: &Place) {
        let places = self.hints.entry(object.clone()).or_default();
        if !places.contains(place) {
            places.push(place.clone());
        }
    }

    /// A descriptor of an object; `None` when it is gone.
    pub fn open(
        &mut self,
        object: &ReplicaHandle,
        flags: OFlags,
    ) -> Result<Option<OwnedFd>, AreaError> {
        if self.by_handle {
            return gone(handle::open(self.area.root(), object, flags))
                .map_err(AreaError::system("open object", object));
        }
        let Some(found) = self.find(object, &mut Vec::new())? else { return Ok(None) };
        if flags.contains(OFlags::PATH) {
            return Ok(Some(found));
        }
        access::with(&[found.as_fd()], || place::reopen(found.as_fd(), flags))
            .map(Some)
            .map_err(AreaError::system("open object", object))
    }

    /// `trail` is what is being looked for already.
    fn find(
        &mut self,
        object: &ReplicaHandle,
        trail: &mut Vec<ReplicaHandle>,
    ) -> Result<Option<OwnedFd>, AreaError> {
        if object == self.area.root_handle() {
            let root = self.area.root().try_clone_to_owned();
            return root.map(Some).map_err(|_| AreaError::system("open", ".")(Errno::MFILE));
        }
        // Places of before and after the batch may lead in a circle together.
        if trail.contains(object) {
            return Ok(None);
        }
        trail.push(object.clone());
        let found = self.find_at_hints(object, trail);
        trail.pop();
        found
    }

    fn find_at_hints(
        &mut self,
        object: &ReplicaHandle,
        trail: &mut Vec<ReplicaHandle>,
    ) -> Result<Option<OwnedFd>, AreaError> {
        for place in self.hints.get(object).cloned().unwrap_or_default() {
            let Some(directory) = self.directory_at(&place.within, trail)? else { continue };
            let directory = (*directory).as_fd();
            let open = || place::open_path(directory, &place.name);
            let opened = gone(access::with(&[directory], open))
                .map_err(AreaError::system("open", &place.name))?;
            if let Some(fd) = opened
                && handle::identify(fd.as_fd()).as_ref() == Ok(object)
            {
                return Ok(Some(fd));
            }
        }
        Ok(None)
    }

    fn directory(&mut self, within: &Within) -> Result<Option<Rc<OwnedFd>>, AreaError> {
        self.directory_at(within, &mut Vec::new())
    }

    fn directory_at(
        &mut self,
        within: &Within,
        trail: &mut Vec<ReplicaHandle>,
    ) -> Result<Option<Rc<OwnedFd>>, AreaError> {
        let own = |fd: BorrowedFd<'_>| {
            fd.try_clone_to_owned()
                .map(|fd| Some(Rc::new(fd)))
                .map_err(|_| AreaError::system("open", "own directory")(Errno::MFILE))
        };
        let key = area_key(within);
        if let Some(fd) = self.cache.get(&key) {
            return Ok(Some(fd.clone()));
        }
        let opened = match within {
            Within::Staging(shard) => own(self.area.staging(*shard))?,
            Within::Orphans => own(self.area.orphans())?,
            Within::LostAndFound => own(self.area.lost_and_found()?.1.as_fd())?,
            Within::Replica(object) if self.by_handle => {
                let flags = OFlags::PATH | OFlags::DIRECTORY;
                gone(handle::open(self.area.root(), object, flags))
                    .map_err(AreaError::system("open directory", object))?
                    .map(Rc::new)
            }
            Within::Replica(object) => self.find(object, trail)?.map(Rc::new),
        };
        if let Some(fd) = &opened {
            if self.cache.len() >= CACHE_MAX {
                self.cache.clear();
            }
            self.cache.insert(key, fd.clone());
        }
        Ok(opened)
    }

    /// Opens a file for writing, also one whose mode does not let us.
    fn open_to_write(&mut self, object: &ReplicaHandle) -> Result<Option<OwnedFd>, AreaError> {
        let Some(path) = self.open(object, OFlags::PATH)? else { return Ok(None) };
        let opened = match place::reopen(path.as_fd(), OFlags::RDWR | OFlags::NONBLOCK) {
            // Attributes are set afterwards, by a step of the same batch.
            Err(Errno::ACCESS) => place::set_mode(path.as_fd(), 0o600)
                .and_then(|()| place::reopen(path.as_fd(), OFlags::RDWR | OFlags::NONBLOCK)),
            opened => opened,
        };
        opened.map(Some).map_err(AreaError::system("open to write", object))
    }

    fn open_staged(&mut self, place: &Place) -> Result<Option<OwnedFd>, AreaError> {
        let Some(directory) = self.directory(&place.within)? else { return Ok(None) };
        gone(place::open_file((*directory).as_fd(), &place.name, OFlags::RDONLY))
            .map_err(AreaError::system("open", &place.name))
    }
}

/// What the cache knows a directory by. Our own areas get ids that no kernel
/// handle has.
fn area_key(within: &Within) -> ReplicaHandle {
    let own = |n: u8| {
        ReplicaHandle::new(ReplicaHandle::TAG_FOREIGN, &[n])
            .unwrap_or_else(|| unreachable!("two bytes fit"))
    };
    match within {
        Within::Replica(object) => object.clone(),
        Within::Staging(shard) => own(*shard),
        Within::Orphans => own(254),
        Within::LostAndFound => own(255),
    }
}

/// That a thing is not there is an answer, not an error.
fn gone<T>(result: Result<T, Errno>) -> Result<Option<T>, Errno> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(Errno::NOENT | Errno::STALE | Errno::NOTDIR) => Ok(None),
        Err(error) => Err(error),
    }
}

fn outcome(result: Result<(), Errno>) -> Result<Outcome, Errno> {
    match result {
        Ok(()) => Ok(Outcome::Done),
        Err(Errno::NOENT | Errno::STALE | Errno::NOTDIR) => Ok(Outcome::Missing),
        Err(Errno::EXIST) => Ok(Outcome::Occupied),
        Err(Errno::NOTEMPTY) => Ok(Outcome::NotEmpty),
        Err(error) => Err(error),
    }
}

impl ReplicaTree for Tree {
    type Error = AreaError;

    fn lookup(&mut self, place: &Place) -> Result<Option<ReplicaHandle>, AreaError> {
        // Looking is no reason to make a lost+found.
        if place.within == Within::LostAndFound && self.area.find_lost()?.is_none() {
            return Ok(None);
        }
        let Some(directory) = self.directory(&place.within)? else { return Ok(None) };
        let directory = (*directory).as_fd();
        gone(access::with(&[directory], || handle::identify_entry(directory, &place.name)))
            .map_err(AreaError::system("look up", &place.name))
    }

    fn rename(&mut self, from: &Place, to: &Place, replace: bool) -> Result<Outcome, AreaError> {
        let (Some(source), Some(target)) =
            (self.directory(&from.within)?, self.directory(&to.within)?)
        else {
            return Ok(Outcome::Missing);
        };
        let (source, target) = ((*source).as_fd(), (*target).as_fd());
        let action = || {
            if replace {
                return place::rename(source, &from.name, target, &to.name);
            }
            match place::rename_no_replace(source, &from.name, target, &to.name) {
                // RACE: none. Where the file system cannot promise not to
                // replace, we are still the only one who writes.
                Err(Errno::INVAL | Errno::NOSYS | Errno::NOTSUP) => {
                    match gone(handle::identify_entry(target, &to.name)) {
                        Ok(None) => place::rename(source, &from.name, target, &to.name),
                        Ok(Some(_)) => Err(Errno::EXIST),
                        Err(error) => Err(error),
                    }
                }
                result => result,
            }
        };
        let result = match access::with(&[source, target], action) {
            // A directory that changes its parent is written to itself.
            Err(Errno::ACCESS) => access::with(&[source], || place::open_path(source, &from.name))
                .and_then(|moved| access::with(&[source, target, moved.as_fd()], action)),
            result => result,
        };
        outcome(result)
            .map_err(AreaError::system("rename", format!("{} to {}", from.name, to.name)))
    }

    fn link(&mut self, object: &ReplicaHandle, to: &Place) -> Result<Outcome, AreaError> {
        let Some(target) = self.directory(&to.within)? else { return Ok(Outcome::Missing) };
        let Some(fd) = self.open(object, OFlags::PATH)? else { return Ok(Outcome::Missing) };
        let target = (*target).as_fd();
        outcome(access::with(&[target], || place::link(fd.as_fd(), target, &to.name)))
            .map_err(AreaError::system("link", &to.name))
    }

    fn unlink(&mut self, at: &Place) -> Result<Outcome, AreaError> {
        let Some(directory) = self.directory(&at.within)? else { return Ok(Outcome::Missing) };
        let directory = (*directory).as_fd();
        outcome(access::with(&[directory], || place::unlink(directory, &at.name)))
            .map_err(AreaError::system("unlink", &at.name))
    }

    fn remove_directory(&mut self, at: &Place) -> Result<Outcome, AreaError> {
        let Some(directory) = self.directory(&at.within)? else { return Ok(Outcome::Missing) };
        let directory = (*directory).as_fd();
        outcome(access::with(&[directory], || place::remove_directory(directory, &at.name)))
            .map_err(AreaError::system("remove directory", &at.name))
    }

    fn list(&mut self, directory: &ReplicaHandle) -> Result<Vec<Name>, AreaError> {
        let Some(fd) = self.open(directory, OFlags::RDONLY | OFlags::DIRECTORY)? else {
            return Ok(Vec::new());
        };
        let names = place::list(fd.as_fd()).map_err(AreaError::system("list", directory))?;
        Ok(names.into_iter().map(|(name, _)| name).collect())
    }

    fn rewrite(&mut self, object: &ReplicaHandle, from: &Place) -> Result<Outcome, AreaError> {
        let (Some(staged), Some(target)) = (self.open_staged(from)?, self.open_to_write(object)?)
        else {
            return Ok(Outcome::Missing);
        };
        copy_whole(&staged, &target).map_err(AreaError::system("rewrite", object))?;
        Ok(Outcome::Done)
    }

    fn patch(
        &mut self,
        object: &ReplicaHandle,
        literals: &Place,
        list: &Place,
        size: u64,
    ) -> Result<Outcome, AreaError> {
        let (Some(bytes), Some(list), Some(target)) =
            (self.open_staged(literals)?, self.open_staged(list)?, self.open_to_write(object)?)
        else {
            return Ok(Outcome::Missing);
        };
        let result = patch::read(io::BufReader::new(File::from(list)), |piece| {
            let (offset, length) = (piece.target.offset, piece.target.length);
            match piece.literal {
                Some(from) => {
                    if place::copy_range(&bytes, from, &target, offset, length)? != length {
                        return Err(io::ErrorKind::UnexpectedEof.into());
                    }
                }
                None => place::punch(&target, offset, length)?,
            }
            Ok(())
        });
        let result = result
            .map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO))
            .and_then(|()| place::set_size(&target, size));
        result.map_err(AreaError::system("patch", object))?;
        Ok(Outcome::Done)
    }

    fn set_attributes(
        &mut self,
        object: &ReplicaHandle,
        state: &ObjectState,
    ) -> Result<Outcome, AreaError> {
        let Some(fd) = self.open(object, OFlags::PATH)? else { return Ok(Outcome::Missing) };
        attributes::apply(fd.as_fd(), state, Origin::Any, &mut self.shortfalls, &|| {
            object.to_string()
        })
        .map_err(AreaError::system("set attributes of", object))?;
        Ok(Outcome::Done)
    }

    fn set_mtime(
        &mut self,
        object: &ReplicaHandle,
        mtime: Timestamp,
    ) -> Result<Outcome, AreaError> {
        let Some(fd) = self.open(object, OFlags::PATH)? else { return Ok(Outcome::Missing) };
        match place::set_mtime(fd.as_fd(), mtime) {
            Err(Errno::PERM | Errno::ACCESS) => self.shortfalls.times += 1,
            result => result.map_err(AreaError::system("set time of", object))?,
        }
        Ok(Outcome::Done)
    }
}

/// Makes `target` hold what `staged` holds, holes included, without ever being
/// shorter than both.
fn copy_whole(staged: &OwnedFd, target: &OwnedFd) -> Result<(), Errno> {
    let size = stat::of_fd(staged)?.size;
    let mut at = 0;
    while let Some((start, end)) = place::next_data(staged, at)? {
        if start > at {
            place::punch(target, at, start - at)?;
        }
        place::copy_range(staged, start, target, start, end - start)?;
        at = end;
    }
    if at < size {
        place::punch(target, at, size - at)?;
    }
    place::set_size(target, size)
}
