//! What people are told.

use serde::Serialize;

use crate::time::Timestamp;

/// What happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum Kind {
    /// Replication does not go on without help.
    Error,
    /// Replication has halted.
    Halted,
    /// The replica is further behind than it may be.
    Lag,
    /// One of these is over.
    Recovered,
}

impl Kind {
    /// As events spell it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Error => "ERROR",
            Self::Halted => "HALTED",
            Self::Lag => "LAG",
            Self::Recovered => "RECOVERED",
        }
    }
}

/// An event, as the webhook's body and the command's standard input have it.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(rename_all = "PascalCase")]
pub struct Event {
    /// The same when it is sent again.
    pub id: String,
    /// What happened.
    #[serde(rename = "Event")]
    pub kind: Kind,
    /// What is over, of [`Kind::Recovered`].
    pub recovered_from: Option<Kind>,
    /// When it was noticed.
    #[serde(serialize_with = "rfc3339")]
    pub time: Timestamp,
    /// Who noticed: `source` or `destination`.
    pub side: &'static str,
    /// The source's file system.
    pub source_file_system_id: String,
    /// The replica's.
    pub destination_file_system_id: String,
    /// The status then.
    pub status: &'static str,
    /// In words.
    pub message: String,
    /// How far the replica was behind then, seconds; `None` before the initial
    /// sync is through.
    pub time_since_last_sync: Option<f64>,
}

fn rfc3339<S: serde::Serializer>(time: &Timestamp, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(&time.to_rfc3339())
}
