//! A disk whose power can be cut: a file system in an image, of which a copy
//! at one instant is what a power cut at that instant would leave.
//!
//! What the kernel has not written back yet is in its cache of the mounted file
//! system, and not in the image. The image stands on an xfs, which copies it by
//! reference under its lock: so the copy holds all writes up to one moment and
//! none after. A disk with a cache of its own, [`Disk::with_cache`], loses more:
//! any part of what was written and not flushed, see [`crate::lossy_disk`].

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use rand::SeedableRng;
use rand::rngs::StdRng;

use crate::lossy_disk::LossyDisk;
use crate::mounts::{FileSystem, Mount, Scratch, run, unmount_below};

/// Enough for what mkfs.xfs asks for.
const SIZE: u64 = 320 << 20;
/// How long a mount may stay after it was unmounted where we see it: mount namespaces of
/// other tests (a system that boots, say) may have copies until they end.
const RELEASE_LIMIT: Duration = Duration::from_secs(240);

/// The disk, mounted.
#[derive(Debug)]
pub struct Disk {
    // Dropped in this order, see `Drop`: what is mounted from the image, the
    // cache, the xfs that the image stands on.
    scratch: Scratch,
    kind: FileSystem,
    /// What the kernel writes to instead of the image, where there is one.
    cache: Option<Cache>,
    outer: Mount,
}

/// The image as a disk that loses what was not flushed.
#[derive(Debug)]
struct Cache {
    disk: LossyDisk,
    /// What decides what is lost.
    random: Mutex<StdRng>,
}

impl Disk {
    /// With a new file system, on a disk that has written what it was told to.
    pub fn new(kind: FileSystem) -> Self {
        let disk = Self::made(kind);
        disk.attach();
        disk
    }

    /// With a new file system, on a disk that has written what it was told to
    /// flush, and of the rest what `seed` decides.
    pub fn with_cache(kind: FileSystem, seed: u64) -> Self {
        let mut disk = Self::made(kind);
        let directory = disk.scratch.path().join("cache");
        fs::create_dir(&directory).unwrap();
        let platter = File::options().read(true).write(true).open(disk.image()).unwrap();
        let random = Mutex::new(StdRng::seed_from_u64(seed));
        disk.cache = Some(Cache { disk: LossyDisk::new(platter, &directory), random });
        disk.attach();
        disk
    }

    fn made(kind: FileSystem) -> Self {
        let outer = Mount::new(FileSystem::Xfs);
        let scratch = Scratch::new("disk");
        let disk = Self { scratch, kind, cache: None, outer };
        fs::create_dir(disk.path()).unwrap();
        let image = disk.image();
        File::create(&image).and_then(|file| file.set_len(SIZE)).unwrap();
        run(Command::new(format!("mkfs.{}", kind.as_str())).arg("-q").arg(&image));
        disk
    }

    /// Where it is mounted.
    pub fn path(&self) -> PathBuf {
        self.scratch.path().join("mnt")
    }

    fn image(&self) -> PathBuf {
        self.outer.path().join("image")
    }

    /// The file that the loop device stands on.
    fn file(&self) -> PathBuf {
        self.cache.as_ref().map_or_else(|| self.image(), |cache| cache.disk.file())
    }

    fn attach(&self) {
        let mount = || {
            let mut command = Command::new("mount");
            command.args(["-o", "loop", "-t", self.kind.as_str()]);
            command.arg(self.file()).arg(self.path());
            command
        };
        // The mount before may take a moment to go, if a process that was killed
        // had it in use; xfs does not mount twice what has one UUID.
        for _ in 0..100 {
            if mount().output().is_ok_and(|output| output.status.success()) {
                return;
            }
            thread::sleep(Duration::from_millis(100));
        }
        run(&mut mount());
    }

    /// What a power cut would leave now, kept for [`Self::cut_back_to`].
    pub fn image_of_now(&self, number: usize) -> PathBuf {
        let copy = self.outer.path().join(format!("image-{number}"));
        let make = || copy_by_reference(&self.image(), &copy);
        let Some(cache) = &self.cache else {
            make();
            return copy;
        };
        let mut random = cache.random.lock().unwrap_or_else(PoisonError::into_inner);
        cache.disk.cut(&mut random, || {
            make();
            File::options().write(true).open(&copy).unwrap()
        });
        copy
    }

    /// Unmounts, and mounts what `image` holds at the same place instead: the
    /// machine is back after its power was cut. Nothing may run on it.
    pub fn cut_back_to(&self, image: &Path) {
        unmount_below(&self.path()).unwrap();
        self.wait_unused();
        let put = || copy_by_reference(image, &self.image());
        match &self.cache {
            Some(cache) => cache.disk.replace(put),
            None => put(),
        }
        self.attach();
    }

    /// Waits until nothing has the image mounted: a mount namespace of a process
    /// that was killed ends a moment after it.
    fn wait_unused(&self) {
        let start = Instant::now();
        while loop_devices_of(&self.file()) > 0 {
            assert!(start.elapsed() < RELEASE_LIMIT, "the image is still mounted somewhere");
            thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        // Before the cache goes, not with the scratch directory, which also has
        // what the cache is mounted at.
        if let Err(error) = unmount_below(&self.path()) {
            eprintln!("{} could not be unmounted: {error}", self.path().display());
        }
        if self.cache.is_some() && !thread::panicking() {
            self.wait_unused();
        }
        self.cache = None;
    }
}

/// How many loop devices stand for a file.
fn loop_devices_of(image: &Path) -> usize {
    let backing = |entry: io::Result<fs::DirEntry>| {
        fs::read_to_string(entry.ok()?.path().join("loop/backing_file")).ok()
    };
    let files = fs::read_dir("/sys/block").unwrap().filter_map(backing);
    files.filter(|file| Path::new(file.trim_end()) == image).count()
}

fn copy_by_reference(from: &Path, to: &Path) {
    run(Command::new("cp").arg("--reflink=always").arg(from).arg(to));
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    /// What was synced is in the image, what was not is not: else a test with it
    /// could not find a sync that is missing.
    fn both(kind: FileSystem) -> [Disk; 2] {
        [Disk::new(kind), Disk::with_cache(kind, 1)]
    }

    #[test]
    fn an_image_holds_what_was_synced_and_only_that() {
        for disk in [FileSystem::Ext4, FileSystem::Xfs].into_iter().flat_map(both) {
            let kind = disk.kind;
            let write = |name: &str| {
                let mut file = File::create(disk.path().join(name)).unwrap();
                file.write_all(&[7; 100_000]).unwrap();
                file
            };
            write("synced").sync_all().unwrap();
            drop(write("not-synced"));
            let image = disk.image_of_now(0);
            drop(write("later"));
            disk.cut_back_to(&image);
            let read = |name: &str| fs::read(disk.path().join(name)).ok();
            assert_eq!(read("synced"), Some(vec![7; 100_000]), "{kind:?}");
            assert_ne!(read("not-synced"), Some(vec![7; 100_000]), "{kind:?}");
            assert_eq!(read("later"), None, "{kind:?}");
        }
    }

    /// What the kernel wrote and did not flush is in every image of a disk without
    /// a cache, and not in every image of one with.
    #[test]
    fn a_disk_with_a_cache_loses_what_was_written_and_not_flushed() {
        for kind in [FileSystem::Ext4, FileSystem::Xfs] {
            let kept = both(kind).map(|disk| {
                let path = disk.path().join("file");
                fs::write(&path, [7; 25 * 4096]).unwrap();
                File::open(&path).and_then(|file| file.sync_all()).unwrap();
                // In place and past the kernel's cache: written, and no block is
                // allotted, so nothing of the file system's own is to be flushed.
                let mut write = Command::new("dd");
                write.args(["if=/dev/zero", "bs=4096", "count=25"]);
                write.args(["oflag=direct", "conv=notrunc"]).arg(format!("of={}", path.display()));
                run(&mut write);
                let images: Vec<_> = (0..8).map(|number| disk.image_of_now(number)).collect();
                let kept = images.iter().filter(|image| {
                    disk.cut_back_to(image);
                    fs::read(&path).unwrap() == [0; 25 * 4096]
                });
                kept.count()
            });
            assert_eq!(kept[0], 8, "{kind:?}");
            assert!((0..8).contains(&kept[1]), "{kind:?}: {kept:?}");
        }
    }
}
