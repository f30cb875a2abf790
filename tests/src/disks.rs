//! A replication between file systems that a test fills, or makes fail.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use replicator_common::status::Status;
use replicator_common::time::Timestamp;

use crate::mounts::FileSystem::{self, Ext4};
use crate::mounts::{Mount, Scratch, run};
use crate::process::{Daemon, free_port};
use crate::scenario::patience;
use crate::serial::{self, Share};
use crate::{binary, compare};

/// 1,048,576 bytes.
pub const MIB: u64 = 1 << 20;

/// A source, a replica and state, on file systems that a test fills.
pub struct Disks {
    // Dropped in this order.
    door: Scratch,
    /// For what a test writes of its own.
    pub logs: Scratch,
    /// The state directory.
    pub state: PathBuf,
    source: Mount,
    /// The replica's file system.
    pub disk: Mount,
    /// The small file system.
    pub small: Mount,
    _share: Share,
}

impl Disks {
    /// `state` names the part of the state directory that gets a small file
    /// system of its own (`source` or `destination`).
    pub fn new(source: FileSystem, replica: (FileSystem, u64), state: Option<&str>) -> Self {
        let share = serial::share();
        Self::over(share, Mount::new(source), Mount::with_size(replica.0, replica.1), state)
    }

    /// The same over file systems that stand already.
    pub fn over(share: Share, source: Mount, replica: Mount, state: Option<&str>) -> Self {
        let (small, logs, door) =
            (Mount::with_size(Ext4, 32 * MIB), Scratch::new("disks"), Scratch::new("door"));
        // A way to the replica's file system that is not read-only.
        let way = door.path().join("mnt");
        fs::create_dir(&way).unwrap();
        run(Command::new("mount").arg("--bind").arg(replica.path()).arg(&way));
        let directory = logs.path().join("state");
        fs::create_dir(&directory).unwrap();
        fs::create_dir(source.path().join("source")).unwrap();
        fs::create_dir(replica.path().join("replica")).unwrap();
        let disks =
            Self { door, logs, state: directory, source, disk: replica, small, _share: share };
        if let Some(part) = state {
            assert!(disks.start().interrupt().success());
            let part = disks.state.join(part);
            run(Command::new("cp").arg("-a").arg(part.join(".")).arg(disks.small.path()));
            run(Command::new("mount").arg("--bind").arg(disks.small.path()).arg(&part));
        }
        disks
    }

    /// The replicated directory.
    pub fn source(&self) -> PathBuf {
        self.source.path().join("source")
    }

    /// The replica.
    pub fn replica(&self) -> PathBuf {
        self.disk.path().join("replica")
    }

    /// The replica's file system, by the way that stays writable.
    pub fn door(&self) -> PathBuf {
        self.door.path().join("mnt")
    }

    /// `replicator run`, with its API at `port`.
    pub fn command(&self, port: u16) -> Command {
        let mut command = Command::new(binary::replicator());
        command.arg("run").arg(self.source()).arg(self.replica());
        command.arg("--state-dir").arg(&self.state);
        command.args(["--api", &format!("127.0.0.1:{port}"), "--watcher", "fanotify"]);
        command
    }

    /// Starts it, with its command changed, and waits until it is ENABLED.
    pub fn start_as(&self, change: impl FnOnce(Command) -> Command) -> Daemon {
        let port = free_port();
        let command = change(self.command(port));
        let log = self.logs.path().join("log");
        let mut daemon = Daemon::spawn(command, &format!("http://127.0.0.1:{port}"), &log);
        daemon.wait_ready();
        daemon.wait_enabled(patience());
        daemon
    }

    /// Starts it and waits until it is ENABLED.
    pub fn start(&self) -> Daemon {
        self.start_as(|command| command)
    }

    /// Writes a file; the moment at which that was done.
    pub fn write(&self, name: &str, bytes: u64) -> Timestamp {
        fs::write(self.source().join(name), content(name, bytes)).unwrap();
        Timestamp::now()
    }

    /// Waits until the source's `name` is in the replica as it is.
    #[track_caller]
    pub fn await_same(&self, daemon: &mut Daemon, name: &str) {
        daemon.poll_until(patience(), &format!("{name} is in the replica"), |_| {
            let (source, replica) = (self.source().join(name), self.replica().join(name));
            (fs::read(source).ok() == fs::read(replica).ok()).then_some(())
        });
    }

    /// Waits until all is replicated, through errors that are not over yet.
    #[track_caller]
    pub fn settle(&self, daemon: &mut Daemon, what: &str) {
        daemon.poll_until(patience(), what, |daemon| daemon.try_wait(Duration::from_secs(5)).ok());
        compare::assert_same(&self.source(), &self.replica(), &what);
    }
}

/// Bytes that nothing compresses, of which no two names share any.
pub fn content(name: &str, bytes: u64) -> Vec<u8> {
    let mut content = vec![0; bytes as usize];
    blake3::Hasher::new().update(name.as_bytes()).finalize_xof().fill(&mut content);
    content
}

/// Takes all of a file system but for about `left` bytes.
pub fn fill(path: &Path, left: u64) -> PathBuf {
    let filler = path.join("filler");
    rustix::fs::sync();
    let found = rustix::fs::statvfs(path).unwrap();
    let free = found.f_bfree * found.f_frsize;
    let bytes = free.saturating_sub(left).to_string();
    run(Command::new("fallocate").args(["-l", &bytes]).arg(&filler));
    filler
}

/// Takes all of a file system, to the last block.
pub fn fill_up(path: &Path) -> PathBuf {
    let filler = path.join("filler");
    // It fails in the end: that is the point.
    let _ = Command::new("dd")
        .args(["if=/dev/zero", "bs=4096", "conv=fsync", "status=none"])
        .arg(format!("of={}", filler.display()))
        .output();
    filler
}

/// What the watermark waits for, as path and reason.
pub fn blockers(status: &Status) -> Vec<(String, String)> {
    let Some(source) = status.source.as_ref() else { return Vec::new() };
    let named =
        |b: &replicator_common::status::Blocker| b.path.clone().map(|p| (p, b.reason.clone()));
    source.blocked_by.iter().filter_map(named).collect()
}

/// Waits until `name` is named as what waits, with these words in the reason.
#[track_caller]
pub fn await_named(daemon: &mut Daemon, name: &str, words: &[&str]) -> Status {
    daemon.poll_until(patience(), &format!("{name} is named with {words:?}"), |daemon| {
        let status = daemon.try_status()?;
        let told = blockers(&status)
            .into_iter()
            .any(|(path, reason)| path == name && words.iter().all(|word| reason.contains(word)));
        told.then_some(status)
    })
}

/// The watermark, as status says it.
pub fn watermark(daemon: &Daemon) -> Timestamp {
    daemon.status().destination.unwrap().last_replicated.unwrap()
}

/// Waits until some text of status has the words.
#[track_caller]
pub fn await_told(daemon: &mut Daemon, words: &str) {
    daemon.poll_until(patience(), &format!("status says {words}"), |daemon| {
        let status = daemon.try_status()?;
        let destination = status.destination.as_ref();
        let texts = [
            status.status_message.clone(),
            status.source.as_ref().and_then(|s| s.last_error.as_ref()).map(|e| e.error.clone()),
            destination.and_then(|d| d.stalled.clone()),
            destination.and_then(|d| d.last_error.as_ref()).map(|e| e.error.clone()),
        ];
        texts.iter().flatten().any(|text| text.contains(words)).then_some(())
    });
}
