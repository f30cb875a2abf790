//! Which watcher, and why that one, in words.

use std::os::fd::BorrowedFd;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use replicator_common::control::WatcherChoice;
use replicator_common::status::{WatcherKind, WatcherReport};
use replicator_common::sys::mount::{self, CapabilitySet};

use super::fanotify::Fanotify;
use super::inotify::Inotify;
use super::marks::Marks;
use super::scan::Scan;
use super::waker::failed;
use super::{Queue, WatchError, Watcher};
use crate::places::Places;

/// What a watcher has to be told.
#[derive(Clone, Debug)]
pub struct Settings {
    /// How often the source is walked where events alone do not suffice.
    pub rescan_interval: Duration,
    /// Where directories stand, for whoever may not open them by handle.
    pub places: Arc<Places>,
}

/// Opens the watcher of the operator's choice, or with `auto` the best that
/// privilege and file system allow. `source` is the source's root and `path`
/// how the operator knows it.
///
/// # Errors
/// [`WatchError::Unsupported`] when the choice was not `auto` and does not work
/// here; [`WatchError::Io`] when the source cannot be looked at.
pub fn open(
    source: BorrowedFd<'_>,
    path: &Path,
    choice: WatcherChoice,
    settings: &Settings,
) -> Result<Box<dyn Watcher>, WatchError> {
    let kind = mount::file_system_kind(source).map_err(failed("watcher", "query file system"))?;
    let opener = Opener { source, path, settings, sight: Sight::of(&kind), kind: &kind };
    let chosen = || "chosen by the operator".to_owned();
    match choice {
        WatcherChoice::Auto => opener.auto(),
        WatcherChoice::Fanotify => opener.fanotify(chosen()),
        WatcherChoice::Inotify => opener.inotify(chosen()),
        WatcherChoice::Scan => opener.scan(chosen()),
    }
}

/// Goes on with the queue of a watcher of a process before this one, when
/// `open` would make one of the same kind. No event is lost in between.
///
/// # Errors
/// [`WatchError::Unsupported`] when it would not, or when the queue is not of
/// this source: then it is closed.
pub fn resume(
    source: BorrowedFd<'_>,
    path: &Path,
    choice: WatcherChoice,
    settings: &Settings,
    queue: Queue,
) -> Result<Box<dyn Watcher>, WatchError> {
    let kind = mount::file_system_kind(source).map_err(failed("watcher", "query file system"))?;
    let opener = Opener { source, path, settings, sight: Sight::of(&kind), kind: &kind };
    let unsupported = |reason: &str| WatchError::Unsupported {
        watcher: "fanotify",
        path: path.display().to_string(),
        reason: reason.to_owned(),
    };
    if opener.blind() {
        return Err(unsupported("events do not tell all"));
    }
    if !matches!(choice, WatcherChoice::Auto | WatcherChoice::Fanotify) {
        return Err(unsupported("another watcher was chosen"));
    }
    let report = opener.report(WatcherKind::Fanotify, "taken over from the process before".into());
    Fanotify::resume(source, path, queue, report).map(boxed)
}

/// How much of what happens to a file system raises events.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Sight {
    /// All: every change goes through this kernel's VFS.
    Full,
    /// Not all, and why.
    Partial(&'static str),
}

impl Sight {
    fn of(kind: &str) -> Self {
        match kind {
            "ext4" | "xfs" | "btrfs" | "tmpfs" | "ramfs" | "f2fs" | "bcachefs" | "zfs" | "vfat"
            | "exfat" | "ntfs3" => Self::Full,
            "nfs" | "cifs" | "smb" | "smb2" | "9p" | "ceph" | "afs" | "coda" | "gfs2" | "ocfs2"
            | "lustre" | "gpfs" | "panfs" | "vboxsf" => {
                Self::Partial("changes that other hosts make raise no events here")
            }
            "fuse" => Self::Partial("what serves it may change it without events"),
            "overlay" | "ecryptfs" => {
                Self::Partial("changes of the layers below raise no events in it")
            }
            _ => Self::Partial("it is not known whether all its changes raise events"),
        }
    }
}

struct Opener<'a> {
    source: BorrowedFd<'a>,
    path: &'a Path,
    settings: &'a Settings,
    kind: &'a str,
    sight: Sight,
}

impl Opener<'_> {
    fn auto(&self) -> Result<Box<dyn Watcher>, WatchError> {
        let kind = self.kind;
        if let Sight::Partial(why) = self.sight {
            return self.scan(format!("the file system is {kind}: {why}"));
        }
        let no_fanotify = match mount::has_capability(CapabilitySet::SYS_ADMIN) {
            Ok(true) => {
                match self.fanotify(format!("CAP_SYS_ADMIN is there, and {kind} allows it")) {
                    Err(WatchError::Unsupported { reason, .. }) => {
                        format!("no fanotify ({reason})")
                    }
                    result => return result,
                }
            }
            _ => "no fanotify (no CAP_SYS_ADMIN)".to_owned(),
        };
        match self.inotify(no_fanotify.clone()) {
            Err(WatchError::Unsupported { reason, .. }) => {
                self.scan(format!("{no_fanotify}, no inotify ({reason})"))
            }
            result => result,
        }
    }

    fn fanotify(&self, reason: String) -> Result<Box<dyn Watcher>, WatchError> {
        let rescan = self.blind().then_some(self.settings.rescan_interval);
        let report = self.report(WatcherKind::Fanotify, reason);
        Fanotify::new(self.source, self.path, rescan, report).map(boxed)
    }

    /// A watch on each directory: one that tells of objects where the kernel
    /// allows that, else one that tells of names.
    fn inotify(&self, reason: String) -> Result<Box<dyn Watcher>, WatchError> {
        let rescan = self.settings.rescan_interval;
        let marks = format!("{reason}; a fanotify mark on each directory");
        let report = self.report(WatcherKind::Inotify, marks);
        let places = self.settings.places.clone();
        let why = match Marks::new(self.source, self.path, rescan, self.blind(), places, report) {
            Ok(watcher) => return Ok(boxed(watcher)),
            Err(WatchError::Unsupported { reason, .. }) => reason,
            Err(error) => return Err(error),
        };
        let watches = format!("{reason}; no fanotify marks on directories ({why})");
        let report = self.report(WatcherKind::Inotify, watches);
        Inotify::new(self.source, self.path, rescan, self.blind(), report).map(boxed)
    }

    fn scan(&self, reason: String) -> Result<Box<dyn Watcher>, WatchError> {
        Scan::new(self.source, self.path, self.settings.rescan_interval, reason).map(boxed)
    }

    fn blind(&self) -> bool {
        matches!(self.sight, Sight::Partial(_))
    }

    fn report(&self, kind: WatcherKind, reason: String) -> WatcherReport {
        let doubts = match self.sight {
            Sight::Full => Vec::new(),
            Sight::Partial(why) => vec![format!("the file system is {}: {why}", self.kind)],
        };
        WatcherReport { kind, reason, doubts, watches: None }
    }
}

fn boxed(watcher: impl Watcher + 'static) -> Box<dyn Watcher> {
    Box::new(watcher)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_known_to_raise_events_is_in_doubt() {
        assert_eq!(Sight::of("xfs"), Sight::Full);
        for kind in ["nfs", "fuse", "overlay", "0x12345678"] {
            assert!(matches!(Sight::of(kind), Sight::Partial(_)), "{kind}");
        }
    }
}
