//! What planning may ask of the index.

use replicator_common::id::ObjectId;
use replicator_common::name::Name;

use super::known::{Known, Orphan};

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
