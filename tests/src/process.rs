//! The programs under test as real processes.
//!
//! A [`Daemon`] is whatever serves the HTTP API: `replicator run`, or one of
//! the two daemons. It dies with the test, also when the test panics, and then
//! its last words are printed.

use std::ffi::OsString;
use std::fs::File;
use std::io::{ErrorKind, Read, Seek, SeekFrom};
use std::net::TcpListener;
use std::os::fd::AsFd;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use replicator_common::status::{Counters, ReplicationStatus, Status};
use rustix::process::{Pid, Signal};
use rustix::thread::LinkNameSpaceType;
use serde_json::Value;

use crate::binary;

/// How long a clean stop may take.
const STOP_LIMIT: Duration = Duration::from_secs(30);
/// How long the API may take to answer after a start.
const START_LIMIT: Duration = Duration::from_secs(30);
/// How long a request other than `wait` may take.
const REQUEST_LIMIT: Duration = Duration::from_secs(30);
/// The unit of times in `/proc`, a second's part (`USER_HZ`, fixed by the ABI).
const TICKS: f64 = 100.0;
/// Between two looks at something that is waited for.
const POLL: Duration = Duration::from_millis(20);

/// A port that nobody listens on now.
pub fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").and_then(|socket| socket.local_addr()).unwrap().port()
}

/// A process that serves the API.
#[derive(Debug)]
pub struct Daemon {
    child: Child,
    endpoint: String,
    /// The network namespace that the API is in, when it is not the test's.
    namespace: Option<PathBuf>,
    log: PathBuf,
    /// Where in the log this process's output begins.
    log_start: u64,
    command: String,
}

impl Daemon {
    /// Starts `command`, whose API is to be at `endpoint`; everything it
    /// prints goes to the file `log`.
    pub fn spawn(mut command: Command, endpoint: &str, log: &Path) -> Self {
        let output = File::options().create(true).append(true).open(log).unwrap();
        let log_start = output.metadata().unwrap().len();
        command.stdin(Stdio::null()).stdout(output.try_clone().unwrap()).stderr(output);
        if std::env::var_os("RUST_LOG").is_none() {
            command.env("RUST_LOG", "info");
        }
        die_with_parent(&mut command);
        let child = command.spawn().unwrap_or_else(|error| panic!("{command:?}: {error}"));
        let command = format!("{command:?}");
        Self {
            child,
            endpoint: endpoint.to_owned(),
            namespace: None,
            log: log.to_owned(),
            log_start,
            command,
        }
    }

    /// The same daemon, whose API is in another network namespace.
    #[must_use]
    pub fn in_namespace(mut self, path: PathBuf) -> Self {
        self.namespace = Some(path);
        self
    }

    /// Where the API is.
    pub fn endpoint(&self) -> &str {
        &self.endpoint
    }

    /// The process.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// How long it has run on a processor so far, all threads together.
    pub fn processor_time(&self) -> Duration {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.id())).unwrap();
        // The program's name, in parentheses, may hold blanks.
        let (_, fields) = stat.rsplit_once(')').unwrap();
        let ticks = fields.split_whitespace().skip(11).take(2).map(|f| f.parse::<u32>().unwrap());
        Duration::from_secs_f64(f64::from(ticks.sum::<u32>()) / TICKS)
    }

    /// Stops it where it is: it hangs, and its host lives.
    pub fn freeze(&self) {
        self.signal(Signal::STOP);
    }

    /// Lets it go on.
    pub fn thaw(&self) {
        self.signal(Signal::CONT);
    }

    /// What it printed since it was started.
    pub fn output(&self) -> String {
        let mut bytes = Vec::new();
        let mut file = File::open(&self.log).unwrap();
        file.seek(SeekFrom::Start(self.log_start)).unwrap();
        file.read_to_end(&mut bytes).unwrap();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// Waits until the API answers.
    pub fn wait_ready(&mut self) {
        self.poll_until(START_LIMIT, "the API answers", |daemon| {
            daemon.request("GET", "/replicator/v1/health", None).ok()
        });
    }

    /// Polls `look` until it gives something; panics after `limit` and as soon
    /// as the process has ended.
    #[track_caller]
    pub fn poll_until<T>(
        &mut self,
        limit: Duration,
        what: &str,
        mut look: impl FnMut(&mut Self) -> Option<T>,
    ) -> T {
        let start = Instant::now();
        loop {
            if let Some(found) = look(self) {
                return found;
            }
            if let Some(status) = self.child.try_wait().unwrap() {
                panic!("{} ended ({status}) before {what}:\n{}", self.command, self.output());
            }
            let waited = start.elapsed();
            assert!(waited < limit, "not within {limit:?}: {what}:\n{}", self.last_words());
            thread::sleep(POLL);
        }
    }

    /// Waits until the one configuration is ENABLED: the initial sync is
    /// through.
    #[track_caller]
    pub fn wait_enabled(&mut self, limit: Duration) {
        self.poll_until(limit, "the status is ENABLED", |daemon| {
            let status = daemon.try_status()?;
            (status.status == ReplicationStatus::Enabled
                && status.destination.is_some_and(|d| d.last_replicated.is_some()))
            .then_some(())
        });
    }

    /// The one configuration's status, if there is one and the API answers.
    pub fn try_status(&self) -> Option<Status> {
        let value = self.request("GET", "/replicator/v1/status", None).ok()?;
        let mut all: Vec<Status> = serde_json::from_value(value.clone())
            .unwrap_or_else(|error| panic!("{error} in {value}"));
        assert!(all.len() <= 1, "one configuration was expected: {all:#?}");
        all.pop()
    }

    /// The one configuration's status.
    #[track_caller]
    pub fn status(&self) -> Status {
        self.try_status().unwrap_or_else(|| panic!("no status:\n{}", self.last_words()))
    }

    /// The source's counters.
    pub fn counters(&self) -> Counters {
        self.status().source.expect("the source has reported").counters
    }

    /// Returns when all that was done on the source is on the replica.
    #[track_caller]
    pub fn wait(&self, limit: Duration) {
        if let Err(error) = self.try_wait(limit) {
            panic!("{error}\n{}", self.last_words());
        }
    }

    /// The same; the error says what the source said of its state instead.
    pub fn try_wait(&self, limit: Duration) -> Result<(), String> {
        let body = serde_json::json!({ "timeout_seconds": limit.as_secs_f64() });
        match self.request("POST", "/replicator/v1/wait", Some(body)) {
            Ok(_) => Ok(()),
            Err(error) => {
                let source = self.try_status().and_then(|status| status.source);
                Err(format!("{error}\n{source:?}"))
            }
        }
    }

    /// One request; the error is the answer's text or what the transport said.
    pub fn request(&self, method: &str, path: &str, body: Option<Value>) -> Result<Value, String> {
        let url = format!("{}{path}", self.endpoint);
        let Some(namespace) = &self.namespace else {
            return request(&url, method, body);
        };
        let namespace = File::open(namespace).unwrap();
        // A thread of its own: entering a namespace cannot be taken back.
        thread::scope(|scope| {
            let inside = scope.spawn(|| {
                let kind = Some(LinkNameSpaceType::Network);
                rustix::thread::move_into_link_name_space(namespace.as_fd(), kind).unwrap();
                request(&url, method, body)
            });
            inside.join().unwrap()
        })
    }

    /// Ctrl-C, and waits for the end.
    pub fn interrupt(mut self) -> ExitStatus {
        self.signal(Signal::INT);
        self.await_end()
    }

    /// SIGTERM, as a service manager stops it, and waits for the end.
    pub fn terminate(mut self) -> ExitStatus {
        self.signal(Signal::TERM);
        self.await_end()
    }

    /// `kill -9`, and waits for the end.
    pub fn kill(mut self) {
        self.signal(Signal::KILL);
        let status = self.await_end();
        assert_eq!(status.signal(), Some(libc::SIGKILL));
    }

    /// How it ended, if it has.
    pub fn ended(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().unwrap()
    }

    /// Waits for the end of a process that ends by itself.
    pub fn join(mut self, limit: Duration) -> ExitStatus {
        self.await_end_within(limit)
    }

    /// Sends a signal, and waits for nothing.
    pub fn signal(&self, signal: Signal) {
        let pid = Pid::from_child(&self.child);
        rustix::process::kill_process(pid, signal).unwrap();
    }

    fn await_end(&mut self) -> ExitStatus {
        self.await_end_within(STOP_LIMIT)
    }

    fn await_end_within(&mut self, limit: Duration) -> ExitStatus {
        let start = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            let waited = start.elapsed();
            assert!(waited < limit, "runs on after {limit:?}:\n{}", self.last_words());
            thread::sleep(POLL);
        }
    }

    fn last_words(&self) -> String {
        let output = self.output();
        let lines: Vec<_> = output.lines().collect();
        let from = lines.len().saturating_sub(60);
        format!("last output of {}:\n{}", self.command, lines[from..].join("\n"))
    }
}

impl Daemon {
    /// Copies the whole log to where `REPLICATOR_KEEP_LOGS` says, if it is set:
    /// with `RUST_LOG=trace` a rare failure explains itself.
    fn keep_log(&self) {
        if let Some(directory) = std::env::var_os("REPLICATOR_KEEP_LOGS") {
            let kept = PathBuf::from(directory).join(format!("log-{}", self.id()));
            if let Err(error) = std::fs::copy(&self.log, &kept) {
                eprintln!("the log could not be kept: {error}");
            }
        }
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if thread::panicking() {
            eprintln!("{}", self.last_words());
            self.keep_log();
        }
        // It may have ended already; then neither does anything.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// One request with a JSON body; an answer without a body is `Null`.
pub fn request(url: &str, method: &str, body: Option<Value>) -> Result<Value, String> {
    let agent: ureq::Agent = ureq::Agent::config_builder()
        .http_status_as_error(false)
        .timeout_global(Some(time_limit(body.as_ref())))
        .build()
        .into();
    let text = body.map_or(String::new(), |body| body.to_string());
    let request = ureq::http::Request::builder()
        .method(method)
        .uri(url)
        .header("content-type", "application/json")
        .body(text)
        .unwrap();
    // A process that is stopped and goes on has its socket calls interrupted
    // (signal(7)); what only asks is asked again.
    let repeatable = method == "GET" || url.ends_with("/wait");
    let interrupted = |error: &ureq::Error| matches!(error, ureq::Error::Io(error) if error.kind() == ErrorKind::Interrupted);
    let mut answer = loop {
        match agent.run(request.clone()) {
            Err(error) if repeatable && interrupted(&error) => {}
            answer => break answer.map_err(|error| format!("{method} {url}: {error}"))?,
        }
    };
    let text = answer.body_mut().read_to_string().map_err(|error| error.to_string())?;
    if !answer.status().is_success() {
        return Err(format!("{method} {url}: {} {text}", answer.status()));
    }
    if text.is_empty() {
        return Ok(Value::Null);
    }
    serde_json::from_str(&text).map_err(|error| format!("{error} in {text}"))
}

fn time_limit(body: Option<&Value>) -> Duration {
    let asked = body.and_then(|body| body["timeout_seconds"].as_f64()).unwrap_or(0.0);
    REQUEST_LIMIT + Duration::from_secs_f64(asked)
}

/// A test run that is killed must not leave daemons behind. (The signal comes
/// when the thread that spawned ends; that is the test's own.)
pub(crate) fn die_with_parent(command: &mut Command) {
    let set = || {
        rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
        Ok(())
    };
    // SAFETY: the closure runs between fork and exec and makes one system call
    // that is async-signal-safe and allocates nothing.
    unsafe { command.pre_exec(set) };
}

/// How a command that ends by itself ended.
#[derive(Debug)]
pub struct Ended {
    /// Exit status; `None` after a signal.
    pub code: Option<i32>,
    /// What it printed for machines.
    pub stdout: String,
    /// What it printed for people.
    pub stderr: String,
}

impl Ended {
    /// Panics unless the command succeeded.
    #[track_caller]
    pub fn success(self) -> Self {
        assert_eq!(self.code, Some(0), "{self:#?}");
        self
    }

    /// Standard output as JSON.
    #[track_caller]
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.stdout).unwrap_or_else(|error| panic!("{error} in {self:#?}"))
    }
}

/// Runs a command that must end by itself within `limit`.
#[track_caller]
pub fn run_to_end(mut command: Command, limit: Duration) -> Ended {
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    die_with_parent(&mut command);
    let child = command.spawn().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    let pid = Pid::from_child(&child);
    // Read while it runs: a full pipe would stop it.
    let (sender, receiver) = std::sync::mpsc::channel();
    let reader = thread::spawn(move || sender.send(child.wait_with_output().unwrap()));
    let output = receiver.recv_timeout(limit).unwrap_or_else(|_| {
        // Not reaped yet (the reader has not returned), so the id is its own.
        let _ = rustix::process::kill_process(pid, Signal::KILL);
        panic!("runs on after {limit:?}: {command:?}")
    });
    let _ = reader.join();
    Ended {
        code: output.status.code(),
        stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
        stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
    }
}

/// Runs `replicator` with these arguments to its end.
pub fn replicator<A: Into<OsString>>(arguments: impl IntoIterator<Item = A>) -> Ended {
    let mut command = Command::new(binary::replicator());
    command.args(arguments.into_iter().map(Into::into));
    run_to_end(command, Duration::from_secs(60))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str) -> Command {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        command
    }

    #[test]
    fn an_ended_command_says_how() {
        let ended = run_to_end(shell("echo out; echo err >&2; exit 3"), STOP_LIMIT);
        let Ended { code, stdout, stderr } = ended;
        assert_eq!((code, stdout.as_str(), stderr.as_str()), (Some(3), "out\n", "err\n"));
    }

    #[test]
    #[should_panic(expected = "runs on after")]
    fn a_command_that_does_not_end_is_reported() {
        run_to_end(shell("exec sleep 600"), Duration::from_millis(100));
    }

    #[test]
    #[should_panic(expected = "because of this")]
    fn a_daemon_that_dies_early_is_reported_with_its_output() {
        let scratch = crate::mounts::Scratch::new("process");
        let endpoint = format!("http://127.0.0.1:{}", free_port());
        let log = scratch.path().join("log");
        Daemon::spawn(shell("echo because of this"), &endpoint, &log).wait_ready();
    }

    #[test]
    fn a_daemon_dies_with_its_owner() {
        let scratch = crate::mounts::Scratch::new("process");
        let daemon = Daemon::spawn(shell("exec sleep 600"), "", &scratch.path().join("log"));
        let process = PathBuf::from(format!("/proc/{}", daemon.id()));
        assert!(process.exists());
        drop(daemon);
        assert!(!process.exists());
    }
}
