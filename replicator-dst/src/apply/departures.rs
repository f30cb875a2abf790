//! Departures: what most of a mass deletion is made of.
//!
//! An object of one name that loses it and is dropped, and that nothing else in
//! the batch names, shares its slot and its inode with no other operation, as an
//! arrival does (see [`super::arrivals`]). Its whole plan is one unlink.
//!
//! INVARIANT: a departure depends on no other step, since its directory is opened
//! by its handle, wherever it stands; and what takes its directory away, or puts
//! something else in the way of it, comes after all departures.

use foldhash::{HashMap, HashMapExt};
use replicator_common::id::{ObjectId, ReplicaHandle};
use replicator_common::name::Name;
use replicator_common::object::Kind;
use replicator_common::wire::Op;

use super::plan::{PlanError, Planner, Violation};
use super::slots::Parts;
use super::{Place, Step, Within};
use crate::objects::{Entry, Known, Objects, Position};

/// One departure.
#[derive(Clone, Debug)]
pub(super) struct Departed {
    object: ObjectId,
    /// Where it loses its name.
    entry: Entry,
    handle: ReplicaHandle,
}

/// The departures of a batch, and the rest of it.
type Split = (Vec<Departed>, Vec<Op>);

/// How a batch uses an object.
#[derive(Default)]
struct Uses<'a> {
    drops: u32,
    /// How many names it loses that nothing else gets, and the last of them.
    leaves: u32,
    left: Option<(&'a ObjectId, &'a Name)>,
    /// Anything else.
    other: bool,
}

/// Takes the departures out of a batch; what is left is planned as ever.
pub(super) fn split<O: Objects>(ops: Vec<Op>, objects: &O) -> Result<Split, PlanError<O::Error>> {
    if !ops.iter().any(|op| matches!(op, Op::Drop { .. })) {
        return Ok((Vec::new(), ops));
    }
    let mut departed = HashMap::new();
    for (object, directory, name) in candidates(&ops) {
        let row = objects.get(object).map_err(PlanError::Objects)?;
        let Some(handle) = row.and_then(|row| only_there(row, directory, name)) else { continue };
        let entry = Entry { directory: directory.clone(), name: name.clone() };
        let departure = Departed { object: object.clone(), entry, handle };
        departed.insert(object.clone(), departure);
    }
    let rest = ops.into_iter().filter(|op| match op {
        Op::Drop { object } | Op::Entry { old: Some(object), .. } => !departed.contains_key(object),
        _ => true,
    });
    let rest = rest.collect();
    let mut departed: Vec<_> = departed.into_values().collect();
    departed.sort_by(|a, b| a.entry.cmp(&b.entry));
    Ok((departed, rest))
}

/// What is dropped and loses one name, and is named by nothing else.
fn candidates(ops: &[Op]) -> Vec<(&ObjectId, &ObjectId, &Name)> {
    let mut uses: HashMap<&ObjectId, Uses<'_>> = HashMap::with_capacity(ops.len() / 2);
    // A place named twice is a violation, which the planner tells.
    let mut places: HashMap<(&ObjectId, &Name), u32> = HashMap::with_capacity(ops.len() / 2);
    for op in ops {
        match op {
            Op::Entry { directory, name, old, new } => {
                *places.entry((directory, name)).or_default() += 1;
                uses.entry(directory).or_default().other = true;
                match (old, new) {
                    (Some(old), None) => {
                        let uses = uses.entry(old).or_default();
                        uses.leaves += 1;
                        uses.left = Some((directory, name));
                    }
                    _ => {
                        for object in [old, new].into_iter().flatten() {
                            uses.entry(object).or_default().other = true;
                        }
                    }
                }
            }
            Op::Drop { object } => uses.entry(object).or_default().drops += 1,
            Op::Put { object, .. }
            | Op::Orphan { object }
            | Op::Leave { object }
            | Op::SetAside { object }
            | Op::Root { object }
            | Op::Adopt { object, .. } => uses.entry(object).or_default().other = true,
        }
    }
    let simple = uses.into_iter().filter_map(|(object, uses)| {
        let (directory, name) = uses.left?;
        let simple = (uses.drops, uses.leaves, uses.other) == (1, 1, false)
            && places.get(&(directory, name)) == Some(&1);
        simple.then_some((object, directory, name))
    });
    let mut simple: Vec<_> = simple.collect();
    // The order of the map.
    simple.sort_unstable();
    simple
}

/// The replica's object of a row, if it is no directory and stands under this name
/// alone.
fn only_there(row: Known, directory: &ObjectId, name: &Name) -> Option<ReplicaHandle> {
    let Position::Entry(entry) = &row.position else { return None };
    let there = entry.directory == *directory && entry.name == *name;
    let simple = there && row.links == 1 && row.kind != Kind::Directory;
    row.handle.filter(|_| simple)
}

impl<O: Objects> Parts<'_, O> {
    /// The same promises that [`Parts::check`] asks of the rest, as far as the map
    /// does not keep them.
    pub(super) fn check_departures(
        &mut self,
        departures: &[Departed],
    ) -> Result<(), PlanError<O::Error>> {
        let mut checked: Option<&ObjectId> = None;
        for Departed { entry: Entry { directory, .. }, .. } in departures {
            if checked == Some(directory) {
                continue;
            }
            let object = directory.clone();
            match self.kind(directory)? {
                None => return Err(Violation::Unknown { object }.into()),
                Some(Kind::Directory) => checked = Some(directory),
                Some(_) => return Err(Violation::NotDirectory { object }.into()),
            }
        }
        Ok(())
    }
}

impl<O: Objects> Planner<'_, O> {
    /// Unlinks all departures, and notes that their rows go.
    pub(super) fn detach_departures(&mut self) -> Result<(), PlanError<O::Error>> {
        let departures = std::mem::take(&mut self.parts.departures);
        self.out.steps.reserve(departures.len());
        self.out.rows.reserve(departures.len());
        let mut holder: Option<(ObjectId, ReplicaHandle)> = None;
        for Departed { object, entry: Entry { directory, name }, handle } in departures {
            let within = match &holder {
                Some((last, within)) if *last == directory => within.clone(),
                _ => {
                    let Some(within) = self.parts.handle_after(&directory)? else {
                        return Err(Violation::Unknown { object: directory }.into());
                    };
                    self.parts.touched.insert(directory.clone());
                    holder = Some((directory, within.clone()));
                    within
                }
            };
            let at = Place { within: Within::Replica(within), name };
            self.out.steps.push(Step::Unlink { object: handle, at });
            self.out.rows.push((object, None));
        }
        Ok(())
    }
}
