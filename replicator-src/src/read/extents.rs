//! Where a file's data lies, and what is a hole.

use std::os::fd::BorrowedFd;

use replicator_common::sys::stat::Stat;
use replicator_common::wire::Extent;
use rustix::fs::SeekFrom;
use rustix::io::Errno;

/// The data extents of a file, in order; all else up to its size are holes.
///
/// The kernel is asked only when the file has fewer blocks than bytes: asking
/// costs 0.3 to 2 µs even of a dense file.
pub fn of(fd: BorrowedFd<'_>, stat: &Stat) -> Result<Vec<Extent>, Errno> {
    let size = stat.size;
    if size == 0 {
        return Ok(Vec::new());
    }
    if stat.blocks.saturating_mul(512) >= size {
        return Ok(vec![Extent { offset: 0, length: size }]);
    }
    let mut extents = Vec::new();
    let mut at = 0;
    while at < size {
        let start = match rustix::fs::seek(fd, SeekFrom::Data(at)) {
            Ok(start) => start,
            Err(Errno::NXIO) => break,
            // A file system that cannot tell: all is data.
            Err(Errno::INVAL | Errno::OPNOTSUPP) => {
                return Ok(vec![Extent { offset: 0, length: size }]);
            }
            Err(error) => return Err(error),
        };
        if start >= size {
            break;
        }
        let end = rustix::fs::seek(fd, SeekFrom::Hole(start))?.min(size);
        if end <= start {
            break;
        }
        extents.push(Extent { offset: start, length: end - start });
        at = end;
    }
    Ok(extents)
}
