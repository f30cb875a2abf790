//! Thin, safe wrappers of system calls, and the only place with `unsafe`.
//!
//! Where rustix has a call, it is used; the rest goes through libc. Nothing
//! here decides anything: every function is one kernel operation (or the
//! shortest sequence that makes sense alone) with its errors passed on.

#[doc(hidden)]
pub mod counting;
pub mod direct;
pub mod fanotify;
pub mod handle;
mod heap;
pub mod mount;
pub mod passed;
pub mod place;
pub mod quiet;
pub mod stat;
pub mod usage;
pub mod xattr;

use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

/// The `/proc/self/fd` path of a descriptor: calls that take only paths reach
/// the very object through it, whatever happens to its names.
pub fn proc_path(fd: BorrowedFd<'_>) -> String {
    format!("/proc/self/fd/{}", fd.as_fd().as_raw_fd())
}

/// What the system call that just failed said.
fn last_errno() -> rustix::io::Errno {
    use rustix::io::Errno;
    Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO)
}
