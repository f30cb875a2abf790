//! What both sides of a replication share: identities, the wire format, the
//! description of status, certificates and QUIC, durable files, and the one
//! module of raw system calls.
//!
//! The source ([`replicator-src`]) and the destination ([`replicator-dst`])
//! never import each other; everything they agree on stands here.
//!
//! [`replicator-src`]: https://docs.rs/replicator-src
//! [`replicator-dst`]: https://docs.rs/replicator-dst

pub mod ancestry;
pub mod api;
pub mod chunk;
pub mod codec;
pub mod config;
pub mod control;
pub mod crashsafe;
pub mod daemon;
pub mod describe;
pub mod fault;
#[doc(hidden)]
pub mod fuzzing;
pub mod id;
mod keyed;
pub mod lock;
pub mod logging;
pub mod manual;
pub mod name;
pub mod net;
pub mod notify;
pub mod object;
pub mod pulse;
pub mod registry;
pub mod status;
pub mod stop;
pub mod store;
pub mod supervisor;
pub mod sys;
pub mod telemetry;
pub mod time;
pub mod verification;
pub mod wire;
