//! Peers that make one pass and end: to follow, they are run in a loop.

use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};

use anyhow::{Context, Result, anyhow};

use crate::peers::{PASS_LIMIT, Session};
use crate::site::{Service, Site};

/// Makes the command of one pass.
type Make = dyn Fn(&Site) -> Result<Command> + Send + Sync;

/// Such a peer, set up.
pub struct Passes {
    pass: Pass,
    /// Run as long as it.
    _services: Vec<Service>,
    running: Option<(Arc<AtomicBool>, JoinHandle<Result<()>>)>,
}

#[derive(Clone)]
struct Pass {
    site: Arc<Site>,
    make: Arc<Make>,
    accepted: &'static [i32],
}

impl Pass {
    fn run(&self) -> Result<()> {
        self.site.run((self.make)(&self.site)?, self.accepted, PASS_LIMIT)
    }
}

impl Passes {
    /// A peer without services, each pass of which ends with status 0.
    pub fn new(
        site: &Arc<Site>,
        make: impl Fn(&Site) -> Result<Command> + Send + Sync + 'static,
    ) -> Self {
        let pass = Pass { site: site.clone(), make: Arc::new(make), accepted: &[0] };
        Self { pass, _services: Vec::new(), running: None }
    }

    /// The same with further exit statuses that are no failure.
    #[must_use]
    pub fn accepting(mut self, statuses: &'static [i32]) -> Self {
        self.pass.accepted = statuses;
        self
    }

    /// The same with services that it needs.
    #[must_use]
    pub fn with(mut self, services: Vec<Service>) -> Self {
        self._services = services;
        self
    }
}

impl Session for Passes {
    fn pass(&mut self) -> Result<()> {
        self.pass.run()
    }

    fn follow(&mut self) -> Result<()> {
        self.pass.run().context("first pass")?;
        let (ends, pass) = (Arc::new(AtomicBool::new(false)), self.pass.clone());
        let seen = ends.clone();
        let thread = thread::spawn(move || {
            while !seen.load(Ordering::Relaxed) {
                pass.run()?;
            }
            Ok(())
        });
        self.running = Some((ends, thread));
        Ok(())
    }

    fn rest(&mut self) -> Result<()> {
        let Some((ends, thread)) = self.running.take() else { return Ok(()) };
        ends.store(true, Ordering::Relaxed);
        thread.join().map_err(|_| anyhow!("the loop of passes panicked"))?
    }
}

impl Drop for Passes {
    fn drop(&mut self) {
        if let Err(error) = self.rest() {
            eprintln!("{error:#}");
        }
    }
}
