//! What the replica must be after each batch.

use std::collections::BTreeMap;

use replicator_common::name::Name;
use replicator_common::time::Timestamp;
use replicator_src::index::{Content, Delta};

use crate::world::inode;

/// A batch as the index describes it: what the replica must be after it.
#[derive(Clone, Debug, Default)]
pub struct Expected {
    /// Entries.
    pub entries: BTreeMap<(u32, Name), u32>,
    /// Objects with their content's hash and mode.
    pub objects: BTreeMap<u32, (Content, u32)>,
    /// What it claims.
    pub watermark: Option<Timestamp>,
    /// The moment that it equals the source at.
    pub exact: Option<Timestamp>,
}

impl Expected {
    pub(super) fn after(&self, delta: &Delta) -> Self {
        let mut next = Self { exact: None, ..self.clone() };
        for change in &delta.entries {
            let place = (inode(&change.directory), change.name.clone());
            match &change.new {
                Some(new) => next.entries.insert(place, inode(new)),
                None => next.entries.remove(&place),
            };
        }
        for (object, known) in &delta.objects {
            let object = inode(object);
            match known {
                Some(known) => {
                    let now = (known.content.clone(), known.state.attributes.mode);
                    next.objects.insert(object, now);
                }
                None => drop(next.objects.remove(&object)),
            }
        }
        next
    }
}
