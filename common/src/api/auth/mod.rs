//! Who may ask: access keys, by which requests are signed, and certificates of
//! clients. Pure.
//!
//! An API without credentials answers everybody on the host, and so listens on
//! loopback alone (the configuration's check sees to it); of those, only root, the
//! daemon's own user and who started it by `sudo` may change anything ([`local`]): whoever can make a replication
//! has the daemon read, or write, any directory. One with credentials answers nobody
//! without, wherever he calls from.

pub mod local;
pub mod sigv4;

use std::fmt;

use super::ApiError;
use super::route::Needs;
use crate::net::identity::Fingerprint;
use crate::time::Timestamp;

/// A secret. Nothing shows it by accident.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

impl Secret {
    /// Takes it in.
    pub fn new(text: impl Into<String>) -> Self {
        Self(text.into())
    }

    /// Shows it.
    pub fn reveal(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(hidden)")
    }
}

/// An access key, as AWS's clients have them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AccessKey {
    /// Names it, and is no secret.
    pub id: String,
    /// Signs with it.
    pub secret: Secret,
}

/// What somebody may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Permission {
    /// Ask, and change nothing.
    ReadOnly,
    /// Everything.
    Full,
    /// Whoever is on this host: what his user may.
    Local,
}

impl Permission {
    /// Refuses what is not permitted. `is_trusted` says whether a caller on this host
    /// is root or the daemon's own user.
    pub(super) fn check(
        self,
        needs: Needs,
        is_trusted: impl FnOnce() -> bool,
    ) -> Result<(), ApiError> {
        let why = match (self, needs) {
            (Self::Full, _) | (_, Needs::Read) => return Ok(()),
            (Self::Local, Needs::Change) if is_trusted() => return Ok(()),
            (Self::ReadOnly, Needs::Change) => "these credentials are for reading only",
            (Self::Local, Needs::Change) => {
                "without credentials only root, the daemon's own user and who started it by sudo may change anything: for others, configure an [[api_key]]"
            }
        };
        Err(ApiError::new(403, "AccessDeniedException", why))
    }
}

/// Who is let in, with what permission.
#[derive(Clone, Debug, Default)]
pub struct Credentials {
    /// Access keys.
    pub keys: Vec<(AccessKey, Permission)>,
    /// Certificates of clients.
    pub clients: Vec<(Fingerprint, Permission)>,
}

impl Credentials {
    /// Whether nobody has to show any.
    pub fn are_none(&self) -> bool {
        self.keys.is_empty() && self.clients.is_empty()
    }

    /// Who asks, by his certificate or else by the request's signature, and
    /// what he may do.
    ///
    /// # Errors
    /// In AWS's classes; see [`sigv4::verify`].
    pub fn permission(
        &self,
        request: &sigv4::Request<'_>,
        certificate: Option<&Fingerprint>,
        now: Timestamp,
    ) -> Result<Permission, ApiError> {
        if self.are_none() {
            return Ok(Permission::Local);
        }
        let known = |shown| self.clients.iter().find(|(client, _)| client == shown);
        if let Some((_, permission)) = certificate.and_then(known) {
            return Ok(*permission);
        }
        let named = |id: &str| self.keys.iter().find(|(key, _)| key.id == id);
        sigv4::verify(request, now, |id| named(id).map(|(key, permission)| (key, *permission)))
    }
}

#[cfg(test)]
mod tests;
