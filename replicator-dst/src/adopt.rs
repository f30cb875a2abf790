//! What a source may say of objects that the replica had before.

use std::collections::HashMap;

use replicator_common::id::{ObjectId, ReplicaHandle};
use replicator_common::sys::stat;
use replicator_common::wire::Op;
use rustix::fs::OFlags;

use crate::applier::Applier;
use crate::apply::{Place, ReplicaTree, Within};
use crate::area::AreaError;
use crate::objects::Objects;
use crate::seal::SealError;

impl Applier {
    /// Refuses adoptions of what does not stand where the source says, as what it
    /// says. The tree has learnt the batch's places by now.
    ///
    /// INVARIANT (no stranger gets in): a handle from the wire names any object
    /// of the replica's file system, outside of the replica too, and what the map
    /// holds is opened by handle from then on. So it must be found in a directory
    /// that is itself the replica's; and its kind must be true, or content would
    /// be written into a device. Each adoption is looked at, so those of one batch
    /// that stand in each other stand in the replica together: directories do not
    /// go in circles.
    pub(crate) fn check_adoptions(&mut self, ops: &[Op]) -> Result<(), SealError> {
        let area = self.replica.area.clone();
        let mut bound: HashMap<&ObjectId, &ReplicaHandle> = HashMap::new();
        // In the order of the operations, as the plan takes them: the last counts.
        for op in ops {
            match op {
                Op::Root { object } => drop(bound.insert(object, area.root_handle())),
                Op::Adopt { object, handle, .. } => drop(bound.insert(object, handle)),
                _ => {}
            }
        }
        for op in ops {
            let Op::Adopt { object, handle, directory, name, kind } = op else { continue };
            let within = match bound.get(directory) {
                Some(handle) => Some((*handle).clone()),
                None => self.replica.store.get(directory)?.and_then(|known| known.handle),
            };
            let refused = |what: &str| Err(SealError::Breach(format!("object {object} {what}")));
            let Some(within) = within else {
                return refused("is adopted from an unknown directory");
            };
            if within == *area.root_handle() && name == area.hidden_name() {
                return refused("is the destination's own");
            }
            let place = Place { within: Within::Replica(within), name: name.clone() };
            if self.tree.lookup(&place)?.as_ref() != Some(handle) {
                return refused("does not stand where it is to be adopted");
            }
            let Some(fd) = self.tree.open(handle, OFlags::PATH)? else {
                return refused("is gone before it is adopted");
            };
            let found = stat::of_fd(&fd).map_err(AreaError::system("stat", name))?;
            if found.kind != *kind {
                return refused("is not of the kind as which it is to be adopted");
            }
        }
        Ok(())
    }
}
