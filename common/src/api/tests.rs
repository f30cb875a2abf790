use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;

use serde_json::{Value, json};

use super::fake::{Fake, FakeTokens, id, status};
use super::*;
use crate::status::ReplicationStatus;
use crate::time::Timestamp;

mod access;
mod file_systems;

const LIST: &str = "/2015-02-01/file-systems/replication-configurations";

fn at(source: &str) -> String {
    format!("/2015-02-01/file-systems/{source}/replication-configuration")
}

fn api(fake: &Arc<Fake>) -> Api {
    Api::new(fake.clone(), fake.registry.clone(), ApiOptions::default())
}

/// Performs a request; the answer's status and body.
fn ask(api: &Api, method: &str, target: &str, body: Value) -> (u16, Value) {
    let bytes = if body.is_null() { Vec::new() } else { body.to_string().into_bytes() };
    match api.perform(method, target, &bytes) {
        Ok(answer) => (answer.status, answer.body.unwrap_or(Value::Null)),
        Err(error) => (error.status, error.to_json()),
    }
}

fn class(answer: (u16, Value)) -> (u16, String) {
    (answer.0, answer.1["ErrorCode"].as_str().unwrap_or_default().to_owned())
}

#[test]
fn describe_has_efs_shape() {
    let fake = Arc::new(Fake::with([1]));
    fake.change(1, |status| status.status_message = Some("initial sync".to_owned()));
    let arn = "arn:aws:elasticfilesystem:xx-here-1:000000000000:file-system/fs-00000000000000001";
    let mut expected = json!({
        "Replications": [{
            "SourceFileSystemId": "fs-00000000000000001",
            "SourceFileSystemRegion": "xx-here-1",
            "SourceFileSystemArn": arn,
            "OriginalSourceFileSystemArn": arn,
            "CreationTime": 1795248930.250123,
            "Destinations": [{
                "Status": "ENABLING",
                "FileSystemId": "fs-00000000000001001",
                "Region": "xx-there-2",
                "OwnerId": "000000000000",
                "StatusMessage": "initial sync",
            }],
            "SourceFileSystemOwnerId": "000000000000",
        }],
    });
    assert_eq!(ask(&api(&fake), "GET", LIST, Value::Null), (200, expected.clone()));

    fake.change(1, |status| {
        status.status = ReplicationStatus::Enabled;
        status.status_message = None;
        if let Some(source) = &mut status.source {
            source.watermark = Timestamp(1_795_248_999_000_000_999);
        }
    });
    let destination = &mut expected["Replications"][0]["Destinations"][0];
    destination["Status"] = json!("ENABLED");
    destination["LastReplicatedTimestamp"] = json!(1795248999.0);
    destination.as_object_mut().unwrap().remove("StatusMessage");
    assert_eq!(ask(&api(&fake), "GET", LIST, Value::Null), (200, expected));
}

#[test]
fn describe_finds_by_either_end() {
    let fake = Arc::new(Fake::with([1, 2]));
    let api = api(&fake);
    let arn = "arn%3Aaws%3Aelasticfilesystem%3Axx-local%3A000000000000%3Afile-system%2F";
    for wanted in [id(2).to_string(), id(0x1002).to_string(), format!("{arn}{}", id(2))] {
        let (status, body) =
            ask(&api, "GET", &format!("{LIST}?FileSystemId={wanted}"), Value::Null);
        assert_eq!(status, 200);
        assert_eq!(body["Replications"].as_array().unwrap().len(), 1);
        assert_eq!(body["Replications"][0]["SourceFileSystemId"], id(2).as_str());
    }
    for (wanted, expected) in [
        ("fs-0123abcd", (404, "FileSystemNotFound")),
        ("bogus", (400, "BadRequest")),
        ("", (400, "BadRequest")),
    ] {
        let answer = ask(&api, "GET", &format!("{LIST}?FileSystemId={wanted}"), Value::Null);
        assert_eq!(class(answer), (expected.0, expected.1.to_owned()), "{wanted:?}");
    }
}

#[test]
fn describe_pages_survive_changes_between_them() {
    let fake = Arc::new(Fake::with(1..=5));
    let api = api(&fake);
    let page = |token: Option<&str>| {
        let token = token.map(|token| format!("&NextToken={token}")).unwrap_or_default();
        let (status, body) = ask(&api, "GET", &format!("{LIST}?MaxResults=2{token}"), Value::Null);
        assert_eq!(status, 200);
        let ids: Vec<String> = body["Replications"]
            .as_array()
            .unwrap()
            .iter()
            .map(|one| one["SourceFileSystemId"].as_str().unwrap().to_owned())
            .collect();
        (ids, body["NextToken"].as_str().map(str::to_owned))
    };
    let (first, token) = page(None);
    assert_eq!(first, [id(1).to_string(), id(2).to_string()]);
    // The cursor's own entry goes away between the pages.
    fake.all.lock().unwrap().remove(&id(2));
    let (second, token) = page(token.as_deref());
    assert_eq!(second, [id(3).to_string(), id(4).to_string()]);
    assert!(token.as_ref().unwrap().len() <= 128);
    let (third, token) = page(token.as_deref());
    assert_eq!((third, token), (vec![id(5).to_string()], None));

    for bad in ["MaxResults=0", "MaxResults=x", "MaxResults=-1", "NextToken=x", "NextToken="] {
        let answer = ask(&api, "GET", &format!("{LIST}?{bad}"), Value::Null);
        assert_eq!(class(answer), (400, "BadRequest".to_owned()), "{bad}");
    }
    assert_eq!(
        ask(&api, "GET", &format!("{LIST}?MaxResults=18446744073709551615"), Value::Null).0,
        200
    );
}

#[test]
fn create_in_efs_form() {
    let fake = Arc::new(Fake::default());
    let api = api(&fake);
    let body = json!({ "Destinations": [{ "FileSystemId": "TOKEN", "Region": "xx-local" }] });
    let (status, made) = ask(&api, "POST", &at("%2Fdata%2Fa%20b"), body.clone());
    assert_eq!((status, &made["Destinations"][0]["Status"]), (200, &json!("ENABLING")));
    assert_eq!(made["SourceFileSystemId"], id(1).as_str());
    let created = fake.created.lock().unwrap();
    assert_eq!(created[0].source, std::path::Path::new("/data/a b"));
    assert_eq!(created[0].token, "TOKEN");
    drop(created);

    let two = json!({ "Destinations": [{}, {}] });
    for (source, body, expected) in [
        (id(1).to_string(), body.clone(), (409, "ReplicationAlreadyExists")),
        (id(0x1001).to_string(), body.clone(), (409, "ReplicationAlreadyExists")),
        ("fs-0123abcd".to_owned(), body.clone(), (404, "FileSystemNotFound")),
        ("bogus".to_owned(), body.clone(), (400, "BadRequest")),
        (String::new(), body, (400, "BadRequest")),
        ("fs-0123abcd".to_owned(), json!({ "Destinations": [] }), (400, "ValidationException")),
        ("fs-0123abcd".to_owned(), json!({}), (400, "ValidationException")),
        ("fs-0123abcd".to_owned(), two, (400, "ValidationException")),
        ("fs-0123abcd".to_owned(), json!({ "Destinations": 1 }), (400, "BadRequest")),
        ("%2Fdata".to_owned(), json!({ "Destinations": [{}] }), (400, "ValidationException")),
    ] {
        let answer = ask(&api, "POST", &at(&source), body);
        assert_eq!(class(answer), (expected.0, expected.1.to_owned()), "{source}");
    }
}

#[test]
fn delete_in_efs_form() {
    let fake = Arc::new(Fake::with([1, 2, 3]));
    let api = api(&fake);
    let target = |n: u64, mode: &str| format!("{}{mode}", at(id(n).as_str()));
    assert_eq!(ask(&api, "DELETE", &target(1, ""), Value::Null), (204, Value::Null));
    for (n, mode) in [(2, "ALL_CONFIGURATIONS"), (3, "LOCAL_CONFIGURATION_ONLY")] {
        let target = target(n, &format!("?deletionMode={mode}"));
        assert_eq!(ask(&api, "DELETE", &target, Value::Null), (204, Value::Null));
    }
    let modes = fake.deleted.lock().unwrap().clone();
    use crate::control::DeletionMode::{AllConfigurations, LocalConfigurationOnly};
    assert_eq!(modes, [AllConfigurations, AllConfigurations, LocalConfigurationOnly]);

    let answer = ask(&api, "DELETE", &target(1, "?deletionMode=SOME"), Value::Null);
    assert_eq!(class(answer), (400, "ValidationException".to_owned()));
    let answer = ask(&api, "DELETE", &target(1, ""), Value::Null);
    assert_eq!(class(answer), (404, "FileSystemNotFound".to_owned()));
}

#[test]
fn errors_of_the_control_have_efs_classes() {
    let fake = Arc::new(Fake::with([1]));
    let api = api(&fake);
    type Case = (fn() -> ControlError, u16, &'static str);
    let cases: [Case; 7] = [
        (|| ControlError::Validation("v".into()), 400, "ValidationException"),
        (|| ControlError::FileSystemNotFound(id(9)), 404, "FileSystemNotFound"),
        (|| ControlError::ReplicationNotFound(id(1)), 404, "ReplicationNotFound"),
        (|| ControlError::ReplicationAlreadyExists("a".into()), 409, "ReplicationAlreadyExists"),
        (|| ControlError::Conflict("c".into()), 409, "ConflictException"),
        (|| ControlError::TimedOut("t".into()), 504, "TimedOut"),
        (|| ControlError::Internal("i".into()), 500, "InternalServerError"),
    ];
    for (fail, status, name) in cases {
        *fake.fail.lock().unwrap() = Some(fail);
        let (found, body) = ask(&api, "DELETE", &at(id(1).as_str()), Value::Null);
        assert_eq!(
            (found, &body),
            (status, &json!({ "ErrorCode": name, "Message": fail().to_string() }))
        );
    }
}

#[test]
fn own_operations() {
    let fake = Arc::new(Fake::with([1]));
    let api = api(&fake);
    let (code, body) = ask(&api, "GET", "/replicator/v1/status", Value::Null);
    assert_eq!((code, body), (200, serde_json::to_value([status(1)]).unwrap()));

    let (code, body) = ask(&api, "POST", "/replicator/v1/wait", json!({ "timeout_seconds": 5 }));
    assert_eq!(code, 200);
    assert_eq!(
        body,
        json!({ "SourceFileSystemId": id(1), "LastReplicatedTimestamp": 1795248930.25 })
    );
    let answer = ask(&api, "POST", "/replicator/v1/wait", json!({ "timeout_seconds": 0 }));
    assert_eq!(class(answer), (504, "TimedOut".to_owned()));
    for bad in [json!({ "timeout_seconds": -1 }), json!({ "timeout_seconds": 1e300 })] {
        let answer = ask(&api, "POST", "/replicator/v1/wait", bad);
        assert_eq!(class(answer), (400, "ValidationException".to_owned()));
    }

    // By the replica's id, too.
    let (code, body) = ask(&api, "POST", "/replicator/v1/pause", json!({ "id": id(0x1001) }));
    assert_eq!((code, &body["Status"]), (200, &json!("PAUSED")));
    let (code, body) = ask(&api, "POST", "/replicator/v1/resume", Value::Null);
    assert_eq!((code, &body["Status"]), (200, &json!("ENABLED")));

    let body = json!({ "source": "/data", "token": "T", "watcher": "scan" });
    assert_eq!(ask(&api, "POST", "/replicator/v1/replications", body).0, 200);
    assert_eq!(fake.created.lock().unwrap()[0].watcher, WatcherChoice::Scan);
    for (bad, expected) in [
        (json!({ "source": "data", "token": "T" }), "ValidationException"),
        (json!({ "source": "/data" }), "BadRequest"),
        (json!({ "source": "/data", "token": "T", "colour": 1 }), "BadRequest"),
    ] {
        let answer = ask(&api, "POST", "/replicator/v1/replications", bad);
        assert_eq!(class(answer), (400, expected.to_owned()));
    }

    // Two now: which is meant must be said.
    let answer = ask(&api, "POST", "/replicator/v1/failover", json!({}));
    assert_eq!(class(answer), (400, "ValidationException".to_owned()));
    let (code, body) = ask(&api, "POST", "/replicator/v1/failover", json!({ "id": id(1) }));
    assert_eq!((code, &body["Path"]), (200, &json!("/replica")));
    let answer = ask(&api, "POST", "/replicator/v1/pause", json!({ "id": id(1) }));
    assert_eq!(class(answer), (404, "FileSystemNotFound".to_owned()));
}

#[test]
fn health_names_what_needs_help() {
    let fake = Arc::new(Fake::with([1]));
    let api = api(&fake);
    let (code, body) = ask(&api, "GET", "/replicator/v1/health", Value::Null);
    assert_eq!(
        (code, body),
        (200, json!({ "Healthy": true, "Configurations": 1, "UnhealthyReasons": [] }))
    );
    fake.change(1, |status| {
        status.status = ReplicationStatus::Error;
        status.status_message = Some("disk full".to_owned());
    });
    let (code, body) = ask(&api, "GET", "/replicator/v1/health", Value::Null);
    assert_eq!((code, &body["Healthy"]), (200, &json!(false)));
    assert_eq!(body["UnhealthyReasons"], json!([format!("{}: disk full", id(1))]));
}

#[test]
fn what_has_halted_is_an_error_in_efss_words_and_resumes_with_consent_only_where_it_can() {
    let fake = Arc::new(Fake::with([1]));
    let api = api(&fake);
    fake.change(1, |status| {
        status.status = ReplicationStatus::Halted;
        status.status_message = Some("much is gone".to_owned());
    });
    let path = "/2015-02-01/file-systems/replication-configurations";
    let (_, body) = ask(&api, "GET", path, Value::Null);
    let destination = &body["Replications"][0]["Destinations"][0];
    assert_eq!(destination["Status"], "ERROR");
    assert_eq!(destination["StatusMessage"], "much is gone");
    let (_, body) = ask(&api, "GET", "/replicator/v1/status", Value::Null);
    assert_eq!(body[0]["Status"], "HALTED");
    let (_, body) = ask(&api, "GET", "/replicator/v1/health", Value::Null);
    assert_eq!(body["Healthy"], json!(false));
    // The fake is no source.
    let body = json!({ "accept_deletions": true });
    let answer = ask(&api, "POST", "/replicator/v1/resume", body);
    assert_eq!(class(answer), (400, "ValidationException".to_owned()));
    let answer = ask(&api, "POST", "/replicator/v1/pause", json!({ "accept_deletions": true }));
    assert_eq!(class(answer), (400, "BadRequest".to_owned()));
}

#[test]
fn tokens_come_from_destinations_only() {
    let fake = Arc::new(Fake::default());
    let source = api(&fake);
    let body = json!({ "replica": "/r" });
    let answer = ask(&source, "POST", "/replicator/v1/tokens", body.clone());
    assert_eq!(class(answer), (400, "ValidationException".to_owned()));
    let destination = api(&fake).with_tokens(Arc::new(FakeTokens));
    assert_eq!(
        ask(&destination, "POST", "/replicator/v1/tokens", body),
        (200, json!({ "Token": "token-for-/r", "Replica": "/r" }))
    );
    for bad in [json!({ "replica": "r" }), json!({ "replica": "/r", "valid_seconds": 1 })] {
        let answer = ask(&destination, "POST", "/replicator/v1/tokens", bad);
        assert_eq!(class(answer), (400, "ValidationException".to_owned()));
    }
}

/// Sends raw bytes and reads until the server closes.
fn raw(address: SocketAddr, request: &str) -> String {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.write_all(request.as_bytes()).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer.to_ascii_lowercase()
}

fn local() -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], 0))
}

#[test]
fn over_http() {
    let fake = Arc::new(Fake::with([1]));
    let bound = server::bind(local()).unwrap();
    let server = bound.serve(api(&fake)).unwrap();
    let address = server.address();
    let get = |target: &str, more: &str| {
        raw(
            address,
            &format!("GET {target} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n{more}\r\n"),
        )
    };
    let answer = get(LIST, "");
    assert!(answer.starts_with("http/1.1 200 "), "{answer}");
    assert!(answer.contains("content-type: application/json"), "{answer}");

    let answer = get(&format!("{LIST}?FileSystemId=fs-0123abcd"), "");
    assert!(answer.starts_with("http/1.1 404 "), "{answer}");
    assert!(answer.contains("x-amzn-errortype: filesystemnotfound\r\n"), "{answer}");
    assert!(answer.ends_with(
        r#"{"errorcode":"filesystemnotfound","message":"file system fs-0123abcd is not known here"}"#
    ));

    // The empty id that EFS's clients send.
    let target = "/2015-02-01/file-systems//replication-configuration";
    let answer = raw(
        address,
        &format!("DELETE {target} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"),
    );
    assert!(answer.starts_with("http/1.1 400 "), "{answer}");
    assert!(answer.contains("x-amzn-errortype: badrequest"), "{answer}");

    assert!(get(LIST, "Origin: http://evil.example\r\n").starts_with("http/1.1 403 "));
    let rebound = "GET / HTTP/1.1\r\nHost: evil.example\r\nConnection: close\r\n\r\n";
    assert!(raw(address, rebound).starts_with("http/1.1 403 "));

    // The console, and what it asks for.
    let page = get("/", "Sec-Fetch-Site: none\r\n");
    assert!(page.starts_with("http/1.1 200 ") && page.contains("<!doctype html>"), "{page}");
    assert!(page.contains("frame-ancestors 'none'"), "{page}");
    let head = format!("HEAD / HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n");
    assert!(raw(address, &head).ends_with("\r\n\r\n"));
    let pause = |headers: &str| {
        raw(
            address,
            &format!(
                "POST /replicator/v1/pause HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n{headers}\r\n"
            ),
        )
    };
    let own = format!("Origin: http://{address}\r\nSec-Fetch-Site: same-origin\r\n");
    assert!(pause(&own).starts_with("http/1.1 403 "));
    assert!(pause(&format!("{own}X-Replicator-Console: 1\r\n")).starts_with("http/1.1 200 "));
    let other = "Origin: http://127.0.0.1:1\r\nX-Replicator-Console: 1\r\n";
    assert!(pause(other).starts_with("http/1.1 403 "));
    let preflight = format!(
        "OPTIONS /replicator/v1/pause HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\nOrigin: http://evil.example\r\nAccess-Control-Request-Headers: x-replicator-console\r\n\r\n"
    );
    let answer = raw(address, &preflight);
    assert!(answer.starts_with("http/1.1 403 "), "{answer}");
    assert!(!answer.contains("access-control-allow"), "{answer}");

    let large = format!(
        "POST /replicator/v1/pause HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: {}\r\n\r\n{}",
        70_000,
        " ".repeat(70_000)
    );
    assert!(raw(address, &large).starts_with("http/1.1 400 "));

    let target = at(id(1).as_str());
    let delete =
        format!("DELETE {target} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n");
    let answer = raw(address, &delete);
    assert!(answer.starts_with("http/1.1 204 ") && answer.ends_with("\r\n\r\n"), "{answer}");
    server.stop();
    assert!(TcpStream::connect(address).is_err());
}

#[test]
fn a_port_in_use_is_said_so() {
    let first = server::bind(local()).unwrap();
    let error = server::bind(first.address()).err().unwrap();
    assert!(matches!(error, server::ServeError::InUse { .. }));
    assert!(error.to_string().contains("is in use"), "{error}");
}

#[test]
fn the_client_speaks_what_the_server_does() {
    use super::client::{Client, ClientError};
    let fake = Arc::new(Fake::with(1..=150));
    let server =
        server::bind(local()).unwrap().serve(api(&fake).with_tokens(Arc::new(FakeTokens))).unwrap();
    let client = Client::new(&format!("http://{}/", server.address())).unwrap();

    assert_eq!(client.status().unwrap().len(), 150);
    let all = client.describe(None).unwrap();
    assert_eq!((all.replications.len(), all.next_token), (150, None));
    assert_eq!(all.replications[149].source_file_system_id, id(150).as_str());
    let arn = &all.replications[6].source_file_system_arn;
    assert_eq!(client.describe(Some(arn)).unwrap().replications.len(), 1);
    let error = client.describe(Some("fs-0123abcd")).unwrap_err();
    assert_eq!(error.to_string(), "file system fs-0123abcd is not known here");

    let seven = Some(id(7).to_string());
    assert_eq!(client.pause(seven.clone()).unwrap().status, ReplicationStatus::Paused);
    assert_eq!(
        client
            .resume(&own::ResumeBody { id: seven.clone(), accept_deletions: false })
            .unwrap()
            .status,
        ReplicationStatus::Enabled
    );
    let second = std::time::Duration::from_secs(1);
    assert_eq!(client.wait(seven.clone(), second).unwrap().source_file_system_id, id(7).as_str());
    assert!(client.wait(seven.clone(), std::time::Duration::ZERO).unwrap_err().is_timeout());
    client.delete(arn, crate::control::DeletionMode::AllConfigurations).unwrap();
    let body = own::FailoverBody { id: Some(id(8).to_string()), ..own::FailoverBody::default() };
    assert_eq!(client.failover(&body).unwrap().path, "/replica");
    let body = own::TokenBody { replica: "/r".into(), valid_seconds: None, reconcile: false };
    assert_eq!(client.token(&body).unwrap().token, "token-for-/r");

    server.stop();
    let error = client.status().unwrap_err();
    assert!(matches!(error, ClientError::Unreachable { .. }), "{error}");
}

#[test]
fn endpoints() {
    use super::client::check_endpoint;
    assert_eq!(check_endpoint("http://localhost:4480/").unwrap(), "http://localhost:4480");
    assert!(check_endpoint("http://[::1]:4480").is_ok());
    assert!(check_endpoint("https://replica.example.org:4480").is_ok());
    for bad in ["", "localhost:4480", "ftp://localhost", "http://", "http://a/b", "http://a?b"] {
        assert!(check_endpoint(bad).is_err(), "{bad}");
    }
}
