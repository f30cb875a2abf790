//! A tree that is replicated already changes once: how long until the replica is
//! as it is, and what that takes.

use std::path::Path;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};

use super::{Figure, Outcome};
use crate::disk::sync_file_system;
use crate::measure::Meter;
use crate::peers::{Peer, Session};
use crate::site::Site;

/// How long it may take.
const LIMIT: Duration = Duration::from_secs(300);
/// Between two looks at the replica.
const POLL: Duration = Duration::from_millis(2);
/// What a peer that follows does so long after the change arrived counts too.
const AFTER: Duration = Duration::from_secs(1);
/// Until a peer that follows has done what it does after its first pass, and the
/// change has another second than what was there: rsync looks no closer.
const SETTLE: Duration = Duration::from_secs(2);

/// The change, and how to see it on the replica.
pub struct Change<C, A> {
    /// Makes it in the tree that it gets.
    pub make: C,
    /// Whether the tree that it gets has it all.
    pub arrived: A,
}

/// Brings the tree to the replica, makes the change, waits for it there. Time
/// counts from the end of the change: a peer that follows may have begun before,
/// one that does not begins then.
pub fn respond<C, A>(peer: &dyn Peer, site: &Arc<Site>, change: Change<C, A>) -> Result<Outcome>
where
    C: FnOnce(&Path) -> Result<()>,
    A: FnMut(&Path) -> bool,
{
    let mut session = peer.prepare(site)?;
    if peer.abilities().follows {
        follow(&mut *session, site, change)
    } else {
        pass(&mut *session, site, change)
    }
}

fn follow<C, A>(
    session: &mut dyn Session,
    site: &Arc<Site>,
    change: Change<C, A>,
) -> Result<Outcome>
where
    C: FnOnce(&Path) -> Result<()>,
    A: FnMut(&Path) -> bool,
{
    let Change { make, mut arrived } = change;
    session.follow()?;
    sync_file_system(&site.source)?;
    sync_file_system(&site.replica)?;
    thread::sleep(SETTLE);
    let meter = Meter::start(site)?;
    let begun = Instant::now();
    make(&site.source)?;
    let (change, changed) = (begun.elapsed(), Instant::now());
    while !arrived(&site.replica) {
        ensure!(changed.elapsed() < LIMIT, "the change has not arrived after {LIMIT:?}");
        thread::sleep(POLL);
    }
    let seconds = changed.elapsed().as_secs_f64();
    thread::sleep(AFTER);
    let usage = meter.stop()?;
    session.rest()?;
    Ok(Outcome::with_usage(figures(change, seconds), &usage))
}

fn pass<C, A>(session: &mut dyn Session, site: &Arc<Site>, change: Change<C, A>) -> Result<Outcome>
where
    C: FnOnce(&Path) -> Result<()>,
    A: FnMut(&Path) -> bool,
{
    let Change { make, mut arrived } = change;
    session.pass()?;
    session.rest()?;
    sync_file_system(&site.replica)?;
    thread::sleep(SETTLE);
    let begun = Instant::now();
    make(&site.source)?;
    let change = begun.elapsed();
    let meter = Meter::start(site)?;
    session.pass()?;
    let usage = meter.stop()?;
    let replica = session.replica().unwrap_or_else(|| site.replica.clone());
    ensure!(arrived(&replica), "the pass has ended, and the change is not on the replica");
    Ok(Outcome::with_usage(figures(change, usage.seconds), &usage))
}

fn figures(change: Duration, seconds: f64) -> Vec<Figure> {
    vec![
        Figure::new("the change itself, s", change.as_secs_f64(), 3),
        Figure::new("arrived after, s", seconds, 3),
    ]
}
