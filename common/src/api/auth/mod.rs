//! Who may ask: access keys, by which requests are signed, and certificates of
//! clients. Pure.
//!
//! An API without credentials answers everybody, and so listens on loopback
//! alone (the configuration's check sees to it). One with credentials answers
//! nobody without, wherever he calls from.

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
}

impl Permission {
    /// Refuses what is not permitted.
    pub(super) fn check(self, needs: Needs) -> Result<(), ApiError> {
        match (self, needs) {
            (Self::Full, _) | (Self::ReadOnly, Needs::Read) => Ok(()),
            (Self::ReadOnly, Needs::Change) => Err(ApiError::new(
                403,
                "AccessDeniedException",
                "these credentials are for reading only",
            )),
        }
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
            return Ok(Permission::Full);
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
