//! What staging has of a session that ended: what the next is told of it, what
//! it is used for, and what a source that lies about it gets.

#![allow(clippy::unwrap_used)]

mod common;

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use common::{Batch, FakeSource, Part, ROOT, World, id, pieces, plain, state};
use replicator_common::control::{Control, DeletionMode};
use replicator_common::id::{BatchId, TransferId};
use replicator_common::object::Kind;
use replicator_common::sys::place;
use replicator_common::wire::{
    ContentSource, DataFrame, DestinationMessage, Hash, KeptChunk, KeptObject, Layout, Op,
    PackedAgain, Piece, SourceMessage, TransferBegin,
};
use replicator_dst::failover::Manifest;
use replicator_dst::readonly::Protection;
use replicator_dst::replica::{Hook, Point};
use replicator_dst::service::DestinationService;

const SMALL: u8 = 5;
const LARGE: u8 = 6;

/// A replica with one batch, and a session in which nothing was committed: of a
/// small file everything arrived, of a large one three chunks.
struct Stage {
    world: World,
    service: DestinationService,
}

fn chunk(tag: u8) -> Vec<u8> {
    let length = 20_000 + usize::from(tag);
    (0..length).map(|at| (at as u8).wrapping_mul(tag) ^ (at >> 8) as u8).collect()
}

fn data(tag: u8) -> Part {
    common::data(chunk(tag))
}

fn again(content: &[u8]) -> DataFrame<'static> {
    let state = state(Kind::File, 0o604, content.len() as u64);
    let again = PackedAgain { object: id(SMALL), version: 1, state, hash: Hash::of(content) };
    DataFrame::PackAgain { batch: BatchId(2), objects: vec![again] }
}

fn begin(number: u64, object: u8, size: u64) -> DataFrame<'static> {
    DataFrame::TransferBegin(TransferBegin {
        transfer: TransferId(number),
        object: id(object),
        state: state(Kind::File, 0o600, size),
        layout: Layout::Replace,
        basis: None,
        basis_version: BatchId(0),
    })
}

fn kept(offer: &KeptChunk) -> Part {
    plain(Piece::Kept { from: offer.from, length: offer.chunk.length, hash: offer.chunk.hash })
}

fn put(content: ContentSource, object: u8, mode: u32, size: u64) -> Op {
    Op::Put {
        object: id(object),
        state: state(Kind::File, mode, size),
        content,
        new: true,
        links: 1,
    }
}

impl Stage {
    async fn set(hook: Option<Hook>) -> Self {
        let mut world = World::new();
        let service = world.open(hook).await;
        world.enrol(&service, false).await;
        let mut source = world.connect(&service, 0).await;
        source.apply(1, &Batch::new().root().file(2, ROOT, "a", b"alpha")).await;
        let stage = Self { world, service };
        stage.fill(&mut source).await;
        stage
    }

    /// Sends what will be kept, and waits until it is staged.
    async fn fill(&self, source: &mut FakeSource) {
        source.packs(2, &Batch::new().file(SMALL, ROOT, "small", b"small content").packs).await;
        source.data.write(&begin(1, LARGE, 90_000)).await.unwrap();
        let frame = pieces(TransferId(1), vec![data(1), data(2), data(3)]);
        source.data.write(&frame).await.unwrap();
        let arriving = || self.service.list().remove(0).destination.unwrap().arriving;
        while arriving().first().is_none_or(|one| one.bytes < 60_000) {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    async fn session(&self) -> FakeSource {
        self.world.connect(&self.service, 1).await
    }

    /// Another process, as far as the destination can tell.
    async fn restart(mut self) -> Self {
        self.service.shutdown().await;
        drop(self.service);
        self.service = self.world.open(None).await;
        self
    }

    async fn chunks(source: &mut FakeSource, object: u8) -> Vec<KeptChunk> {
        source.writer.write(&SourceMessage::AskKept { object: id(object) }).await.unwrap();
        match source.next().await {
            DestinationMessage::KeptChunks { object: of, chunks, last: true, .. } => {
                assert_eq!(of, id(object));
                chunks
            }
            other => panic!("{other:?}"),
        }
    }

    /// Names in staging.
    fn staging(&self) -> Vec<PathBuf> {
        let hidden = self.world.replica.join(format!(".replicator-{}", self.world.source));
        let shards = std::fs::read_dir(hidden.join("staging")).unwrap();
        let files = shards.flat_map(|shard| std::fs::read_dir(shard.unwrap().path()).unwrap());
        files.map(|file| file.unwrap().path()).collect()
    }

    fn staged(&self, kind: char) -> PathBuf {
        let is = |path: &PathBuf| path.file_name().unwrap().to_str().unwrap().starts_with(kind);
        self.staging().into_iter().find(is).unwrap()
    }

    async fn end(self) {
        self.service.delete(&self.world.source, DeletionMode::LocalConfigurationOnly).unwrap();
    }
}

async fn refused(mut source: FakeSource, because: &str) {
    match source.next().await {
        DestinationMessage::Refused(refusal) => {
            assert!(refusal.to_string().contains(because), "{refusal}");
        }
        other => panic!("{other:?}"),
    }
}

/// A batch whose content was staged before this session, with one chunk that
/// was not and one that moved.
async fn use_kept(stage: &Stage, in_place: bool) {
    let mut source = stage.session().await;
    let hash = Hash::of(b"small content");
    let told = source.told().await;
    assert_eq!(told, (vec![KeptObject { object: id(SMALL), hash }], vec![id(LARGE)]));
    let offer = Stage::chunks(&mut source, LARGE).await;
    let hashes: Vec<Hash> = offer.iter().map(|kept| kept.chunk.hash).collect();
    assert_eq!(hashes, [1, 2, 3].map(|tag| Hash::of(&chunk(tag))));

    let tags = if in_place { [1, 3, 4, 2] } else { [4, 1, 2, 3] };
    let content: Vec<u8> = tags.iter().flat_map(|tag| chunk(*tag)).collect();
    source.data.write(&again(b"small content")).await.unwrap();
    source.data.write(&begin(7, LARGE, content.len() as u64)).await.unwrap();
    let transfer = TransferId(7);
    source.data.write(&DataFrame::TransferReuse { transfer, in_place }).await.unwrap();
    let of = |tag: &u8| match tag {
        // What stood there is overwritten by then.
        2 if in_place => data(2),
        1..=3 => kept(&offer[usize::from(*tag) - 1]),
        other => data(*other),
    };
    let parts = tags.iter().map(of).collect();
    source.data.write(&pieces(transfer, parts)).await.unwrap();
    let size = content.len() as u64;
    let state = state(Kind::File, 0o640, size);
    source.data.write(&DataFrame::TransferEnd { transfer, state }).await.unwrap();
    let mut batch = Batch::new()
        .directory(ROOT)
        .op(put(ContentSource::Packed { version: 1 }, SMALL, 0o604, 13))
        .entry(ROOT, "small", None, Some(SMALL))
        .op(put(ContentSource::Transferred { transfer }, LARGE, 0o640, size))
        .entry(ROOT, "large", None, Some(LARGE));
    source.plan(2, &batch.ops).await;
    batch.packs = Batch::new().file(SMALL, ROOT, "small", b"").packs;
    source.commit(2, &batch).await;
    while !matches!(source.next().await, DestinationMessage::Applied { .. }) {}
    assert_eq!(std::fs::read(stage.world.replica.join("large")).unwrap(), content);
    // With the attributes of now, not those that it was staged with.
    assert_eq!(stage.world.tree()["small"], "file 604 1234 1 small content");
    tokio::time::sleep(Duration::from_secs(3)).await;
    assert_eq!(stage.staging(), Vec::<PathBuf>::new(), "nothing is left behind");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_staged_serves_the_next_session() {
    let stage = Stage::set(None).await;
    use_kept(&stage, false).await;
    stage.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_another_process_staged_serves_in_place() {
    let stage = Stage::set(None).await.restart().await;
    use_kept(&stage, true).await;
    stage.end().await;
}

/// As a power loss leaves it: names and records are there, bytes are not.
#[tokio::test(flavor = "multi_thread")]
async fn what_does_not_read_back_is_not_told() {
    let stage = Stage::set(None).await;
    stage.service.shutdown().await;
    let beneath = Protection::establish(&stage.world.replica).unwrap();
    for (path, at) in [(stage.staged('t'), 25_000), (stage.staged('p'), 3)] {
        let inside = path.strip_prefix(&stage.world.replica).unwrap();
        let mut directory = place::reopen(beneath.root(), rustix_flags()).unwrap();
        let parent = inside.parent().unwrap();
        for part in parent {
            let part = common::name(part.to_str().unwrap());
            directory = place::open_directory(std::os::fd::AsFd::as_fd(&directory), &part).unwrap();
        }
        let name = common::name(inside.file_name().unwrap().to_str().unwrap());
        let fd = std::os::fd::AsFd::as_fd(&directory);
        let file = place::open_file(fd, &name, rustix::fs::OFlags::RDWR).unwrap();
        place::write_at(&file, &[0xff; 4], at).unwrap();
    }
    drop(beneath);
    let stage = stage.restart().await;
    let mut source = stage.session().await;
    let (packed, large) = source.told().await;
    // What it is is told; not what it was said to be.
    assert_ne!(packed[0].hash, Hash::of(b"small content"));
    assert_eq!(large, [id(LARGE)]);
    let offer = Stage::chunks(&mut source, LARGE).await;
    let hashes: Vec<Hash> = offer.iter().map(|kept| kept.chunk.hash).collect();
    assert_eq!(hashes, [1, 3].map(|tag| Hash::of(&chunk(tag))));
    source.data.write(&again(b"small content")).await.unwrap();
    refused(source, "was not kept").await;
    stage.end().await;
}

fn rustix_flags() -> rustix::fs::OFlags {
    rustix::fs::OFlags::RDONLY | rustix::fs::OFlags::DIRECTORY
}

/// A sync that failed tells its error once; what was staged by then may read
/// back from memory and be nowhere else (trap 16).
#[tokio::test(flavor = "multi_thread")]
async fn trap_16_nothing_is_kept_after_a_failed_sync() {
    let armed = Arc::new(AtomicBool::new(false));
    let fails = armed.clone();
    let hook: Hook = Arc::new(move |at| at == Point::Sync && fails.swap(false, Ordering::SeqCst));
    let stage = Stage::set(Some(hook)).await;
    let mut source = stage.session().await;
    source.told().await;
    stage.fill(&mut source).await;
    armed.store(true, Ordering::SeqCst);
    source.send(2, &Batch::new().directory(ROOT).file(9, ROOT, "b", b"beta")).await;
    refused(source, "synced").await;
    let mut source = stage.session().await;
    assert_eq!(source.told().await, (vec![], vec![]));
    stage.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn lies_about_what_was_kept_are_refused() {
    let stage = Stage::set(None).await;
    // Content that is not what is there, and the same content twice.
    let mut source = stage.session().await;
    source.told().await;
    source.data.write(&again(b"other content")).await.unwrap();
    refused(source, "was not kept").await;
    let mut source = stage.session().await;
    source.told().await;
    source.data.write(&again(b"small content")).await.unwrap();
    source.data.write(&again(b"small content")).await.unwrap();
    refused(source, "was not kept").await;

    // Nothing was kept of this object, or it was not said to serve.
    for reuse in [true, false] {
        let mut source = stage.session().await;
        source.told().await;
        let transfer = TransferId(1);
        source.data.write(&begin(1, 77, 90_000)).await.unwrap();
        if reuse {
            let frame = DataFrame::TransferReuse { transfer, in_place: true };
            source.data.write(&frame).await.unwrap();
            let said = source.next().await;
            assert!(matches!(said, DestinationMessage::TransferRefused { .. }), "{said:?}");
        } else {
            let piece = Piece::Kept { from: 0, length: 9, hash: Hash::of(b"x") };
            let frame = pieces(transfer, vec![plain(piece)]);
            source.data.write(&frame).await.unwrap();
            refused(source, "not kept for it").await;
        }
    }

    // Bytes that are not what their hash says, or beyond what is there.
    let transfer = TransferId(1);
    let lies = [(20_001, 20_002, Hash::of(b"a lie")), (u64::MAX - 4, 9, Hash::of(b"x"))];
    for (from, length, hash) in lies {
        let mut source = stage.session().await;
        if source.told().await.1.is_empty() {
            stage.fill(&mut source).await;
            drop(source);
            source = stage.session().await;
            source.told().await;
        }
        source.data.write(&begin(1, LARGE, 90_000)).await.unwrap();
        let frame = DataFrame::TransferReuse { transfer, in_place: false };
        source.data.write(&frame).await.unwrap();
        let piece = Piece::Kept { from, length, hash };
        source.data.write(&pieces(transfer, vec![plain(piece)])).await.unwrap();
        match source.next().await {
            DestinationMessage::TransferRefused { .. } | DestinationMessage::Refused(_) => {}
            other => panic!("{other:?}"),
        }
    }
    stage.end().await;
}

/// Of no use to the source: removed. Before that, a failover sets it aside.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_released_is_removed_and_what_is_not_is_in_lost_and_found() {
    let stage = Stage::set(None).await;
    let mut source = stage.session().await;
    source.told().await;
    assert_eq!(stage.staging().len(), 3, "{:?}", stage.staging());
    let release = SourceMessage::Release { packed: true, transfers: vec![id(LARGE)] };
    source.writer.write(&release).await.unwrap();
    while !stage.staging().is_empty() {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    stage.fill(&mut source).await;
    drop(source);
    let mut source = stage.session().await;
    source.told().await;
    let report =
        stage.service.delete(&stage.world.source, DeletionMode::LocalConfigurationOnly).unwrap();
    let directory = stage.world.replica.join(report.lost_and_found.unwrap());
    let text = std::fs::read(directory.join("manifest.json")).unwrap();
    let manifest: Manifest = serde_json::from_slice(&text).unwrap();
    let kinds: Vec<_> = manifest.items.iter().map(|item| item.kind.as_str()).collect();
    assert!(kinds.contains(&"file") && kinds.contains(&"partial file"), "{kinds:?}");
    assert_eq!(kinds.len(), 2, "{kinds:?}");
    for item in &manifest.items {
        let bytes = std::fs::read(directory.join(&item.file)).unwrap();
        assert!(bytes == b"small content" || bytes == [chunk(1), chunk(2), chunk(3)].concat());
    }
}
