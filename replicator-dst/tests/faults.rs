//! Every system call of the destination's file layer fails, with each of the
//! errors of a full or failing disk, at several of its turns, for once and for a
//! while: the applier lives, retries by itself, says what is wrong, claims
//! nothing that is not so, and in the end the replica is what it was to become.

#![allow(clippy::unwrap_used)]

mod common;

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use common::{Batch, FakeSource, ROOT, World, data, id, pieces, state};
use replicator_common::control::{Control, DeletionMode};
use replicator_common::id::{BatchId, TransferId};
use replicator_common::object::{Kind, Xattr};
use replicator_common::status::DestinationReport;
use replicator_common::time::Timestamp;
use replicator_common::wire::{
    ContentSource, DataFrame, DestinationMessage, Extent, Layout, Op, SourceMessage, TransferBegin,
};
use replicator_dst::service::DestinationService;

/// The points that every round of batches passes.
const CALLS: [&str; 20] = [
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
    "store-write",
    "store-sync",
];
/// Errors, and how the system words them.
const ERRORS: [(&str, &str); 4] = [
    ("ENOSPC", "o space left"),
    ("EDQUOT", "uota exceeded"),
    ("EROFS", "ead-only file system"),
    ("EIO", "nput/output error"),
];
/// How long anything may take: far more than it does.
const PATIENCE: Duration = Duration::from_secs(20);

fn dropped(mut batch: Batch, all: &[u8]) -> Batch {
    for n in all {
        batch = batch.op(Op::Drop { object: id(*n) });
    }
    batch
}

fn put(n: u8, kind: Kind, content: ContentSource, new: bool, links: u32) -> Op {
    let mut state = state(kind, 0o640, 0);
    state.rdev = if kind == Kind::CharDevice { 0x0103 } else { 0 };
    state.attributes.xattrs = match kind {
        Kind::File => vec![Xattr { name: b"user.test".to_vec(), value: vec![n; 9] }],
        _ => Vec::new(),
    };
    Op::Put { object: id(n), state, content, new, links }
}

/// Makes one of each kind, with hard links.
fn create() -> Batch {
    let target = ContentSource::Symlink { target: b"nowhere".to_vec() };
    Batch::new()
        .root()
        .mkdir(1, ROOT, "dir")
        .file(2, 1, "a", b"alpha")
        .content(3, b"hard", true, 2)
        .entry(ROOT, "h1", None, Some(3))
        .entry(ROOT, "h2", None, Some(3))
        .op(put(4, Kind::Symlink, target, true, 1))
        .entry(ROOT, "link", None, Some(4))
        .op(put(5, Kind::File, ContentSource::Unchanged, true, 1))
        .entry(ROOT, "attributes", None, Some(5))
        .op(put(6, Kind::CharDevice, ContentSource::Unchanged, true, 1))
        .entry(ROOT, "device", None, Some(6))
        .file(7, ROOT, "c", b"gamma")
}

/// Rewrites in place, with a hole; replaces; moves; links; swaps.
fn modify() -> Batch {
    let mut batch = Batch::new()
        .directory(ROOT)
        .directory(1)
        .content(3, b"hardly", false, 3)
        .entry(ROOT, "h3", None, Some(3))
        .content(7, b"gamma two", false, 1)
        .entry(1, "a", Some(2), Some(7))
        .entry(ROOT, "c", Some(7), Some(2));
    let size = 1 << 20;
    let pack = batch.packs.iter_mut().find(|pack| pack.packed.object == id(3)).unwrap();
    pack.packed.extents = vec![Extent { offset: (1 << 17) - 6, length: 6 }];
    pack.packed.state.size = (1 << 17) + 4096;
    assert!(pack.packed.state.size < size);
    let size = pack.packed.state.size;
    for op in &mut batch.ops {
        if let Op::Put { object, state, .. } = op
            && *object == id(3)
        {
            state.size = size;
        }
    }
    batch
}

fn delete() -> Batch {
    let batch = Batch::new()
        .directory(ROOT)
        .entry(1, "a", Some(7), None)
        .entry(ROOT, "dir", Some(1), None)
        .entry(ROOT, "c", Some(2), None)
        .entry(ROOT, "h1", Some(3), None)
        .entry(ROOT, "h2", Some(3), None)
        .entry(ROOT, "h3", Some(3), None)
        .entry(ROOT, "link", Some(4), None)
        .entry(ROOT, "attributes", Some(5), None)
        .entry(ROOT, "device", Some(6), None);
    dropped(batch, &[1, 2, 3, 4, 5, 6, 7])
}

/// A destination under test, and the source that speaks to it.
struct Round<'a> {
    world: &'a World,
    service: &'a DestinationService,
    source: Option<FakeSource>,
    /// The last batch applied.
    applied: u64,
}

fn report(service: &DestinationService) -> DestinationReport {
    service.list().remove(0).destination.unwrap()
}

impl Round<'_> {
    /// Sends a batch until it is applied, through whatever happens, as a source
    /// does.
    async fn deliver(&mut self, batch: &Batch) {
        let (number, start) = (self.applied + 1, Instant::now());
        let mut batch = batch.clone();
        while self.applied < number {
            assert!(start.elapsed() < PATIENCE, "{:#?}", report(self.service));
            let mut source = match self.source.take() {
                Some(source) => source,
                None => match self.world.try_connect(self.service, self.applied).await {
                    Ok(source) => source,
                    Err(_) => {
                        tokio::time::sleep(Duration::from_millis(20)).await;
                        continue;
                    }
                },
            };
            if source.hello.as_ref().is_some_and(|hello| hello.committed.batch == BatchId(number)) {
                // Its commit was in doubt, and turned out to be there.
                self.applied = number;
                self.source = Some(source);
                return;
            }
            batch = batch.reread();
            source.send(number, &batch).await;
            self.attend(source, number).await;
        }
    }

    /// Hears the destination out until the batch is applied, or has to be sent
    /// again.
    async fn attend(&mut self, mut source: FakeSource, number: u64) {
        let start = Instant::now();
        loop {
            assert!(start.elapsed() < PATIENCE, "{:#?}", report(self.service));

            match source.heard().await {
                Some(DestinationMessage::Applied { batch: BatchId(found), .. }) => {
                    assert_eq!(found, number);
                    self.applied = number;
                    break;
                }
                Some(DestinationMessage::Durable { .. } | DestinationMessage::Report(_)) => {
                    self.no_claim_before(number);
                }
                Some(DestinationMessage::Kept { .. }) => {}
                Some(DestinationMessage::Returned { batch, last: true, .. }) => {
                    let batch = SourceMessage::Abandon { batch };
                    source.writer.write(&batch).await.unwrap();
                    tokio::time::sleep(Duration::from_millis(20)).await;
                    break;
                }
                Some(DestinationMessage::Refused(_)) | None => return,
                Some(other) => panic!("{other:?}"),
            }
        }
        self.source = Some(source);
    }

    /// What is claimed is what was applied before, or it is applied by now.
    fn no_claim_before(&self, number: u64) {
        let found = report(self.service);
        let of = |n: u64| Some(Timestamp(1_700_000_000_000_000_000 + n as i64));
        let claimed = found.last_replicated;
        assert!(
            claimed < of(number) || found.applied >= BatchId(number),
            "{claimed:?}: {found:#?}"
        );
    }
}

/// What each batch leaves, without faults.
struct Expected([BTreeMap<String, String>; 3]);

async fn rounds(round: &mut Round<'_>, expected: Option<&Expected>, what: &str) -> Expected {
    let mut found = Vec::new();
    for (number, batch) in [create(), modify(), delete()].iter().enumerate() {
        round.deliver(batch).await;
        let tree = round.world.tree();
        if let Some(expected) = expected {
            assert_eq!(tree, expected.0[number], "{what}, after batch {number}");
        }
        found.push(tree);
    }
    Expected(found.try_into().unwrap())
}

/// Waits until status says what is wrong, or `ended`; then the fault is gone.
async fn lift(service: &DestinationService, call: &str, words: &str, ended: &AtomicBool) -> bool {
    while !ended.load(Ordering::Acquire) {
        let found = report(service);
        let errors = [found.stalled, found.last_error.map(|error| error.error)];
        if errors.iter().flatten().any(|error| error.contains(words)) {
            fail::cfg(call, "off").unwrap();
            return true;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    false
}

#[tokio::test(flavor = "multi_thread")]
async fn every_call_may_fail() {
    let scenario = fail::FailScenario::setup();
    let mut world = World::new();
    let service = world.open(None).await;
    world.enrol(&service, false).await;
    let mut round = Round { world: &world, service: &service, source: None, applied: 0 };
    let expected = rounds(&mut round, None, "").await;
    assert_eq!((expected.0[0].len(), expected.0[2].len()), (8, 0), "{:?}", expected.0);
    let turn = Timestamp::now().0 as usize;
    for (number, call) in CALLS.into_iter().enumerate() {
        let mut met = false;
        for (error, words) in ERRORS {
            println!("{call} {error}");
            // For once, at several of its turns.
            let before = [0, 1, 3, 7][(number + turn) % 4];
            fail::cfg(call, &format!("{before}*off->1*return({error})->off")).unwrap();
            rounds(&mut round, Some(&expected), &format!("{call} {error} once, {before}")).await;
            // For a while, from the first.
            let ended = AtomicBool::new(false);
            fail::cfg(call, &format!("return({error})")).unwrap();
            let work = async {
                let what = format!("{call} {error} for a while");
                rounds(&mut round, Some(&expected), &what).await;
                ended.store(true, Ordering::Release);
            };
            let (named, ()) = tokio::join!(lift(&service, call, words, &ended), work);
            met |= named;
            fail::cfg(call, "off").unwrap();
        }
        assert!(met, "{call} is never made, or its error is never told");
    }
    // Nothing is left of all those attempts.
    drop(round.source.take());
    let mut source = world.connect(&service, round.applied).await;
    let (_, transfers) = source.told().await;
    source.writer.write(&SourceMessage::Release { packed: true, transfers }).await.unwrap();
    let hidden = world.replica.join(format!(".replicator-{}", world.source));
    let staged = || {
        let shards = std::fs::read_dir(hidden.join("staging")).unwrap();
        shards.map(|shard| std::fs::read_dir(shard.unwrap().path()).unwrap().count()).sum::<usize>()
    };
    let start = Instant::now();
    while staged() > 0 {
        assert!(start.elapsed() < PATIENCE, "{} files are left in staging", staged());
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    drop(source);
    scenario.teardown();
    service.delete(&world.source, DeletionMode::LocalConfigurationOnly).unwrap();
}

/// What is written behind a stager fails at any of its turns: also what is found out
/// only at the transfer's end is waited for, and no byte of it is lost.
#[tokio::test(flavor = "multi_thread")]
async fn a_large_file_waits_for_its_disk() {
    let scenario = fail::FailScenario::setup();
    let mut world = World::new();
    let service = world.open(None).await;
    world.enrol(&service, false).await;
    let mut source = world.connect(&service, 0).await;
    let content: Vec<u8> =
        (0..3_300_123u32).flat_map(|n| n.to_le_bytes()).take(3_300_123).collect();
    let size = content.len() as u64;
    let mut root = Batch::new().root();
    for turn in 0..12u8 {
        let (object, transfer) = (id(10 + turn), TransferId(u64::from(turn) + 1));
        let state = state(Kind::File, 0o600, size);
        fail::cfg("write", &format!("{turn}*off->2*return(EROFS)->off")).unwrap();
        let begin = TransferBegin {
            transfer,
            object: object.clone(),
            state: state.clone(),
            layout: Layout::Replace,
            basis: None,
            basis_version: BatchId(0),
        };
        source.data.write(&DataFrame::TransferBegin(begin)).await.unwrap();
        for part in content.chunks(400_000) {
            let (one, other) = part.split_at(part.len() / 3);
            let parts = vec![data(one), data(other)];
            source.data.write(&pieces(transfer, parts)).await.unwrap();
        }
        let end = DataFrame::TransferEnd { transfer, state: state.clone() };
        source.data.write(&end).await.unwrap();
        let put = Op::Put {
            object,
            state,
            content: ContentSource::Transferred { transfer },
            new: true,
            links: 1,
        };
        let name = format!("large-{turn}");
        let batch = root.op(put).entry(ROOT, &name, None, Some(10 + turn));
        // Any other answer than that all is well would be a panic.
        source.apply(u64::from(turn) + 1, &batch).await;
        fail::cfg("write", "off").unwrap();
        let found = std::fs::read(world.replica.join(&name)).unwrap();
        assert!(found == content, "turn {turn}");
        root = Batch::new().directory(ROOT);
    }
    drop(source);
    scenario.teardown();
    service.delete(&world.source, DeletionMode::LocalConfigurationOnly).unwrap();
}
