//! The replica's file system, as applying sees it.
//!
//! Objects are opened by handle. Where that is not possible (no
//! `CAP_DAC_READ_SEARCH`, no handles), they are looked for under the places
//! that the plan's steps and hints name, one component at a time, and a place
//! counts only when the handle found there is the one wanted.

use std::collections::{HashMap, HashSet};
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
        links_max: place::links_max(area.root()).ok().flatten(),
        name_max: place::name_max(area.root()).ok().flatten(),
    }
}

/// The real [`ReplicaTree`].
pub struct Tree {
    area: Arc<Area>,
    by_handle: bool,
    cache: HashMap<Within, Rc<OwnedFd>>,
    hints: HashMap<ReplicaHandle, Vec<Place>>,
    /// What could not be held, since last taken.
    pub shortfalls: Shortfalls,
    /// What runs now is done again, see [`Self::redoing`].
    again: bool,
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
            again: false,
        }
    }

    /// Whether the steps that are run next may have been run before, and the disk
    /// have failed since.
    ///
    /// INVARIANT (acknowledged means durable): content is then written through
    /// pages that are read anew. A page whose writeback failed counts as clean and
    /// as having its block. On ext4, writing the same page again brings it to that
    /// block, a sync succeeds, and the block is still marked as never written: as
    /// soon as the page leaves the cache, zeros are read (seen on Linux 6.18).
    ///
    /// RACE: a page that a reader has mapped stays in the cache. Then this holds
    /// for all but that page, and verification finds it once it has left.
    pub fn redoing(&mut self, again: bool) {
        self.again = again;
    }

    fn distrust_pages(&self, target: &OwnedFd) {
        if self.again {
            place::forget_cached(target);
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
                | Step::Append { .. }
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
        let Some(found) = self.find(object)? else { return Ok(None) };
        if flags.contains(OFlags::PATH) {
            let copy = (*found).try_clone();
            return copy
                .map(Some)
                .map_err(|_| AreaError::system("open object", object)(Errno::MFILE));
        }
        access::with(&[(*found).as_fd()], || place::reopen((*found).as_fd(), flags))
            .map(Some)
            .map_err(AreaError::system("open object", object))
    }

    /// Looks for an object under the places where it may stand, and so for the
    /// directories above it. A search waits on a list of our own while one above
    /// it runs: branches may be deeper than any stack.
    fn find(&mut self, wanted: &ReplicaHandle) -> Result<Option<Rc<OwnedFd>>, AreaError> {
        if wanted == self.area.root_handle() {
            return self.open_already(&Within::Replica(wanted.clone()));
        }
        let mut searches = vec![self.search(wanted)];
        // Places of before and after the batch may lead in a circle together.
        let mut trail = HashSet::from([wanted.clone()]);
        // What the search above the last one has found, when it has ended.
        let mut above: Option<Option<Rc<OwnedFd>>> = None;
        loop {
            let nested = searches.len() > 1;
            let Some(search) = searches.last_mut() else { return Ok(above.flatten()) };
            let directory = match above.take() {
                Some(found) => found,
                None => {
                    let Some(place) = search.places.next() else {
                        trail.remove(&search.object);
                        searches.pop();
                        above = Some(None);
                        continue;
                    };
                    search.name = Some(place.name);
                    match (self.open_already(&place.within)?, place.within) {
                        (Some(fd), _) => Some(fd),
                        (None, Within::Replica(next)) if trail.insert(next.clone()) => {
                            let next = self.search(&next);
                            searches.push(next);
                            continue;
                        }
                        (None, _) => None,
                    }
                }
            };
            let (Some(directory), Some(name)) = (directory, &search.name) else { continue };
            let directory = (*directory).as_fd();
            let opened = gone(access::with(&[directory], || place::open_path(directory, name)))
                .map_err(AreaError::system("open", name))?;
            if let Some(fd) = opened
                && handle::identify(fd.as_fd()).as_ref() == Ok(&search.object)
            {
                let fd = Rc::new(fd);
                // The one that is wanted need not be a directory.
                let found = search.object.clone();
                trail.remove(&found);
                if nested {
                    self.keep(Within::Replica(found), &fd);
                }
                searches.pop();
                above = Some(Some(fd));
            }
        }
    }

    fn search(&self, object: &ReplicaHandle) -> Search {
        let places = self.hints.get(object).cloned().unwrap_or_default().into_iter();
        Search { object: object.clone(), places, name: None }
    }

    /// A directory that is open.
    fn open_already(&self, within: &Within) -> Result<Option<Rc<OwnedFd>>, AreaError> {
        let own = |fd: BorrowedFd<'_>| {
            fd.try_clone_to_owned()
                .map(|fd| Some(Rc::new(fd)))
                .map_err(|_| AreaError::system("open", "own directory")(Errno::MFILE))
        };
        if let Some(fd) = self.cache.get(within) {
            return Ok(Some(fd.clone()));
        }
        match within {
            Within::Staging(shard) => own(self.area.staging(*shard)),
            Within::Orphans => own(self.area.orphans()),
            Within::LostAndFound => own(self.area.lost_and_found()?.1.as_fd()),
            Within::Nest(shard, name) => gone(place::open_path(self.area.staging(*shard), name))
                .map(|opened| opened.map(Rc::new))
                .map_err(AreaError::system("open", name)),
            Within::Replica(object) if object == self.area.root_handle() => own(self.area.root()),
            Within::Replica(_) => Ok(None),
        }
    }

    fn keep(&mut self, key: Within, fd: &Rc<OwnedFd>) {
        if self.cache.len() >= CACHE_MAX {
            self.cache.clear();
        }
        self.cache.insert(key, fd.clone());
    }

    fn directory(&mut self, within: &Within) -> Result<Option<Rc<OwnedFd>>, AreaError> {
        let opened = match (self.open_already(within)?, within) {
            (None, Within::Replica(object)) if self.by_handle => {
                let flags = OFlags::PATH | OFlags::DIRECTORY;
                gone(handle::open(self.area.root(), object, flags))
                    .map_err(AreaError::system("open directory", object))?
                    .map(Rc::new)
            }
            (None, Within::Replica(object)) => self.find(object)?,
            (opened, _) => opened,
        };
        if let Some(fd) = &opened {
            self.keep(within.clone(), fd);
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

/// A search for an object by names.
struct Search {
    object: ReplicaHandle,
    /// Places that were not looked at yet.
    places: std::vec::IntoIter<Place>,
    /// The name of the place that is being looked at.
    name: Option<Name>,
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
        self.distrust_pages(&target);
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
        self.distrust_pages(&target);
        grow(&target, size).map_err(AreaError::system("patch", object))?;
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

    fn append(
        &mut self,
        object: &ReplicaHandle,
        at: u64,
        bytes: &[u8],
    ) -> Result<Outcome, AreaError> {
        let Some(target) = self.open_to_write(object)? else { return Ok(Outcome::Missing) };
        self.distrust_pages(&target);
        let size = at.saturating_add(bytes.len() as u64);
        place::write_at(&target, bytes, at)
            .and_then(|()| place::set_size(&target, size))
            .map_err(AreaError::system("append to", object))?;
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
    grow(target, size)?;
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

/// Before holes are punched in it: btrfs writes zeros behind the old end, up to
/// the end of its block, when a file gets longer.
fn grow(target: &OwnedFd, size: u64) -> Result<(), Errno> {
    if stat::of_fd(target)?.size < size { place::set_size(target, size) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use replicator_common::id::FileSystemId;

    /// By path, a branch of thousands of levels is reached without as many
    /// frames on the stack or descriptors, also where hints lead nowhere first.
    #[test]
    fn what_lies_deep_is_found_by_path() {
        const LEVELS: usize = 3000;
        let base = tempfile::tempdir().unwrap();
        let root = place::open_directory_path(base.path()).unwrap();
        let area = Arc::new(Area::open(root.as_fd(), &FileSystemId::random()).unwrap());
        let mut tree = Tree::new(area.clone(), false);
        let name = Name::new(b"n").unwrap();
        let mut at = (area.root_handle().clone(), root);
        for _ in 0..LEVELS {
            place::make_directory(at.1.as_fd(), &name).unwrap();
            let fd = place::open_directory(at.1.as_fd(), &name).unwrap();
            let object = handle::identify(fd.as_fd()).unwrap();
            // Where it was before the batch, and where it is.
            tree.hint(&object, &Place { within: Within::Orphans, name: name.clone() });
            let within = Within::Replica(at.0.clone());
            tree.hint(&object, &Place { within, name: name.clone() });
            at = (object, fd);
        }
        let found = tree.open(&at.0, OFlags::PATH).unwrap().expect("it is there");
        assert_eq!(handle::identify(found.as_fd()).unwrap(), at.0);
        let inside = Place { within: Within::Replica(at.0.clone()), name: name.clone() };
        assert_eq!(tree.lookup(&inside).unwrap(), None);
        place::make_directory(at.1.as_fd(), &name).unwrap();
        assert!(tree.lookup(&inside).unwrap().is_some());

        // Hints that lead in a circle end.
        let mut tree = Tree::new(area, false);
        let circle = Place { within: Within::Replica(at.0.clone()), name: name.clone() };
        tree.hint(&at.0, &circle);
        assert!(tree.open(&at.0, OFlags::PATH).unwrap().is_none());
        drop((at, found));
        let status =
            std::process::Command::new("rm").arg("-rf").arg(base.path().join("n")).status();
        assert!(status.unwrap().success());
    }
}
