//! Random batches on real files, by a process that is killed at a random call of
//! staging, sealing, committing, applying or failing over, and then started
//! again, or failed over.
//!
//! A process of its own plays the destination: this test's binary, told by its
//! environment what to be. Before the n-th call at which there is a fault point
//! (`common::fault`) it kills itself. After each restart the replica must be what a
//! naive model says of one of two batches: the last acknowledged, or the one that
//! was under way. After the failover, nothing that had arrived may be gone.
//!
//! Prints its seed; `REPLICATOR_SEED` replays one, `REPLICATOR_SEEDS` says how many.

#![allow(clippy::unwrap_used)]

mod common;
#[path = "../src/apply/tests/naive.rs"]
mod naive;

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use common::{Batch, FakeSource, Pack, World};
use naive::{Action, Source, next_batch, source_id};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use replicator_common::id::ObjectId;
use replicator_common::object::Kind;
use replicator_common::wire::{ContentSource, DestinationMessage, Op};
use replicator_dst::failover::{self, FailoverError, Manifest};
use rustix::process::{Signal, getpid};

/// Every call with a fault point that a destination makes.
const CALLS: [&str; 28] = [
    "create",
    "mkdir",
    "symlink",
    "mknod",
    "open",
    "rename",
    "link",
    "unlink",
    "rmdir",
    "chown",
    "chmod",
    "utimens",
    "write",
    "copy",
    "punch",
    "truncate",
    "syncfs",
    "setxattr",
    "mount",
    "state-create",
    "state-write",
    "state-fsync",
    "state-rename",
    "state-remove",
    "state-fsync-directory",
    "store-write",
    "store-resize",
    "store-sync",
];
/// How long anything may take: far more than it does.
const PATIENCE: Duration = Duration::from_secs(120);
const DEFAULT_SEEDS: u64 = 8;

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|text| text.parse().unwrap())
}

// ------------------------------------------------------------ the process

/// Kills this process before the `turn`-th call.
fn arm(turn: i64) {
    static LEFT: AtomicI64 = AtomicI64::new(0);
    LEFT.store(turn, Ordering::SeqCst);
    for call in CALLS {
        let die = || {
            if LEFT.fetch_sub(1, Ordering::SeqCst) == 1 {
                let _ = rustix::process::kill_process(getpid(), Signal::KILL);
            }
        };
        fail::cfg_callback(call, die).unwrap();
    }
}

/// The destination's process; no test of its own.
#[test]
#[ignore = "is run by the others, as a process of its own"]
fn destination() {
    let Some(base) = std::env::var_os("CRASHES_BASE") else { return };
    let base = PathBuf::from(base);
    let _scenario = fail::FailScenario::setup();
    if let Some(turn) = number("CRASHES_TURN") {
        arm(turn as i64);
    }
    if std::env::var_os("CRASHES_FAILOVER").is_some() {
        match failover::offline(&base.join("state"), None) {
            // All was done, but for the end of the process.
            Ok(_) | Err(FailoverError::NotFound(_)) => return,
            Err(error) => panic!("{error}"),
        }
    }
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        let service = World::serve(&base.join("state")).unwrap();
        let address = service.local_address().unwrap().to_string();
        std::fs::write(base.join("address.new"), address).unwrap();
        std::fs::rename(base.join("address.new"), base.join("address")).unwrap();
        // Its end is to be killed.
        std::future::pending::<()>().await;
    });
}

struct Process(Child);

impl Process {
    /// `turn`: the call before which it dies.
    fn start(base: &Path, failover: bool, turn: Option<u64>) -> Self {
        let _ = std::fs::remove_file(base.join("address"));
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", "destination", "--ignored", "--nocapture"]);
        // A store is committed to in another way when it is large (`store::begin`).
        static STARTED: AtomicU64 = AtomicU64::new(0);
        if STARTED.fetch_add(1, Ordering::Relaxed).is_multiple_of(2) {
            command.env("FAILPOINTS", "small-store=return(0)");
        }
        command.env("CRASHES_BASE", base);
        if let Some(turn) = turn {
            command.env("CRASHES_TURN", turn.to_string());
        }
        if failover {
            command.env("CRASHES_FAILOVER", "1");
        }
        let log = |name| std::fs::File::options().create(true).append(true).open(base.join(name));
        command.stdin(Stdio::null()).stdout(log("out").unwrap()).stderr(log("err").unwrap());
        Self(command.spawn().unwrap())
    }

    fn has_ended(&mut self) -> bool {
        self.0.try_wait().unwrap().is_some()
    }

    /// Waits for its end; whether it came to it by itself. It may be killed by
    /// what it was told, and by nothing else.
    fn ended(&mut self) -> bool {
        let start = Instant::now();
        loop {
            if let Some(status) = self.0.try_wait().unwrap() {
                assert!(status.success() || status.signal() == Some(9), "{status}");
                return status.success();
            }
            assert!(start.elapsed() < PATIENCE, "it does not end");
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// What becomes of a talk with the process; `None` when that ends before. (The
/// network tells of the end of a killed peer much later.)
async fn while_it_lives<T>(
    process: &mut Option<Process>,
    talk: impl Future<Output = T>,
) -> Option<T> {
    let mut talk = std::pin::pin!(talk);
    loop {
        match tokio::time::timeout(Duration::from_millis(10), &mut talk).await {
            Ok(heard) => return Some(heard),
            Err(_) if process.as_mut().is_none_or(Process::has_ended) => return None,
            Err(_) => {}
        }
    }
}

// ------------------------------------------------------------- the source

fn action(random: &mut StdRng) -> Action {
    let [a, b, c]: [u8; 3] = random.random();
    match random.random_range(0..18) {
        0..4 => Action::Create(a, b, random.random_bool(0.4)),
        4..7 => Action::Write(a),
        7..11 => Action::Rename(a, b, c),
        11..13 => Action::Exchange(a, b),
        13..15 => Action::Link(a, b, c),
        15 => Action::Unlink(a),
        16 => Action::Detach(a),
        _ => Action::Reattach(a, b, c),
    }
}

/// A batch of the model as it travels.
fn packed(ops: Vec<Op>, source: &Source) -> Batch {
    let mut packs = Vec::new();
    for op in &ops {
        let Op::Put { object, state, content: ContentSource::Packed { version }, .. } = op else {
            continue;
        };
        let bytes = source.objects[object].1.clone();
        packs.push(Pack::new(object.clone(), *version, state.clone(), bytes));
    }
    Batch { ops, packs }
}

/// What a reader of the replica sees of the model, as [`World::tree`] words it.
fn visible(source: &Source) -> BTreeMap<String, String> {
    let mut tree = BTreeMap::new();
    below(source, &source_id(0), "", &mut tree);
    tree
}

fn below(source: &Source, directory: &ObjectId, at: &str, tree: &mut BTreeMap<String, String>) {
    for ((_, name), object) in source.entries.iter().filter(|((within, _), _)| within == directory)
    {
        let path = if at.is_empty() { name.to_string() } else { format!("{at}/{name}") };
        let (kind, content, mode) = &source.objects[object];
        let links = source.links(object);
        if *kind == Kind::Directory {
            tree.insert(path.clone(), format!("dir {mode:o} 0"));
            below(source, object, &path, tree);
        } else {
            let content = String::from_utf8_lossy(content);
            tree.insert(path, format!("file {mode:o} 0 {links} {content}"));
        }
    }
}

/// Contents of the files that have no place in the replica, but live.
fn out_of_sight(source: &Source) -> BTreeSet<String> {
    let seen = visible(source);
    let files = source.objects.values().filter(|(kind, ..)| *kind == Kind::File);
    let texts = files.map(|(_, content, _)| String::from_utf8_lossy(content).into_owned());
    let shown = |text: &String| seen.values().any(|file| file.ends_with(&format!(" {text}")));
    texts.filter(|text| !shown(text)).collect()
}

// --------------------------------------------------------------- one case

struct Case {
    world: World,
    random: StdRng,
    process: Option<Process>,
    /// The source after the last acknowledged batch.
    old: Source,
    /// Its number.
    applied: u64,
    kills: u32,
}

/// How the delivery of a batch ended.
enum Delivered {
    Applied,
    /// It is time to fail over.
    FailOver,
}

impl Case {
    async fn new(seed: u64) -> Self {
        let mut world = World::new();
        let service = world.open(None).await;
        world.enrol(&service, false).await;
        service.shutdown().await;
        drop(service);
        let random = StdRng::seed_from_u64(seed);
        Self { world, random, process: None, old: Source::default(), applied: 0, kills: 0 }
    }

    fn base(&self) -> PathBuf {
        self.world.base.path().to_owned()
    }

    fn turn(&mut self) -> Option<u64> {
        let most = [20, 60, 250][self.random.random_range(0..3)];
        self.random.random_bool(0.8).then(|| self.random.random_range(1..most))
    }

    /// A destination that runs, or `None` when it died on its way.
    async fn address(&mut self) -> Option<SocketAddr> {
        if self.process.as_mut().is_none_or(Process::has_ended) {
            // The one that died must have died of what it was told.
            if let Some(mut process) = self.process.take() {
                process.ended();
            }
            let turn = self.turn();
            self.process = Some(Process::start(&self.base(), false, turn));
        }
        let start = Instant::now();
        loop {
            if let Ok(address) = std::fs::read_to_string(self.base().join("address")) {
                return Some(address.parse().unwrap());
            }
            if self.process.as_mut().is_none_or(Process::has_ended) {
                self.kills += 1;
                return None;
            }
            assert!(start.elapsed() < PATIENCE, "it does not begin");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    async fn deliver(&mut self, batch: Batch, new: &Source) -> Delivered {
        let (number, start, mut batch) = (self.applied + 1, Instant::now(), batch);
        loop {
            assert!(start.elapsed() < PATIENCE, "batch {number} is never applied");
            let Some(address) = self.address().await else { continue };
            let dialled = self.world.dial(address, self.applied);
            let dialled = while_it_lives(&mut self.process, dialled).await;
            let Some(Ok(mut source)) = dialled else { continue };
            let committed = source.hello.as_ref().unwrap().committed.batch.0;
            // The greeting comes after all that was logged is redone.
            let expected = if committed == number { visible(new) } else { visible(&self.old) };
            assert!(committed == number || committed + 1 == number, "{committed} of {number}");
            if !self.is_dead() {
                let found = self.world.tree();
                if !self.is_dead() {
                    assert_eq!(found, expected, "redone up to batch {committed}");
                }
            }
            if committed == number {
                return Delivered::Applied;
            }
            batch = batch.reread();
            if self.send(&mut source, number, &batch).await {
                assert_eq!(self.world.tree(), visible(new), "after batch {number}");
                return Delivered::Applied;
            }
            if self.is_dead() && self.random.random_bool(0.1) {
                return Delivered::FailOver;
            }
        }
    }

    fn is_dead(&mut self) -> bool {
        self.process.as_mut().is_none_or(Process::has_ended)
    }

    /// Whether the batch was applied before the destination died.
    async fn send(&mut self, source: &mut FakeSource, number: u64, batch: &Batch) -> bool {
        if source.try_send(number, batch).await.is_none() {
            return false;
        }
        loop {
            match while_it_lives(&mut self.process, source.heard()).await.flatten() {
                Some(DestinationMessage::Applied { batch, .. }) => return batch.0 == number,
                Some(
                    DestinationMessage::Durable { .. }
                    | DestinationMessage::Report(_)
                    | DestinationMessage::Kept { .. },
                ) => {}
                None => {
                    self.kills += 1;
                    return false;
                }
                Some(other) => panic!("{other:?}"),
            }
        }
    }

    /// Random batches; the model before the last one, and after it.
    async fn replicate(&mut self) -> [Source; 2] {
        let mut source = Source::new();
        for number in 0..self.random.random_range(2..6) {
            for _ in 0..self.random.random_range(1..14) {
                source.act(&action(&mut self.random));
            }
            let seed = self.random.random();
            let (ops, loose) = next_batch(&self.old, &mut source, seed, number == 0);
            let batch = packed(ops, &source);
            source.objects.retain(|object, _| !loose.contains(object));
            match self.deliver(batch, &source).await {
                Delivered::Applied => {}
                Delivered::FailOver => return [self.old.clone(), source],
            }
            self.applied += 1;
            self.old = source.clone();
        }
        [source.clone(), source]
    }

    /// Fails over, killed now and then, until it is done.
    fn fail_over(&mut self) {
        // Whatever it is doing: the destination is gone.
        drop(self.process.take());
        let (start, mut left) = (Instant::now(), 4);
        loop {
            assert!(start.elapsed() < PATIENCE, "it never fails over");
            let turn = if left > 0 { self.turn() } else { None };
            left -= 1;
            if Process::start(&self.base(), true, turn).ended() {
                return;
            }
            self.kills += 1;
        }
    }

    fn hidden(&self) -> PathBuf {
        self.world.replica.join(format!(".replicator-{}", self.world.source))
    }

    fn lost_and_found(&self) -> Option<PathBuf> {
        let all = std::fs::read_dir(&self.world.replica).unwrap().flatten();
        let lost = all.filter(|entry| entry.file_name().to_string_lossy().starts_with("efs-"));
        let mut lost: Vec<_> = lost.map(|entry| entry.path()).collect();
        assert!(lost.len() < 2, "{lost:?}");
        lost.pop()
    }

    fn check(&self, models: &[Source; 2], staged: &BTreeSet<String>) {
        assert!(!self.hidden().exists(), "ours is left");
        std::fs::write(self.world.replica.join("probe"), b"").unwrap();
        std::fs::remove_file(self.world.replica.join("probe")).unwrap();
        let lost = self.lost_and_found();
        let mut tree = self.world.tree();
        tree.retain(|path, _| !path.starts_with("efs-"));
        let (fits, orphans) = models
            .iter()
            .map(|model| (fits(&tree, model), out_of_sight(model)))
            // Both may fit: where the batch did nothing but drop what was out of sight.
            .max_by_key(|(fits, orphans)| {
                let known = |file: &String| file.is_empty() || orphans.contains(file);
                (fits.is_some(), fits.as_ref().is_some_and(|extra| extra.iter().all(known)))
            })
            .unwrap();
        let Some(extra) = fits else {
            let expected: Vec<_> = models.iter().map(visible).collect();
            panic!("{tree:#?}\nis neither of {expected:#?}");
        };
        for file in extra.iter().filter(|text| !text.is_empty()) {
            let known =
                orphans.contains(file) || models.iter().any(|one| has_more_names(one, file));
            assert!(known, "{file:?} was put back, and is no orphan");
        }
        let mut kept: BTreeSet<String> = tree.values().filter_map(|file| content(file)).collect();
        if let Some(lost) = &lost {
            kept.extend(manifested(lost));
        }
        for text in staged.iter().chain(&orphans).filter(|text| !text.is_empty()) {
            assert!(kept.contains(text), "{text:?} had arrived, and is gone; of {kept:?}");
        }
    }
}

/// What the word of [`World::tree`] for a file says of its content.
fn content(file: &str) -> Option<String> {
    file.strip_prefix("file ")?.splitn(4, ' ').nth(3).map(str::to_owned)
}

/// Whether all of the model is there; then, the contents of what else is there.
fn fits(tree: &BTreeMap<String, String>, model: &Source) -> Option<Vec<String>> {
    let expected = visible(model);
    if expected.iter().any(|(path, what)| tree.get(path) != Some(what)) {
        return None;
    }
    let extra = tree.iter().filter(|(path, _)| !expected.contains_key(*path));
    Some(extra.filter_map(|(_, what)| content(what)).collect())
}

/// Whether a file of that content is visible, and has other names out of sight: in a
/// directory that may be put back.
fn has_more_names(model: &Source, text: &str) -> bool {
    let seen = visible(model);
    let names: Vec<&String> =
        seen.values().filter(|word| content(word).as_deref() == Some(text)).collect();
    let links = |word: &&&String| word.split(' ').nth(3).and_then(|links| links.parse().ok());
    names.first().as_ref().and_then(links).is_some_and(|links: usize| links > names.len())
}

/// The contents of lost+found, which its manifest must list, and nothing else.
fn manifested(lost: &Path) -> BTreeSet<String> {
    let manifest = std::fs::read(lost.join("manifest.json")).unwrap();
    let manifest: Manifest = serde_json::from_slice(&manifest).unwrap();
    let listed: BTreeSet<String> = manifest.items.into_iter().map(|item| item.file).collect();
    let names = std::fs::read_dir(lost).unwrap().flatten();
    let names = names.map(|entry| entry.file_name().into_string().unwrap());
    let there: BTreeSet<String> = names.filter(|name| name != "manifest.json").collect();
    assert_eq!(listed, there, "the manifest");
    contents(lost).into_iter().collect()
}

/// The contents of what is staged, but for plans: they say what files are to
/// become, and are in the manifest by that.
fn arrived(staging: &Path) -> BTreeSet<String> {
    let shards = std::fs::read_dir(staging).into_iter().flatten().flatten();
    let all = shards.flat_map(|shard| std::fs::read_dir(shard.path()).into_iter().flatten());
    let files = all.flatten().map(|entry| entry.path()).filter(|path| {
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        name.starts_with('p') && !name.starts_with("plan.")
    });
    let files = files.map(|path| std::fs::read(path).unwrap());
    files.map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).collect()
}

/// The contents of all files below a directory.
fn contents(directory: &Path) -> Vec<String> {
    let mut all = Vec::new();
    for entry in std::fs::read_dir(directory).into_iter().flatten().flatten() {
        let path = entry.path();
        if entry.file_type().unwrap().is_dir() {
            all.extend(contents(&path));
        } else {
            all.push(String::from_utf8_lossy(&std::fs::read(&path).unwrap()).into_owned());
        }
    }
    all
}

async fn run(seed: u64) -> u32 {
    let mut case = Case::new(seed).await;
    let models = case.replicate().await;
    drop(case.process.take());
    let staged = arrived(&case.hidden().join("staging"));
    case.fail_over();
    case.check(&models, &staged);
    case.kills
}

#[test]
fn killed_at_any_call_and_begun_again_or_failed_over() {
    let seeds = match number("REPLICATOR_SEED") {
        Some(seed) => vec![seed],
        None => {
            let many = number("REPLICATOR_SEEDS").unwrap_or(DEFAULT_SEEDS);
            (0..many).map(|_| rand::random_range(0..1 << 32)).collect()
        }
    };
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let mut kills = 0;
    for seed in seeds {
        println!("REPLICATOR_SEED={seed}");
        kills += runtime.block_on(run(seed));
    }
    println!("{kills} kills");
}
