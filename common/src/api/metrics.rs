//! `GET /metrics`: the page for Prometheus, see [`crate::telemetry`].

use std::sync::Arc;

use axum::body::Body;
use axum::extract::State;
use axum::http::header::{CONTENT_TYPE, HOST, HeaderMap, HeaderValue, ORIGIN};
use axum::response::Response;

use super::server::{Shared, refuse};
use super::{Api, ApiError, guard};
use crate::time::Timestamp;

/// The format that Prometheus calls its own text format.
const TEXT: &str = "text/plain; version=0.0.4; charset=utf-8";

impl Api {
    /// The page; `None` for a daemon without one. Blocks.
    pub fn metrics(&self) -> Option<String> {
        let page = self.page.as_ref()?;
        Some(page.render(&self.control.list(), Timestamp::now()))
    }
}

pub(super) async fn serve(State(shared): State<Arc<Shared>>, headers: HeaderMap) -> Response {
    match page(&shared, &headers).await {
        Ok(page) => {
            let mut response = Response::new(Body::from(page));
            response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(TEXT));
            response
        }
        Err(error) => refuse(&error),
    }
}

async fn page(shared: &Arc<Shared>, headers: &HeaderMap) -> Result<String, ApiError> {
    let host = headers.get(HOST).and_then(|value| value.to_str().ok());
    guard::check(host, headers.contains_key(ORIGIN), &shared.api.options.hosts)?;
    let permit = shared.calls.clone().try_acquire_owned().map_err(|_| ApiError::throttled())?;
    let worker = shared.clone();
    let render = move || {
        let _permit = permit;
        worker.api.metrics()
    };
    let page = tokio::task::spawn_blocking(render)
        .await
        .map_err(|_| ApiError::internal("the page could not be made"))?;
    page.ok_or_else(|| ApiError::new(404, "UnknownOperationException", "there are no metrics here"))
}
