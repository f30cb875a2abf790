//! `replicator-dst`'s configuration.

use std::collections::BTreeSet;
use std::net::{Ipv6Addr, SocketAddr};
use std::path::PathBuf;

use serde::{Deserialize, Deserializer, Serialize};

use super::{
    ApiClientConfig, ApiConfig, ApiKeyConfig, DEFAULT_API, DEFAULT_REGION, Interval, LogFormat,
    NotifyConfig, Sanitize,
};

/// What `replicator-dst serve --config FILE` reads.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct DestinationConfig {
    /// The directory that holds this daemon's certificate, configurations,
    /// commit log and objects map. Made (mode 0700) when missing. Absolute;
    /// not inside a replica. Default `/var/lib/replicator/destination`.
    #[serde(deserialize_with = "super::absolute_path")]
    pub state_dir: PathBuf,
    /// Address and UDP port on which sources connect (QUIC). `[::]` takes
    /// IPv4 too, unless the sysctl `net.ipv6.bindv6only` is 1. Default
    /// `[::]:4481`.
    pub listen: SocketAddr,
    /// `HOST:PORT` under which sources reach `listen`, as written into
    /// tokens. Needed where this host's own name does not do (NAT, several
    /// networks). Default: this host's name and `listen`'s port.
    #[serde(deserialize_with = "host_and_port", skip_serializing_if = "Option::is_none")]
    pub advertise: Option<String>,
    /// Address and port of the HTTP API. Default `127.0.0.1:4480`; with both
    /// daemons on one host, give one of them another port. One that other
    /// hosts can reach needs `api_tls` and credentials: `[[api_key]]` or
    /// `[[api_client]]`.
    pub api: SocketAddr,
    /// Names, beside `localhost` and addresses, under which clients may call
    /// the API; requests for other names are refused, since a web page could
    /// have made them (DNS rebinding). Default none.
    #[serde(deserialize_with = "super::host_names")]
    pub api_hosts: Vec<String>,
    /// Whether the API speaks HTTPS (TLS 1.3) instead of HTTP. Default `false`.
    pub api_tls: bool,
    /// Certificate for that, with what leads up to its authority: PEM.
    /// Absolute. Needs `api_private_key`. Default: a self-signed one, which is
    /// made and kept in the state directory, `api-certificate.pem`.
    #[serde(deserialize_with = "super::some_absolute_path")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub api_certificate: Option<PathBuf>,
    /// Its private key: PEM. Absolute.
    #[serde(deserialize_with = "super::some_absolute_path")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub api_private_key: Option<PathBuf>,
    /// The region that answers in EFS's form name. EFS's pattern. Default
    /// `xx-local`.
    #[serde(deserialize_with = "super::region")]
    pub region: String,
    /// How long an enrolment token can be used after it was issued. 1 min to
    /// 7 d, default 1 h.
    pub token_validity: Interval<60_000, 604_800_000>,
    /// What is logged where `RUST_LOG` is not set, in its syntax. Default
    /// `info`.
    pub log: String,
    /// How log lines look: `text` or `json`. Default `text`.
    pub log_format: LogFormat,
    /// Whom to tell when something is wrong. Default nobody.
    pub notify: NotifyConfig,
    /// The replicas of this host: for each that no source replicates to yet,
    /// an enrolment token is printed at start. Others can be enrolled by
    /// `replicator-dst token --replica PATH`. Default none.
    #[serde(rename = "replica")]
    pub replicas: Vec<ReplicaConfig>,
    /// Access keys, by which clients sign requests. With one of these or of
    /// `api_client`, the API answers nobody without credentials. Default none.
    #[serde(rename = "api_key")]
    pub api_keys: Vec<ApiKeyConfig>,
    /// Certificates of clients. Default none.
    #[serde(rename = "api_client")]
    pub api_clients: Vec<ApiClientConfig>,
}

/// A `[[replica]]` table.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ReplicaConfig {
    /// The directory or mount that becomes the replica. Made when missing.
    /// Absolute. Required.
    #[serde(deserialize_with = "super::absolute_path")]
    pub path: PathBuf,
    /// Whether a directory that is not empty is taken: then only differences
    /// travel, and what the source lacks is moved to lost+found. Default
    /// `false`: it is refused.
    #[serde(default)]
    pub reconcile: bool,
}

impl Default for DestinationConfig {
    fn default() -> Self {
        Self {
            state_dir: PathBuf::from("/var/lib/replicator/destination"),
            listen: SocketAddr::new(Ipv6Addr::UNSPECIFIED.into(), 4481),
            advertise: None,
            api: DEFAULT_API,
            api_hosts: Vec::new(),
            api_tls: false,
            api_certificate: None,
            api_private_key: None,
            region: DEFAULT_REGION.to_owned(),
            token_validity: Interval::from_millis(3_600_000),
            log: "info".to_owned(),
            log_format: LogFormat::Text,
            notify: NotifyConfig::default(),
            replicas: Vec::new(),
            api_keys: Vec::new(),
            api_clients: Vec::new(),
        }
    }
}

impl DestinationConfig {
    /// What concerns the API.
    pub fn api(&self) -> ApiConfig<'_> {
        ApiConfig {
            address: self.api,
            hosts: &self.api_hosts,
            region: &self.region,
            tls: self.api_tls,
            certificate: self.api_certificate.as_deref(),
            private_key: self.api_private_key.as_deref(),
            keys: &self.api_keys,
            clients: &self.api_clients,
        }
    }
}

impl Sanitize for DestinationConfig {
    fn sanitize(&self) -> Result<(), String> {
        self.api().check()?;
        self.notify.sanitize()?;
        if self.listen.port() == 0 {
            return Err("listen needs a fixed port: tokens name it".to_owned());
        }
        let mut seen = BTreeSet::new();
        for replica in &self.replicas {
            if !seen.insert(&replica.path) {
                return Err(format!("replica {} is given twice", replica.path.display()));
            }
        }
        Ok(())
    }
}

fn host_and_port<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<String>, D::Error> {
    let text = String::deserialize(deserializer)?;
    let valid = crate::net::quic::check_host_port(&text).is_ok();
    if valid {
        return Ok(Some(text));
    }
    Err(serde::de::Error::custom(format!(
        "{text:?} is not HOST:PORT (as in replica.example.org:4481 or [2001:db8::1]:4481)"
    )))
}
