//! When what waits (see [`super::Hold`]) waits no more, and whether an event is
//! of what is under way.

use std::collections::BTreeSet;

use foldhash::HashMap;
use replicator_common::id::ObjectId;
use replicator_common::name::Name;
use replicator_common::object::Kind;
use replicator_common::wire::ContentSource;

use super::assemble::Outcome;
use super::resolve::Resolve;
use crate::journal::Record;

/// Whether a batch has looked at an object that waits, with these `entries`, and
/// brings what it waited for, or found that nothing leads to it any more. Not
/// asked of what the batch itself leaves to wait.
pub fn is_through(
    object: &ObjectId,
    entries: &BTreeSet<(ObjectId, Name)>,
    resolve: &Resolve,
    outcomes: &HashMap<ObjectId, Outcome>,
) -> bool {
    let shipped = match outcomes.get(object) {
        // A directory waits for being listed, or for entries.
        Some(Outcome::Ship { known, .. } | Outcome::Same { known })
            if known.state.kind == Kind::Directory =>
        {
            entries.is_empty() && resolve.listed.contains(object)
        }
        Some(Outcome::Ship { .. } | Outcome::Same { .. } | Outcome::Gone) => {
            brings_content(object, resolve, outcomes)
        }
        _ => resolve.listed.contains(object) && entries.is_empty(),
    };
    // A directory that went from the replica and comes back is listed by what is in
    // it now: of a name that is no more nothing else will ever tell. (What is not
    // listed yet is looked at again when the hold is released.)
    let listed = |directory: &ObjectId| {
        resolve.fresh.contains(directory) && resolve.listed.contains(directory)
    };
    let elsewhere = |place: &(ObjectId, Name)| match resolve.bindings.get(place) {
        Some(binding) => binding.new.as_ref() != Some(object),
        None => listed(&place.0),
    };
    // (Of one that the replica has, content waits too.)
    let orphaned = !entries.is_empty()
        && !resolve.under_way.contains_key(object)
        && entries.iter().all(elsewhere);
    shipped || orphaned
}

/// Whether a batch brings the content of a file that waits for it, or found that there is
/// nothing to bring any more.
pub fn brings_content(
    object: &ObjectId,
    resolve: &Resolve,
    outcomes: &HashMap<ObjectId, Outcome>,
) -> bool {
    match outcomes.get(object) {
        // Attributes alone are not what it waits for.
        Some(Outcome::Ship { content: ContentSource::Packed { .. }, .. }) => true,
        Some(Outcome::Ship { .. } | Outcome::Same { .. }) => resolve.asked.wants_content(object),
        Some(Outcome::Gone) => true,
        _ => false,
    }
}

/// Whether an entry that waits for an object of the replica still does, once a batch has
/// looked at it: it leads there, or did before.
pub fn still_leads(object: &ObjectId, place: &(ObjectId, Name), resolve: &Resolve) -> bool {
    resolve.bindings.get(place).is_none_or(|binding| {
        binding.old.as_ref() == Some(object) || binding.new.as_ref() == Some(object)
    })
}

/// Whether a record says that content of an object may have changed which waits
/// with these `entries`. `known` is what the index has under the record's name,
/// if it tells one.
pub fn is_touched(
    record: &Record,
    object: &ObjectId,
    entries: &BTreeSet<(ObjectId, Name)>,
    known: Option<&ObjectId>,
) -> bool {
    match record {
        Record::Object { object: of, what } => what.content && of == object,
        Record::Named { directory, name, what } => {
            what.content
                && (known == Some(object) || entries.contains(&(directory.clone(), name.clone())))
        }
        Record::Entry { .. } | Record::Gap { .. } | Record::Barrier { .. } => false,
    }
}

#[cfg(test)]
mod tests {
    use super::super::resolve::Binding;
    use super::*;

    #[test]
    fn what_waits_in_a_directory_that_comes_back_without_it_waits_no_more() {
        let id = |n: u8| ObjectId::new(1, &[n]).unwrap();
        let name = |text: &str| Name::new(text.as_bytes()).unwrap();
        let (directory, file) = (id(1), id(2));
        let entries = BTreeSet::from([(directory.clone(), name("d"))]);
        let through = |resolve: &Resolve| is_through(&file, &entries, resolve, &HashMap::default());
        let mut resolve = Resolve::default();
        resolve.listed.insert(directory.clone());
        assert!(!through(&resolve), "known: its names come with events");
        resolve.fresh.insert(directory.clone());
        assert!(through(&resolve));
        let there = Binding { old: None, new: Some(file.clone()) };
        resolve.bindings.insert((directory.clone(), name("d")), there);
        assert!(!through(&resolve), "it is there");
    }
}
