//! Arrivals: what most of an initial sync, and of most batches, is made of.
//!
//! A new object that stands complete in staging, gets exactly one entry where
//! there was none, and is named by nothing else in the batch, shares its slot
//! and its inode with no other operation. Its whole plan is one rename, so it
//! is kept out of the planner's maps, which cost more than the rename does.
//!
//! One that stands in a nest already, under its name, beside nothing else but the
//! like of it, needs no step at all when the nest becomes its directory
//! ([`crate::nest`]).
//!
//! INVARIANT: an arrival depends on no other step but the existence of its
//! directory, which is staged or in the replica before the first step is run;
//! and no other step depends on an arrival. So it may stand anywhere among the
//! steps that attach what is no directory.

use foldhash::{HashMap, HashMapExt, HashSet, HashSetExt};
use replicator_common::id::{ObjectId, ReplicaHandle};
use replicator_common::name::Name;
use replicator_common::object::Kind;
use replicator_common::wire::Op;

use super::plan::{Arrival, PlanError, Planner, Staged, Violation};
use super::slots::{Fate, Parts};
use super::{Place, Step, Within};
use crate::objects::{Entry, Known, Objects, Position};

/// One arrival.
#[derive(Clone, Debug)]
pub(super) struct Arrived {
    pub(super) object: ObjectId,
    pub(super) kind: Kind,
    /// Where it gets its name.
    pub(super) entry: Entry,
    /// The staged object.
    handle: ReplicaHandle,
    /// Where it was staged.
    place: Place,
}

/// How a batch uses an object.
#[derive(Default)]
struct Uses {
    /// Complete puts of a new object, and entries where nothing was.
    puts: u32,
    entries: u32,
    /// Anything else.
    other: bool,
}

/// Takes the arrivals out of a batch; what is left is planned as ever.
pub(super) fn split(ops: Vec<Op>, staged: &Staged) -> (Vec<Arrived>, Vec<Op>) {
    let simple = simple(&ops, staged);
    if simple.is_empty() {
        return (Vec::new(), ops);
    }
    let mut arrivals = Vec::with_capacity(simple.len());
    let mut rest = Vec::new();
    for op in ops {
        match op {
            Op::Put { ref object, .. } if simple.contains(object) => {}
            Op::Entry { directory, name, old: None, new: Some(object) }
                if simple.contains(&object) =>
            {
                // A simple object has been found staged, see `complete`.
                if let Some(Arrival::Whole { place, handle, state: Some(state) }) =
                    staged.get(&object)
                {
                    let (handle, place) = (handle.clone(), place.clone());
                    let entry = Entry { directory, name };
                    arrivals.push(Arrived { object, kind: state.kind, entry, handle, place });
                }
            }
            op => rest.push(op),
        }
    }
    (arrivals, rest)
}

/// Calls `each` with every arrival's directory and name, and with where it was staged.
pub(crate) fn each<'a>(
    ops: &'a [Op],
    staged: &'a Staged,
    mut each: impl FnMut((&'a ObjectId, &'a Name), &'a Place),
) {
    let simple = simple(ops, staged);
    for op in ops {
        if let Op::Entry { directory, name, old: None, new: Some(object) } = op
            && simple.contains(object)
            && let Some(Arrival::Whole { place, .. }) = staged.get(object)
        {
            each((directory, name), place);
        }
    }
}

fn simple(ops: &[Op], staged: &Staged) -> HashSet<ObjectId> {
    let mut uses: HashMap<&ObjectId, Uses> = HashMap::with_capacity(ops.len() / 2);
    let mut places: HashSet<(&ObjectId, &Name)> = HashSet::with_capacity(ops.len() / 2);
    for op in ops {
        match op {
            Op::Put { object, .. } => {
                let complete = complete(op, staged);
                let uses = uses.entry(object).or_default();
                uses.puts += 1;
                uses.other |= !complete;
            }
            Op::Entry { directory, name, old, new } => {
                // A place named twice is a violation, which the planner tells.
                let free = old.is_none() && places.insert((directory, name));
                uses.entry(directory).or_default().other = true;
                for object in [old, new].into_iter().flatten() {
                    let uses = uses.entry(object).or_default();
                    uses.entries += 1;
                    uses.other |= !free;
                }
            }
            Op::Drop { object }
            | Op::Orphan { object }
            | Op::Leave { object }
            | Op::SetAside { object }
            | Op::Root { object }
            | Op::Adopt { object, .. } => uses.entry(object).or_default().other = true,
        }
    }
    let simple =
        uses.iter().filter(|(_, uses)| (uses.puts, uses.entries, uses.other) == (1, 1, false));
    simple.map(|(object, _)| (*object).clone()).collect()
}

/// Whether a put is of a new object, no directory, whose staged file needs
/// nothing but its name.
fn complete(put: &Op, staged: &Staged) -> bool {
    let Op::Put { object, state, new: true, links: 1, .. } = put else { return false };
    let arrived = staged.get(object);
    matches!(arrived, Some(Arrival::Whole { state: Some(as_staged), .. }) if as_staged == state)
        && state.kind != Kind::Directory
}

impl<O: Objects> Parts<'_, O> {
    /// The same promises that [`Parts::check`] asks of the rest.
    pub(super) fn check_arrivals(
        &mut self,
        arrivals: &[Arrived],
        reserved: &Name,
    ) -> Result<(), PlanError<O::Error>> {
        let mut checked: Option<&ObjectId> = None;
        for Arrived { object, entry, .. } in arrivals {
            if self.objects.get(object).map_err(PlanError::Objects)?.is_some() {
                return Err(Violation::NotNew { object: object.clone() }.into());
            }
            let directory = &entry.directory;
            if checked != Some(directory) {
                self.check_holder(directory)?;
                checked = Some(directory);
            }
            if entry.name == *reserved && self.is_root(directory)? {
                return Err(Violation::Reserved { name: entry.name.clone() }.into());
            }
        }
        Ok(())
    }

    /// Whether a directory may get an entry.
    fn check_holder(&mut self, directory: &ObjectId) -> Result<(), PlanError<O::Error>> {
        let object = directory.clone();
        match self.kind(directory)? {
            None => Err(Violation::Unknown { object }.into()),
            Some(Kind::Directory) if self.fates.get(directory) == Some(&Fate::Drop) => {
                Err(Violation::IntoDropped { object }.into())
            }
            Some(Kind::Directory) => Ok(()),
            Some(_) => Err(Violation::NotDirectory { object }.into()),
        }
    }

    /// Where an object was staged, if it is new and stands there.
    fn staged_at(&self, object: &ObjectId) -> Option<&Place> {
        match self.staged.get(object) {
            Some(Arrival::Whole { place, .. }) => Some(place),
            _ => None,
        }
    }

    fn is_root(&mut self, directory: &ObjectId) -> Result<bool, PlanError<O::Error>> {
        Ok(self.known(directory)?.is_some_and(|known| known.position == Position::Root))
    }
}

impl<O: Objects> Planner<'_, O> {
    /// Attaches all arrivals, and notes their rows.
    pub(super) fn attach_arrivals(&mut self) -> Result<(), PlanError<O::Error>> {
        let arrivals = std::mem::take(&mut self.parts.arrivals);
        self.out.steps.reserve(arrivals.len());
        self.out.rows.reserve(arrivals.len());
        let mut holder: Option<(ObjectId, ReplicaHandle, Option<Place>)> = None;
        for Arrived { object, kind, entry, handle, place } in arrivals {
            let (within, staged) = match &holder {
                Some((directory, within, staged)) if *directory == entry.directory => {
                    (within.clone(), staged)
                }
                _ => {
                    let directory = entry.directory.clone();
                    let Some(within) = self.parts.handle_after(&directory)? else {
                        return Err(Violation::Unknown { object: directory }.into());
                    };
                    self.parts.touched.insert(directory.clone());
                    let staged = self.parts.staged_at(&directory).cloned();
                    let (_, _, staged) = holder.insert((directory, within.clone(), staged));
                    (within, &*staged)
                }
            };
            let nested = staged.as_ref().is_some_and(|nest| place.is_in(nest));
            if !(nested && place.name == entry.name) {
                let to = Place { within: Within::Replica(within), name: entry.name.clone() };
                let step = Step::Move { object: handle.clone(), from: place, to, over: None };
                self.out.steps.push(step);
            }
            let (position, content) = (Position::Entry(entry), self.parts.batch);
            let row = Known { handle: Some(handle), kind, position, links: 1, content };
            self.out.rows.push((object, Some(row)));
        }
        Ok(())
    }
}
