//! Planning: from what is dirty to what a batch does. Pure: no clock, no file
//! system, no store, no network.
//!
//! 1. [`dirty`] merges journal records: a thing that changed often is dirty once.
//! 2. [`resolve`] looks at each dirty entry and object as it stands now (trait
//!    [`Tree`]) and as the replica holds it (trait [`View`]), and says what
//!    must be read ([`asked`]). Of a walk, [`survey`] first takes out what is as the index
//!    says, many entries at a time.
//! 3. The engine has it read.
//! 4. [`mod@assemble`] closes the batch over references and makes its operations
//!    and its index delta.
//!
//! [`below`] walks through what the index has below a directory; [`waits`] says when what was left to wait waits no more; [`mod@recall`] brings back what could not be found.
//!
//! [`View`]: crate::index::View

pub mod asked;
pub mod assemble;
pub mod below;
pub mod dirty;
pub mod recall;
pub mod resolve;
pub mod survey;
#[cfg(test)]
mod tests;
pub mod tree;
pub mod waits;

pub use asked::{Asked, Need};
pub use assemble::{Assembly, Hold, HoldReason, Limits, Outcome, Settings, assemble};
pub use dirty::{Dirty, Listing, Rest};
pub use recall::recall;
pub use resolve::{Binding, Meanwhile, Resolve};
pub use tree::{Fate, Listed, Lookup, Seen, Skip, Tree};

/// Why planning could not go on.
#[derive(Debug, thiserror::Error)]
pub enum PlanError<V, T> {
    /// The index could not answer.
    #[error(transparent)]
    Index(V),
    /// The source could not be looked at.
    #[error(transparent)]
    Tree(T),
}
