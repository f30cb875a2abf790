//! What both daemons' configurations say of the HTTP API.

use std::net::SocketAddr;
use std::path::Path;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::api::auth::{AccessKey, Credentials, Permission, Secret};
use crate::net::identity::Fingerprint;

/// The fewest characters of a secret: with fewer, it could be found by trying.
const SECRET_MIN: usize = 32;

/// An `[[api_key]]` table.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ApiKeyConfig {
    /// Names the key: 16 to 128 letters and digits. Required.
    #[serde(deserialize_with = "key_id")]
    pub id: String,
    /// Signs requests; never shown. At least 32 characters. Required.
    #[serde(deserialize_with = "secret", serialize_with = "hidden")]
    pub secret: Secret,
    /// May look, and change nothing. Default `false`.
    #[serde(default)]
    pub read_only: bool,
}

/// An `[[api_client]]` table.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ApiClientConfig {
    /// The SHA-256 of the client's certificate in DER form. Required.
    pub fingerprint: Fingerprint,
    /// May look, and change nothing. Default `false`.
    #[serde(default)]
    pub read_only: bool,
}

/// The API's part of a daemon's configuration.
#[derive(Clone, Copy, Debug)]
pub struct ApiConfig<'a> {
    /// `api`
    pub address: SocketAddr,
    /// `api_hosts`
    pub hosts: &'a [String],
    /// `region`
    pub region: &'a str,
    /// `api_tls`
    pub tls: bool,
    /// `api_certificate`
    pub certificate: Option<&'a Path>,
    /// `api_private_key`
    pub private_key: Option<&'a Path>,
    /// `[[api_key]]`
    pub keys: &'a [ApiKeyConfig],
    /// `[[api_client]]`
    pub clients: &'a [ApiClientConfig],
}

impl ApiConfig<'_> {
    /// Who is let in.
    pub fn credentials(&self) -> Credentials {
        let permission =
            |read_only| if read_only { Permission::ReadOnly } else { Permission::Full };
        let key = |key: &ApiKeyConfig| {
            let access = AccessKey { id: key.id.clone(), secret: key.secret.clone() };
            (access, permission(key.read_only))
        };
        let client = |client: &ApiClientConfig| (client.fingerprint, permission(client.read_only));
        Credentials {
            keys: self.keys.iter().map(key).collect(),
            clients: self.clients.iter().map(client).collect(),
        }
    }

    /// Checks what no key can check alone.
    pub(super) fn check(&self) -> Result<(), String> {
        let api = self.address;
        let secured = self.tls && !(self.keys.is_empty() && self.clients.is_empty());
        if !api.ip().is_loopback() && !secured {
            return Err(format!(
                "api = \"{api}\" can be reached from other hosts: set api_tls = true and give an [[api_key]] or [[api_client]], or use a loopback address"
            ));
        }
        let looking = self.keys.iter().all(|key| key.read_only)
            && self.clients.iter().all(|client| client.read_only);
        if looking && !(self.keys.is_empty() && self.clients.is_empty()) {
            return Err("each [[api_key]] and [[api_client]] is read_only: nobody could fail over; add an [[api_key]] without it".to_owned());
        }
        if self.certificate.is_some() != self.private_key.is_some() {
            return Err("api_certificate and api_private_key go together".to_owned());
        }
        if !self.tls && self.certificate.is_some() {
            return Err("api_certificate is of no use without api_tls = true".to_owned());
        }
        if !self.tls && !self.clients.is_empty() {
            return Err("[[api_client]] is of no use without api_tls = true".to_owned());
        }
        for (index, key) in self.keys.iter().enumerate() {
            if self.keys[..index].iter().any(|other| other.id == key.id) {
                return Err(format!("api_key {} is given twice", key.id));
            }
        }
        Ok(())
    }
}

fn key_id<'de, D: Deserializer<'de>>(deserializer: D) -> Result<String, D::Error> {
    let id = String::deserialize(deserializer)?;
    if (16..=128).contains(&id.len()) && id.bytes().all(|b| b.is_ascii_alphanumeric()) {
        return Ok(id);
    }
    Err(serde::de::Error::custom(format!(
        "{id:?} is no access key's id (16 to 128 letters and digits)"
    )))
}

fn secret<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Secret, D::Error> {
    let text = String::deserialize(deserializer)?;
    if text.chars().count() >= SECRET_MIN {
        return Ok(Secret::new(text));
    }
    Err(serde::de::Error::custom(format!(
        "the secret of an access key has at least {SECRET_MIN} characters"
    )))
}

fn hidden<S: Serializer>(_: &Secret, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str("(hidden)")
}
