//! Takes out of a walk what is as the index says, many entries at a time: one
//! look at the source and one row of the index each, in the order in which
//! disk and index hold them. What differs, or might, is left to [`resolve`],
//! which looks at it by itself, as if nobody had looked before.
//!
//! INVARIANT: an entry is taken out only if looking at it by itself would have
//! found nothing to do, and nobody waits to hear that it was looked at.
//!
//! [`resolve`]: super::resolve

use std::cmp::Ordering;
use std::collections::VecDeque;

use replicator_common::id::ObjectId;
use replicator_common::name::Name;
use replicator_common::object::Kind;

use super::PlanError;
use super::dirty::{Listing, Rest};
use super::resolve::{Failure, Look, Place, Resolve, differs, entries_of};
use super::tree::{Ask, Listed, Seen, Tree};
use crate::index::{Known, Page, View};

#[cfg(test)]
mod tests;

/// Entries that are compared at once, about.
const MANY: usize = 8192;

/// A part of a directory that is compared.
struct Part {
    listing: Listing,
    /// What is left of the listing after this part.
    rest: Option<Rest>,
    /// Every name, on the source or in the index.
    entries: Vec<Entry>,
}

struct Entry {
    name: Name,
    /// What the index has there, when the source has the name too and the entry
    /// may turn out to be equal.
    object: Option<ObjectId>,
    known: Option<Known>,
}

/// Compares the next part of the walk at the front of `listings`, and puts
/// there what of it must be looked at.
pub(super) fn survey<V: View, T: Tree>(
    state: &mut Resolve,
    listings: &mut VecDeque<Listing>,
    view: &V,
    tree: &mut T,
) -> Result<(), Failure<V, T>> {
    let mut parts = Vec::new();
    let mut count = 0;
    while count < MANY && state.waiting.is_some() {
        let next = listings.pop_front_if(|listing| {
            let compares = listing.rest.as_ref().is_none_or(|rest| !rest.is_each());
            listing.deep && compares && !state.fresh.contains(&listing.directory)
        });
        let Some(listing) = next else { break };
        if let Some(part) = part(state, listing, view, tree)? {
            count += 1 + part.entries.len();
            parts.push(part);
        }
    }
    if parts.is_empty() {
        return Ok(());
    }
    state.looked += count;
    know(&mut parts, view)?;
    take_out_equal(state, &mut parts, tree)?;
    for Part { listing, rest, entries } in parts.into_iter().rev() {
        if let Some(rest) = rest {
            listings.push_front(Listing { rest: Some(rest), ..listing.clone() });
        }
        let rest = Some(Rest::all(entries.into_iter().map(|entry| entry.name).collect()));
        listings.push_front(Listing { rest, ..listing });
    }
    Ok(())
}

/// The next part of a directory: its names, here and there.
fn part<V: View, T: Tree>(
    state: &mut Resolve,
    listing: Listing,
    view: &V,
    tree: &mut T,
) -> Result<Option<Part>, Failure<V, T>> {
    let directory = &listing.directory;
    let known = view.object(directory).map_err(PlanError::Index)?;
    if known.is_none_or(|known| known.state.kind != Kind::Directory) {
        return Ok(None);
    }
    let names = match &listing.rest {
        Some(rest) => rest.clone(),
        None => match tree.list(directory).map_err(PlanError::Tree)? {
            Listed::Names(mut names) => {
                names.sort_unstable();
                names.dedup();
                Rest::to_compare(names)
            }
            // The entry that led here is dirty because of that.
            Listed::Gone => return Ok(None),
            Listed::Away => {
                state.astray.listing(Listing::new(directory.clone(), true));
                return Ok(None);
            }
        },
    };
    state.listed.insert(directory.clone());
    let page = view.page(directory, names.compared_to()).map_err(PlanError::Index)?;
    let (here, page) = align(names.names(), page);
    let rest = page.through.clone().map(|through| names.compared(here.len(), through));
    let mut entries = merge(here, page);
    if state.may_have_to_look(directory) {
        for entry in entries.iter_mut().filter(|entry| entry.object.is_some()) {
            if state.must_look(directory, &entry.name) {
                entry.object = None;
            }
        }
    }
    Ok(Some(Part { listing, rest, entries }))
}

/// Cuts the names of the source and a page of the index's to the same stretch.
fn align(names: &[Name], mut page: Page) -> (&[Name], Page) {
    let within = match &page.through {
        Some(through) => names.partition_point(|name| name <= through),
        None => names.len(),
    };
    if within > MANY
        && let (here, Some(last)) = (&names[..MANY], names.get(MANY - 1))
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
    let mut add = |name, object| entries.push(Entry { name, object, known: None });
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

/// Asks the index for the objects, in its order.
fn know<V: View, E>(parts: &mut [Part], view: &V) -> Result<(), PlanError<V::Error, E>> {
    let entries = parts.iter_mut().flat_map(|part| &mut part.entries);
    let mut wanted: Vec<_> =
        entries.filter_map(|Entry { object, known, .. }| Some((object.clone()?, known))).collect();
    wanted.sort_unstable_by(|(one, _), (other, _)| one.cmp(other));
    let (objects, places): (Vec<_>, Vec<_>) = wanted.into_iter().unzip();
    let found = view.objects(&objects).map_err(PlanError::Index)?;
    for (place, found) in places.into_iter().zip(found) {
        // Of directories, what is in them is walked, too. What has no entry is
        // an orphan that comes back (trap 3).
        let plain = |known: &Known| matches!(known.state.kind, Kind::File | Kind::Symlink);
        *place = found.filter(|known| plain(known) && known.entry.is_some());
    }
    Ok(())
}

/// Looks at the entries whose objects are known, and takes out those that are
/// as the index says.
fn take_out_equal<V, T: Tree>(
    state: &mut Resolve,
    parts: &mut [Part],
    tree: &mut T,
) -> Result<(), PlanError<V, T::Error>> {
    let mut asks = Vec::new();
    for Part { listing, entries, .. } in parts.iter() {
        let directory = &listing.directory;
        let known = entries.iter().filter(|entry| entry.known.is_some());
        asks.extend(known.filter_map(|Entry { name, object, .. }| {
            object.as_ref().map(|object| Ask { directory, name, object })
        }));
    }
    let mut stats = tree.probe(&asks).map_err(PlanError::Tree)?.into_iter();
    drop(asks);
    let unproven = state.unproven;
    for part in parts {
        part.entries.retain_mut(|entry| {
            let (Some(known), Some(object)) = (&entry.known, &entry.object) else { return true };
            let Some(Some(stat)) = stats.next() else { return true };
            let seen = Seen { object: object.clone(), stat };
            let same_kind = seen.stat.kind == known.state.kind;
            if !same_kind || differs(known, &seen, Look::Rescan, unproven) != (false, false) {
                return true;
            }
            if !state.asked.is_open(object) {
                state.equal.0 += 1;
                state.equal.1 += known.state.size;
            }
            false
        });
    }
    Ok(())
}

impl Resolve {
    /// Whether some entry of the directory, perhaps, must be looked at by itself.
    fn may_have_to_look(&self, directory: &ObjectId) -> bool {
        let waiting = self.waiting.as_ref().is_none_or(|places| !places.is_empty());
        let before = || entries_of(&self.bindings, directory).next().is_some();
        waiting || !self.skipped.is_empty() || before()
    }

    /// Whether the entry must be looked at by itself, however equal it is:
    /// something waits for that, or this batch has looked at it before.
    fn must_look(&self, directory: &ObjectId, name: &Name) -> bool {
        let place: Place = (directory.clone(), name.clone());
        self.waiting.as_ref().is_none_or(|places| places.contains(&place))
            || self.bindings.contains_key(&place)
            || self.skipped.contains_key(&place)
    }
}
