//! The API from the other end: what the command line asks daemons with.

mod access;
mod tls;

use std::time::Duration;

use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use ureq::unversioned::resolver::DefaultResolver;
use ureq::unversioned::transport::{Connector, TcpConnector};

use super::auth::{AccessKey, sigv4};
use super::efs::{Configuration, Protection, Replications};
use super::own;
use crate::config::DEFAULT_REGION;
use crate::control::DeletionMode;
use crate::status::{FailoverReport, Status};
use crate::time::Timestamp;
use crate::verification::Findings;

pub use access::Access;
use tls::TlsConnector;

/// Where daemons are asked unless told otherwise.
pub const DEFAULT_ENDPOINT: &str = "http://127.0.0.1:4480";
/// How long a connection may take.
const CONNECT_TIME: Duration = Duration::from_secs(10);
/// How long an answer to a question may take.
const ASK_TIME: Duration = Duration::from_secs(30);
/// What an answer to a wait may take beyond the time waited.
const WAIT_MARGIN: Duration = Duration::from_secs(30);
/// The most bytes of an answer.
const ANSWER_MAX: u64 = 64 << 20;

/// Why a daemon did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The endpoint is not a URL that can be asked.
    #[error("{0:?} is not an endpoint (expected http://HOST:PORT or https://HOST:PORT)")]
    Endpoint(String),
    /// What is to prove who is who is not usable, or is missing.
    #[error("{0}")]
    Access(String),
    /// Nobody answers there.
    #[error("no daemon answers at {endpoint}: {reason} (is it running? see --endpoint)")]
    Unreachable {
        /// Who was asked.
        endpoint: String,
        /// What the system said.
        reason: String,
    },
    /// The daemon said no.
    #[error("{message}")]
    Refused {
        /// HTTP status.
        status: u16,
        /// EFS's error class.
        class: String,
        /// The daemon's words.
        message: String,
    },
    /// The answer came too late.
    #[error("{0} did not answer in time")]
    TimedOut(String),
    /// What answers is not our daemon, or one of another version.
    #[error("{endpoint} gave an answer that is not understood: {reason}")]
    Answer {
        /// Who was asked.
        endpoint: String,
        /// What is wrong with it.
        reason: String,
    },
}

impl ClientError {
    /// Whether time ran out, here or at the daemon.
    pub fn is_timeout(&self) -> bool {
        match self {
            Self::TimedOut(_) => true,
            Self::Refused { class, .. } => class == "TimedOut",
            _ => false,
        }
    }
}

/// A daemon's API.
pub struct Client {
    endpoint: String,
    agent: ureq::Agent,
    /// Signs requests.
    key: Option<AccessKey>,
}

/// Checks an endpoint, and brings it into the form `http://HOST:PORT` or
/// `https://HOST:PORT`.
///
/// # Errors
/// When it is not of that form.
pub fn check_endpoint(text: &str) -> Result<String, ClientError> {
    let trimmed = text.trim_end_matches('/');
    let invalid = || ClientError::Endpoint(text.to_owned());
    let uri: axum::http::Uri = trimmed.parse().map_err(|_| invalid())?;
    let plain = matches!(uri.scheme_str(), Some("http" | "https"))
        && uri.host().is_some_and(|host| !host.is_empty())
        && uri.path() == "/"
        && uri.query().is_none();
    if plain { Ok(trimmed.to_owned()) } else { Err(invalid()) }
}

impl Client {
    /// Asks the daemon at `endpoint`, without credentials; connects with the
    /// first question.
    ///
    /// # Errors
    /// When the endpoint is not of the form `http://HOST:PORT`.
    pub fn new(endpoint: &str) -> Result<Self, ClientError> {
        Self::open(&Access::new(endpoint))
    }

    /// Asks a daemon as `access` says.
    ///
    /// # Errors
    /// When the endpoint is not of its form, or https is to be spoken and
    /// nothing says whose certificate is the right one.
    pub fn open(access: &Access) -> Result<Self, ClientError> {
        let endpoint = check_endpoint(&access.endpoint)?;
        let tls = access.tls(&endpoint)?;
        let config = ureq::Agent::config_builder()
            .http_status_as_error(false)
            .timeout_connect(Some(CONNECT_TIME))
            // A proxy for the web is no way to a daemon, least of all to one
            // on loopback.
            .proxy(None)
            .max_redirects(0)
            .build();
        let connector = TcpConnector::default().chain(TlsConnector(tls));
        let agent = ureq::Agent::with_parts(config, connector, DefaultResolver::default());
        Ok(Self { endpoint, agent, key: access.key.clone() })
    }

    /// Who is asked.
    pub fn endpoint(&self) -> &str {
        &self.endpoint
    }

    /// Every configuration of the daemon.
    ///
    /// # Errors
    /// See [`ClientError`]; so for all that follow.
    pub fn status(&self) -> Result<Vec<Status>, ClientError> {
        self.read(self.call("GET", "/replicator/v1/status", None, Some(ASK_TIME))?)
    }

    /// Enables replication. Both sides are enrolled when it returns.
    pub fn create(&self, body: &own::CreateBody) -> Result<Configuration, ClientError> {
        let body = self.write(body)?;
        self.read(self.call("POST", "/replicator/v1/replications", Some(body), None)?)
    }

    /// Every configuration in EFS's form, all pages, or the one with `id` at
    /// either end.
    pub fn describe(&self, id: Option<&str>) -> Result<Replications, ClientError> {
        let mut all = Vec::new();
        let mut token: Option<String> = None;
        loop {
            let mut target = "/2015-02-01/file-systems/replication-configurations?".to_owned();
            for (key, value) in [("FileSystemId", id), ("NextToken", token.as_deref())] {
                if let Some(value) = value {
                    target.push_str(&format!("{key}={}&", encode(value)));
                }
            }
            let page: Replications =
                self.read(self.call("GET", &target, None, Some(ASK_TIME))?)?;
            all.extend(page.replications);
            token = page.next_token;
            if token.is_none() {
                return Ok(Replications { replications: all, next_token: None });
            }
        }
    }

    /// Every file system that has an id at the daemon.
    pub fn file_systems(&self) -> Result<Vec<own::FileSystem>, ClientError> {
        self.read(self.call("GET", "/replicator/v1/file-systems", None, Some(ASK_TIME))?)
    }

    /// Gives a file system an id.
    pub fn register(&self, body: &own::RegisterBody) -> Result<own::FileSystem, ClientError> {
        let body = self.write(body)?;
        self.read(self.call("POST", "/replicator/v1/file-systems", Some(body), Some(ASK_TIME))?)
    }

    /// EFS's DeleteFileSystem: forgets it, and leaves what is in it alone.
    pub fn forget(&self, id: &str) -> Result<(), ClientError> {
        let target = format!("/2015-02-01/file-systems/{}", encode(id));
        self.call("DELETE", &target, None, Some(ASK_TIME)).map(drop)
    }

    /// EFS's UpdateFileSystemProtection.
    pub fn protect(&self, id: &str, protection: &Protection) -> Result<Protection, ClientError> {
        let target = format!("/2015-02-01/file-systems/{}/protection", encode(id));
        let body = self.write(protection)?;
        self.read(self.call("PUT", &target, Some(body), Some(ASK_TIME))?)
    }

    /// EFS's deletion.
    pub fn delete(&self, source: &str, mode: DeletionMode) -> Result<(), ClientError> {
        let mode = match mode {
            DeletionMode::AllConfigurations => "ALL_CONFIGURATIONS",
            DeletionMode::LocalConfigurationOnly => "LOCAL_CONFIGURATION_ONLY",
        };
        let target = format!(
            "/2015-02-01/file-systems/{}/replication-configuration?deletionMode={mode}",
            encode(source)
        );
        self.call("DELETE", &target, None, None).map(drop)
    }

    /// The same deletion, with its report.
    pub fn failover(&self, body: &own::FailoverBody) -> Result<FailoverReport, ClientError> {
        let body = self.write(body)?;
        self.read(self.call("POST", "/replicator/v1/failover", Some(body), None)?)
    }

    /// Waits until what was done on the source so far is on the replica.
    pub fn wait(
        &self,
        id: Option<String>,
        timeout: Duration,
    ) -> Result<own::WaitAnswer, ClientError> {
        let body =
            self.write(&own::WaitBody { id, timeout_seconds: Some(timeout.as_secs_f64()) })?;
        let time = timeout.saturating_add(WAIT_MARGIN);
        self.read(self.call("POST", "/replicator/v1/wait", Some(body), Some(time))?)
    }

    /// Stops shipping; changes are journaled.
    pub fn pause(&self, id: Option<String>) -> Result<Status, ClientError> {
        let body = json!({ "id": id });
        self.read(self.call("POST", "/replicator/v1/pause", Some(body), Some(ASK_TIME))?)
    }

    /// Ships again.
    pub fn resume(&self, body: &own::ResumeBody) -> Result<Status, ClientError> {
        let body = self.write(body)?;
        self.read(self.call("POST", "/replicator/v1/resume", Some(body), Some(ASK_TIME))?)
    }

    /// Begins a pass of verification.
    pub fn verify(&self, body: &own::VerifyBody) -> Result<own::VerifyAnswer, ClientError> {
        let body = self.write(body)?;
        self.read(self.call("POST", "/replicator/v1/verify", Some(body), Some(ASK_TIME))?)
    }

    /// What a pass has found.
    pub fn findings(&self, body: &own::FindingsBody) -> Result<Findings, ClientError> {
        let body = self.write(body)?;
        self.read(self.call("POST", "/replicator/v1/findings", Some(body), Some(ASK_TIME))?)
    }

    /// A new enrolment token of a destination.
    pub fn token(&self, body: &own::TokenBody) -> Result<own::TokenAnswer, ClientError> {
        let body = self.write(body)?;
        self.read(self.call("POST", "/replicator/v1/tokens", Some(body), Some(ASK_TIME))?)
    }

    fn call(
        &self,
        method: &str,
        target: &str,
        body: Option<Value>,
        time: Option<Duration>,
    ) -> Result<Value, ClientError> {
        let text = body.map(|body| body.to_string()).unwrap_or_default();
        let mut request = axum::http::Request::builder()
            .method(method)
            .uri(format!("{}{target}", self.endpoint))
            .header("content-type", "application/json")
            .body(text)
            .map_err(|error| self.not_understood(error))?;
        self.sign(&mut request)?;
        let request = self
            .agent
            .configure_request(request)
            .allow_non_standard_methods(true)
            .timeout_global(time)
            .build();
        let mut response = self.agent.run(request).map_err(|error| self.explain(error))?;
        let status = response.status().as_u16();
        let text = response
            .body_mut()
            .with_config()
            .limit(ANSWER_MAX)
            .read_to_string()
            .map_err(|error| self.explain(error))?;
        if status == 204 {
            return Ok(Value::Null);
        }
        let body = serde_json::from_str(&text);
        if matches!(status, 200 | 201) {
            return body.map_err(|error| self.not_understood(error));
        }
        let member = |name: &str| {
            body.as_ref().ok().and_then(|body: &Value| body[name].as_str()).map(str::to_owned)
        };
        match (member("ErrorCode"), member("Message")) {
            (Some(class), Some(message)) => Err(ClientError::Refused { status, class, message }),
            _ => Err(self.not_understood(format!("HTTP status {status}"))),
        }
    }

    /// Signs a request, when there is a key.
    fn sign(&self, request: &mut axum::http::Request<String>) -> Result<(), ClientError> {
        let Some(key) = &self.key else { return Ok(()) };
        // As ureq writes it: with the port as the endpoint has it.
        let host = request.uri().authority().map_or("", |authority| authority.as_str());
        let host = host.parse().map_err(|error| self.not_understood(error))?;
        request.headers_mut().insert("host", host);
        let target = request.uri().path_and_query().map_or("/", |target| target.as_str());
        let signed = sigv4::Request {
            method: request.method().as_str(),
            target,
            headers: request.headers(),
            body: request.body().as_bytes(),
        };
        // The region is no secret and nobody's condition.
        for (name, value) in sigv4::sign(&signed, key, DEFAULT_REGION, Timestamp::now()) {
            let value = value.parse().map_err(|error| self.not_understood(error))?;
            request.headers_mut().insert(name, value);
        }
        Ok(())
    }

    fn write(&self, body: &impl serde::Serialize) -> Result<Value, ClientError> {
        // What JSON cannot hold: a path that is not UTF-8.
        serde_json::to_value(body).map_err(|error| ClientError::Answer {
            endpoint: self.endpoint.clone(),
            reason: format!("the request cannot be written as JSON: {error}"),
        })
    }

    fn read<T: DeserializeOwned>(&self, body: Value) -> Result<T, ClientError> {
        serde_json::from_value(body).map_err(|error| self.not_understood(error))
    }

    fn not_understood(&self, reason: impl ToString) -> ClientError {
        ClientError::Answer { endpoint: self.endpoint.clone(), reason: reason.to_string() }
    }

    fn explain(&self, error: ureq::Error) -> ClientError {
        let endpoint = self.endpoint.clone();
        match error {
            ureq::Error::Timeout(ureq::Timeout::Connect | ureq::Timeout::Resolve) => {
                ClientError::Unreachable { endpoint, reason: "it does not respond".to_owned() }
            }
            ureq::Error::Timeout(_) => ClientError::TimedOut(endpoint),
            ureq::Error::Io(error)
                if error.get_ref().is_some_and(|inner| inner.is::<rustls::Error>()) =>
            {
                ClientError::Access(format!(
                    "no TLS with {endpoint}: {error}; is it the right daemon? (see --fingerprint and --ca)"
                ))
            }
            ureq::Error::Io(error) => {
                ClientError::Unreachable { endpoint, reason: error.to_string() }
            }
            ureq::Error::ConnectionFailed => {
                ClientError::Unreachable { endpoint, reason: "connection failed".to_owned() }
            }
            ureq::Error::HostNotFound => {
                ClientError::Unreachable { endpoint, reason: "there is no such host".to_owned() }
            }
            other => ClientError::Answer { endpoint, reason: other.to_string() },
        }
    }
}

/// Percent-encodes everything but letters, digits and `-._~`.
fn encode(text: &str) -> String {
    text.bytes()
        .map(|byte| match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => {
                char::from(byte).to_string()
            }
            other => format!("%{other:02X}"),
        })
        .collect()
}
