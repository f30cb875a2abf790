//! One file a command.

pub mod create;
pub mod delete;
pub mod describe;
pub mod failover;
pub mod file_systems;
pub mod pause;
pub mod verify;
pub mod wait;
