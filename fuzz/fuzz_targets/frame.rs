//! A frame of any stream; see `replicator_common::fuzzing::frame`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| replicator_common::fuzzing::frame(bytes));
