//! Work that must not be felt by others: of low priority for processor and
//! disk, and without a trace in the page cache.

use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::process::CommandExt;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::Advice;
use rustix::io::{Errno, IoSliceMut, ReadWriteFlags};

/// Niceness of such work.
const NICE: i32 = 10;
/// `RWF_DONTCACHE` (Linux 6.14): what the read itself brought into the page
/// cache goes again, what was there before stays.
const DONT_CACHE: u32 = 0x80;

/// Makes the calling thread one that others do not feel. What the kernel does
/// not grant is left as it is: this is a courtesy.
pub fn background_thread() {
    // To Linux, "this process" is the calling thread.
    let _ = rustix::process::setpriority_process(None, NICE);
}

/// Lets the calling thread, and those that it begins from then on, take no processor from
/// whoever is at work in the moment that they wake (`SCHED_BATCH`): a program's stages wake each
/// other for each few kilobytes, and each time the one that was at work is put off otherwise, and
/// the users' own programs are (bench/NOTES.md). Who runs this program with a policy other than
/// the usual one keeps it; what the kernel does not grant is left as it is.
pub fn wake_gently() {
    if policy() == libc::SCHED_OTHER && set_policy(libc::SCHED_BATCH) {
        GENTLE.store(true, Ordering::Relaxed);
    }
}

/// Lets a program that is about to be started wake as any other, if [`wake_gently`] has changed
/// what it would inherit.
pub fn wake_as_usual(command: &mut std::process::Command) {
    if !GENTLE.load(Ordering::Relaxed) {
        return;
    }
    let restore = || {
        set_policy(libc::SCHED_OTHER);
        Ok(())
    };
    // SAFETY: between fork and exec it makes one system call, and neither allocates nor locks.
    unsafe { command.pre_exec(restore) };
}

/// Whether [`wake_gently`] changed the policy.
static GENTLE: AtomicBool = AtomicBool::new(false);

/// Of the calling thread.
fn policy() -> i32 {
    // SAFETY: 0 is the calling thread, and nothing is passed by address.
    unsafe { libc::sched_getscheduler(0) }
}

/// Whether the kernel granted it.
fn set_policy(policy: i32) -> bool {
    let parameters = libc::sched_param { sched_priority: 0 };
    // SAFETY: reads the parameters, which live until it returns.
    unsafe { libc::sched_setscheduler(0, policy, &parameters) == 0 }
}

/// Says that what is read of a file will not be needed again.
pub fn no_reuse(fd: impl AsFd) {
    let _ = rustix::fs::fadvise(fd, 0, None, Advice::NoReuse);
}

/// Reads at `offset` until the buffer is full or the file ends, leaving the page
/// cache as it was where the kernel can; returns the bytes read.
///
/// # Errors
/// What the system says: `EIO` of a bad disk, for one.
pub fn read_at(fd: impl AsFd, buffer: &mut [u8], offset: u64) -> Result<usize, Errno> {
    let mut filled = 0;
    while filled < buffer.len() {
        let rest = &mut buffer[filled..];
        let read = leaving_no_trace(|flags| {
            let part = &mut [IoSliceMut::new(&mut *rest)];
            rustix::io::preadv2(&fd, part, offset + filled as u64, flags)
        })?;
        if read == 0 {
            break;
        }
        filled += read;
    }
    Ok(filled)
}

/// Reads once at `offset`, behind what is in `bytes`: as much as there is spare capacity
/// for, and no more than `most` bytes. Leaves the page cache as [`read_at`] does, if it is
/// `quietly`; returns the bytes read, 0 at the end of the file.
///
/// # Errors
/// What the system says.
pub fn read_more(
    fd: impl AsFd,
    bytes: &mut Vec<u8>,
    (offset, most): (u64, u64),
    quietly: bool,
) -> Result<usize, Errno> {
    let at = i64::try_from(offset).map_err(|_| Errno::OVERFLOW)?;
    let before = bytes.len();
    let spare = bytes.spare_capacity_mut();
    let room = usize::try_from(most).map_or(spare.len(), |most| most.min(spare.len()));
    let part = libc::iovec { iov_base: spare.as_mut_ptr().cast(), iov_len: room };
    let read = |flags: ReadWriteFlags| {
        let (fd, flags) = (fd.as_fd().as_raw_fd(), flags.bits().cast_signed());
        // SAFETY: the one part is `room` bytes of spare capacity, which nobody else
        // has, and which need not be initialised to be written.
        let read = unsafe { libc::preadv2(fd, &part, 1, at, flags) };
        usize::try_from(read).map_err(|_| super::last_errno())
    };
    let read = if quietly {
        leaving_no_trace(read)?
    } else {
        rustix::io::retry_on_intr(|| read(ReadWriteFlags::empty()))?
    };
    // SAFETY: the kernel has written so many bytes behind the ones that were there, and
    // no more than there was room for.
    unsafe { bytes.set_len(before + read) };
    Ok(read)
}

/// Makes a read that leaves no trace, or a plain one where the kernel or the file system
/// does not know that.
fn leaving_no_trace(
    mut read: impl FnMut(ReadWriteFlags) -> Result<usize, Errno>,
) -> Result<usize, Errno> {
    static REFUSED: AtomicBool = AtomicBool::new(false);
    let mut read = |flags| rustix::io::retry_on_intr(|| read(flags));
    if REFUSED.load(Ordering::Relaxed) {
        return read(ReadWriteFlags::empty());
    }
    match read(ReadWriteFlags::from_bits_retain(DONT_CACHE)) {
        Err(Errno::NOTSUP | Errno::INVAL) => {
            let result = read(ReadWriteFlags::empty());
            REFUSED.store(result.is_ok(), Ordering::Relaxed);
            result
        }
        result => result,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    /// Threads inherit the policy; one that somebody chose stays.
    #[test]
    fn waking_gently_is_inherited_and_takes_no_choice_away() {
        let gently = move || {
            assert!(set_policy(libc::SCHED_OTHER));
            wake_gently();
            let mut command = std::process::Command::new("chrt");
            wake_as_usual(&mut command);
            let told = command.args(["-p", "0"]).output().unwrap().stdout;
            (std::thread::spawn(policy).join().unwrap(), String::from_utf8(told).unwrap())
        };
        let (inherited, told) = std::thread::spawn(gently).join().unwrap();
        assert_eq!(inherited, libc::SCHED_BATCH);
        assert!(told.contains("SCHED_OTHER"), "what is started has {told}");
        let idle = move || {
            assert!(set_policy(libc::SCHED_IDLE));
            wake_gently();
            policy()
        };
        assert_eq!(std::thread::spawn(idle).join().unwrap(), libc::SCHED_IDLE);
    }

    #[test]
    fn reads_what_is_there() {
        let mut file = tempfile::tempfile_in("/var/tmp").unwrap();
        file.write_all(&[7; 10_000]).unwrap();
        no_reuse(&file);
        let mut buffer = vec![0; 8192];
        assert_eq!(read_at(&file, &mut buffer, 4000), Ok(6000));
        assert_eq!(&buffer[..6000], &[7; 6000]);
        assert_eq!(read_at(&file, &mut buffer, 10_000), Ok(0));
        let mut bytes = Vec::with_capacity(6000);
        bytes.extend([1, 2]);
        let room = bytes.capacity() - 2;
        assert_eq!(read_more(&file, &mut bytes, (4000, 3000), true), Ok(3000));
        assert_eq!(read_more(&file, &mut bytes, (4000, u64::MAX), false), Ok(room - 3000));
        assert_eq!((bytes[..2].to_vec(), bytes.len()), (vec![1, 2], room + 2));
        assert_eq!(&bytes[2..], &vec![7; room]);
        assert_eq!(read_more(&file, &mut bytes, (4000, u64::MAX), false), Ok(0));
        assert_eq!(read_more(&file, &mut Vec::with_capacity(10), (10_000, 5), true), Ok(0));
    }
}
