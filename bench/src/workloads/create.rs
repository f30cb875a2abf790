//! Files are made as fast as one thread can, or at a pace: how much of it can be
//! replicated, and how long it takes to catch up.

use std::fs;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use replicator_tests::workload::content;

use super::trees::{SMALL, small_files};
use super::{Bench, Figure, Outcome, Workload, unless_follows};
use crate::measure::Meter;
use crate::net::Net;
use crate::peers::Peer;
use crate::site::Site;

/// Files of one directory.
const PER_DIRECTORY: u64 = 1000;
/// The shortest pause of one who keeps a pace.
const PAUSE: Duration = Duration::from_millis(1);
/// Between two looks at the replica.
const POLL: Duration = Duration::from_millis(20);

/// The flood.
pub struct Create {
    /// Files a second; as fast as can be without.
    pub pace: Option<u64>,
}

fn time(bench: &Bench) -> Duration {
    Duration::from_secs(bench.pick(20, 3))
}

/// How long catching up may take.
fn patience(bench: &Bench) -> Duration {
    Duration::from_secs(bench.pick(180, 60))
}

impl Workload for Create {
    fn name(&self) -> &'static str {
        if self.pace.is_some() { "create-paced" } else { "create" }
    }

    fn title(&self, bench: &Bench) -> String {
        let pace = self.pace.map_or("flat out".to_owned(), |pace| format!("at {pace} a second"));
        format!("files of 4 KiB created {pace} for {} s", time(bench).as_secs())
    }

    fn about(&self) -> &'static str {
        "By one thread, incompressible, beside the peer on the same processors. \"Replicated\" counts to the moment when \
         the replica has them all. What does not follow is run in a loop without a pause."
    }

    fn excludes(&self, peer: &dyn Peer) -> Option<&'static str> {
        unless_follows(peer)
    }

    fn run(&self, bench: &Bench, peer: &dyn Peer, _first: bool) -> Result<Outcome> {
        let (source, replica) = (bench.disk().with_tree()?, bench.disk().with_tree()?);
        small_files(&source.tree(), 100, false)?;
        let site = Site::new(&source.tree(), &replica.tree(), Net::local()?)?;
        let mut session = peer.prepare(&site)?;
        session.follow()?;
        let meter = Meter::start(&site)?;
        let begun = Instant::now();
        let made = create(&site.source, time(bench), self.pace)?;
        let (made_in, ended) = (begun.elapsed(), Instant::now());
        let mut there = 0;
        while there < made && ended.elapsed() < patience(bench) {
            thread::sleep(POLL);
            there = arrived(&site.replica, there, made);
        }
        let usage = meter.stop()?;
        session.rest()?;
        let complete = there == made;
        let caught_up = if complete { usage.seconds - made_in.as_secs_f64() } else { f64::NAN };
        let figures = vec![
            Figure::new("created, files/s", made as f64 / made_in.as_secs_f64(), 0),
            Figure::new("replicated, files/s", there as f64 / usage.seconds, 0),
            Figure::new("caught up after, s", caught_up, 2),
        ];
        let mut outcome = Outcome::with_usage(figures, &usage);
        if !complete {
            outcome.note = Some(format!("had not caught up after {:?}", patience(bench)));
        }
        Ok(outcome)
    }
}

fn path(number: u64) -> PathBuf {
    PathBuf::from(format!("created-{}/file-{number}", number / PER_DIRECTORY))
}

/// Makes files until the time is over; gives how many.
fn create(tree: &Path, time: Duration, pace: Option<u64>) -> Result<u64> {
    let start = Instant::now();
    let mut number: u64 = 0;
    while start.elapsed() < time {
        if let Some(pace) = pace {
            // A pause for each file would be longer than the time for one.
            let due = Duration::from_secs_f64(number as f64 / pace as f64);
            let early = due.saturating_sub(start.elapsed());
            if early > PAUSE {
                thread::sleep(early);
            }
        }
        let path = tree.join(path(number));
        if number.is_multiple_of(PER_DIRECTORY) {
            let directory = path.parent().context("a file is in a directory")?;
            fs::create_dir(directory).with_context(|| directory.display().to_string())?;
        }
        fs::write(&path, content::incompressible(number, SMALL))
            .with_context(|| path.display().to_string())?;
        number += 1;
    }
    Ok(number)
}

/// How many of them, from the first on, stand in the replica: those before `from` do.
fn arrived(replica: &Path, from: u64, to: u64) -> u64 {
    let is_there = |number: &u64| {
        fs::symlink_metadata(replica.join(path(*number))).is_ok_and(|m| m.len() == SMALL as u64)
    };
    (from..to).find(|number| !is_there(number)).unwrap_or(to)
}
