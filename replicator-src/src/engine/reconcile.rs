//! A replica that was not empty: what it holds is taken into the index, object
//! by object, so that the walk that follows finds only differences.
//!
//! The destination sends its inventory, parents before children. An item whose
//! name leads to an object of the same kind on the source is *adopted*: the
//! replica's object stands for the source's from now on, with the state and
//! content that the destination reported. An item without counterpart is
//! adopted as *foreign*; the walk finds its name missing on the source, and it
//! is set aside into lost+found with all below it. Nothing is deleted.
//!
//! # Memory
//! However large the replica is: the parts of the inventory that were asked for
//! ([`WINDOW`]), the adoptions under way (as many batches as may be), the directories
//! whose entries are still to come (the inventory goes breadth first), the
//! objects with several names, and one list of chunks, bounded by the source's
//! own file ([`chunks_of_use`]).

use std::collections::{HashMap, HashSet};

use replicator_common::chunk::{AVERAGE_MAX, AVERAGE_MIN, Chunk};
use replicator_common::id::{BatchId, BatchNonce, ObjectId, ReplicaHandle};
use replicator_common::name::Name;
use replicator_common::object::Kind;
use replicator_common::time::Timestamp;
use replicator_common::wire::{
    BatchHeader, Hash, InventoryContent, InventoryItem, Op, SourceMessage,
};
use rustix::fs::OFlags;

use super::{Engine, EngineError};
use crate::index::{Content, Delta, EntryChange, Known, View};
use crate::plan::{Lookup, Seen, Tree};
use crate::read::{lane, small};
use crate::replies::{Breach, Parts};
use crate::session::Session;
use crate::source::Opened;

/// Stands for content that is not known: no content has this hash.
const UNKNOWN: Hash = Hash([0; 32]);
/// Adoptions in one batch.
const BATCH: usize = 4096;
/// Parts of the inventory, of about a mebibyte each, that are asked for ahead.
const WINDOW: usize = 4;

/// A reconciliation under way.
#[derive(Default)]
pub(super) struct Reconcile {
    /// Parts that were asked for, and those that arrived and are to be adopted.
    parts: Parts,
    /// The last part was adopted.
    ended: bool,
    /// Source directory of each replica directory that was adopted and whose
    /// entries are still to come.
    directories: HashMap<ReplicaHandle, ObjectId>,
    /// The replica's directory whose entries are coming.
    current: Option<ReplicaHandle>,
    /// What was adopted and is in no batch yet; the index knows of the rest.
    adopted: HashSet<ObjectId>,
    /// What each object of the replica with several names was adopted as: it
    /// comes several times.
    handles: HashMap<ReplicaHandle, ObjectId>,
    /// Chunks of a file whose list is not through.
    partial: Option<Partial>,
    ops: Vec<Op>,
    delta: Delta,
    complete: bool,
}

/// A list of chunks that comes in parts.
struct Partial {
    handle: ReplicaHandle,
    /// `None` once there were more than may be of use.
    chunks: Option<Vec<Chunk>>,
}

impl Reconcile {
    pub(super) fn is_complete(&self) -> bool {
        self.complete
    }
}

impl Engine {
    /// Asks for the inventory.
    pub(super) fn start_reconcile(&mut self, session: &Session) -> Result<(), EngineError> {
        tracing::info!("the replica is not empty: reconciling");
        self.index.store().set_reconciling(true)?;
        let mut state = Reconcile::default();
        (0..WINDOW).for_each(|_| ask(&mut state.parts, session));
        self.reconcile = Some(state);
        Ok(())
    }

    /// A part of the inventory arrived. It is adopted when it is its turn.
    pub(super) fn inventory(&mut self, items: Vec<InventoryItem>, last: bool) {
        let arrived = match &mut self.reconcile {
            Some(state) => state.parts.arrived(items, last),
            None => Err(Breach::Inventory),
        };
        if let Err(breach) = arrived {
            self.breach(&breach);
        }
    }

    /// Adopts parts of the inventory while few enough batches are under way;
    /// for each it asks for one more.
    pub(super) fn continue_reconcile(&mut self) -> Result<(), EngineError> {
        let Some(mut state) = self.reconcile.take() else { return Ok(()) };
        while self.in_flight.have_room(false)
            && let Some((items, last)) = state.parts.take()
        {
            self.adopt_part(&mut state, items, last)?;
        }
        if state.ended && self.in_flight.is_empty() {
            // Not before: what is not acknowledged may be lost, and is in no
            // record of what is dirty.
            self.index.store().set_reconciling(false)?;
            state = Reconcile { complete: true, ..Reconcile::default() };
        }
        self.reconcile = Some(state);
        Ok(())
    }

    fn adopt_part(
        &mut self,
        state: &mut Reconcile,
        items: Vec<InventoryItem>,
        last: bool,
    ) -> Result<(), EngineError> {
        for item in items {
            self.adopt(state, item)?;
        }
        if last || state.ops.len() >= BATCH {
            self.commit_adoptions(state)?;
        }
        state.ended |= last;
        if let (false, Some(session)) = (last, &self.session) {
            ask(&mut state.parts, session);
        }
        Ok(())
    }

    fn adopt(&mut self, state: &mut Reconcile, item: InventoryItem) -> Result<(), EngineError> {
        let root = self.opener.root().id.clone();
        let Some(parent) = &item.parent else {
            let known = inventoried(&item, Content::None, self.next_batch, None);
            state.directories.insert(item.handle, root.clone());
            state.ops.push(Op::Root { object: root.clone() });
            state.delta.objects.push((root, Some(known)));
            return Ok(());
        };
        if state.current.as_ref() != Some(parent) {
            // Directories come one after the other: that one is through.
            if let Some(through) = state.current.replace(parent.clone()) {
                state.directories.remove(&through);
            }
        }
        let Some(directory) = state.directories.get(parent).cloned() else {
            // Below something foreign: it goes where that goes.
            return Ok(());
        };
        let Some(content) = self.inventory_content(state, &item)? else { return Ok(()) };
        if let Some(object) = state.handles.get(&item.handle).cloned() {
            second_name(state, object, directory, item.name);
            return Ok(());
        }
        let found = match self.tree.lookup(&directory, &item.name)? {
            Lookup::Found(seen) if self.may_stand_for(&item, &seen, &directory) => {
                Some(seen.object)
            }
            _ => None,
        };
        let fresh = match &found {
            Some(object) => {
                self.index.object(object)?.is_none() && state.adopted.insert(object.clone())
            }
            None => false,
        };
        let object = match found {
            Some(object) if fresh => object,
            _ => match ObjectId::foreign(&item.handle) {
                Some(foreign) => foreign,
                None => return Ok(()),
            },
        };
        if item.state.kind == Kind::Directory && !object.is_foreign() {
            state.directories.insert(item.handle.clone(), object.clone());
        }
        if item.links > 1 && item.state.kind != Kind::Directory {
            state.handles.insert(item.handle.clone(), object.clone());
        }
        let place = (directory.clone(), item.name.clone());
        let known = inventoried(&item, content, self.next_batch, Some(place));
        state.ops.push(Op::Adopt {
            object: object.clone(),
            handle: item.handle,
            directory: directory.clone(),
            name: item.name.clone(),
            kind: item.state.kind,
        });
        state.delta.entries.push(EntryChange {
            directory,
            name: item.name,
            old: None,
            new: Some(object.clone()),
        });
        state.delta.objects.push((object, Some(known)));
        Ok(())
    }

    /// Whether the replica's object can become the source's: it is of the same
    /// kind, and has in common what no object can change.
    fn may_stand_for(&self, item: &InventoryItem, seen: &Seen, directory: &ObjectId) -> bool {
        if seen.stat.kind != item.state.kind {
            return false;
        }
        match &item.content {
            InventoryContent::Symlink(target) => {
                let hint = (directory.clone(), item.name.clone());
                let flags = OFlags::PATH | OFlags::CLOEXEC;
                let fd = match self.opener.open(&seen.object, Some(&hint), flags) {
                    Ok(Opened::Here(fd)) => Some(fd),
                    Ok(Opened::Gone | Opened::Away) | Err(_) => None,
                };
                let found = fd.and_then(|fd| rustix::fs::readlinkat(fd, "", Vec::new()).ok());
                found.is_some_and(|found| found.as_bytes() == target.as_slice())
            }
            _ => !seen.stat.kind.is_device() || seen.stat.rdev == item.state.rdev,
        }
    }

    /// The content as the index keeps it; `None` while more chunks follow.
    fn inventory_content(
        &mut self,
        state: &mut Reconcile,
        item: &InventoryItem,
    ) -> Result<Option<Content>, EngineError> {
        Ok(Some(match &item.content {
            InventoryContent::None => Content::None,
            InventoryContent::Symlink(target) => Content::Symlink(target.to_vec()),
            InventoryContent::Hash(hash) => {
                Content::Whole(small::whole_hash(item.state.size, hash))
            }
            InventoryContent::Chunks { average, chunks, more } => {
                let begun = state.partial.take().filter(|partial| partial.handle == item.handle);
                let most = match (&begun, more) {
                    (None, false) => usize::MAX,
                    _ => chunks_of_use(self.size_here(state, item)?, *average),
                };
                let mut all = begun.map_or_else(|| Some(Vec::new()), |partial| partial.chunks);
                // Nothing is kept of a list that is too long.
                all = all.filter(|all| all.len() + chunks.len() <= most);
                if let Some(all) = &mut all {
                    all.extend_from_slice(chunks);
                }
                if *more {
                    state.partial = Some(Partial { handle: item.handle.clone(), chunks: all });
                    return Ok(None);
                }
                match all {
                    Some(all) => {
                        let list = self.next_list()?;
                        self.index.store().put_chunks(list, &all)?;
                        Content::Chunks { average: *average, list, digest: lane::digest(&all) }
                    }
                    None => Content::Whole(UNKNOWN),
                }
            }
        }))
    }

    /// Bytes that the source has under the item's name; 0 where that is no file.
    fn size_here(&mut self, state: &Reconcile, item: &InventoryItem) -> Result<u64, EngineError> {
        let directory = item.parent.as_ref().and_then(|parent| state.directories.get(parent));
        let Some(directory) = directory else { return Ok(0) };
        Ok(match self.tree.lookup(directory, &item.name)? {
            Lookup::Found(seen) if seen.stat.kind == Kind::File => seen.stat.size,
            _ => 0,
        })
    }

    fn commit_adoptions(&mut self, state: &mut Reconcile) -> Result<(), EngineError> {
        if state.ops.is_empty() {
            return Ok(());
        }
        let ops = std::mem::take(&mut state.ops);
        state.adopted.clear();
        let delta = std::mem::take(&mut state.delta);
        let header = BatchHeader {
            nonce: BatchNonce::random(),
            seq: self.cursor,
            watermark: Timestamp::NEVER,
            exact: None,
            packed: 0,
            ops: ops.len() as u64,
            complete: false,
            bytes_changed: 0,
            bytes_shipped: 0,
        };
        self.send_batch(super::commit::Ready {
            ops,
            delta,
            header,
            input: Default::default(),
            closed: None,
            dropped: Vec::new(),
            deletions: 0,
            born: Vec::new(),
            progress: (0, 0),
            objects: 0,
            before: Timestamp::NEVER,
            reached: Timestamp::NEVER,
        })
    }
}

/// How many chunks of a replica's file may be of use for the source's, which has
/// `size` bytes: four times as many as it is cut into, and never fewer than 1 Mi
/// (36 MiB of memory, a file of 16 GiB at least). Of a longer list nothing is kept,
/// and where the two files differ, the source's is sent whole. INVARIANT (bounded
/// resources): a destination that continues a list without end costs no more.
fn chunks_of_use(size: u64, average: u32) -> usize {
    let pieces = size / u64::from(average.clamp(AVERAGE_MIN, AVERAGE_MAX));
    usize::try_from((1 << 20) + 4 * pieces).unwrap_or(usize::MAX)
}

fn ask(parts: &mut Parts, session: &Session) {
    parts.ask();
    if let Err(error) = session.send(&SourceMessage::RequestInventory) {
        // The link tells of the end too.
        tracing::debug!(%error, "cannot ask for the inventory");
    }
}

/// Another name of an object that was adopted under its first: an entry that is
/// in place. Where the source has something else under that name, the walk sees
/// the difference.
fn second_name(state: &mut Reconcile, object: ObjectId, directory: ObjectId, name: Name) {
    state.ops.push(Op::Entry {
        directory: directory.clone(),
        name: name.clone(),
        old: None,
        new: Some(object.clone()),
    });
    state.delta.entries.push(EntryChange { directory, name, old: None, new: Some(object) });
}

/// What the index knows of an adopted object: its times of reading say that
/// nothing is proven, so the walk looks at it.
fn inventoried(
    item: &InventoryItem,
    content: Content,
    batch: BatchId,
    entry: Option<(ObjectId, Name)>,
) -> Known {
    Known {
        state: item.state.clone(),
        ctime: Timestamp::NEVER,
        read_at: Timestamp::NEVER,
        version: batch,
        content,
        links: u32::from(entry.is_some()),
        nlink: 0,
        entry,
    }
}
