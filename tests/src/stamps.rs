//! Stamped files: each says when it was closed, so that a claim about time can
//! be held against what is really there.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::{Duration, Instant};

use replicator_common::time::Timestamp;

/// Writes stamped files and remembers when each version was closed.
#[derive(Debug)]
pub struct Stamper {
    root: PathBuf,
    /// By name: the versions in order, each with the moment after its close.
    written: Mutex<HashMap<String, Vec<(u64, Timestamp)>>>,
    /// By how much the source's clock is ahead of ours, nanoseconds.
    ahead: AtomicI64,
}

impl Stamper {
    /// Writes below `root`.
    pub fn new(root: &Path) -> Self {
        Self {
            root: root.to_owned(),
            written: Mutex::new(HashMap::new()),
            ahead: AtomicI64::new(0),
        }
    }

    /// The source's clock, by which claims are made, was set: it is so many
    /// seconds ahead of the true time.
    pub fn set_clock(&self, ahead: i64) {
        self.ahead.store(ahead * 1_000_000_000, Ordering::SeqCst);
    }

    /// Forgets what was written so far: claims about it say nothing any more.
    pub fn forget(&self) {
        self.written.lock().unwrap_or_else(|p| p.into_inner()).clear();
    }

    /// What the source's clock shows.
    pub fn now(&self) -> Timestamp {
        Timestamp::now().offset(self.ahead.load(Ordering::SeqCst))
    }

    /// Writes version `version` (from 1) of `name`. The first version of a
    /// file is written in place, later ones under another name and renamed
    /// over it: so at no moment after the first close is the file half of one
    /// version and half of another, and the replica has no excuse either. A
    /// name that ends in `.log` is appended to instead, a line a version.
    pub fn write(&self, name: &str, version: u64) -> io::Result<()> {
        let path = self.root.join(name);
        if let Some(directory) = path.parent() {
            fs::create_dir_all(directory)?;
        }
        if name.ends_with(".log") {
            let mut log = File::options().append(true).create(true).open(&path)?;
            log.write_all(line(name, version).as_bytes())?;
        } else if version == 1 {
            fs::write(&path, content(name, version))?;
        } else {
            let temporary = path.with_extension("new");
            fs::write(&temporary, content(name, version))?;
            fs::rename(&temporary, &path)?;
        }
        let mut written = self.written.lock().unwrap_or_else(|p| p.into_inner());
        // Taken after the system call returned: what closed before a claimed
        // time certainly has a stamp before it.
        written.entry(name.to_owned()).or_default().push((version, self.now()));
        Ok(())
    }

    /// Holds a claim, that everything closed before `claimed` is on `replica`,
    /// against what is there now. Gives the names that break it.
    pub fn broken_claims(&self, replica: &Path, claimed: Timestamp) -> Vec<String> {
        let expected: Vec<(String, u64)> = {
            let written = self.written.lock().unwrap_or_else(|p| p.into_inner());
            let due = |versions: &Vec<(u64, Timestamp)>| {
                versions.iter().rev().find(|(_, closed)| *closed < claimed).map(|(v, _)| *v)
            };
            written.iter().filter_map(|(name, v)| Some((name.clone(), due(v)?))).collect()
        };
        let broken = |(name, version): &(String, u64)| {
            let found = version_of(replica, name);
            // A later version may be there already: the claim is about what is
            // there at least.
            (found.is_none_or(|found| found < *version))
                .then(|| format!("{name}: version {found:?}, version {version} was claimed"))
        };
        expected.iter().filter_map(broken).collect()
    }

    /// Versions written so far.
    pub fn count(&self) -> usize {
        let written = self.written.lock().unwrap_or_else(|p| p.into_inner());
        written.values().map(Vec::len).sum()
    }
}

fn line(name: &str, version: u64) -> String {
    format!("{name} {version}\n")
}

/// Content that proves its name, its version and its own wholeness.
pub fn content(name: &str, version: u64) -> String {
    let line = line(name, version);
    let filler = line.repeat((version % 97) as usize * 4);
    format!("{line}{filler}end {version}\n")
}

/// The version that a stamped file holds; `None` when it is missing, torn, or
/// another file's. Of a log it is the number of whole lines in order: behind
/// them part of the next may stand, whose write had not returned.
pub fn version_of(root: &Path, name: &str) -> Option<u64> {
    let text = fs::read_to_string(root.join(name)).ok()?;
    if name.ends_with(".log") {
        let lines = text.split_inclusive('\n').zip(1..);
        return Some(lines.take_while(|(found, n)| *found == line(name, *n)).count() as u64);
    }
    let version = text.lines().next()?.rsplit(' ').next()?.parse().ok()?;
    (text == content(name, version)).then_some(version)
}

/// Calls `act` with 0, 1, 2 … at a steady rate for a time; gives how often.
pub fn steadily(rate: f64, time: Duration, mut act: impl FnMut(u64)) -> u64 {
    let start = Instant::now();
    for number in 0.. {
        let due = Duration::from_secs_f64(number as f64 / rate);
        if due >= time {
            return number;
        }
        std::thread::sleep(due.saturating_sub(start.elapsed()));
        act(number);
    }
    unreachable!("the numbers do not end")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mounts::Scratch;

    #[test]
    fn a_broken_claim_is_found() {
        let scratch = Scratch::new("stamps");
        let (source, replica) = (scratch.path().join("source"), scratch.path().join("replica"));
        let stamper = Stamper::new(&source);
        stamper.write("d/a", 1).unwrap();
        let before = Timestamp::now();
        stamper.write("d/a", 2).unwrap();
        let after = Timestamp::now();
        fs::create_dir_all(replica.join("d")).unwrap();

        assert_eq!(stamper.broken_claims(&replica, before).len(), 1, "missing");
        fs::write(replica.join("d/a"), content("d/a", 1)).unwrap();
        assert_eq!(stamper.broken_claims(&replica, before).len(), 0, "there");
        assert_eq!(stamper.broken_claims(&replica, after).len(), 1, "old");
        fs::write(replica.join("d/a"), content("d/a", 2)).unwrap();
        assert_eq!(stamper.broken_claims(&replica, after).len(), 0, "new");
        let torn = content("d/a", 2).replace("end 2", "end 1");
        fs::write(replica.join("d/a"), torn).unwrap();
        assert_eq!(stamper.broken_claims(&replica, before).len(), 1, "torn");
        assert_eq!(stamper.count(), 2);

        stamper.write("x.log", 1).unwrap();
        stamper.write("x.log", 2).unwrap();
        let after = Timestamp::now();
        assert_eq!(stamper.broken_claims(&source, after), Vec::<String>::new());
        fs::write(replica.join("d/a"), content("d/a", 2)).unwrap();
        fs::write(replica.join("x.log"), "x.log 1\nx.log 2\nx.lo").unwrap();
        assert_eq!(stamper.broken_claims(&replica, after).len(), 0, "a line more has begun");
        fs::write(replica.join("x.log"), "x.log 1\nx.log ").unwrap();
        assert_eq!(stamper.broken_claims(&replica, after).len(), 1, "a line is missing");
    }
}
