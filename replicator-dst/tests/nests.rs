//! Nests: the files of a new directory are staged as neighbours, and the directory
//! comes to be by one rename; but only when nothing else stands there.

#![allow(clippy::unwrap_used)]

mod common;

use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::time::Duration;

use common::{Batch, FakeSource, ROOT, World, frame_of, id, name};
use replicator_common::control::{Control, DeletionMode};
use replicator_common::id::BatchId;
use replicator_common::wire::{DataFrame, PackRun, SourceMessage};
use replicator_dst::failover::Manifest;
use replicator_dst::service::DestinationService;

const D: u8 = 10;

struct Stage {
    world: World,
    service: DestinationService,
    source: FakeSource,
}

/// A directory and two files in it.
fn tree() -> Batch {
    Batch::new().mkdir(D, ROOT, "d").file(11, D, "f", b"eff").file(12, D, "g", b"gee")
}

/// Packs of some of a batch's files, with these names for them.
fn placed(batch: &Batch, names: &[&str]) -> DataFrame<'static> {
    let names: Vec<_> = names.iter().map(|text| name(text)).collect();
    frame_of(BatchId(2), vec![PackRun { directory: id(D), names }], &batch.packs)
}

impl Stage {
    async fn set(by_path: bool) -> Self {
        let mut world = World::new();
        world.by_path = by_path;
        let service = world.open(None).await;
        world.enrol(&service, false).await;
        let mut source = world.connect(&service, 0).await;
        source.apply(1, &Batch::new().root().file(2, ROOT, "a", b"alpha")).await;
        Self { world, service, source }
    }

    fn staging(&self) -> Vec<PathBuf> {
        let hidden = self.world.replica.join(format!(".replicator-{}/staging", self.world.source));
        let shards = std::fs::read_dir(hidden).unwrap().map(|shard| shard.unwrap().path());
        let mut names: Vec<_> = shards
            .flat_map(|shard| std::fs::read_dir(shard).unwrap().map(|name| name.unwrap().path()))
            .collect();
        names.sort();
        names
    }

    fn nests(&self) -> Vec<PathBuf> {
        let is_nest = |path: &PathBuf| path.file_name().unwrap().as_encoded_bytes()[0] == b'n';
        self.staging().into_iter().filter(is_nest).collect()
    }

    /// Waits until so many files stand in staging, in nests or not.
    async fn staged(&self, count: usize) {
        for _ in 0..1000 {
            let files = |path: &PathBuf| match std::fs::read_dir(path) {
                Ok(names) => names.count(),
                Err(_) => {
                    let name = path.file_name().unwrap().to_str().unwrap();
                    usize::from(name.starts_with('p') && !name.starts_with("plan."))
                }
            };
            if self.staging().iter().map(files).sum::<usize>() == count {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("not staged: {:?}", self.staging());
    }

    async fn finish(&mut self, batch: &Batch) {
        self.source.plan(2, &batch.ops).await;
        self.source.commit(2, batch).await;
        loop {
            use replicator_common::wire::DestinationMessage::{Applied, Durable};
            match self.source.next().await {
                Applied { .. } => return,
                Durable { .. } => {}
                other => panic!("{other:?}"),
            }
        }
    }

    fn read(&self, path: &str) -> String {
        std::fs::read_to_string(self.world.replica.join(path)).unwrap()
    }

    fn names(&self, path: &str) -> Vec<String> {
        let names = std::fs::read_dir(self.world.replica.join(path)).unwrap();
        let mut names: Vec<_> =
            names.map(|name| name.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }
}

/// The nest itself becomes the directory.
#[tokio::test(flavor = "multi_thread")]
async fn a_nest_becomes_the_directory() {
    for by_path in [false, true] {
        let mut stage = Stage::set(by_path).await;
        let batch = tree();
        stage.source.data.write(&batch.frame(BatchId(2))).await.unwrap();
        stage.staged(2).await;
        let nests = stage.nests();
        assert_eq!(nests.len(), 1, "{nests:?}");
        let inode = std::fs::metadata(&nests[0]).unwrap().ino();
        stage.finish(&batch).await;
        let directory = std::fs::metadata(stage.world.replica.join("d")).unwrap();
        assert_eq!((directory.ino(), directory.mode() & 0o777), (inode, 0o750));
        assert_eq!((stage.read("d/f"), stage.read("d/g")), ("eff".to_owned(), "gee".to_owned()));
        assert_eq!(stage.names("d"), ["f", "g"]);
        // The end of a batch is told before its last traces are gone.
        stage.source.apply(3, &Batch::new().directory(ROOT)).await;
        assert_eq!(stage.staging(), Vec::<PathBuf>::new());
    }
}

/// Names that mean something in staging mean nothing in a nest.
#[tokio::test(flavor = "multi_thread")]
async fn users_may_call_files_as_staging_does() {
    let names = ["t1", "r1", "l1", "plan.2.1", "p2.1.00", "n2.1.00", "i2.1"];
    for adopted in [true, false] {
        let mut stage = Stage::set(false).await;
        let mut batch = Batch::new().mkdir(D, ROOT, "d");
        for (n, name) in (20..).zip(names) {
            batch = batch.file(n, D, name, name.as_bytes());
        }
        stage.source.data.write(&batch.frame(BatchId(2))).await.unwrap();
        if !adopted {
            let other = Batch::new().content(13, b"other", true, 1);
            stage.source.data.write(&placed(&other, &["other"])).await.unwrap();
            stage.staged(names.len() + 1).await;
        }
        stage.finish(&batch).await;
        let mut wanted: Vec<_> = names.map(str::to_owned).to_vec();
        wanted.sort();
        assert_eq!(stage.names("d"), wanted, "adopted {adopted}");
        assert!(names.iter().all(|name| stage.read(&format!("d/{name}")) == *name));
    }
}

/// What is said of places is a hint: the plan counts.
#[tokio::test(flavor = "multi_thread")]
async fn a_nest_with_anything_else_in_it_is_not_used() {
    for by_path in [false, true] {
        let mut stage = Stage::set(by_path).await;
        // Another name than the plan has.
        stage.source.data.write(&placed(&tree(), &["f", "other"])).await.unwrap();
        stage.staged(2).await;
        stage.finish(&tree()).await;
        assert_eq!(stage.names("d"), ["f", "g"]);
        assert_eq!((stage.read("d/f"), stage.read("d/g")), ("eff".to_owned(), "gee".to_owned()));
        stage.source.apply(3, &Batch::new().directory(ROOT)).await;
        assert_eq!(stage.nests(), Vec::<PathBuf>::new());
    }
}

/// An earlier reading of a file stands in the nest, the one that counts beside it.
#[tokio::test(flavor = "multi_thread")]
async fn an_earlier_reading_in_a_nest_is_gone_when_it_becomes_the_directory() {
    let mut stage = Stage::set(false).await;
    let (first, second) = (tree(), tree().reread());
    stage.source.data.write(&first.frame(BatchId(2))).await.unwrap();
    stage.source.data.write(&second.frame(BatchId(2))).await.unwrap();
    stage.staged(4).await;
    stage.finish(&second).await;
    assert_eq!(stage.names("d"), ["f", "g"]);
    assert_eq!((stage.read("d/f"), stage.read("d/g")), ("eff".to_owned(), "gee".to_owned()));
}

/// What comes for a batch that is sealed is put nowhere where it can be seen.
#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_put_into_a_nest_that_became_a_directory() {
    let mut stage = Stage::set(false).await;
    let batch = tree();
    stage.source.data.write(&batch.frame(BatchId(2))).await.unwrap();
    stage.finish(&batch).await;
    let late = Batch::new().content(13, b"late", true, 1);
    stage.source.data.write(&placed(&late, &["late"])).await.unwrap();
    // On the same stream behind it: it was staged when this is.
    let next = Batch::new().directory(ROOT).file(14, ROOT, "b", b"beta");
    stage.source.apply(3, &next).await;
    assert_eq!(stage.names("d"), ["f", "g"]);
    assert_eq!(stage.nests(), Vec::<PathBuf>::new());
}

/// The batch never comes: the files are handed over, and the manifest says what
/// they were to be called.
#[tokio::test(flavor = "multi_thread")]
async fn what_stands_in_nests_is_handed_over_at_failover() {
    let mut stage = Stage::set(false).await;
    let batch = tree();
    stage.source.data.write(&batch.frame(BatchId(2))).await.unwrap();
    stage.source.plan(2, &batch.ops).await;
    stage.staged(2).await;
    // Answered behind the plan.
    stage.source.writer.write(&SourceMessage::AskKept { object: id(99) }).await.unwrap();
    stage.source.next().await;
    let report =
        stage.service.delete(&stage.world.source, DeletionMode::LocalConfigurationOnly).unwrap();
    let lost = stage.world.replica.join(report.lost_and_found.unwrap());
    let text = std::fs::read(lost.join("manifest.json")).unwrap();
    let manifest: Manifest = serde_json::from_slice(&text).unwrap();
    let mut found: Vec<_> = manifest
        .items
        .iter()
        .map(|item| {
            let content = std::fs::read_to_string(lost.join(&item.file)).unwrap();
            (item.kind.clone(), item.paths.clone(), content)
        })
        .collect();
    found.sort();
    let item =
        |path: &str, content: &str| ("file".to_owned(), vec![path.to_owned()], content.to_owned());
    assert_eq!(found, [item("d/f", "eff"), item("d/g", "gee")]);
}

/// The session ends: the next is told what stands in nests, and it is used.
#[tokio::test(flavor = "multi_thread")]
async fn what_stands_in_nests_serves_the_next_session() {
    let mut stage = Stage::set(false).await;
    stage.source.data.write(&tree().frame(BatchId(2))).await.unwrap();
    stage.staged(2).await;
    stage.source = stage.world.connect(&stage.service, 1).await;
    let (packed, _) = stage.source.told().await;
    let mut kept: Vec<_> = packed.into_iter().map(|kept| kept.object).collect();
    kept.sort();
    assert_eq!(kept, [id(11), id(12)]);
    assert_eq!(stage.nests(), Vec::<PathBuf>::new());
}

/// A source that names more places than objects breaks the protocol.
#[tokio::test(flavor = "multi_thread")]
async fn a_pack_with_more_names_than_objects_ends_the_session() {
    let mut stage = Stage::set(false).await;
    stage.source.data.write(&placed(&tree(), &["f", "g", "h"])).await.unwrap();
    loop {
        match stage.source.heard().await {
            Some(replicator_common::wire::DestinationMessage::Refused(refusal)) => {
                assert!(refusal.to_string().contains("more names than objects"), "{refusal}");
                return;
            }
            Some(_) => {}
            None => panic!("no word of why"),
        }
    }
}
