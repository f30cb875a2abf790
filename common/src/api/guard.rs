//! Keeps web pages out. A page that an operator's browser shows may send
//! requests to loopback addresses: across origins (then the browser adds
//! `Origin`), or under a name of the attacker's that he lets point to 127.0.0.1
//! (DNS rebinding; then `Host` is that name). No client of the API does either.
//!
//! The port in `Host` is not compared: a rebound name is caught by the name,
//! and a forwarded port is a legitimate one.

use std::net::IpAddr;

use super::ApiError;

/// Checks the `Host` and `Origin` headers; `names` are the hosts that the
/// configuration allows.
pub(super) fn check(
    host: Option<&str>,
    has_origin: bool,
    names: &[String],
) -> Result<(), ApiError> {
    let refused = |message: String| ApiError::new(403, "AccessDeniedException", message);
    if has_origin {
        return Err(refused("requests from web pages are refused".to_owned()));
    }
    let Some(host) = host else {
        return Err(ApiError::bad_request("the request has no Host header"));
    };
    let name = host_name(host);
    let lower = name.to_ascii_lowercase();
    let allowed = name.parse::<IpAddr>().is_ok()
        || lower == "localhost"
        || lower.ends_with(".localhost")
        || names.contains(&lower);
    if allowed {
        return Ok(());
    }
    Err(refused(format!(
        "this API is not served under the name {name:?}: add it to api_hosts in the configuration"
    )))
}

/// `Host` without its port and brackets.
fn host_name(host: &str) -> &str {
    if let Some(rest) = host.strip_prefix('[') {
        return rest.split(']').next().unwrap_or(rest);
    }
    match host.rsplit_once(':') {
        Some((name, port)) if port.bytes().all(|b| b.is_ascii_digit()) => name,
        _ => host,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_loopback_names_and_configured_names_pass() {
        let names = ["replica.example.org".to_owned()];
        for good in [
            "127.0.0.1:4480",
            "127.0.0.1",
            "[::1]:4480",
            "[::1]",
            "localhost:4480",
            "LOCALHOST",
            "a.localhost:1",
            "10.0.0.7:4480",
            "Replica.example.org:9",
        ] {
            assert_eq!(check(Some(good), false, &names), Ok(()), "{good}");
        }
        for bad in [
            "evil.example:4480",
            "evil.example",
            "",
            ":4480",
            "localhost.evil.example",
            "127.0.0.1.evil.example",
        ] {
            assert!(check(Some(bad), false, &names).is_err(), "{bad}");
        }
        assert!(check(None, false, &names).is_err());
        assert!(check(Some("localhost"), true, &names).is_err());
    }
}
