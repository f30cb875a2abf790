//! The destination: receives batches, makes them durable, applies each as a
//! whole to a replica that nobody else can write to, and fails over.

mod access;
mod adopt;
pub mod applier;
pub mod apply;
pub mod area;
pub mod attributes;
mod book;
mod broken;
mod describe;
pub mod failover;
#[doc(hidden)]
pub mod fuzzing;
mod hints;
pub mod history;
pub mod issuer;
pub mod kept;
pub mod locate;
mod looked;
mod making;
pub mod mark;
pub mod meters;
pub mod nest;
pub mod objects;
pub mod patch;
pub mod protect;
pub mod readonly;
pub mod receive;
pub mod reconcile;
pub mod record;
pub mod replica;
pub mod reserve;
pub mod seal;
pub mod service;
pub mod session;
pub mod stage;
pub mod state;
pub mod store;
pub mod streams;
pub mod suitable;
pub mod tree;
mod upgrade;
