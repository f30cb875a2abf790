//! The destination's session; see `replicator_dst::fuzzing::session`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| drop(replicator_dst::fuzzing::session(bytes)));
