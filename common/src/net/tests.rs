//! Two endpoints on loopback.
