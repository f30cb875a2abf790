//! What an engine is made of, what it is told, and how it ends.

use std::sync::Arc;
use std::time::Duration;

use crossbeam_channel::{Receiver, Sender};
use replicator_common::crashsafe::StateFileError;
use replicator_common::id::ObjectId;
use replicator_common::status::FailoverReport;

use super::halt::Halt;
use super::state::Shared;
use super::verify;
use crate::boot::Boot;
use crate::capture::{Capture, CaptureError, Members};
use crate::handover::{Carried, Rest};
use crate::index::{Index, IndexError};
use crate::journal::{Journal, JournalError};
use crate::plan::PlanError;
use crate::read::lane::{Done, Job, LaneError};
use crate::read::pool::Pool;
use crate::read::sink::Wired;
use crate::read::tail;
use crate::session::LinkEvent;
use crate::source::{Opener, SourceError, SourceTree};

/// What the operator may set.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Longest time between batches; an idle source's watermark moves on at
    /// this pace.
    pub heartbeat: Duration,
    /// How long a large file must be left alone before it is sent, unless it
    /// is never left alone.
    pub settle: Duration,
    /// Objects in one batch, at most.
    pub batch_objects: usize,
    /// Content bytes of small files in one batch, at most.
    pub batch_bytes: u64,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            heartbeat: Duration::from_secs(1),
            settle: Duration::from_millis(250),
            batch_objects: 8192,
            batch_bytes: 64 << 20,
        }
    }
}

/// Where the answer to a failover goes.
pub type FailoverReply = Sender<Result<FailoverReport, String>>;

/// What can be asked of a running engine.
pub enum Command {
    /// Build a batch now, even an empty one: somebody waits for the watermark.
    Nudge,
    /// The same, and where only a walk moves the watermark, walk now.
    Await,
    /// Ask the destination to fail over, and answer with what it says within
    /// this time. After it, replication goes on.
    Delete(FailoverReply, Duration),
    /// Bring status up to date, and say when it is.
    Refresh(Sender<()>),
    /// Let the deletions through for which replication has halted, and say
    /// when they may go.
    AcceptDeletions(Sender<()>),
    /// End the loop.
    Stop {
        /// Leave behind what the next process needs to go on without a walk.
        hand_over: bool,
    },
}

/// What can happen.
pub enum Event {
    /// Something about the connection.
    Link(LinkEvent),
    /// A large file's transfer ended.
    Transfer(Box<Job>, Result<Done, LaneError>),
    /// What was appended to a large file is on its way, or was not all that
    /// happened to it.
    Appended(Box<tail::Job>, Result<tail::Done, LaneError>),
    /// A large file was compared with what the replica holds.
    Compared {
        /// The file.
        object: ObjectId,
        /// Which comparison.
        number: u64,
        /// What it gave.
        result: Result<Option<tail::Compared>, LaneError>,
        /// How long it took.
        took: Duration,
    },
    /// Somebody asks.
    Command(Command),
    /// The verifier asks.
    Verify(verify::Query),
}

impl From<LinkEvent> for Event {
    fn from(event: LinkEvent) -> Self {
        Self::Link(event)
    }
}

/// How the loop ended without trouble that stays.
#[derive(Debug)]
pub enum Ended {
    /// It was told to; with what the next process needs to go on without a walk,
    /// when that was asked for and could be given.
    Stopped(Option<Box<Rest>>),
    /// The source was unmounted, mounted over or replaced; status says so.
    Vanished,
}

/// Why the loop ended. All of it is trouble with the source or its state; the
/// destination's troubles never end it.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// The index failed.
    #[error(transparent)]
    Index(#[from] IndexError),
    /// The journal failed.
    #[error(transparent)]
    Journal(#[from] JournalError),
    /// The source failed.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// Capturing failed.
    #[error(transparent)]
    Capture(#[from] CaptureError),
    /// A state file failed.
    #[error(transparent)]
    State(#[from] StateFileError),
}

impl From<PlanError<IndexError, SourceError>> for EngineError {
    fn from(error: PlanError<IndexError, SourceError>) -> Self {
        match error {
            PlanError::Index(error) => Self::Index(error),
            PlanError::Tree(error) => Self::Source(error),
        }
    }
}

/// Where an engine begins.
pub enum Start {
    /// The tree must be walked, and why: nothing proves that no change was
    /// missed since the last run.
    Walk(String),
    /// Where the process before ended: its watch went on.
    Resume(Box<Carried>),
}

/// What an engine is made of.
pub struct Parts {
    /// Settings.
    pub settings: Settings,
    /// The start of the kernel that the source was last compared under.
    pub boot: Boot,
    /// Opens objects.
    pub opener: Opener,
    /// Looks at the source.
    pub tree: SourceTree,
    /// The index.
    pub index: Index,
    /// The journal.
    pub journal: Arc<Journal>,
    /// The capture thread.
    pub capture: Capture,
    /// What is ours.
    pub members: Arc<Members>,
    /// The readers.
    pub pool: Pool,
    /// Where events arrive.
    pub inbox: (Sender<Event>, Receiver<Event>),
    /// Where captured records are announced.
    pub captured: Receiver<()>,
    /// What is shared with those who ask.
    pub shared: Arc<Shared>,
    /// Whether replication has halted, and when it is to.
    pub halt: Halt,
    /// Counts the bytes put on the wire.
    pub wired: Arc<Wired>,
    /// The engine's moments, shared with the verifier.
    pub ticks: Arc<verify::Ticks>,
}
