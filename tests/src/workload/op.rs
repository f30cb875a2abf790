//! The operations: what a program can do to a tree, as plain data.

use rand::Rng;
use rand::rngs::StdRng;

use super::place::{self, Place};

macro_rules! operations {
    ($($(#[$doc:meta])* $name:ident { $($(#[$field_doc:meta])* $field:ident: $type:ty),* $(,)? },)*) => {
        /// One operation. Content is named by its seed.
        #[derive(Clone, Debug, PartialEq)]
        #[allow(missing_docs, reason = "fields say what they are: where, from, to, how much")]
        pub enum Op { $($(#[$doc])* $name { $($field: $type),* },)* }

        /// The names of all operations.
        pub const NAMES: &[&str] = &[$(stringify!($name)),*];

        impl Op {
            /// The operation's name.
            pub fn name(&self) -> &'static str {
                match self { $(Self::$name { .. } => stringify!($name),)* }
            }
        }
    };
}

operations! {
    /// Creates or truncates a file and writes it; makes missing directories.
    Create { at: Place, bytes: u32, seed: u64 },
    /// Writes at the end.
    Append { at: Place, bytes: u32, seed: u64 },
    /// Writes in the middle, or beyond the end (which leaves a hole).
    Overwrite { at: Place, offset: u64, bytes: u32, seed: u64 },
    /// Several writes through one descriptor that is closed operations later.
    HoldOpen { at: Place, bytes: u32, seed: u64 },
    /// `truncate(2)` by path, shorter or longer.
    Truncate { at: Place, size: u64 },
    /// Punches a hole.
    Punch { at: Place, offset: u64, bytes: u64 },
    /// Allocates, behind the end too.
    Allocate { at: Place, offset: u64, bytes: u64 },
    /// Stores through a shared mapping; the descriptor is closed before.
    Map { at: Place, offset: u64, bytes: u32, seed: u64 },
    /// `copy_file_range` from one file into another.
    CopyRange { from: Place, to: Place, offset: u64, bytes: u32 },
    /// Writes a file under another name and renames it over this one.
    Replace { at: Place, bytes: u32, seed: u64 },
    /// Copies the file with bytes inserted in the middle, and renames the copy
    /// over it: what editors and databases do.
    Insert { at: Place, bytes: u32, seed: u64 },
    /// `O_TMPFILE`, inside or outside of the tree, then a name by `linkat`, and
    /// another write through the same descriptor.
    TmpFile { at: Place, outside: bool, bytes: u32, seed: u64 },
    /// Creates, writes and removes at once.
    Blink { at: Place, bytes: u32, seed: u64 },
    /// Renames a file or a directory, over an existing one too.
    Rename { from: Place, to: Place },
    /// Swaps two names, of directories too.
    Exchange { a: Place, b: Place },
    /// Each name takes the place of the next, last first: as logs rotate.
    Rotate { names: Vec<Place> },
    /// A new name.
    Link { from: Place, to: Place },
    /// A new name outside of the tree, and a write through that.
    OutsideLink { at: Place, slot: u8, seed: u64 },
    /// Removes a name.
    Unlink { at: Place },
    /// Makes a directory.
    MakeDirectory { at: Place },
    /// Makes a directory and fills it the moment it is there.
    FillDirectory { at: Place, seed: u64 },
    /// Removes a tree, entry by entry.
    RemoveTree { at: Place },
    /// Moves a populated tree in from outside.
    MoveIn { at: Place, seed: u64 },
    /// Moves a tree out, and removes it there or lets it be.
    MoveOut { at: Place, keep: bool, seed: u64 },
    /// Moves a tree out, changes it there, and moves it back in elsewhere.
    OutAndBack { from: Place, to: Place, seed: u64 },
    /// Makes a symbolic link.
    Symlink { at: Place, target: Place },
    /// Permissions with setuid, setgid, sticky.
    Mode { at: Place, mode: u32 },
    /// Owner and group, of symbolic links too.
    Owner { at: Place, uid: u32, gid: u32 },
    /// Time of last modification to the nanosecond, of symbolic links too.
    Times { at: Place, seconds: i64, nanoseconds: i64 },
    /// Sets a `user.` or `trusted.` attribute.
    SetXattr { at: Place, number: u8, bytes: u32, seed: u64 },
    /// Removes it.
    RemoveXattr { at: Place, number: u8 },
    /// Sets an access ACL, or a default one on a directory.
    Acl { at: Place, default: bool, permissions: u16 },
    /// Sets file capabilities.
    Capability { at: Place, bits: u32 },
    /// A file at a depth beyond PATH_MAX, written or written again.
    Deep { at: Place, seed: u64 },
    /// A FIFO, a socket or a device node.
    Special { at: Place, which: u8 },
}

type Draw = fn(&mut StdRng, u32) -> Op;

/// Each with its weight.
const DRAWS: &[(u32, Draw)] = &[
    (20, |r, t| Op::Create { at: place::file(r, t), bytes: small(r), seed: r.random() }),
    (3, |r, t| Op::Create { at: place::large(r, t), bytes: large(r), seed: r.random() }),
    (8, |r, t| Op::Append { at: file(r, t), bytes: small(r), seed: r.random() }),
    (8, |r, t| Op::Overwrite {
        at: file(r, t),
        offset: offset(r),
        bytes: small(r),
        seed: r.random(),
    }),
    (3, |r, t| Op::HoldOpen { at: file(r, t), bytes: small(r), seed: r.random() }),
    (4, |r, t| Op::Truncate { at: file(r, t), size: offset(r) }),
    (4, |r, t| Op::Punch { at: file(r, t), offset: offset(r), bytes: 1 + offset(r) }),
    (3, |r, t| Op::Allocate { at: file(r, t), offset: offset(r), bytes: 1 + offset(r) }),
    (4, |r, t| Op::Map { at: file(r, t), offset: offset(r), bytes: small(r), seed: r.random() }),
    (3, |r, t| Op::CopyRange {
        from: file(r, t),
        to: file(r, t),
        offset: offset(r),
        bytes: large(r),
    }),
    (8, |r, t| Op::Replace { at: place::file(r, t), bytes: small(r), seed: r.random() }),
    (3, |r, t| Op::Insert { at: file(r, t), bytes: small(r), seed: r.random() }),
    (3, |r, t| Op::TmpFile {
        at: place::file(r, t),
        outside: r.random(),
        bytes: small(r),
        seed: r.random(),
    }),
    (4, |r, t| Op::Blink { at: place::file(r, t), bytes: small(r), seed: r.random() }),
    (12, |r, t| Op::Rename { from: place::any(r, t), to: place::any(r, t) }),
    (6, |r, t| Op::Rename { from: place::directory(r, t), to: place::directory(r, t) }),
    (4, |r, t| Op::Exchange { a: place::any(r, t), b: place::any(r, t) }),
    (4, |r, t| Op::Exchange { a: place::directory(r, t), b: place::directory(r, t) }),
    (4, |r, t| Op::Rotate {
        names: (0..r.random_range(3..6)).map(|_| place::file(r, t)).collect(),
    }),
    (10, |r, t| Op::Link { from: place::file(r, t), to: place::file(r, t) }),
    (3, |r, t| Op::OutsideLink {
        at: place::file(r, t),
        slot: r.random_range(0..4),
        seed: r.random(),
    }),
    (12, |r, t| Op::Unlink { at: file(r, t) }),
    (6, |r, t| Op::MakeDirectory { at: place::directory(r, t) }),
    (6, |r, t| Op::FillDirectory { at: place::directory(r, t), seed: r.random() }),
    (5, |r, t| Op::RemoveTree { at: place::directory(r, t) }),
    (4, |r, t| Op::MoveIn { at: place::directory(r, t), seed: r.random() }),
    (3, |r, t| Op::MoveOut {
        at: place::directory(r, t),
        keep: r.random_ratio(1, 8),
        seed: r.random(),
    }),
    (3, |r, t| Op::OutAndBack { from: place::any(r, t), to: place::any(r, t), seed: r.random() }),
    (5, |r, t| Op::Symlink { at: place::file(r, t), target: target(r) }),
    (6, |r, t| Op::Mode { at: place::any(r, t), mode: r.random_range(0..0o10000) }),
    (5, |r, t| Op::Owner {
        at: place::any(r, t),
        uid: r.random_range(0..70_000),
        gid: r.random_range(0..9),
    }),
    (5, |r, t| Op::Times {
        at: place::any(r, t),
        seconds: r.random_range(-9..1 << 31),
        nanoseconds: r.random_range(0..1_000_000_000),
    }),
    (8, |r, t| Op::SetXattr {
        at: place::any(r, t),
        number: r.random_range(0..4),
        bytes: r.random_range(0..500),
        seed: r.random(),
    }),
    (6, |r, t| Op::RemoveXattr { at: place::any(r, t), number: r.random_range(0..4) }),
    (4, |r, t| Op::Acl {
        at: place::any(r, t),
        default: r.random(),
        permissions: r.random_range(0..8),
    }),
    (3, |r, t| Op::Capability { at: file(r, t), bits: r.random() }),
    (1, |r, t| Op::Deep { at: place::directory(r, t), seed: r.random() }),
    (2, |r, t| Op::Special { at: place::file(r, t), which: r.random_range(0..4) }),
];

/// The next operation of a thread.
pub fn random(rng: &mut StdRng, thread: u32) -> Op {
    let sum: u32 = DRAWS.iter().map(|(weight, _)| weight).sum();
    let mut ticket = rng.random_range(0..sum);
    for (weight, draw) in DRAWS {
        match ticket.checked_sub(*weight) {
            Some(rest) => ticket = rest,
            None => return draw(rng, thread),
        }
    }
    unreachable!("the ticket is below the sum of all weights")
}

/// A file to change: now and then a large one.
fn file(rng: &mut StdRng, thread: u32) -> Place {
    if rng.random_ratio(1, 6) { place::large(rng, thread) } else { place::file(rng, thread) }
}

/// Sizes around the borders that matter: nothing, a page, a pack.
fn small(rng: &mut StdRng) -> u32 {
    match rng.random_range(0..8) {
        0 => 0,
        1 => rng.random_range(1..16),
        2 => 4096,
        3 => rng.random_range(60_000..70_000),
        4 if rng.random_ratio(1, 4) => rng.random_range(250_000..270_000),
        _ => rng.random_range(1..9000),
    }
}

fn large(rng: &mut StdRng) -> u32 {
    rng.random_range(1 << 20..6 << 20)
}

fn offset(rng: &mut StdRng) -> u64 {
    match rng.random_range(0..8) {
        0 => 0,
        1 => rng.random_range(0..12 << 20),
        2 => rng.random_range(0..1 << 20),
        _ => rng.random_range(0..12_000),
    }
}

fn target(rng: &mut StdRng) -> Place {
    match rng.random_range(0..5) {
        0 => Place::at("/etc/passwd"),
        1 => Place::at(b"../../../\xff\n"),
        2 => Place::at(vec![b'l'; rng.random_range(200..1000)]),
        3 => Place::at(".."),
        _ => Place::at("f1"),
    }
}
