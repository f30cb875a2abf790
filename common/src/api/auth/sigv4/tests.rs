use axum::http::{HeaderName, HeaderValue};
use serde::Deserialize;

use super::super::Secret;
use super::*;

const SECRET: &str = "wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY";
/// 2026-11-29T01:02:03Z, when the vectors were signed.
const SIGNED_AT: i64 = 1_795_914_123;

fn key() -> AccessKey {
    AccessKey { id: "AKIDEXAMPLE".to_owned(), secret: Secret::new(SECRET) }
}

fn at(seconds: i64) -> Timestamp {
    Timestamp(seconds * 1_000_000_000)
}

/// A request that somebody signed.
#[derive(Clone, Debug, Deserialize)]
struct Vector {
    method: String,
    target: String,
    headers: std::collections::BTreeMap<String, String>,
    body: String,
}

impl Vector {
    fn headers(&self) -> HeaderMap {
        let pair = |(name, value): (&String, &String)| {
            let value = HeaderValue::from_str(value).unwrap();
            (name.parse::<HeaderName>().unwrap(), value)
        };
        self.headers.iter().map(pair).collect()
    }

    fn verify(&self, now: Timestamp) -> Result<(), ApiError> {
        self.verify_with(&key(), now)
    }

    fn verify_with(&self, key: &AccessKey, now: Timestamp) -> Result<(), ApiError> {
        let headers = self.headers();
        let request = Request {
            method: &self.method,
            target: &self.target,
            headers: &headers,
            body: self.body.as_bytes(),
        };
        verify(&request, now, |id| (id == key.id).then_some((key, ())))
    }

    fn refusal(&self, now: Timestamp) -> (u16, &'static str) {
        let error = self.verify(now).unwrap_err();
        (error.status, error.class)
    }

    fn change(&self, how: impl FnOnce(&mut Self)) -> Self {
        let mut other = self.clone();
        how(&mut other);
        other
    }
}

/// Of `vectors.py`.
fn vectors() -> Vec<Vector> {
    serde_json::from_str(include_str!("../vectors.json")).unwrap()
}

#[test]
fn what_botocore_signs_is_verified() {
    for vector in vectors() {
        assert_eq!(vector.verify(at(SIGNED_AT)), Ok(()), "{vector:?}");
    }
}

/// Of AWS's own test suite: key, time, region and service are the suite's.
#[test]
fn aws_test_suite() {
    let headers: HeaderMap =
        [("host", "example.amazonaws.com"), ("x-amz-date", "20150830T123600Z")]
            .map(|(name, value)| (HeaderName::from_static(name), HeaderValue::from_static(value)))
            .into_iter()
            .collect();
    for (method, target, expected) in [
        ("GET", "/", "5fa00fa31553b73ebf1942676e86291e8372ff2a2260956d9b8aae1d763fbf31"),
        ("POST", "/", "5da7c1a2acd57cee7505fc6676e4e544621c30862966e37dddb68e92efbe5d6b"),
        (
            "GET",
            "/?Param2=value2&Param1=value1",
            "b97d918cfa904a5beff61c982a1b6f458b799221646efd99d3219ec94cdf2500",
        ),
    ] {
        let request = Request { method, target, headers: &headers, body: b"" };
        let canonical = canonical(&request, &["host", "x-amz-date"]);
        let scope = "20150830/us-east-1/service/aws4_request";
        let found = mac(&key(), scope, "20150830T123600Z", &canonical).finalize().into_bytes();
        assert_eq!(hex::encode(found), expected, "{method} {target}\n{canonical}");
    }
}

#[test]
fn what_we_sign_is_verified_and_nothing_of_it_can_be_changed() {
    for vector in vectors() {
        let mut headers = HeaderMap::new();
        headers.insert("host", HeaderValue::from_static("localhost:4480"));
        let mut ours = vector.clone();
        let request = Request {
            method: &vector.method,
            target: &vector.target,
            headers: &headers,
            body: vector.body.as_bytes(),
        };
        let [date, authorization] = sign(&request, &key(), "xx-local", at(SIGNED_AT));
        ours.headers = [("host", "localhost:4480".to_owned()), date, authorization]
            .map(|(name, value)| (name.to_owned(), value))
            .into();
        for signed in [&vector, &ours] {
            assert_eq!(signed.verify(at(SIGNED_AT)), Ok(()), "{signed:?}");
            let changes: [&dyn Fn(&mut Vector); 6] = [
                &|v| v.method = "PATCH".to_owned(),
                &|v| v.target.insert(1, 'x'),
                &|v| v.target.push_str(if v.target.contains('?') { "&x=1" } else { "?x=1" }),
                &|v| v.body.push(' '),
                &|v| drop(v.headers.insert("host".to_owned(), "evil.example".to_owned())),
                &|v| drop(v.headers.insert("x-amz-date".to_owned(), "20261129T010204Z".to_owned())),
            ];
            for (index, change) in changes.iter().enumerate() {
                let refused = signed.change(change).refusal(at(SIGNED_AT));
                assert_eq!(refused, (403, "InvalidSignatureException"), "{index} {signed:?}");
            }
        }
    }
}

#[test]
fn another_secret_or_an_unknown_key_is_refused() {
    let vector = &vectors()[0];
    let other = AccessKey { secret: Secret::new("another"), ..key() };
    let error = vector.verify_with(&other, at(SIGNED_AT)).unwrap_err();
    assert_eq!((error.status, error.class), (403, "InvalidSignatureException"));
    let other = AccessKey { id: "AKOTHER".to_owned(), ..key() };
    let error = vector.verify_with(&other, at(SIGNED_AT)).unwrap_err();
    assert_eq!((error.status, error.class), (403, "InvalidClientTokenId"));
    let token =
        vector.change(|v| drop(v.headers.insert("x-amz-security-token".into(), "x".into())));
    // It was not signed: then it is said first.
    assert_eq!(token.refusal(at(SIGNED_AT)), (400, "IncompleteSignature"));
}

#[test]
fn clocks_may_be_fifteen_minutes_apart() {
    let vector = &vectors()[0];
    for skew in [-900, -1, 0, 899, 900] {
        assert_eq!(vector.verify(at(SIGNED_AT + skew)), Ok(()), "{skew}");
    }
    for skew in [-86_400, -901, 901, 86_400] {
        assert_eq!(vector.refusal(at(SIGNED_AT + skew)), (400, "RequestExpired"), "{skew}");
    }
}

#[test]
fn what_is_not_a_signature() {
    let vector = &vectors()[0];
    let header = |name: &str, value: &str| {
        vector.change(|v| drop(v.headers.insert(name.to_owned(), value.to_owned())))
    };
    let without =
        |name: &str| vector.change(|v| drop(v.headers.remove(name))).refusal(at(SIGNED_AT));
    assert_eq!(without("authorization"), (403, "MissingAuthenticationToken"));
    assert_eq!(without("x-amz-date"), (400, "IncompleteSignature"));
    let good = vector.headers["authorization"].clone();
    for bad in [
        String::new(),
        "Basic eDp5".to_owned(),
        "AWS4-HMAC-SHA256".to_owned(),
        good.replace("Credential", "Credentials"),
        good.replace("elasticfilesystem", "s3"),
        good.replace("20261129/", "20261128/"),
        good.replace("aws4_request", "aws5_request"),
        good.replace("Signature=", "Signature=x"),
        good.replace("host;", ""),
        good.replace("x-amz-date", "x-amz-dat"),
    ] {
        let refused = header("authorization", &bad).refusal(at(SIGNED_AT));
        assert_eq!(refused, (400, "IncompleteSignature"), "{bad}");
    }
    let refused = header("x-amz-date", "2026-11-29").refusal(at(SIGNED_AT));
    assert_eq!(refused, (400, "IncompleteSignature"));
    let refused = header("x-amz-meta", "slipped in").refusal(at(SIGNED_AT));
    assert_eq!(refused, (400, "IncompleteSignature"));
}

proptest::proptest! {
    /// Whatever a header holds, it is refused and nothing panics.
    #[test]
    fn nonsense_is_refused(authorization in "\\PC{0,80}", date in "[0-9TZ]{0,20}") {
        let vector = vectors()[0].change(|v| {
            v.headers.insert("authorization".into(), format!("AWS4-HMAC-SHA256 {authorization}"));
            v.headers.insert("x-amz-date".into(), date);
        });
        let headers: HeaderMap = vector
            .headers
            .iter()
            .filter_map(|(name, value)| {
                let value = HeaderValue::from_bytes(value.as_bytes()).ok()?;
                Some((name.parse::<HeaderName>().ok()?, value))
            })
            .collect();
        let request = Request {
            method: "GET", target: &vector.target, headers: &headers, body: b"",
        };
        let key = key();
        proptest::prop_assert!(verify(&request, at(SIGNED_AT), |_| Some((&key, ()))).is_err());
    }
}
