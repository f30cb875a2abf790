//! Sealing: from a batch that has arrived to steps that can be logged.
//!
//! What needs no content from a data stream (directories, links, nodes) is made
//! in staging, so that every object has its handle before the batch is planned.

use std::os::fd::AsFd;

use foldhash::HashMapExt;
use replicator_common::id::ObjectId;
use replicator_common::name::Name;
use replicator_common::object::{Kind, ObjectState};
use replicator_common::sys::{handle, place, stat};
use replicator_common::wire::{
    APPENDED_BATCH_MAX, APPENDED_MAX, Appended, ContentSource, Hash, Op,
};
use rustix::fs::OFlags;
use rustix::io::Errno;

use crate::applier::Applier;
use crate::apply::plan::{self, Arrival, PlanError, Planned, Staged};
use crate::apply::{Place, Step, Within};
use crate::area::AreaError;
use crate::attributes::{self, Origin};
use crate::hints;
use crate::objects::{Objects, path_of};
use crate::replica::applier_staging;
use crate::session::{StagedTransfer, WholeBatch};
use crate::stage::probe_size;
use crate::store::{SetAsideItem, StoreError};

/// Why a batch was not sealed, or not applied.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SealError {
    #[error(transparent)]
    Area(#[from] AreaError),
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error("{0}")]
    Breach(String),
    /// These find no place in staging, the rest of the batch may.
    #[error("{} objects cannot be staged", .0.len())]
    Unplaceable(Vec<(ObjectId, String)>),
    /// What was written since the last good sync is in doubt (trap 16).
    #[error("the replica's file system could not be synced: {0}")]
    Sync(Errno),
    /// The one before it was given back: it comes again after that.
    #[error("the batch before this one was given back")]
    Skipped,
    /// By a test.
    #[error("killed")]
    Killed,
}

impl Applier {
    pub(crate) fn plan(&self, batch: &WholeBatch, staged: &Staged) -> Result<Planned, SealError> {
        let area = &self.replica.area;
        let planned = plan::plan(
            &self.replica.store.snapshot()?,
            batch.batch,
            batch.ops.clone(),
            staged,
            area.hidden_name(),
            area.root_handle(),
        );
        planned.map_err(|error| match error {
            PlanError::Violation(violation) => SealError::Breach(violation.to_string()),
            PlanError::Objects(error) => error.into(),
        })
    }

    /// The plan's steps, completed by what only the replica knows: times to be
    /// kept, and places for an applier that goes by path.
    pub(crate) fn steps(
        &mut self,
        batch: &WholeBatch,
        planned: &mut Planned,
    ) -> Result<Vec<Step>, SealError> {
        let mut steps = Vec::new();
        if !self.replica.abilities.handles {
            let root = self.replica.area.root_handle();
            steps = hints::hints(&*self.replica.store, root, batch.batch, &batch.ops)?;
        }
        steps.append(&mut planned.steps);
        self.tree.learn(&steps);
        self.check_adoptions(&batch.ops)?;
        for object in &planned.touched {
            if let Some(fd) = self.tree.open(object, OFlags::PATH)? {
                let stat = stat::of_fd(&fd).map_err(AreaError::system("stat", object))?;
                steps.push(Step::Mtime { object: object.clone(), mtime: stat.mtime });
            }
        }
        Ok(steps)
    }

    pub(crate) fn set_aside_items(&self, planned: &Planned) -> Vec<SetAsideItem> {
        let item = |(object, name): &(ObjectId, Name)| SetAsideItem {
            file: name.to_string(),
            object: object.to_string(),
            path: path_of(&*self.replica.store, object).ok().flatten().map(|n| join(&n)),
            reason: "the replica had it and the source does not".to_owned(),
        };
        planned.set_aside.iter().map(item).collect()
    }

    /// Stages what needs no content from a data stream.
    pub(crate) fn stage_rest(&mut self, batch: &WholeBatch) -> Result<Staged, SealError> {
        let mut staged = stage_arrived(batch)?;
        check_all_appended(&batch.ops)?;
        let adopted = self.replica.nests.adopt(batch, &staged);
        let mut unplaceable = Vec::new();
        for (number, op) in batch.ops.iter().enumerate() {
            let Op::Put { object, state, content, new, .. } = op else { continue };
            if batch.content.contains_key(object) {
                continue;
            }
            if let Some(nest) = adopted.get(object) {
                staged.insert(object.clone(), self.nest_arrival(nest)?);
                continue;
            }
            if let ContentSource::Appended(appended) = content {
                check_appended(object, state, *new, appended)?;
                match self.appended(object, state, appended) {
                    Ok(Some(arrival)) => drop(staged.insert(object.clone(), arrival)),
                    Ok(None) => {
                        let reason = "what it was appended to is not here";
                        unplaceable.push((object.clone(), reason.to_owned()));
                    }
                    Err(SealError::Area(error)) if error.is_of_one_object() => {
                        unplaceable.push((object.clone(), error.to_string()));
                    }
                    Err(error) => return Err(error),
                }
                continue;
            }
            let made = match content {
                ContentSource::Symlink { target } => Some(target.as_slice()),
                ContentSource::Unchanged if *new => None,
                _ => continue,
            };
            let name = made_name(batch, number)?;
            let room = self.replica.slack.restore();
            let made = match room {
                Ok(()) => self.make(object, state, made, &name),
                Err(error) => Err(AreaError::no_slack(&error).into()),
            };
            match made {
                Ok(arrival) => drop(staged.insert(object.clone(), arrival)),
                Err(SealError::Area(error)) if error.is_of_one_object() => {
                    unplaceable.push((object.clone(), error.to_string()));
                }
                Err(error) => return Err(error),
            }
        }
        if unplaceable.is_empty() { Ok(staged) } else { Err(SealError::Unplaceable(unplaceable)) }
    }

    /// What is to be appended to an object; `None` when what it follows is not here (trap 5).
    ///
    /// INVARIANT: what cannot be appended is found out before it is logged.
    fn appended(
        &mut self,
        object: &ObjectId,
        state: &ObjectState,
        appended: &Appended,
    ) -> Result<Option<Arrival>, SealError> {
        let known = self.replica.store.get(object)?;
        if known.is_none_or(|known| known.content != appended.basis) {
            return Ok(None);
        }
        let slack = self.replica.slack.restore_for(APPENDED_BATCH_MAX);
        slack.map_err(|error| AreaError::no_slack(&error))?;
        self.probe_size(state.size)?;
        let bytes = appended.bytes.clone();
        Ok(Some(Arrival::Append { at: state.size - bytes.len() as u64, bytes }))
    }

    /// Whether the replica's file system holds a file of that size.
    fn probe_size(&mut self, size: u64) -> Result<(), AreaError> {
        if size <= self.holds {
            return Ok(());
        }
        let directory = self.replica.area.staging(crate::replica::APPLIER_SHARD);
        let name = Name::new(b"size").unwrap_or_else(|_| unreachable!("a plain word"));
        crate::area::remove_tree(directory, &name)?;
        let probe =
            place::create_file(directory, &name).map_err(AreaError::system("create", &name))?;
        let holds = probe_size(&probe, &name, size);
        crate::area::remove_tree(directory, &name)?;
        self.holds = self.holds.max(holds?);
        Ok(())
    }

    /// A directory whose files stand in it already.
    fn nest_arrival(&self, nest: &Place) -> Result<Arrival, SealError> {
        let Within::Staging(shard) = nest.within else {
            return Err(AreaError::system("open", &nest.name)(Errno::INVAL).into());
        };
        let found = handle::identify_entry(self.replica.area.staging(shard), &nest.name)
            .map_err(AreaError::system("identify", &nest.name))?;
        // It gets its attributes last: names are still put into it.
        Ok(Arrival::Whole { place: nest.clone(), handle: found, state: None })
    }

    /// Removes what [`Self::stage_rest`] made. What stays is removed when the
    /// next session begins.
    pub(crate) fn discard_rest(&self, batch: &WholeBatch) {
        let directory = self.replica.area.staging(crate::replica::APPLIER_SHARD);
        for (number, op) in batch.ops.iter().enumerate() {
            if let Op::Put { new: true, .. } = op
                && let Ok(name) = made_name(batch, number)
            {
                let _ = crate::area::remove_tree(directory, &name);
            }
        }
    }

    fn make(
        &mut self,
        object: &ObjectId,
        state: &ObjectState,
        target: Option<&[u8]>,
        name: &Name,
    ) -> Result<Arrival, SealError> {
        let area = self.replica.area.clone();
        let directory = area.staging(crate::replica::APPLIER_SHARD);
        // Of an attempt before this one.
        crate::area::remove_tree(directory, name)?;
        let made = match (state.kind, target) {
            (Kind::Directory, None) => place::make_directory(directory, name),
            (Kind::Symlink, Some(target)) if valid_target(target) => {
                place::make_symlink(target, directory, name)
            }
            (Kind::BlockDevice | Kind::CharDevice, None) => {
                match place::make_device(directory, name, state.kind, state.rdev) {
                    Err(error @ (Errno::PERM | Errno::ACCESS | Errno::NOTSUP | Errno::INVAL)) => {
                        let shortfalls = &mut self.tree.shortfalls;
                        shortfalls.devices += 1;
                        let what = format!("device: {error}");
                        attributes::example(&mut shortfalls.examples, object.to_string(), what);
                        return Ok(Arrival::Absent);
                    }
                    made => made,
                }
            }
            (Kind::File, None) if state.size == 0 => place::create_file(directory, name).map(drop),
            _ => {
                let what = format!("object {object}: content and kind do not fit together");
                return Err(SealError::Breach(what));
            }
        };
        made.map_err(AreaError::system("create", name))?;
        let fd = place::open_path(directory, name).map_err(AreaError::system("open", name))?;
        let found = handle::identify(fd.as_fd()).map_err(AreaError::system("identify", name))?;
        let place = Place { within: applier_staging(), name: name.clone() };
        // A directory gets its attributes last: names are still put into it.
        let state = if state.kind == Kind::Directory {
            None
        } else {
            let shortfalls = &mut self.tree.shortfalls;
            attributes::apply(fd.as_fd(), state, Origin::Ours, shortfalls, &|| object.to_string())
                .map_err(AreaError::system("set attributes of", name))?;
            Some(state.clone())
        };
        Ok(Arrival::Whole { place, handle: found, state })
    }
}

/// What the `number`th object of a batch is called while it is staged.
fn made_name(batch: &WholeBatch, number: usize) -> Result<Name, SealError> {
    let name = format!("d{}.{number}", batch.batch);
    Name::new(name.as_bytes()).map_err(|e| SealError::Breach(e.to_string()))
}

fn valid_target(target: &[u8]) -> bool {
    (1..=4095).contains(&target.len()) && !target.contains(&0)
}

/// The steps of one batch have room when all else is full: see [`crate::reserve`].
fn check_all_appended(ops: &[Op]) -> Result<(), SealError> {
    let appended = ops.iter().map(|op| match op {
        Op::Put { content: ContentSource::Appended(appended), .. } => appended.bytes.len() as u64,
        _ => 0,
    });
    match appended.sum::<u64>() <= APPENDED_BATCH_MAX {
        true => Ok(()),
        false => Err(SealError::Breach("too much is appended by one batch".to_owned())),
    }
}

fn check_appended(
    object: &ObjectId,
    state: &ObjectState,
    new: bool,
    appended: &Appended,
) -> Result<(), SealError> {
    let length = appended.bytes.len() as u64;
    let size = i64::try_from(state.size).is_ok() && length <= state.size.min(APPENDED_MAX);
    let fits = !new && state.kind == Kind::File && size;
    let what = match fits {
        false => "what is appended does not fit",
        true if Hash::of(&appended.bytes) != appended.hash => "wrong hash",
        true => return Ok(()),
    };
    Err(SealError::Breach(format!("object {object}: {what}")))
}

/// What came by data streams.
fn stage_arrived(batch: &WholeBatch) -> Result<Staged, SealError> {
    let mut staged = Staged::with_capacity(batch.content.len());
    for op in &batch.ops {
        let Op::Put { object, new, .. } = op else { continue };
        if let Some(arrived) = batch.content.get(object) {
            staged.insert(object.clone(), arrival(arrived, *new)?);
        }
    }
    Ok(staged)
}

fn arrival(staged: &StagedTransfer, new: bool) -> Result<Arrival, SealError> {
    match staged {
        StagedTransfer::Whole(file) => Ok(Arrival::Whole {
            place: file.place.clone(),
            handle: file.handle.clone(),
            state: Some(file.state.clone()),
        }),
        StagedTransfer::Patch { .. } if new => {
            Err(SealError::Breach("a new object cannot be patched".to_owned()))
        }
        StagedTransfer::Patch { literals, list, .. } => {
            Ok(Arrival::Patch { literals: literals.clone(), list: list.clone() })
        }
    }
}

pub(crate) fn staged_bytes(staged: &StagedTransfer) -> u64 {
    match staged {
        StagedTransfer::Whole(file) => file.bytes,
        StagedTransfer::Patch { bytes, .. } => *bytes,
    }
}

/// Staged files that a step reads.
pub fn needed_by(step: &Step) -> Vec<Place> {
    match step {
        Step::Rewrite { from, .. } => vec![from.clone()],
        Step::Patch { literals, list, .. } => vec![literals.clone(), list.clone()],
        _ => Vec::new(),
    }
}

/// Names as a path relative to the replica.
pub fn join(names: &[Name]) -> String {
    names.iter().map(ToString::to_string).collect::<Vec<_>>().join("/")
}
