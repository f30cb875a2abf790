//! A source and a replica, and `replicator run` between them.

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use crate::binary;
use crate::cgroup::MemoryLimit;
use crate::compare;
use crate::mounts::{self, FileSystem, Mount, Scratch};
use crate::process::{Daemon, free_port};
use crate::serial::{self, Share};
use crate::workload::Workload;

/// How long `wait` and the initial sync may take, unless `REPLICATOR_PATIENCE`
/// gives other seconds. Far beyond what is normal: it tells a hang from a slow
/// machine.
pub fn patience() -> Duration {
    let seconds = std::env::var("REPLICATOR_PATIENCE").ok().and_then(|text| text.parse().ok());
    Duration::from_secs(seconds.unwrap_or(120))
}

/// The watchers, as the command line spells them.
pub const WATCHERS: [&str; 3] = ["fanotify", "inotify", "scan"];

/// Operations (see [`crate::workload::op::NAMES`]) of which a watcher cannot
/// see everything, as it says among its doubts.
///
/// A watch on each directory does not tell of a write through a name outside of
/// the source that was made just now, or through a file that was made outside
/// without a name; it stays unseen until the next walk.
pub fn unseen_by(watcher: &str) -> &'static [&'static str] {
    match watcher {
        "inotify" => &["OutsideLink", "TmpFile"],
        _ => &[],
    }
}

/// A short run of what a watcher can see all of.
///
/// A watch on each directory comes to a new one a moment after it was made. What is
/// changed before that through a hard link in it, and loses the link, stays unseen
/// until the next comparison (docs/guarantees.md, "Known holes"; a machine whose
/// cores are taken meets it once in some hundred runs). So links wait for that moment.
pub fn workload_for(watcher: &str) -> Workload {
    let link_age = match watcher {
        "inotify" => Duration::from_millis(200),
        _ => Duration::ZERO,
    };
    Workload { without: unseen_by(watcher), link_age, ..Workload::new() }
}

/// A source and a replica on file systems of their own, or on one.
#[derive(Debug)]
pub struct Pair {
    // Dropped in this order: mounts before the lock that says how many run.
    source: PathBuf,
    outside: PathBuf,
    replica: PathBuf,
    state: Scratch,
    mounts: Vec<Mount>,
    _share: Share,
}

/// Where source and replica stand.
#[derive(Clone, Copy, Debug)]
pub enum Layout {
    /// Both are directories of one file system.
    Same(FileSystem),
    /// The source is a directory of one, the replica the root of the other.
    Two(FileSystem, FileSystem),
    /// Each is the root of its own; there is no outside.
    Roots(FileSystem, FileSystem),
}

impl Pair {
    /// Makes the file systems; takes one share of the machine.
    pub fn new(layout: Layout) -> Self {
        Self::with_share(layout, serial::share())
    }

    /// The same for a test that measures time: nothing else runs meanwhile.
    pub fn alone(layout: Layout) -> Self {
        Self::with_share(layout, serial::alone())
    }

    /// The same on file systems of `bytes` each.
    pub fn sized(layout: Layout, bytes: u64) -> Self {
        Self::build(layout, bytes, serial::alone())
    }

    fn with_share(layout: Layout, share: Share) -> Self {
        Self::build(layout, mounts::DEFAULT_SIZE, share)
    }

    fn build(layout: Layout, bytes: u64, share: Share) -> Self {
        let (mounts, replica) = match layout {
            Layout::Same(kind) => {
                let mount = Mount::with_size(kind, bytes);
                let replica = mount.path().join("replica");
                (vec![mount], replica)
            }
            Layout::Two(from, to) | Layout::Roots(from, to) => {
                let mounts = vec![Mount::with_size(from, bytes), Mount::with_size(to, bytes)];
                let replica = mounts[1].path().to_owned();
                (mounts, replica)
            }
        };
        let base = mounts[0].path();
        let state = Scratch::new("state");
        let (source, outside) = (base.join("source"), base.join("outside"));
        if matches!(layout, Layout::Roots(..)) {
            let source = base.to_owned();
            return Self { source, outside, replica, state, mounts, _share: share };
        }
        fs::create_dir(&source).unwrap();
        fs::create_dir(&outside).unwrap();
        Self { source, outside, replica, state, mounts, _share: share }
    }

    /// The source.
    pub fn source(&self) -> &Path {
        &self.source
    }

    /// A directory beside the source, on its file system.
    pub fn outside(&self) -> &Path {
        &self.outside
    }

    /// The replica.
    pub fn replica(&self) -> &Path {
        &self.replica
    }

    /// The state directory of `replicator run`.
    pub fn state_dir(&self) -> PathBuf {
        self.state.path().join("state")
    }

    /// The file systems: the source's first.
    pub fn mounts(&self) -> &[Mount] {
        &self.mounts
    }

    /// `replicator run` with an API port of its own and further arguments.
    pub fn command(&self, api_port: u16, arguments: &[&str]) -> Command {
        let mut command = Command::new(binary::replicator());
        command.arg("run").arg(&self.source).arg(&self.replica);
        command.arg("--state-dir").arg(self.state_dir());
        command.args(["--api", &format!("127.0.0.1:{api_port}")]).args(arguments);
        // A random workload deletes more than an operator would want unseen.
        if !arguments.iter().any(|argument| argument.starts_with("--halt-deletions")) {
            command.args(["--halt-deletions-percent", "0"]);
        }
        command
    }

    /// Starts `replicator run` and waits until its API answers.
    pub fn start_with(&self, arguments: &[&str]) -> Daemon {
        self.launch(arguments, |command| command)
    }

    /// The same within a limit of memory.
    pub fn start_within(&self, limit: &MemoryLimit, arguments: &[&str]) -> Daemon {
        self.launch(arguments, |command| limit.confine(&command))
    }

    fn launch(&self, arguments: &[&str], wrap: impl FnOnce(Command) -> Command) -> Daemon {
        let port = free_port();
        let endpoint = format!("http://127.0.0.1:{port}");
        let log = self.state.path().join("log");
        let mut daemon = Daemon::spawn(wrap(self.command(port, arguments)), &endpoint, &log);
        daemon.wait_ready();
        daemon
    }

    /// The same with a watcher.
    pub fn start(&self, watcher: &str) -> Daemon {
        self.start_with(&["--watcher", watcher])
    }

    /// Starts, and waits until the initial sync is through.
    pub fn start_enabled(&self, watcher: &str) -> Daemon {
        let mut daemon = self.start(watcher);
        daemon.wait_enabled(patience());
        daemon
    }

    /// Waits until all is replicated, and compares.
    #[track_caller]
    pub fn settle(&self, daemon: &Daemon, context: &dyn fmt::Display) {
        daemon.wait(patience());
        compare::assert_same(&self.source, &self.replica, context);
    }
}
