//! No bytes from the wire make a frame's decoding allocate without bounds.
//!
//! A test binary of its own, for its allocator counts.
//! (What libzstd allocates for itself is not seen here: a fixed context.)

#![allow(clippy::unwrap_used)]

use rand::{Rng, RngCore, SeedableRng, rngs::StdRng};
use replicator_common::codec::DECODE_LIMIT;
use replicator_common::net::frame::{FrameReader, decode_body, decode_frame, open_frame};
use replicator_common::sys::counting::{Counting, peak};
use replicator_common::wire::{DataFrame, FRAME_MAX, SourceMessage};

#[global_allocator]
static ALLOCATOR: Counting = Counting { zeroed: true };

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
        let flags = if random.random_bool(0.5) { 0 } else { random.random_range(1..=2) };
        frame.push(flags);
        // The lengths that go with the flags, such as lead further in than random ones.
        for _ in 0..flags {
            let most = if random.random_bool(0.5) { FRAME_MAX as u32 } else { body.len() as u32 };
            frame.extend_from_slice(&random.random_range(0..=most).to_le_bytes());
        }
        frame.extend_from_slice(&body);
        let bytes = peak(|| decode_as_everything(&frame));
        assert!(bytes <= DECODE_LIMIT + (1 << 20), "{bytes} bytes for {frame:?}");
    }

    // The bound is not kept by refusing everything.
    let body = serde_bytes::ByteBuf::from(vec![7; FRAME_MAX - 5]);
    let frame = replicator_common::net::frame::encode_frame(&body, Default::default()).unwrap();
    assert_eq!(decode_frame::<serde_bytes::ByteBuf>(&frame).unwrap(), body);
}
