//! The index: what the replica is known to hold.
//!
//! A batch is planned as the difference between the source and the index, and
//! its [`Delta`] becomes part of the index once the destination has applied it.
//! Batches that are under way lie over the stored index as an overlay, so that
//! the next batch can be planned before they are acknowledged.
//!
//! - [`known`]: the types, plain data.
//! - [`view`]: what planning may ask, as a trait; [`overlay`] answers with the
//!   deltas under way laid over [`store`].
//! - [`noted`]: what the guard against deletions remembers.
//! - [`snapshot`]: reads the tables as they stand at one moment.
//! - [`store`]: the tables (redb) and the order in which they become durable;
//!   `merge`: how a delta becomes part of them.

pub mod known;
mod merge;
pub mod noted;
pub mod overlay;
pub mod snapshot;
pub mod store;
#[cfg(test)]
mod tests;
mod upgrade;
pub mod view;

pub use known::{Content, Delta, EntryChange, Known, Mark, Orphan};
pub use noted::Noted;
pub use overlay::Index;
pub use snapshot::Snapshot;
pub use store::{IndexError, Store};
pub use view::{Base, Page, View};
