//! The HTTP shell around [`Api::perform`]: one thread of its own, bounded
//! connections, bodies and calls at once. Calls block, so they run on blocking
//! threads; a call whose client has gone runs to its end, but for a wait.

use std::convert::Infallible;
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use axum::body::{Body, to_bytes};
use axum::extract::Request;
use axum::http::header::{CONTENT_TYPE, HeaderValue};
use axum::http::{HeaderName, StatusCode};
use axum::response::Response;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::{GracefulShutdown, Watcher};
use rustls::ServerConfig;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio::runtime::Runtime;
use tokio::sync::{Semaphore, oneshot, watch};
use tokio::time::timeout;
use tokio_rustls::TlsAcceptor;

use super::auth::{local, sigv4};
use super::events::{self, Events};
use super::perform::Pace;
use super::route::Needs;
use super::{Answer, Api, ApiError, console, guard, metrics};
use crate::net::identity::Fingerprint;
use crate::time::Timestamp;

/// Connections held open at once; more wait in the kernel's queue.
const CONNECTIONS: usize = 256;
/// Calls at once, beside waits.
const CALLS: usize = 32;
/// Calls at once that look at operators' file systems, one of which may hang.
const LOOKS: usize = 8;
/// Waits at once; each holds a thread.
const WAITS: usize = 64;
/// The most bytes of a request's body.
const BODY_MAX: usize = 64 << 10;
/// How long a body may take to arrive.
const BODY_TIME: Duration = Duration::from_secs(10);
/// How long a client may take for its part of a TLS handshake.
const HANDSHAKE_TIME: Duration = Duration::from_secs(10);
/// How long a client may take nothing of what is sent to it, milliseconds. Also one
/// that answers at the level of TCP: with its window shut.
const TAKE_TIME: u32 = 30_000;
/// How long a connection may stand without a whole head of a request.
const HEAD_TIME: Duration = Duration::from_secs(60);
/// After an error that is not one client's (no descriptors, say).
const ACCEPT_PAUSE: Duration = Duration::from_secs(1);
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
    Ok(Bound { listener, address })
}

impl Bound {
    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Serves until [`Server::stop`] or drop, over HTTP.
    ///
    /// # Errors
    /// When the system has no thread or event queue to give.
    pub fn serve(self, api: Api) -> Result<Server, ServeError> {
        self.serve_over(api, None)
    }

    /// The same over HTTPS, when there is something for it.
    ///
    /// # Errors
    /// As those of [`Self::serve`].
    pub fn serve_over(
        self,
        api: Api,
        tls: Option<Arc<ServerConfig>>,
    ) -> Result<Server, ServeError> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            // One more for the status that events tell.
            .max_blocking_threads(CALLS + LOOKS + WAITS + 1)
            .build()
            .map_err(ServeError::Thread)?;
        let listener = {
            let _context = runtime.enter();
            tokio::net::TcpListener::from_std(self.listener).map_err(ServeError::Thread)?
        };
        let (stopping, told) = watch::channel(());
        let events = Events::new(api.control.clone());
        runtime.spawn(events.clone().watch(told.clone()));
        let shared = Arc::new(Shared {
            api,
            events,
            stopping: told,
            tls: tls.map(TlsAcceptor::from),
            calls: Arc::new(Semaphore::new(CALLS)),
            looks: Arc::new(Semaphore::new(LOOKS)),
            waits: Arc::new(Semaphore::new(WAITS)),
        });
        let (stop, stopped) = oneshot::channel();
        let thread = std::thread::Builder::new()
            .name("api".to_owned())
            .spawn(move || run(runtime, listener, shared, (stopped, stopping)))
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

struct Shared {
    api: Api,
    events: Arc<Events>,
    /// Ends when the server is told to stop.
    stopping: watch::Receiver<()>,
    tls: Option<TlsAcceptor>,
    calls: Arc<Semaphore>,
    looks: Arc<Semaphore>,
    waits: Arc<Semaphore>,
}

/// Set when it is dropped.
#[derive(Default)]
struct Gone(Arc<AtomicBool>);

impl Drop for Gone {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Who is at the other end of a connection.
#[derive(Clone, Copy, Default)]
struct Caller {
    /// His certificate, if he showed one.
    certificate: Option<Fingerprint>,
    /// Both ends' addresses: his and ours.
    ends: Option<(SocketAddr, SocketAddr)>,
}

fn run(
    runtime: Runtime,
    listener: tokio::net::TcpListener,
    shared: Arc<Shared>,
    (mut stopped, stopping): (oneshot::Receiver<()>, watch::Sender<()>),
) {
    runtime.block_on(async {
        let graceful = GracefulShutdown::new();
        let slots = Arc::new(Semaphore::new(CONNECTIONS));
        loop {
            let accepted = async {
                // The semaphore is never closed; without a permit, nothing is limited.
                (slots.clone().acquire_owned().await.ok(), listener.accept().await)
            };
            let (slot, accepted) = tokio::select! {
                // An error means that the sender is gone, which is the signal.
                _ = &mut stopped => break,
                accepted = accepted => accepted,
            };
            match accepted {
                Ok((stream, _)) => {
                    let (shared, watcher) = (shared.clone(), graceful.watcher());
                    tokio::spawn(async move {
                        connection(&shared, stream, watcher).await;
                        drop(slot);
                    });
                }
                Err(error) => {
                    tracing::warn!(%error, "the API cannot take a connection");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
        // Nobody is to wait for an answer in vain, and events have no end of their own.
        drop((listener, stopping));
        let _ = timeout(STOP_TIME, graceful.shutdown()).await;
    });
    // Waits that go on must not hold up the process.
    runtime.shutdown_background();
}

async fn connection(shared: &Arc<Shared>, stream: TcpStream, watcher: Watcher) {
    // Answers are small; without, some wait for the client's acknowledgement.
    let _ = stream.set_nodelay(true);
    // An option of the socket that every kernel has; without it one who takes nothing
    // holds his connection for longer.
    let _ = rustix::net::sockopt::set_tcp_user_timeout(&stream, TAKE_TIME);
    let ends = stream.peer_addr().ok().zip(stream.local_addr().ok());
    let caller = Caller { certificate: None, ends };
    let Some(tls) = &shared.tls else { return speak(shared, stream, caller, watcher).await };
    match timeout(HANDSHAKE_TIME, tls.accept(stream)).await {
        Ok(Ok(stream)) => {
            let shown = stream.get_ref().1.peer_certificates().and_then(|chain| chain.first());
            let certificate = shown.map(|certificate| Fingerprint::of(certificate));
            speak(shared, stream, Caller { certificate, ..caller }, watcher).await;
        }
        Ok(Err(error)) => tracing::debug!(%error, "no TLS with a client of the API"),
        Err(_) => tracing::debug!("a client of the API ended no TLS handshake"),
    }
}

/// HTTP/1.1, until either side has enough.
async fn speak(
    shared: &Arc<Shared>,
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    caller: Caller,
    watcher: Watcher,
) {
    let service = service_fn(|request: hyper::Request<Incoming>| {
        let shared = shared.clone();
        async move {
            let request = request.map(Body::new);
            Ok::<_, Infallible>(handle(&shared, request, caller).await)
        }
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIME)
        .serve_connection(TokioIo::new(stream), service);
    if let Err(error) = watcher.watch(connection).await {
        tracing::debug!(%error, "a connection to the API broke off");
    }
}

async fn handle(shared: &Arc<Shared>, request: Request, caller: Caller) -> Response {
    let mut response = match dispatch(shared, request, caller).await {
        Ok(response) => response,
        Err(error) => {
            if error.status == 500 {
                tracing::error!(%error, "a request to the API failed");
            }
            respond(error.status, Some(error.class), Some(error.to_json().to_string()))
        }
    };
    console::protect(response.headers_mut());
    response
}

/// A request that came from nobody's web page but ours, by somebody who may: a file
/// of the console, the events, the metrics, or a call.
async fn dispatch(
    shared: &Arc<Shared>,
    request: Request,
    caller: Caller,
) -> Result<Response, ApiError> {
    let options = &shared.api.options;
    let (head, body) = request.into_parts();
    let (method, path) = (head.method.as_str(), head.uri.path());
    let scheme = if shared.tls.is_some() { "https" } else { "http" };
    guard::check(&guard::Caller::new(method, path, &head.headers), scheme, &options.hosts)?;
    let target = head.uri.path_and_query().map_or("/", |target| target.as_str());
    let body = timeout(BODY_TIME, to_bytes(body, BODY_MAX))
        .await
        .map_err(|_| ApiError::bad_request("the body took too long to arrive"))?
        .map_err(|_| {
            ApiError::bad_request(format!("the body is larger than {BODY_MAX} bytes or broke off"))
        })?;
    let signed = sigv4::Request { method, target, headers: &head.headers, body: &body };
    let now = Timestamp::now();
    let certificate = caller.certificate.as_ref();
    let permission = options.credentials.permission(&signed, certificate, now)?;
    if let Some(page) = console::find(method, path) {
        return Ok(page);
    }
    if events::are_asked_for(method, path)? {
        return shared.events.answer(shared.stopping.clone());
    }
    if (method, path) == ("GET", metrics::PATH) {
        let page = on_a_thread(shared, &shared.calls, |api| Ok(api.metrics())).await?;
        return metrics::answer(page);
    }
    let needs = Api::needs(method, target)?;
    let limit = match Api::pace(method, target) {
        Pace::Waits => &shared.waits,
        Pace::Looks => &shared.looks,
        Pace::Answers => &shared.calls,
    };
    let (method, target) = (method.to_owned(), target.to_owned());
    // This is dropped when its client has gone.
    let gone = Gone::default();
    let seen = gone.0.clone();
    let call = move |api: &Api| {
        // Here, because it reads a table of the host's sockets.
        let is_trusted = || caller.ends.is_some_and(|(peer, own)| local::is_trusted(peer, own));
        permission.check(needs, is_trusted)?;
        api.perform_for(&seen, &method, &target, &body)
    };
    let answer: Answer = on_a_thread(shared, limit, call).await?;
    if needs == Needs::Change {
        shared.events.changed();
    }
    Ok(respond(answer.status, None, answer.body.map(|body| body.to_string())))
}

/// What blocks runs on a thread of its own, if one is free.
async fn on_a_thread<T: Send + 'static>(
    shared: &Arc<Shared>,
    limit: &Arc<Semaphore>,
    call: impl FnOnce(&Api) -> Result<T, ApiError> + Send + 'static,
) -> Result<T, ApiError> {
    let permit = limit.clone().try_acquire_owned().map_err(|_| ApiError::throttled())?;
    let worker = shared.clone();
    let call = move || {
        let _permit = permit;
        call(&worker.api)
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
