//! What is kept of verification over a restart: the pass under way goes on where
//! it was.

use std::path::{Path, PathBuf};

use replicator_common::crashsafe::{self, Format, StateFileError};
use replicator_common::id::ObjectId;
use replicator_common::time::Timestamp;
use replicator_common::verification::{PassOptions, Verification};
use serde::{Deserialize, Serialize};

/// Format of the record. Versions: 1, the first.
const FORMAT: Format = Format { name: "verification", version: 1 };

/// The pass under way.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Running {
    /// Objects up to this one were compared, and what differed was settled;
    /// hexadecimal digits.
    cursor: Option<String>,
    pub(super) options: PassOptions,
    /// Somebody asked for it; else it began by itself.
    pub(super) asked: bool,
}

impl Running {
    pub(super) fn new(options: PassOptions, asked: bool) -> Self {
        Self { cursor: None, options, asked }
    }

    /// Where it goes on.
    pub(super) fn cursor(&self) -> Option<ObjectId> {
        ObjectId::from_bytes(&hex::decode(self.cursor.as_ref()?).ok()?)
    }

    pub(super) fn set_cursor(&mut self, cursor: Option<&ObjectId>) {
        self.cursor = cursor.map(|cursor| hex::encode(cursor.as_bytes()));
    }
}

/// All that is kept.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Record {
    pub(super) verification: Verification,
    pub(super) running: Option<Running>,
    /// When the next pass begins by itself.
    pub(super) next: Option<Timestamp>,
}

/// The record's file.
pub(super) struct File {
    path: PathBuf,
}

impl File {
    pub(super) fn new(directory: &Path) -> Self {
        Self { path: directory.join("verification") }
    }

    /// What was kept; nothing, where that cannot be read: verification then
    /// begins anew, which is always right.
    pub(super) fn read(&self) -> Record {
        match crashsafe::read(&self.path, &FORMAT) {
            Ok(record) => record.unwrap_or_default(),
            Err(error) => {
                tracing::warn!(%error, "verification begins anew");
                Record::default()
            }
        }
    }

    pub(super) fn write(&self, record: &Record) -> Result<(), StateFileError> {
        crashsafe::write(&self.path, &FORMAT, record)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pass_is_kept() {
        let directory = tempfile::tempdir_in("/var/tmp").unwrap();
        let file = File::new(directory.path());
        assert_eq!(file.read(), Record::default());
        let object = ObjectId::new(1, &[1, 2, 3]).unwrap();
        let mut running = Running::new(PassOptions { repair: true, rate: None }, true);
        assert_eq!(running.cursor(), None);
        running.set_cursor(Some(&object));
        let record =
            Record { running: Some(running), next: Some(Timestamp(7)), ..Record::default() };
        file.write(&record).unwrap();
        let read = file.read();
        assert_eq!(read, record);
        assert_eq!(read.running.unwrap().cursor(), Some(object));
        std::fs::write(directory.path().join("verification"), "{").unwrap();
        assert_eq!(file.read(), Record::default());
    }
}
