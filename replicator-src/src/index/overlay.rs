//! The stored index with the deltas under way laid over it.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use foldhash::{HashMap, HashMapExt};
use replicator_common::id::{BatchId, ObjectId};
use replicator_common::name::Name;
use replicator_common::object::Kind;

use super::known::{Delta, EntryChange, Known, Mark, Orphan};
use super::noted::Noted;
use super::store::{IndexError, Store};
use super::view::{Base, Page, View};

/// One delta, arranged for look-up.
struct Layer {
    delta: Arc<Delta>,
    /// Where each object stands in the delta.
    objects: HashMap<ObjectId, usize>,
    /// Where each entry stands in the delta, in the order of entries. Where one came
    /// twice (planning never gives it so), both, and the last counts.
    entries: Vec<usize>,
    /// Where the entries stand that each object gained or lost; made when it is asked for:
    /// of most files the object itself says what its only entry is.
    links: OnceLock<HashMap<ObjectId, Vec<usize>>>,
    acknowledged: bool,
}

impl Layer {
    fn new(delta: Arc<Delta>) -> Self {
        let mut entries: Vec<usize> = (0..delta.entries.len()).collect();
        let place = |at: &usize| place_of(&delta.entries[*at]);
        // Planning gives them in order, and that costs one look at each.
        entries.sort_by(|one, other| place(one).cmp(&place(other)));
        let objects =
            delta.objects.iter().enumerate().map(|(at, (o, _))| (o.clone(), at)).collect();
        let links = OnceLock::new();
        Self { delta, objects, entries, links, acknowledged: false }
    }

    /// What the layer makes of an entry, if anything.
    fn entry(&self, directory: &ObjectId, name: &Name) -> Option<&EntryChange> {
        let wanted = (directory, name);
        let end = self.entries.partition_point(|at| place_of(self.change(*at)) <= wanted);
        let change = self.change(*self.entries.get(end.checked_sub(1)?)?);
        (place_of(change) == wanted).then_some(change)
    }

    /// What the layer makes of a directory's entries, in order of their names.
    fn entries_of(&self, directory: &ObjectId) -> impl Iterator<Item = &EntryChange> {
        let from = self.entries.partition_point(|at| self.change(*at).directory < *directory);
        let changes = self.entries[from..].iter().map(|at| self.change(*at));
        changes.take_while(move |change| change.directory == *directory)
    }

    /// The entries that an object gained (true) or lost (false).
    fn links_of(&self, object: &ObjectId) -> impl Iterator<Item = (bool, &EntryChange)> {
        let links = self.links.get_or_init(|| {
            let mut links: HashMap<ObjectId, Vec<usize>> = HashMap::new();
            for (at, change) in self.delta.entries.iter().enumerate() {
                for object in change.old.iter().chain(&change.new) {
                    links.entry(object.clone()).or_default().push(at);
                }
            }
            links
        });
        let changes = links.get(object).into_iter().flatten().map(|at| self.change(*at));
        changes.map(|change| (change.new.as_ref() == Some(object), change))
    }

    fn change(&self, at: usize) -> &EntryChange {
        &self.delta.entries[at]
    }
}

fn place_of(change: &EntryChange) -> (&ObjectId, &Name) {
    (&change.directory, &change.name)
}

type Remembered = HashMap<ObjectId, Option<Box<Known>>>;

/// Objects that are remembered at most, some 300 bytes each.
const REMEMBERED: usize = 16_384;

/// Changes that wait in memory for the next batch, some 500 bytes each.
const FEW: usize = 256;

/// The index as planning sees it: the store, then each delta under way in order.
///
/// Memory: the deltas under way, which a batch's bounds and the number of
/// batches under way limit.
pub struct Index<B: Base = Store> {
    store: Arc<B>,
    snapshot: B::Snapshot,
    layers: Vec<Layer>,
    /// What was asked for lately: a batch asks for each of its objects several
    /// times.
    ///
    /// INVARIANT: what the layers and the store say together. So all is forgotten
    /// when a layer comes or goes, but not when one becomes part of the store.
    remembered: Mutex<Remembered>,
}

impl<B: Base> Index<B> {
    /// Over a store whose pending deltas are settled.
    pub fn new(store: Arc<B>) -> Result<Self, B::Error> {
        let snapshot = store.snapshot()?;
        Ok(Self { store, snapshot, layers: Vec::new(), remembered: Mutex::default() })
    }

    /// The store below.
    pub fn store(&self) -> &Arc<B> {
        &self.store
    }

    /// Makes a batch's delta durable, and what is noted with it, and lays it
    /// over the rest. Merges what was acknowledged.
    pub fn prepare(&mut self, delta: Delta, noted: &Noted) -> Result<(), B::Error> {
        let delta = Arc::new(delta);
        let acknowledged = self.take_acknowledged();
        let merged: Vec<&Delta> = acknowledged.iter().map(AsRef::as_ref).collect();
        self.store.prepare(Some((&delta, noted)), &merged)?;
        self.layers.push(Layer::new(delta));
        self.remembered().clear();
        self.snapshot = self.store.snapshot()?;
        Ok(())
    }

    /// Merges what was acknowledged without waiting for the next batch. Durable
    /// with the next [`Index::prepare`]; until then the store would find the
    /// deltas pending.
    pub fn merge(&mut self) -> Result<(), B::Error> {
        let acknowledged = self.take_acknowledged();
        if acknowledged.is_empty() {
            return Ok(());
        }
        let merged: Vec<&Delta> = acknowledged.iter().map(AsRef::as_ref).collect();
        self.store.merge_all(&merged)?;
        self.snapshot = self.store.snapshot()?;
        Ok(())
    }

    /// [`Index::merge`], if it is worth a transaction of its own: the next
    /// [`Index::prepare`] merges few changes without one.
    pub fn merge_many(&mut self) -> Result<(), B::Error> {
        let acknowledged = self.layers.iter().filter(|layer| layer.acknowledged);
        match acknowledged.map(|layer| layer.delta.size()).sum::<usize>() < FEW {
            true => Ok(()),
            false => self.merge(),
        }
    }

    fn take_acknowledged(&mut self) -> Vec<Arc<Delta>> {
        let count = self.layers.iter().take_while(|layer| layer.acknowledged).count();
        self.layers.drain(..count).map(|layer| layer.delta).collect()
    }

    /// The destination has applied `batch` and all before it. Their deltas stay
    /// in memory until the next [`Index::prepare`] or [`Index::merge`].
    pub fn acknowledge(&mut self, batch: BatchId) -> Option<Mark> {
        let mut mark = None;
        for layer in &mut self.layers {
            if layer.delta.mark.batch <= batch && !layer.acknowledged {
                layer.acknowledged = true;
                mark = Some(layer.delta.mark);
            }
        }
        mark
    }

    /// The last batch under way that was acknowledged.
    pub fn acknowledged(&self) -> Option<Mark> {
        let layers = self.layers.iter().filter(|layer| layer.acknowledged);
        layers.map(|layer| layer.delta.mark).next_back()
    }

    /// After a session was lost: keeps the deltas up to `committed`, forgets
    /// the rest. Returns the numbers of the batches that were forgotten.
    pub fn settle(&mut self, committed: BatchId) -> Result<Vec<BatchId>, B::Error> {
        self.store.settle(committed)?;
        let lost = self.layers.iter().map(|layer| layer.delta.mark.batch);
        let lost = lost.filter(|batch| *batch > committed).collect();
        self.layers.clear();
        self.remembered().clear();
        self.snapshot = self.store.snapshot()?;
        Ok(lost)
    }

    /// These will be asked for: looks them up in the order of ids, which takes half as long
    /// as one by one.
    pub fn expect<'a>(
        &self,
        objects: impl IntoIterator<Item = &'a ObjectId>,
    ) -> Result<(), B::Error> {
        let mut new: Vec<ObjectId> = {
            let remembered = self.remembered();
            let new = objects.into_iter().filter(|object| !remembered.contains_key(*object));
            new.cloned().collect()
        };
        new.sort_unstable();
        new.dedup();
        let found = self.objects(&new)?;
        let mut remembered = self.remembered();
        if remembered.len() + new.len() > REMEMBERED {
            remembered.clear();
        }
        let found = found.into_iter().map(|known| known.map(Box::new));
        remembered.extend(new.into_iter().zip(found).take(REMEMBERED));
        Ok(())
    }

    /// Whether the replica holds the object.
    pub fn has(&self, object: &ObjectId) -> Result<bool, B::Error> {
        self.with_object(object, |known| known.is_some())
    }

    /// Looks at what the replica holds of an object, without a copy.
    pub fn with_object<T>(
        &self,
        object: &ObjectId,
        see: impl FnOnce(Option<&Known>) -> T,
    ) -> Result<T, B::Error> {
        if let Some(known) = self.remembered().get(object) {
            return Ok(see(known.as_deref()));
        }
        let known = self.look_up(object)?;
        let seen = see(known.as_ref());
        let mut remembered = self.remembered();
        if remembered.len() >= REMEMBERED {
            remembered.clear();
        }
        remembered.insert(object.clone(), known.map(Box::new));
        Ok(seen)
    }

    fn remembered(&self) -> MutexGuard<'_, Remembered> {
        self.remembered.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn look_up(&self, object: &ObjectId) -> Result<Option<Known>, B::Error> {
        for layer in self.layers.iter().rev() {
            if let Some(at) = layer.objects.get(object) {
                return Ok(layer.delta.objects[*at].1.clone());
            }
        }
        self.snapshot.object(object)
    }
}

impl Index {
    /// How many objects the replica has once the batches under way are there.
    pub fn count(&self) -> Result<u64, IndexError> {
        let mut count = self.snapshot.count()?;
        let touched: BTreeSet<&ObjectId> =
            self.layers.iter().flat_map(|layer| layer.objects.keys()).collect();
        for object in touched {
            let before = self.snapshot.object(object)?.is_some();
            match (before, self.object(object)?.is_some()) {
                (true, false) => count = count.saturating_sub(1),
                (false, true) => count += 1,
                _ => {}
            }
        }
        Ok(count)
    }
}

impl<B: Base> View for Index<B> {
    type Error = B::Error;

    fn object(&self, object: &ObjectId) -> Result<Option<Known>, B::Error> {
        self.with_object(object, |known| known.cloned())
    }

    fn kind(&self, object: &ObjectId) -> Result<Option<Kind>, B::Error> {
        self.with_object(object, |known| known.map(|known| known.state.kind))
    }

    fn only_entry(&self, object: &ObjectId) -> Result<Option<(ObjectId, Name)>, B::Error> {
        self.with_object(object, |known| known.and_then(|known| known.only_entry().cloned()))
    }

    fn entry(&self, directory: &ObjectId, name: &Name) -> Result<Option<ObjectId>, B::Error> {
        if self.layers.is_empty() {
            return self.snapshot.entry(directory, name);
        }
        for layer in self.layers.iter().rev() {
            if let Some(change) = layer.entry(directory, name) {
                return Ok(change.new.clone());
            }
        }
        self.snapshot.entry(directory, name)
    }

    fn children(&self, directory: &ObjectId) -> Result<Vec<(Name, ObjectId)>, B::Error> {
        let stored = self.snapshot.children(directory)?;
        let mut changed = BTreeMap::new();
        for layer in &self.layers {
            for change in layer.entries_of(directory) {
                changed.insert(change.name.clone(), change.new.clone());
            }
        }
        if changed.is_empty() {
            return Ok(stored);
        }
        let mut all: BTreeMap<Name, Option<ObjectId>> =
            stored.into_iter().map(|(name, object)| (name, Some(object))).collect();
        all.extend(changed);
        Ok(all.into_iter().filter_map(|(name, object)| Some((name, object?))).collect())
    }

    fn page(&self, directory: &ObjectId, after: Option<&Name>) -> Result<Page, B::Error> {
        let stored = self.snapshot.page(directory, after)?;
        let within = |name: &Name| {
            after.is_none_or(|after| name > after)
                && stored.through.as_ref().is_none_or(|through| name <= through)
        };
        let mut changed = BTreeMap::new();
        for layer in &self.layers {
            for change in layer.entries_of(directory).filter(|change| within(&change.name)) {
                changed.insert(change.name.clone(), change.new.clone());
            }
        }
        if changed.is_empty() {
            return Ok(stored);
        }
        let Page { entries, through } = stored;
        let mut all: BTreeMap<Name, Option<ObjectId>> =
            entries.into_iter().map(|(name, object)| (name, Some(object))).collect();
        all.extend(changed);
        let entries = all.into_iter().filter_map(|(name, object)| Some((name, object?))).collect();
        Ok(Page { entries, through })
    }

    fn see_objects(
        &self,
        objects: &[&ObjectId],
        each: &mut dyn FnMut(usize, Option<&Known>),
    ) -> Result<(), B::Error> {
        self.snapshot.see_objects(objects, &mut |at, stored| {
            let changed = |layer: &Layer| layer.objects.get(objects[at]).copied();
            let mut layers = self.layers.iter().rev();
            let changed = layers.find_map(|layer| Some(&layer.delta.objects[changed(layer)?].1));
            each(at, changed.map_or(stored, Option::as_ref));
        })
    }

    fn links(&self, object: &ObjectId) -> Result<Vec<(ObjectId, Name)>, B::Error> {
        let mut links = self.snapshot.links(object)?;
        // Gathered first: a batch may name tens of thousands.
        let mut changed = BTreeMap::new();
        for (gained, change) in self.layers.iter().flat_map(|layer| layer.links_of(object)) {
            changed.insert((change.directory.clone(), change.name.clone()), gained);
        }
        links.retain(|link| !changed.contains_key(link));
        links.extend(changed.into_iter().filter_map(|(place, gained)| gained.then_some(place)));
        Ok(links)
    }

    fn orphans(&self) -> Result<Vec<(ObjectId, Orphan)>, B::Error> {
        let mut all: BTreeMap<ObjectId, Orphan> = self.snapshot.orphans()?.into_iter().collect();
        for (object, orphan) in self.layers.iter().flat_map(|layer| &layer.delta.orphans) {
            match orphan {
                Some(orphan) => all.insert(object.clone(), *orphan),
                None => all.remove(object),
            };
        }
        Ok(all.into_iter().collect())
    }
}
