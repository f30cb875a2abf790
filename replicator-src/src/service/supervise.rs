//! Starts a replication again that ended with an error: a full or failing disk
//! under its state directory, a source that was not mounted. What stood in the
//! way may be gone by then, and nobody has to lend a hand. Nothing is lost
//! meanwhile: a start is a gap, and its walk finds what went unseen.

use std::collections::BTreeMap;
use std::sync::atomic::Ordering;
use std::sync::{Arc, TryLockError, Weak};
use std::time::{Duration, Instant};

use replicator_common::id::FileSystemId;
use replicator_common::supervisor::Supervisor;

use super::{Replication, SourceService};

/// Between looks.
const LOOK: Duration = Duration::from_millis(500);
/// First and longest pause between attempts to start.
const PAUSE: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(30));
/// One that ran for this long before it ended begins with the first pause.
const STEADY: Duration = Duration::from_secs(60);

/// Attempts to start one replication.
struct Attempts {
    pause: Duration,
    due: Instant,
}

impl SourceService {
    /// Looks after the replications from now on, on a thread of its own, which
    /// ends with the service.
    pub(super) fn supervise(self: &Arc<Self>) -> std::io::Result<()> {
        let service = Arc::downgrade(self);
        let named = std::thread::Builder::new().name("supervise".to_owned());
        named.spawn(move || look_after(&service)).map(drop)
    }

    /// Starts it again on a thread of its own: a file system that hangs holds up no
    /// other replication. An attempt that still hangs is enough.
    fn restart_beside(self: &Arc<Self>, replication: &Arc<Replication>) {
        if matches!(replication.removed.try_lock(), Err(TryLockError::WouldBlock)) {
            return;
        }
        let (service, replication) = (self.clone(), replication.clone());
        let named = std::thread::Builder::new().name("restart".to_owned());
        if let Err(error) = named.spawn(move || service.restart(&replication)) {
            tracing::warn!(%error, "no thread to start a replication again");
        }
    }

    /// Starts it again, unless the service is being shut down.
    fn restart(&self, replication: &Arc<Replication>) {
        let removed = replication.hold_still();
        if *removed || self.closed.load(Ordering::SeqCst) || !replication.has_ended() {
            return;
        }
        replication.stop(&Supervisor::nobody());
        match self.start(replication) {
            Ok(()) => tracing::info!("a replication that had ended was started again"),
            Err(error) => {
                tracing::warn!(%error, "the replication cannot be started again yet");
                replication.failed(error.to_string());
            }
        }
        self.stop_if_closed(replication);
    }
}

fn look_after(service: &Weak<SourceService>) {
    let mut attempts: BTreeMap<FileSystemId, Attempts> = BTreeMap::new();
    loop {
        std::thread::sleep(LOOK);
        let Some(service) = service.upgrade() else { return };
        let all: Vec<_> = service.all().iter().map(|(id, one)| (id.clone(), one.clone())).collect();
        let now = Instant::now();
        attempts.retain(|_, one| now < one.due + STEADY);
        for (id, replication) in all.into_iter().filter(|(_, one)| one.has_ended()) {
            let first = Attempts { pause: PAUSE.0, due: now + PAUSE.0 };
            let one = attempts.entry(id).or_insert(first);
            if now >= one.due {
                one.pause = (one.pause * 2).min(PAUSE.1);
                one.due = now + one.pause;
                service.restart_beside(&replication);
            }
        }
    }
}
