//! How a session begins.

use replicator_common::wire::SourceHello;
use rustix::io::Errno;

use super::Applier;
use crate::area::AreaError;
use crate::history::mismatch;
use crate::replica::{ReplicaError, renounce, wipe_staging};
use crate::seal::SealError;
use crate::store::Standing;

impl Applier {
    pub(super) fn begin_session(&mut self, hello: &SourceHello) -> Result<Standing, ReplicaError> {
        let replica = self.replica.clone();
        self.cover().map_err(|error| match error {
            SealError::Store(error) => ReplicaError::Store(error),
            SealError::Area(error) => ReplicaError::Area(error),
            SealError::Sync(errno) => AreaError::system("sync", ".")(errno).into(),
            SealError::Breach(what) => AreaError::system("apply", what)(Errno::IO).into(),
            SealError::Unplaceable(_) | SealError::Killed | SealError::Skipped => {
                AreaError::system("apply", "")(Errno::CANCELED).into()
            }
        })?;
        let lost = "an object was missing in the replica";
        let distrust = self.distrust.then_some(lost).or(mismatch(&self.standing, hello));
        // Of another history, or perhaps not on disk: of no use to this session.
        let known = self.standing.source_incarnation == Some(hello.incarnation);
        let useless = self.spoilt || distrust.is_some() || !known;
        if let Some(reason) = distrust {
            tracing::warn!(reason, "source and destination do not fit together: reconciling");
            renounce(&replica.area, &replica.store, &mut self.standing, reason)?;
            self.distrust = false;
            self.marked = None;
        }
        // What is of the session before was kept until now for a failover in
        // between. After renouncing, which takes out what must not be lost.
        if useless {
            wipe_staging(&replica.area)?;
            replica.kept.clear();
        } else {
            replica.kept.collect()?;
        }
        replica.nests.clear();
        self.spoilt = false;
        replica.shared().staged_bytes = 0;
        replica.shared().arriving.clear();
        if self.standing.source_incarnation != Some(hello.incarnation) {
            self.standing.source_incarnation = Some(hello.incarnation);
            replica.store.set_standing(&self.standing)?;
        }
        self.publish();
        Ok(self.standing.clone())
    }
}
