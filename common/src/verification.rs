//! Verification: source and replica compared by content. Plain data for those
//! who ask; the machinery is the source's.

use serde::{Deserialize, Serialize};

use crate::status::PathError;
use crate::time::Timestamp;

/// How a replica can differ from its source.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum DifferenceKind {
    /// The source has a name that the replica has not, or that leads to another
    /// object there.
    Missing,
    /// The replica has a name that the source has not.
    Extra,
    /// Content differs.
    Content,
    /// Owner, mode, times or xattrs differ.
    Attributes,
}

impl DifferenceKind {
    /// As reports spell it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Missing => "MISSING",
            Self::Extra => "EXTRA",
            Self::Content => "CONTENT",
            Self::Attributes => "ATTRIBUTES",
        }
    }
}

/// One difference: a line of the report that `replicator verify` prints.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct Difference {
    /// In what.
    pub kind: DifferenceKind,
    /// The path relative to the source; empty for the root.
    pub path: String,
    /// What the source has, in words.
    pub source: String,
    /// What the replica has, in words.
    pub replica: String,
    /// The replica was put right, and a second comparison has shown it.
    pub repaired: bool,
    /// When it was found.
    pub time: Timestamp,
}

/// What is known of verification.
///
/// (No field may be left out when it is empty: it travels in bincode too.)
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct Verification {
    /// Whatever the replica held of the state of the source at this moment was
    /// looked at after it, and was right, was put right, or had changed on the
    /// source meanwhile: the start of the last pass that came to its end
    /// without an unreadable object and without a difference that stayed.
    pub last_verified_timestamp: Option<Timestamp>,
    /// The number of the pass under way, or of the last one; 0 before the first.
    pub pass: u64,
    /// A pass is under way.
    pub running: bool,
    /// Why the pass waits, in words.
    pub waiting: Option<String>,
    /// When that pass began.
    pub started: Option<Timestamp>,
    /// When that pass ended.
    pub ended: Option<Timestamp>,
    /// When the next one begins by itself; `None` while one runs, and when none
    /// ever does.
    pub next_pass: Option<Timestamp>,
    /// Objects compared in that pass.
    pub objects: u64,
    /// Objects that there were to compare when it began.
    pub objects_expected: u64,
    /// Content bytes compared in that pass, of one side.
    pub bytes: u64,
    /// Names found missing in that pass.
    pub missing: u64,
    /// Names found too many.
    pub extra: u64,
    /// Objects whose content differed.
    pub content: u64,
    /// Objects whose attributes differed.
    pub attributes: u64,
    /// Of all these, how many were put right.
    pub repaired: u64,
    /// Objects that were passed over, because they kept changing.
    pub changing: u64,
    /// Objects that could not be read, on either side.
    pub read_errors: u64,
    /// The last of those, newest last; at most [`EXAMPLES_MAX`].
    #[serde(deserialize_with = "crate::codec::list")]
    pub errors: Vec<PathError>,
    /// The last differences of this pass or of those before it, newest last; at
    /// most [`EXAMPLES_MAX`].
    #[serde(deserialize_with = "crate::codec::list")]
    pub differences: Vec<Difference>,
}

/// The most differences and errors that status names.
pub const EXAMPLES_MAX: usize = 20;

impl Verification {
    /// Differences of the pass.
    pub fn found(&self) -> u64 {
        self.missing + self.extra + self.content + self.attributes
    }

    /// The same by kind.
    pub fn by_kind(&self) -> [(DifferenceKind, u64); 4] {
        [
            (DifferenceKind::Missing, self.missing),
            (DifferenceKind::Extra, self.extra),
            (DifferenceKind::Content, self.content),
            (DifferenceKind::Attributes, self.attributes),
        ]
    }
}

/// How a pass is to be made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PassOptions {
    /// Puts right what differs; else it only reports.
    pub repair: bool,
    /// Bytes a second at most; `None`: as fast as can be. An object counts as
    /// [`OBJECT_COST`] bytes at least.
    pub rate: Option<u64>,
}

/// What an object counts at least, against a rate of bytes.
pub const OBJECT_COST: u64 = 16 << 10;

/// What a pass has found so far.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct Findings {
    /// Differences of the pass after those that the asker has, in order.
    #[serde(deserialize_with = "crate::codec::list")]
    pub differences: Vec<Difference>,
    /// How many differences of the pass there are up to and with these: what
    /// the asker says next time.
    pub next: u64,
    /// Differences that are kept no more, since nobody asked for them in time.
    pub lost: u64,
    /// The pass has ended: nothing follows.
    pub done: bool,
    /// How far it is.
    pub verification: Verification,
}
