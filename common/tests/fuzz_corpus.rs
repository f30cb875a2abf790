//! Replays the corpus of the fuzz target `frame`, and mutations of it, on
//! stable Rust. `WRITE_CORPUS=1` writes the seeds below anew.

#![allow(clippy::unwrap_used)]

use std::borrow::Cow;
use std::path::Path;
use std::time::Duration;

use bytes::Bytes;
use replicator_common::chunk::Chunk;
use replicator_common::codec;
use replicator_common::fuzzing;
use replicator_common::id::{BatchId, BatchNonce, Edition, Incarnation, ObjectId, Seq, TransferId};
use replicator_common::name::Name;
use replicator_common::net::frame::{
    Compression, SWELLING_MAX, decode_body, decode_frame, encode_frame, encode_frame_around,
    open_frame,
};
use replicator_common::object::{Attributes, Kind, ObjectState, Xattr};
use replicator_common::sys::counting::Counting;
use replicator_common::time::Timestamp;
use replicator_common::wire::{
    Appended, BatchHeader, ContentSource, DataFrame, DestinationMessage, Extent, Hash,
    InventoryContent, InventoryItem, KeptChunk, KeptObject, Layout, Op, PackRun, PackedAgain,
    PackedObject, Piece, Refusal, SourceHello, SourceMessage, TransferBegin,
};

#[global_allocator]
static ALLOCATOR: Counting = Counting { zeroed: false };

fn corpus() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../fuzz/corpus/frame"))
}

fn id(n: u8) -> ObjectId {
    ObjectId::new(1, &[n, 0, 0, 7]).unwrap()
}

fn state() -> ObjectState {
    let xattrs = vec![Xattr { name: b"user.x".to_vec(), value: b"y".to_vec() }];
    let attributes = Attributes { mode: 0o644, uid: 1000, gid: 100, mtime: Timestamp(1), xattrs };
    ObjectState { kind: Kind::File, attributes, size: 3, rdev: 0 }
}

fn from_source() -> Vec<(&'static str, SourceMessage)> {
    let (batch, name) = (BatchId(3), Name::new(b"name").unwrap());
    let put = |content| Op::Put { object: id(1), state: state(), content, new: true, links: 2 };
    let ops = vec![
        Op::Root { object: id(0) },
        put(ContentSource::Packed { version: 1 }),
        put(ContentSource::Transferred { transfer: TransferId(4) }),
        put(ContentSource::Symlink { target: b"target".to_vec() }),
        put(ContentSource::Appended(Appended {
            basis: BatchId(2),
            hash: Hash::of(b"more"),
            bytes: b"more".to_vec(),
        })),
        Op::Entry { directory: id(0), name: name.clone(), old: Some(id(2)), new: Some(id(1)) },
        Op::Drop { object: id(2) },
        Op::Orphan { object: id(3) },
        Op::Adopt { object: id(4), handle: id(5), directory: id(0), name, kind: Kind::Directory },
        Op::SetAside { object: id(6) },
        Op::Leave { object: id(7) },
    ];
    let header = BatchHeader {
        nonce: BatchNonce(0x0102_0304_0506_0708),
        seq: Seq(9),
        watermark: Timestamp(1_600_000_000_000_000_000),
        exact: Some(Timestamp(5)),
        packed: 1,
        ops: ops.len() as u64,
        complete: true,
        bytes_changed: 3,
        bytes_shipped: 3,
    };
    let hello = SourceHello {
        source: "fs-0123456789abcdef0".parse().unwrap(),
        incarnation: Incarnation([7; 16]),
        destination_incarnation: Some(Incarnation([8; 16])),
        acknowledged: Edition { batch: BatchId(2), nonce: BatchNonce(0) },
        pending: vec![Edition { batch, nonce: BatchNonce(u64::MAX) }],
        previous: None,
        time: Timestamp(1),
    };
    vec![
        ("hello", SourceMessage::Hello(hello)),
        ("plan", SourceMessage::Plan { batch, ops }),
        ("commit", SourceMessage::Commit { batch, header }),
        ("abandon", SourceMessage::Abandon { batch }),
        ("delete", SourceMessage::Delete),
        ("ask-kept", SourceMessage::AskKept { object: id(1) }),
        ("release", SourceMessage::Release { packed: true, transfers: vec![id(1)] }),
    ]
}

fn from_destination() -> Vec<(&'static str, DestinationMessage)> {
    let item = InventoryItem {
        parent: Some(id(0)),
        name: Name::new(b"name").unwrap(),
        handle: id(1),
        state: state(),
        links: 1,
        content: InventoryContent::Hash(Hash::of(b"abc")),
    };
    let transfer = TransferId(4);
    let refusal = Refusal::Protocol("why".to_owned());
    let packed = vec![KeptObject { object: id(1), hash: Hash::of(b"abc") }];
    let (was, chunk) = ((9, Timestamp(1)), Chunk { length: 3, hash: Hash::of(b"abc") });
    let chunks = vec![KeptChunk { from: 7, chunk }];
    vec![
        ("applied", DestinationMessage::Applied { batch: BatchId(3), time: Timestamp(2) }),
        ("inventory", DestinationMessage::Inventory { items: vec![item], last: true }),
        ("transfer-refused", DestinationMessage::TransferRefused { transfer, reason: "x".into() }),
        ("refused", DestinationMessage::Refused(refusal)),
        ("kept", DestinationMessage::Kept { packed, transfers: vec![id(2)], last: true }),
        ("kept-chunks", DestinationMessage::KeptChunks { object: id(2), was, chunks, last: true }),
    ]
}

fn data() -> Vec<(&'static str, DataFrame<'static>)> {
    let packed = PackedObject {
        object: id(1),
        version: 1,
        state: state(),
        extents: vec![Extent { offset: 0, length: 3 }],
        hash: Hash::of(b"abc"),
    };
    let data = Cow::Borrowed(&b"abc"[..]);
    let (batch, transfer) = (BatchId(3), TransferId(4));
    let begin = TransferBegin {
        transfer,
        object: id(1),
        state: state(),
        layout: Layout::Patch,
        basis: Some(id(1)),
        basis_version: BatchId(2),
    };
    let pieces = vec![
        Piece::Data { hash: Hash::of(b"abc"), length: 3 },
        Piece::Copy { from: 3, length: 9 },
        Piece::Hole { length: 4096 },
        Piece::Kept { from: 7, length: 3, hash: Hash::of(b"abc") },
    ];
    let hash = Hash::of(b"abc");
    let runs = vec![PackRun { directory: id(2), names: vec![Name::new(b"f").unwrap()] }];
    let again = PackedAgain { object: id(1), version: 1, state: state(), hash };
    vec![
        ("pack", DataFrame::Pack { batch, objects: vec![packed.clone()], data: data.clone() }),
        ("pack-placed", DataFrame::PackPlaced { batch, runs, objects: vec![packed], data }),
        ("pack-again", DataFrame::PackAgain { batch: BatchId(3), objects: vec![again] }),
        ("begin", DataFrame::TransferBegin(begin)),
        ("reuse", DataFrame::TransferReuse { transfer, in_place: true }),
        ("pieces", DataFrame::TransferPieces { transfer, pieces, data: b"abc".into() }),
        ("end", DataFrame::TransferEnd { transfer, state: state() }),
    ]
}

fn seeds() -> Vec<(&'static str, Vec<u8>)> {
    let mut seeds = Vec::new();
    for (name, message) in from_source() {
        seeds.push((name, encode_frame(&message, Compression::Never).unwrap()));
    }
    for (name, message) in from_destination() {
        seeds.push((name, encode_frame(&message, Compression::Never).unwrap()));
    }
    for (name, message) in data() {
        seeds.push((name, encode_frame(&message, Compression::Never).unwrap()));
    }
    // The codec's layer alone, and a compressed frame.
    seeds.push(("plan-body", seeds[1].1[5..].to_vec()));
    seeds.push(("pack-body", seeds[9].1[5..].to_vec()));
    let swelling =
        SourceMessage::Plan { batch: BatchId(1), ops: vec![Op::Drop { object: id(1) }; 99] };
    seeds.push(("compressed", encode_frame(&swelling, Compression::Auto).unwrap()));
    seeds.push(("compressed-head", compressed_head()));
    seeds.extend(swollen());
    seeds
}

/// A pack of files whose contents do not shrink.
fn compressed_head() -> Vec<u8> {
    let content: Vec<u8> = (0..64u8).flat_map(|at| Hash::of(&[at]).0).collect();
    let content = Bytes::from(content);
    let objects = content.chunks(256).map(|bytes| PackedObject {
        object: id(1),
        version: 1,
        state: state(),
        extents: vec![Extent { offset: 0, length: bytes.len() as u64 }],
        hash: Hash::of(bytes),
    });
    let (objects, data) = (objects.collect(), Cow::Borrowed(&content[..]));
    let frame = DataFrame::Pack { batch: BatchId(3), objects, data };
    encode_frame_around(&frame, &content, Compression::Auto).unwrap().concat()
}

/// Lists of the shortest items, as many as the longest frame has bytes: `head` is
/// what stands before the list's length.
fn swollen() -> Vec<(&'static str, Vec<u8>)> {
    let list = |head: &[u8], unit: &[u8]| {
        // The codec's mark of 16 bits, and a number that makes a few MiB of any item.
        let length = [251, 0xff, 0xf0];
        [&[head.len() as u8 + 3], head, &length, unit].concat()
    };
    vec![
        ("swollen-pack", list(&[0, 1], &[&[1, 1][..], &[0; 42]].concat())),
        ("swollen-pieces", list(&[2, 1], &[2, 1])),
        ("swollen-plan", list(&[1, 1], &[2, 1, 1])),
        ("swollen-questions", list(&[7, 0], &[1, 1, 0])),
        ("swollen-release", list(&[9, 0], &[1, 1])),
        ("swollen-described", list(&[12, 0], &[0])),
        ("swollen-entries", list(&[12, 2, 2], &[1, 0])),
        ("swollen-returned", list(&[10, 1], &[1, 1, 0])),
        ("swollen-kept", list(&[13, 0], &[1, 1])),
    ]
}

#[test]
fn what_a_short_frame_swells_to_in_memory_is_bounded() {
    for (name, bytes) in swollen() {
        let body = fuzzing::swell(&bytes).unwrap();
        let room = SWELLING_MAX << 16;
        let errors = [
            codec::decode_bounded::<SourceMessage>(&body, room).map(drop),
            codec::decode_bounded::<DestinationMessage>(&body, room).map(drop),
            codec::decode_bounded::<DataFrame>(&body, room).map(drop),
        ];
        let refused = |error: &Result<(), codec::CodecError>| {
            error.as_ref().is_err_and(|error| error.to_string().contains("room for"))
        };
        assert!(errors.iter().any(refused), "{name}: {errors:?}");
        fuzzing::frame(&bytes);
    }
}

#[test]
fn the_corpus_of_frames_and_what_is_near_it() {
    if std::env::var_os("WRITE_CORPUS").is_some() {
        std::fs::create_dir_all(corpus()).unwrap();
        for (name, bytes) in seeds() {
            std::fs::write(corpus().join(name), bytes).unwrap();
        }
    }
    // The seeds are what they say: else only errors would be tried.
    let read = |name| std::fs::read(corpus().join(name)).unwrap();
    decode_frame::<SourceMessage>(&read("plan")).unwrap();
    decode_frame::<DestinationMessage>(&read("inventory")).unwrap();
    for name in ["pack", "pack-placed", "pieces", "compressed-head"] {
        decode_body::<DataFrame>(&open_frame(&read(name)).unwrap()).unwrap();
    }
    assert_eq!(read("compressed")[4], 1, "compressed");
    assert_eq!(read("compressed-head")[4], 2, "compressed-head");
    fuzzing::replay(corpus(), Duration::from_secs(1), fuzzing::frame);
}
