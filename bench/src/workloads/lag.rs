//! The lag: from the close of a file on the source to its right content being
//! visible on the replica, while files change at a steady rate.
//!
//! Each change writes 4 KiB: two of three make a new file, every third replaces
//! by rename one that stood there before, and not in the same second: rsync looks
//! no closer. The replica is watched by inotify, which costs little and
//! tells the moment to some tens of microseconds; an event counts when the file
//! then holds what was written, not before. What inotify did not tell of is
//! looked for at the end, and counted as lost when it is not there.

use std::collections::HashMap;
use std::fs;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use replicator_tests::stamps::steadily;
use replicator_tests::workload::content;
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::fs::inotify::{self, CreateFlags, ReadFlags, WatchFlags};

use super::{Bench, Figure, Outcome, Workload, unless_follows};
use crate::measure::{Meter, Usage};
use crate::net::Net;
use crate::peers::Peer;
use crate::site::Site;

const DIRECTORIES: u64 = 50;
const FILE_BYTES: usize = 4096;
/// How long what is under way may take after the last change.
const GRACE: Duration = Duration::from_secs(20);
/// Until a change has another second than what was there.
const SETTLE: Duration = Duration::from_secs(2);
/// Between two questions to a peer that says up to when all is replicated.
const ASK: Duration = Duration::from_millis(250);

/// The lag at one rate.
pub struct Lag {
    /// As `--only` calls it.
    pub name: &'static str,
    /// Changes a second.
    pub rate: u32,
}

fn seconds(bench: &Bench) -> u64 {
    bench.pick(30, 3)
}

/// Files that are there already.
fn standing(bench: &Bench) -> u64 {
    bench.pick(20_000, 1_000)
}

impl Workload for Lag {
    fn name(&self) -> &'static str {
        self.name
    }

    fn title(&self, bench: &Bench) -> String {
        let (seconds, standing) = (seconds(bench), standing(bench));
        format!("lag at {} changes a second for {seconds} s, beside {standing} files", self.rate)
    }

    fn about(&self) -> &'static str {
        "From the close on the source to the right content being visible on the replica; changes of \
         4 KiB. What does not follow is run in a loop without a pause. \"Lost\" had not arrived 20 s \
         after the last change. CPU to the last change. Its word: up to when a peer says that all is \
         replicated (replicator's `LastReplicatedTimestamp`), asked for four times a second."
    }

    fn excludes(&self, peer: &dyn Peer) -> Option<&'static str> {
        unless_follows(peer)
    }

    fn run(&self, bench: &Bench, peer: &dyn Peer, _first: bool) -> Result<Outcome> {
        let (source, replica) = (bench.disk().with_tree()?, bench.disk().with_tree()?);
        let site = Site::new(&source.tree(), &replica.tree(), Net::local()?)?;
        for directory in 0..DIRECTORIES {
            fs::create_dir(site.source.join(format!("directory-{directory}")))?;
        }
        for number in 0..standing(bench) {
            let path = site.source.join(path(number, "standing"));
            fs::write(&path, content::bytes(number, FILE_BYTES))
                .with_context(|| path.display().to_string())?;
        }
        let mut session = peer.prepare(&site)?;
        session.follow()?;
        thread::sleep(SETTLE);
        let time = Duration::from_secs(seconds(bench));
        let (ledger, usage, behind) = disturb(&site, peer, (self.rate, time, standing(bench)))?;
        session.rest()?;
        let mut lags = ledger.lags;
        lags.sort_by(f64::total_cmp);
        let figures = vec![
            Figure::new("p50, ms", percentile(&lags, 0.5) * 1e3, 0),
            Figure::new("p99, ms", percentile(&lags, 0.99) * 1e3, 0),
            Figure::new("most, ms", percentile(&lags, 1.0) * 1e3, 0),
            Figure::new("lost", ledger.pending.len() as f64, 0),
            Figure::new("its word behind, most s", behind, 2),
        ];
        Ok(Outcome::with_usage(figures, &usage))
    }
}

/// The figure that this share of all stays below; `sorted` is in order.
pub fn percentile(sorted: &[f64], share: f64) -> f64 {
    let last = sorted.len().saturating_sub(1);
    let index = (sorted.len() as f64 * share) as usize;
    sorted.get(index.min(last)).copied().unwrap_or(f64::NAN)
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
}

/// Changes files at a steady rate for a time, and waits for the last of them. What
/// was used counts to the last change; third is how far the peer's own word of what
/// is replicated was behind at most, where it gives one, seconds.
fn disturb(
    site: &Arc<Site>,
    peer: &dyn Peer,
    (rate, time, standing): (u32, Duration, u64),
) -> Result<(Ledger, Usage, f64)> {
    let (inotify, directories) = watch(&site.replica)?;
    let (ledger, done) = (Mutex::new(Ledger::default()), AtomicBool::new(false));
    let meter = Meter::start(site)?;
    let (usage, behind) = thread::scope(|scope| {
        scope.spawn(|| listen(&inotify, &directories, &site.replica, &ledger, &done));
        let behind = scope.spawn(|| most_behind(site, peer, &done));
        steadily(rate.into(), time, |number| change(&site.source, number, standing, &ledger));
        let usage = meter.stop();
        let end = Instant::now() + GRACE;
        while !locked(&ledger).pending.is_empty() && Instant::now() < end {
            thread::sleep(Duration::from_millis(50));
        }
        done.store(true, Ordering::Relaxed);
        (usage, behind.join().unwrap_or(f64::NAN))
    });
    Ok((ledger.into_inner().unwrap_or_else(PoisonError::into_inner), usage?, behind))
}

/// Asks the peer a few times a second how far its word is behind; gives the most.
fn most_behind(site: &Site, peer: &dyn Peer, done: &AtomicBool) -> f64 {
    let mut most = f64::NAN;
    while !done.load(Ordering::Relaxed) {
        match peer.seconds_behind(site) {
            Ok(Some(seconds)) => most = most.max(seconds),
            Ok(None) => break,
            Err(error) => eprintln!("{}: {error:#}", peer.name()),
        }
        thread::sleep(ASK);
    }
    most
}

fn path(number: u64, kind: &str) -> PathBuf {
    PathBuf::from(format!("directory-{}/{kind}-{number}", number % DIRECTORIES))
}

fn locked(ledger: &Mutex<Ledger>) -> std::sync::MutexGuard<'_, Ledger> {
    ledger.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Makes change `number` and enters it in the ledger.
fn change(tree: &Path, number: u64, standing: u64, ledger: &Mutex<Ledger>) {
    let replaces = number % 3 == 2;
    let name =
        if replaces { path(number / 3 % standing, "standing") } else { path(number, "changed") };
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
    // One that is replaced before it was seen need not be seen.
    ledger.pending.insert(name, Change { content, closed });
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
