//! The strict tree comparer: does the replica equal the source?
//!
//! Two trees are read whole ([`Tree::read`]) and compared object by object.
//! Compared are: kind, content, size, holes, mode with setuid, setgid and
//! sticky, owner, group, mtime to the nanosecond (of directories and symbolic
//! links too), extended attributes with POSIX ACLs and file capabilities among
//! them, targets of symbolic links, device numbers, and hard links as the
//! partition of names into objects. Not compared are what no program can set
//! (ctime, birth time, inode numbers, allocated blocks) and what reading
//! itself changes (atime).
//!
//! # Holes
//! Where the source has a hole of at least 1 MiB ([`HOLE_MIN`]) according to
//! `SEEK_HOLE`, the replica must have no data, except within [`HOLE_SLACK`] of
//! the hole's ends (file systems allocate in units of their own). Unwritten
//! extents (`fallocate`) count as holes on both sides, as `SEEK_HOLE` says.
//! The other way round, a hole on the replica where the source stores zeros is
//! no difference: the content is the same and no promise is broken.
//!
//! # What is left out
//! - In the replica's root: `.replicator-*`, the engine's hidden directory.
//! - In either root: `lost+found` when it is a directory of root's, as
//!   `mkfs.ext4` makes it.
//! - On the source: sockets and FIFOs, and devices unless they were asked for.
//!   One that stands on the replica all the same is a difference.
//! - On the source: what lies on other file systems mounted below. The replica
//!   may have an empty directory in its place or nothing.

mod tree;

#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::ops::Range;
use std::path::Path;

use replicator_common::object::Kind;

pub use tree::{BLOCK, Content, Node, Tree};

/// Holes of the source that are shorter are not asked of the replica.
pub const HOLE_MIN: u64 = 1 << 20;
/// How far data may reach into a hole from its ends.
pub const HOLE_SLACK: u64 = 64 << 10;

/// What to compare.
#[derive(Clone, Copy, Debug, Default)]
pub struct Options {
    /// Device nodes replicate too.
    pub devices: bool,
}

/// In which respect two objects differ.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Aspect {
    /// Only the source has it.
    Missing,
    /// Only the replica has it.
    Extra,
    /// Directory, file, symbolic link …
    Kind,
    /// Bytes of a file.
    Size,
    /// Content of a file.
    Content,
    /// Data where the source has a hole.
    Holes,
    /// Permissions, setuid, setgid, sticky.
    Mode,
    /// User.
    Owner,
    /// Group.
    Group,
    /// Time of last modification.
    Mtime,
    /// An extended attribute that is none of the next two.
    Xattr(String),
    /// A POSIX ACL, access or default.
    Acl,
    /// File capabilities.
    Capability,
    /// Target of a symbolic link.
    Target,
    /// Which other names are the same object.
    Links,
    /// Device number.
    Device,
}

/// One difference.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Difference {
    /// Relative to the roots, components joined by `/`; empty for the root.
    pub path: Vec<u8>,
    /// In which respect.
    pub aspect: Aspect,
    /// What is here and what is there.
    pub detail: String,
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {:?}: {}", shown(&self.path), self.aspect, self.detail)
    }
}

/// Reads both trees and gives every difference, ordered by path.
pub fn compare(source: &Path, replica: &Path, options: Options) -> Vec<Difference> {
    let read = |root: &Path| {
        Tree::read(root)
            .unwrap_or_else(|error| panic!("{} cannot be read: {error}", root.display()))
    };
    differences(read(source), read(replica), options)
}

/// Panics with the differences unless there are none; `context` says what led
/// here (the seed, above all).
#[track_caller]
pub fn assert_same(source: &Path, replica: &Path, context: &dyn fmt::Display) {
    let found = compare(source, replica, Options::default());
    assert!(found.is_empty(), "{context}: the replica differs:\n{}", report(&found));
}

/// The first differences as text, one a line, with the number of all.
pub fn report(differences: &[Difference]) -> String {
    const SHOWN: usize = 60;
    let mut text = String::new();
    for difference in differences.iter().take(SHOWN) {
        text.push_str(&format!("  {difference}\n"));
    }
    if differences.len() > SHOWN {
        text.push_str(&format!("  … and {} more\n", differences.len() - SHOWN));
    }
    text
}

/// Compares two trees that were read before.
pub fn differences(mut source: Tree, mut replica: Tree, options: Options) -> Vec<Difference> {
    source.nodes.retain(|path, node| !is_left_out(path, node) && replicates(node.kind, options));
    replica.nodes.retain(|path, node| !is_left_out(path, node) && !is_hidden(path));
    for nested in &source.nested {
        if replica.is_empty_directory(nested) {
            replica.nodes.remove(nested);
        }
    }
    let mut found = Vec::new();
    let paths: BTreeSet<&Vec<u8>> = source.nodes.keys().chain(replica.nodes.keys()).collect();
    for path in paths {
        let mut note = |aspect, detail| {
            found.push(Difference { path: path.clone(), aspect, detail });
        };
        match (source.nodes.get(path), replica.nodes.get(path)) {
            (Some(here), Some(there)) => compare_nodes(here, there, &mut note),
            (Some(here), None) => note(Aspect::Missing, format!("{:?} on the source", here.kind)),
            (None, Some(there)) => note(Aspect::Extra, format!("{:?} on the replica", there.kind)),
            (None, None) => unreachable!("the path came from one of the two"),
        }
    }
    compare_links(&source, &replica, &mut found);
    found.sort();
    found
}

fn replicates(kind: Kind, options: Options) -> bool {
    match kind {
        Kind::File | Kind::Directory | Kind::Symlink => true,
        Kind::BlockDevice | Kind::CharDevice => options.devices,
        Kind::Fifo | Kind::Socket => false,
    }
}

fn is_left_out(path: &[u8], node: &Node) -> bool {
    path == b"lost+found" && node.kind == Kind::Directory && node.uid == 0 && node.mode == 0o700
}

fn is_hidden(path: &[u8]) -> bool {
    path.starts_with(b".replicator-")
}

fn compare_nodes(here: &Node, there: &Node, note: &mut impl FnMut(Aspect, String)) {
    if here.kind != there.kind {
        note(Aspect::Kind, format!("{:?}, replica {:?}", here.kind, there.kind));
        return;
    }
    if here.mode != there.mode {
        note(Aspect::Mode, format!("{:04o}, replica {:04o}", here.mode, there.mode));
    }
    let mut equal = |aspect, here: i128, there: i128| {
        if here != there {
            note(aspect, format!("{here}, replica {there}"));
        }
    };
    equal(Aspect::Owner, here.uid.into(), there.uid.into());
    equal(Aspect::Group, here.gid.into(), there.gid.into());
    equal(Aspect::Mtime, here.mtime, there.mtime);
    equal(Aspect::Device, here.rdev.into(), there.rdev.into());
    compare_xattrs(&here.xattrs, &there.xattrs, note);
    compare_content(here, there, note);
}

fn compare_content(here: &Node, there: &Node, note: &mut impl FnMut(Aspect, String)) {
    match (&here.content, &there.content) {
        (Content::None, Content::None) => {}
        (Content::Symlink(target), Content::Symlink(other)) => {
            if target != other {
                note(Aspect::Target, format!("{}, replica {}", shown(target), shown(other)));
            }
        }
        (
            Content::File { blocks, holes },
            Content::File { blocks: other_blocks, holes: other_holes },
        ) => {
            if here.size != there.size {
                note(Aspect::Size, format!("{}, replica {}", here.size, there.size));
            }
            let longest = blocks.len().max(other_blocks.len());
            let unlike = (0..longest).find(|n| blocks.get(*n) != other_blocks.get(*n));
            if let Some(block) = unlike {
                note(Aspect::Content, format!("first in the MiB at {}", block as u64 * BLOCK));
            }
            for hole in holes.iter().filter(|hole| hole.end - hole.start >= HOLE_MIN) {
                let inside = hole.start + HOLE_SLACK..hole.end - HOLE_SLACK;
                if there.size >= inside.end && !is_hole(&inside, other_holes) {
                    note(Aspect::Holes, format!("data on the replica within {hole:?}"));
                }
            }
        }
        _ => unreachable!("content follows kind, and the kinds are equal"),
    }
}

fn is_hole(range: &Range<u64>, holes: &[Range<u64>]) -> bool {
    holes.iter().any(|hole| hole.start <= range.start && range.end <= hole.end)
}

type Xattrs = BTreeMap<Vec<u8>, Vec<u8>>;

fn compare_xattrs(here: &Xattrs, there: &Xattrs, note: &mut impl FnMut(Aspect, String)) {
    let names: BTreeSet<&Vec<u8>> = here.keys().chain(there.keys()).collect();
    for name in names {
        let (value, other) = (here.get(name), there.get(name));
        if value == other {
            continue;
        }
        let aspect = match name.as_slice() {
            b"system.posix_acl_access" | b"system.posix_acl_default" => Aspect::Acl,
            b"security.capability" => Aspect::Capability,
            _ => Aspect::Xattr(shown(name)),
        };
        let shown = |value: Option<&Vec<u8>>| value.map_or("none".to_owned(), |v| self::shown(v));
        note(aspect, format!("{}, replica {}", shown(value), shown(other)));
    }
}

/// Two names are one object on the source exactly when they are on the
/// replica. An object all of whose names are in the source's tree must have no
/// further names on the replica either (a forgotten hidden link shows there).
fn compare_links(source: &Tree, replica: &Tree, found: &mut Vec<Difference>) {
    let (groups, others) = (source.link_groups(), replica.link_groups());
    for (path, node) in &source.nodes {
        let Some(there) = replica.nodes.get(path) else {
            continue;
        };
        let (Some(group), Some(other)) = (groups.get(&node.identity), others.get(&there.identity))
        else {
            continue;
        };
        let names = |group: &BTreeSet<&[u8]>| -> Vec<String> {
            group.iter().map(|path| shown(path)).collect()
        };
        let mut note = |detail: String| {
            found.push(Difference { path: path.clone(), aspect: Aspect::Links, detail });
        };
        if group != other {
            note(format!("{:?}, replica {:?}", names(group), names(other)));
        } else if node.nlink == group.len() as u64 && there.nlink != node.nlink {
            note(format!("{} links, replica {}", node.nlink, there.nlink));
        }
    }
}

/// Bytes as text that fits on a line.
fn shown(bytes: &[u8]) -> String {
    const MOST: usize = 120;
    let text = bytes.escape_ascii().to_string();
    match text.len() {
        0 => ".".to_owned(),
        1..=MOST => text,
        _ => format!("{}…{} ({} bytes)", &text[..60], &text[text.len() - 50..], bytes.len()),
    }
}
