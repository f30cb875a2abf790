//! Reads objects as they stand now and sends their content on its way.
//!
//! - [`sink`]: where encoded frames go.
//! - [`small`]: small files, packed many to a frame; everything without content.
//! - [`extents`]: where a file's data lies.
//! - [`lane`]: large files, in transfers of their own, as deltas.
//! - `same`: whether a large file only looks different.
//! - [`pool`]: the threads that do it.

pub mod extents;
pub mod lane;
pub mod pool;
mod same;
pub mod sink;
pub mod small;
