//! The inventory of a replica that was not empty: what it holds, parents
//! before children, so that the source sends only what differs.

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use replicator_common::chunk::{self, Chunker};
use replicator_common::id::ReplicaHandle;
use replicator_common::name::Name;
use replicator_common::object::{Attributes, Kind, ObjectState};
use replicator_common::sys::{handle, place, stat, xattr};
use replicator_common::wire::{Hash, InventoryContent, InventoryItem, PACK_MAX};
use rustix::buffer::spare_capacity;
use rustix::fs::OFlags;
use rustix::io::Errno;
use serde_bytes::ByteBuf;

use crate::area::{Area, AreaError};

/// Items of one frame.
const ITEMS_MAX: usize = 1000;
/// About how many bytes of items go into one frame: far below its limit, since
/// one item may hold 64 KiB of xattrs and a chunk list of its own.
const FRAME_BYTES: usize = 1 << 20;
/// Chunks of one item.
const CHUNKS_MAX: usize = 8192;
/// `statfs` magic of ext2, ext3 and ext4.
const EXT_MAGIC: u64 = 0xef53;

/// Whether a name in the root is the file system's own `lost+found`: present
/// on every fresh ext file system, and never replicated from or to.
pub fn is_file_systems_own(root: BorrowedFd<'_>, name: &Name) -> bool {
    name.as_bytes() == b"lost+found"
        && place::file_system_magic(root) == Ok(EXT_MAGIC)
        // Only in the root of the file system itself, which ext numbers 2.
        && stat::of_fd(root).is_ok_and(|stat| stat.ino == 2)
}

/// Names in the root that are part of the replica.
pub fn names_in_root(area: &Area) -> Result<Vec<Name>, AreaError> {
    let names = place::list(area.root()).map_err(AreaError::system("list", "."))?;
    Ok(names
        .into_iter()
        .map(|(name, _)| name)
        .filter(|name| !area.is_ours(name) && !is_file_systems_own(area.root(), name))
        .collect())
}

/// Takes items; answers whether it wants more.
pub type Sink<'a> = dyn FnMut(Vec<InventoryItem>, bool) -> bool + 'a;

/// Walks the replica and hands its entries to `sink`, which is told of the last.
pub fn walk(area: &Area, sink: &mut Sink<'_>) -> Result<(), AreaError> {
    let mut out = Frames { items: Vec::new(), bytes: 0, sink, open: true };
    let root_fd = area
        .root()
        .try_clone_to_owned()
        .map_err(|_| AreaError::system("open", ".")(Errno::MFILE))?;
    let root = Name::new(b"root").unwrap_or_else(|_| unreachable!("a valid name"));
    let (root_state, links) = state(root_fd.as_fd()).map_err(AreaError::system("stat", "."))?;
    out.push(InventoryItem {
        parent: None,
        name: root,
        handle: area.root_handle().clone(),
        state: root_state,
        links,
        content: InventoryContent::None,
    });
    // Directories wait by handle where they can be opened by it, so that the
    // queue costs no descriptors; breadth first, so parents come first.
    let mut waiting: VecDeque<(ReplicaHandle, Option<OwnedFd>)> = VecDeque::new();
    let by_handle = handle::open(area.root(), area.root_handle(), OFlags::PATH).is_ok();
    let mut names = names_in_root(area)?;
    let mut at = (area.root_handle().clone(), root_fd);
    while out.open {
        for name in names {
            let Some((child, fd)) = item(&mut out, &at, &name)? else { continue };
            waiting.push_back((child, (!by_handle).then_some(fd)));
        }
        let Some((next, fd)) = waiting.pop_front() else { break };
        let flags = OFlags::RDONLY | OFlags::DIRECTORY;
        let opened = match fd {
            Some(fd) => place::reopen(fd.as_fd(), flags),
            None => handle::open(area.root(), &next, flags),
        };
        let fd = opened.map_err(AreaError::system("open directory", &next))?;
        names = place::list(fd.as_fd())
            .map_err(AreaError::system("list", &next))?
            .into_iter()
            .map(|(name, _)| name)
            .collect();
        at = (next, fd);
    }
    out.flush(true);
    Ok(())
}

/// One entry; its handle and descriptor when it is a directory.
fn item(
    out: &mut Frames<'_, '_>,
    directory: &(ReplicaHandle, OwnedFd),
    name: &Name,
) -> Result<Option<(ReplicaHandle, OwnedFd)>, AreaError> {
    let failed = |action| AreaError::system(action, name);
    let fd = match place::open_path(directory.1.as_fd(), name) {
        Ok(fd) => fd,
        Err(Errno::NOENT) => return Ok(None),
        Err(error) => return Err(failed("open")(error)),
    };
    let found = handle::identify(fd.as_fd()).map_err(failed("identify"))?;
    let (state, links) = state(fd.as_fd()).map_err(failed("stat"))?;
    let (kind, size) = (state.kind, state.size);
    let item = |content| InventoryItem {
        parent: Some(directory.0.clone()),
        name: name.clone(),
        handle: found.clone(),
        state: state.clone(),
        links,
        content,
    };
    match kind {
        Kind::File if size <= PACK_MAX => {
            let file = place::reopen(fd.as_fd(), OFlags::RDONLY).map_err(failed("open"))?;
            let mut bytes = vec![0; usize::try_from(size).unwrap_or(0)];
            let read = place::read_at(&file, &mut bytes, 0).map_err(failed("read"))?;
            out.push(item(InventoryContent::Hash(Hash::of(&bytes[..read]))));
        }
        Kind::File => {
            let file = place::reopen(fd.as_fd(), OFlags::RDONLY).map_err(failed("open"))?;
            chunks(out, file, size, &item).map_err(failed("read"))?;
        }
        Kind::Symlink => {
            let target =
                place::read_link(directory.1.as_fd(), name).map_err(failed("read link"))?;
            out.push(item(InventoryContent::Symlink(ByteBuf::from(target))));
        }
        _ => out.push(item(InventoryContent::None)),
    }
    Ok((kind == Kind::Directory).then_some((found, fd)))
}

fn chunks(
    out: &mut Frames<'_, '_>,
    file: OwnedFd,
    size: u64,
    item: &dyn Fn(InventoryContent) -> InventoryItem,
) -> Result<(), Errno> {
    let average = chunk::average_for(size);
    let mut list = Vec::new();
    let read = |bytes: &mut Vec<u8>| Ok(rustix::io::read(&file, spare_capacity(bytes))?);
    for window in Chunker::new(read, average) {
        let window = window.map_err(|e| Errno::from_io_error(&e).unwrap_or(Errno::IO))?;
        for chunk in window.chunks {
            if list.len() == CHUNKS_MAX {
                let chunks = std::mem::take(&mut list);
                out.push(item(InventoryContent::Chunks { average, chunks, more: true }));
            }
            list.push(chunk);
        }
    }
    out.push(item(InventoryContent::Chunks { average, chunks: list, more: false }));
    Ok(())
}

/// State and link count.
pub(crate) fn state(fd: BorrowedFd<'_>) -> Result<(ObjectState, u32), Errno> {
    let stat = stat::of_fd(fd)?;
    let size = if matches!(stat.kind, Kind::File | Kind::Symlink) { stat.size } else { 0 };
    let attributes = Attributes {
        mode: stat.mode,
        uid: stat.uid,
        gid: stat.gid,
        mtime: stat.mtime,
        xattrs: xattr::read(fd)?,
    };
    let rdev = if stat.kind.is_device() { stat.rdev } else { 0 };
    Ok((ObjectState { kind: stat.kind, attributes, size, rdev }, stat.nlink))
}

struct Frames<'a, 'b> {
    items: Vec<InventoryItem>,
    bytes: usize,
    sink: &'a mut Sink<'b>,
    open: bool,
}

impl Frames<'_, '_> {
    fn push(&mut self, item: InventoryItem) {
        let xattrs = &item.state.attributes.xattrs;
        let content = match &item.content {
            InventoryContent::Chunks { chunks, .. } => chunks.len() * 40,
            InventoryContent::Symlink(target) => target.len(),
            InventoryContent::None | InventoryContent::Hash(_) => 40,
        };
        let xattrs: usize = xattrs.iter().map(|x| x.name.len() + x.value.len()).sum();
        self.bytes += 400 + xattrs + content;
        self.items.push(item);
        if self.items.len() >= ITEMS_MAX || self.bytes >= FRAME_BYTES {
            self.flush(false);
        }
    }

    fn flush(&mut self, last: bool) {
        self.bytes = 0;
        self.open &= (self.sink)(std::mem::take(&mut self.items), last);
    }
}
