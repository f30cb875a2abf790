//! Stamped files: each says when it was closed, so that a claim about time can
//! be held against what is really there.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicI64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use replicator_common::time::Timestamp;

/// What a name holds.
#[derive(Clone, Debug, PartialEq, Eq)]
enum State {
    /// Nothing.
    Gone,
    /// That version of the file that was first called so.
    Is(String, u64),
}

/// A name's change from one state to the next.
#[derive(Clone, Debug)]
struct Change {
    to: State,
    /// The moment after the system call that made it; `None` while it runs.
    /// Taken after the call returned: what was done before a claimed time
    /// certainly has an end before it.
    done: Option<Timestamp>,
}

/// Writes stamped files and remembers when each version was closed.
#[derive(Debug)]
pub struct Stamper {
    root: PathBuf,
    /// By name: its changes in order.
    changes: Mutex<HashMap<String, Vec<Change>>>,
    /// By how much the source's clock is ahead of ours, nanoseconds.
    ahead: AtomicI64,
}

impl Stamper {
    /// Writes below `root`.
    pub fn new(root: &Path) -> Self {
        Self { root: root.to_owned(), changes: Mutex::default(), ahead: AtomicI64::new(0) }
    }

    /// Where it writes.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The source's clock, by which claims are made, was set: it is so many
    /// seconds ahead of the true time.
    pub fn set_clock(&self, ahead: i64) {
        self.ahead.store(ahead * 1_000_000_000, Ordering::SeqCst);
    }

    /// Forgets what was written so far: claims about it say nothing any more.
    pub fn forget(&self) {
        self.changes().clear();
    }

    /// What the source's clock shows.
    pub fn now(&self) -> Timestamp {
        Timestamp::now().offset(self.ahead.load(Ordering::SeqCst))
    }

    fn changes(&self) -> MutexGuard<'_, HashMap<String, Vec<Change>>> {
        self.changes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes changes and remembers them; each name is one thread's at a time.
    fn change(
        &self,
        all: &[(&str, State)],
        make: impl FnOnce() -> io::Result<()>,
    ) -> io::Result<()> {
        for (name, to) in all {
            let change = Change { to: to.clone(), done: None };
            self.changes().entry((*name).to_owned()).or_default().push(change);
        }
        make()?;
        let done = Some(self.now());
        for (name, _) in all {
            let mut changes = self.changes();
            let last = changes.get_mut(*name).and_then(|changes| changes.last_mut());
            last.expect("it was put there above").done = done;
        }
        Ok(())
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
        self.change(&[(name, State::Is(name.to_owned(), version))], || {
            if name.ends_with(".log") {
                let mut log = File::options().append(true).create(true).open(&path)?;
                log.write_all(line(name, version).as_bytes())
            } else if version == 1 {
                fs::write(&path, content(name, version))
            } else {
                let temporary = path.with_extension("new");
                fs::write(&temporary, content(name, version))?;
                fs::rename(&temporary, &path)
            }
        })
    }

    /// Removes `name`.
    pub fn remove(&self, name: &str) -> io::Result<()> {
        self.change(&[(name, State::Gone)], || fs::remove_file(self.root.join(name)))
    }

    /// Renames a file, which is no log, over whatever stands under `to`.
    pub fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        let held = self.changes().get(from).and_then(|all| all.last()).map(|last| last.to.clone());
        let held = held.unwrap_or(State::Gone);
        self.change(&[(to, held), (from, State::Gone)], || {
            fs::rename(self.root.join(from), self.root.join(to))
        })
    }

    /// Holds a claim, that everything done before `claimed` is on `replica`,
    /// against what is there now. Gives the names that break it.
    pub fn broken_claims(&self, replica: &Path, claimed: Timestamp) -> Vec<String> {
        let due = |changes: &Vec<Change>| {
            changes.iter().rposition(|change| change.done.is_some_and(|done| done < claimed))
        };
        let expected: Vec<(String, usize)> = {
            let changes = self.changes();
            changes.iter().filter_map(|(name, all)| Some((name.clone(), due(all)?))).collect()
        };
        let look = |(name, due): (String, usize)| (state_of(replica, &name), name, due);
        let found: Vec<_> = expected.into_iter().map(look).collect();
        // Later states may be there already, whose making began by now: the
        // claim is about what is there at least.
        let changes = self.changes();
        let broken = |(found, name, due): (Option<State>, String, usize)| {
            let allowed = &changes[&name][due..];
            let holds = found.as_ref().is_some_and(|found| {
                allowed
                    .iter()
                    .any(|change| change.to == *found || reaches(found, &change.to, &name))
            });
            let claimed = &allowed[0].to;
            (!holds).then(|| format!("{name}: {found:?}, claimed was {claimed:?}"))
        };
        found.into_iter().filter_map(broken).collect()
    }

    /// Changes made so far.
    pub fn count(&self) -> usize {
        self.changes().values().map(Vec::len).sum()
    }
}

/// Whether a log holds all the lines of a version, and perhaps more.
fn reaches(found: &State, least: &State, name: &str) -> bool {
    match (found, least) {
        (State::Is(_, found), State::Is(_, least)) => name.ends_with(".log") && found >= least,
        _ => false,
    }
}

/// What a name holds; `None` when it is torn.
fn state_of(root: &Path, name: &str) -> Option<State> {
    if let Err(error) = fs::symlink_metadata(root.join(name)) {
        return (error.kind() == io::ErrorKind::NotFound).then_some(State::Gone);
    }
    let text = fs::read_to_string(root.join(name)).ok()?;
    if name.ends_with(".log") {
        return version_of(root, name).map(|version| State::Is(name.to_owned(), version));
    }
    let (born, version) = text.lines().next()?.rsplit_once(' ')?;
    let version = version.parse().ok()?;
    (text == content(born, version)).then(|| State::Is(born.to_owned(), version))
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

    #[test]
    fn what_was_moved_and_removed_is_looked_for_too() {
        let scratch = Scratch::new("stamps");
        let (source, replica) = (scratch.path().join("source"), scratch.path().join("replica"));
        let stamper = Stamper::new(&source);
        fs::create_dir_all(&replica).unwrap();
        stamper.write("a", 1).unwrap();
        stamper.write("c", 1).unwrap();
        let before = Timestamp::now();
        stamper.rename("a", "b").unwrap();
        stamper.remove("c").unwrap();
        let after = Timestamp::now();
        assert_eq!(stamper.broken_claims(&source, after), Vec::<String>::new());
        fs::write(replica.join("a"), content("a", 1)).unwrap();
        fs::write(replica.join("c"), content("c", 1)).unwrap();
        assert_eq!(stamper.broken_claims(&replica, before), Vec::<String>::new(), "not moved yet");
        assert_eq!(stamper.broken_claims(&replica, after).len(), 3, "a and c stand, b does not");
        fs::rename(replica.join("a"), replica.join("b")).unwrap();
        fs::remove_file(replica.join("c")).unwrap();
        assert_eq!(stamper.broken_claims(&replica, before), Vec::<String>::new(), "ahead");
        assert_eq!(stamper.broken_claims(&replica, after), Vec::<String>::new(), "there");
        fs::write(replica.join("b"), content("b", 1)).unwrap();
        assert_eq!(stamper.broken_claims(&replica, after).len(), 1, "another file's content");
    }
}
