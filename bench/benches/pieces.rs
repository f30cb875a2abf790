//! The hot pieces, one by one: reading events, the journal, merging what is dirty,
//! chunking, frames, and staging. Without root, network or loop devices:
//! `just bench-pieces`.

#![allow(missing_docs, clippy::unwrap_used, reason = "a benchmark fails by panicking")]

use std::borrow::Cow;
use std::hint::black_box;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64};
use std::time::{Duration, Instant};

use bytes::Bytes;
use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use replicator_common::chunk::{AVERAGE_MIN, Chunker};
use replicator_common::codec;
use replicator_common::id::{BatchId, FileSystemId, Incarnation, ObjectId, Seq, TransferId};
use replicator_common::name::Name;
use replicator_common::net::frame::{Compression, decode_body, encode_frame_around, open_frame};
use replicator_common::object::{Attributes, Kind, ObjectState};
use replicator_common::sys::fanotify::{self, bits};
use replicator_common::time::Timestamp;
use replicator_common::wire::{
    DataFrame, Extent, Hash, Layout, PackedObject, Piece, TransferBegin,
};
use replicator_dst::area::Area;
use replicator_dst::kept::Kept;
use replicator_dst::locate::Locator;
use replicator_dst::nest::Nests;
use replicator_dst::session::StagedTransfer;
use replicator_dst::stage::Stager;
use replicator_dst::store::{Standing, Store};
use replicator_src::journal::{Journal, Record};
use replicator_src::plan::Dirty;
use replicator_src::watcher::What;
use replicator_tests::workload::content;

/// As ext4's handles: 8 bytes.
fn object(number: u64) -> ObjectId {
    ObjectId::new(1, &number.to_le_bytes()).unwrap()
}

fn name(number: u64) -> Name {
    Name::new(format!("file-{number}").as_bytes()).unwrap()
}

/// A buffer of so many events as fanotify gives them for files that were made in
/// 100 directories: directory and name, and the object itself.
fn event_bytes(count: u64) -> Vec<u8> {
    /// `FAN_EVENT_INFO_TYPE_FID` and `…_DFID_NAME`.
    const FID: u8 = 1;
    const DFID_NAME: u8 = 2;
    let record = |kind: u8, handle: u64, name: &[u8]| {
        let mut body = vec![0; 8];
        body.extend(8u32.to_ne_bytes());
        body.extend(1i32.to_ne_bytes());
        body.extend(handle.to_ne_bytes());
        body.extend(name);
        body.resize(body.len().next_multiple_of(4), 0);
        let mut record = vec![kind, 0];
        record.extend((body.len() as u16 + 4).to_ne_bytes());
        record.extend(body);
        record
    };
    let event = |number: u64| {
        let name = format!("file-{number}\0");
        let mut records = record(DFID_NAME, number % 100, name.as_bytes());
        records.extend(record(FID, number, &[]));
        let mut event = (records.len() as u32 + 24).to_ne_bytes().to_vec();
        event.extend([3, 0]);
        event.extend(24u16.to_ne_bytes());
        event.extend((bits::CREATE | bits::MODIFY | bits::CLOSE_WRITE).to_ne_bytes());
        event.extend((-1i32).to_ne_bytes());
        event.extend(1i32.to_ne_bytes());
        event.extend(records);
        event
    };
    (0..count).flat_map(event).collect()
}

fn events(criterion: &mut Criterion) {
    const COUNT: u64 = 1000;
    let bytes = event_bytes(COUNT);
    assert_eq!(fanotify::parse(&bytes).filter(Result::is_ok).count() as u64, COUNT);
    let mut group = criterion.benchmark_group("events");
    group.throughput(Throughput::Elements(COUNT));
    group.bench_function("parse", |bencher| {
        bencher.iter(|| fanotify::parse(black_box(&bytes)).map(Result::unwrap).count());
    });
    group.finish();
}

fn records(count: u64) -> Vec<Record> {
    let what = What { content: true, attributes: false };
    let each = |number: u64| {
        if number.is_multiple_of(2) {
            Record::Entry { directory: object(number % 100), name: name(number) }
        } else {
            Record::Object { object: object(1000 + number), what }
        }
    };
    (0..count).map(each).collect()
}

fn journal(criterion: &mut Criterion) {
    const COUNT: u64 = 1000;
    let records = records(COUNT);
    let directory = tempfile::tempdir().unwrap();
    let journal = Journal::open(&directory.path().join("journal"), Seq(0)).unwrap();
    let mut group = criterion.benchmark_group("journal");
    group.throughput(Throughput::Elements(COUNT));
    group.sample_size(20);
    group.bench_function("append, flush, trim", |bencher| {
        bencher.iter(|| {
            journal.append(&records).unwrap();
            let last = journal.flush().unwrap();
            journal.trim(last).unwrap();
        });
    });
    group.bench_function("record: encode", |bencher| {
        bencher.iter(|| {
            records.iter().map(|record| codec::encode_record(record).unwrap().len()).sum::<usize>()
        });
    });
    group.finish();
}

fn plan(criterion: &mut Criterion) {
    const COUNT: u64 = 10_000;
    let records = records(COUNT);
    let mut group = criterion.benchmark_group("plan");
    group.throughput(Throughput::Elements(COUNT));
    group.bench_function("dirty: absorb", |bencher| {
        bencher.iter_batched_ref(
            Dirty::default,
            |dirty| records.iter().for_each(|record| dirty.absorb(record)),
            BatchSize::LargeInput,
        );
    });
    group.finish();
}

fn chunks(criterion: &mut Criterion) {
    const SIZE: usize = 16 << 20;
    let bytes = content::incompressible(1, SIZE);
    let cut = || {
        let mut rest = &bytes[..];
        let read = |out: &mut Vec<u8>| {
            let (part, after) = rest.split_at((out.capacity() - out.len()).min(rest.len()));
            out.extend_from_slice(part);
            rest = after;
            Ok(part.len())
        };
        Chunker::new(read, AVERAGE_MIN).map(|window| window.unwrap().chunks.len()).sum::<usize>()
    };
    let mut group = criterion.benchmark_group("chunks");
    group.throughput(Throughput::Bytes(SIZE as u64));
    group.sample_size(20);
    group.bench_function("cut and hash", |bencher| bencher.iter(|| black_box(cut())));
    group.bench_function("hash alone", |bencher| bencher.iter(|| Hash::of(black_box(&bytes))));
    group.finish();
}

/// A small file as it travels.
fn packed(number: u64, bytes: &[u8]) -> PackedObject {
    let (mode, mtime, size) = (0o644, Timestamp::NEVER, bytes.len() as u64);
    let attributes = Attributes { mode, uid: 0, gid: 0, mtime, xattrs: Vec::new() };
    PackedObject {
        object: object(number),
        version: 0,
        state: ObjectState { kind: Kind::File, attributes, size, rdev: 0 },
        extents: vec![Extent { offset: 0, length: size }],
        hash: Hash::of(bytes),
    }
}

/// A frame of files of 4 KiB, whose content is that of `content`.
fn pack(content: &Bytes) -> DataFrame<'_> {
    let objects = (0..).zip(content.chunks(4096)).map(|(number, bytes)| packed(number, bytes));
    let data = Cow::Borrowed(&content[..]);
    DataFrame::Pack { batch: BatchId(1), objects: objects.collect(), data }
}

fn frames(criterion: &mut Criterion) {
    const SIZE: usize = 256 << 10;
    let noise = Bytes::from(content::incompressible(2, SIZE));
    let text = Bytes::from(content::bytes(1, SIZE));
    let mut group = criterion.benchmark_group("frames");
    group.throughput(Throughput::Bytes(SIZE as u64));
    for (kind, content) in [("noise", &noise), ("text", &text)] {
        let frame = pack(content);
        group.bench_function(format!("encode, {kind}"), |bencher| {
            bencher.iter(|| encode_frame_around(&frame, content, Compression::Auto).unwrap());
        });
        let encoded = encode_frame_around(&frame, content, Compression::Auto).unwrap().concat();
        group.bench_function(format!("decode, {kind}"), |bencher| {
            bencher.iter(|| {
                let body = open_frame(black_box(&encoded)).unwrap();
                match decode_body(&body).unwrap() {
                    DataFrame::Pack { objects, .. } => objects.len(),
                    other => panic!("another frame: {other:?}"),
                }
            });
        });
    }
    group.finish();
}

/// A stager in a directory of its own, on whatever file system that is.
struct Staging {
    area: Arc<Area>,
    stager: Stager,
    _directory: tempfile::TempDir,
}

impl Staging {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let root = std::fs::File::open(directory.path()).unwrap();
        let area = Area::open(root.as_fd(), &FileSystemId::random()).unwrap();
        let area = Arc::new(area);
        let standing = || Standing::new(Incarnation::random(), false);
        let store = Store::open(&directory.path().join("store"), standing).unwrap();
        let (applied, failed) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)));
        let kept = Arc::new(Kept::new(area.clone(), failed.clone()));
        let nests = Arc::new(Nests::new(area.clone(), applied.clone()));
        let locator = Locator::new(area.clone(), true);
        let shared = (kept, nests, failed);
        let stager = Stager::new(area.clone(), Arc::new(store), locator, applied, shared, 0);
        Self { area, stager, _directory: directory }
    }

    /// Stages one large file, 256 KiB a frame.
    fn large(&mut self, number: u64, content: &[u8]) -> StagedTransfer {
        const FRAME: usize = 256 << 10;
        let (transfer, object) = (TransferId(number), object(number));
        let state = ObjectState { size: content.len() as u64, ..packed(0, &[]).state };
        let (basis, basis_version) = (None, BatchId(0));
        let (layout, begun) = (Layout::Replace, state.clone());
        let begin = TransferBegin { transfer, object, state: begun, layout, basis, basis_version };
        self.stager.begin(begin).unwrap();
        for bytes in content.chunks(FRAME) {
            let each = bytes.chunks(AVERAGE_MIN as usize);
            let pieces: Vec<_> = each
                .map(|bytes| Piece::Data { hash: Hash::of(bytes), length: bytes.len() as u32 })
                .collect();
            self.stager.pieces(transfer, &pieces, bytes).unwrap();
        }
        self.stager.flush(transfer).unwrap();
        self.stager.end(transfer, state).unwrap().unwrap().1
    }
}

/// Until the files are complete in staging, without the deletion that follows and
/// without a sync.
fn staging(criterion: &mut Criterion) {
    const COUNT: u64 = 256;
    const LARGE: usize = 8 << 20;
    let bytes = content::incompressible(3, LARGE);
    let mut staging = Staging::new();
    let mut group = criterion.benchmark_group("staging");
    group.sample_size(20);
    group.throughput(Throughput::Elements(COUNT));
    group.bench_function("small files", |bencher| {
        bencher.iter_custom(|rounds| {
            let mut time = Duration::ZERO;
            for _ in 0..rounds {
                let begun = Instant::now();
                let staged: Vec<_> = (0..)
                    .zip(bytes[..COUNT as usize * 4096].chunks(4096))
                    .map(|(number, bytes)| {
                        let packed = packed(number, bytes);
                        staging.stager.pack(BatchId(1), &packed, bytes, None).unwrap().place
                    })
                    .collect();
                time += begun.elapsed();
                Stager::discard(&staging.area, &staged);
            }
            time
        });
    });
    group.throughput(Throughput::Bytes(LARGE as u64));
    group.bench_function("a large file", |bencher| {
        let mut number = 0;
        bencher.iter_custom(|rounds| {
            let mut time = Duration::ZERO;
            for _ in 0..rounds {
                number += 1;
                let begun = Instant::now();
                let staged = staging.large(number, &bytes);
                time += begun.elapsed();
                Stager::discard(&staging.area, &staged.places());
            }
            time
        });
    });
    group.finish();
}

criterion_group!(pieces, events, journal, plan, chunks, frames, staging);
criterion_main!(pieces);
