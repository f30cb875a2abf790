//! Extended attributes of any object by descriptor, symbolic links and device
//! nodes included.

use std::os::fd::BorrowedFd;

use rustix::fs::XattrFlags;
use rustix::io::Errno;

use crate::object::Xattr;
use crate::sys::proc_path;

/// The largest value and list (`XATTR_SIZE_MAX`, `XATTR_LIST_MAX`).
const XATTR_MAX: usize = 64 << 10;

/// xfs shows POSIX ACLs a second time under these names, in a form of its own;
/// setting or removing one would change the ACL.
const XFS_ACL: &[u8] = b"trusted.SGI_ACL_";

/// All extended attributes, sorted by name, of what `fd` refers to (`O_PATH`
/// will do: the call goes through `/proc/self/fd`).
///
/// A file system without xattrs gives an empty list. An attribute that
/// disappears between listing and reading is left out.
pub fn read(fd: BorrowedFd<'_>) -> Result<Vec<Xattr>, Errno> {
    // Most objects have none, and most descriptors are real: one call then,
    // without a path and without memory.
    let mut none = [0u8; 512];
    match rustix::fs::flistxattr(fd, &mut none[..]) {
        Ok(0) | Err(Errno::NOTSUP) => return Ok(Vec::new()),
        _ => {}
    }
    let path = proc_path(fd);
    let mut list = vec![0u8; 512];
    let used = loop {
        match rustix::fs::listxattr(path.as_str(), &mut list[..]) {
            Ok(used) => break used,
            Err(Errno::RANGE) if list.len() < XATTR_MAX => list.resize(XATTR_MAX, 0),
            Err(Errno::NOTSUP) => return Ok(Vec::new()),
            Err(error) => return Err(error),
        }
    };
    let mut xattrs = Vec::new();
    for name in list[..used].split(|b| *b == 0).filter(|name| !name.is_empty()) {
        if name.starts_with(XFS_ACL) {
            continue;
        }
        match get(&path, name) {
            Ok(value) => xattrs.push(Xattr { name: name.to_vec(), value }),
            Err(Errno::NODATA) => {}
            Err(error) => return Err(error),
        }
    }
    xattrs.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(xattrs)
}

fn get(path: &str, name: &[u8]) -> Result<Vec<u8>, Errno> {
    let mut value = vec![0u8; 256];
    loop {
        match rustix::fs::getxattr(path, name, &mut value[..]) {
            Ok(used) => {
                value.truncate(used);
                return Ok(value);
            }
            Err(Errno::RANGE) if value.len() < XATTR_MAX => value.resize(XATTR_MAX, 0),
            Err(error) => return Err(error),
        }
    }
}

/// Sets one attribute, new or not.
pub fn set(fd: BorrowedFd<'_>, xattr: &Xattr) -> Result<(), Errno> {
    crate::fault::at("setxattr", String::from_utf8_lossy(&xattr.name))?;
    rustix::fs::setxattr(proc_path(fd), xattr.name.as_slice(), &xattr.value, XattrFlags::empty())
}

/// Removes one attribute; it is no error when there is none.
pub fn remove(fd: BorrowedFd<'_>, name: &[u8]) -> Result<(), Errno> {
    match rustix::fs::removexattr(proc_path(fd), name) {
        Err(Errno::NODATA) => Ok(()),
        result => result,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::{Mode, OFlags};
    use std::os::fd::AsFd;

    #[test]
    fn reach_symlinks_and_files_through_o_path() {
        let directory = tempfile::tempdir_in("/var/tmp").unwrap();
        std::os::unix::fs::symlink("nowhere", directory.path().join("link")).unwrap();
        std::fs::write(directory.path().join("file"), "x").unwrap();
        for name in ["link", "file"] {
            let fd = rustix::fs::open(
                directory.path().join(name),
                OFlags::PATH | OFlags::NOFOLLOW,
                Mode::empty(),
            )
            .unwrap();
            // Only trusted.* (and security.*) may stand on symbolic links.
            let big = Xattr { name: b"trusted.big".to_vec(), value: vec![7; 1500] };
            let empty = Xattr { name: b"trusted.empty".to_vec(), value: vec![] };
            set(fd.as_fd(), &empty).unwrap();
            set(fd.as_fd(), &big).unwrap();
            assert_eq!(read(fd.as_fd()).unwrap(), [big, empty]);
            remove(fd.as_fd(), b"trusted.big").unwrap();
            remove(fd.as_fd(), b"trusted.big").unwrap();
            assert_eq!(read(fd.as_fd()).unwrap().len(), 1);
        }
    }
}
