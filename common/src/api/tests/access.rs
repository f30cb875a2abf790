//! Credentials, over real connections.

use std::time::Duration;

use super::*;
use crate::api::auth::{AccessKey, Credentials, Permission, Secret};
use crate::api::client::{Access, Client, ClientError};
use crate::net::https::{self, CERTIFICATE_FILE, Certificate, KEY_FILE, Trusted};

const ID: &str = "AKREPLICATOREXAMPLE0";
const READER: &str = "AKREPLICATOREXAMPLE1";
const SECRET: &str = "a secret of at least 32 characters";

struct Site {
    server: server::Server,
    certificate: Certificate,
    /// Of the server and of a client, each in a directory.
    files: [tempfile::TempDir; 2],
    _fake: Arc<Fake>,
}

impl Site {
    fn new() -> Self {
        let fake = Arc::new(Fake::with([1]));
        let files = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
        let names = https::names("127.0.0.1".parse().unwrap(), &[]);
        let certificate = Certificate::load_or_create(files[0].path(), &names).unwrap();
        let client = Certificate::load_or_create(files[1].path(), &[]).unwrap();
        let key = |id: &str| AccessKey { id: id.to_owned(), secret: Secret::new(SECRET) };
        let credentials = Credentials {
            keys: vec![(key(ID), Permission::Full), (key(READER), Permission::ReadOnly)],
            clients: vec![(client.fingerprint(), Permission::ReadOnly)],
        };
        let options = ApiOptions { credentials, ..ApiOptions::default() };
        let api = Api::new(fake.clone(), fake.registry.clone(), options);
        let tls = https::server(&certificate, true).unwrap();
        let server = server::bind(local()).unwrap().serve_over(api, Some(tls)).unwrap();
        Self { server, certificate, files, _fake: fake }
    }

    fn access(&self) -> Access {
        let mut access = Access::new(&format!("https://{}", self.server.address()));
        access.trusted = Some(Trusted::Pinned(self.certificate.fingerprint()));
        access
    }

    fn signed(&self, id: &str) -> Access {
        let mut access = self.access();
        access.sign_with(id, SECRET);
        access
    }
}

fn status(access: &Access) -> Result<usize, ClientError> {
    Client::open(access).unwrap().status().map(|all| all.len())
}

fn pause(access: &Access) -> Result<(), ClientError> {
    Client::open(access).unwrap().pause(Some(id(1).to_string())).map(drop)
}

#[track_caller]
fn refused<T: std::fmt::Debug>(result: Result<T, ClientError>, expected: &str) {
    match result.unwrap_err() {
        ClientError::Refused { class, .. } => assert_eq!(class, expected),
        other => panic!("{other}"),
    }
}

#[test]
fn keys_and_certificates_are_let_in_and_nobody_else() {
    let site = Site::new();
    assert_eq!(status(&site.signed(ID)).unwrap(), 1);
    pause(&site.signed(ID)).unwrap();
    assert_eq!(status(&site.signed(READER)).unwrap(), 1);
    refused(pause(&site.signed(READER)), "AccessDeniedException");
    let wait = Client::open(&site.signed(READER)).unwrap().wait(None, Duration::from_secs(1));
    assert!(wait.is_ok(), "who may look may wait: {wait:?}");
    refused(status(&site.access()), "MissingAuthenticationToken");
    refused(status(&site.signed("AKUNKNOWN")), "InvalidClientTokenId");
    let mut wrong = site.access();
    wrong.sign_with(ID, "another secret");
    refused(status(&wrong), "InvalidSignatureException");

    let mut shown = site.access();
    let directory = site.files[1].path();
    shown.show(&directory.join(CERTIFICATE_FILE), &directory.join(KEY_FILE)).unwrap();
    assert_eq!(status(&shown).unwrap(), 1);
    refused(pause(&shown), "AccessDeniedException");
    // The server's own is no client's.
    let directory = site.files[0].path();
    shown.show(&directory.join(CERTIFICATE_FILE), &directory.join(KEY_FILE)).unwrap();
    refused(status(&shown), "MissingAuthenticationToken");
    // Not even that there is no such operation.
    let client = Client::open(&site.access()).unwrap();
    refused(client.describe(Some("x")), "MissingAuthenticationToken");
}

#[test]
fn another_server_is_not_asked() {
    let site = Site::new();
    let mut other = site.signed(ID);
    other.trusted = Some(Trusted::Pinned(crate::net::identity::Fingerprint::of(b"other")));
    assert!(matches!(status(&other), Err(ClientError::Access(_))));
    // By authority and name.
    let mut named = site.signed(ID);
    named.trust_file(&site.files[0].path().join(CERTIFICATE_FILE)).unwrap();
    assert_eq!(status(&named).unwrap(), 1);
    named.endpoint = format!("https://localhost:{}", site.server.address().port());
    assert_eq!(status(&named).unwrap(), 1);
    named.trust_file(&site.files[1].path().join(CERTIFICATE_FILE)).unwrap();
    assert!(status(&named).is_err());
    let mut unnamed = site.signed(ID);
    unnamed.trusted = None;
    let error = Client::open(&unnamed).err().unwrap().to_string();
    assert!(error.contains("--fingerprint"), "{error}");
}

#[test]
fn http_is_not_spoken_where_https_is() {
    let site = Site::new();
    let mut plain = site.signed(ID);
    plain.endpoint = format!("http://{}", site.server.address());
    assert!(status(&plain).is_err());
    // The server lives on, and stops while somebody only sits there.
    let _idle = TcpStream::connect(site.server.address()).unwrap();
    assert_eq!(status(&site.signed(ID)).unwrap(), 1);
    site.server.stop();
}

#[test]
fn what_a_web_page_could_send_is_refused_before_credentials_are_looked_at() {
    let fake = Arc::new(Fake::with([1]));
    let server = server::bind(local()).unwrap().serve(api(&fake)).unwrap();
    let request =
        "GET /replicator/v1/status HTTP/1.1\r\nHost: evil.example\r\nConnection: close\r\n\r\n";
    assert!(raw(server.address(), request).contains("accessdeniedexception"));
}

#[test]
fn too_many_calls_at_once_are_throttled() {
    const AT_ONCE: usize = 32;
    const MORE: usize = 8;
    let fake = Arc::new(Fake::with([1]));
    let server = server::bind(local()).unwrap().serve(api(&fake)).unwrap();
    let address = server.address();
    let request =
        "GET /replicator/v1/status HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n";
    // Those that are worked on wait for what we hold.
    let all = fake.all.lock().unwrap();
    let (sender, answers) = std::sync::mpsc::channel();
    for _ in 0..AT_ONCE + MORE {
        let sender = sender.clone();
        std::thread::spawn(move || sender.send(raw(address, request)));
    }
    let next = || answers.recv_timeout(Duration::from_secs(60)).unwrap();
    for _ in 0..MORE {
        let refused = next();
        assert!(refused.starts_with("http/1.1 429"), "{refused}");
        assert!(refused.contains("x-amzn-errortype: throttlingexception"), "{refused}");
    }
    drop(all);
    for _ in 0..AT_ONCE {
        let answer = next();
        assert!(answer.starts_with("http/1.1 200"), "{answer}");
    }
}
