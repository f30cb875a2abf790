//! A frame of any stream; see `replicator_common::fuzzing::frame`.
#![no_main]

#[global_allocator]
static ALLOCATOR: replicator_common::fuzzing::Counting = replicator_common::fuzzing::Counting;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| replicator_common::fuzzing::frame(bytes));
