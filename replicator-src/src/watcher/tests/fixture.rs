//! A fresh file system, a watcher on it, and questions about what it saw.

use std::fs;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use replicator_common::control::WatcherChoice;
use replicator_common::id::ObjectId;
use replicator_common::name::Name;
use replicator_common::status::{WatcherKind, WatcherReport};
use replicator_common::sys::fanotify::{Detail, Group, Queue};
use replicator_common::sys::handle;
use rustix::fs::{Mode, OFlags};
use rustix::mount::{MountFlags, MountPropagationFlags};

use crate::watcher::fanotify::Fanotify;
use crate::watcher::inotify::Inotify;
use crate::watcher::root::Root;
use crate::watcher::{Change, Settings, Watcher, What, open};

pub(super) const KINDS: [&str; 4] = ["tmpfs", "ext4", "xfs", "btrfs"];

/// Runs `body` with a fresh file system of each kind, mounted in a mount
/// namespace of its own, so that nothing is left behind however it ends.
pub(super) fn on_each(body: fn(&Path)) {
    for kind in KINDS {
        on(kind, body);
    }
}

pub(super) fn on(kind: &'static str, body: fn(&Path)) {
    let directory = tempfile::tempdir_in("/var/tmp").unwrap();
    let base = directory.path().canonicalize().unwrap();
    let thread = std::thread::Builder::new().name(kind.to_owned());
    let run = move || {
        // SAFETY: only the mount namespace (and with it root and working
        // directory) is unshared, and only of this thread.
        unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWNS) }
            .expect("this test mounts file systems and needs root (CAP_SYS_ADMIN)");
        let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
        rustix::mount::mount_change("/", private).unwrap();
        let at = base.join("mount");
        fs::create_dir(&at).unwrap();
        if kind == "tmpfs" {
            rustix::mount::mount("none", &at, "tmpfs", MountFlags::empty(), None).unwrap();
        } else {
            let image = base.join("image");
            fs::File::create(&image).unwrap().set_len(512 << 20).unwrap();
            run(&format!("mkfs.{kind}"), &["-q".as_ref(), &image]);
            run("mount", &["-oloop".as_ref(), &image, &at]);
        }
        body(&at);
    };
    thread.spawn(run).unwrap().join().unwrap_or_else(|_| panic!("failed on {kind}, see above"));
}

pub(super) fn run(program: &str, arguments: &[&Path]) {
    let output = Command::new(program).args(arguments).output().unwrap();
    assert!(output.status.success(), "{program}: {output:?}");
}

pub(super) fn open_directory(path: &Path) -> OwnedFd {
    rustix::fs::open(path, OFlags::RDONLY | OFlags::DIRECTORY, Mode::empty()).unwrap()
}

/// With a walk every so many seconds.
pub(super) fn settings(seconds: u64) -> Settings {
    Settings { rescan_interval: Duration::from_secs(seconds), places: Arc::default() }
}

/// The object at `path`; a symbolic link's own.
pub(super) fn id(path: &Path) -> ObjectId {
    let fd = rustix::fs::open(path, OFlags::PATH | OFlags::NOFOLLOW, Mode::empty()).unwrap();
    handle::identify(fd.as_fd()).unwrap()
}

/// An entry and its object, as they were when asked.
#[derive(Clone, Debug)]
pub(super) struct Known {
    pub(super) id: ObjectId,
    pub(super) directory: ObjectId,
    pub(super) name: Name,
}

pub(super) fn know(path: &Path) -> Known {
    Known {
        id: id(path),
        directory: id(path.parent().unwrap()),
        name: Name::try_from(path.file_name().unwrap()).unwrap(),
    }
}

/// A watcher on a tree.
pub(super) struct Watched {
    pub(super) watcher: Box<dyn Watcher>,
    pub(super) path: PathBuf,
}

impl Watched {
    pub(super) fn open(path: &Path, choice: WatcherChoice) -> Self {
        let settings = settings(5);
        let watcher = open(open_directory(path).as_fd(), path, choice, &settings).unwrap();
        Self { watcher, path: path.to_owned() }
    }

    /// inotify(7) itself, which `open` takes only where it must.
    pub(super) fn names(path: &Path) -> Self {
        let interval = Duration::from_secs(5);
        let root = open_directory(path);
        let watcher = Inotify::new(root.as_fd(), path, interval, false, empty_report()).unwrap();
        Self { watcher: Box::new(watcher), path: path.to_owned() }
    }

    /// The two watchers with a watch on each directory: one that tells of
    /// objects, one that tells of names.
    pub(super) fn each_directory(path: &Path) -> [Self; 2] {
        [Self::open(path, WatcherChoice::Inotify), Self::names(path)]
    }

    /// fanotify with something other than what `open` would take.
    pub(super) fn fanotify(path: &Path, detail: Detail, queue: Queue) -> Self {
        let root = Root::new("fanotify", open_directory(path).as_fd(), path).unwrap();
        let group = Group::new(detail, queue).unwrap();
        let watcher = Fanotify::with_group(group, detail, root, None, empty_report()).unwrap();
        Self { watcher: Box::new(watcher), path: path.to_owned() }
    }

    /// Tells the watcher of every directory, as the walk would.
    pub(super) fn walk(&self) {
        let directories = self.watcher.directories();
        directories.begin_walk(false);
        walk(&directories, &self.path);
    }

    /// The same within a walk that has begun.
    pub(super) fn walk_on(&self) {
        walk(&self.watcher.directories(), &self.path);
    }

    pub(super) fn drain(&mut self) -> Seen {
        let mut changes = Vec::new();
        let mut left = self.watcher.queued().unwrap();
        while left > 0 {
            match self.watcher.take(&mut changes).unwrap() {
                0 => break,
                count => left = left.saturating_sub(count),
            }
        }
        Seen(changes)
    }

    /// What is seen of `operation`.
    pub(super) fn during(&mut self, operation: impl FnOnce(&Path)) -> Seen {
        self.drain();
        operation(&self.path);
        let seen = self.drain();
        assert!(!seen.0.iter().any(|change| matches!(change, Change::Gap { .. })), "{seen:?}");
        seen
    }
}

fn empty_report() -> WatcherReport {
    WatcherReport {
        kind: WatcherKind::Scan,
        reason: String::new(),
        doubts: Vec::new(),
        watches: None,
    }
}

fn walk(watch: &Arc<dyn crate::watcher::DirectoryWatch>, path: &Path) {
    let fd = open_directory(path);
    watch.before_listing(fd.as_fd(), &handle::identify(fd.as_fd()).unwrap());
    for entry in fs::read_dir(path).unwrap() {
        let entry = entry.unwrap();
        if entry.file_type().unwrap().is_dir() {
            walk(watch, &entry.path());
        }
    }
}

/// What a watcher saw.
#[derive(Debug)]
pub(super) struct Seen(pub(super) Vec<Change>);

impl Seen {
    #[track_caller]
    pub(super) fn entry(&self, known: &Known) -> &Self {
        let wanted = Change::Entry { directory: known.directory.clone(), name: known.name.clone() };
        assert!(self.0.contains(&wanted), "no {wanted:?} in {self:#?}");
        self
    }

    #[track_caller]
    pub(super) fn content(&self, known: &Known) -> &Self {
        assert!(self.has(known, |what| what.content), "no content of {known:?} in {self:#?}");
        self
    }

    #[track_caller]
    pub(super) fn attributes(&self, known: &Known) -> &Self {
        assert!(self.has(known, |what| what.attributes), "no attributes of {known:?} in {self:#?}");
        self
    }

    #[track_caller]
    pub(super) fn nothing(&self) {
        assert!(self.0.is_empty(), "{self:#?}");
    }

    /// By handle, or by name where the watcher has no more.
    pub(super) fn has(&self, known: &Known, wanted: fn(&What) -> bool) -> bool {
        self.0.iter().any(|change| match change {
            Change::Object { object, what, .. } => *object == known.id && wanted(what),
            Change::Named { directory, name, what } => {
                *directory == known.directory && *name == known.name && wanted(what)
            }
            _ => false,
        })
    }

    /// By handle only.
    pub(super) fn has_object(&self, id: &ObjectId, wanted: fn(&What) -> bool) -> bool {
        let is = |change: &Change| matches!(change, Change::Object { object, what, .. } if object == id && wanted(what));
        self.0.iter().any(is)
    }
}
