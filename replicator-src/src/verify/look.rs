//! Looks at objects of the source for verification, without a trace in caches
//! and access times where that can be.

use std::os::fd::{AsFd, OwnedFd};

use replicator_common::describe::RANGE_MAX;
use replicator_common::id::ObjectId;
use replicator_common::name::Name;
use replicator_common::object::ObjectState;
use replicator_common::sys::{quiet, stat};
use replicator_common::time::Timestamp;
use replicator_common::wire::Hash;
use rustix::fs::OFlags;
use rustix::io::Errno;

use crate::read::small;
use crate::source::{Opened, Opener};

/// What is read at a time.
const READ: usize = 1 << 20;

/// An object as it was seen.
#[derive(Clone, Debug)]
pub(super) struct Seen {
    pub(super) state: ObjectState,
    pub(super) ctime: Timestamp,
}

/// A name that leads to an object.
pub(super) type Hint<'a> = Option<&'a (ObjectId, Name)>;

/// Looks; keeps a buffer.
pub(super) struct Look {
    opener: Opener,
    buffer: Vec<u8>,
}

impl Look {
    pub(super) fn new(opener: Opener) -> Self {
        Self { opener, buffer: vec![0; READ] }
    }

    pub(super) fn root(&self) -> &ObjectId {
        &self.opener.root().id
    }

    /// An object's state; `None` when it is gone, or not where it was: an event
    /// tells, or will.
    pub(super) fn state(&self, object: &ObjectId, hint: Hint<'_>) -> Result<Option<Seen>, Errno> {
        let opened = self.opener.open(object, hint, OFlags::PATH | OFlags::CLOEXEC);
        here(opened)?.map(|fd| seen(&fd)).transpose().map(Option::flatten)
    }

    /// The content of a small file; `None` as for [`Look::state`], or when it
    /// changed meanwhile.
    pub(super) fn hash(
        &mut self,
        object: &ObjectId,
        hint: Hint<'_>,
        before: &Seen,
    ) -> Result<Option<Hash>, Errno> {
        let range = self.range(object, hint, 0, before.state.size)?;
        Ok(range.filter(|(_, after, _)| after.ctime == before.ctime).map(|(_, _, hash)| hash))
    }

    /// Bytes, state and hash of a run of a file, at most [`RANGE_MAX`] bytes.
    pub(super) fn range(
        &mut self,
        object: &ObjectId,
        hint: Hint<'_>,
        offset: u64,
        length: u64,
    ) -> Result<Option<(u64, Seen, Hash)>, Errno> {
        let Some(fd) = here(self.opener.open_content(object, hint))? else { return Ok(None) };
        quiet::no_reuse(&fd);
        let Some(before) = seen(&fd)? else { return Ok(None) };
        let (mut hasher, mut done) = (blake3::Hasher::new(), 0);
        let length = length.min(RANGE_MAX);
        while done < length {
            let want = usize::try_from(length - done).unwrap_or(READ).min(READ);
            let read = quiet::read_at(&fd, &mut self.buffer[..want], offset + done)?;
            hasher.update(&self.buffer[..read]);
            done += read as u64;
            if read < want {
                break;
            }
        }
        let Some(after) = seen(&fd)? else { return Ok(None) };
        if before.ctime != after.ctime {
            return Ok(None);
        }
        Ok(Some((done, after, Hash(*hasher.finalize().as_bytes()))))
    }
}

fn here(opened: Result<Opened, Errno>) -> Result<Option<OwnedFd>, Errno> {
    match opened {
        Ok(Opened::Here(fd)) => Ok(Some(fd)),
        Ok(Opened::Gone | Opened::Away) | Err(Errno::STALE | Errno::NOENT) => Ok(None),
        Err(error) => Err(error),
    }
}

fn seen(fd: &OwnedFd) -> Result<Option<Seen>, Errno> {
    let stat = stat::of_fd(fd)?;
    if stat.nlink == 0 {
        return Ok(None);
    }
    let mut state = small::state_of(fd.as_fd(), &stat)?;
    if !state.kind.is_device() {
        state.rdev = 0;
    }
    Ok(Some(Seen { state, ctime: stat.ctime }))
}
