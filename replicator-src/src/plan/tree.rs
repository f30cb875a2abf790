//! What planning may ask of the source's tree, as it stands now.

use replicator_common::id::ObjectId;
use replicator_common::name::Name;
use replicator_common::sys::stat::Stat;

/// What stands under a name now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Lookup {
    /// Nothing, or the directory itself is gone.
    Absent,
    /// Something that does not replicate.
    Skipped(Skip),
    /// An object.
    Found(Seen),
    /// It cannot be looked at, with what the system said.
    Unreadable(String),
    /// The directory is not where it was believed to be. Where only names lead
    /// to objects, that says nothing of what it holds, nor that it is gone.
    Away,
}

/// The names in a directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Listed {
    /// All of them.
    Names(Vec<Name>),
    /// The directory is gone, or cannot be read, which the tree remembers.
    Gone,
    /// See [`Lookup::Away`].
    Away,
    /// There are more than were asked for.
    Many,
}

/// Why something does not replicate.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, serde::Serialize, serde::Deserialize,
)]
pub enum Skip {
    /// A socket.
    Socket,
    /// A FIFO.
    Fifo,
    /// A device node, which nobody asked for.
    Device,
    /// Another file system is mounted there.
    Mount,
    /// The file system's own `lost+found`.
    Reserved,
}

/// An object as it was seen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Seen {
    /// Which.
    pub object: ObjectId,
    /// Its state apart from content and xattrs.
    pub stat: Stat,
}

/// What became of an object without entries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// Its handle is stale or its link count is zero: it never comes back.
    Dead,
    /// It lives somewhere.
    Alive,
}

/// The source's tree as it stands now. What takes `&self` may be asked by several
/// threads at once.
pub trait Tree: Sync {
    /// Why a question could not be answered.
    type Error: Send;

    /// What stands under `name` in `directory`.
    fn lookup(&mut self, directory: &ObjectId, name: &Name) -> Result<Lookup, Self::Error>;
    /// Looks at entries of a directory: given a name, and the object that the index has
    /// there, which is a file or a symbolic link, it says the state of the entry if it
    /// leads there still. `None` if it does not, or needs a closer look. Where the
    /// change time is not the one that the index has, it need not be that object: its
    /// inode number may have been given anew.
    fn prober(&self, directory: &ObjectId) -> impl Fn(&Name, &ObjectId) -> Option<Stat>;
    /// All names of a directory, if they are no more than `most`. Tells the watcher
    /// about the directory before it reads it.
    fn list(&self, directory: &ObjectId, most: usize) -> Result<Listed, Self::Error>;
    /// Where a directory should stand that could not be looked at there.
    fn suppose(&mut self, _object: &ObjectId, _directory: &ObjectId, _name: &Name) {}
    /// What became of an object.
    fn fate(&mut self, object: &ObjectId) -> Result<Fate, Self::Error>;
}
