//! Who writes while daemons die: the random workload, writers of stamped files,
//! and one of large files.

use std::fs;
use std::path::{Path, PathBuf};
use std::thread::{self, Scope, ScopedJoinHandle};
use std::time::{Duration, Instant};

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use crate::stamps::Stamper;
use crate::workload::{Workload, content};

/// Writers of stamped files.
const STAMPERS: u64 = 2;
/// Names that each of them uses.
const NAMES: u64 = 60;

/// Where they write, and what they remember.
pub(super) struct Writers {
    pub(super) stamper: Stamper,
    work: PathBuf,
    large: PathBuf,
    outside: PathBuf,
    seed: u64,
}

impl Writers {
    pub(super) fn new(source: &Path, outside: &Path, seed: u64) -> Self {
        let (work, large) = (source.join("work"), source.join("large"));
        for directory in [&work, &large] {
            fs::create_dir(directory).unwrap();
        }
        let stamper = Stamper::new(&source.join("stamped"));
        Self { stamper, work, large, outside: outside.to_owned(), seed }
    }

    /// Starts them for a round.
    pub(super) fn start<'scope, 'env: 'scope>(
        &'env self,
        scope: &'scope Scope<'scope, 'env>,
        round: u64,
        end: Instant,
    ) -> Vec<ScopedJoinHandle<'scope, ()>> {
        let seed = self.seed.wrapping_add(round << 8);
        let workload = Workload {
            seed,
            threads: 2,
            steps: u32::MAX,
            time_limit: end.saturating_duration_since(Instant::now()),
            rate: Some(250.0),
            without: &[],
            link_age: Duration::ZERO,
        };
        let mut all = vec![
            scope.spawn(move || drop(workload.run(&self.work, &self.outside))),
            scope.spawn(move || self.write_large(seed, end)),
        ];
        all.extend((0..STAMPERS).map(|n| scope.spawn(move || self.stamp(n, seed, round, end))));
        all
    }

    /// New versions, appended lines, renames and removals, some at once and
    /// some with pauses.
    fn stamp(&self, writer: u64, seed: u64, round: u64, end: Instant) {
        let mut rng = StdRng::seed_from_u64(seed ^ writer);
        // So that no version comes twice.
        let mut version = round << 32;
        let name = |n: u64| format!("writer-{writer}/{}/file-{n}", n % 5);
        let mut there = vec![false; NAMES as usize];
        for n in 0..NAMES {
            fs::create_dir_all(self.root().join(name(n)).parent().unwrap()).unwrap();
            there[n as usize] = fs::exists(self.root().join(name(n))).unwrap();
        }
        let mut lines = 0;
        let log = format!("writer-{writer}/round-{round}.log");
        while Instant::now() < end {
            version += 1;
            let (n, m) = (rng.random_range(0..NAMES), rng.random_range(0..NAMES));
            let done = match rng.random_range(0..20) {
                0 if there[n as usize] => {
                    there[n as usize] = false;
                    self.stamper.remove(&name(n))
                }
                1 | 2 if there[n as usize] && n != m => {
                    (there[n as usize], there[m as usize]) = (false, true);
                    self.stamper.rename(&name(n), &name(m))
                }
                3..6 => {
                    lines += 1;
                    self.stamper.write(&log, lines)
                }
                _ => {
                    there[n as usize] = true;
                    self.stamper.write(&name(n), version)
                }
            };
            done.unwrap();
            if rng.random_ratio(1, 3) {
                thread::sleep(Duration::from_millis(rng.random_range(0..40)));
            }
        }
    }

    fn root(&self) -> &Path {
        self.stamper.root()
    }

    /// Large files: new ones, ones that are written into, ones that are
    /// appended to, ones that are replaced under the same name.
    fn write_large(&self, seed: u64, end: Instant) {
        use std::os::unix::fs::FileExt;
        let mut rng = StdRng::seed_from_u64(seed);
        while Instant::now() < end {
            let path = self.large.join(format!("file-{}", rng.random_range(0..4)));
            let length = rng.random_range(1 << 20..12 << 20);
            let fresh = |rng: &mut StdRng, length| content::incompressible(rng.random(), length);
            match (fs::File::options().write(true).open(&path), rng.random_range(0..4)) {
                (Ok(file), 0) => {
                    let at = rng.random_range(0..=file.metadata().unwrap().len());
                    file.write_all_at(&fresh(&mut rng, 100_000), at).unwrap();
                }
                (Ok(file), 1) => {
                    let size = file.metadata().unwrap().len();
                    let size = if size > 64 << 20 { 0 } else { size };
                    file.set_len(size).unwrap();
                    file.write_all_at(&fresh(&mut rng, length / 4), size).unwrap();
                }
                (_, 2) => {
                    let temporary = path.with_extension("new");
                    fs::write(&temporary, fresh(&mut rng, length)).unwrap();
                    fs::rename(&temporary, &path).unwrap();
                }
                _ => fs::write(&path, fresh(&mut rng, length)).unwrap(),
            }
            thread::sleep(Duration::from_millis(rng.random_range(0..500)));
        }
    }
}
