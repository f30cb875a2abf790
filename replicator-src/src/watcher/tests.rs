//! On real mounts of each kind of file system. They need root.

mod barrier;
mod fixture;
mod operations;
mod trouble;
