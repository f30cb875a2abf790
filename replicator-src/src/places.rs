//! Finding directories by name, where opening by handle is not allowed.
//!
//! A directory is found through the place at which it was last seen, one
//! component at a time from the nearest directory that is open, each step
//! checked by handle. What was found stays open: a descriptor follows its
//! directory wherever that is moved, so it is as good as a handle.
//!
//! A place may be out of date. Then the answer is [`Opened::Away`], from which
//! nothing follows but to look again: whatever moved the directory is told by
//! an event, or is found by a walk, and the new place is learnt from that.

use std::collections::{HashMap, HashSet};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use replicator_common::id::ObjectId;
use replicator_common::name::Name;
use replicator_common::sys::{handle, stat};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::process::{Resource, getrlimit};

/// Places that are remembered. One that was forgotten is learnt again when
/// something in its directory is looked for (`Engine::recall`).
const PLACES: usize = 1 << 20;
/// The part of the descriptors a process may have that directories get.
const DESCRIPTORS_SHARE: u64 = 4;
/// Directories kept open, whatever the limit.
const OPEN: std::ops::RangeInclusive<u64> = 16..=4096;

/// What came of opening something.
#[derive(Debug)]
pub enum Opened<T = OwnedFd> {
    /// It is this.
    Here(T),
    /// It is gone, and never comes back.
    Gone,
    /// It is not where it was believed to be: gone, or elsewhere.
    Away,
}

/// Where directories stand, and those that are open. Shared between the engine,
/// the readers and the watcher.
#[derive(Debug, Default)]
pub struct Places {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    known: HashMap<ObjectId, (ObjectId, Name)>,
    open: HashMap<ObjectId, Arc<OwnedFd>>,
    /// How many may be open; 0 before the first is.
    most: usize,
}

impl State {
    /// Keeps a directory open. Where links are not counted, nothing would tell
    /// that it was removed.
    fn keep(&mut self, id: ObjectId, fd: Arc<OwnedFd>) {
        if !stat::of_fd(&*fd).is_ok_and(|data| data.nlink > 0) {
            return;
        }
        if self.most == 0 {
            // No limit counts as one beyond all that we take.
            let limit = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
            let most = (limit / DESCRIPTORS_SHARE).clamp(*OPEN.start(), *OPEN.end());
            self.most = most as usize;
        }
        make_room(&mut self.open, &id, self.most);
        self.open.insert(id, fd);
    }
}

/// Forgets any one of the others when there are too many.
fn make_room<T>(map: &mut HashMap<ObjectId, T>, id: &ObjectId, most: usize) {
    if map.len() >= most
        && !map.contains_key(id)
        && let Some(other) = map.keys().next().cloned()
    {
        map.remove(&other);
    }
}

impl Places {
    fn state(&self) -> MutexGuard<'_, State> {
        // Each critical section leaves the state whole, even if it panicked.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Remembers where a directory was seen.
    pub fn learn(&self, object: &ObjectId, directory: &ObjectId, name: &Name) {
        let mut state = self.state();
        make_room(&mut state.known, object, PLACES);
        state.known.insert(object.clone(), (directory.clone(), name.clone()));
    }

    /// Where a directory was seen last.
    pub fn find(&self, object: &ObjectId) -> Option<(ObjectId, Name)> {
        self.state().known.get(object).cloned()
    }

    /// A directory that left the source is neither kept open nor remembered.
    pub fn forget(&self, object: &ObjectId) {
        let mut state = self.state();
        state.known.remove(object);
        state.open.remove(object);
    }

    /// A descriptor of a directory that is open already.
    fn open(&self, id: &ObjectId) -> Result<Option<Opened<Arc<OwnedFd>>>, Errno> {
        let found = self.state().open.get(id).cloned();
        let Some(fd) = found else { return Ok(None) };
        if stat::of_fd(&*fd)?.nlink > 0 {
            return Ok(Some(Opened::Here(fd)));
        }
        self.forget(id);
        Ok(Some(Opened::Gone))
    }

    /// An `O_PATH` descriptor of a directory below `root`, whose id is `top`.
    pub fn directory(
        &self,
        root: BorrowedFd<'_>,
        top: &ObjectId,
        id: &ObjectId,
    ) -> Result<Opened<Arc<OwnedFd>>, Errno> {
        let mut below = Vec::new();
        let mut trail = HashSet::new();
        let mut at = id.clone();
        let mut fd = loop {
            match self.open(&at)? {
                Some(Opened::Here(fd)) => break fd,
                Some(gone) if below.is_empty() => return Ok(gone),
                // What was in it when it was removed had been moved out.
                Some(_) => return Ok(Opened::Away),
                None => {}
            }
            if at == *top {
                let fd = Arc::new(step(root, b".")?);
                self.state().keep(at, fd.clone());
                break fd;
            }
            // Of several places, learnt at several moments, some may be out of
            // date, and lead in a circle.
            let Some((directory, name)) = self.find(&at) else { return Ok(Opened::Away) };
            if !trail.insert(at.clone()) {
                return Ok(Opened::Away);
            }
            below.push((at, name));
            at = directory;
        };
        for (object, name) in below.into_iter().rev() {
            match step((*fd).as_fd(), name.as_bytes()) {
                Ok(next) if handle::identify(next.as_fd())? == object => fd = Arc::new(next),
                Ok(_) | Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => return Ok(Opened::Away),
                Err(error) => return Err(error),
            }
            self.state().keep(object, fd.clone());
        }
        Ok(Opened::Here(fd))
    }
}

fn step(directory: BorrowedFd<'_>, name: &[u8]) -> Result<OwnedFd, Errno> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    rustix::fs::openat(directory, name, flags, Mode::empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Fixture {
        directory: tempfile::TempDir,
        root: OwnedFd,
        top: ObjectId,
        places: Places,
    }

    impl Fixture {
        fn new() -> Self {
            let directory = tempfile::tempdir().unwrap();
            let root = rustix::fs::open(directory.path(), OFlags::RDONLY, Mode::empty()).unwrap();
            let top = handle::identify(root.as_fd()).unwrap();
            Self { directory, root, top, places: Places::default() }
        }

        fn make(&self, path: &str) -> ObjectId {
            std::fs::create_dir(self.directory.path().join(path)).unwrap();
            self.id(path)
        }

        fn id(&self, path: &str) -> ObjectId {
            let path = self.directory.path().join(path);
            let fd = rustix::fs::open(path, OFlags::PATH, Mode::empty()).unwrap();
            handle::identify(fd.as_fd()).unwrap()
        }

        fn rename(&self, from: &str, to: &str) {
            let at = |path| self.directory.path().join(path);
            std::fs::rename(at(from), at(to)).unwrap();
        }

        fn learn(&self, object: &ObjectId, directory: &ObjectId, name: &str) {
            self.places.learn(object, directory, &Name::new(name.as_bytes()).unwrap());
        }

        fn look(&self, id: &ObjectId) -> Opened<Arc<OwnedFd>> {
            let opened = self.places.directory(self.root.as_fd(), &self.top, id).unwrap();
            if let Opened::Here(fd) = &opened {
                assert_eq!(handle::identify((**fd).as_fd()).unwrap(), *id);
            }
            opened
        }
    }

    #[test]
    fn a_directory_that_moved_is_away_until_its_place_is_learnt() {
        let it = Fixture::new();
        let (a, b) = (it.make("a"), it.make("a/b"));
        assert!(matches!(it.look(&b), Opened::Away), "nobody has seen it");
        it.learn(&a, &it.top, "a");
        it.learn(&b, &a, "b");
        it.rename("a/b", "c");
        it.make("a/b");
        assert!(matches!(it.look(&b), Opened::Away), "another stands there");
        it.learn(&b, &it.top, "c");
        assert!(matches!(it.look(&b), Opened::Here(_)));
    }

    #[test]
    fn what_is_open_is_found_wherever_it_is_moved_and_gone_once_it_is_removed() {
        let it = Fixture::new();
        let (a, b) = (it.make("a"), it.make("a/b"));
        it.learn(&a, &it.top, "a");
        it.learn(&b, &a, "b");
        assert!(matches!(it.look(&b), Opened::Here(_)));
        it.rename("a/b", "c");
        it.rename("a", "c/a");
        assert!(matches!(it.look(&b), Opened::Here(_)));
        assert!(matches!(it.look(&a), Opened::Here(_)));
        std::fs::remove_dir(it.directory.path().join("c/a")).unwrap();
        assert!(matches!(it.look(&a), Opened::Gone));
    }

    #[test]
    fn places_that_lead_in_a_circle_end() {
        let it = Fixture::new();
        let (a, b) = (it.make("a"), it.make("b"));
        it.learn(&a, &b, "a");
        it.learn(&b, &a, "b");
        assert!(matches!(it.look(&a), Opened::Away));
    }
}
