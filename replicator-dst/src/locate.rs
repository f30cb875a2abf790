//! Opening an object of the replica between batches.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use replicator_common::id::ObjectId;
use replicator_common::name::Name;
use replicator_common::sys::{handle, place};
use rustix::fs::OFlags;
use rustix::io::Errno;

use crate::access;
use crate::apply::Place;
use crate::area::{Area, AreaError};
use crate::objects::{DEPTH_MAX, Known, Objects, Position};

/// Opens objects by handle, or by the path that the map knows.
#[derive(Clone)]
pub struct Locator {
    area: Arc<Area>,
    by_handle: bool,
}

impl Locator {
    /// Over a replica.
    pub fn new(area: Arc<Area>, by_handle: bool) -> Self {
        Self { area, by_handle }
    }

    /// Opens an object; `None` when it is not where it is known to be.
    pub fn open<O, E>(
        &self,
        objects: &O,
        object: &ObjectId,
        known: &Known,
        flags: OFlags,
    ) -> Result<Option<OwnedFd>, E>
    where
        O: Objects<Error: Into<E>>,
        E: From<AreaError>,
    {
        let Some(wanted) = &known.handle else { return Ok(None) };
        let opened = if self.by_handle {
            handle::open(self.area.root(), wanted, flags | OFlags::NONBLOCK)
        } else {
            match self.walk(objects, object, known).map_err(Into::into)? {
                Ok(fd) if handle::identify(fd.as_fd()).as_ref() == Ok(wanted) => {
                    if flags.contains(OFlags::PATH) {
                        Ok(fd)
                    } else {
                        access::with(&[fd.as_fd()], || place::reopen(fd.as_fd(), flags))
                    }
                }
                Ok(_) => Err(Errno::STALE),
                Err(error) => Err(error),
            }
        };
        match opened {
            Ok(fd) => Ok(Some(fd)),
            Err(Errno::NOENT | Errno::STALE | Errno::NOTDIR) => Ok(None),
            Err(error) => Err(AreaError::system("open object", object)(error).into()),
        }
    }

    /// Goes down from the root or from the orphan area, name by name.
    fn walk<O: Objects>(
        &self,
        objects: &O,
        object: &ObjectId,
        known: &Known,
    ) -> Result<Result<OwnedFd, Errno>, O::Error> {
        let Some((top, names)) = self.way(objects, object, known)? else {
            return Ok(Err(Errno::NOENT));
        };
        let mut at = match top.try_clone_to_owned() {
            Ok(top) => top,
            Err(error) => return Ok(Err(Errno::from_io_error(&error).unwrap_or(Errno::IO))),
        };
        for name in names.iter().rev() {
            match access::with(&[at.as_fd()], || place::open_path(at.as_fd(), name)) {
                Ok(next) => at = next,
                Err(error) => return Ok(Err(error)),
            }
        }
        Ok(Ok(at))
    }

    /// Where the way to an object begins, and the names on it, the last first;
    /// `None` when the map knows none.
    fn way<O: Objects>(
        &self,
        objects: &O,
        object: &ObjectId,
        known: &Known,
    ) -> Result<Option<(BorrowedFd<'_>, Vec<Name>)>, O::Error> {
        let mut names = Vec::new();
        let (mut at, mut position) = (object.clone(), known.position.clone());
        while names.len() < DEPTH_MAX {
            match position {
                Position::Root => return Ok(Some((self.area.root(), names))),
                Position::Orphan { .. } => {
                    names.push(Place::orphan(&at).name);
                    return Ok(Some((self.area.orphans(), names)));
                }
                Position::Entry(entry) => {
                    names.push(entry.name);
                    at = entry.directory;
                }
            }
            let Some(above) = objects.get(&at)? else { return Ok(None) };
            position = above.position;
        }
        Ok(None)
    }
}
