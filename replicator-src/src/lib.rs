//! x
pub mod watcher;
