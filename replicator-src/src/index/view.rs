//! What planning may ask of the index.

use replicator_common::id::{BatchId, ObjectId};
use replicator_common::name::Name;
use replicator_common::object::Kind;

use super::known::{Delta, Known, Orphan};
use super::noted::Noted;

/// A part of a directory's entries in the replica.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Page {
    /// Ordered by name.
    pub entries: Vec<(Name, ObjectId)>,
    /// The name up to which these are all; `None` when there are no more.
    pub through: Option<Name>,
}

/// The index as planning sees it. Pure code is generic over this; tests give
/// it a map. Several threads may ask at once.
pub trait View: Sync {
    /// Why a question could not be answered.
    type Error: Send;

    /// The object as the replica holds it.
    fn object(&self, object: &ObjectId) -> Result<Option<Known>, Self::Error>;
    /// What kind of object the replica holds; `None` where it holds none.
    fn kind(&self, object: &ObjectId) -> Result<Option<Kind>, Self::Error> {
        Ok(self.object(object)?.map(|known| known.state.kind))
    }
    /// The entry of an object that has one name on the source and one in the
    /// replica, as far as that is known with the object.
    fn only_entry(&self, object: &ObjectId) -> Result<Option<(ObjectId, Name)>, Self::Error> {
        Ok(self.object(object)?.and_then(|known| known.only_entry().cloned()))
    }
    /// What the entry refers to in the replica.
    fn entry(&self, directory: &ObjectId, name: &Name) -> Result<Option<ObjectId>, Self::Error>;
    /// All entries of a directory in the replica, ordered by name.
    fn children(&self, directory: &ObjectId) -> Result<Vec<(Name, ObjectId)>, Self::Error>;
    /// Some entries of a directory in the replica, ordered by name: those after
    /// `after`, as many as are worth reading at once.
    fn page(&self, directory: &ObjectId, after: Option<&Name>) -> Result<Page, Self::Error> {
        let mut entries = self.children(directory)?;
        entries.retain(|(name, _)| after.is_none_or(|after| name > after));
        Ok(Page { entries, through: None })
    }
    /// Hands each of several objects, as the replica holds it, to `each`, with its place among
    /// those that were asked for. Fastest in the order of ids.
    fn see_objects(
        &self,
        objects: &[&ObjectId],
        each: &mut dyn FnMut(usize, Option<&Known>),
    ) -> Result<(), Self::Error> {
        for (at, object) in objects.iter().enumerate() {
            each(at, self.object(object)?.as_ref());
        }
        Ok(())
    }
    /// The same as copies, in the order asked for.
    fn objects(&self, objects: &[ObjectId]) -> Result<Vec<Option<Known>>, Self::Error> {
        let mut found = Vec::with_capacity(objects.len());
        let objects: Vec<&ObjectId> = objects.iter().collect();
        self.see_objects(&objects, &mut |_, known| found.push(known.cloned()))?;
        Ok(found)
    }
    /// All entries of an object in the replica.
    fn links(&self, object: &ObjectId) -> Result<Vec<(ObjectId, Name)>, Self::Error>;
    /// Objects without entries that are still alive.
    fn orphans(&self) -> Result<Vec<(ObjectId, Orphan)>, Self::Error>;
}

/// Where deltas are kept: what [`super::Index`] lies over. The one of the
/// product is [`super::Store`]; the simulation has one in memory that forgets
/// what is not durable when it crashes.
pub trait Base: Send + Sync {
    /// Why it could not do what was asked.
    type Error: Send;
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
