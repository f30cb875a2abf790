//! From method and request target to an operation. Pure.
//!
//! The path is split before its parts are decoded: an ARN arrives
//! percent-encoded, with a slash in it, as one part.

use super::ApiError;
use crate::id::FileSystemId;

/// What a request asks for; ids are as the client wrote them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Operation {
    /// EFS's CreateReplicationConfiguration.
    CreateReplication { source: String },
    /// EFS's DescribeReplicationConfigurations.
    DescribeReplications(Query),
    /// EFS's DeleteReplicationConfiguration.
    DeleteReplication { source: String, query: Query },
    /// Our own.
    Own(Own),
}

/// Our own operations.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Own {
    Health,
    Status,
    Create,
    Wait,
    Pause,
    Resume,
    Failover,
    Token,
    Verify,
    Findings,
}

/// The query's decoded pairs, in order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Query(Vec<(String, String)>);

impl Query {
    /// The value of the first pair of this name.
    pub(super) fn get(&self, name: &str) -> Option<&str> {
        self.0.iter().find(|(key, _)| key == name).map(|(_, value)| value.as_str())
    }
}

/// Finds the operation that `method` on `target` (path and query, as they
/// stand in the request) asks for.
pub(super) fn route(method: &str, target: &str) -> Result<Operation, ApiError> {
    let (path, query) = target.split_once('?').unwrap_or((target, ""));
    let parts: Vec<&str> = path.strip_prefix('/').unwrap_or(path).split('/').collect();
    match parts[..] {
        ["2015-02-01", "file-systems", id, "replication-configuration"] => {
            let source = decode(id, false)?;
            match method {
                "POST" => Ok(Operation::CreateReplication { source }),
                "DELETE" => Ok(Operation::DeleteReplication { source, query: pairs(query)? }),
                _ => Err(wrong_method(method, path)),
            }
        }
        ["2015-02-01", "file-systems", "replication-configurations"] => match method {
            "GET" => Ok(Operation::DescribeReplications(pairs(query)?)),
            _ => Err(wrong_method(method, path)),
        },
        ["replicator", "v1", name] => own(method, name, path).map(Operation::Own),
        _ => Err(unknown(path)),
    }
}

fn own(method: &str, name: &str, path: &str) -> Result<Own, ApiError> {
    let (expected, operation) = match name {
        "health" => ("GET", Own::Health),
        "status" => ("GET", Own::Status),
        "replications" => ("POST", Own::Create),
        "wait" => ("POST", Own::Wait),
        "pause" => ("POST", Own::Pause),
        "resume" => ("POST", Own::Resume),
        "failover" => ("POST", Own::Failover),
        "tokens" => ("POST", Own::Token),
        "verify" => ("POST", Own::Verify),
        "findings" => ("POST", Own::Findings),
        _ => return Err(unknown(path)),
    };
    if method == expected { Ok(operation) } else { Err(wrong_method(method, path)) }
}

fn unknown(path: &str) -> ApiError {
    ApiError::new(404, "UnknownOperationException", format!("there is no operation at {path}"))
}

fn wrong_method(method: &str, path: &str) -> ApiError {
    ApiError::new(405, "UnknownOperationException", format!("{method} cannot be used on {path}"))
}

fn pairs(query: &str) -> Result<Query, ApiError> {
    query
        .split('&')
        .filter(|pair| !pair.is_empty())
        .map(|pair| {
            let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
            Ok((decode(key, true)?, decode(value, true)?))
        })
        .collect::<Result<_, _>>()
        .map(Query)
}

/// Percent-decoding; in queries, `+` is a space.
fn decode(text: &str, in_query: bool) -> Result<String, ApiError> {
    let malformed = || ApiError::bad_request(format!("{text:?} is not percent-encoded UTF-8"));
    let digit = |byte: Option<u8>| byte.and_then(|b| char::from(b).to_digit(16));
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        bytes.push(match byte {
            b'%' => {
                let high = digit(rest.next()).ok_or_else(malformed)?;
                let low = digit(rest.next()).ok_or_else(malformed)?;
                (high * 16 + low) as u8
            }
            b'+' if in_query => b' ',
            byte => byte,
        });
    }
    String::from_utf8(bytes).map_err(|_| malformed())
}

/// A file system id, alone or in an ARN
/// (`arn:aws…:elasticfilesystem:REGION:OWNER:file-system/fs-…`).
///
/// # Errors
/// `BadRequest`, as EFS has it, when it is neither.
pub(super) fn file_system_id(text: &str) -> Result<FileSystemId, ApiError> {
    let id = match text.split_once(":file-system/") {
        Some((head, id)) if is_arn_head(head) => id,
        _ => text,
    };
    id.parse().map_err(|_| {
        ApiError::bad_request(format!(
            "{text:?} is not a file system id (expected fs- and 8 to 40 lower-case hexadecimal digits, or an ARN that ends in it)"
        ))
    })
}

/// `arn:aws[-a-z]*:elasticfilesystem:[0-9a-z-:]+`
fn is_arn_head(head: &str) -> bool {
    let Some((partition, rest)) =
        head.strip_prefix("arn:aws").and_then(|rest| rest.split_once(':'))
    else {
        return false;
    };
    let place = rest.strip_prefix("elasticfilesystem:").unwrap_or_default();
    partition.bytes().all(|b| b == b'-' || b.is_ascii_lowercase())
        && !place.is_empty()
        && place
            .bytes()
            .all(|b| matches!(b, b'-' | b':') || b.is_ascii_lowercase() || b.is_ascii_digit())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn efs_paths() {
        let source = "arn:aws:elasticfilesystem:xx-local:000000000000:file-system/fs-01234567";
        let encoded =
            "arn%3Aaws%3Aelasticfilesystem%3Axx-local%3A000000000000%3Afile-system%2Ffs-01234567";
        let path = format!("/2015-02-01/file-systems/{encoded}/replication-configuration");
        assert_eq!(
            route("POST", &path).unwrap(),
            Operation::CreateReplication { source: source.to_owned() }
        );
        assert_eq!(file_system_id(source).unwrap().as_str(), "fs-01234567");
        let Operation::DeleteReplication { query, .. } =
            route("DELETE", &format!("{path}?deletionMode=LOCAL_CONFIGURATION_ONLY")).unwrap()
        else {
            panic!("a deletion")
        };
        assert_eq!(query.get("deletionMode"), Some("LOCAL_CONFIGURATION_ONLY"));
        assert_eq!(query.get("DeletionMode"), None);
        assert_eq!(
            route("POST", "/2015-02-01/file-systems//replication-configuration").unwrap(),
            Operation::CreateReplication { source: String::new() }
        );
    }

    #[test]
    fn what_is_not_there() {
        for (method, target, status) in [
            ("GET", "/", 404),
            ("GET", "", 404),
            ("GET", "/2015-02-01/file-systems", 404),
            ("GET", "/replicator/v1/", 404),
            ("GET", "/replicator/v1/status/", 404),
            ("POST", "/replicator/v1/status", 405),
            ("PUT", "/2015-02-01/file-systems/fs-01234567/replication-configuration", 405),
            ("POST", "/2015-02-01/file-systems/%zz/replication-configuration", 400),
            ("POST", "/2015-02-01/file-systems/%f/replication-configuration", 400),
            ("POST", "/2015-02-01/file-systems/%ff/replication-configuration", 400),
        ] {
            assert_eq!(route(method, target).unwrap_err().status, status, "{method} {target}");
        }
    }

    #[test]
    fn ids_that_are_none() {
        for bad in [
            "",
            "bogus",
            "fs-0123456",
            "arn:aws:elasticfilesystem::file-system/fs-01234567x",
            "arn:aws:s3:xx-local:0:file-system/fs-01234567",
            "arn:gcp:elasticfilesystem:x:file-system/fs-01234567",
            "x:file-system/fs-01234567",
        ] {
            assert_eq!(file_system_id(bad).unwrap_err().class, "BadRequest", "{bad}");
        }
    }
}
