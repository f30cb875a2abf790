//! Work that must not be felt by others: of low priority for processor and
//! disk, and without a trace in the page cache.

use std::os::fd::AsFd;
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
    static REFUSED: AtomicBool = AtomicBool::new(false);
    let mut filled = 0;
    while filled < buffer.len() {
        let at = offset + filled as u64;
        let rest = &mut buffer[filled..];
        let result = if REFUSED.load(Ordering::Relaxed) {
            rustix::io::pread(&fd, rest, at)
        } else {
            let flags = ReadWriteFlags::from_bits_retain(DONT_CACHE);
            match rustix::io::preadv2(&fd, &mut [IoSliceMut::new(&mut *rest)], at, flags) {
                // Not this kernel, or not this file system.
                Err(Errno::NOTSUP | Errno::INVAL) => {
                    let result = rustix::io::pread(&fd, rest, at);
                    REFUSED.store(result.is_ok(), Ordering::Relaxed);
                    result
                }
                result => result,
            }
        };
        match result {
            Ok(0) => break,
            Ok(read) => filled += read,
            Err(Errno::INTR) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(filled)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn reads_what_is_there() {
        let mut file = tempfile::tempfile_in("/var/tmp").unwrap();
        file.write_all(&[7; 10_000]).unwrap();
        no_reuse(&file);
        let mut buffer = vec![0; 8192];
        assert_eq!(read_at(&file, &mut buffer, 4000), Ok(6000));
        assert_eq!(&buffer[..6000], &[7; 6000]);
        assert_eq!(read_at(&file, &mut buffer, 10_000), Ok(0));
    }
}
