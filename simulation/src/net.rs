//! The network: sessions with streams of their own order, delay, and loss.

use std::collections::VecDeque;

use rand::Rng;
use rand::rngs::StdRng;
use replicator_common::id::{BatchId, Edition, Incarnation, ObjectId, TransferId};
use replicator_common::object::ObjectState;
use replicator_common::wire::{BatchHeader, Op, SourceHello};

/// Data streams of a session: the last carries transfers.
pub const STREAMS: usize = 3;

/// From the source, on the control stream.
#[derive(Clone, Debug)]
pub enum Up {
    /// The first message.
    Hello(SourceHello),
    /// A plan.
    Plan(BatchId, Vec<Op>),
    /// The plan is whole.
    Commit(BatchId, BatchHeader),
}

/// On a data stream.
#[derive(Clone, Debug)]
pub struct Data {
    /// What it belongs to.
    pub of: Of,
    /// The file.
    pub object: ObjectId,
    /// Its state when it was read.
    pub state: ObjectState,
    /// Its content.
    pub content: u32,
}

/// What content belongs to.
#[derive(Clone, Copy, Debug)]
pub enum Of {
    /// A batch, with the version of the reading.
    Batch(BatchId, u32),
    /// A transfer of its own.
    Transfer(TransferId),
    /// A transfer that is given up.
    Abort(TransferId),
}

/// From the destination.
#[derive(Clone, Debug)]
pub enum Down {
    /// The answer to a hello.
    Hello {
        /// The destination's life.
        incarnation: Incarnation,
        /// Its last batch.
        committed: Edition,
    },
    /// Logged.
    Durable(BatchId),
    /// In the replica.
    Applied(BatchId),
    /// A transfer is staged.
    Transferred(TransferId),
}

/// One session.
#[derive(Clone, Debug, Default)]
pub struct Wire {
    /// To the destination, control.
    pub up: VecDeque<Up>,
    /// To the destination, content.
    pub data: [VecDeque<Data>; STREAMS],
    /// To the source.
    pub down: VecDeque<Down>,
    /// One of the two ends, or the line, is gone: what is on its way is all
    /// that still comes.
    pub broken: bool,
    /// The destination has taken it up.
    pub accepted: bool,
}

impl Wire {
    /// The line breaks: of each stream, a prefix has arrived.
    pub fn cut(&mut self, random: &mut StdRng) {
        self.broken = true;
        self.up.truncate(random.random_range(0..=self.up.len()));
        for stream in &mut self.data {
            stream.truncate(random.random_range(0..=stream.len()));
        }
        self.down.truncate(random.random_range(0..=self.down.len()));
    }

    /// The source's end is gone: nobody hears the destination.
    pub fn hang_up(&mut self) {
        self.broken = true;
        self.down.clear();
    }
}
