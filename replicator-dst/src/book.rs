//! Who is let in: pinned certificates, and tokens that wait.

use std::collections::{BTreeSet, HashMap};
use std::sync::{Mutex, MutexGuard, PoisonError, RwLock};

use replicator_common::id::FileSystemId;
use replicator_common::net::identity::Fingerprint;
use replicator_common::net::tls::Trust;
use replicator_common::time::Timestamp;

use crate::replica::Config;
use crate::state::Grants;

/// Who is let in.
pub(crate) struct Book {
    /// A source's daemon has one certificate for all its file systems.
    pins: RwLock<HashMap<Fingerprint, BTreeSet<FileSystemId>>>,
    grants: Mutex<Grants>,
}

impl Trust for Book {
    fn is_pinned(&self, fingerprint: &Fingerprint) -> bool {
        self.pins.read().unwrap_or_else(PoisonError::into_inner).contains_key(fingerprint)
    }

    fn enrolment_open(&self) -> bool {
        self.grants().tokens.open(Timestamp::now())
    }
}

impl Book {
    pub(crate) fn new(grants: Grants) -> Self {
        Self { pins: RwLock::default(), grants: Mutex::new(grants) }
    }

    /// The tokens.
    pub(crate) fn grants(&self) -> MutexGuard<'_, Grants> {
        self.grants.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets the source of a configuration in.
    pub(crate) fn pin(&self, config: &Config) {
        let mut pins = self.pins.write().unwrap_or_else(PoisonError::into_inner);
        pins.entry(config.peer).or_default().insert(config.source.clone());
    }

    /// Lets it in no more; its daemon is let in for its others.
    pub(crate) fn unpin(&self, source: &FileSystemId) {
        let mut pins = self.pins.write().unwrap_or_else(PoisonError::into_inner);
        pins.retain(|_, sources| {
            sources.remove(source);
            !sources.is_empty()
        });
    }

    /// Whether a file system is the peer's own.
    pub(crate) fn may_speak_for(&self, peer: &Fingerprint, source: &FileSystemId) -> bool {
        let pins = self.pins.read().unwrap_or_else(PoisonError::into_inner);
        pins.get(peer).is_some_and(|sources| sources.contains(source))
    }
}
