//! `GET /metrics`: the page for Prometheus, see [`crate::telemetry`].

use axum::body::Body;
use axum::http::header::{CONTENT_TYPE, HeaderValue};
use axum::response::Response;

use super::{Api, ApiError};
use crate::time::Timestamp;

/// Where the page is.
pub(super) const PATH: &str = "/metrics";
/// The format that Prometheus calls its own text format.
const TEXT: &str = "text/plain; version=0.0.4; charset=utf-8";

impl Api {
    /// The page; `None` for a daemon without one. Blocks.
    pub fn metrics(&self) -> Option<String> {
        let page = self.page.as_ref()?;
        Some(page.render(&self.control.list(), Timestamp::now()))
    }
}

/// The answer with a page, if there is one.
pub(super) fn answer(page: Option<String>) -> Result<Response, ApiError> {
    let Some(page) = page else {
        return Err(ApiError::new(404, "UnknownOperationException", "there are no metrics here"));
    };
    let mut response = Response::new(Body::from(page));
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(TEXT));
    Ok(response)
}
