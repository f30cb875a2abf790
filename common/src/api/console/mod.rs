//! The console: a page for people, served at `/` of the API's listener. All of it
//! is in the program; the page loads nothing from elsewhere, and is kept from it
//! by its policy.
//!
//! It is plain HTML, CSS and modules of JavaScript: `main.js` begins. What it
//! shows comes as [`events`](super::events); what it does are the API's own
//! operations.

use axum::body::Body;
use axum::http::header::{
    CACHE_CONTROL, CONTENT_SECURITY_POLICY, CONTENT_TYPE, HeaderName, REFERRER_POLICY,
    X_CONTENT_TYPE_OPTIONS,
};
use axum::http::{HeaderMap, HeaderValue};
use axum::response::Response;

/// A file of the page.
struct Asset {
    path: &'static str,
    kind: &'static str,
    text: &'static str,
}

const SCRIPT: &str = "text/javascript; charset=utf-8";

macro_rules! asset {
    ($path:literal, $kind:expr, $file:literal) => {
        Asset { path: $path, kind: $kind, text: include_str!($file) }
    };
}

const ASSETS: [Asset; 12] = [
    asset!("/", "text/html; charset=utf-8", "index.html"),
    asset!("/console/console.css", "text/css; charset=utf-8", "console.css"),
    asset!("/console/icon.svg", "image/svg+xml", "icon.svg"),
    asset!("/console/main.js", SCRIPT, "main.js"),
    asset!("/console/dom.js", SCRIPT, "dom.js"),
    asset!("/console/words.js", SCRIPT, "words.js"),
    asset!("/console/overview.js", SCRIPT, "overview.js"),
    asset!("/console/card.js", SCRIPT, "card.js"),
    asset!("/console/facts.js", SCRIPT, "facts.js"),
    asset!("/console/chart.js", SCRIPT, "chart.js"),
    asset!("/console/actions.js", SCRIPT, "actions.js"),
    asset!("/console/failover.js", SCRIPT, "failover.js"),
];

/// What the page may do: run its own scripts, show its own style and icon, ask
/// its own server. Text cannot become markup or a script (trusted types).
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; \
    connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; \
    require-trusted-types-for 'script'; trusted-types 'none'";

/// The file of the page at `path`.
pub(super) fn find(method: &str, path: &str) -> Option<Response> {
    if !matches!(method, "GET" | "HEAD") {
        return None;
    }
    let asset = ASSETS.iter().find(|asset| asset.path == path)?;
    // The shell takes the body of an answer to HEAD away, and leaves its length.
    let mut response = Response::new(Body::from(asset.text));
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static(asset.kind));
    // After an upgrade of the daemon, no file of the page is the old one.
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    Some(response)
}

/// Marks any answer: what a browser is not to do with it.
pub(super) fn protect(headers: &mut HeaderMap) {
    const RESOURCE_POLICY: HeaderName = HeaderName::from_static("cross-origin-resource-policy");
    for (name, value) in [
        (CONTENT_SECURITY_POLICY, POLICY),
        (X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (REFERRER_POLICY, "no-referrer"),
        (RESOURCE_POLICY, "same-origin"),
    ] {
        headers.insert(name, HeaderValue::from_static(value));
    }
}

#[cfg(test)]
mod tests;
