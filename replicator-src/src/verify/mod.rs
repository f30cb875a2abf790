//! Verification: source and replica compared by content, again and again.
//!
//! A pass goes through the index in the order of its rows: each
//! object is met once, wherever it is moved meanwhile. Of each, both sides' state
//! and content are compared; of directories, the names too. The replica is
//! described by the destination from its file system. A thread of low priority
//! does it, at a bounded rate.
//!
//! What differs at the first look proves nothing: both sides change. It is looked
//! at again by itself (`check`), and only what two such looks show, while
//! nothing that the engine knows of explains it and its change time lies well
//! before the watermark, is a difference. It is counted and told once it was put
//! right, and looked at once more.
//!
//! INVARIANT: what verification does to the replica goes through batches; content
//! that cannot be read is never a difference.
//!
//! - `pass`: the thread; `queue`: what is to be looked at again; `check`: one
//!   comparison; `look`: the source's side; `compare`: pure.
//! - `record`: what a restart goes on with; `board`: what is told.

mod board;
mod check;
mod compare;
mod look;
mod pass;
mod queue;
mod record;

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use crossbeam_channel::{Receiver, Sender, bounded, unbounded};
use replicator_common::sys::quiet;
use replicator_common::verification::{Findings, PassOptions};

use crate::engine::Event;
use crate::engine::state::Shared;
use crate::engine::verify::Ticks;
use crate::index::Store;
use crate::source::SourceTree;
use board::Board;
use check::Checker;
use look::Look;
use pass::Thread;
use record::File;

/// How long the thread may take to begin a pass that was asked for.
const BEGIN: Duration = Duration::from_secs(20);

/// What the operator may set.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    /// How often a pass begins by itself; `None`: never.
    pub interval: Option<Duration>,
    /// Bytes that such a pass reads a second, at most.
    pub rate: u64,
}

impl Default for Settings {
    fn default() -> Self {
        Self { interval: Some(Duration::from_secs(86_400)), rate: 64 << 20 }
    }
}

/// What verification works with.
pub(crate) struct Parts {
    pub(crate) settings: Settings,
    /// One of its own, whose watch does nothing.
    pub(crate) tree: SourceTree,
    pub(crate) store: Arc<Store>,
    pub(crate) post: Sender<Event>,
    pub(crate) ticks: Arc<Ticks>,
    pub(crate) shared: Arc<Shared>,
}

/// What the thread is told.
enum Request {
    /// Somebody asks for a pass; its number goes there.
    Begin(PassOptions, Sender<u64>),
    /// It is to end: this wakes it where it waits for a request.
    Stop,
}

/// The verifier of one replication, running.
pub(crate) struct Verifier {
    board: Arc<Board>,
    requests: Sender<Request>,
    /// Serialises those who ask for passes.
    asking: Mutex<()>,
    stop: Arc<AtomicBool>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl Verifier {
    /// Starts the thread; `directory` is the replication's.
    pub(crate) fn start(parts: Parts, directory: &Path) -> std::io::Result<Self> {
        let file = File::new(directory);
        let record = file.read();
        let board = Arc::new(Board::new(parts.shared.clone(), record.verification.clone()));
        let (requests, inbox): (_, Receiver<Request>) = unbounded();
        let stop = Arc::<AtomicBool>::default();
        let checker = Checker {
            look: Look::new(parts.tree.opener().clone()),
            tree: parts.tree,
            store: parts.store,
            post: parts.post,
            ticks: parts.ticks,
            shared: parts.shared,
            stop: stop.clone(),
            read: 0,
        };
        let thread = Thread::new(checker, board.clone(), parts.settings, file, record, inbox);
        let thread = std::thread::Builder::new().name("verify".to_owned()).spawn(move || {
            quiet::background_thread();
            thread.run();
        })?;
        let thread = Mutex::new(Some(thread));
        Ok(Self { board, requests, asking: Mutex::default(), stop, thread })
    }

    /// Begins a pass.
    ///
    /// # Errors
    /// In words, when one runs already that somebody asked for.
    pub(crate) fn begin(&self, options: PassOptions) -> Result<u64, String> {
        let _one = self.asking.lock().unwrap_or_else(PoisonError::into_inner);
        let (reply, begun) = bounded(1);
        let failed = |_| "the verifier has ended".to_owned();
        self.requests.send(Request::Begin(options, reply)).map_err(failed)?;
        match begun.recv_timeout(BEGIN) {
            Ok(pass) => Ok(pass),
            Err(crossbeam_channel::RecvTimeoutError::Disconnected) => {
                Err("a verification that was asked for is under way: see status".to_owned())
            }
            Err(crossbeam_channel::RecvTimeoutError::Timeout) => {
                Err("the verifier is busy with something that takes long: try again".to_owned())
            }
        }
    }

    /// What a pass has found; `None` for one that is not the last.
    pub(crate) fn findings(&self, pass: u64, after: u64) -> Option<Findings> {
        self.board.findings(pass, after)
    }

    /// Ends the thread; a pass under way goes on with the next start.
    pub(crate) fn stop(&self) {
        self.stop.store(true, Ordering::Release);
        // Where it has ended already, there is nobody to tell.
        let _ = self.requests.send(Request::Stop);
        let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Some(thread) = thread else { return };
        thread.thread().unpark();
        if thread.join().is_err() {
            tracing::error!("the verifier panicked");
        }
    }
}
