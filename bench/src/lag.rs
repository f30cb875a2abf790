//! The lag: from the close of a file on the source to its right content being
//! visible on the replica, while files change at a steady rate.
//!
//! Each change writes 4 KiB: two of three make a new file, every third replaces
//! one by rename. The replica is watched by inotify, which costs little and
//! tells the moment to some tens of microseconds; an event counts when the file
//! then holds what was written, not before. What inotify did not tell of is
//! looked for at the end, and counted as lost when it is not there.

use std::collections::HashMap;
use std::fs;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use replicator_tests::mounts::{FileSystem, Mount, Scratch};
use replicator_tests::process::{Daemon, free_port};
use replicator_tests::stamps::steadily;
use replicator_tests::workload::content;
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::fs::inotify::{self, CreateFlags, ReadFlags, WatchFlags};
use serde::Serialize;

use crate::Scale;
use crate::measure::{self, Usage};
use crate::peer::{self, Peer};

/// 23 and 24: a file vanished while rsync looked at it, as the temporary names
/// here do all the time. The next pass finds what came of them.
const RSYNC_ACCEPTED: [i32; 3] = [0, 23, 24];
const DIRECTORIES: u64 = 50;
const FILE_BYTES: usize = 4096;
/// How long what is under way may take after the last change.
const GRACE: Duration = Duration::from_secs(20);
/// How long the first sync of what stands there may take.
const SETUP_LIMIT: Duration = Duration::from_secs(300);

/// One run of one program.
#[derive(Debug, Serialize)]
pub struct Lag {
    /// Which.
    pub peer: Peer,
    /// Changes made.
    pub changes: u64,
    /// Changes replaced by a later one before they were seen.
    pub superseded: u64,
    /// Changes that never arrived.
    pub lost: u64,
    /// Seconds, each arrival's lag in order.
    pub lags: Vec<f64>,
    /// What it used while files changed.
    pub usage: Usage,
}

impl Lag {
    /// The lag that this share of the changes kept below, seconds.
    pub fn percentile(&self, share: f64) -> f64 {
        let last = self.lags.len().saturating_sub(1);
        let index = (self.lags.len() as f64 * share) as usize;
        self.lags.get(index.min(last)).copied().unwrap_or(f64::NAN)
    }
}

/// A change that is under way.
struct Change {
    content: Vec<u8>,
    closed: Instant,
}

/// What is under way and what has arrived, by path relative to both roots.
#[derive(Default)]
struct Ledger {
    pending: HashMap<PathBuf, Change>,
    lags: Vec<f64>,
    superseded: u64,
}

/// Measures one program for `scale.lag_seconds`.
pub fn measure(peer: Peer, scale: Scale) -> Result<Lag> {
    let source = Mount::with_size(FileSystem::Ext4, 4 << 30);
    let replica = Mount::with_size(FileSystem::Ext4, 4 << 30);
    let scratch = Scratch::new("bench");
    let tree = source.path().join("tree");
    for directory in 0..DIRECTORIES {
        fs::create_dir_all(tree.join(format!("directory-{directory}")))?;
    }
    for number in 0..scale.standing_files {
        fs::write(tree.join(path(number, "standing")), content::bytes(number, FILE_BYTES))?;
    }
    let runner = Runner::start(peer, &tree, replica.path(), scratch.path())?;
    let (inotify, directories) = watch(replica.path())?;
    let (ledger, done) = (Mutex::new(Ledger::default()), AtomicBool::new(false));
    let before = runner.usage()?;
    let (changes, usage) = thread::scope(|scope| {
        scope.spawn(|| listen(&inotify, &directories, replica.path(), &ledger, &done));
        let time = Duration::from_secs(scale.lag_seconds);
        let changes =
            steadily(scale.changes_per_second, time, |number| change(&tree, number, &ledger));
        let after = runner.usage();
        let end = Instant::now() + GRACE;
        while !locked(&ledger).pending.is_empty() && Instant::now() < end {
            thread::sleep(Duration::from_millis(50));
        }
        done.store(true, Ordering::Relaxed);
        (changes, after)
    });
    let usage = usage?;
    runner.stop();
    let ledger = ledger.into_inner().unwrap_or_else(PoisonError::into_inner);
    let mut lags = ledger.lags;
    lags.sort_by(f64::total_cmp);
    Ok(Lag {
        peer,
        changes,
        superseded: ledger.superseded,
        lost: ledger.pending.len() as u64,
        lags,
        usage: Usage { cpu_seconds: usage.cpu_seconds - before.cpu_seconds, ..usage },
    })
}

fn path(number: u64, kind: &str) -> PathBuf {
    PathBuf::from(format!("directory-{}/{kind}-{number}", number % DIRECTORIES))
}

fn locked(ledger: &Mutex<Ledger>) -> std::sync::MutexGuard<'_, Ledger> {
    ledger.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Makes change `number` and enters it in the ledger.
fn change(tree: &Path, number: u64, ledger: &Mutex<Ledger>) {
    let replaces = number % 3 == 2;
    // Replaced is what came 300 changes before.
    let name = path(if replaces { number.saturating_sub(300) } else { number }, "changed");
    let content = content::bytes(number, FILE_BYTES);
    // Held while writing: an arrival must not be looked up before it is entered.
    let mut ledger = locked(ledger);
    let written = if replaces {
        let temporary = tree.join(&name).with_extension("new");
        fs::write(&temporary, &content).and_then(|()| fs::rename(&temporary, tree.join(&name)))
    } else {
        fs::write(tree.join(&name), &content)
    };
    let closed = Instant::now();
    if let Err(error) = written {
        // A change that was not made is no change; the count tells.
        eprintln!("{}: {error}", name.display());
        return;
    }
    let earlier = ledger.pending.insert(name, Change { content, closed });
    ledger.superseded += u64::from(earlier.is_some());
}

/// Watches every directory of the replica; gives the directories by watch.
fn watch(replica: &Path) -> Result<(OwnedFd, HashMap<i32, PathBuf>)> {
    let inotify = inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK)?;
    let flags = WatchFlags::CREATE | WatchFlags::MOVED_TO | WatchFlags::CLOSE_WRITE;
    let mut directories = HashMap::new();
    for number in 0..DIRECTORIES {
        let directory = PathBuf::from(format!("directory-{number}"));
        let id = inotify::add_watch(&inotify, replica.join(&directory), flags)?;
        directories.insert(id, directory);
    }
    Ok((inotify, directories))
}

/// Enters arrivals in the ledger until `done`, then looks for the rest once.
fn listen(
    inotify: &OwnedFd,
    directories: &HashMap<i32, PathBuf>,
    replica: &Path,
    ledger: &Mutex<Ledger>,
    done: &AtomicBool,
) {
    let mut buffer = vec![MaybeUninit::uninit(); 256 << 10];
    while !done.load(Ordering::Relaxed) {
        let mut poll = [PollFd::new(inotify, PollFlags::IN)];
        let limit = Timespec { tv_sec: 0, tv_nsec: 20_000_000 };
        let _ = rustix::event::poll(&mut poll, Some(&limit));
        let mut overflow = false;
        let mut reader = inotify::Reader::new(inotify.as_fd(), &mut buffer);
        while let Ok(event) = reader.next() {
            overflow |= event.events().contains(ReadFlags::QUEUE_OVERFLOW);
            let directory = directories.get(&event.wd());
            if let (Some(directory), Some(name)) = (directory, event.file_name()) {
                let name: &std::ffi::OsStr =
                    std::os::unix::ffi::OsStrExt::from_bytes(name.to_bytes());
                arrived(replica, &directory.join(name), ledger);
            }
        }
        if overflow {
            eprintln!("the queue of the replica's watch overflowed");
        }
    }
    let names: Vec<PathBuf> = locked(ledger).pending.keys().cloned().collect();
    names.iter().for_each(|name| arrived(replica, name, ledger));
}

/// Strikes the change from the ledger if the replica holds what was written.
fn arrived(replica: &Path, name: &Path, ledger: &Mutex<Ledger>) {
    let Ok(found) = fs::read(replica.join(name)) else { return };
    let now = Instant::now();
    let mut ledger = locked(ledger);
    if ledger.pending.get(name).is_some_and(|change| change.content == found)
        && let Some(change) = ledger.pending.remove(name)
    {
        ledger.lags.push((now - change.closed).as_secs_f64());
    }
}

/// The program at work.
enum Runner {
    Replicator(Box<Daemon>),
    /// One pass after the other, without a pause.
    Loop {
        stop: std::sync::Arc<AtomicBool>,
        usage: std::sync::Arc<Mutex<Usage>>,
        thread: thread::JoinHandle<Result<()>>,
    },
}

impl Runner {
    /// Starts, and returns when what stands on the source is on the replica.
    fn start(peer: Peer, source: &Path, replica: &Path, scratch: &Path) -> Result<Self> {
        let (state, log) = (scratch.join("state"), scratch.join("log"));
        if peer == Peer::Replicator {
            let port = free_port();
            let command = peer::replicator(source, replica, &state, port);
            let mut daemon = Daemon::spawn(command, &format!("http://127.0.0.1:{port}"), &log);
            daemon.wait_ready();
            daemon.wait_enabled(SETUP_LIMIT);
            return Ok(Self::Replicator(Box::new(daemon)));
        }
        let (source, replica) = (source.to_owned(), replica.to_owned());
        let pass =
            move || measure::run(&mut peer.pass(&source, &replica, &state), &RSYNC_ACCEPTED, &log);
        pass().context("first pass")?;
        let (stop, usage) = <(std::sync::Arc<AtomicBool>, std::sync::Arc<Mutex<Usage>>)>::default();
        let thread = thread::spawn({
            let (stop, usage) = (stop.clone(), usage.clone());
            move || {
                while !stop.load(Ordering::Relaxed) {
                    let (_, used) = pass()?;
                    let mut usage = usage.lock().unwrap_or_else(PoisonError::into_inner);
                    usage.cpu_seconds += used.cpu_seconds;
                    usage.peak_memory = usage.peak_memory.max(used.peak_memory);
                }
                Ok(())
            }
        });
        Ok(Self::Loop { stop, usage, thread })
    }

    fn usage(&self) -> Result<Usage> {
        match self {
            Self::Replicator(daemon) => measure::usage_of(daemon.id()),
            Self::Loop { usage, .. } => Ok(*usage.lock().unwrap_or_else(PoisonError::into_inner)),
        }
    }

    fn stop(self) {
        match self {
            Self::Replicator(daemon) => {
                daemon.interrupt();
            }
            Self::Loop { stop, thread, .. } => {
                stop.store(true, Ordering::Relaxed);
                if let Ok(Err(error)) = thread.join() {
                    eprintln!("{error:#}");
                }
            }
        }
    }
}
