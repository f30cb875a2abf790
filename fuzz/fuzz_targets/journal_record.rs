//! A record of the journal; see `replicator_src::fuzzing::journal_record`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| replicator_src::fuzzing::journal_record(bytes));
