//! What a machine that went down without warning may have taken with it.
//!
//! Content that was written and not yet on disk is gone after a power cut, while
//! the change time that came with it may have been kept: then a file is what it
//! was before, under the times it was read and shipped with after. So the first
//! walk on another boot takes nothing that changed in the last while for proven.

use std::fs;
use std::path::{Path, PathBuf};

use replicator_common::crashsafe::{self, Format, StateFileError};
use replicator_common::time::Timestamp;

const FORMAT: Format = Format { name: "source-boot", version: 1 };

/// Written anew at each start of the kernel; random(4).
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

/// How long before the last watermark a change may have been and still be in
/// memory only. The kernel writes back after 30 s (`vm.dirty_expire_centisecs`),
/// a busy disk needs longer; what is doubted in vain costs a reading of files
/// that changed within this time.
const UNWRITTEN_NANOS: i64 = 600_000_000_000;

/// Under which start of the kernel the source was last compared whole.
#[derive(Debug)]
pub struct Boot {
    path: PathBuf,
    /// This one; empty when the kernel does not say, which is like no other.
    id: String,
    same: bool,
}

impl Boot {
    /// With what was remembered at `path`, if anything was.
    pub fn open(path: &Path) -> Result<Self, StateFileError> {
        let id = fs::read_to_string(BOOT_ID).unwrap_or_default().trim().to_owned();
        let then: Option<String> = crashsafe::read(path, &FORMAT)?;
        let same = !id.is_empty() && then.as_ref() == Some(&id);
        Ok(Self { path: path.to_owned(), id, same })
    }

    /// From which change time on equal times prove nothing, when changes before
    /// `watermark` had been shipped; `None` when they prove as much as ever.
    pub fn unproven(&self, watermark: Timestamp) -> Option<Timestamp> {
        (!self.same).then(|| watermark.offset(-UNWRITTEN_NANOS))
    }

    /// The source was compared whole on this boot, and what differed is in the
    /// replica.
    ///
    /// INVARIANT: remembered only after that, so that a walk that was broken off
    /// is repeated with the same doubt.
    pub fn remember(&mut self) -> Result<(), StateFileError> {
        if !self.same {
            crashsafe::write(&self.path, &FORMAT, &self.id)?;
            self.same = true;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_changed_lately_is_doubted_until_it_was_compared() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("boot");
        let now = Timestamp::now();
        let mut boot = Boot::open(&path).unwrap();
        assert!(boot.unproven(now).is_some_and(|from| from < now), "nothing is remembered");
        assert!(Boot::open(&path).unwrap().unproven(now).is_some(), "nor is an attempt");
        boot.remember().unwrap();
        assert_eq!(boot.unproven(now), None);
        assert_eq!(Boot::open(&path).unwrap().unproven(now), None);
        crashsafe::write(&path, &FORMAT, &"another").unwrap();
        assert!(Boot::open(&path).unwrap().unproven(now).is_some());
    }
}
