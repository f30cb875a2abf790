//! No bytes from the wire make a frame's decoding allocate without bounds.
//!
//! A test binary of its own, because it counts every allocation of the process.
//! One test only: a second one beside it would be counted too.
//! (What libzstd allocates for itself is not seen here: a fixed context.)

#![allow(clippy::unwrap_used)]

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};

use rand::{Rng, RngCore, SeedableRng, rngs::StdRng};
use replicator_common::codec::DECODE_LIMIT;
use replicator_common::net::frame::{FrameReader, decode_body, decode_frame, open_frame};
use replicator_common::wire::{DataFrame, FRAME_MAX, SourceMessage};

struct Counting;

static LIVE: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

// SAFETY: every call is passed on unchanged to the system's allocator; the
// counters beside it touch no memory of the caller.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let live = LIVE.fetch_add(layout.size(), Ordering::Relaxed) + layout.size();
        PEAK.fetch_max(live, Ordering::Relaxed);
        // SAFETY: the caller's promise about `layout` is passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        LIVE.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: the caller's promise about both is passed on.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// The most bytes that were allocated at once during `work`, above those before.
fn peak(work: impl FnOnce()) -> usize {
    let before = LIVE.load(Ordering::Relaxed);
    PEAK.store(before, Ordering::Relaxed);
    work();
    PEAK.load(Ordering::Relaxed) - before
}

fn decode_as_everything(frame: &[u8]) {
    let _ = decode_frame::<SourceMessage>(frame);
    let _ = open_frame(frame).map(|body| decode_body::<DataFrame>(&body).is_ok());
    let _ = decode_frame::<Vec<SourceMessage>>(frame);
    let _ = decode_frame::<Vec<u64>>(frame);
    let _ = decode_frame::<serde_bytes::ByteBuf>(frame);
    let _ = decode_frame::<String>(frame);
    let mut reader = FrameReader::new(frame);
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    let _ = runtime.block_on(reader.read::<SourceMessage>());
}

#[test]
fn hostile_frames_stay_within_the_limit() {
    let seed: u64 = std::env::var("SEED").map_or_else(|_| rand::random(), |s| s.parse().unwrap());
    eprintln!("SEED={seed}");
    let mut random = StdRng::seed_from_u64(seed);
    for round in 0..2_000 {
        let mut body = vec![0; random.random_range(0..64)];
        random.fill_bytes(&mut body);
        // bincode's marks of long lengths, where they do the most harm.
        if round % 2 == 0 && body.len() >= 9 {
            let at = random.random_range(0..body.len() - 8);
            body[at] = random.random_range(251..=253);
            body[at + 1..at + 9].copy_from_slice(&random.random_range(0..1u64 << 26).to_le_bytes());
        }
        let claimed = match round % 3 {
            0 => body.len() as u32,
            1 => random.random_range(0..2 * FRAME_MAX as u32),
            _ => random.next_u32(),
        };
        let mut frame = claimed.to_le_bytes().to_vec();
        frame.push(u8::from(random.random_bool(0.3)));
        frame.extend_from_slice(&body);
        let bytes = peak(|| decode_as_everything(&frame));
        assert!(bytes <= DECODE_LIMIT + (1 << 20), "{bytes} bytes for {frame:?}");
    }

    // The bound is not kept by refusing everything.
    let body = serde_bytes::ByteBuf::from(vec![7; FRAME_MAX - 5]);
    let frame = replicator_common::net::frame::encode_frame(&body, Default::default()).unwrap();
    assert_eq!(decode_frame::<serde_bytes::ByteBuf>(&frame).unwrap(), body);
}
