//! A source that is pinned, and lies. Whatever it says ends in a refusal that
//! says why, nothing outside the replica changes, and an honest session follows.

#![allow(clippy::unwrap_used)]

mod common;

use std::os::fd::AsFd;
use std::path::PathBuf;
use std::time::Duration;

use common::{Batch, FakeSource, ROOT, World, data, id, name, pieces, plain, state};
use replicator_common::control::{Control, DeletionMode};
use replicator_common::describe::{
    ASKED_MAX, BLOCK_HASH, Describe, Description, EntriesSeen, RANGE_MAX, RangeSeen,
};
use replicator_common::id::{BatchId, FileSystemId, ObjectId, TransferId};
use replicator_common::name::Name;
use replicator_common::net::enrol::{self, EnrolRequest};
use replicator_common::net::frame::{Compression, encode_frame};
use replicator_common::net::identity::Identity;
use replicator_common::object::Kind;
use replicator_common::sys::{handle, place};
use replicator_common::time::Timestamp;
use replicator_common::wire::{
    ContentSource, DataFrame, DestinationMessage, FRAME_MAX, Hash, Layout, Op, PIECE_MAX, Piece,
    SourceMessage, TransferBegin,
};
use replicator_dst::readonly::Protection;
use replicator_dst::service::DestinationService;

/// A replica with one batch in it, and beside it what must not change.
struct Stage {
    world: World,
    service: DestinationService,
    victim: PathBuf,
}

impl Stage {
    async fn set(by_path: bool) -> Self {
        let mut world = World { by_path, ..World::new() };
        let victim = world.base.path().join("victim");
        std::fs::create_dir(&victim).unwrap();
        std::fs::write(victim.join("file"), "untouched").unwrap();
        let service = world.open(None).await;
        world.enrol(&service, false).await;
        let link = Op::Put {
            object: id(3),
            state: state(Kind::Symlink, 0o777, 0),
            content: ContentSource::Symlink {
                target: victim.as_os_str().as_encoded_bytes().into(),
            },
            new: true,
            links: 1,
        };
        let batch = Batch::new()
            .root()
            .mkdir(1, ROOT, "dir")
            .file(2, ROOT, "file", b"content")
            .op(link)
            .entry(ROOT, "link", None, Some(3));
        world.connect(&service, 0).await.apply(1, &batch).await;
        Self { world, service, victim }
    }

    async fn session(&self) -> FakeSource {
        self.world.connect(&self.service, 1).await
    }

    fn victim_is_well(&self) {
        use std::os::unix::fs::MetadataExt;
        let names: Vec<_> = std::fs::read_dir(&self.victim).unwrap().collect();
        assert_eq!(names.len(), 1, "{names:?}");
        let file = self.victim.join("file");
        assert_eq!(std::fs::read(&file).unwrap(), b"untouched");
        assert_eq!(file.metadata().unwrap().uid(), self.victim.metadata().unwrap().uid());
        assert_eq!(std::fs::read_dir(self.world.base.path()).unwrap().count(), 3);
    }

    /// An honest session after all that.
    async fn end(self) {
        self.victim_is_well();
        let mut source = self.session().await;
        assert_eq!(source.hello.as_ref().unwrap().committed.batch, BatchId(1));
        let tree = self.world.tree();
        assert_eq!(tree.keys().collect::<Vec<_>>(), ["dir", "file", "link"]);
        source.apply(2, &Batch::new().directory(1).file(9, 1, "honest", b"x")).await;
        assert_eq!(std::fs::read(self.world.replica.join("dir/honest")).unwrap(), b"x");
        self.service.delete(&self.world.source, DeletionMode::LocalConfigurationOnly).unwrap();
        self.victim_is_well();
    }
}

/// The destination refuses, for this reason.
async fn refused(mut source: FakeSource, because: &str) {
    let refusal = async {
        loop {
            match source.next().await {
                DestinationMessage::Refused(refusal) => return refusal.to_string(),
                DestinationMessage::Transferred { .. } => {}
                other => panic!("{because}: {other:?}"),
            }
        }
    };
    let said = tokio::time::timeout(Duration::from_secs(10), refusal).await.expect(because);
    assert!(said.starts_with("protocol error") && said.contains(because), "{because}: {said}");
}

/// A message with a name in it that no [`Name`] can hold.
fn with_name(bad: &[u8]) -> Vec<u8> {
    let stand_in = vec![0xa7; bad.len()];
    let op = Op::Entry {
        directory: id(ROOT),
        name: Name::new(&stand_in).unwrap(),
        old: None,
        new: Some(id(2)),
    };
    let message = SourceMessage::Plan { batch: BatchId(2), ops: vec![op] };
    let mut frame = encode_frame(&message, Compression::Never).unwrap();
    let at = frame.windows(bad.len()).position(|window| window == stand_in).unwrap();
    frame[at..at + bad.len()].copy_from_slice(bad);
    frame
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_no_message_is_refused() {
    let stage = Stage::set(false).await;
    let oversized = [(FRAME_MAX as u32 + 1).to_le_bytes().as_slice(), &[0]].concat();
    let swelling = [&[9, 0, 0, 0, 1], u32::MAX.to_le_bytes().as_slice(), &[0; 9]].concat();
    // Its beginning alone may be that long, but not with what follows.
    let [length, raw, packed] = [1004, FRAME_MAX as u32, 4].map(u32::to_le_bytes);
    let heavy = [&length[..], &[2], &raw, &packed].concat();
    let garbage = [[7, 0, 0, 0, 0].as_slice(), b"garbage"].concat();
    for (bytes, because) in [
        (&oversized, "the limit is"),
        (&swelling, "the limit is"),
        (&heavy, "the limit is"),
        (&garbage, "decode"),
        (&vec![1, 0, 0, 0, 0xfe], "unknown flags"),
    ] {
        let mut source = stage.session().await;
        source.writer.write_encoded(bytes).await.unwrap();
        refused(source, because).await;
        let mut source = stage.session().await;
        source.data.write_encoded(bytes).await.unwrap();
        refused(source, because).await;
    }
    stage.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_name_that_leads_away_is_refused() {
    let stage = Stage::set(false).await;
    for bad in [b"..".as_slice(), b".", b"../victim/x", b"/etc/x", b"dir/x", b"nul\0x"] {
        let mut source = stage.session().await;
        source.writer.write_encoded(&with_name(bad)).await.unwrap();
        refused(source, "not a valid entry name").await;
    }
    // What the stand-in's frame says is understood but for the name.
    let good = with_name(b"good");
    assert!(replicator_common::net::frame::decode_frame::<SourceMessage>(&good).is_ok());
    stage.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_out_of_turn_or_not_what_it_claims_is_refused() {
    let stage = Stage::set(false).await;
    let mut source = stage.session().await;
    source.packs(1000, &Batch::new().file(5, ROOT, "x", b"x").packs).await;
    refused(source, "too far ahead").await;

    let mut source = stage.session().await;
    source.commit(3, &Batch::new()).await;
    refused(source, "out of order").await;

    let mut source = stage.session().await;
    let mut batch = Batch::new().file(5, ROOT, "x", b"what was read");
    batch.packs[0].bytes[0] ^= 1;
    source.packs(2, &batch.packs).await;
    refused(source, "wrong hash").await;

    for (object, other) in [(b"x" as &[u8], b"xy" as &[u8]), (b"xy", b"x")] {
        let mut source = stage.session().await;
        let mut batch = Batch::new().file(5, ROOT, "x", object);
        batch.packs[0].bytes = other.to_vec();
        source.packs(2, &batch.packs).await;
        refused(source, "more bytes than it tells of, or fewer").await;
    }

    let mut source = stage.session().await;
    let transfer = TransferId(1);
    let begin = DataFrame::TransferBegin(TransferBegin {
        transfer,
        object: id(2),
        state: state(Kind::File, 0o600, 0),
        layout: Layout::Replace,
        basis: Some(id(2)),
        basis_version: BatchId(1),
    });
    source.data.write(&begin).await.unwrap();
    let piece = Piece::Copy { from: u64::MAX - 1, length: 9 };
    source.data.write(&pieces(transfer, vec![plain(piece)])).await.unwrap();
    refused(source, "copies nothing").await;

    // Pieces that say other than their bytes.
    let (whole, words) = (data(*b"what was read"), "more bytes than it tells of, or fewer");
    let (hash, long) = (Hash::of(b"what was read"), PIECE_MAX as u32 + 1);
    let lies = [
        (Piece::Data { hash, length: 12 }, whole.1.clone(), words),
        (Piece::Data { hash, length: 14 }, whole.1.clone(), words),
        (Piece::Copy { from: 0, length: 5 }, whole.1.clone(), words),
        (Piece::Data { hash, length: long }, vec![0; long as usize], "too long"),
        (Piece::Data { hash: Hash::of(b"a lie"), length: 13 }, whole.1, "wrong hash"),
    ];
    for (piece, bytes, words) in lies {
        let mut source = stage.session().await;
        source.data.write(&begin).await.unwrap();
        source.data.write(&pieces(transfer, vec![(piece, bytes)])).await.unwrap();
        refused(source, words).await;
    }

    let mut source = stage.session().await;
    source.send(2, &Batch::new().file(5, 3, "through-the-link", b"x")).await;
    refused(source, "is no directory").await;
    stage.end().await;
}

/// Verification lets a source ask: of the replica alone, and so much at a time.
#[tokio::test(flavor = "multi_thread")]
async fn a_question_that_asks_too_much_is_refused() {
    let stage = Stage::set(false).await;
    let ask = |question| SourceMessage::Describe(Box::new(question));
    let range = |offset, length| ask(Describe::Range { object: id(2), offset, length });
    let mut source = stage.session().await;
    source.writer.write(&range(0, RANGE_MAX + 1)).await.unwrap();
    refused(source, "the limit is").await;
    let mut source = stage.session().await;
    let many = vec![(id(2), true); ASKED_MAX + 1];
    source.writer.write(&ask(Describe::Objects(many))).await.unwrap();
    refused(source, "the limit is").await;

    let blocks = |object, version, runs| {
        ask(Describe::Blocks { object: id(object), version: BatchId(version), runs })
    };
    let most = RANGE_MAX as u32;
    for runs in [vec![(0, most), (0, 1)], vec![(0, 0); ASKED_MAX + 1]] {
        let mut source = stage.session().await;
        source.writer.write(&blocks(2, 1, runs)).await.unwrap();
        refused(source, "the limit is").await;
    }
    // Of another version, of what is no file, beyond the end: nothing is said.
    let mut source = stage.session().await;
    for (object, version, run) in
        [(2, 2, (0, 1)), (2, 0, (0, 1)), (3, 1, (0, 1)), (9, 1, (0, 1)), (2, 1, (u64::MAX - 5, 9))]
    {
        source.writer.write(&blocks(object, version, vec![run])).await.unwrap();
        assert_eq!(described(&mut source).await, Description::Blocks(None), "{object} {version}");
    }
    source.writer.write(&blocks(2, 1, vec![(0, 1), (0, 0)])).await.unwrap();
    let Description::Blocks(Some(hashes)) = described(&mut source).await else {
        panic!("the file can be read")
    };
    assert_eq!(hashes.len(), BLOCK_HASH);

    // The replica's own objects by its own map: no handle, and no link, leads on.
    let mut source = stage.session().await;
    source.writer.write(&range(u64::MAX - 5, RANGE_MAX)).await.unwrap();
    let past_the_end = described(&mut source).await;
    assert!(
        matches!(past_the_end, Description::Range(RangeSeen::Unreadable(_))),
        "{past_the_end:?}"
    );
    let link = Describe::Range { object: id(3), offset: 0, length: 9 };
    source.writer.write(&ask(link)).await.unwrap();
    let through = described(&mut source).await;
    assert!(!matches!(through, Description::Range(RangeSeen::Read { .. })), "{through:?}");
    let directory = id(ROOT);
    let question =
        Describe::Entries { directory, after: None, until: None, expected: vec![], list: true };
    source.writer.write(&ask(question)).await.unwrap();
    let Description::Entries(EntriesSeen::Read { extra, .. }) = described(&mut source).await else {
        panic!("the root can be read")
    };
    let names: Vec<_> = extra.iter().map(|extra| extra.name.to_string()).collect();
    assert_eq!(names, ["dir", "file", "link"], "our own directories are nobody's matter");
    stage.end().await;
}

async fn described(source: &mut FakeSource) -> Description {
    loop {
        if let DestinationMessage::Described(description) = source.next().await {
            return *description;
        }
    }
}

fn adopt(object: u8, handle: ObjectId, directory: u8, text: &str, kind: Kind) -> Op {
    Op::Adopt { object: id(object), handle, directory: id(directory), name: name(text), kind }
}

/// A handle names any object of the file system: what is adopted is looked for
/// where it is said to stand.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_the_replicas_cannot_be_adopted() {
    for by_path in [false, true] {
        let stage = Stage::set(by_path).await;
        let identify = |path: PathBuf| {
            handle::identify(place::open_directory_path(&path).unwrap().as_fd()).unwrap()
        };
        let file = std::fs::File::open(stage.victim.join("file")).unwrap();
        let file = handle::identify(file.as_fd()).unwrap();
        let directory = identify(stage.victim.clone());
        let link = std::fs::symlink_metadata(stage.world.replica.join("link")).unwrap();
        assert!(link.is_symlink());
        let hidden = format!(".replicator-{}", stage.world.source);
        let own = identify(stage.world.replica.join(&hidden));
        let dir = identify(stage.world.replica.join("dir"));
        let lies = [
            (vec![adopt(5, file.clone(), ROOT, "file", Kind::File)], "does not stand"),
            (vec![adopt(5, file.clone(), ROOT, "victim", Kind::File)], "does not stand"),
            // One that is adopted from another that is as little the replica's.
            (
                vec![
                    adopt(6, directory, ROOT, "link", Kind::Directory),
                    adopt(5, file, 6, "file", Kind::File),
                ],
                "does not stand",
            ),
            (vec![adopt(5, own, ROOT, &hidden, Kind::Directory)], "destination's own"),
            (vec![adopt(5, dir, ROOT, "dir", Kind::File)], "not of the kind"),
        ];
        for (ops, because) in lies {
            let mut source = stage.session().await;
            let mut batch = Batch { ops, packs: Vec::new() };
            if because != "destination's own" {
                batch = batch.content(5, b"written outside", false, 1);
            }
            source.send(2, &batch).await;
            refused(source, because).await;
            stage.victim_is_well();
        }
        stage.end().await;
    }
}

/// An owner that nobody can be is no owner; it is counted, and ends nothing.
#[tokio::test(flavor = "multi_thread")]
async fn an_impossible_owner_is_a_shortfall() {
    let stage = Stage::set(false).await;
    let mut batch = Batch::new().directory(ROOT).file(5, ROOT, "x", b"x");
    batch.packs[0].packed.state.attributes.uid = u32::MAX;
    stage.session().await.apply(2, &batch).await;
    let status = stage.service.list().remove(0).destination.unwrap();
    assert_eq!(status.shortfalls.ownership, 1);
    stage.service.delete(&stage.world.source, DeletionMode::LocalConfigurationOnly).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_that_was_used_lets_nobody_else_in() {
    let stage = Stage::set(false).await;
    let (world, service) = (&stage.world, &stage.service);
    // The door is open, for somebody else.
    let other = world.base.path().join("replica/../other");
    let _open = service.token(&other, Duration::from_secs(60), false).unwrap();
    let request = EnrolRequest {
        secret: world.token.as_ref().unwrap().secret,
        source: FileSystemId::random(),
        source_region: "xx-there-2".to_owned(),
        creation_time: Timestamp::now(),
        devices: false,
    };
    let stranger = Identity::ephemeral().unwrap();
    let token = world.token.as_ref().unwrap();
    let answer = enrol::enrol(&stranger, token, &request).await;
    assert!(answer.is_err(), "{answer:?}");
    assert_eq!(service.list().len(), 1);
    let _ = std::fs::remove_dir(world.base.path().join("other"));
    stage.end().await;
}

/// Somebody reaches beneath the mount and puts a link where a directory was.
#[tokio::test(flavor = "multi_thread")]
async fn a_link_in_place_of_a_directory_is_not_followed() {
    for by_path in [false, true] {
        let stage = Stage::set(by_path).await;
        let mut source = stage.session().await;
        let beneath = Protection::establish(&stage.world.replica).unwrap();
        let root = beneath.root();
        place::remove_directory(root, &name("dir")).unwrap();
        let target = stage.victim.as_os_str().as_encoded_bytes();
        place::make_symlink(target, root, &name("dir")).unwrap();
        drop(beneath);
        // Into it, over what stands there, and away with it.
        let batch = Batch::new().directory(1).file(5, 1, "file", b"followed").mkdir(6, 1, "sub");
        source.send(2, &batch).await;
        loop {
            match source.next().await {
                DestinationMessage::Durable { .. } => {}
                DestinationMessage::Refused(refusal) => {
                    assert!(refusal.to_string().contains("reconciled"), "{refusal}");
                    break;
                }
                other => panic!("{other:?}"),
            }
        }
        stage.victim_is_well();
        let source = stage.session().await;
        assert!(source.hello.as_ref().unwrap().reconcile);
        stage.service.delete(&stage.world.source, DeletionMode::LocalConfigurationOnly).unwrap();
        stage.victim_is_well();
    }
}
