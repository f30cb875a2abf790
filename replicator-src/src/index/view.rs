//! What planning may ask of the index.

use replicator_common::id::{BatchId, ObjectId};
use replicator_common::name::Name;

use super::known::{Delta, Known, Orphan};
use super::noted::Noted;

/// The index as planning sees it. Pure code is generic over this; tests give
/// it a map.
pub trait View {
    /// Why a question could not be answered.
    type Error;

    /// The object as the replica holds it.
    fn object(&self, object: &ObjectId) -> Result<Option<Known>, Self::Error>;
    /// What the entry refers to in the replica.
    fn entry(&self, directory: &ObjectId, name: &Name) -> Result<Option<ObjectId>, Self::Error>;
    /// All entries of a directory in the replica, ordered by name.
    fn children(&self, directory: &ObjectId) -> Result<Vec<(Name, ObjectId)>, Self::Error>;
    /// All entries of an object in the replica.
    fn links(&self, object: &ObjectId) -> Result<Vec<(ObjectId, Name)>, Self::Error>;
    /// Objects without entries that are still alive.
    fn orphans(&self) -> Result<Vec<(ObjectId, Orphan)>, Self::Error>;
}

/// Where deltas are kept: what [`super::Index`] lies over. The one of the
/// product is [`super::Store`]; the simulation has one in memory that forgets
/// what is not durable when it crashes.
pub trait Base {
    /// Why it could not do what was asked.
    type Error;
    /// The tables as they stand at one moment.
    type Snapshot: View<Error = Self::Error>;

    /// The tables as they stand now.
    fn snapshot(&self) -> Result<Self::Snapshot, Self::Error>;
    /// Makes `delta`, and what is noted with it, durable as pending and merges what was `acknowledged`
    /// before it.
    fn prepare(
        &self,
        delta: Option<(&Delta, &Noted)>,
        acknowledged: &[&Delta],
    ) -> Result<(), Self::Error>;
    /// Merges what was `acknowledged`; durable with the next that is.
    fn merge_all(&self, acknowledged: &[&Delta]) -> Result<(), Self::Error>;
    /// Pending deltas up to `committed` took effect, later ones did not.
    fn settle(&self, committed: BatchId) -> Result<(), Self::Error>;
}
