//! The index's store, in memory, as the product's promises it: some
//! transactions are durable, others become so with the next that is.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard};

use replicator_common::id::{BatchId, Incarnation, ObjectId};
use replicator_common::name::Name;
use replicator_src::index::{Base, Delta, Known, Mark, Noted, Orphan, View};

use crate::Never;

/// Everything that the store holds.
#[derive(Clone, Debug)]
pub struct Tables {
    /// Names this life.
    pub incarnation: Incarnation,
    /// The destination's life that it describes.
    pub peer: Option<Incarnation>,
    /// Where the last merged batch left the source.
    pub mark: Mark,
    objects: BTreeMap<ObjectId, Known>,
    entries: BTreeMap<(ObjectId, Name), ObjectId>,
    orphans: BTreeMap<ObjectId, Orphan>,
    /// Deltas that are durable and not merged.
    pub pending: Vec<Delta>,
}

impl Tables {
    fn new(incarnation: Incarnation) -> Self {
        Self {
            incarnation,
            peer: None,
            mark: Mark::default(),
            objects: BTreeMap::new(),
            entries: BTreeMap::new(),
            orphans: BTreeMap::new(),
            pending: Vec::new(),
        }
    }

    fn merge(&mut self, delta: &Delta) {
        for change in &delta.entries {
            let place = (change.directory.clone(), change.name.clone());
            let old = self.entries.remove(&place);
            assert_eq!(old, change.old, "the delta's old entry");
            if let Some(new) = &change.new {
                self.entries.insert(place, new.clone());
            }
        }
        for (object, known) in &delta.objects {
            match known {
                Some(known) => drop(self.objects.insert(object.clone(), known.clone())),
                None => drop(self.objects.remove(object)),
            }
        }
        for (object, orphan) in &delta.orphans {
            match orphan {
                Some(orphan) => drop(self.orphans.insert(object.clone(), *orphan)),
                None => drop(self.orphans.remove(object)),
            }
        }
        self.mark = delta.mark;
        self.pending.retain(|pending| pending.mark.batch > delta.mark.batch);
    }
}

/// The store.
#[derive(Debug)]
pub struct Store {
    states: Mutex<States>,
}

#[derive(Clone, Debug)]
struct States {
    now: Arc<Tables>,
    durable: Arc<Tables>,
}

impl Clone for Store {
    fn clone(&self) -> Self {
        Self { states: Mutex::new(self.states().clone()) }
    }
}

impl Store {
    /// An empty one.
    pub fn new(incarnation: Incarnation) -> Self {
        let tables = Arc::new(Tables::new(incarnation));
        Self { states: Mutex::new(States { now: tables.clone(), durable: tables }) }
    }

    fn states(&self) -> MutexGuard<'_, States> {
        self.states.lock().expect("a simulation that panicked has ended")
    }

    fn write(&self, durable: bool, change: impl FnOnce(&mut Tables)) {
        let mut states = self.states();
        change(Arc::make_mut(&mut states.now));
        if durable {
            states.durable = states.now.clone();
        }
    }

    /// As it stands.
    pub fn read(&self) -> Arc<Tables> {
        self.states().now.clone()
    }

    /// What a crash leaves of it.
    pub fn after_crash(&self) -> Self {
        let durable = self.states().durable.clone();
        Self { states: Mutex::new(States { now: durable.clone(), durable }) }
    }

    /// It describes this destination from now on.
    pub fn set_peer(&self, peer: Incarnation) {
        self.write(true, |tables| tables.peer = Some(peer));
    }

    /// Forgets everything and takes a new incarnation.
    pub fn reset(&self, incarnation: Incarnation) {
        self.write(true, |tables| {
            let seq = tables.mark.seq;
            *tables = Tables::new(incarnation);
            tables.mark.seq = seq;
        });
    }
}

impl Base for Store {
    type Error = Never;
    type Snapshot = Snapshot;

    fn snapshot(&self) -> Result<Snapshot, Never> {
        Ok(Snapshot(self.read()))
    }

    fn prepare(
        &self,
        delta: Option<(&Delta, &Noted)>,
        acknowledged: &[&Delta],
    ) -> Result<(), Never> {
        self.write(true, |tables| {
            acknowledged.iter().for_each(|delta| tables.merge(delta));
            tables.pending.extend(delta.map(|(delta, _)| delta.clone()));
        });
        Ok(())
    }

    fn merge_all(&self, acknowledged: &[&Delta]) -> Result<(), Never> {
        self.write(false, |tables| acknowledged.iter().for_each(|delta| tables.merge(delta)));
        Ok(())
    }

    fn settle(&self, committed: BatchId) -> Result<(), Never> {
        self.write(true, |tables| {
            let pending = std::mem::take(&mut tables.pending);
            let done = pending.iter().filter(|delta| delta.mark.batch <= committed);
            done.for_each(|delta| tables.merge(delta));
            tables.pending.clear();
        });
        Ok(())
    }
}

/// The tables at one moment.
pub struct Snapshot(Arc<Tables>);

impl View for Snapshot {
    type Error = Never;

    fn object(&self, object: &ObjectId) -> Result<Option<Known>, Never> {
        Ok(self.0.objects.get(object).cloned())
    }

    fn entry(&self, directory: &ObjectId, name: &Name) -> Result<Option<ObjectId>, Never> {
        Ok(self.0.entries.get(&(directory.clone(), name.clone())).cloned())
    }

    fn children(&self, directory: &ObjectId) -> Result<Vec<(Name, ObjectId)>, Never> {
        let all = self.0.entries.iter().filter(|((d, _), _)| d == directory);
        Ok(all.map(|((_, name), object)| (name.clone(), object.clone())).collect())
    }

    fn links(&self, object: &ObjectId) -> Result<Vec<(ObjectId, Name)>, Never> {
        let all = self.0.entries.iter().filter(|(_, found)| *found == object);
        Ok(all.map(|(place, _)| place.clone()).collect())
    }

    fn orphans(&self) -> Result<Vec<(ObjectId, Orphan)>, Never> {
        Ok(self.0.orphans.iter().map(|(object, orphan)| (object.clone(), *orphan)).collect())
    }
}
