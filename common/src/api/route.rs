//! From method and request target to an operation. Pure.
//!
//! The path is split before its parts are decoded: an ARN arrives
//! percent-encoded, with a slash in it, as one part.

use super::ApiError;
use crate::id::FileSystemId;

/// What can be asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Operation {
    // EFS's.
    CreateReplicationConfiguration,
    DescribeReplicationConfigurations,
    DeleteReplicationConfiguration,
    CreateFileSystem,
    DescribeFileSystems,
    DeleteFileSystem,
    UpdateFileSystemProtection,
    TagResource,
    ListTagsForResource,
    UntagResource,
    // Our own.
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
    FileSystems,
    Register,
}

/// What a caller must be allowed to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Needs {
    /// To look.
    Read,
    /// To change something.
    Change,
}

/// One operation and where it is.
struct Route {
    method: &'static str,
    /// `{}` stands for any one part, the operation's argument.
    path: &'static str,
    operation: Operation,
    needs: Needs,
}

const fn read(method: &'static str, path: &'static str, operation: Operation) -> Route {
    Route { method, path, operation, needs: Needs::Read }
}

const fn change(method: &'static str, path: &'static str, operation: Operation) -> Route {
    Route { method, path, operation, needs: Needs::Change }
}

/// All of them. The first whose path fits counts, so names come before `{}`.
const ROUTES: &[Route] = {
    use Operation as Op;
    const REPLICATION: &str = "/2015-02-01/file-systems/{}/replication-configuration";
    const REPLICATIONS: &str = "/2015-02-01/file-systems/replication-configurations";
    const FILE_SYSTEMS: &str = "/2015-02-01/file-systems";
    const TAGS: &str = "/2015-02-01/resource-tags/{}";
    &[
        change("POST", REPLICATION, Op::CreateReplicationConfiguration),
        read("GET", REPLICATIONS, Op::DescribeReplicationConfigurations),
        change("DELETE", REPLICATION, Op::DeleteReplicationConfiguration),
        change("POST", FILE_SYSTEMS, Op::CreateFileSystem),
        read("GET", FILE_SYSTEMS, Op::DescribeFileSystems),
        change("DELETE", "/2015-02-01/file-systems/{}", Op::DeleteFileSystem),
        change("PUT", "/2015-02-01/file-systems/{}/protection", Op::UpdateFileSystemProtection),
        change("POST", TAGS, Op::TagResource),
        read("GET", TAGS, Op::ListTagsForResource),
        change("DELETE", TAGS, Op::UntagResource),
        read("GET", "/replicator/v1/health", Op::Health),
        read("GET", "/replicator/v1/status", Op::Status),
        change("POST", "/replicator/v1/replications", Op::Create),
        read("POST", "/replicator/v1/wait", Op::Wait),
        change("POST", "/replicator/v1/pause", Op::Pause),
        change("POST", "/replicator/v1/resume", Op::Resume),
        change("POST", "/replicator/v1/failover", Op::Failover),
        change("POST", "/replicator/v1/tokens", Op::Token),
        change("POST", "/replicator/v1/verify", Op::Verify),
        read("POST", "/replicator/v1/findings", Op::Findings),
        read("GET", "/replicator/v1/file-systems", Op::FileSystems),
        change("POST", "/replicator/v1/file-systems", Op::Register),
    ]
};

/// What a request asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Call {
    pub(super) operation: Operation,
    pub(super) needs: Needs,
    /// What stands for `{}`, decoded; empty where there is none.
    pub(super) argument: String,
    pub(super) query: Query,
}

/// The query's decoded pairs, in order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Query(Vec<(String, String)>);

impl Query {
    /// The value of the first pair of this name.
    pub(super) fn get(&self, name: &str) -> Option<&str> {
        self.all(name).next()
    }

    /// The values of all pairs of this name.
    pub(super) fn all(&self, name: &str) -> impl Iterator<Item = &str> {
        self.0.iter().filter(move |(key, _)| key == name).map(|(_, value)| value.as_str())
    }
}

/// Finds the operation that `method` on `target` (path and query, as they
/// stand in the request) asks for.
pub(super) fn route(method: &str, target: &str) -> Result<Call, ApiError> {
    let (path, query) = target.split_once('?').unwrap_or((target, ""));
    let parts: Vec<&str> = path.split('/').collect();
    let mut elsewhere = false;
    for route in ROUTES {
        let Some(argument) = fit(route.path, &parts) else { continue };
        if route.method == method {
            return Ok(Call {
                operation: route.operation,
                needs: route.needs,
                argument: decode(argument, false)?,
                query: pairs(query)?,
            });
        }
        elsewhere = true;
    }
    Err(if elsewhere { wrong_method(method, path) } else { unknown(path) })
}

/// What stands for `{}`, when a path fits; empty when the pattern has none.
fn fit<'a>(pattern: &str, parts: &[&'a str]) -> Option<&'a str> {
    let mut argument = "";
    let mut rest = parts.iter();
    for wanted in pattern.split('/') {
        let part = rest.next()?;
        match wanted {
            "{}" => argument = part,
            name if name == *part => {}
            _ => return None,
        }
    }
    rest.next().is_none().then_some(argument)
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
        let call = route("POST", &path).unwrap();
        assert_eq!(call.operation, Operation::CreateReplicationConfiguration);
        assert_eq!((call.argument.as_str(), call.needs), (source, Needs::Change));
        assert_eq!(file_system_id(source).unwrap().as_str(), "fs-01234567");
        let call =
            route("DELETE", &format!("{path}?deletionMode=LOCAL_CONFIGURATION_ONLY")).unwrap();
        assert_eq!(call.operation, Operation::DeleteReplicationConfiguration);
        assert_eq!(call.query.get("deletionMode"), Some("LOCAL_CONFIGURATION_ONLY"));
        assert_eq!(call.query.get("DeletionMode"), None);
        let call = route("POST", "/2015-02-01/file-systems//replication-configuration").unwrap();
        assert_eq!(call.argument, "");
        let call = route("DELETE", "/2015-02-01/resource-tags/x?tagKeys=a%20b&tagKeys=c").unwrap();
        assert_eq!(call.query.all("tagKeys").collect::<Vec<_>>(), ["a b", "c"]);
    }

    #[test]
    fn names_come_before_what_fits_all_and_each_route_is_found() {
        for (index, one) in ROUTES.iter().enumerate() {
            let call = route(one.method, &one.path.replace("{}", "fs-01234567")).unwrap();
            assert_eq!(call.operation, one.operation, "{} {}", one.method, one.path);
            let twice =
                ROUTES[..index].iter().any(|o| (o.method, o.path) == (one.method, one.path));
            assert!(!twice, "{} {}", one.method, one.path);
        }
    }

    #[test]
    fn what_is_not_there() {
        for (method, target, status) in [
            ("GET", "/", 404),
            ("GET", "", 404),
            ("GET", "/2015-02-01/file-systems/", 405),
            ("PUT", "/2015-02-01/file-systems", 405),
            ("GET", "/2015-02-01/file-systems/fs-01234567/protection", 405),
            ("GET", "/2015-02-01/mount-targets", 404),
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
