//! Whom the daemons tell when something is wrong: `[notify]`.

use std::path::PathBuf;

use serde::{Deserialize, Deserializer, Serialize};

use super::Interval;

/// The `[notify]` table. Without `webhook` and `command` nobody is told.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct NotifyConfig {
    /// Where events are posted as JSON, `http://` or `https://`. Default none.
    #[serde(deserialize_with = "url", skip_serializing_if = "Option::is_none")]
    pub webhook: Option<String>,
    /// The file that holds the key with which posts are signed (HMAC-SHA256).
    /// Absolute. Default none: they are not signed.
    #[serde(deserialize_with = "file", skip_serializing_if = "Option::is_none")]
    pub webhook_secret_file: Option<PathBuf>,
    /// Certificates in PEM of the authorities that `https` receivers are trusted
    /// by. Absolute. Default none: those that browsers trust.
    #[serde(deserialize_with = "file", skip_serializing_if = "Option::is_none")]
    pub webhook_ca_file: Option<PathBuf>,
    /// A program, by its absolute path, and its arguments: run for each event.
    /// Default none.
    #[serde(deserialize_with = "command")]
    pub command: Vec<String>,
    /// How long the command may take. 1 s to 10 min, default 30 s.
    pub command_timeout: Interval<1000, 600_000>,
    /// A lag of more than this is told. 1 s to 30 d, default 5 min.
    pub lag_threshold: Interval<1000, 2_592_000_000>,
    /// How long a lag must last before it is told, and how long anything must be
    /// over before that is. 0 ms to 1 h, default 1 min.
    pub hold: Interval<0, 3_600_000>,
}

impl Default for NotifyConfig {
    fn default() -> Self {
        Self {
            webhook: None,
            webhook_secret_file: None,
            webhook_ca_file: None,
            command: Vec::new(),
            command_timeout: Interval::from_millis(30_000),
            lag_threshold: Interval::from_millis(300_000),
            hold: Interval::from_millis(60_000),
        }
    }
}

impl NotifyConfig {
    /// Checks what no key can check alone.
    pub(super) fn sanitize(&self) -> Result<(), String> {
        let files = self.webhook_secret_file.is_some() || self.webhook_ca_file.is_some();
        if files && self.webhook.is_none() {
            return Err("notify: a secret or authorities for a webhook, but no webhook".to_owned());
        }
        Ok(())
    }
}

fn url<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<String>, D::Error> {
    let text = String::deserialize(deserializer)?;
    let uri = text.parse::<ureq::http::Uri>().ok();
    let valid = uri.is_some_and(|uri| {
        matches!(uri.scheme_str(), Some("http" | "https")) && uri.host().is_some()
    });
    if valid {
        return Ok(Some(text));
    }
    Err(serde::de::Error::custom(format!("{text:?} is not an http:// or https:// address")))
}

fn file<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<PathBuf>, D::Error> {
    super::absolute_path(deserializer).map(Some)
}

fn command<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<String>, D::Error> {
    let words = Vec::<String>::deserialize(deserializer)?;
    let valid = words.first().is_none_or(|program| program.starts_with('/'));
    if valid && !words.iter().any(|word| word.contains('\0')) {
        return Ok(words);
    }
    Err(serde::de::Error::custom(format!(
        "{words:?} is not a command (expected a program's absolute path and its arguments)"
    )))
}
