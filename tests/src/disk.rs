//! A disk whose power can be cut: a file system in an image, of which a copy
//! at one instant is what a power cut at that instant would leave.
//!
//! What the kernel has not written back yet is in its cache of the mounted file
//! system, and not in the image. The image stands on an xfs, which copies it by
//! reference under its lock: so the copy holds all writes up to one moment and
//! none after. (A disk with a cache of its own may lose more, in any order; of
//! that, only a check of the calls that flush can tell.)

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use crate::mounts::{FileSystem, Mount, Scratch, run, unmount_below};

/// Enough for what mkfs.xfs asks for.
const SIZE: u64 = 320 << 20;
/// How long a mount may stay after it was unmounted where we see it.
const RELEASE_LIMIT: Duration = Duration::from_secs(30);

/// The disk, mounted.
#[derive(Debug)]
pub struct Disk {
    // Dropped in this order: what is mounted from the image before the xfs
    // that the image stands on.
    scratch: Scratch,
    kind: FileSystem,
    outer: Mount,
}

impl Disk {
    /// With a new file system.
    pub fn new(kind: FileSystem) -> Self {
        let outer = Mount::new(FileSystem::Xfs);
        let scratch = Scratch::new("disk");
        let disk = Self { scratch, kind, outer };
        fs::create_dir(disk.path()).unwrap();
        let image = disk.image();
        File::create(&image).and_then(|file| file.set_len(SIZE)).unwrap();
        run(Command::new(format!("mkfs.{}", kind.as_str())).arg("-q").arg(&image));
        disk.attach();
        disk
    }

    /// Where it is mounted.
    pub fn path(&self) -> PathBuf {
        self.scratch.path().join("mnt")
    }

    fn image(&self) -> PathBuf {
        self.outer.path().join("image")
    }

    fn attach(&self) {
        let mut command = Command::new("mount");
        command.args(["-o", "loop", "-t", self.kind.as_str()]);
        run(command.arg(self.image()).arg(self.path()));
    }

    /// What a power cut would leave now, kept for [`Self::cut_back_to`].
    pub fn image_of_now(&self, number: usize) -> PathBuf {
        let copy = self.outer.path().join(format!("image-{number}"));
        copy_by_reference(&self.image(), &copy);
        copy
    }

    /// Unmounts, and mounts what `image` holds at the same place instead: the
    /// machine is back after its power was cut. Nothing may run on it.
    pub fn cut_back_to(&self, image: &Path) {
        unmount_below(&self.path()).unwrap();
        self.wait_unused();
        copy_by_reference(image, &self.image());
        self.attach();
    }

    /// Waits until nothing has the image mounted: a mount namespace of a process
    /// that was killed ends a moment after it.
    fn wait_unused(&self) {
        let start = Instant::now();
        while loop_devices_of(&self.image()) > 0 {
            assert!(start.elapsed() < RELEASE_LIMIT, "the image is still mounted somewhere");
            thread::sleep(Duration::from_millis(20));
        }
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
    #[test]
    fn an_image_holds_what_was_synced_and_only_that() {
        for kind in [FileSystem::Ext4, FileSystem::Xfs] {
            let disk = Disk::new(kind);
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
}
