//! AWS Signature Version 4: made by the client, checked by the server. Pure.
//!
//! A request is signed with a key that never travels: HMAC-SHA-256 over method,
//! path, query, the headers that `Authorization` names, and a hash of the body.
//! EFS's clients send no hash of the body (`x-amz-content-sha256`), so it is
//! always taken from the body itself.

use axum::http::HeaderMap;
use hmac::{Hmac, Mac};
use sha2::{Digest, Sha256};
use time::format_description::FormatItem;
use time::macros::format_description;
use time::{OffsetDateTime, PrimitiveDateTime};

use super::AccessKey;
use crate::api::ApiError;
use crate::keyed;
use crate::time::Timestamp;

/// EFS's name in signatures.
pub const SERVICE: &str = "elasticfilesystem";
/// How far the clocks of client and server may be apart: AWS's rule.
const SKEW_SECONDS: i64 = 15 * 60;
const ALGORITHM: &str = "AWS4-HMAC-SHA256";
const TERMINATOR: &str = "aws4_request";
const TIME: &[FormatItem<'_>] = format_description!("[year][month][day]T[hour][minute][second]Z");
/// Characters of [`TIME`] that are the day.
const DAY: usize = 8;

/// A request as it is signed.
#[derive(Clone, Copy, Debug)]
pub struct Request<'a> {
    /// `GET`, …
    pub method: &'a str,
    /// Path and query, as they stand in the request.
    pub target: &'a str,
    /// Its headers.
    pub headers: &'a HeaderMap,
    /// Its whole body.
    pub body: &'a [u8],
}

/// What `Authorization` says.
#[derive(Debug, PartialEq, Eq)]
struct Authorization<'a> {
    key: &'a str,
    /// DAY/REGION/SERVICE/aws4_request
    scope: &'a str,
    /// Lower case, in order.
    signed: Vec<&'a str>,
    signature: Vec<u8>,
}

/// What `find` says of the key that a request is signed with.
///
/// # Errors
/// In AWS's classes: `MissingAuthenticationToken`, `IncompleteSignature`,
/// `InvalidClientTokenId`, `InvalidSignatureException`, `RequestExpired`.
pub fn verify<'k, T>(
    request: &Request<'_>,
    now: Timestamp,
    find: impl Fn(&str) -> Option<(&'k AccessKey, T)>,
) -> Result<T, ApiError> {
    let Some(header) = text(request.headers, "authorization") else {
        return Err(ApiError::new(
            403,
            "MissingAuthenticationToken",
            "the request is not signed: this API asks for an access key or a client certificate",
        ));
    };
    let said = Authorization::parse(header)?;
    let stamp = text(request.headers, "x-amz-date")
        .ok_or_else(|| incomplete("the request has no header x-amz-date"))?;
    let time = parse_time(stamp)
        .ok_or_else(|| incomplete("x-amz-date is not of the form 20150830T123600Z"))?;
    check_scope(said.scope, stamp)?;
    check_signed(&said.signed, request.headers)?;
    let unknown = || ApiError::new(403, "InvalidClientTokenId", "the access key is not known here");
    if request.headers.contains_key("x-amz-security-token") {
        // Part of temporary credentials, which nobody here gives out.
        return Err(unknown());
    }
    let (key, found) = find(said.key).ok_or_else(unknown)?;
    let canonical = canonical(request, &said.signed);
    // Compares in constant time.
    mac(key, said.scope, stamp, &canonical).verify_slice(&said.signature).map_err(|_| {
        ApiError::new(
            403,
            "InvalidSignatureException",
            "the signature is not that of this request with this access key: check the secret, and that nothing on the way changes requests",
        )
    })?;
    let skew = now.0.div_euclid(1_000_000_000) - time;
    if skew.abs() > SKEW_SECONDS {
        return Err(ApiError::new(
            400,
            "RequestExpired",
            format!(
                "the request was signed at {stamp}, {skew} s before now by the clock here: it must be within 15 minutes"
            ),
        ));
    }
    Ok(found)
}

/// The headers that sign a request: `x-amz-date` and `authorization`. What is
/// in `request.headers` is signed too; `host` must be there.
pub fn sign(
    request: &Request<'_>,
    key: &AccessKey,
    region: &str,
    now: Timestamp,
) -> [(&'static str, String); 2] {
    let stamp = format_time(now);
    let mut headers = request.headers.clone();
    // Digits and letters: always a valid value.
    if let Ok(value) = stamp.parse() {
        headers.insert("x-amz-date", value);
    }
    let mut signed: Vec<&str> = headers.keys().map(|name| name.as_str()).collect();
    signed.sort_unstable();
    let scope = format!("{}/{region}/{SERVICE}/{TERMINATOR}", &stamp[..DAY]);
    let canonical = canonical(&Request { headers: &headers, ..*request }, &signed);
    let signature = hex::encode(mac(key, &scope, &stamp, &canonical).finalize().into_bytes());
    let authorization = format!(
        "{ALGORITHM} Credential={}/{scope}, SignedHeaders={}, Signature={signature}",
        key.id,
        signed.join(";")
    );
    [("x-amz-date", stamp), ("authorization", authorization)]
}

impl<'a> Authorization<'a> {
    fn parse(header: &'a str) -> Result<Self, ApiError> {
        let rest = header
            .strip_prefix(ALGORITHM)
            .ok_or_else(|| incomplete("Authorization is not of AWS4-HMAC-SHA256"))?;
        let member = |name: &str| {
            rest.split(',')
                .find_map(|part| part.trim().strip_prefix(name)?.strip_prefix('='))
                .ok_or_else(|| incomplete(&format!("Authorization lacks {name}")))
        };
        let (key, scope) = member("Credential")?
            .split_once('/')
            .ok_or_else(|| incomplete("Credential has no scope"))?;
        let signature = hex::decode(member("Signature")?)
            .map_err(|_| incomplete("Signature is not hexadecimal"))?;
        let signed = member("SignedHeaders")?.split(';').collect();
        Ok(Self { key, scope, signed, signature })
    }
}

/// The region is the client's affair: a daemon has one address.
fn check_scope(scope: &str, stamp: &str) -> Result<(), ApiError> {
    match scope.split('/').collect::<Vec<_>>()[..] {
        [day, _, SERVICE, TERMINATOR] if stamp.get(..DAY) == Some(day) => Ok(()),
        _ => Err(incomplete(&format!(
            "the credential's scope must be DAY/REGION/{SERVICE}/{TERMINATOR} of x-amz-date's day"
        ))),
    }
}

/// What is not signed can be changed on the way.
fn check_signed(signed: &[&str], headers: &HeaderMap) -> Result<(), ApiError> {
    let amazons =
        headers.keys().map(|name| name.as_str()).filter(|name| name.starts_with("x-amz-"));
    for needed in amazons.chain(["host"]) {
        if !signed.contains(&needed) {
            return Err(incomplete(&format!("SignedHeaders lacks {needed}")));
        }
    }
    Ok(())
}

fn mac(key: &AccessKey, scope: &str, stamp: &str, canonical: &str) -> Hmac<Sha256> {
    let mut secret = format!("AWS4{}", key.secret.reveal()).into_bytes();
    for part in scope.split('/') {
        secret = keyed::hmac(&secret).chain_update(part).finalize().into_bytes().to_vec();
    }
    let hash = hex::encode(Sha256::digest(canonical));
    keyed::hmac(&secret).chain_update(format!("{ALGORITHM}\n{stamp}\n{scope}\n{hash}"))
}

fn canonical(request: &Request<'_>, signed: &[&str]) -> String {
    let (path, query) = request.target.split_once('?').unwrap_or((request.target, ""));
    let mut headers = String::new();
    for name in signed {
        let values: Vec<String> = request
            .headers
            .get_all(*name)
            .iter()
            .map(|value| String::from_utf8_lossy(value.as_bytes()).into_owned())
            .map(|value| value.split_whitespace().collect::<Vec<_>>().join(" "))
            .collect();
        headers.push_str(&format!("{name}:{}\n", values.join(",")));
    }
    format!(
        "{}\n{}\n{}\n{headers}\n{}\n{}",
        request.method,
        canonical_path(path),
        canonical_query(query),
        signed.join(";"),
        hex::encode(Sha256::digest(request.body))
    )
}

/// The path as it was sent, encoded once more, without empty and dot parts.
fn canonical_path(path: &str) -> String {
    let mut parts: Vec<&str> = Vec::new();
    for part in path.split('/') {
        match part {
            "" | "." => {}
            ".." => drop(parts.pop()),
            part => parts.push(part),
        }
    }
    let end = if path.ends_with('/') && !parts.is_empty() { "/" } else { "" };
    let parts: Vec<String> = parts.iter().map(|part| encode(part.as_bytes())).collect();
    format!("/{}{end}", parts.join("/"))
}

/// The pairs in order, each encoded as AWS does it.
fn canonical_query(query: &str) -> String {
    let mut pairs: Vec<(String, String)> = query
        .split('&')
        .filter(|pair| !pair.is_empty())
        .map(|pair| {
            let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
            (encode(&decode(name)), encode(&decode(value)))
        })
        .collect();
    pairs.sort_unstable();
    let pairs: Vec<String> = pairs.iter().map(|(name, value)| format!("{name}={value}")).collect();
    pairs.join("&")
}

/// Percent-encodes everything but letters, digits and `-._~`.
fn encode(bytes: &[u8]) -> String {
    bytes
        .iter()
        .map(|byte| match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => {
                char::from(*byte).to_string()
            }
            other => format!("%{other:02X}"),
        })
        .collect()
}

/// Undoes percent-encoding; what is none stays.
fn decode(text: &str) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let [first, tail @ ..] = rest {
        let pair = tail.get(..2).filter(|_| *first == b'%');
        let byte = pair.and_then(|pair| hex::decode(pair).ok());
        bytes.push(byte.as_ref().map_or(*first, |byte| byte[0]));
        rest = if byte.is_some() { &tail[2..] } else { tail };
    }
    bytes
}

fn text<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
    headers.get(name).and_then(|value| value.to_str().ok())
}

/// Seconds since the epoch.
fn parse_time(text: &str) -> Option<i64> {
    Some(PrimitiveDateTime::parse(text, TIME).ok()?.assume_utc().unix_timestamp())
}

fn format_time(time: Timestamp) -> String {
    OffsetDateTime::from_unix_timestamp(time.0.div_euclid(1_000_000_000))
        .ok()
        .and_then(|time| time.format(TIME).ok())
        .unwrap_or_default()
}

fn incomplete(message: &str) -> ApiError {
    ApiError::new(400, "IncompleteSignature", message)
}

#[cfg(test)]
mod tests;
