//! A row of the commit log; see `replicator_dst::fuzzing::log_record`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| replicator_dst::fuzzing::log_record(bytes));
