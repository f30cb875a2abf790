//! What end-to-end tests are made of: throw-away file systems, a strict tree
//! comparer, a seeded random workload, and `replicator` as a real process.
//!
//! Nothing here uses the engine's own code for looking at files: an oracle
//! that shares code with what it judges shares its errors too. Of
//! `replicator-common` only the plain data of [`replicator_common::status`]
//! and [`replicator_common::time`] is used, to read what the program prints.
//!
//! Everything that mounts needs root, and says so instead of skipping: a test
//! that was skipped looks exactly like one that passed.

pub mod aws;
pub mod binary;
pub mod browser;
pub mod cgroup;
pub mod compare;
pub mod disk;
pub mod disks;
pub mod fuse;
pub mod hosts;
pub mod line;
pub mod loopback;
pub mod lossy_disk;
pub mod manager;
pub mod mounts;
pub mod packages;
pub mod process;
pub mod prometheus;
pub mod receiver;
pub mod relay;
pub mod scenario;
pub mod serial;
pub mod showcase;
pub mod stamps;
pub mod systemd;
pub mod torture;
pub mod trace;
pub mod workload;
pub mod wreck;
