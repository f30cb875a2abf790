//! The HTTP shell around [`Api::perform`]: one thread of its own, bounded
//! connections, bodies and calls at once. Calls block, so they run on blocking
//! threads; a call whose client has gone runs to its end.

use std::io;
use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use axum::Router;
use axum::body::{Body, to_bytes};
use axum::extract::{Request, State};
use axum::http::header::{CONTENT_TYPE, HOST, HeaderValue, ORIGIN};
use axum::http::{HeaderName, StatusCode};
use axum::response::Response;
use axum::routing::get;
use tokio::runtime::Runtime;
use tokio::sync::{Semaphore, oneshot};

use super::limit::Limited;
use super::{Answer, Api, ApiError};
use super::{guard, metrics};

/// Connections held open at once.
const CONNECTIONS: usize = 256;
/// Calls at once, beside waits.
const CALLS: usize = 32;
/// Waits at once; each holds a thread.
const WAITS: usize = 64;
/// The most bytes of a request's body.
const BODY_MAX: usize = 64 << 10;
/// How long a body may take to arrive.
const BODY_TIME: Duration = Duration::from_secs(10);
/// How long calls in progress may take to end when the server stops.
const STOP_TIME: Duration = Duration::from_secs(2);

/// Why the API cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// Somebody else listens there.
    #[error(
        "the API cannot listen on {address}: the port is in use (by another replicator?); choose another with `api` in the configuration or --api"
    )]
    InUse {
        /// Where it was to listen.
        address: SocketAddr,
    },
    /// Listening is not possible there.
    #[error("the API cannot listen on {address}: {source}")]
    Bind {
        /// Where it was to listen.
        address: SocketAddr,
        /// What the system said.
        source: io::Error,
    },
    /// No thread or no event queue.
    #[error("cannot start the API's thread: {0}")]
    Thread(#[source] io::Error),
}

/// A port taken, not yet served: taking it first tells an operator that it is
/// in use before anything else is started.
pub struct Bound {
    listener: TcpListener,
    address: SocketAddr,
}

/// Takes the port. Port 0 takes a free one.
///
/// # Errors
/// When it is in use, or not ours to take.
pub fn bind(address: SocketAddr) -> Result<Bound, ServeError> {
    let failed = |source: io::Error| match source.kind() {
        io::ErrorKind::AddrInUse => ServeError::InUse { address },
        _ => ServeError::Bind { address, source },
    };
    let listener = TcpListener::bind(address).map_err(failed)?;
    listener.set_nonblocking(true).map_err(failed)?;
    let address = listener.local_addr().map_err(failed)?;
    if !address.ip().is_loopback() {
        tracing::warn!(api = %address, "other hosts may reach the API, which asks for no password");
    }
    Ok(Bound { listener, address })
}

impl Bound {
    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Serves until [`Server::stop`] or drop.
    ///
    /// # Errors
    /// When the system has no thread or event queue to give.
    pub fn serve(self, api: Api) -> Result<Server, ServeError> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .max_blocking_threads(CALLS + WAITS)
            .build()
            .map_err(ServeError::Thread)?;
        let listener = {
            let _context = runtime.enter();
            tokio::net::TcpListener::from_std(self.listener).map_err(ServeError::Thread)?
        };
        let (stop, stopped) = oneshot::channel();
        let thread = std::thread::Builder::new()
            .name("api".to_owned())
            .spawn(move || run(runtime, listener, api, stopped))
            .map_err(ServeError::Thread)?;
        Ok(Server { address: self.address, stop: Some(stop), thread: Some(thread) })
    }
}

/// A running server.
pub struct Server {
    address: SocketAddr,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Stops taking requests, gives those in progress two seconds, and returns.
    pub fn stop(self) {
        drop(self);
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the API's thread panicked");
        }
    }
}

fn run(
    runtime: Runtime,
    listener: tokio::net::TcpListener,
    api: Api,
    stopped: oneshot::Receiver<()>,
) {
    let shared = Arc::new(Shared {
        api,
        calls: Arc::new(Semaphore::new(CALLS)),
        waits: Arc::new(Semaphore::new(WAITS)),
    });
    let router =
        Router::new().route("/metrics", get(metrics::serve)).fallback(handle).with_state(shared);
    let (stopping, mut told) = tokio::sync::watch::channel(());
    let serve = axum::serve(Limited::new(listener, CONNECTIONS), router).with_graceful_shutdown(
        async move {
            // An error means that the sender is gone, which is the signal.
            let _ = stopped.await;
            drop(stopping);
        },
    );
    runtime.block_on(async {
        tokio::select! {
            result = async { serve.await } => {
                if let Err(error) = result {
                    tracing::error!(%error, "the API stopped");
                }
            }
            () = async {
                let _ = told.changed().await;
                tokio::time::sleep(STOP_TIME).await;
            } => {}
        }
    });
    // Waits that go on must not hold up the process.
    runtime.shutdown_background();
}

pub(super) struct Shared {
    pub(super) api: Api,
    pub(super) calls: Arc<Semaphore>,
    waits: Arc<Semaphore>,
}

async fn handle(State(shared): State<Arc<Shared>>, request: Request) -> Response {
    match answer(&shared, request).await {
        Ok(answer) => respond(answer.status, None, answer.body.map(|body| body.to_string())),
        Err(error) => refuse(&error),
    }
}

pub(super) fn refuse(error: &ApiError) -> Response {
    if error.status == 500 {
        tracing::error!(%error, "a request to the API failed");
    }
    respond(error.status, Some(error.class), Some(error.to_json().to_string()))
}

async fn answer(shared: &Arc<Shared>, request: Request) -> Result<Answer, ApiError> {
    let host = request.headers().get(HOST).and_then(|value| value.to_str().ok());
    guard::check(host, request.headers().contains_key(ORIGIN), &shared.api.options.hosts)?;
    let method = request.method().as_str().to_owned();
    let uri = request.uri();
    let target = uri.path_and_query().map_or("/", |target| target.as_str()).to_owned();
    let body = tokio::time::timeout(BODY_TIME, to_bytes(request.into_body(), BODY_MAX))
        .await
        .map_err(|_| ApiError::bad_request("the body took too long to arrive"))?
        .map_err(|_| {
            ApiError::bad_request(format!("the body is larger than {BODY_MAX} bytes or broke off"))
        })?;
    let limit = if Api::is_wait(&method, &target) { &shared.waits } else { &shared.calls };
    let permit = limit.clone().try_acquire_owned().map_err(|_| ApiError::throttled())?;
    let worker = shared.clone();
    let call = move || {
        let _permit = permit;
        worker.api.perform(&method, &target, &body)
    };
    tokio::task::spawn_blocking(call)
        .await
        .unwrap_or_else(|_| Err(ApiError::internal("the request could not be worked on")))
}

fn respond(status: u16, error: Option<&'static str>, body: Option<String>) -> Response {
    let mut response = Response::new(body.map_or_else(Body::empty, Body::from));
    *response.status_mut() =
        StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    let headers = response.headers_mut();
    if status != 204 {
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    }
    if let Some(class) = error {
        headers
            .insert(HeaderName::from_static("x-amzn-errortype"), HeaderValue::from_static(class));
    }
    response
}
