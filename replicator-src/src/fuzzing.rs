//! The bodies of the fuzz targets that concern this crate. For tests alone.

use replicator_common::fuzzing;

use crate::journal::Record;

/// Arbitrary bytes as a record of the journal.
pub fn journal_record(bytes: &[u8]) {
    fuzzing::record::<Record>(bytes);
}
