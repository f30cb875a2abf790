//! Files that never hold still. Each write makes them say what they are: a
//! number of the generation in every block. Whatever the replica shows while the
//! last batch is said to be exact was there at some moment of the source; what
//! was not is said to be fuzzy; and it costs what changed, not what is there.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use rand::rngs::SmallRng;
use rand::{Rng, RngCore, SeedableRng};
use replicator_common::status::{ReplicationStatus, Status};
use replicator_tests::mounts::FileSystem::{Ext4, Xfs};
use replicator_tests::process::Daemon;
use replicator_tests::scenario::{Layout, Pair, patience};

/// Every write is of whole blocks.
const BLOCK: usize = 4096;
/// Lines of the log, at most: some seconds' worth at full pace.
const LOG_MAX: u64 = 8000;
/// How long files are written to.
const STORM: Duration = Duration::from_secs(6);

/// A block that names the write that made it, and cannot be compressed.
fn block(generation: u64) -> Vec<u8> {
    let mut bytes = vec![0; BLOCK];
    SmallRng::seed_from_u64(generation).fill_bytes(&mut bytes);
    bytes[..8].copy_from_slice(&generation.to_le_bytes());
    bytes
}

fn blocks(generation: u64, count: usize) -> Vec<u8> {
    block(generation).repeat(count)
}

/// The generation of each block. An error for one that nobody wrote: a hole, or
/// parts of two writes.
fn generations(content: &[u8]) -> Result<Vec<u64>, String> {
    let one = |(number, bytes): (usize, &[u8])| {
        let head = bytes.first_chunk::<8>().ok_or(format!("block {number} is cut short"))?;
        let generation = u64::from_le_bytes(*head);
        match block(generation).starts_with(bytes) && bytes.len() == BLOCK {
            true => Ok(generation),
            false => Err(format!("block {number} ({generation}) is not what was written")),
        }
    };
    content.chunks(BLOCK).enumerate().map(one).collect()
}

/// One of the files.
trait Restless: Sync {
    /// Makes the file.
    fn begin(&mut self, path: &Path);
    /// Changes it once; steps are numbered from 1.
    fn step(&self, path: &Path, step: u64);
    /// Whether the content was there at some moment, by the steps done.
    fn was(&self, content: &[u8]) -> Result<(), String>;
    /// Between steps.
    fn pause(&self) -> Duration {
        Duration::from_millis(2)
    }
}

/// A log: lines in order, none left out.
struct Log;

impl Restless for Log {
    fn begin(&mut self, path: &Path) {
        fs::write(path, "").unwrap();
    }

    fn step(&self, path: &Path, step: u64) {
        // Else a machine that reads it slower than it grows would never catch up.
        if step <= LOG_MAX {
            let mut log = OpenOptions::new().append(true).open(path).unwrap();
            log.write_all(&block(step)).unwrap();
        }
    }

    fn was(&self, content: &[u8]) -> Result<(), String> {
        for (at, generation) in generations(content)?.into_iter().enumerate() {
            if generation != at as u64 + 1 {
                return Err(format!("block {at} has line {generation}"));
            }
        }
        Ok(())
    }
}

/// A database: one or two blocks at a time anywhere in a file that stays.
struct Database {
    blocks: u64,
    /// What each write wrote: place and number of blocks, by generation.
    written: Mutex<Vec<(u64, u64)>>,
}

impl Database {
    fn new(bytes: u64) -> Self {
        Self { blocks: bytes / BLOCK as u64, written: Mutex::default() }
    }
}

impl Restless for Database {
    fn begin(&mut self, path: &Path) {
        let mut file = File::create(path).unwrap();
        for number in 0..self.blocks {
            file.write_all(&block(1 << 40 | number)).unwrap();
        }
    }

    fn step(&self, path: &Path, step: u64) {
        let mut rng = SmallRng::seed_from_u64(step ^ 0x5eed);
        let count = rng.random_range(1..=2);
        let place = rng.random_range(0..=self.blocks - count);
        let file = OpenOptions::new().write(true).open(path).unwrap();
        // Before the write: it may be seen before it returns.
        let mut written = self.written.lock().unwrap();
        assert_eq!(written.len() as u64, step - 1);
        written.push((place, count));
        file.write_all_at(&blocks(step, count as usize), place * BLOCK as u64).unwrap();
    }

    /// The last write that is there, and nothing of a later one, and everything
    /// of those before it.
    fn was(&self, content: &[u8]) -> Result<(), String> {
        let found = generations(content)?;
        if found.len() as u64 != self.blocks {
            return Err(format!("{} blocks of {}", found.len(), self.blocks));
        }
        let newest = found.iter().copied().filter(|one| *one < 1 << 40).max().unwrap_or(0);
        let written = self.written.lock().unwrap();
        let mut expected = BTreeMap::new();
        for (number, (place, count)) in written[..newest as usize].iter().enumerate() {
            expected.extend((*place..place + count).map(|at| (at, number as u64 + 1)));
        }
        for (at, generation) in found.into_iter().enumerate() {
            let due = expected.get(&(at as u64)).copied().unwrap_or(1 << 40 | at as u64);
            // One system call under way may be there in part: the newest.
            let torn = written.get(newest.saturating_sub(1) as usize);
            let under_way = torn.is_some_and(|(p, n)| (*p..p + n).contains(&(at as u64)));
            if generation != due && !under_way {
                return Err(format!("block {at} is of write {generation}, not {due}, at {newest}"));
            }
        }
        Ok(())
    }
}

/// A log with a head that says how many lines there are: written first, and the
/// line after it. What is appended may be there before the head is.
struct Headed;

/// Lines that it begins with: it is large.
const HEADED: u64 = 1000;

impl Restless for Headed {
    fn begin(&mut self, path: &Path) {
        let mut file = File::create(path).unwrap();
        file.write_all(&block(HEADED)).unwrap();
        for number in 1..=HEADED {
            file.write_all(&block(number)).unwrap();
        }
    }

    fn step(&self, path: &Path, step: u64) {
        if step <= LOG_MAX {
            let mut file = OpenOptions::new().write(true).open(path).unwrap();
            file.write_all_at(&block(HEADED + step), 0).unwrap();
            file = OpenOptions::new().append(true).open(path).unwrap();
            file.write_all(&block(HEADED + step)).unwrap();
        }
    }

    fn was(&self, content: &[u8]) -> Result<(), String> {
        let found = generations(content)?;
        let lines = found.len() as u64 - 1;
        for (at, generation) in found.iter().enumerate().skip(1) {
            if *generation != at as u64 {
                return Err(format!("block {at} has line {generation}"));
            }
        }
        let head = found[0];
        let there = head == lines || head == lines + 1;
        there.then_some(()).ok_or(format!("{lines} lines, and its head says {head}"))
    }

    fn pause(&self) -> Duration {
        Duration::from_millis(10)
    }
}

/// A file that is emptied and written anew, in one go.
struct Rewritten(usize);

impl Restless for Rewritten {
    fn begin(&mut self, path: &Path) {
        self.step(path, 1);
    }

    fn step(&self, path: &Path, step: u64) {
        fs::write(path, blocks(step, self.0)).unwrap();
    }

    fn was(&self, content: &[u8]) -> Result<(), String> {
        one_generation(content, 0, self.0)
    }

    fn pause(&self) -> Duration {
        Duration::from_millis(if self.0 > 100 { 40 } else { 3 })
    }
}

/// A file that is replaced by a new one under its name, as editors do.
struct Replaced(usize);

impl Restless for Replaced {
    fn begin(&mut self, path: &Path) {
        self.step(path, 1);
    }

    fn step(&self, path: &Path, step: u64) {
        let new = path.with_extension("new");
        fs::write(&new, blocks(step, self.0)).unwrap();
        fs::rename(&new, path).unwrap();
    }

    fn was(&self, content: &[u8]) -> Result<(), String> {
        one_generation(content, self.0, self.0)
    }

    fn pause(&self) -> Duration {
        Duration::from_millis(if self.0 > 100 { 40 } else { 3 })
    }
}

/// A file that loses its end, again and again, and grows it anew.
struct Shrinking(usize);

impl Restless for Shrinking {
    fn begin(&mut self, path: &Path) {
        self.step(path, 1);
    }

    fn step(&self, path: &Path, step: u64) {
        let cuts = (step - 1) % 4;
        if cuts == 0 {
            return fs::write(path, blocks(step, self.0)).unwrap();
        }
        let left = (self.0 >> cuts) * BLOCK;
        OpenOptions::new().write(true).open(path).unwrap().set_len(left as u64).unwrap();
    }

    fn was(&self, content: &[u8]) -> Result<(), String> {
        one_generation(content, 0, self.0)
    }

    fn pause(&self) -> Duration {
        Duration::from_millis(30)
    }
}

fn one_generation(content: &[u8], least: usize, most: usize) -> Result<(), String> {
    let found = generations(content)?;
    let mixed = found.windows(2).find(|two| two[0] != two[1]);
    match mixed {
        Some(two) => Err(format!("of generations {two:?}")),
        None if !(least..=most).contains(&found.len()) => Err(format!("{} blocks", found.len())),
        None => Ok(()),
    }
}

/// The files with their names.
fn restless() -> Vec<(&'static str, Box<dyn Restless>)> {
    vec![
        ("log", Box::new(Log)),
        ("headed", Box::new(Headed)),
        ("database", Box::new(Database::new(32 << 20))),
        ("rewritten-small", Box::new(Rewritten(40))),
        ("rewritten-large", Box::new(Rewritten(1000))),
        ("replaced-small", Box::new(Replaced(40))),
        ("replaced-large", Box::new(Replaced(1000))),
        ("shrinking", Box::new(Shrinking(4000))),
    ]
}

fn post(daemon: &Daemon, what: &str) {
    let path = format!("/replicator/v1/{what}");
    daemon.request("POST", &path, Some(serde_json::json!({}))).unwrap();
}

/// Stops shipping, and waits until nothing is under way.
fn pause(daemon: &mut Daemon) -> Status {
    post(daemon, "pause");
    daemon.poll_until(patience(), "it is paused", |daemon| {
        let status = daemon.try_status()?;
        (status.status == ReplicationStatus::Paused).then_some(status)
    })
}

/// Whether the status says that the replica is an instant of the source.
fn says_exact(status: &Status) -> bool {
    let there = status.destination.as_ref().unwrap();
    there.last_consistent.is_some() && there.last_consistent == there.last_replicated
}

fn assert_no_error(daemon: &Daemon) {
    let status = daemon.status();
    let (source, there) = (status.source.unwrap(), status.destination.unwrap());
    assert!(source.skipped.unreadable.is_empty(), "{:?}", source.skipped);
    assert!(source.last_error.is_none(), "{:?}", source.last_error);
    assert!(there.last_error.is_none() && there.stalled.is_none(), "{there:?}");
    let output = daemon.output();
    let bad: Vec<_> =
        output.lines().filter(|line| line.contains("ERROR") || line.contains("WARN")).collect();
    assert!(bad.is_empty(), "{bad:#?}");
}

#[test]
fn what_was_never_there_is_said_to_be_fuzzy() {
    let pair = Pair::alone(Layout::Two(Ext4, Xfs));
    let mut files = restless();
    let (source, replica) = (pair.source().to_owned(), pair.replica().to_owned());
    files.iter_mut().for_each(|(name, file)| file.begin(&source.join(name)));
    let mut daemon = pair.start_enabled("fanotify");
    let stop = AtomicBool::new(false);
    let mut seen = Seen::default();
    thread::scope(|scope| {
        for (name, file) in &files {
            let (path, stop) = (source.join(name), &stop);
            scope.spawn(move || {
                // Begun with one already, where that was a step.
                let mut step = u64::from(!matches!(*name, "log" | "headed" | "database"));
                while !stop.load(Ordering::Acquire) {
                    step += 1;
                    let began = Instant::now();
                    file.step(&path, step);
                    // On a slow machine the steps alone would take all of it.
                    thread::sleep(file.pause().max(4 * began.elapsed()));
                }
            });
        }
        let (reader, stop_reading) = (replica.join("replaced-small"), &stop);
        scope.spawn(move || read_replaced(&reader, stop_reading));
        let judged = judge(&mut daemon, &files, &replica, &source, &mut seen);
        stop.store(true, Ordering::Release);
        judged.unwrap_or_else(|error| panic!("{error}"));
    });
    eprintln!("{seen:?}");
    assert_no_error(&daemon);
    // Once they hold still, after the rest that is due to each.
    daemon.wait(3 * patience());
    pair.settle(&daemon, &"after the storm");
    let since = daemon.status().destination.unwrap().last_replicated;
    daemon.poll_until(patience(), "an exact batch", |daemon| {
        let there = daemon.try_status()?.destination?;
        (there.last_consistent >= since).then_some(())
    });
    for (name, file) in &files {
        let content = fs::read(replica.join(name)).unwrap();
        file.was(&content).unwrap_or_else(|error| panic!("{name} in the end: {error}"));
    }
}

/// What was seen, to know what a run was worth.
#[derive(Debug, Default)]
struct Seen {
    looks: u32,
    exact: u32,
    fuzzy: u32,
    torn: BTreeMap<&'static str, u32>,
}

/// Stops shipping now and then, so that status and replica are of one moment,
/// and holds one against the other.
fn judge(
    daemon: &mut Daemon,
    files: &[(&'static str, Box<dyn Restless>)],
    replica: &Path,
    source: &Path,
    seen: &mut Seen,
) -> Result<(), String> {
    let (start, mut rng) = (Instant::now(), SmallRng::seed_from_u64(rand::random()));
    let (mut claims, mut same) = (BTreeSet::new(), 0);
    // On a slow machine it takes longer until enough was seen.
    let enough = |claims: &BTreeSet<_>| start.elapsed() >= STORM && claims.len() >= 3;
    while !enough(&claims) {
        if start.elapsed() > 3 * patience() {
            return Err(format!("the watermark starves: {claims:?}"));
        }
        // There, all large files may take longer than that; a pause ends what is
        // under way of them.
        thread::sleep(Duration::from_millis(rng.random_range(300..1200)) * (1 + same));
        let status = pause(daemon);
        seen.looks += 1;
        let exact = says_exact(&status);
        *if exact { &mut seen.exact } else { &mut seen.fuzzy } += 1;
        let blocked = status.source.as_ref().unwrap().blocked_by.clone();
        for (name, file) in files {
            let Ok(content) = fs::read(replica.join(name)) else {
                return Err(format!("{name} is not on the replica"));
            };
            let Err(error) = file.was(&content) else { continue };
            *seen.torn.entry(name).or_default() += 1;
            let named = blocked.iter().any(|blocker| blocker.path.as_deref() == Some(name));
            if exact && !named {
                return Err(format!("{name} was never so, and nobody says: {error}\n{status:#?}"));
            }
        }
        let new = claims.insert(status.destination.and_then(|there| there.last_replicated));
        same = if new { 0 } else { same + 1 };
        post(daemon, "resume");
        others_go_on(daemon, source, replica, seen.looks)?;
    }
    Ok(())
}

/// A file that holds still does not wait for those that do not.
fn others_go_on(
    daemon: &mut Daemon,
    source: &Path,
    replica: &Path,
    number: u32,
) -> Result<(), String> {
    let (path, text) = (format!("still-{number}"), format!("number {number}"));
    fs::write(source.join(&path), &text).unwrap();
    let there = replica.join(&path);
    daemon.poll_until(patience(), "a file that holds still arrives", |_| {
        (fs::read_to_string(&there).ok()? == text).then_some(())
    });
    Ok(())
}

/// A small file that is replaced is old or new to whoever reads it, always.
fn read_replaced(path: &Path, stop: &AtomicBool) {
    let file = Replaced(40);
    while !stop.load(Ordering::Acquire) {
        let content = fs::read(path).unwrap();
        file.was(&content).unwrap_or_else(|error| panic!("a reader saw {error}"));
        thread::sleep(Duration::from_millis(1));
    }
}

/// The 92 GB file that was sent 127 times, in small: it costs what changed in it.
#[test]
fn bytes_shipped_stay_in_proportion_to_bytes_changed() {
    const SIZE: u64 = 256 << 20;
    let pair = Pair::new(Layout::Two(Ext4, Xfs));
    let path = pair.source().join("database");
    let mut database = Database::new(SIZE);
    database.begin(&path);
    let log = pair.source().join("log");
    fs::write(&log, blocks(0, 2000)).unwrap();
    let daemon = pair.start_enabled("fanotify");
    pair.settle(&daemon, &"at first");
    let before = daemon.counters();
    // Up to two of a hundred blocks, over some seconds: each batch finds it changed.
    let start = Instant::now();
    for step in 1..=SIZE / BLOCK as u64 / 100 {
        database.step(&path, step);
        Log.step(&log, step);
        thread::sleep(Duration::from_millis(10 * step).saturating_sub(start.elapsed()));
    }
    // It was read a moment ago: the next reading comes after a rest of four times
    // as long, which a slow machine makes long.
    daemon.wait(6 * patience());
    pair.settle(&daemon, &"in the end");
    let after = daemon.counters();
    let blocks: u64 = database.written.lock().unwrap().iter().map(|(_, count)| count + 1).sum();
    let written = blocks * BLOCK as u64;
    let shipped = after.bytes_shipped - before.bytes_shipped;
    let counted = after.bytes_changed - before.bytes_changed;
    eprintln!("{written} bytes written, {counted} counted as changed, {shipped} shipped");
    // A block lies in one chunk of 20 KiB on average, larger ones more often,
    // and sometimes in two: of 128 MiB with 2 % of its blocks changed, 23 MB
    // travelled for 7 MB written, log included. Where many change at once the
    // destination is asked for its blocks, and less travels.
    assert!(shipped < 10 * written, "{shipped} bytes for {written} that were written");
    // Nothing was sent again or in vain.
    assert!(shipped < counted + counted / 2, "{shipped} bytes for {counted} that changed");
    assert!(counted >= written / 2, "{counted} counted of {written}");
    assert_no_error(&daemon);
}

/// A log that grows by small appends costs what was appended, and a chunk for
/// each time that it was read: its last chunk is another one every time.
#[test]
fn a_log_costs_what_is_appended() {
    const SIZE: usize = 64 << 20;
    const EACH: usize = 64 << 10;
    const APPENDS: u64 = 200;
    /// The largest chunk of a file of this size.
    const CHUNK: u64 = 64 << 10;
    let pair = Pair::new(Layout::Two(Ext4, Xfs));
    let path = pair.source().join("log");
    let line = |number: u64| {
        let mut bytes = vec![0; EACH];
        SmallRng::seed_from_u64(number).fill_bytes(&mut bytes);
        bytes
    };
    let mut log = File::create(&path).unwrap();
    for number in 0..(SIZE / EACH) as u64 {
        log.write_all(&line(1 << 40 | number)).unwrap();
    }
    let daemon = pair.start_enabled("fanotify");
    pair.settle(&daemon, &"at first");
    let before = daemon.counters();
    let start = Instant::now();
    for number in 1..=APPENDS {
        log.write_all(&line(number)).unwrap();
        thread::sleep(Duration::from_millis(50 * number).saturating_sub(start.elapsed()));
    }
    daemon.wait(3 * patience());
    pair.settle(&daemon, &"in the end");
    let after = daemon.counters();
    let (appended, readings) =
        (APPENDS * EACH as u64, after.objects_shipped - before.objects_shipped);
    let shipped = after.bytes_shipped - before.bytes_shipped;
    eprintln!("{appended} bytes appended, read {readings} times, {shipped} shipped");
    assert!(readings > 1, "it was read once: nothing was tested");
    assert!(
        shipped <= appended + appended / 5 + readings * CHUNK,
        "{shipped} bytes for {appended} that were appended, read {readings} times"
    );
    assert_no_error(&daemon);
}
