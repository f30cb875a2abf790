//! Takes out of a walk what is as the index says, many entries at a time: one
//! look at the source and one row of the index each, in the order in which
//! disk and index hold them, by several threads. What differs, or might, is left
//! to [`resolve`], which looks at it by itself, as if nobody had looked before.
//!
//! First each directory is listed and laid beside a page of the index, then the
//! entries that both have are compared, some hundreds at a time.
//!
//! INVARIANT: an entry is taken out only if looking at it by itself would have
//! found nothing to do, and nobody waits to hear that it was looked at.
//!
//! [`resolve`]: super::resolve

use std::cmp::Ordering;
use std::collections::VecDeque;
use std::sync::atomic::{AtomicUsize, Ordering as Memory};
use std::sync::{Mutex, PoisonError};

use replicator_common::id::ObjectId;
use replicator_common::name::Name;
use replicator_common::object::Kind;

use super::PlanError;
use super::dirty::{Listing, Rest};
use super::resolve::{Failure, Look, Place, Resolve, differs, entries_of};
use super::tree::{Listed, Tree};
use crate::index::{Page, View};

mod share;
#[cfg(test)]
mod tests;

use share::share;

/// Entries that are compared at once, about. (In tests few, here and below, so that trees
/// of a few dozen have them.)
const MANY: usize = if cfg!(test) { 12 } else { 16_384 };
/// Directories that are looked at for that, at most.
const DIRECTORIES: usize = 1024;
/// Entries of a directory that one thread compares before it looks for others.
const SOME: usize = if cfg!(test) { 2 } else { 512 };
/// Names of a directory that are compared at once, at most.
const PART: usize = if cfg!(test) { 6 } else { 8192 };

/// A part of a directory that is compared.
struct Part {
    listing: Listing,
    /// What is left of the listing after this part.
    rest: Option<Rest>,
    /// Every name, on the source or in the index.
    entries: Vec<Entry>,
    /// Where those stand that may turn out to be equal, in the order of objects.
    both: Vec<usize>,
}

struct Entry {
    name: Name,
    /// What the index has there, when the source has the name too and the entry
    /// may turn out to be equal.
    object: Option<ObjectId>,
}

/// What became of a listing.
enum Beside {
    Part(Part),
    /// There are too many names to list it beside others.
    Later,
    /// No directory, here or there: the entry that led here is dirty because of that.
    Nothing,
    Astray(Listing),
}

/// What became of some listings.
struct Laid {
    /// Of one at least.
    beside: Vec<Beside>,
    /// Those behind them.
    left: Vec<Listing>,
    /// Directories of which that is so because they have too many names.
    crowded: Vec<ObjectId>,
}

/// An entry that is as the index says: where it stands in its part, and its size.
type Equal = (usize, u64);

/// Compares the next part of the walk at the front of `listings`, and puts
/// there what of it must be looked at.
pub(super) fn survey<V: View, T: Tree>(
    state: &mut Resolve,
    listings: &mut VecDeque<Listing>,
    view: &V,
    tree: &T,
) -> Result<(), Failure<V, T>> {
    let mut parts = Vec::new();
    // Where the first are no directories any more, what is behind them is compared all the same.
    while parts.is_empty() {
        let work = Work { state, view, tree };
        let next = work.next(listings);
        if next.is_empty() {
            return Ok(());
        }
        let Laid { beside, left, crowded } = work.lay_beside(next)?;
        left.into_iter().rev().for_each(|listing| listings.push_front(listing));
        state.crowded.extend(crowded);
        for beside in beside {
            match beside {
                Beside::Part(part) => parts.push(part),
                Beside::Nothing | Beside::Later => {}
                Beside::Astray(listing) => state.astray.listing(listing),
            }
        }
    }
    let equal = Work { state, view, tree }.equal(&parts)?;
    for (part, equal) in parts.into_iter().zip(equal).rev() {
        state.looked += 1 + part.entries.len();
        state.listed.insert(part.listing.directory.clone());
        let Part { listing, rest, entries, .. } = part;
        if let Some(rest) = rest {
            listings.push_front(Listing { rest: Some(rest), ..listing.clone() });
        }
        let rest = Some(Rest::all(state.take_out(entries, &equal)));
        listings.push_front(Listing { rest, ..listing });
    }
    Ok(())
}

struct Work<'a, V, T> {
    state: &'a Resolve,
    view: &'a V,
    tree: &'a T,
}

impl<V: View, T: Tree> Work<'_, V, T> {
    /// Takes listings off the front that can be compared.
    fn next(&self, listings: &mut VecDeque<Listing>) -> Vec<Listing> {
        let compares = |listing: &mut Listing| {
            let whole = listing.rest.as_ref().is_none_or(|rest| !rest.is_each());
            listing.deep && whole && !self.state.fresh.contains(&listing.directory)
        };
        let mut next = Vec::new();
        while self.state.waiting.is_some() && next.len() < DIRECTORIES {
            let first = next.is_empty();
            let joins = |listing: &mut Listing| {
                compares(listing) && (first || !self.state.crowded.contains(&listing.directory))
            };
            let Some(listing) = listings.pop_front_if(joins) else { break };
            next.push(listing);
        }
        next
    }

    /// Lists directories until there are many entries.
    ///
    /// Memory: the names of one directory, however many, and of some others with
    /// [`PART`] at most each.
    fn lay_beside(&self, mut next: Vec<Listing>) -> Result<Laid, Failure<V, T>> {
        let (count, crowded) = (AtomicUsize::new(0), Mutex::new(Vec::new()));
        let found = share(next.len(), |at| {
            // Of the first whatever there is, or nobody would ever come to it.
            let most = if at == 0 { usize::MAX } else { PART };
            if at > 0 && count.load(Memory::Relaxed) >= MANY {
                return None;
            }
            let beside = self.beside(&next[at], most);
            match &beside {
                Ok(Beside::Later) => {
                    let mut crowded = crowded.lock().unwrap_or_else(PoisonError::into_inner);
                    crowded.push(next[at].directory.clone());
                    return None;
                }
                Ok(Beside::Part(part)) => {
                    count.fetch_add(1 + part.entries.len(), Memory::Relaxed);
                }
                Ok(Beside::Nothing | Beside::Astray(_)) | Err(_) => {}
            }
            Some(beside)
        });
        let left = next.split_off(found.len());
        let beside = found.into_iter().collect::<Result<_, _>>()?;
        let crowded = crowded.into_inner().unwrap_or_else(PoisonError::into_inner);
        Ok(Laid { beside, left, crowded })
    }

    /// The next part of a directory, which has `most` names at most: its names, here and
    /// there.
    fn beside(&self, listing: &Listing, most: usize) -> Result<Beside, Failure<V, T>> {
        let directory = &listing.directory;
        let kind = self.view.kind(directory).map_err(PlanError::Index)?;
        if kind != Some(Kind::Directory) {
            return Ok(Beside::Nothing);
        }
        let names = match &listing.rest {
            Some(rest) => rest.clone(),
            None => match self.tree.list(directory, most).map_err(PlanError::Tree)? {
                Listed::Names(mut names) => {
                    names.sort_unstable();
                    names.dedup();
                    Rest::to_compare(names)
                }
                Listed::Gone => return Ok(Beside::Nothing),
                Listed::Many => return Ok(Beside::Later),
                Listed::Away => return Ok(Beside::Astray(Listing::new(directory.clone(), true))),
            },
        };
        let page = self.view.page(directory, names.compared_to()).map_err(PlanError::Index)?;
        let (here, page) = align(names.names(), page);
        let rest = page.through.clone().map(|through| names.compared(here.len(), through));
        let mut entries = merge(here, page);
        if let Some(must_look) = self.state.must_look(directory) {
            let must_look = |entry: &&mut Entry| must_look(&entry.name);
            entries.iter_mut().filter(must_look).for_each(|entry| entry.object = None);
        }
        let mut both: Vec<usize> = (0..entries.len()).collect();
        both.retain(|at| entries[*at].object.is_some());
        both.sort_unstable_by(|one, other| entries[*one].object.cmp(&entries[*other].object));
        Ok(Beside::Part(Part { listing: listing.clone(), rest, entries, both }))
    }

    /// The equal entries of each part.
    fn equal(&self, parts: &[Part]) -> Result<Vec<Vec<Equal>>, Failure<V, T>> {
        let some = |(number, part): (usize, &'_ Part)| {
            (0..part.both.len()).step_by(SOME).map(move |from| (number, from))
        };
        let pieces: Vec<(usize, usize)> = parts.iter().enumerate().flat_map(some).collect();
        let found = share(pieces.len(), |at| {
            let (number, from) = pieces[at];
            let part = &parts[number];
            Some(self.compare(part, &part.both[from..part.both.len().min(from + SOME)]))
        });
        let mut equal = vec![Vec::new(); parts.len()];
        for ((number, _), found) in pieces.into_iter().zip(found) {
            equal[number].append(&mut found?);
        }
        Ok(equal)
    }

    /// Those of the entries at these places that are as the index says.
    fn compare(&self, part: &Part, places: &[usize]) -> Result<Vec<Equal>, Failure<V, T>> {
        let entries = places.iter().map(|at| (*at, &part.entries[*at]));
        let asked: Vec<(usize, &Name, &ObjectId)> = entries
            .filter_map(|(at, entry)| Some((at, &entry.name, entry.object.as_ref()?)))
            .collect();
        let objects: Vec<&ObjectId> = asked.iter().map(|(_, _, object)| *object).collect();
        let probe = self.tree.prober(&part.listing.directory);
        let mut equal = Vec::with_capacity(asked.len());
        let found = self.view.see_objects(&objects, &mut |n, known| {
            // Of directories, what is in them is walked, too. What has no entry is
            // an orphan that comes back (trap 3).
            let plain = |kind: Kind| matches!(kind, Kind::File | Kind::Symlink);
            let known = known.filter(|known| plain(known.state.kind) && known.entry.is_some());
            let (Some(known), (at, name, object)) = (known, asked[n]) else { return };
            let Some(stat) = probe(name, object) else { return };
            let differs = || differs(known, &stat, Look::Rescan, self.state.unproven);
            if stat.kind == known.state.kind && differs() == (false, false) {
                equal.push((at, known.state.size));
            }
        });
        found.map_err(PlanError::Index)?;
        Ok(equal)
    }
}

/// Cuts the names of the source and a page of the index's to the same stretch.
fn align(names: &[Name], mut page: Page) -> (&[Name], Page) {
    let within = match &page.through {
        Some(through) => names.partition_point(|name| name <= through),
        None => names.len(),
    };
    if within > PART
        && let (here, Some(last)) = (&names[..PART], names.get(PART - 1))
    {
        page.entries.retain(|(name, _)| name <= last);
        page.through = Some(last.clone());
        return (here, page);
    }
    (&names[..within], page)
}

/// Both, in order; with an object where both have the name.
fn merge(names: &[Name], page: Page) -> Vec<Entry> {
    let mut entries = Vec::with_capacity(names.len().max(page.entries.len()));
    let mut add = |name, object| entries.push(Entry { name, object });
    let mut names = names.iter().peekable();
    for (name, object) in page.entries {
        while let Some(here) = names.next_if(|here| **here < name) {
            add(here.clone(), None);
        }
        let both = names.next_if(|here| (*here).cmp(&name) == Ordering::Equal).is_some();
        add(name, both.then_some(object));
    }
    for here in names {
        add(here.clone(), None);
    }
    entries
}

impl Resolve {
    /// The names of the entries that are left without the equal ones, which are counted.
    fn take_out(&mut self, entries: Vec<Entry>, equal: &[Equal]) -> Vec<Name> {
        let mut gone = vec![false; entries.len()];
        for (at, size) in equal {
            gone[*at] = true;
            let object = entries[*at].object.as_ref();
            if !object.is_some_and(|object| self.asked.is_open(object)) {
                self.equal.0 += 1;
                self.equal.1 += size;
            }
        }
        let left = entries.into_iter().zip(gone).filter(|(_, gone)| !gone);
        left.map(|(entry, _)| entry.name).collect()
    }

    /// Whether an entry of the directory must be looked at by itself, however equal it is:
    /// something waits for that, or this batch has looked at it before. `None` where that
    /// is so of none.
    fn must_look<'a>(&'a self, directory: &'a ObjectId) -> Option<impl Fn(&Name) -> bool + 'a> {
        let place = move |name: &Name| -> Place { (directory.clone(), name.clone()) };
        let waiting = self.waiting.as_ref().filter(|places| !places.is_empty());
        // (The one of a tree's own root is nearly always there: `lost+found`.)
        let skipped = Some(&self.skipped).filter(|places| !places.is_empty());
        let bound = entries_of(&self.bindings, directory).next().map(|_| &self.bindings);
        let any = waiting.is_some() || skipped.is_some() || bound.is_some();
        any.then_some(move |name: &Name| {
            waiting.is_some_and(|places| places.contains(&place(name)))
                || skipped.is_some_and(|places| places.contains_key(&place(name)))
                || bound.is_some_and(|places| places.contains_key(&place(name)))
        })
    }
}
