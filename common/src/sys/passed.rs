//! Descriptors that the service manager passed at the start, `sd_listen_fds(3)`.

use std::io;
use std::os::fd::{FromRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};

/// Takes what was passed, with its names; the second call gives nothing. Must
/// come before anything else is opened: descriptors that were announced and
/// are not there would be taken for passed ones once others have their numbers.
///
/// # Errors
/// When `LISTEN_PID`, `LISTEN_FDS` or `LISTEN_FDNAMES` are no such thing, or
/// announce what is not there; then nothing is taken.
pub fn take() -> io::Result<Vec<(String, OwnedFd)>> {
    static TAKEN: AtomicBool = AtomicBool::new(false);
    if TAKEN.swap(true, Ordering::AcqRel) {
        return Ok(Vec::new());
    }
    let own = |(number, name)| {
        // SAFETY: the descriptor is open (it was just set to close on exec), was
        // passed to this very process for it to own (`LISTEN_PID`), and is taken
        // once.
        (name, unsafe { OwnedFd::from_raw_fd(number) })
    };
    Ok(sd_notify::listen_fds_with_names()?.map(own).collect())
}
