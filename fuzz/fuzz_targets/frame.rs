//! A frame of any stream; see `replicator_common::fuzzing::frame`.
#![no_main]

use replicator_common::sys::counting::Counting;

#[global_allocator]
static ALLOCATOR: Counting = Counting { zeroed: false };

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| replicator_common::fuzzing::frame(bytes));
