//! Runs steps against a replica.

use std::fmt;

use replicator_common::id::ReplicaHandle;
use replicator_common::pulse;

use super::{Outcome, Place, ReplicaTree, Step, Within};

/// Something that was not as it must be; the step did what was safe and the
/// batch went on. Never silent: status shows it and the replica is reconciled.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Finding {
    /// An object that the plan does not know stood in the way; it is in
    /// lost+found now.
    SetAside {
        /// The object.
        object: ReplicaHandle,
        /// Where it stood.
        from: Place,
        /// Where it is.
        to: Place,
    },
    /// An object that a step needs is neither where it was nor where it is to be.
    Lost {
        /// The object.
        object: ReplicaHandle,
        /// Where it was expected.
        expected: Place,
    },
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::SetAside { from, .. } => {
                write!(f, "{} was not expected in the replica and is in lost+found", from.name)
            }
            Self::Lost { object, expected } => write!(
                f,
                "object {object} is missing in the replica, expected as {}",
                expected.name
            ),
        }
    }
}

/// Runs all steps in order. `findings` collects what was not as expected.
///
/// # Errors
/// The first error of the tree; what was done stays, and running the same
/// steps again from the start finishes the work.
pub fn run<T: ReplicaTree>(
    tree: &mut T,
    steps: &[Step],
    findings: &mut Vec<Finding>,
) -> Result<(), T::Error> {
    steps.iter().try_for_each(|step| {
        pulse::beat();
        one(tree, step, findings)
    })
}

fn one<T: ReplicaTree>(
    tree: &mut T,
    step: &Step,
    findings: &mut Vec<Finding>,
) -> Result<(), T::Error> {
    match step {
        Step::Move { object, from, to, over } => {
            relocate(tree, object, from, to, over.as_ref(), findings)
        }
        Step::Link { object, to, over, spare } => {
            link(tree, object, to, over.as_ref(), spare, findings)
        }
        Step::Unlink { object, at } => {
            if tree.lookup(at)?.as_ref() == Some(object) {
                tree.unlink(at)?;
            }
            Ok(())
        }
        Step::RemoveDirectory { object, at } => remove_directory(tree, object, at, findings),
        Step::Rewrite { object, from } => {
            let outcome = tree.rewrite(object, from)?;
            note_lost(outcome, object, from, findings);
            Ok(())
        }
        Step::Patch { object, literals, list, size } => {
            let outcome = tree.patch(object, literals, list, *size)?;
            note_lost(outcome, object, literals, findings);
            Ok(())
        }
        Step::Append { object, at, bytes } => {
            let outcome = tree.append(object, *at, bytes)?;
            note_lost(outcome, object, &Place::lost(object), findings);
            Ok(())
        }
        // An object that is gone by now needs no attributes: whatever lost it
        // has been found by the step that needed it in its place.
        Step::Attributes { object, state } => tree.set_attributes(object, state).map(drop),
        Step::Mtime { object, mtime } => tree.set_mtime(object, *mtime).map(drop),
        Step::Hint { .. } => Ok(()),
    }
}

fn note_lost(
    outcome: Outcome,
    object: &ReplicaHandle,
    expected: &Place,
    findings: &mut Vec<Finding>,
) {
    if outcome != Outcome::Done {
        findings.push(Finding::Lost { object: object.clone(), expected: expected.clone() });
    }
}

fn relocate<T: ReplicaTree>(
    tree: &mut T,
    object: &ReplicaHandle,
    from: &Place,
    to: &Place,
    over: Option<&ReplicaHandle>,
    findings: &mut Vec<Finding>,
) -> Result<(), T::Error> {
    // What waits in our own area under its own name is what we put there, and
    // a rename that does not replace cannot harm: no look is needed first.
    // This is every new file, hence worth it.
    if from.is_private() && over.is_none() && tree.rename(from, to, false)? == Outcome::Done {
        return Ok(());
    }
    if tree.lookup(to)?.as_ref() == Some(object) {
        return Ok(());
    }
    if tree.lookup(from)?.as_ref() != Some(object) {
        // A detaching step that finds its object gone: it was done before, and
        // the steps behind it went on. An attaching one has lost its object.
        if to.within != Within::Orphans {
            findings.push(Finding::Lost { object: object.clone(), expected: from.clone() });
        }
        return Ok(());
    }
    let replace = clear(tree, to, over, findings)?;
    let outcome = tree.rename(from, to, replace)?;
    note_lost(outcome, object, to, findings);
    Ok(())
}

/// Makes sure that only `over` stands at `to`; says whether it does.
fn clear<T: ReplicaTree>(
    tree: &mut T,
    to: &Place,
    over: Option<&ReplicaHandle>,
    findings: &mut Vec<Finding>,
) -> Result<bool, T::Error> {
    match tree.lookup(to)? {
        None => Ok(false),
        Some(found) if Some(&found) == over => Ok(true),
        Some(found) => {
            set_aside(tree, found, to, findings)?;
            Ok(false)
        }
    }
}

fn set_aside<T: ReplicaTree>(
    tree: &mut T,
    object: ReplicaHandle,
    from: &Place,
    findings: &mut Vec<Finding>,
) -> Result<(), T::Error> {
    let to = Place::lost(&object);
    // An object of several names may be there already: rename between two
    // names of one object does nothing, so the name is removed instead.
    if tree.lookup(&to)?.as_ref() == Some(&object) {
        tree.unlink(from)?;
    } else {
        tree.rename(from, &to, false)?;
    }
    findings.push(Finding::SetAside { object, from: from.clone(), to });
    Ok(())
}

fn link<T: ReplicaTree>(
    tree: &mut T,
    object: &ReplicaHandle,
    to: &Place,
    over: Option<&ReplicaHandle>,
    spare: &Place,
    findings: &mut Vec<Finding>,
) -> Result<(), T::Error> {
    if tree.lookup(to)?.as_ref() == Some(object) {
        // A crash may have come between link and rename of an earlier run.
        if over.is_some() && tree.lookup(spare)?.is_some() {
            tree.unlink(spare)?;
        }
        return Ok(());
    }
    let replace = clear(tree, to, over, findings)?;
    let outcome = if replace {
        match tree.link(object, spare)? {
            Outcome::Missing => Outcome::Missing,
            _ => tree.rename(spare, to, true)?,
        }
    } else {
        tree.link(object, to)?
    };
    note_lost(outcome, object, to, findings);
    Ok(())
}

fn remove_directory<T: ReplicaTree>(
    tree: &mut T,
    object: &ReplicaHandle,
    at: &Place,
    findings: &mut Vec<Finding>,
) -> Result<(), T::Error> {
    if tree.lookup(at)?.as_ref() != Some(object) {
        return Ok(());
    }
    if tree.remove_directory(at)? != Outcome::NotEmpty {
        return Ok(());
    }
    // What the plan does not know of is not ours to delete.
    for name in tree.list(object)? {
        let place = Place { within: Within::Replica(object.clone()), name };
        if let Some(found) = tree.lookup(&place)? {
            set_aside(tree, found, &place, findings)?;
        }
    }
    tree.remove_directory(at).map(drop)
}
