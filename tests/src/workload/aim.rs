//! Aiming: an operation that needs an object, drawn for a place where nothing
//! stands, is given one that stands near by. Without it most operations of a
//! random workload would be refused.

use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::{AtFlags, Dir, FileType};

use super::op::Op;
use super::perform::Arena;
use super::place::Place;
use super::raw;

/// What an operation needs at a place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Want {
    File,
    Directory,
    Any,
}

impl Want {
    fn accepts(self, kind: FileType) -> bool {
        match self {
            Self::File => kind == FileType::RegularFile,
            Self::Directory => kind == FileType::Directory,
            Self::Any => true,
        }
    }
}

impl Arena {
    /// The operation with each of its places moved to where something stands.
    pub fn aim(&self, mut op: Op) -> Op {
        for (place, want) in wants(&mut op) {
            if let Some(near) = self.near(place, want) {
                *place = near;
            }
        }
        op
    }

    /// The place itself if what is wanted stands there, else what the name
    /// falls on among the entries of the last directory that is there.
    fn near(&self, place: &Place, want: Want) -> Option<Place> {
        let (name, path) = place.0.split_last()?;
        let mut directory = raw::step(self.root(), b".").ok()?;
        let mut found = Vec::new();
        for component in path {
            let Ok(next) = raw::step(directory.as_fd(), component) else {
                break;
            };
            directory = next;
            found.push(component.clone());
        }
        let stands = found.len() == path.len()
            && rustix::fs::statat(&directory, &name[..], AtFlags::SYMLINK_NOFOLLOW)
                .is_ok_and(|stat| want.accepts(FileType::from_raw_mode(stat.st_mode)));
        if stands || found.is_empty() {
            return None;
        }
        let mut names = entries(&directory, want)?;
        names.sort();
        let fall = name.iter().map(|byte| usize::from(*byte)).sum::<usize>();
        let chosen = names.get(fall.checked_rem(names.len())?)?.clone();
        found.push(chosen);
        Some(Place(found))
    }
}

fn entries(directory: &OwnedFd, want: Want) -> Option<Vec<Vec<u8>>> {
    let entries = Dir::read_from(directory).ok()?;
    let wanted = entries.flatten().filter(|entry| want.accepts(entry.file_type()));
    let names = wanted.map(|entry| entry.file_name().to_bytes().to_vec());
    Some(names.filter(|name| name != b"." && name != b"..").collect())
}

/// The places where an operation needs something, with what it needs there.
fn wants(op: &mut Op) -> Vec<(&mut Place, Want)> {
    match op {
        Op::Append { at, .. }
        | Op::Overwrite { at, .. }
        | Op::Truncate { at, .. }
        | Op::Punch { at, .. }
        | Op::Allocate { at, .. }
        | Op::Map { at, .. }
        | Op::Insert { at, .. }
        | Op::OutsideLink { at, .. }
        | Op::Unlink { at }
        | Op::Capability { at, .. } => vec![(at, Want::File)],
        Op::CopyRange { from, to, .. } => vec![(from, Want::File), (to, Want::File)],
        Op::Link { from, .. } => vec![(from, Want::File)],
        Op::RemoveTree { at } | Op::MoveOut { at, .. } => vec![(at, Want::Directory)],
        Op::Rename { from, .. } | Op::OutAndBack { from, .. } => vec![(from, Want::Any)],
        Op::Exchange { a, b } => vec![(a, Want::Any), (b, Want::Any)],
        Op::Mode { at, .. }
        | Op::Owner { at, .. }
        | Op::Times { at, .. }
        | Op::SetXattr { at, .. }
        | Op::RemoveXattr { at, .. } => vec![(at, Want::Any)],
        Op::Acl { at, default, .. } => {
            vec![(at, if *default { Want::Directory } else { Want::Any })]
        }
        Op::Create { .. }
        | Op::HoldOpen { .. }
        | Op::Replace { .. }
        | Op::TmpFile { .. }
        | Op::Blink { .. }
        | Op::Rotate { .. }
        | Op::Symlink { .. }
        | Op::MakeDirectory { .. }
        | Op::FillDirectory { .. }
        | Op::MoveIn { .. }
        | Op::Deep { .. }
        | Op::Special { .. } => Vec::new(),
    }
}
