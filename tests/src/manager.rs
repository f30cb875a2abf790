//! A service manager (systemd) as far as a daemon can tell: a notification
//! socket, a store of descriptors, and a start that passes them on. See
//! `sd_notify(3)` and `sd_listen_fds(3)`.

use std::fs::File;
use std::io::IoSliceMut;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixDatagram;
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags};

use crate::mounts::Scratch;

/// Passed descriptors begin here.
const FIRST: i32 = 3;

/// See the module.
#[derive(Debug)]
pub struct Manager {
    state: Arc<State>,
    directory: Scratch,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug, Default)]
struct State {
    /// What is kept, by name.
    store: Mutex<Vec<(String, OwnedFd)>>,
    /// Every line it was told.
    told: Mutex<Vec<String>>,
    /// Does not let go of anything.
    deaf: AtomicBool,
    stop: AtomicBool,
}

impl Manager {
    /// Listens.
    pub fn new() -> Self {
        let directory = Scratch::new("manager");
        let socket = UnixDatagram::bind(directory.path().join("notify")).unwrap();
        socket.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
        let state = Arc::<State>::default();
        let served = state.clone();
        let thread = std::thread::spawn(move || {
            while !served.stop.load(Ordering::Acquire) {
                served.receive(&socket);
            }
        });
        Self { state, directory, thread: Some(thread) }
    }

    /// From now on what is kept is kept, whatever the daemon says.
    pub fn ignore_removals(&self) {
        self.state.deaf.store(true, Ordering::Release);
    }

    /// The names of what is kept.
    pub fn kept(&self) -> Vec<String> {
        let store = self.state.store.lock().unwrap();
        store.iter().map(|(name, _)| name.clone()).collect()
    }

    /// Every line that was told, `READY=1` and so on.
    pub fn told(&self) -> Vec<String> {
        self.state.told.lock().unwrap().clone()
    }

    /// Puts something into the store.
    pub fn put(&self, name: &str, fd: OwnedFd) {
        self.state.store.lock().unwrap().push((name.to_owned(), fd));
    }

    /// Takes all out of the store.
    pub fn take(&self) -> Vec<(String, OwnedFd)> {
        std::mem::take(&mut self.state.store.lock().unwrap())
    }

    /// The same command, started as a service: it gets what is kept (of which
    /// copies stay here). Each `more` is a variable that is set to something
    /// else than it should be.
    pub fn service(&self, command: &Command, more: &[(&str, &str)]) -> Command {
        let kept: Vec<(String, OwnedFd)> = {
            let store = self.state.store.lock().unwrap();
            store.iter().map(|(name, fd)| (name.clone(), fd.try_clone().unwrap())).collect()
        };
        // The process's number is known only to itself, and execve(2) keeps it.
        let mut service = Command::new("sh");
        service.args(["-c", "LISTEN_PID=$$ exec \"$@\"", "sh"]).arg(command.get_program());
        service.args(command.get_args());
        service.env("NOTIFY_SOCKET", self.directory.path().join("notify"));
        let names: Vec<&str> = kept.iter().map(|(name, _)| name.as_str()).collect();
        service.env("LISTEN_FDS", kept.len().to_string()).env("LISTEN_FDNAMES", names.join(":"));
        service.envs(more.iter().copied());
        let fds: Vec<OwnedFd> = kept.into_iter().map(|(_, fd)| fd).collect();
        let pass = move || {
            // Out of the way first: one may stand where another is to be.
            for (number, fd) in fds.iter().enumerate() {
                let away = rustix::io::fcntl_dupfd_cloexec(fd, 100)?;
                // SAFETY: between fork and exec; whatever had that number in this
                // process is not used any more, and nothing of it is dropped.
                if unsafe { libc::dup2(as_raw(&away), FIRST + number as i32) } < 0 {
                    return Err(std::io::Error::last_os_error());
                }
            }
            Ok(())
        };
        // SAFETY: only dup(2) and its like between fork and exec.
        unsafe { service.pre_exec(pass) };
        service
    }
}

fn as_raw(fd: &OwnedFd) -> i32 {
    std::os::fd::AsRawFd::as_raw_fd(fd)
}

impl Default for Manager {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for Manager {
    fn drop(&mut self) {
        self.state.stop.store(true, Ordering::Release);
        let _ = self.thread.take().map(JoinHandle::join);
    }
}

impl State {
    fn receive(&self, socket: &UnixDatagram) {
        let mut bytes = [0; 4096];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut parts = [IoSliceMut::new(&mut bytes)];
        let flags = RecvFlags::CMSG_CLOEXEC;
        let Ok(message) = rustix::net::recvmsg(socket.as_fd(), &mut parts, &mut control, flags)
        else {
            return;
        };
        let fds: Vec<OwnedFd> = control
            .drain()
            .filter_map(|part| match part {
                RecvAncillaryMessage::ScmRights(fds) => Some(fds),
                _ => None,
            })
            .flatten()
            .collect();
        let text = String::from_utf8_lossy(&bytes[..message.bytes]).into_owned();
        self.obey(&text, fds);
    }

    /// What is not kept is closed, as `BARRIER=1` wants it.
    fn obey(&self, text: &str, fds: Vec<OwnedFd>) {
        let lines: Vec<&str> = text.lines().collect();
        let name = lines.iter().find_map(|line| line.strip_prefix("FDNAME="));
        let name = name.unwrap_or("stored").to_owned();
        let mut store = self.store.lock().unwrap();
        if lines.contains(&"FDSTORE=1") {
            store.extend(fds.into_iter().map(|fd| (name.clone(), fd)));
        } else if lines.contains(&"FDSTOREREMOVE=1") && !self.deaf.load(Ordering::Acquire) {
            store.retain(|(kept, _)| *kept != name);
        }
        drop(store);
        self.told.lock().unwrap().extend(lines.into_iter().map(str::to_owned));
    }
}

/// A descriptor that is no watch.
pub fn some_descriptor() -> OwnedFd {
    File::open("/dev/null").unwrap().into()
}
