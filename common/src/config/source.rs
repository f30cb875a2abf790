//! `replicator-src`'s configuration.

use std::net::SocketAddr;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::{
    ApiClientConfig, ApiConfig, ApiKeyConfig, DEFAULT_API, DEFAULT_REGION, Interval, LogFormat,
    Maybe, NotifyConfig, Sanitize, Size,
};
use crate::control::WatcherChoice;

/// What `replicator-src serve --config FILE` reads. What is replicated is not
/// here: configurations are made and deleted through the API.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct SourceConfig {
    /// The directory that holds this daemon's certificate, configurations,
    /// journal and index. Made (mode 0700) when missing. Absolute; not inside
    /// a replicated tree. Default `/var/lib/replicator/source`.
    #[serde(deserialize_with = "super::absolute_path")]
    pub state_dir: PathBuf,
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
    /// The longest time between batches: an idle source's watermark moves on
    /// at this pace. 100 ms to 60 s, default 1 s.
    pub heartbeat: Interval<100, 60_000>,
    /// How long a large file must be left alone before it is shipped, unless
    /// it is never left alone: then eight times as long. 0 ms to 60 s, default 250 ms.
    pub settle: Interval<0, 60_000>,
    /// How often the source is walked where events alone do not suffice: by
    /// the `scan` watcher, and by the others on a file system that also changes
    /// without events, or while `inotify` has no watch on some directory. 1 s
    /// to 7 d, default 60 s.
    pub rescan_interval: Interval<1000, 604_800_000>,
    /// The most content bytes of small files in one batch, which bounds what
    /// is staged for it. 1 MiB to 4 GiB, default 64 MiB.
    pub max_batch_bytes: Size<{ 1 << 20 }, { 4 << 30 }>,
    /// The share of the source's objects, in percent, with whose deletion within
    /// `halt_deletions_window` replication halts before the replica follows.
    /// 0 (never) to 100, default 50.
    #[serde(deserialize_with = "super::percent")]
    pub halt_deletions_percent: u8,
    /// Fewer deletions than these, in objects, never halt replication. 1 to
    /// 1,000,000,000, default 1000.
    #[serde(deserialize_with = "super::objects")]
    pub halt_deletions_min: u64,
    /// Within which time deletions count together. 1 s to 7 d, default 10 min.
    pub halt_deletions_window: Interval<1000, 604_800_000>,
    /// How often source and replica are compared by content: a pass is spread
    /// over most of this time. `"never"`: only when `replicator verify` asks. 1 s
    /// to 365 d, default 24 h.
    pub verify_interval: Maybe<Interval<1000, 31_536_000_000>>,
    /// What a pass that begins by itself reads a second at most, on either side;
    /// it is slower where the interval allows. An object counts as 16 KiB at
    /// least. 64 KiB to 16 GiB, default 64 MiB.
    pub verify_rate: Size<{ 64 << 10 }, { 16 << 30 }>,
    /// The watcher of a configuration whose creation names none: `auto`,
    /// `fanotify`, `inotify` or `scan`. Default `auto`.
    pub watcher: WatcherChoice,
    /// Whether device nodes are replicated by a configuration whose creation
    /// does not say. Default `false`.
    pub devices: bool,
    /// What is logged where `RUST_LOG` is not set, in its syntax. Default
    /// `info`.
    pub log: String,
    /// How log lines look: `text` or `json`. Default `text`.
    pub log_format: LogFormat,
    /// Whom to tell when something is wrong. Default nobody.
    pub notify: NotifyConfig,
    /// Access keys, by which clients sign requests. With one of these or of
    /// `api_client`, the API answers nobody without credentials. Default none.
    #[serde(rename = "api_key")]
    pub api_keys: Vec<ApiKeyConfig>,
    /// Certificates of clients. Default none.
    #[serde(rename = "api_client")]
    pub api_clients: Vec<ApiClientConfig>,
}

impl Default for SourceConfig {
    fn default() -> Self {
        Self {
            state_dir: PathBuf::from("/var/lib/replicator/source"),
            api: DEFAULT_API,
            api_hosts: Vec::new(),
            api_tls: false,
            api_certificate: None,
            api_private_key: None,
            region: DEFAULT_REGION.to_owned(),
            heartbeat: Interval::from_millis(1000),
            settle: Interval::from_millis(250),
            rescan_interval: Interval::from_millis(60_000),
            max_batch_bytes: Size::from_bytes(64 << 20),
            halt_deletions_percent: 50,
            halt_deletions_min: 1000,
            halt_deletions_window: Interval::from_millis(600_000),
            verify_interval: Maybe(Some(Interval::from_millis(86_400_000))),
            verify_rate: Size::from_bytes(64 << 20),
            watcher: WatcherChoice::Auto,
            devices: false,
            log: "info".to_owned(),
            log_format: LogFormat::Text,
            notify: NotifyConfig::default(),
            api_keys: Vec::new(),
            api_clients: Vec::new(),
        }
    }
}

impl SourceConfig {
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

impl Sanitize for SourceConfig {
    fn sanitize(&self) -> Result<(), String> {
        self.api().check()?;
        self.notify.sanitize()
    }
}
