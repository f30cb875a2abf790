//! How a daemon is reached, and by what the two know each other.

use std::fmt;
use std::path::Path;
use std::sync::Arc;

use rustls::ClientConfig;

use super::ClientError;
use crate::api::auth::{AccessKey, Secret};
use crate::net::https::{self, Certificate, Trusted};

/// How a daemon is asked.
#[derive(Clone)]
pub struct Access {
    /// `http://HOST:PORT` or `https://HOST:PORT`.
    pub endpoint: String,
    /// Whose certificate is the right one; needed for https.
    pub trusted: Option<Trusted>,
    /// The client's own certificate.
    pub certificate: Option<Certificate>,
    /// Signs requests.
    pub key: Option<AccessKey>,
}

impl fmt::Debug for Access {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Access").field("endpoint", &self.endpoint).finish_non_exhaustive()
    }
}

impl Access {
    /// Without credentials.
    pub fn new(endpoint: &str) -> Self {
        Self { endpoint: endpoint.to_owned(), trusted: None, certificate: None, key: None }
    }

    /// Trusts the authorities in a PEM file.
    ///
    /// # Errors
    /// When there are none in it.
    pub fn trust_file(&mut self, path: &Path) -> Result<(), ClientError> {
        let authorities = https::read_certificates(path).map_err(explain)?;
        self.trusted = Some(Trusted::Authorities(authorities));
        Ok(())
    }

    /// Shows the certificate in a PEM file, whose key is in another.
    ///
    /// # Errors
    /// When they cannot be used.
    pub fn show(&mut self, certificate: &Path, key: &Path) -> Result<(), ClientError> {
        self.certificate = Some(Certificate::read(certificate, key).map_err(explain)?);
        Ok(())
    }

    /// Signs with a key.
    pub fn sign_with(&mut self, id: &str, secret: &str) {
        self.key = Some(AccessKey { id: id.to_owned(), secret: Secret::new(secret) });
    }

    /// What https needs; nothing for http.
    pub(super) fn tls(&self, endpoint: &str) -> Result<Option<Arc<ClientConfig>>, ClientError> {
        if !endpoint.starts_with("https:") {
            return Ok(None);
        }
        let trusted = self.trusted.as_ref().ok_or_else(|| {
            ClientError::Access(format!(
                "{endpoint} needs --fingerprint (which the daemon logs when it starts) or --ca"
            ))
        })?;
        https::client(trusted, self.certificate.as_ref()).map(Some).map_err(explain)
    }
}

fn explain(error: impl fmt::Display) -> ClientError {
    ClientError::Access(error.to_string())
}
