//! x
pub mod readonly;
