//! The first, swift look at a part of the tree: many objects a question. What
//! differs is only doubted; the second look decides.

use replicator_common::describe::{Describe, Described, Description, EntriesSeen, Expected};
use replicator_common::id::ObjectId;
use replicator_common::name::Name;
use replicator_common::object::Kind;
use replicator_common::verification::OBJECT_COST;
use replicator_common::wire::{Hash, PACK_MAX};

use super::super::check::{Item, Verdict};
use super::super::look::Seen;
use super::{Stopped, Thread, is_small};
use crate::index::Known;

/// Names of one question.
const NAMES: usize = 512;

impl Thread {
    /// Looks at objects; what differs is to be looked at again. `false` when
    /// there is no session.
    pub(super) fn examine(&mut self, chunk: &[(ObjectId, Known)]) -> Result<bool, Stopped> {
        let mut seen = Vec::new();
        for (object, known) in chunk {
            if object.is_foreign() {
                continue;
            }
            match self.checker.look.state(object, known.entry.as_ref()) {
                Ok(Some(found)) => seen.push((object, known, found)),
                Ok(None) => {}
                Err(error) => self.unreadable(&Item::Object(object.clone()), error.to_string()),
            }
        }
        if !self.examine_objects(&seen)? {
            return Ok(false);
        }
        for (object, known, found) in &seen {
            let whole = match found.state.kind {
                Kind::Directory => self.examine_names(object)?,
                Kind::File if found.state.size > PACK_MAX => self.examine_content(object, known)?,
                _ => true,
            };
            if !whole {
                return Ok(false);
            }
        }
        let (objects, bytes) = seen.iter().fold((0, 0), |(objects, bytes), (_, _, found)| {
            let size = if found.state.kind == Kind::File { found.state.size } else { 0 };
            (objects + 1, bytes + size)
        });
        self.board.change(|now| {
            now.objects += objects;
            now.bytes += bytes;
        });
        Ok(true)
    }

    fn examine_objects(&mut self, seen: &[(&ObjectId, &Known, Seen)]) -> Result<bool, Stopped> {
        let mut left = seen;
        while !left.is_empty() {
            let asked = left
                .iter()
                .map(|(object, _, found)| ((*object).clone(), is_small(found)))
                .collect();
            let Some(answer) = self.checker.ask(Describe::Objects(asked)) else { return Ok(false) };
            let hashes = self.hashes(left)?;
            let Some(Description::Objects(described)) = self.checker.answer(&answer) else {
                return Ok(false);
            };
            let count = described.len().min(left.len());
            if count == 0 {
                return Ok(false);
            }
            for (((object, _, found), hash), described) in left.iter().zip(hashes).zip(described) {
                self.doubt_object(object, found, hash, described);
            }
            left = &left[count..];
        }
        Ok(true)
    }

    /// Hashes of the small files among the objects, read while the destination
    /// reads its own. What could not be read has none.
    fn hashes(&mut self, seen: &[(&ObjectId, &Known, Seen)]) -> Result<Vec<Option<Hash>>, Stopped> {
        let mut hashes = Vec::with_capacity(seen.len());
        for (object, known, found) in seen {
            let mut cost = OBJECT_COST;
            let hash = if is_small(found) {
                cost = cost.max(found.state.size);
                match self.checker.look.hash(object, known.entry.as_ref(), found) {
                    Ok(hash) => hash,
                    Err(error) => {
                        let item = Item::Object((*object).clone());
                        self.unreadable(&item, error.to_string());
                        None
                    }
                }
            } else {
                None
            };
            hashes.push(hash);
            self.pace.add(cost);
        }
        Ok(hashes)
    }

    fn doubt_object(
        &mut self,
        object: &ObjectId,
        found: &Seen,
        hash: Option<Hash>,
        described: Described,
    ) {
        let Some(abilities) = self.checker.abilities() else { return };
        // Without a hash of ours, theirs proves nothing.
        let described = match (described, hash) {
            (Described::Found { state, target, .. }, None) => {
                Described::Found { state, hash: None, target }
            }
            (described, _) => described,
        };
        match self.checker.compare(object, found, hash, described, &abilities) {
            Verdict::Equal => {}
            _ => self.doubt(Item::Object(object.clone())),
        }
    }

    fn examine_content(&mut self, object: &ObjectId, known: &Known) -> Result<bool, Stopped> {
        let mut offset = 0;
        loop {
            match self.checker.range(object, known, offset) {
                Ok(Some(next)) => offset = next,
                Ok(None) => return Ok(true),
                Err(Verdict::NotNow) => return Ok(false),
                Err(_) => {
                    self.doubt(Item::Content(object.clone(), offset));
                    return Ok(true);
                }
            }
            self.turn()?;
        }
    }

    fn examine_names(&mut self, directory: &ObjectId) -> Result<bool, Stopped> {
        let names = match self.checker.names(directory) {
            Ok(Some(names)) => names,
            Ok(None) => return Ok(true),
            Err(error) => {
                self.unreadable(&Item::Object(directory.clone()), error);
                return Ok(true);
            }
        };
        let mut after: Option<Name> = None;
        let mut parts = names.chunks(NAMES).peekable();
        loop {
            let part = parts.next().unwrap_or_default();
            let until = parts.peek().and_then(|_| part.last().cloned());
            let span = (after.take(), until.clone());
            if !self.examine_part(directory, span, part)? {
                return Ok(false);
            }
            if until.is_none() {
                return Ok(true);
            }
            after = until;
            self.turn()?;
        }
    }

    fn examine_part(
        &mut self,
        directory: &ObjectId,
        (after, until): (Option<Name>, Option<Name>),
        names: &[Name],
    ) -> Result<bool, Stopped> {
        let expected: Vec<(Name, Expected)> = names
            .iter()
            .map(|name| (name.clone(), self.checker.expected(directory, name)))
            .collect();
        self.pace.add(OBJECT_COST / 8 * names.len() as u64);
        let directory = directory.clone();
        let question =
            Describe::Entries { directory: directory.clone(), after, until, expected, list: true };
        let answer = self.checker.ask(question).and_then(|answer| self.checker.answer(&answer));
        match answer {
            Some(Description::Entries(EntriesSeen::Read { wrong, extra })) => {
                let wrong = wrong.into_iter().filter_map(|(at, _)| names.get(at as usize).cloned());
                let extra = extra.into_iter().map(|extra| extra.name);
                for name in wrong.chain(extra) {
                    self.doubt(Item::Entry(directory.clone(), name));
                }
                Ok(true)
            }
            Some(Description::Entries(EntriesSeen::Missing)) => Ok(true),
            Some(Description::Entries(EntriesSeen::Unreadable(error))) => {
                let item = Item::Object(directory);
                self.unreadable(&item, format!("in the replica: {error}"));
                Ok(true)
            }
            _ => Ok(false),
        }
    }
}
