//! A deterministic simulation of a replication: a source whose file system
//! changes at random, a network that delays and breaks, a destination whose disk
//! fails, crashes of each side at any step, one set back to an earlier time. All
//! of it follows from one seed; time is virtual. After each step the promises
//! of the design ("What must hold") are checked.
//!
//! The product's pure parts decide; around them [`source`] and [`destination`]
//! repeat the order of steps of the engine and of the applier, which own
//! threads and files.
//!
//! `tests/seeds.rs` runs many seeds; `REPLICATOR_SEED` replays one.

#![allow(clippy::unwrap_used, clippy::arc_with_non_send_sync)]

pub mod check;
pub mod destination;
pub mod failover;
pub mod net;
pub mod run;
pub mod source;
pub mod store;
pub mod tree;
pub mod world;

/// Nothing in memory fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Never {}

impl std::fmt::Display for Never {
    fn fmt(&self, _: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match *self {}
    }
}
