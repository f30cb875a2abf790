//! A disk with a cache of its own, which a power cut empties: one file, served
//! by FUSE, for a loop device to stand on.
//!
//! The loop driver sends each write at once (the file is opened for direct I/O,
//! so that the kernel keeps nothing of it) and turns a flush of the block layer,
//! which is also how it does a write with FUA, into an fsync. Between two of
//! them the disk keeps every version of every sector: at a power cut any of them
//! may be the one on the platter, or the one before them all.
//!
//! Deadlock: the server is a thread of the test. It touches no file of the file
//! system that stands on the disk, and writes only to one whose own dirty pages
//! are few: it must never wait for pages that only it can write out.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use rand::Rng;
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;

use crate::fuse::{self, Device, OneFile};
use crate::mounts::unmount_below;

/// What a disk writes as a whole: never half of it is new after a power cut.
const SECTOR: usize = 4096;
/// So many versions of sectors fit the cache. A disk whose cache is full writes it
/// out without being asked.
const CACHE_SECTORS: usize = (48 << 20) / SECTOR;
/// Of the sectors that were not flushed, so many in a hundred were written to the
/// platter when the power went; one of these, for each power cut.
const WRITTEN: [u32; 5] = [0, 20, 50, 80, 100];

/// How long the server may take to end after the disk was unmounted.
const END_LIMIT: Duration = Duration::from_secs(30);

type Sector = Box<[u8; SECTOR]>;

/// What is on the platter, and what is in the cache before it.
#[derive(Debug)]
struct Cached {
    platter: File,
    /// By number: what was written to a sector since the last flush, in order.
    unflushed: BTreeMap<u64, Vec<Sector>>,
    versions: usize,
}

impl Cached {
    fn new(platter: File) -> Self {
        Self { platter, unflushed: BTreeMap::new(), versions: 0 }
    }

    /// What a sector holds for one who reads it.
    fn sector(&self, number: u64) -> io::Result<Sector> {
        if let Some(last) = self.unflushed.get(&number).and_then(|versions| versions.last()) {
            return Ok(last.clone());
        }
        let mut sector = Box::new([0; SECTOR]);
        self.platter.read_exact_at(&mut sector[..], number * SECTOR as u64)?;
        Ok(sector)
    }

    fn read(&self, offset: u64, size: usize) -> io::Result<Vec<u8>> {
        let mut data = vec![0; size];
        for (number, inside, part) in parts(offset, size) {
            data[part].copy_from_slice(&self.sector(number)?[inside]);
        }
        Ok(data)
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> io::Result<()> {
        for (number, inside, part) in parts(offset, data.len()) {
            let mut sector = self.sector(number)?;
            sector[inside].copy_from_slice(&data[part]);
            self.unflushed.entry(number).or_default().push(sector);
            self.versions += 1;
        }
        if self.versions > CACHE_SECTORS { self.flush() } else { Ok(()) }
    }

    fn flush(&mut self) -> io::Result<()> {
        for (number, versions) in &self.unflushed {
            let last = versions.last().expect("a sector is named with its first version");
            self.platter.write_all_at(&last[..], number * SECTOR as u64)?;
        }
        self.forget();
        Ok(())
    }

    fn forget(&mut self) {
        self.unflushed.clear();
        self.versions = 0;
    }

    /// Writes to a copy of the platter what happened to be written of the cache.
    fn lose(&self, copy: &File, random: &mut StdRng) -> io::Result<()> {
        let written = *WRITTEN.choose(random).expect("there are some");
        for (number, versions) in &self.unflushed {
            if random.random_ratio(written, 100) {
                let one = versions.choose(random).expect("as in flush");
                copy.write_all_at(&one[..], number * SECTOR as u64)?;
            }
        }
        Ok(())
    }
}

/// The sectors that a stretch touches: number, where in it, where in the stretch.
fn parts(
    offset: u64,
    size: usize,
) -> impl Iterator<Item = (u64, std::ops::Range<usize>, std::ops::Range<usize>)> {
    let mut done = 0;
    std::iter::from_fn(move || {
        let at = offset + done as u64;
        let begin = (at % SECTOR as u64) as usize;
        let length = (SECTOR - begin).min(size - done);
        let part = (at / SECTOR as u64, begin..begin + length, done..done + length);
        done += length;
        (length > 0).then_some(part)
    })
}

/// The disk, mounted as a directory that has it as its only file.
#[derive(Debug)]
pub struct LossyDisk {
    cached: Arc<Mutex<Cached>>,
    directory: PathBuf,
    server: Option<JoinHandle<()>>,
}

impl LossyDisk {
    /// Serves the file `platter`, which keeps its size, below `directory`.
    pub fn new(platter: File, directory: &Path) -> Self {
        let size = platter.metadata().unwrap().len();
        assert_eq!(size % SECTOR as u64, 0, "a disk is made of whole sectors");
        let cached = Arc::new(Mutex::new(Cached::new(platter)));
        let device = Device::mount(directory, size).unwrap();
        let shared = Shared(cached.clone());
        // It ends when the file system is unmounted.
        let serve = move || device.serve(&shared).unwrap();
        let server = thread::Builder::new().name("lossy-disk".to_owned()).spawn(serve).unwrap();
        Self { cached, directory: directory.to_owned(), server: Some(server) }
    }

    /// The file that a loop device can be set up over.
    pub fn file(&self) -> PathBuf {
        self.directory.join(fuse::NAME)
    }

    /// What a power cut would leave now. `copy` makes a copy of the platter while
    /// the disk stands still, to which is written what of the cache is not lost.
    pub fn cut(&self, random: &mut StdRng, copy: impl FnOnce() -> File) {
        let cached = lock(&self.cached);
        cached.lose(&copy(), random).unwrap();
    }

    /// `change` puts other content on the platter. Nothing may have the disk open.
    pub fn replace(&self, change: impl FnOnce()) {
        let mut cached = lock(&self.cached);
        cached.forget();
        change();
    }

    /// How many sectors a power cut now could lose.
    pub fn unflushed(&self) -> usize {
        lock(&self.cached).unflushed.len()
    }
}

impl Drop for LossyDisk {
    fn drop(&mut self) {
        if let Err(error) = unmount_below(&self.directory) {
            eprintln!("{} could not be unmounted: {error}", self.directory.display());
        }
        // Whoever still has it open keeps it; that is no reason to wait for ever.
        let (start, server) = (Instant::now(), self.server.take().expect("taken only here"));
        while !server.is_finished() && start.elapsed() < END_LIMIT {
            thread::sleep(Duration::from_millis(5));
        }
        if !server.is_finished() {
            eprintln!("the disk at {} is still in use", self.directory.display());
        } else if server.join().is_err() {
            eprintln!("the disk at {} failed", self.directory.display());
        }
    }
}

/// What the server answers from.
struct Shared(Arc<Mutex<Cached>>);

impl OneFile for Shared {
    fn read(&self, offset: u64, size: usize) -> io::Result<Vec<u8>> {
        lock(&self.0).read(offset, size)
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        lock(&self.0).write(offset, data)
    }

    fn flush(&self) -> io::Result<()> {
        lock(&self.0).flush()
    }
}

fn lock(cached: &Mutex<Cached>) -> MutexGuard<'_, Cached> {
    cached.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mounts::Scratch;
    use rand::SeedableRng;
    use std::fs;

    const SECTORS: usize = 64;

    /// What each sector begins with in an image of now.
    fn image(disk: &LossyDisk, platter: &Path, random: &mut StdRng) -> Vec<u8> {
        let copy = platter.with_extension("copy");
        disk.cut(random, || {
            fs::copy(platter, &copy).unwrap();
            File::options().write(true).open(&copy).unwrap()
        });
        fs::read(&copy).unwrap().chunks(SECTOR).map(|sector| sector[SECTOR - 1]).collect()
    }

    #[test]
    fn what_was_flushed_stays_and_of_the_rest_any_part() {
        let (scratch, mut random) = (Scratch::new("lossy"), StdRng::seed_from_u64(1));
        let platter = scratch.path().join("platter");
        let directory = scratch.path().join("mnt");
        fs::create_dir(&directory).unwrap();
        let file = File::options().create_new(true).read(true).write(true).open(&platter).unwrap();
        file.set_len((SECTORS * SECTOR) as u64).unwrap();
        let disk = LossyDisk::new(file, &directory);
        let file = File::options().read(true).write(true).open(disk.file()).unwrap();
        let fill = |with: u8| file.write_all_at(&[with; SECTORS * SECTOR], 0).unwrap();
        fill(1);
        file.sync_data().unwrap();
        assert_eq!(disk.unflushed(), 0);
        assert_eq!(image(&disk, &platter, &mut random), [1; SECTORS]);
        fill(2);
        // Not whole sectors, and across their bounds.
        for number in 1..SECTORS {
            file.write_all_at(&[3; 1000], (number * SECTOR) as u64 - 500).unwrap();
        }
        let mut read = [0; 3000];
        file.read_exact_at(&mut read, SECTOR as u64 - 1500).unwrap();
        assert_eq!((read[999], read[1000], read[1999], read[2000]), (2, 3, 3, 2));
        let images: Vec<_> = (0..40).map(|_| image(&disk, &platter, &mut random)).collect();
        for state in [1, 2, 3] {
            assert!(images.iter().any(|image| image.contains(&state)), "none kept {state}");
        }
        assert!(images.contains(&vec![1; SECTORS]), "none lost all");
        file.sync_data().unwrap();
        let mut all = [3; SECTORS];
        all[SECTORS - 1] = 2;
        assert_eq!(image(&disk, &platter, &mut random), all);
    }
}
