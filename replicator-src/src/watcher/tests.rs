//! On real mounts.
