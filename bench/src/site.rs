//! Where one run takes place: two trees, the network between their ends, and the
//! control group that all that is started there belongs to.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use replicator_tests::mounts::Scratch;
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::process::{Pid, PidfdFlags, Signal};
use rustix::thread::LinkNameSpaceType;

use crate::group::Group;
use crate::net::{Namespace, Net};

/// How long a program may take to end after it was asked to.
const STOP_LIMIT: Duration = Duration::from_secs(20);

/// What the namespaces and groups of all benches begin with; then follows the
/// number of the process.
pub const PREFIX: &str = "replicator-bench-";

/// Removes the namespaces and groups of benches that were killed. (Their file
/// systems go when the next one is made.)
pub fn sweep() {
    // Groups first: what still runs in one holds its file systems.
    for directory in [crate::group::base().as_path(), Path::new("/run/netns")] {
        for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
            let name = entry.file_name();
            let Some(rest) = name.to_str().and_then(|name| name.strip_prefix(PREFIX)) else {
                continue;
            };
            let process = rest.split('-').next().unwrap_or_default();
            if Path::new("/proc").join(process).exists() {
                continue;
            }
            eprintln!("removing {}, left by a bench that was killed", entry.path().display());
            if !directory.ends_with("netns") {
                drop(Group::left(entry.path()));
            } else if let Err(error) = ask(Command::new("ip").args(["netns", "delete"]).arg(&name))
            {
                eprintln!("it could not be removed: {error:#}");
            }
        }
    }
}

/// One of the two ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// Where the source is.
    Source,
    /// Where the replica is.
    Destination,
}

/// The place of one run.
#[derive(Debug)]
pub struct Site {
    /// The tree that is replicated.
    pub source: PathBuf,
    /// What becomes its replica: an empty directory.
    pub replica: PathBuf,
    /// What is between the ends.
    pub net: Net,
    /// What runs here.
    pub group: Group,
    scratch: Scratch,
}

impl Site {
    /// A place with nothing in it but the two trees.
    pub fn new(source: &Path, replica: &Path, net: Net) -> Result<Arc<Self>> {
        let (source, replica) = (source.to_owned(), replica.to_owned());
        let (group, scratch) = (Group::new()?, Scratch::new("bench"));
        Ok(Arc::new(Self { source, replica, net, group, scratch }))
    }

    /// A file or directory for the peer's own use, on neither of the two file systems.
    pub fn scratch(&self, name: &str) -> PathBuf {
        self.scratch.path().join(name)
    }

    /// Writes such a file; gives where it is.
    pub fn write(&self, name: &str, text: &str) -> Result<PathBuf> {
        let path = self.scratch(name);
        fs::write(&path, text).with_context(|| path.display().to_string())?;
        Ok(path)
    }

    /// The network namespace of an end.
    pub fn namespace(&self, end: End) -> &Namespace {
        match end {
            End::Source => &self.net.source,
            End::Destination => &self.net.destination,
        }
    }

    /// A program at one end, which ends when the bench ends.
    pub fn command(&self, end: End, program: impl AsRef<OsStr>) -> Result<Command> {
        let (namespace, group) = (self.namespace(end).entrance()?, self.group.entrance()?);
        let enter = move || {
            let kind = Some(LinkNameSpaceType::Network);
            rustix::thread::move_into_link_name_space(namespace.as_fd(), kind)?;
            rustix::io::write(&group, b"0")?;
            rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
            Ok(())
        };
        let mut command = Command::new(program);
        command.stdin(Stdio::null());
        // SAFETY: the closure runs between fork and exec and makes three system
        // calls on what was opened before, allocating nothing.
        unsafe { command.pre_exec(enter) };
        Ok(command)
    }

    /// Starts a program that runs until it is stopped.
    pub fn spawn(&self, mut command: Command) -> Result<Service> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let log = self.scratch(&format!("log-{}", NEXT.fetch_add(1, Ordering::Relaxed)));
        let output = File::create(&log).with_context(|| log.display().to_string())?;
        command.stdout(output.try_clone()?).stderr(output);
        let program = command.get_program().to_string_lossy().into_owned();
        let child = command.spawn().with_context(|| format!("{program} cannot be started"))?;
        Ok(Service { child, program, log })
    }

    /// Runs a program to its end, which must come within `limit` and with one of
    /// these exit statuses.
    pub fn run(&self, command: Command, accepted: &[i32], limit: Duration) -> Result<()> {
        let mut service = self.spawn(command)?;
        ensure!(service.wait(limit)?, "{}: not done after {limit:?}", service.program);
        let status = service.child.wait()?;
        let fine = status.code().is_some_and(|code| accepted.contains(&code));
        ensure!(fine, "{} failed ({status}):\n{}", service.program, service.last_words());
        Ok(())
    }
}

/// Runs a program that tells something, and gives its standard output. For what
/// prepares a run: it is neither measured nor limited.
pub fn ask(command: &mut Command) -> Result<String> {
    let program = command.get_program().to_string_lossy().into_owned();
    let output = command.output().with_context(|| format!("{program} cannot be started"))?;
    let told = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{program} ({}): {}", output.status, told.trim());
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

/// A program that runs; killed when dropped.
#[derive(Debug)]
pub struct Service {
    child: Child,
    program: String,
    log: PathBuf,
}

impl Service {
    /// Waits for its end for so long; says whether it has ended.
    fn wait(&mut self, limit: Duration) -> Result<bool> {
        let process =
            rustix::process::pidfd_open(Pid::from_child(&self.child), PidfdFlags::empty())?;
        let limit =
            Timespec { tv_sec: limit.as_secs() as i64, tv_nsec: limit.subsec_nanos().into() };
        let mut poll = [PollFd::new(&process, PollFlags::IN)];
        Ok(rustix::event::poll(&mut poll, Some(&limit))? > 0)
    }

    /// Waits until `look` is true, looking every so often; an error when the
    /// program ends before, or when it takes longer than `limit`.
    pub fn until(
        &mut self,
        what: &str,
        (pause, limit): (Duration, Duration),
        mut look: impl FnMut(&Self) -> Result<bool>,
    ) -> Result<()> {
        let start = Instant::now();
        while !look(self)? {
            if let Some(status) = self.child.try_wait()? {
                bail!("{} ended ({status}) before {what}:\n{}", self.program, self.last_words());
            }
            if start.elapsed() > limit {
                bail!("{}: not within {limit:?}: {what}\n{}", self.program, self.last_words());
            }
            thread::sleep(pause);
        }
        Ok(())
    }

    /// What it has printed so far.
    pub fn output(&self) -> String {
        String::from_utf8_lossy(&fs::read(&self.log).unwrap_or_default()).into_owned()
    }

    /// Asks it to end, and waits for that.
    pub fn stop(mut self) -> Result<()> {
        if self.child.try_wait()?.is_some() {
            return Ok(());
        }
        // It may have ended since: then it is not reaped, and the number still its own.
        let _ = rustix::process::kill_process(Pid::from_child(&self.child), Signal::INT);
        ensure!(self.wait(STOP_LIMIT)?, "{} runs on after SIGINT", self.program);
        Ok(())
    }

    fn last_words(&self) -> String {
        let output = self.output();
        let lines: Vec<_> = output.lines().collect();
        lines[lines.len().saturating_sub(20)..].join("\n")
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
