//! Keeps other web pages out. A page that an operator's browser shows may send
//! requests to loopback addresses: across origins, or under a name of the
//! attacker's that he lets point to 127.0.0.1 (DNS rebinding; then `Host` is that
//! name). Only the console, which this server serves itself, may do so:
//!
//! - `Host` must be an address, a loopback name or a configured name;
//! - `Origin`, which browsers add to whatever crosses origins and to every POST,
//!   must be this server's own;
//! - `Sec-Fetch-Site`, which no page can forge, must be `same-origin`, or `none`
//!   (the operator typed the address). A link from elsewhere may lead to the
//!   console's page, where nothing happens before the operator acts;
//! - what changes something must carry [`CONSOLE`], if it comes from a browser: a
//!   page elsewhere can add a header only after the browser has asked leave
//!   (a preflight, OPTIONS), and that is never given.
//!
//! Clients that are no browsers send none of these but `Host`.
//!
//! The port in `Host` is not compared: a rebound name is caught by the name,
//! and a forwarded port is a legitimate one. `Origin` is compared with all of
//! `Host`: what listens on another port is another server.

use std::net::IpAddr;

use axum::http::HeaderMap;
use axum::http::header::{HOST, HeaderName, ORIGIN};

use super::ApiError;

/// The header that the console's own requests carry; its value means nothing.
pub(super) const CONSOLE: HeaderName = HeaderName::from_static("x-replicator-console");

/// What tells who sent a request.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Caller<'a> {
    /// `GET`, `POST` …
    method: &'a str,
    /// The request's path, without the query.
    path: &'a str,
    host: Option<&'a str>,
    /// `Some` if there is such a header, whatever it holds.
    origin: Option<&'a str>,
    /// `Sec-Fetch-Site`, as above.
    site: Option<&'a str>,
    /// `Sec-Fetch-Mode` is `navigate`: the answer is shown, no script reads it.
    navigates: bool,
    /// It carries [`CONSOLE`].
    console: bool,
}

impl<'a> Caller<'a> {
    /// From a request's line and headers.
    pub(super) fn new(method: &'a str, path: &'a str, headers: &'a HeaderMap) -> Self {
        // What is not text is equal to nothing that is allowed.
        let text = |name: &str| headers.get(name).map(|value| value.to_str().unwrap_or("\u{fffd}"));
        Self {
            method,
            path,
            host: headers.get(HOST).and_then(|value| value.to_str().ok()),
            origin: text(ORIGIN.as_str()),
            site: text("sec-fetch-site"),
            navigates: text("sec-fetch-mode") == Some("navigate"),
            console: headers.contains_key(CONSOLE),
        }
    }

    fn is_read(&self) -> bool {
        matches!(self.method, "GET" | "HEAD")
    }
}

/// Checks a request; `scheme` is the one that the server speaks, `names` are the
/// hosts that the configuration allows.
pub(super) fn check(caller: &Caller<'_>, scheme: &str, names: &[String]) -> Result<(), ApiError> {
    let refused = |message: String| ApiError::new(403, "AccessDeniedException", message);
    let Some(host) = caller.host else {
        return Err(ApiError::bad_request("the request has no Host header"));
    };
    if !is_ours(host, names) {
        return Err(refused(format!(
            "this API is not served under the name {:?}: add it to api_hosts in the configuration",
            host_name(host)
        )));
    }
    let own = format!("{scheme}://{host}");
    if caller.origin.is_some_and(|origin| !origin.eq_ignore_ascii_case(&own)) {
        return Err(refused("requests from other web pages are refused".to_owned()));
    }
    let shown = caller.is_read() && caller.path == "/" && caller.navigates;
    if !matches!(caller.site, None | Some("same-origin" | "none")) && !shown {
        return Err(refused("requests from other web sites are refused".to_owned()));
    }
    let browser = caller.origin.is_some() || caller.site.is_some();
    if browser && !caller.is_read() && !caller.console {
        return Err(refused(format!("requests from a browser must carry {CONSOLE}")));
    }
    Ok(())
}

fn is_ours(host: &str, names: &[String]) -> bool {
    let name = host_name(host).to_ascii_lowercase();
    name.parse::<IpAddr>().is_ok()
        || name == "localhost"
        || name.ends_with(".localhost")
        || names.contains(&name)
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

    const HOST: &str = "127.0.0.1:4480";
    const OWN: &str = "http://127.0.0.1:4480";

    /// A client that is no browser.
    fn client() -> Caller<'static> {
        Caller {
            method: "POST",
            path: "/replicator/v1/pause",
            host: Some(HOST),
            ..Caller::default()
        }
    }

    /// The console's own request.
    fn console() -> Caller<'static> {
        Caller { origin: Some(OWN), site: Some("same-origin"), console: true, ..client() }
    }

    fn passes(caller: Caller<'_>) -> bool {
        check(&caller, "http", &[]).is_ok()
    }

    #[test]
    fn addresses_loopback_names_and_configured_names_pass() {
        let names = ["replica.example.org".to_owned()];
        let under = |host| check(&Caller { host, ..client() }, "http", &names);
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
            assert_eq!(under(Some(good)), Ok(()), "{good}");
        }
        for bad in [
            "evil.example:4480",
            "evil.example",
            "",
            ":4480",
            "localhost.evil.example",
            "127.0.0.1.evil.example",
        ] {
            assert!(under(Some(bad)).is_err(), "{bad}");
            // A rebound page is of one origin with the name that it uses.
            let own = format!("http://{bad}");
            let page = Caller { host: Some(bad), origin: Some(&own), ..console() };
            assert!(!passes(page), "{bad}");
        }
        assert!(under(None).is_err());
    }

    #[test]
    fn only_the_servers_own_origin_passes() {
        assert!(passes(console()));
        assert!(passes(Caller {
            host: Some("LocalHost:1"),
            origin: Some("http://localhost:1"),
            ..console()
        }));
        for bad in [
            "null",
            "",
            "http://evil.example",
            "http://127.0.0.1",
            "http://127.0.0.1:44800",
            "http://127.0.0.1:4481",
            "https://127.0.0.1:4480",
            "http://127.0.0.1:4480/",
            "http://localhost:4480",
            "\u{fffd}",
        ] {
            assert!(!passes(Caller { origin: Some(bad), ..console() }), "{bad}");
            // Reading is refused, too.
            let read = Caller { method: "GET", path: "/", origin: Some(bad), ..client() };
            assert!(!passes(read), "{bad}");
        }
    }

    #[test]
    fn other_sites_may_lead_to_the_page_and_to_nothing_else() {
        for site in ["cross-site", "same-site", "", "\u{fffd}"] {
            let site = Some(site);
            assert!(!passes(Caller { site, ..console() }));
            let image = Caller { method: "GET", site, ..client() };
            assert!(!passes(image));
            let page = Caller { path: "/", ..image };
            assert!(!passes(page), "a frame's or a script's");
            assert!(passes(Caller { navigates: true, ..page }));
            assert!(!passes(Caller { navigates: true, ..image }));
            // A form sent across sites navigates, too.
            assert!(!passes(Caller { method: "POST", navigates: true, console: true, ..page }));
        }
        let typed = Caller { method: "GET", path: "/", site: Some("none"), ..client() };
        assert!(passes(typed));
    }

    #[test]
    fn a_browser_changes_nothing_without_the_consoles_header() {
        assert!(passes(client()), "the command line sends neither");
        let form = Caller { console: false, ..console() };
        assert!(!passes(form));
        assert!(!passes(Caller { origin: None, ..form }));
        assert!(!passes(Caller { site: None, ..form }));
        assert!(passes(Caller { method: "GET", ..form }));
        // The question whether a page elsewhere may add the header.
        let preflight =
            Caller { method: "OPTIONS", origin: Some("http://evil.example"), ..client() };
        assert!(!passes(preflight));
    }

    #[test]
    fn headers_are_read_as_they_are() {
        let mut headers = HeaderMap::new();
        headers.insert(axum::http::header::HOST, HOST.parse().unwrap());
        let caller = Caller::new("POST", "/replicator/v1/pause", &headers);
        assert!(check(&caller, "http", &[]).is_ok());
        headers.insert(ORIGIN, axum::http::HeaderValue::from_bytes(b"http://\xff").unwrap());
        headers.insert(CONSOLE, "1".parse().unwrap());
        let caller = Caller::new("POST", "/replicator/v1/pause", &headers);
        assert!(check(&caller, "http", &[]).is_err());
        headers.insert(ORIGIN, OWN.parse().unwrap());
        let caller = Caller::new("POST", "/replicator/v1/pause", &headers);
        assert!(check(&caller, "http", &[]).is_ok());
        headers.remove(CONSOLE);
        let caller = Caller::new("POST", "/replicator/v1/pause", &headers);
        assert!(check(&caller, "http", &[]).is_err());
    }
}
