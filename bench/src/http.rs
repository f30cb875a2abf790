//! Small requests to a program's HTTP API in a network namespace.

use std::time::Duration;

use anyhow::{Context, Result};
use serde::de::DeserializeOwned;

use crate::net::Namespace;

/// How long an answer may take.
const LIMIT: Duration = Duration::from_secs(10);

/// Asks for `url`; `key` is Syncthing's, others pass over it.
pub fn get<T: DeserializeOwned + Send>(namespace: &Namespace, url: &str, key: &str) -> Result<T> {
    namespace.inside(|| {
        let agent: ureq::Agent =
            ureq::Agent::config_builder().timeout_global(Some(LIMIT)).build().into();
        let answer = agent.get(url).header("X-API-Key", key).call();
        answer.with_context(|| url.to_owned())?.body_mut().read_json().context(url.to_owned())
    })
}
