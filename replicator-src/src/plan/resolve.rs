//! Looks at what is dirty as it stands now, and says what must be read.

use std::collections::{BTreeMap, VecDeque};

use foldhash::{HashMap, HashSet};
use replicator_common::id::ObjectId;
use replicator_common::name::Name;
use replicator_common::object::Kind;
use replicator_common::sys::stat::Stat;
use replicator_common::time::Timestamp;

use super::PlanError;
use super::asked::{Asked, Need};
use super::assemble::HoldReason;
use super::dirty::{Dirty, Listing, Rest};
use super::recall::way;
use super::survey::survey;
use super::tree::{Listed, Lookup, Seen, Skip, Tree};
use crate::index::{Known, View};
use crate::journal::Record;
use crate::watcher::What;

/// An entry.
pub type Place = (ObjectId, Name);

/// What an entry is in the replica and what it is to become.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Binding {
    /// In the replica now.
    pub old: Option<ObjectId>,
    /// On the source now.
    pub new: Option<ObjectId>,
}

/// What happened while a batch was read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Meanwhile {
    /// Nothing that it looked at changed: it is of the moment of its barrier.
    Untouched,
    /// It may look again at what changed.
    Touched,
    /// Events were lost: it is sent as it is, and the gap is the next one's.
    Lost,
}

/// The state of resolving one batch. Fed one or several times; each time adds
/// to what is there (a later look at the same entry replaces the earlier).
#[derive(Default)]
pub struct Resolve {
    /// Every entry that was looked at, changed or not.
    pub bindings: BTreeMap<(ObjectId, Name), Binding>,
    /// Objects to read.
    pub asked: Asked,
    /// Directories that the index does not know.
    pub fresh: HashSet<ObjectId>,
    /// Directories that were listed.
    pub listed: HashSet<ObjectId>,
    /// The root, where only names lead to objects, or while trees that left are
    /// taken apart. Then what is below an orphan is out of sight as the orphan
    /// is, and is looked at whole when it moves out of it.
    pub root: Option<ObjectId>,
    /// A walk is under way: directories that moved meanwhile are walked where
    /// they are found, for they may have left the part still to be walked for
    /// the part that was (trap 11).
    pub walking: bool,
    /// For walks: objects that changed at this moment or after it may differ
    /// although all times are equal (see [`crate::boot`]).
    pub unproven: Option<Timestamp>,
    /// What was passed over, by entry; `None` when it no longer is.
    pub skipped: HashMap<(ObjectId, Name), Option<Skip>>,
    /// Objects seen by deep listings that equal the index (count, bytes): for
    /// progress.
    pub equal: (u64, u64),
    /// Entries that cannot be looked at, with the error.
    pub unreadable: Vec<((ObjectId, Name), String)>,
    /// What could not be looked at because its directory was not where it was
    /// believed to be.
    ///
    /// INVARIANT: it stays dirty until the directory is found, or until the
    /// index says that it left the source.
    pub astray: Dirty,
    /// For walks: what is as the index says need not be looked at entry by entry
    /// (see [`super::survey`]), all but these entries, which somebody waits to
    /// hear of. `None` when each entry is to be looked at.
    pub waiting: Option<HashSet<Place>>,
    /// Files of the replica whose content waits, and why.
    pub under_way: HashMap<ObjectId, HoldReason>,
    /// Those of them with a name that waits, too: that is where they are.
    pub named: HashSet<ObjectId>,
    /// Names that nothing waits for any more: several files in a row were replaced under
    /// them before their content had come.
    pub overtaken: HashSet<Place>,
    /// Entries that were compared with the index, many at a time.
    pub looked: usize,
    /// Directories with too many names to be listed beside others.
    pub crowded: HashSet<ObjectId>,
}

/// How much one batch may hold before listings are put off to the next.
#[derive(Clone, Copy, Debug)]
pub struct Budget {
    /// Objects to read.
    pub objects: usize,
    /// Entries to look at.
    pub entries: usize,
    /// Entries to compare with the index, many at a time; the last time may
    /// exceed it.
    pub compared: usize,
    /// Content bytes of small files to read.
    pub bytes: u64,
    /// Files larger than this do not count as bytes: they travel on their own.
    pub large: u64,
}

impl Resolve {
    /// Looks at all of `dirty` but the listings for which the budget does not
    /// suffice: those stay in `dirty`. Entries and objects are bounded by what
    /// the caller puts in.
    pub fn feed<V: View, T: Tree>(
        &mut self,
        dirty: &mut Dirty,
        budget: Budget,
        view: &V,
        tree: &mut T,
    ) -> Result<(), PlanError<V::Error, T::Error>> {
        // What came back from outside is walked, too, and what leaves it before
        // its turn was not compared yet.
        self.walking |= dirty.listings.iter().any(|listing| listing.deep);
        let mut work = Work { state: self, view, tree, large: budget.large };
        let objects = std::mem::take(&mut dirty.objects);
        let entries = std::mem::take(&mut dirty.entries);
        for ((directory, name), what) in entries {
            work.entry(&directory, &name, Look::Event(what), &mut dirty.listings)?;
        }
        // Where their directories stand may have been seen just now.
        for ((directory, name), what) in std::mem::take(&mut work.state.astray.entries) {
            work.entry(&directory, &name, Look::Event(what), &mut dirty.listings)?;
        }
        for (object, what) in objects {
            work.object(object, what)?;
        }
        while !work.state.full(budget) {
            survey(work.state, &mut dirty.listings, work.view, &*work.tree)?;
            let Some(listing) = dirty.listings.pop_front() else { break };
            work.listing(&listing, budget, dirty)?;
        }
        Ok(())
    }

    /// Whether the budget is used up; of objects, those not taken yet count.
    pub fn full(&self, budget: Budget) -> bool {
        self.asked.open_count() >= budget.objects
            || self.asked.bytes() >= budget.bytes
            || self.bindings.len() >= budget.entries
            || self.looked >= budget.compared
    }

    /// Begins with a root that the index does not know: the first batch.
    pub fn begin_at(&mut self, root: &ObjectId) {
        self.fresh.insert(root.clone());
        let need = Need { kind: Kind::Directory, new: true, content: false, hint: None };
        self.asked.need(root.clone(), need, None);
    }

    /// What becomes of records that came after the barrier, while what this
    /// batch looked at was read.
    ///
    /// INVARIANT (the watermark tells the truth): a batch that has looked at
    /// anything does not go on past a gap. The walk that closes the gap compares
    /// all with the index; but of what this batch looked at before the gap, the
    /// index knows nothing yet, and this batch does not look at it twice. So the
    /// batch is left as it is, and the walk begins after it.
    pub fn meanwhile<'a>(&self, records: impl IntoIterator<Item = &'a Record>) -> Meanwhile {
        let mut meanwhile = Meanwhile::Untouched;
        for record in records {
            if matches!(record, Record::Gap { .. }) {
                return Meanwhile::Lost;
            }
            if self.touches(record) {
                meanwhile = Meanwhile::Touched;
            }
        }
        meanwhile
    }

    /// Whether a record that came after the barrier concerns anything that
    /// this batch has looked at.
    fn touches(&self, record: &Record) -> bool {
        match record {
            Record::Entry { directory, name } | Record::Named { directory, name, .. } => {
                self.listed.contains(directory)
                    || self.bindings.contains_key(&(directory.clone(), name.clone()))
            }
            Record::Object { object, .. } => {
                self.asked.get(object).is_some() || self.listed.contains(object)
            }
            Record::Gap { .. } | Record::Barrier { .. } => false,
        }
    }
}

pub(super) type Failure<V, T> = PlanError<<V as View>::Error, <T as Tree>::Error>;

struct Work<'a, V, T> {
    state: &'a mut Resolve,
    view: &'a V,
    tree: &'a mut T,
    large: u64,
}

impl<V: View, T: Tree> Work<'_, V, T> {
    /// Looks at one entry.
    fn entry(
        &mut self,
        directory: &ObjectId,
        name: &Name,
        look: Look,
        listings: &mut VecDeque<Listing>,
    ) -> Result<(), PlanError<V::Error, T::Error>> {
        let fresh = self.state.fresh.contains(directory);
        if !fresh && !self.is_known_directory(directory)? {
            // Outside the tree, or not reached yet: when the directory is
            // reached, all of it is listed.
            return Ok(());
        }
        let old = if fresh { None } else { self.known_entry(directory, name)? };
        let place = (directory.clone(), name.clone());
        let (new, skip) = match self.tree.lookup(directory, name).map_err(PlanError::Tree)? {
            Lookup::Absent => (None, None),
            Lookup::Skipped(skip) => (None, Some(skip)),
            Lookup::Unreadable(error) => {
                // What the replica has there stays until it can be looked at.
                self.state.unreadable.push((place, error));
                return Ok(());
            }
            Lookup::Away => {
                self.away(place, look, fresh);
                return Ok(());
            }
            Lookup::Found(seen) => {
                let object = seen.object.clone();
                // Whatever the look, what events told of is read, from here.
                let told = match look {
                    Look::Event(what) => what,
                    Look::Rescan | Look::Force => What::default(),
                };
                let look = match look {
                    _ if fresh => Look::Force,
                    // What moved may have left the part still to be walked, so
                    // it gets here the look it would have had there.
                    Look::Event(what) if self.state.walking && !what.content => Look::Rescan,
                    look => look,
                };
                // Away when this batch looked before, and back: then what is
                // below it was passed over (trap 11).
                let back = self.state.bindings.get(&place);
                let back = back.is_some_and(|before| before.new.as_ref() != Some(&object));
                let moved = back || old.as_ref() != Some(&object);
                if moved && self.state.walking && self.is_known_directory(&object)? {
                    listings.push_front(Listing::new(object.clone(), true));
                }
                self.seen(seen, place.clone(), look, told, listings)?;
                (Some(object), None)
            }
        };
        if skip.is_some() || self.state.skipped.contains_key(&place) {
            self.state.skipped.insert(place.clone(), skip);
        }
        if old != new || matches!(look, Look::Event(_)) {
            self.need_directory(directory)?;
        }
        if let (Some(old), Look::Event(mut what)) = (&old, look)
            && Some(old) != new.as_ref()
        {
            // What changed under that name may have been the object that the
            // replica still has there, now under another. Where events tell
            // names only, the one that says so may come when the name is
            // forgotten; so what keeps other names is looked at now.
            what.attributes |= self.has_other_names(old)?;
            if what.content || what.attributes {
                self.object(old.clone(), what)?;
            }
        }
        self.state.bindings.insert(place, Binding { old, new });
        Ok(())
    }

    /// An entry cannot be looked at now, for nobody knows where its directory
    /// is. What a listing asked for is asked for by a listing again: it is more
    /// than the entry.
    fn away(&mut self, (directory, name): (ObjectId, Name), look: Look, fresh: bool) {
        match look {
            Look::Event(what) if !fresh => self.state.astray.entry(directory, name, what),
            _ => self.state.astray.listing(Listing::new(directory, true)),
        }
    }

    /// An object was seen under a name.
    fn seen(
        &mut self,
        seen: Seen,
        place: (ObjectId, Name),
        look: Look,
        told: What,
        listings: &mut VecDeque<Listing>,
    ) -> Result<(), PlanError<V::Error, T::Error>> {
        let kind = seen.stat.kind;
        let known = self.view.object(&seen.object).map_err(PlanError::Index)?;
        // An orphan that comes back was out of sight meanwhile (trap 3).
        let orphan = known.as_ref().is_some_and(|known| known.entry.is_none());
        let unseen = orphan || known.is_some() && self.was_below_orphan(&seen.object, &place)?;
        let look = if unseen { Look::Force } else { look };
        let (new, content, attributes) = match &known {
            None => (true, true, true),
            Some(known) => {
                let (content, attributes) = differs(known, &seen.stat, look, self.state.unproven);
                let told_content = told.content && kind == Kind::File;
                (false, content || told_content, attributes || told.attributes)
            }
        };
        if kind == Kind::Directory
            && (new || look == Look::Force)
            && !self.state.listed.contains(&seen.object)
            && (!new || self.state.fresh.insert(seen.object.clone()))
        {
            // The directory joins the known set before it is read (trap 4).
            listings.push_front(Listing::new(seen.object.clone(), !new));
        }
        if content || attributes {
            let bytes = (content && kind == Kind::File).then(|| self.counted(seen.stat.size));
            let need = Need { kind, new, content, hint: Some(place) };
            self.state.asked.need(seen.object, need, bytes);
        }
        Ok(())
    }

    /// Whether an object came out of an orphan (see [`Resolve::root`]).
    fn was_below_orphan(
        &self,
        object: &ObjectId,
        place: &(ObjectId, Name),
    ) -> Result<bool, Failure<V, T>> {
        let Some(root) = &self.state.root else { return Ok(false) };
        if self.known_entry(&place.0, &place.1)?.as_ref() == Some(object) {
            return Ok(false);
        }
        Ok(way(self.view, root, object).map_err(PlanError::Index)?.is_none())
    }

    /// What a file's content counts for in the budget.
    fn counted(&self, size: u64) -> u64 {
        if size > self.large { 0 } else { size }
    }

    /// An object is dirty by its handle.
    fn object(
        &mut self,
        object: ObjectId,
        what: What,
    ) -> Result<(), PlanError<V::Error, T::Error>> {
        let Some(known) = self.view.object(&object).map_err(PlanError::Index)? else {
            // Not ours, or new: then an entry leads to it. One that leads to
            // it in this very batch was looked at before this change.
            if let Some(need) = self.state.asked.get(&object).cloned() {
                self.state.asked.need(object, need, None);
            }
            return Ok(());
        };
        // Where it was seen in this batch counts more than where it was: without
        // privilege a name is all that leads to it.
        let seen = self.state.asked.get(&object).and_then(|need| need.hint.clone());
        let need = Need {
            kind: known.state.kind,
            new: false,
            content: what.content && known.state.kind == Kind::File,
            hint: seen.or(known.entry),
        };
        let bytes = need.content.then(|| self.counted(known.state.size));
        self.state.asked.need(object, need, bytes);
        Ok(())
    }

    /// Looks at every entry of a directory, in the replica and on the source.
    /// What exceeds the budget is left in `dirty` as entries.
    fn listing(
        &mut self,
        listing: &Listing,
        budget: Budget,
        dirty: &mut Dirty,
    ) -> Result<(), PlanError<V::Error, T::Error>> {
        let directory = &listing.directory;
        let fresh = self.state.fresh.contains(directory);
        if !fresh && !self.is_known_directory(directory)? {
            return Ok(());
        }
        let rest = match &listing.rest {
            Some(rest) if rest.is_each() => rest.clone(),
            // What was to be compared all at once, and now is not, is so no more.
            _ => match self.names(directory, fresh)? {
                Listed::Names(names) => Rest::all(names),
                // The entry that led here is dirty because of that. (Nothing is more than
                // all.)
                Listed::Gone | Listed::Many => return Ok(()),
                Listed::Away => {
                    // Of a new directory the index will know some entries by
                    // the time it is found.
                    let deep = listing.deep || fresh;
                    self.state.astray.listing(Listing::new(directory.clone(), deep));
                    return Ok(());
                }
            },
        };
        self.state.listed.insert(directory.clone());
        if listing.deep && self.view.links(directory).map_err(PlanError::Index)?.is_empty() {
            // No listing above compares the root.
            self.need_directory(directory)?;
        }
        for (done, name) in rest.names().iter().enumerate() {
            if self.state.full(budget) {
                let rest = Some(rest.after(done));
                dirty.listings.push_front(Listing { rest, ..listing.clone() });
                break;
            }
            let before = dirty.listings.len();
            self.listed_entry(listing, name, &mut dirty.listings)?;
            let below = dirty.listings.len() - before;
            let rest = rest.after(done + 1);
            if below > 0 && !rest.names().is_empty() && self.is_fresh(dirty.listings.front()) {
                // What is in a new directory belongs in the batch that makes it, see
                // `DataFrame::PackPlaced`. So it is listed before its next neighbour.
                dirty.listings.insert(below, Listing { rest: Some(rest), ..listing.clone() });
                break;
            }
        }
        Ok(())
    }

    fn is_fresh(&self, listing: Option<&Listing>) -> bool {
        listing.is_some_and(|listing| self.state.fresh.contains(&listing.directory))
    }

    /// Every name of a directory, in the replica or on the source.
    fn names(&mut self, directory: &ObjectId, fresh: bool) -> Result<Listed, Failure<V, T>> {
        let listed = self.tree.list(directory, usize::MAX);
        let mut names = match listed.map_err(PlanError::Tree)? {
            Listed::Names(names) => names,
            none => return Ok(none),
        };
        if !fresh {
            let known = self.view.children(directory).map_err(PlanError::Index)?;
            names.extend(known.into_iter().map(|(name, _)| name));
        }
        // In place: a set of them beside them would take as much again.
        names.sort_unstable();
        names.dedup();
        Ok(Listed::Names(names))
    }

    fn listed_entry(
        &mut self,
        listing: &Listing,
        name: &Name,
        listings: &mut VecDeque<Listing>,
    ) -> Result<(), PlanError<V::Error, T::Error>> {
        let directory = &listing.directory;
        let before = listings.len();
        let look = if listing.deep { Look::Rescan } else { Look::Event(What::default()) };
        self.entry(directory, name, look, listings)?;
        if !listing.deep {
            return Ok(());
        }
        let Some(Binding { new: Some(object), .. }) =
            self.state.bindings.get(&(directory.clone(), name.clone())).cloned()
        else {
            return Ok(());
        };
        let Some(known) = self.view.object(&object).map_err(PlanError::Index)? else {
            return Ok(());
        };
        if known.state.kind == Kind::Directory && listings.len() == before {
            listings.push_front(Listing::new(object, true));
        } else if !self.state.asked.is_open(&object) {
            self.state.equal.0 += 1;
            self.state.equal.1 += known.state.size;
        }
        Ok(())
    }

    /// A directory with a changed entry has a new mtime at least.
    fn need_directory(
        &mut self,
        directory: &ObjectId,
    ) -> Result<(), PlanError<V::Error, T::Error>> {
        if self.state.asked.is_open(directory) {
            return Ok(());
        }
        if self.state.fresh.contains(directory) {
            // It was needed when it was found; if it was read since, it is read
            // again.
            if let Some(need) = self.state.asked.get(directory).cloned() {
                self.state.asked.need(directory.clone(), need, None);
            }
            return Ok(());
        }
        let hint =
            self.view.object(directory).map_err(PlanError::Index)?.and_then(|known| known.entry);
        let need = Need { kind: Kind::Directory, new: false, content: false, hint };
        self.state.asked.need(directory.clone(), need, None);
        Ok(())
    }

    fn is_known_directory(&self, object: &ObjectId) -> Result<bool, PlanError<V::Error, T::Error>> {
        Ok(self.view.kind(object).map_err(PlanError::Index)? == Some(Kind::Directory))
    }

    fn has_other_names(&self, object: &ObjectId) -> Result<bool, Failure<V, T>> {
        let known = self.view.object(object).map_err(PlanError::Index)?;
        Ok(known.is_some_and(|known| {
            known.state.kind != Kind::Directory && known.links.max(known.nlink) > 1
        }))
    }

    fn known_entry(
        &self,
        directory: &ObjectId,
        name: &Name,
    ) -> Result<Option<ObjectId>, PlanError<V::Error, T::Error>> {
        self.view.entry(directory, name).map_err(PlanError::Index)
    }
}

/// Why an entry is looked at: decides what of a known object is read again.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Look {
    /// Events were seen, and tell what may have changed.
    Event(What),
    /// Events may have been lost: whatever could differ is read.
    Rescan,
    /// The object comes from outside: what events told of it was dropped (trap
    /// 3), so it is read whole, known or not.
    Force,
}

/// Whether (content, attributes) of a known object must be read again.
pub(super) fn differs(
    known: &Known,
    stat: &Stat,
    look: Look,
    unproven: Option<Timestamp>,
) -> (bool, bool) {
    let changed = known.ctime != stat.ctime;
    let file = stat.kind == Kind::File;
    let resized = file && known.state.size != stat.size;
    let touched = resized || known.state.attributes.mtime != stat.mtime;
    let (content, attributes) = match look {
        Look::Event(what) => (what.content || touched, what.attributes),
        Look::Rescan => {
            let unproven = unproven.is_some_and(|from| stat.ctime >= from);
            (changed || touched || unproven || known.doubtful(), unproven)
        }
        Look::Force => (true, true),
    };
    (file && content, attributes || content || changed || touched)
}

/// The part of an ordered map of entries that lies in one directory.
pub(super) fn entries_of<'a, T>(
    entries: &'a BTreeMap<(ObjectId, Name), T>,
    directory: &ObjectId,
) -> impl Iterator<Item = (&'a (ObjectId, Name), &'a T)> + use<'a, T> {
    // Entries are ordered by directory first, and one byte of value 1 is the
    // smallest name there is.
    let from = Name::new(&[1]).map(|name| (directory.clone(), name)).ok();
    let directory = directory.clone();
    from.into_iter()
        .flat_map(move |from| entries.range(from..))
        .take_while(move |((of, _), _)| *of == directory)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_batch_does_not_go_on_past_a_gap() {
        let id = |n: u32| ObjectId::new(1, &n.to_be_bytes()).unwrap();
        let entry = |n| Record::Entry { directory: id(n), name: Name::new(b"a").unwrap() };
        let gap = || Record::Gap { reason: "overflow".to_owned() };
        let mut resolve = Resolve::default();
        resolve.listed.insert(id(1));
        assert_eq!(resolve.meanwhile(&[entry(2)]), Meanwhile::Untouched);
        assert_eq!(resolve.meanwhile(&[entry(1), entry(2)]), Meanwhile::Touched);
        assert_eq!(resolve.meanwhile(&[entry(1), gap(), entry(2)]), Meanwhile::Lost);
        assert_eq!(resolve.meanwhile(&[gap()]), Meanwhile::Lost);
    }
}
