//! Where operations work: places drawn from a small space of names, so that
//! threads meet, objects are replaced and moved onto each other, and most
//! operations find something.

use std::fmt;

use rand::Rng;
use rand::rngs::StdRng;

/// A path by its components, relative to the workload's root.
#[derive(Clone, PartialEq, Eq)]
pub struct Place(pub Vec<Vec<u8>>);

impl Place {
    /// From a path with `/` between components.
    pub fn at(path: impl AsRef<[u8]>) -> Self {
        Self(path.as_ref().split(|byte| *byte == b'/').map(<[u8]>::to_vec).collect())
    }

    /// The path with `/` between components; what [`Self::at`] was made of.
    pub fn path(&self) -> Vec<u8> {
        self.0.join(&b'/')
    }

    /// The place `name` below this one.
    #[must_use]
    pub fn join(&self, name: impl AsRef<[u8]>) -> Self {
        let mut components = self.0.clone();
        components.push(name.as_ref().to_vec());
        Self(components)
    }
}

impl fmt::Debug for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.path().escape_ascii())
    }
}

/// Where small files stand: up to three directories deep.
pub fn file(rng: &mut StdRng, thread: u32) -> Place {
    let mut place = directory_of(rng, thread);
    place.0.push(name(rng, b'f', 5));
    place
}

/// Where directories stand: never one of those that belong to a thread.
pub fn directory(rng: &mut StdRng, thread: u32) -> Place {
    let mut place = top(rng, thread);
    let depth = if rng.random_ratio(1, 4) { 3 } else { rng.random_range(1..=2) };
    for _ in 0..depth {
        place.0.push(name(rng, b'd', 3));
    }
    place
}

/// Where files or directories may stand.
pub fn any(rng: &mut StdRng, thread: u32) -> Place {
    if rng.random_ratio(2, 3) { file(rng, thread) } else { directory(rng, thread) }
}

/// Where large files stand: few, so that a disk of some GiB holds them.
pub fn large(rng: &mut StdRng, thread: u32) -> Place {
    let mut place = top(rng, thread);
    place.0.push(name(rng, b'L', 3));
    place
}

/// Mostly the thread's own part of the tree; often enough the one where all
/// threads meet.
fn top(rng: &mut StdRng, thread: u32) -> Place {
    if rng.random_ratio(1, 3) {
        Place(vec![b"shared".to_vec()])
    } else {
        Place(vec![format!("thread-{thread}").into_bytes()])
    }
}

fn directory_of(rng: &mut StdRng, thread: u32) -> Place {
    if rng.random_ratio(1, 2) { top(rng, thread) } else { directory(rng, thread) }
}

/// One of `count` ordinary names and now and then an unpleasant one.
fn name(rng: &mut StdRng, letter: u8, count: u8) -> Vec<u8> {
    let mut name = vec![letter];
    match rng.random_range(0..20) {
        0 => name.extend(b" \n\xff\xfe'\"\\$*-"),
        1 => name.resize(255, b'x'),
        2 => name.extend("é日本".as_bytes()),
        _ => name.push(b'0' + rng.random_range(0..count)),
    }
    name
}
