use axum::http::HeaderMap;

use super::*;
use crate::api::auth::sigv4::Request;

const NOW: Timestamp = Timestamp(1_795_914_123_000_000_000);

fn key(id: &str) -> AccessKey {
    AccessKey { id: id.to_owned(), secret: Secret::new(format!("secret of {id}")) }
}

/// A signed request's headers.
fn headers(key: &AccessKey) -> HeaderMap {
    let mut headers = HeaderMap::new();
    headers.insert("host", "localhost".parse().unwrap());
    let request = Request { method: "GET", target: "/x", headers: &headers, body: b"" };
    let signature = sigv4::sign(&request, key, "xx-local", NOW);
    for (name, value) in signature {
        headers.insert(name, value.parse().unwrap());
    }
    headers
}

#[test]
fn each_has_the_permission_that_was_given() {
    let (mine, theirs) = (Fingerprint::of(b"mine"), Fingerprint::of(b"theirs"));
    let credentials = Credentials {
        keys: vec![(key("one"), Permission::Full), (key("two"), Permission::ReadOnly)],
        clients: vec![(mine, Permission::ReadOnly)],
    };
    let ask = |headers: &HeaderMap, certificate: Option<&Fingerprint>| {
        let request = Request { method: "GET", target: "/x", headers, body: b"" };
        credentials.permission(&request, certificate, NOW)
    };
    assert_eq!(ask(&headers(&key("one")), None), Ok(Permission::Full));
    assert_eq!(ask(&headers(&key("two")), None), Ok(Permission::ReadOnly));
    assert!(ask(&headers(&key("three")), None).is_err());
    let nothing = HeaderMap::new();
    assert_eq!(ask(&nothing, Some(&mine)), Ok(Permission::ReadOnly));
    assert_eq!(ask(&nothing, Some(&theirs)).unwrap_err().class, "MissingAuthenticationToken");
    // An unknown certificate is no hindrance.
    assert_eq!(ask(&headers(&key("one")), Some(&theirs)), Ok(Permission::Full));
}

#[test]
fn without_credentials_it_depends_on_who_is_there() {
    let headers = HeaderMap::new();
    let request = Request { method: "GET", target: "/x", headers: &headers, body: b"" };
    let none = Credentials::default();
    assert_eq!(none.permission(&request, None, NOW), Ok(Permission::Local));
    assert!(Permission::Local.check(Needs::Change, || true).is_ok());
    assert!(Permission::Local.check(Needs::Read, || false).is_ok());
    let refused = Permission::Local.check(Needs::Change, || false).unwrap_err();
    assert_eq!((refused.status, refused.class), (403, "AccessDeniedException"));
}

#[test]
fn readers_change_nothing() {
    assert!(Permission::ReadOnly.check(Needs::Read, || false).is_ok());
    assert!(Permission::Full.check(Needs::Change, || false).is_ok());
    let refused = Permission::ReadOnly.check(Needs::Change, || true).unwrap_err();
    assert_eq!((refused.status, refused.class), (403, "AccessDeniedException"));
}

#[test]
fn a_secret_is_not_shown() {
    let shown = format!("{:?}", key("one"));
    assert!(!shown.contains("secret of one"), "{shown}");
}
