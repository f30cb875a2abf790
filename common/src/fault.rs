//! Fault points: named places, one a system call, at which a test can have the
//! call fail, or see that it was made.
//!
//! They stand where the calls are made: [`crate::sys::place`] and
//! [`crate::sys::xattr`] (`create`, `mkdir`, `symlink`, `mknod`, `open`,
//! `rename`, `link`, `unlink`, `rmdir`, `chown`, `chmod`, `utimens`, `write`,
//! `copy`, `punch`, `truncate`, `syncfs`, `setxattr`), [`crate::sys::mount`]
//! (`mount`), [`crate::crashsafe`] (`state-create`, `state-write`,
//! `state-fsync`, `state-rename`, `state-remove`, `state-fsync-directory`),
//! the stores (`store-write`, `store-resize`, `store-sync`) and the journal
//! (`journal-append`, `journal-flush`, `journal-fdatasync`).
//!
//! Without the feature `failpoints`, which tests turn on and releases do not,
//! all of this is nothing. With it, a point does what the `fail` crate's
//! configuration of that name says: `fail::cfg("write", "2*off->1*return(ENOSPC)")`
//! has the third write fail.

use std::path::Path;

use rustix::io::Errno;

/// A call named `call` is about to be made on `what`. An error is what the call
/// is to give instead.
#[cfg(not(feature = "failpoints"))]
#[inline(always)]
pub fn at(_call: &'static str, _what: impl std::fmt::Display) -> Result<(), Errno> {
    Ok(())
}

/// The file of the store called `name`, with a fault point at each call that changes it.
#[cfg(not(feature = "failpoints"))]
pub fn store<B: redb::StorageBackend>(file: B, _name: &Path) -> B {
    file
}

/// Up to how many bytes a store is small, which is `usual`; with fault points, what
/// `small-store` returns.
#[cfg(not(feature = "failpoints"))]
#[inline(always)]
pub fn small_store(usual: u64) -> u64 {
    usual
}

#[cfg(feature = "failpoints")]
pub use enabled::{at, calls, small_store, store, watch};

#[cfg(feature = "failpoints")]
mod enabled {
    use std::io;
    use std::sync::{Mutex, MutexGuard, PoisonError};

    use redb::StorageBackend;

    use super::{Errno, Path};

    /// The calls made since [`watch`], while somebody watches.
    static CALLS: Mutex<Option<Vec<String>>> = Mutex::new(None);

    fn seen() -> MutexGuard<'static, Option<Vec<String>>> {
        CALLS.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Remembers calls from now on, those from before no more.
    pub fn watch() {
        *seen() = Some(Vec::new());
    }

    /// The calls since [`watch`], in order, each `call what`.
    pub fn calls() -> Vec<String> {
        seen().clone().unwrap_or_default()
    }

    /// See the module.
    pub fn at(call: &'static str, what: impl std::fmt::Display) -> Result<(), Errno> {
        if let Some(calls) = &mut *seen() {
            calls.push(format!("{call} {what}"));
        }
        fail::fail_point!(call, |error| Err(errno(error.as_deref().unwrap_or("EIO"))));
        Ok(())
    }

    /// See the module's own.
    pub fn small_store(usual: u64) -> u64 {
        fail::fail_point!("small-store", |bytes| {
            bytes.and_then(|bytes| bytes.parse().ok()).unwrap_or(usual)
        });
        usual
    }

    fn errno(name: &str) -> Errno {
        match name {
            "ENOSPC" => Errno::NOSPC,
            "EDQUOT" => Errno::DQUOT,
            "EROFS" => Errno::ROFS,
            "EFBIG" => Errno::FBIG,
            "EACCES" => Errno::ACCESS,
            _ => Errno::IO,
        }
    }

    /// See the module's own.
    pub fn store<B: StorageBackend>(file: B, name: &Path) -> impl StorageBackend + use<B> {
        let name = name.file_name().unwrap_or_default().to_string_lossy().into_owned();
        Points { file, name }
    }

    /// A store's file with a fault point at each call that changes it.
    #[derive(Debug)]
    struct Points<B> {
        file: B,
        name: String,
    }

    impl<B: StorageBackend> StorageBackend for Points<B> {
        fn len(&self) -> io::Result<u64> {
            self.file.len()
        }

        fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
            self.file.read(offset, out)
        }

        fn set_len(&self, len: u64) -> io::Result<()> {
            at("store-resize", &self.name)?;
            self.file.set_len(len)
        }

        fn sync_data(&self) -> io::Result<()> {
            at("store-sync", &self.name)?;
            self.file.sync_data()
        }

        fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
            at("store-write", &self.name)?;
            self.file.write(offset, data)
        }

        fn close(&self) -> io::Result<()> {
            self.file.close()
        }
    }
}
