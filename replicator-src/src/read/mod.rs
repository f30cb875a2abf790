//! Reads objects as they stand now and sends their content on its way.
//!
//! - [`sink`]: where encoded frames go.
//! - [`small`]: small files, packed many to a frame; everything without content.
//! - [`extents`]: where a file's data lies.
//! - [`lane`]: large files, in transfers of their own, as deltas; [`runs`]: what
//!   such a delta consists of.
//! - [`blocks`]: what of a changed chunk the replica has all the same.
//! - [`tail`]: what was appended to a large file, ahead of the rest.
//! - [`kept`]: what the destination still has of a session before.
//! - `windows`: a large file, chunk by chunk, by two threads.
//! - `once`: what will not be read again, past the page cache.
//! - `met`: what of a large file is where it was.
//! - `same`: whether a large file only looks different.
//! - [`pool`]: the threads that do it.

pub mod blocks;
pub mod extents;
pub mod kept;
pub mod lane;
mod met;
mod once;
mod out;
pub mod pool;
pub mod runs;
mod same;
pub mod sink;
pub mod small;
pub mod tail;
mod windows;
