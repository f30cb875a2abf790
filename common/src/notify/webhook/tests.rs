//! Over TLS, with a server of our own and authorities of our own.

use std::io::{Read, Write};
use std::net::TcpListener;
use std::path::PathBuf;

use rustls::pki_types::PrivateKeyDer;
use rustls::{ServerConfig, ServerConnection, StreamOwned};

use super::*;
use crate::notify::Kind;

fn event() -> Event {
    Event {
        id: "1".to_owned(),
        kind: Kind::Error,
        recovered_from: None,
        time: Timestamp(0),
        side: "source",
        source_file_system_id: "fs-1".to_owned(),
        destination_file_system_id: "fs-2".to_owned(),
        status: "ERROR",
        message: "words".to_owned(),
        time_since_last_sync: None,
    }
}

/// An HTTPS server for `localhost` that answers `status` to one request; its
/// port and certificate.
fn server(status: &'static str) -> (u16, String) {
    let key = rcgen::KeyPair::generate().unwrap();
    let params = rcgen::CertificateParams::new(vec!["localhost".to_owned()]).unwrap();
    let certificate = params.self_signed(&key).unwrap();
    let provider = Arc::new(aws_lc_rs::default_provider());
    let config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(
            vec![certificate.der().clone()],
            PrivateKeyDer::try_from(key.serialize_der()).unwrap(),
        )
        .unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    std::thread::spawn(move || {
        let (stream, _) = listener.accept().unwrap();
        let session = ServerConnection::new(Arc::new(config)).unwrap();
        let mut stream = StreamOwned::new(session, stream);
        let mut got = Vec::new();
        let mut part = [0; 4096];
        // The body ends with the JSON's last brace.
        while !got.ends_with(b"}") {
            match stream.read(&mut part) {
                Ok(read) if read > 0 => got.extend_from_slice(&part[..read]),
                _ => return,
            }
        }
        let answer = format!("HTTP/1.1 {status}\r\nContent-Length: 0\r\nLocation: /\r\n\r\n");
        let _ = stream.write_all(answer.as_bytes());
        let _ = stream.flush();
        let _ = stream.read(&mut part);
    });
    (port, certificate.pem())
}

fn told(port: u16, authority: Option<PathBuf>) -> Result<(), String> {
    let config = NotifyConfig {
        webhook: Some(format!("https://localhost:{port}/")),
        webhook_ca_file: authority,
        ..NotifyConfig::default()
    };
    Webhook::open(&config).unwrap().unwrap().tell(&event())
}

#[test]
fn https_needs_an_authority_that_is_trusted() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("authority.pem");
    let (port, certificate) = server("204 No Content");
    fs::write(&file, certificate).unwrap();
    assert_eq!(told(port, Some(file.clone())), Ok(()));
    // This server's certificate is another's, and no browser trusts it either.
    assert!(told(server("204 No Content").0, Some(file)).is_err());
    assert!(told(server("204 No Content").0, None).is_err());
}

#[test]
fn a_redirection_is_no_success() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("authority.pem");
    let (port, certificate) = server("302 Found");
    fs::write(&file, certificate).unwrap();
    assert!(told(port, Some(file)).is_err());
}

#[test]
fn files_that_are_not_what_they_should_be() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("file");
    fs::write(&file, " \n").unwrap();
    let with = |secret: Option<PathBuf>, authority: Option<PathBuf>| {
        let config = NotifyConfig {
            webhook: Some("http://localhost/".to_owned()),
            webhook_secret_file: secret,
            webhook_ca_file: authority,
            ..NotifyConfig::default()
        };
        Webhook::open(&config).err().map(|error| error.to_string()).unwrap_or_default()
    };
    assert!(with(Some(file.clone()), None).contains("has no secret"));
    assert!(with(None, Some(file)).contains("no certificate"));
    assert!(with(Some(directory.path().join("none")), None).starts_with("cannot read"));
}
