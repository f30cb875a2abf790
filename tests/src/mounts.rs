//! Throw-away file systems: ext4, xfs and btrfs on loop devices, and tmpfs.
//!
//! Each lives in a [`Scratch`] directory that is held by a lock for as long as
//! its owner lives. Dropping unmounts whatever stands in it, also what the
//! program under test mounted there and left behind; what a killed test run
//! left is recognised by the free lock and removed by the next run.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Once;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::FlockOperation;
use rustix::io::Errno;
use rustix::mount::UnmountFlags;

/// The kinds of file system that tests run on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FileSystem {
    /// With a journal, as `mkfs.ext4` makes it.
    Ext4,
    /// As `mkfs.xfs` makes it.
    Xfs,
    /// As `mkfs.btrfs` makes it.
    Btrfs,
    /// In memory.
    Tmpfs,
}

impl FileSystem {
    /// As `mount -t` spells it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Ext4 => "ext4",
            Self::Xfs => "xfs",
            Self::Btrfs => "btrfs",
            Self::Tmpfs => "tmpfs",
        }
    }
}

/// Size of a file system unless a test asks for another; the image is sparse.
pub const DEFAULT_SIZE: u64 = 2 << 30;
/// How long an unmount is tried again while something still uses the mount.
const BUSY_LIMIT: Duration = Duration::from_secs(10);

/// Panics unless the process may mount.
pub fn require_root() {
    assert!(
        rustix::process::geteuid().is_root(),
        "this test mounts file systems and needs root (CAP_SYS_ADMIN); \
         run the whole suite as root, for instance `sudo -E cargo test --workspace`"
    );
}

/// A directory of one test's own, removed when dropped.
#[derive(Debug)]
pub struct Scratch {
    path: PathBuf,
    /// Held open for its lock, which says that the directory is in use.
    _lock: File,
}

impl Scratch {
    /// Makes one below `$REPLICATOR_TEST_DIR`, or `/var/tmp/replicator-tests`
    /// (`/tmp` is often a small tmpfs, too small for images).
    pub fn new(label: &str) -> Self {
        static SWEEP: Once = Once::new();
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let base = base();
        fs::create_dir_all(&base).unwrap();
        SWEEP.call_once(|| sweep(&base));
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let name = format!("{label}-{}-{number}", std::process::id());
        // Locked before it has its final name: the sweep of another process
        // must never see it without the lock.
        let hidden = base.join(format!(".new-{name}"));
        let path = base.join(name);
        fs::create_dir(&hidden).unwrap();
        let lock = File::create(hidden.join("lock")).unwrap();
        rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive).unwrap();
        fs::rename(&hidden, &path).unwrap();
        Self { path, _lock: lock }
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if let Err(error) = remove(&self.path) {
            eprintln!("{} could not be removed: {error}", self.path.display());
        }
    }
}

fn base() -> PathBuf {
    std::env::var_os("REPLICATOR_TEST_DIR")
        .map_or_else(|| PathBuf::from("/var/tmp/replicator-tests"), PathBuf::from)
}

/// Removes what runs that were killed left behind.
fn sweep(base: &Path) {
    for entry in fs::read_dir(base).into_iter().flatten().flatten() {
        if entry.file_name().as_encoded_bytes().starts_with(b".new-") {
            continue;
        }
        let Ok(lock) = File::open(entry.path().join("lock")) else {
            continue;
        };
        if rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive).is_ok() {
            eprintln!("removing {}, left by a run that was killed", entry.path().display());
            if let Err(error) = remove(&entry.path()) {
                eprintln!("it could not be removed: {error}");
            }
        }
    }
}

/// Unmounts all below, then removes all.
fn remove(path: &Path) -> io::Result<()> {
    unmount_below(path)?;
    // Trees deeper than PATH_MAX are left only on file systems of their own.
    fs::remove_dir_all(path)
}

/// Unmounts everything that is mounted at or below `path`, newest first.
pub fn unmount_below(path: &Path) -> io::Result<()> {
    for point in mount_points_below(path)?.iter().rev() {
        unmount(point)?;
    }
    Ok(())
}

/// Mount points at or below `path`, oldest first; one that is mounted over
/// stands as often as it is mounted.
pub fn mount_points_below(path: &Path) -> io::Result<Vec<PathBuf>> {
    let table = fs::read_to_string("/proc/self/mountinfo")?;
    let points = table.lines().filter_map(|line| line.split(' ').nth(4));
    // Spaces and the like are escaped as \040; scratch directories have none.
    Ok(points.map(PathBuf::from).filter(|point| point.starts_with(path)).collect())
}

fn unmount(point: &Path) -> io::Result<()> {
    let start = Instant::now();
    loop {
        match rustix::mount::unmount(point, UnmountFlags::NOFOLLOW) {
            Ok(()) => return Ok(()),
            // Gone already: it was below a mount that propagated its unmount.
            Err(Errno::INVAL | Errno::NOENT) => return Ok(()),
            Err(Errno::BUSY) if start.elapsed() < BUSY_LIMIT => {
                thread::sleep(Duration::from_millis(50));
            }
            Err(Errno::BUSY) => {
                eprintln!("{} is still in use; it is detached", point.display());
                rustix::mount::unmount(point, UnmountFlags::DETACH)?;
                return Ok(());
            }
            Err(error) => return Err(error.into()),
        }
    }
}

/// A mounted file system, unmounted and removed when dropped.
#[derive(Debug)]
pub struct Mount {
    kind: FileSystem,
    path: PathBuf,
    scratch: Scratch,
}

impl Mount {
    /// A new file system of [`DEFAULT_SIZE`].
    pub fn new(kind: FileSystem) -> Self {
        Self::with_size(kind, DEFAULT_SIZE)
    }

    /// A new file system of `bytes`; xfs wants 300 MiB at least.
    pub fn with_size(kind: FileSystem, bytes: u64) -> Self {
        let mount = Self::prepare(kind);
        if kind == FileSystem::Tmpfs {
            let size = format!("size={bytes}");
            run(Command::new("mount").args(["-t", "tmpfs", "-o", &size, "tmpfs"]).arg(&mount.path));
        } else {
            mount.make(bytes, &[]);
        }
        mount
    }

    /// An ext4 of less than 128 MiB of which the first `bytes` that its own
    /// structures leave are free, and the rest is taken until [`Self::free_end`].
    pub fn with_end_taken(bytes: u64, free: u64) -> Self {
        let mount = Self::prepare(FileSystem::Ext4);
        let now = "lazy_itable_init=0,lazy_journal_init=0";
        mount.make(bytes, &["-b", "4096", "-m", "0", "-E", now]);
        // All of it, with what ext4 keeps for itself, in one piece from the first
        // free block to the last; then the first of it is given back.
        let device = mount.device();
        let name = device.file_name().unwrap().to_str().unwrap();
        fs::write(format!("/sys/fs/ext4/{name}/reserved_clusters"), "0").unwrap();
        let left = rustix::fs::statvfs(&mount.path).unwrap();
        let all = (left.f_bavail * left.f_frsize).to_string();
        let end = mount.path.join("end");
        run(Command::new("fallocate").args(["-l", &all]).arg(&end));
        run(Command::new("fallocate").args(["-p", "-l", &free.to_string()]).arg(&end));
        rustix::fs::sync();
        mount
    }

    /// Frees the end of [`Self::with_end_taken`].
    pub fn free_end(&self) {
        fs::remove_file(self.path.join("end")).unwrap();
        rustix::fs::sync();
    }

    /// The disk loses its free end: reading and writing there fail with EIO. False
    /// where less than 8 MiB of it are free. Nothing is synced for it: content that has no block
    /// yet will find none.
    pub fn cut(&self) -> bool {
        // The device and not the image: what the kernel has in its cache counts.
        let told = run(Command::new("dumpe2fs").arg(self.device()));
        let after = |prefix| told.lines().filter_map(move |l| l.trim().strip_prefix(prefix));
        let count: u64 = after("Block count:").next().unwrap().trim().parse().unwrap();
        let last = after("Free blocks: ").next_back().and_then(|r| r.rsplit(", ").next()).unwrap();
        let (first, end) = last.split_once('-').unwrap_or((last, last));
        let first: u64 = first.parse().unwrap();
        if end.parse() != Ok(count - 1) || count - first < 2048 {
            return false;
        }
        self.resize(first * 4096);
        true
    }

    /// The disk is as long as `bytes` again.
    pub fn mend(&self, bytes: u64) {
        self.resize(bytes);
    }

    fn resize(&self, bytes: u64) {
        File::options().write(true).open(self.image()).unwrap().set_len(bytes).unwrap();
        run(Command::new("losetup").arg("-c").arg(self.device()));
    }

    /// Whether a loop device still stands on the image: it goes when the last mount
    /// has gone, in whatever namespace.
    pub fn is_attached(&self) -> bool {
        !run(Command::new("losetup").arg("-j").arg(self.image())).trim().is_empty()
    }

    /// The loop device that it is mounted from.
    pub fn device(&self) -> PathBuf {
        let listed = run(Command::new("losetup").arg("-j").arg(self.image()));
        PathBuf::from(listed.split(':').next().unwrap())
    }

    fn prepare(kind: FileSystem) -> Self {
        require_root();
        let scratch = Scratch::new(kind.as_str());
        let path = scratch.path().join("mnt");
        fs::create_dir(&path).unwrap();
        Self { kind, path, scratch }
    }

    fn make(&self, bytes: u64, options: &[&str]) {
        File::create(self.image()).and_then(|file| file.set_len(bytes)).unwrap();
        let mkfs = format!("mkfs.{}", self.kind.as_str());
        run(Command::new(mkfs).arg("-q").args(options).arg(self.image()));
        self.attach();
    }

    /// The file system's root.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What it is.
    pub fn kind(&self) -> FileSystem {
        self.kind
    }

    /// Unmounts, with all that is mounted on it and below it, as an operator
    /// does before maintenance. The image stays.
    pub fn detach(&self) {
        unmount_below(&self.path).unwrap();
    }

    /// Mounts the image again after [`Self::detach`].
    pub fn attach(&self) {
        assert_ne!(self.kind, FileSystem::Tmpfs, "a tmpfs keeps nothing");
        // -o loop sets autoclear: the loop device goes with the last mount.
        // Other tests take loop devices at the same time, which can make the
        // choice of a free one fail.
        let mount = || {
            let mut command = Command::new("mount");
            command.args(["-o", "loop", "-t", self.kind.as_str()]);
            command.arg(self.image()).arg(&self.path);
            command
        };
        for _ in 0..20 {
            if mount().output().is_ok_and(|output| output.status.success()) {
                return;
            }
            thread::sleep(Duration::from_millis(100));
        }
        run(&mut mount());
    }

    /// The file that it is mounted from.
    pub fn image(&self) -> PathBuf {
        self.scratch.path().join("image")
    }
}

/// Runs a command to its end; panics with its output when it fails.
pub fn run(command: &mut Command) -> String {
    let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    let (out, err) =
        (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{command:?}: {}\n{out}{err}", output.status);
    out.into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_kind_mounts_and_leaves_nothing() {
        for kind in [FileSystem::Ext4, FileSystem::Xfs, FileSystem::Btrfs, FileSystem::Tmpfs] {
            let mount = Mount::with_size(kind, 512 << 20);
            let path = mount.path().to_owned();
            fs::write(path.join("file"), "x").unwrap();
            // As the program under test does: a second mount over the first.
            run(Command::new("mount").arg("--bind").arg(&path).arg(&path));
            assert_eq!(mount_points_below(&path).unwrap().len(), 2);
            drop(mount);
            assert_eq!(mount_points_below(&path).unwrap(), Vec::<PathBuf>::new());
            assert!(!path.exists());
        }
    }

    #[test]
    fn a_panic_leaves_nothing() {
        let path = std::sync::Mutex::new(PathBuf::new());
        let result = std::panic::catch_unwind(|| {
            let mount = Mount::new(FileSystem::Tmpfs);
            *path.lock().unwrap() = mount.path().to_owned();
            panic!("as a failing test does");
        });
        assert!(result.is_err());
        let path = path.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).clone();
        assert!(!path.exists() && path.is_absolute());
    }

    #[test]
    fn what_a_killed_run_left_is_swept_and_what_is_in_use_is_not() {
        require_root();
        let own = Scratch::new("sweep");
        let (left, used) = (own.path().join("left"), own.path().join("used"));
        for directory in [&left, &used] {
            fs::create_dir_all(directory.join("mnt")).unwrap();
            run(Command::new("mount").args(["-t", "tmpfs", "tmpfs"]).arg(directory.join("mnt")));
        }
        File::create(left.join("lock")).unwrap();
        let lock = File::create(used.join("lock")).unwrap();
        rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive).unwrap();
        sweep(own.path());
        assert!(!left.exists());
        assert_eq!(mount_points_below(&used).unwrap().len(), 1);
    }

    #[test]
    fn content_survives_detach_and_attach() {
        let mount = Mount::with_size(FileSystem::Ext4, 64 << 20);
        fs::write(mount.path().join("file"), "x").unwrap();
        mount.detach();
        assert!(!mount.path().join("file").exists());
        mount.attach();
        assert_eq!(fs::read(mount.path().join("file")).unwrap(), b"x");
    }
}
