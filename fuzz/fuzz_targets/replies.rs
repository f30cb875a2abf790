//! What a destination says to a source; see `replicator_src::fuzzing::replies`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| drop(replicator_src::fuzzing::replies(bytes)));
