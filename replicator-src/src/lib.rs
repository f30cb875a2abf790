//! The source's side of a replication: watches a tree, journals what may have
//! changed, and ships batches of present state to the destination.
//!
//! The data's way through the modules: [`watcher`] → [`journal`] → [`plan`] →
//! [`read`] → [`session`], driven by the one loop in [`engine`].

mod arrivals;
pub mod boot;
pub mod capture;
pub mod clock;
pub mod engine;
#[doc(hidden)]
pub mod fuzzing;
pub mod handover;
pub mod index;
pub mod journal;
pub mod ledger;
pub mod meters;
mod places;
pub mod plan;
pub mod read;
pub mod replies;
pub mod service;
pub mod session;
pub mod source;
pub mod verify;
pub mod watcher;
