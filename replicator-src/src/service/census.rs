//! Counts the source, so that progress can say how much is left.
//!
//! A walk of its own beside the engine's: one thread, once a run, a fifteenth
//! of what the sync itself costs. A sync that is through within [`LATER`] is spared it.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use replicator_common::name::Name;
use replicator_common::object::Kind;
use replicator_common::sys::stat;
use rustix::fs::{Mode, OFlags};

use crate::engine::state::Shared;
use crate::source::Root;

/// How many objects are counted between two looks at the stop flag.
const STEP: u64 = 1024;

/// When counting begins: until then, nobody asks how long it will take.
const LATER: Duration = Duration::from_secs(10);

/// Counts, [later](LATER); the flag ends it early, and so does unparking with it.
pub(super) fn start(
    root: Arc<Root>,
    shared: Arc<Shared>,
) -> io::Result<(JoinHandle<()>, Arc<AtomicBool>)> {
    let stop = Arc::new(AtomicBool::new(false));
    let flag = stop.clone();
    let thread = std::thread::Builder::new().name("census".to_owned()).spawn(move || {
        let begin = Instant::now() + LATER;
        while let Some(left) = begin.checked_duration_since(Instant::now()) {
            if flag.load(Ordering::Acquire) {
                return;
            }
            std::thread::park_timeout(left);
        }
        if shared.is_counted() {
            return;
        }
        let mut census = Census { root: &root, shared: &shared, stop: &flag, objects: 1, bytes: 0 };
        match census.walk() {
            // Totals are for people; without them progress just has no end.
            Err(error) => tracing::debug!(%error, "the census of the source failed"),
            Ok(all) => shared.found(census.objects, census.bytes, all),
        }
    })?;
    Ok((thread, stop))
}

struct Census<'a> {
    root: &'a Root,
    shared: &'a Shared,
    stop: &'a AtomicBool,
    objects: u64,
    bytes: u64,
}

impl Census<'_> {
    /// Whether all was counted. Directories are held open along one path only.
    fn walk(&mut self) -> io::Result<bool> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let open = |directory: &OwnedFd, name: &Name| {
            rustix::fs::openat(directory, name.as_bytes(), flags, Mode::empty())
        };
        let top = rustix::fs::openat(self.root.fd(), ".", flags, Mode::empty())?;
        let below = self.count(&top)?;
        let mut path = vec![(top, below)];
        while let Some((directory, below)) = path.last_mut() {
            if self.stop.load(Ordering::Acquire) {
                return Ok(false);
            }
            let Some(name) = below.pop() else {
                path.pop();
                continue;
            };
            // What vanishes or may not be read is not counted.
            let Ok(next) = open(directory, &name) else { continue };
            let below = self.count(&next).unwrap_or_default();
            // A descriptor a level: very deep trees are counted in part.
            if path.len() < 512 {
                path.push((next, below));
            }
        }
        Ok(true)
    }

    /// Counts one directory's entries; returns its subdirectories.
    fn count(&mut self, directory: &OwnedFd) -> io::Result<Vec<Name>> {
        let mut below = Vec::new();
        for entry in rustix::fs::Dir::read_from(directory)? {
            let entry = entry?;
            let Ok(name) = Name::new(entry.file_name().to_bytes()) else { continue };
            let Ok(data) = stat::of_entry(directory.as_fd(), &name) else { continue };
            if self.root.elsewhere(&data) {
                continue;
            }
            self.objects += 1;
            match data.kind {
                Kind::Directory => below.push(name),
                Kind::File => self.bytes += data.size,
                _ => {}
            }
            if self.objects.is_multiple_of(STEP) {
                self.shared.found(self.objects, self.bytes, false);
            }
        }
        Ok(below)
    }
}
