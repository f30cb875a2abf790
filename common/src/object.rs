//! What an object is, apart from its names: kind, attributes, size.

use serde::{Deserialize, Serialize};

use crate::time::Timestamp;

/// What an object is. Sockets and FIFOs are known so that they can be counted;
/// they are never replicated (EFS does the same).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Kind {
    /// A regular file.
    File,
    /// A directory.
    Directory,
    /// A symbolic link.
    Symlink,
    /// A block device node; replicated on request only.
    BlockDevice,
    /// A character device node; replicated on request only.
    CharDevice,
    /// A FIFO; never replicated.
    Fifo,
    /// A socket; never replicated.
    Socket,
}

impl Kind {
    /// From the format bits of `st_mode`.
    pub fn from_mode(mode: u32) -> Option<Self> {
        Some(match mode & libc::S_IFMT {
            libc::S_IFREG => Self::File,
            libc::S_IFDIR => Self::Directory,
            libc::S_IFLNK => Self::Symlink,
            libc::S_IFBLK => Self::BlockDevice,
            libc::S_IFCHR => Self::CharDevice,
            libc::S_IFIFO => Self::Fifo,
            libc::S_IFSOCK => Self::Socket,
            _ => return None,
        })
    }

    /// The format bits of `st_mode`.
    pub fn to_mode(self) -> u32 {
        match self {
            Self::File => libc::S_IFREG,
            Self::Directory => libc::S_IFDIR,
            Self::Symlink => libc::S_IFLNK,
            Self::BlockDevice => libc::S_IFBLK,
            Self::CharDevice => libc::S_IFCHR,
            Self::Fifo => libc::S_IFIFO,
            Self::Socket => libc::S_IFSOCK,
        }
    }

    /// Whether it is a device node.
    pub fn is_device(self) -> bool {
        matches!(self, Self::BlockDevice | Self::CharDevice)
    }
}

/// One extended attribute. POSIX ACLs and file capabilities are among them
/// (`system.posix_acl_access`, `security.capability`), in the kernel's form.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Xattr {
    /// Full name with its namespace, without NUL; at most 255 bytes.
    #[serde(with = "serde_bytes")]
    pub name: Vec<u8>,
    /// Value; at most 64 KiB (`XATTR_SIZE_MAX`).
    #[serde(with = "serde_bytes")]
    pub value: Vec<u8>,
}

/// Attributes that replicate. Access time and change time do not.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attributes {
    /// Permission bits with setuid, setgid and sticky (`07777`).
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Time of last modification.
    pub mtime: Timestamp,
    /// Sorted by name, each name once.
    #[serde(deserialize_with = "crate::codec::list")]
    pub xattrs: Vec<Xattr>,
}

/// An object's state apart from its content and its names.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ObjectState {
    /// What it is.
    pub kind: Kind,
    /// Its attributes.
    pub attributes: Attributes,
    /// Bytes of content for files, length of the target for symlinks, else 0.
    pub size: u64,
    /// Device number (`st_rdev`) of device nodes, else 0.
    pub rdev: u64,
}

impl ObjectState {
    /// Bytes that its xattrs take in memory, about; the rest has a fixed size.
    pub fn weight(&self) -> usize {
        let xattrs = self.attributes.xattrs.iter();
        xattrs.map(|xattr| size_of::<Xattr>() + xattr.name.len() + xattr.value.len()).sum()
    }
}
