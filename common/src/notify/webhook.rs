//! Events by HTTP: POST of an event's JSON, signed.

use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use hmac::Mac;
use rustls::crypto::aws_lc_rs;
use ureq::tls::{PemItem, RootCerts, TlsConfig, parse_pem};

use super::{Channel, Event, NotifyError};
use crate::config::NotifyConfig;
use crate::keyed;
use crate::time::Timestamp;

/// How long a receiver may take.
const TIME: Duration = Duration::from_secs(10);

/// When the request was made, seconds since the epoch.
const TIMESTAMP: &str = "Replicator-Timestamp";
/// `v1=` and HMAC-SHA256, in hexadecimal, of that time as it is written there, a
/// dot, and the body.
const SIGNATURE: &str = "Replicator-Signature";

pub(super) struct Webhook {
    url: String,
    secret: Option<Vec<u8>>,
    agent: ureq::Agent,
}

impl Webhook {
    /// As configured; `None` when there is none.
    pub(super) fn open(config: &NotifyConfig) -> Result<Option<Self>, NotifyError> {
        let Some(url) = config.webhook.clone() else { return Ok(None) };
        let secret = config.webhook_secret_file.as_deref().map(secret).transpose()?;
        let mut tls = TlsConfig::builder()
            .unversioned_rustls_crypto_provider(Arc::new(aws_lc_rs::default_provider()));
        if let Some(file) = &config.webhook_ca_file {
            tls = tls.root_certs(authorities(file)?);
        }
        let agent = ureq::Agent::config_builder()
            .timeout_global(Some(TIME))
            // A redirection would take the event to somebody else.
            .max_redirects(0)
            .tls_config(tls.build())
            .build()
            .new_agent();
        Ok(Some(Self { url, secret, agent }))
    }
}

impl Channel for Webhook {
    const NAME: &'static str = "webhook";
    const RETRIES: bool = true;

    fn tell(&self, event: &Event) -> Result<(), String> {
        let body = serde_json::to_vec(event).map_err(|error| error.to_string())?;
        let time = (Timestamp::now().0 / 1_000_000_000).to_string();
        let mut request = self
            .agent
            .post(&self.url)
            .header("Content-Type", "application/json")
            .header("User-Agent", concat!("replicator/", env!("CARGO_PKG_VERSION")))
            .header(TIMESTAMP, &time);
        if let Some(secret) = &self.secret {
            let said = keyed::hmac(secret).chain_update(&time).chain_update(".");
            let code = hex::encode(said.chain_update(&body).finalize().into_bytes());
            request = request.header(SIGNATURE, format!("v1={code}"));
        }
        let answer = request.send(&body[..]).map_err(|error| error.to_string())?;
        match answer.status().as_u16() {
            200..=299 => Ok(()),
            other => Err(format!("the receiver answered {other}")),
        }
    }
}

fn read(path: &Path) -> Result<Vec<u8>, NotifyError> {
    fs::read(path).map_err(|source| NotifyError::Read { path: path.to_owned(), source })
}

/// The key: what the file holds, without white space around it.
fn secret(path: &Path) -> Result<Vec<u8>, NotifyError> {
    let secret = read(path)?.trim_ascii().to_vec();
    if secret.is_empty() {
        let reason = "the file has no secret in it".to_owned();
        return Err(NotifyError::Invalid { path: path.to_owned(), reason });
    }
    Ok(secret)
}

fn authorities(path: &Path) -> Result<RootCerts, NotifyError> {
    let invalid = |reason: String| NotifyError::Invalid { path: path.to_owned(), reason };
    let mut found = Vec::new();
    for item in parse_pem(&read(path)?) {
        if let PemItem::Certificate(one) = item.map_err(|error| invalid(error.to_string()))? {
            found.push(one);
        }
    }
    if found.is_empty() {
        return Err(invalid("the file has no certificate in PEM in it".to_owned()));
    }
    Ok(RootCerts::from(found))
}

#[cfg(test)]
mod tests;
