//! What a batch places of large files and holds, and what it leaves to wait.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::os::fd::AsFd;
use std::time::Instant;

use replicator_common::id::ObjectId;
use replicator_common::name::Name;
use replicator_common::object::{Attributes, Kind};
use replicator_common::time::Timestamp;
use replicator_common::wire::ContentSource;

use super::build::{Draft, Placed};
use super::held::{ReadyFile, Transfer};
use super::tails::Tail;
use super::{Engine, EngineError};
use crate::index::View;
use crate::plan::waits::{is_through, still_leads};
use crate::plan::{Assembly, HoldReason, Need, Outcome, Resolve};
use crate::read::small;
use crate::source::Opened;

impl Engine {
    /// Files placed by this batch; those that changed while they were read wait
    /// for their next turn.
    pub(super) fn settle_placed(
        &mut self,
        draft: &mut Draft,
        assembly: &Assembly,
    ) -> BTreeSet<ObjectId> {
        let mut all = BTreeSet::new();
        for (object, mut placed) in std::mem::take(&mut draft.placed) {
            all.insert(object.clone());
            let (mut tail, mut since) = (None, None);
            if let Some(held) = self.holds.remove(&object) {
                if placed.file.tail.as_ref().is_some_and(|tail| !tail.proven) {
                    // All else may have changed since then.
                    placed.file.started = held.floor;
                    since = Some(held.since);
                }
                let before = held.tail.unwrap_or_else(|| Tail::new(Instant::now()));
                tail = Some(before.after(&placed.file, draft.batch, held.touched));
                self.look_at_rest(&draft.resolve, held.hold.entries, held.floor);
            }
            let put = placed.number.0 == 0
                || assembly
                    .delta
                    .objects
                    .iter()
                    .any(|(id, known)| *id == object && known.is_some());
            if !put {
                self.discard_file(placed.number, &placed.file);
                continue;
            }
            self.place_compared(&object, &placed.file);
            draft.fresh += placed.file.fresh;
            if placed.file.moving {
                self.hold_again(object.clone(), &placed.file, placed.took, tail);
                if let Some(held) = self.holds.get_mut(&object) {
                    held.since = since.unwrap_or(held.since);
                }
                draft.span.exact = false;
            }
        }
        all
    }

    /// Attributes may have changed, and travelled, while content did: the file
    /// is placed with those of now. A change of content shows in size or mtime,
    /// or in an event that is still to come.
    pub(super) fn renew_attributes(&self, object: &ObjectId, need: &Need, file: &mut ReadyFile) {
        let flags = rustix::fs::OFlags::PATH | rustix::fs::OFlags::CLOEXEC;
        let fd = match self.opener.open(object, need.hint.as_ref(), flags) {
            Ok(Opened::Here(fd)) => fd,
            Ok(Opened::Away) => {
                // Nobody has looked at them, so it is read once more.
                file.moving = true;
                return;
            }
            Ok(Opened::Gone) | Err(_) => return,
        };
        let Ok(stat) = replicator_common::sys::stat::of_fd(&fd) else { return };
        let Ok(state) = small::state_of(fd.as_fd(), &stat) else { return };
        let old = &mut file.known;
        file.moving |= stat.ctime != old.ctime;
        old.state.attributes = Attributes { mtime: old.state.attributes.mtime, ..state.attributes };
        old.nlink = stat.nlink;
    }

    /// Holds that were looked at and are held no more. Not those of files that
    /// this batch `placed`: they are of what changed since.
    pub(super) fn release_holds(
        &mut self,
        draft: &Draft,
        left: &BTreeMap<ObjectId, crate::plan::Hold>,
        placed: &BTreeSet<ObjectId>,
    ) -> Result<(), EngineError> {
        self.leave_names(&draft.resolve)?;
        let looked: Vec<ObjectId> = self
            .holds
            .iter()
            .filter(|(object, _)| !placed.contains(*object))
            .filter(|(object, held)| {
                !left.contains_key(object)
                    && is_through(object, &held.hold.entries, &draft.resolve, &draft.outcomes)
            })
            .map(|(object, _)| object.clone())
            .collect();
        for object in looked {
            let Some(mut held) = self.holds.remove(&object) else { continue };
            if draft.outcomes.get(&object) == Some(&Outcome::Gone) {
                self.overtake(&held.hold.entries)?;
                held.hold.entries.extend(self.index.links(&object)?);
            }
            self.look_at_rest(&draft.resolve, held.hold.entries, held.floor);
            self.discard(held.transfer);
        }
        Ok(())
    }

    /// Names that waited for a file of the replica, and that lead elsewhere by now, wait
    /// for it no more.
    ///
    /// INVARIANT (the watermark tells the truth): what they owe they owe still, until they
    /// are as on the source.
    fn leave_names(&mut self, resolve: &Resolve) -> Result<(), EngineError> {
        let mut left = Vec::new();
        for (object, held) in self.holds.iter_mut().filter(|(_, held)| held.known) {
            let leads = |place: &(ObjectId, Name)| still_leads(object, place, resolve);
            let gone: BTreeSet<_> =
                held.hold.entries.extract_if(.., |place| !leads(place)).collect();
            if gone.is_empty() {
                continue;
            }
            if held.hold.entries.is_empty() && !matches!(held.hold.reason, HoldReason::Large { .. })
            {
                // Its names may have been all that it waited with.
                held.due = Instant::now();
            }
            left.push((gone, held.floor));
        }
        for (names, floor) in left {
            self.owed.release(names.iter().cloned(), floor);
            // Taken by another file, not removed.
            let taken = names.into_iter().filter(|place| {
                resolve.bindings.get(place).is_some_and(|binding| binding.new.is_some())
            });
            self.overtake(&taken.collect())?;
        }
        Ok(())
    }

    /// After a batch has taken its holds: what is owed is theirs, or is looked at
    /// `again`, or is as it is on the source.
    pub(super) fn settle_owed(&mut self, draft: &Draft, again: &BTreeSet<(ObjectId, Name)>) {
        let seen = |place: &(ObjectId, Name)| draft.resolve.bindings.contains_key(place);
        let holds = self.holds.values_mut();
        let holds = holds.map(|held| (&held.hold.entries, &mut held.floor));
        self.owed.settle(seen, again, holds);
    }

    /// Entries that waited since `floor` for an object which waits no more, and
    /// that this batch has not looked at, are looked at in the next.
    pub(super) fn look_at_rest(
        &mut self,
        resolve: &Resolve,
        entries: BTreeSet<(ObjectId, Name)>,
        floor: Timestamp,
    ) {
        self.owed.release(entries.iter().cloned(), floor);
        for (directory, name) in entries {
            if !resolve.bindings.contains_key(&(directory.clone(), name.clone())) {
                self.dirty.entry(directory, name, crate::watcher::What::default());
            }
        }
    }

    pub(super) fn retry_unreadable(
        &mut self,
        places: Vec<((ObjectId, replicator_common::name::Name), String)>,
        assembly: &mut Assembly,
    ) {
        for (object, error) in self.tree.take_doubts() {
            self.shared.unreadable(self.path_of(&object), &error);
        }
        let troubles = self.tree.take_troubles();
        for (directory, error) in troubles {
            self.shared.unreadable(self.path_of(&directory), &error);
            let entries = BTreeSet::new();
            let reason = HoldReason::Unreadable { error };
            assembly.holds.entry(directory).or_insert(crate::plan::Hold { reason, entries });
        }
        for ((directory, name), error) in places {
            let path = self.path_of_entry(&directory, &name);
            self.shared.unreadable(path, &error);
            let reason = HoldReason::Unreadable { error };
            assembly
                .holds
                .entry(directory.clone())
                .or_insert_with(|| crate::plan::Hold { reason, entries: BTreeSet::new() })
                .entries
                .insert((directory, name));
        }
    }

    /// Counts what is passed over now: of what was looked at, and not of what
    /// lies in directories that are `dropped`.
    pub(super) fn note_skipped(&mut self, draft: &Draft, dropped: &[ObjectId]) {
        if !self.skipped.is_empty() {
            for place in draft.resolve.bindings.keys() {
                self.skipped.remove(place);
            }
            let dropped: HashSet<&ObjectId> = dropped.iter().collect();
            self.skipped.retain(|(directory, _), _| !dropped.contains(directory));
        }
        for (place, skip) in &draft.resolve.skipped {
            if let Some(skip) = skip {
                self.skipped.insert(place.clone(), *skip);
            }
        }
    }

    /// Uses a finished transfer for an object whose content is needed.
    pub(super) fn take_ready(
        &mut self,
        draft: &mut Draft,
        object: &ObjectId,
        need: &Need,
    ) -> Result<bool, EngineError> {
        if need.kind != Kind::File || !need.content {
            return Ok(false);
        }
        if let Some(placed) = draft.placed.get_mut(object) {
            // This batch places it already, and it has changed since: it waits for
            // its next turn. (Were it looked at as if nothing had come, what was
            // placed would count as placed and not be so.)
            placed.file.moving = true;
            return Ok(true);
        }
        let Some(held) = self.holds.get_mut(object) else { return Ok(false) };
        if held.transfer.is_under_way() {
            let size = match held.hold.reason {
                HoldReason::Large { size } => size,
                HoldReason::Unreadable { .. } | HoldReason::Refused { .. } => 0,
            };
            draft.outcomes.insert(object.clone(), Outcome::Large { size });
            // An event told so, perhaps by a name that the hold does not know.
            // A walk asks for all that differs from the index, whatever events
            // told; then change times have to do.
            held.touched |= self.gap.is_none();
            return Ok(true);
        }
        if !matches!(held.transfer, Transfer::Ready { .. }) {
            return Ok(false);
        }
        let touched = held.touched;
        let ready = std::mem::replace(&mut held.transfer, Transfer::Waiting);
        let Transfer::Ready { number, basis, done, took, .. } = ready else { return Ok(false) };
        let of_itself = number.0 == 0
            || done.tail.is_some()
            || basis.is_some_and(|(basis, _)| basis == *object);
        if need.new && of_itself {
            // The replica has not what this was to change: the file left it meanwhile.
            (held.tail, held.known) = (None, false);
            self.discard_file(number, &done);
            return Ok(false);
        }
        let mut done = done;
        done.moving |= touched || held.tail.as_ref().is_some_and(|tail| tail.has_changed(&done));
        self.renew_attributes(object, need, &mut done);
        let mut known = done.known.clone();
        let content = if number.0 == 0 {
            ContentSource::Unchanged
        } else {
            known.version = draft.batch;
            match done.carried() {
                Some(carried) => {
                    self.wired.carried(carried.length());
                    ContentSource::Appended(carried.named())
                }
                None => ContentSource::Transferred { transfer: number },
            }
        };
        let old = self.index.object(object)?;
        let same = number.0 == 0 && old.is_some_and(|old| old.state == known.state);
        let outcome = if same { Outcome::Same { known } } else { Outcome::Ship { known, content } };
        draft.outcomes.insert(object.clone(), outcome);
        draft.placed.insert(object.clone(), Placed { number, file: *done, took });
        Ok(true)
    }
}
