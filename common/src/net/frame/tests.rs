use std::time::Duration;

use proptest::prelude::*;
use serde_bytes::ByteBuf;
use tokio::io::duplex;

use super::*;

fn noise(length: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let mut step = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state as u8
    };
    (0..length).map(|_| step()).collect()
}

fn frame_of(length: usize, flags: u8, rest: &[u8]) -> Vec<u8> {
    let mut frame = length_bytes(length).to_vec();
    frame.push(flags);
    frame.extend_from_slice(rest);
    frame
}

#[test]
fn auto_compresses_what_shrinks_and_nothing_else() {
    let text = ByteBuf::from(b"all work and no play ".repeat(50_000));
    let random = ByteBuf::from(noise(1 << 20));
    let small = ByteBuf::from(vec![0; 100]);
    let size = |value: &ByteBuf, compression| encode_frame(value, compression).unwrap().len();
    assert!(size(&text, Compression::Auto) < text.len() / 10);
    assert!(size(&text, Compression::Never) > text.len());
    assert_eq!(size(&random, Compression::Auto), size(&random, Compression::Never));
    assert_eq!(size(&small, Compression::Auto), size(&small, Compression::Never));
    // The sample looks compressible, the whole is not by a tenth.
    let mut mixed = noise(1 << 20);
    mixed[..4096].fill(0);
    mixed[(1 << 20) - 4096..].fill(0);
    let mixed = ByteBuf::from(mixed);
    assert_eq!(size(&mixed, Compression::Auto), size(&mixed, Compression::Never));
}

#[test]
fn a_frame_around_content_is_the_same_frame() {
    for content in [noise(300_000), b"again and again ".repeat(20_000), Vec::new()] {
        let content = Bytes::from(content);
        let half = serde_bytes::Bytes::new(&content[content.len() / 2..]);
        let value = (3u8, half, "end");
        for compression in [Compression::Never, Compression::Auto] {
            let parts = encode_frame_around(&value, &content, compression).unwrap();
            // What stands before the content is too short to be compressed.
            assert_eq!(parts.concat(), encode_frame(&value, compression).unwrap());
        }
    }
    let content = Bytes::from(noise(FRAME_MAX));
    let value = serde_bytes::Bytes::new(&content);
    let error = encode_frame_around(value, &content, Compression::Never).unwrap_err();
    assert!(matches!(error, FrameError::TooLong { .. }), "{error}");
}

/// Words that shrink before noise that does not, as in a frame of small files.
fn with_a_head() -> (Vec<u8>, (Vec<String>, ByteBuf)) {
    let words: Vec<String> = (0..500).map(|number| format!("object number {number}")).collect();
    let content = Bytes::from(noise(100_000));
    let value = (&words, serde_bytes::Bytes::new(&content));
    let parts = encode_frame_around(&value, &content, Compression::Auto).unwrap();
    let plain = encode_frame(&value, Compression::Auto).unwrap();
    let frame = parts.concat();
    assert_eq!((frame[4], plain[4]), (ZSTD_HEAD, 0));
    assert!(frame.len() + 5_000 < plain.len(), "{} of {}", frame.len(), plain.len());
    assert!(parts.iter().any(|part| part.as_ptr() == content.as_ptr()), "the content was copied");
    (frame, (words, ByteBuf::from(content.to_vec())))
}

#[test]
fn a_beginning_that_shrinks_is_compressed_alone() {
    let (frame, value) = with_a_head();
    assert_eq!(decode_frame::<(Vec<String>, ByteBuf)>(&frame).unwrap(), value);
}

#[test]
fn what_a_compressed_beginning_announces_is_held_to() {
    let (frame, _) = with_a_head();
    let decode = |at: usize, length: usize| {
        let mut frame = frame.clone();
        frame[at..at + 4].copy_from_slice(&length_bytes(length));
        decode_frame::<(Vec<String>, ByteBuf)>(&frame)
    };
    let length = frame.len() - HEADER_HEAD;
    // Longer when decompressed than a frame may be, by itself and with what follows.
    for raw in [FRAME_MAX + 1, FRAME_MAX - 1000] {
        let error = decode(HEADER, raw).unwrap_err();
        assert!(matches!(error, FrameError::TooLong { .. }), "{error}");
    }
    for raw in [0, 1, 100_000] {
        let error = decode(HEADER, raw).unwrap_err();
        assert!(matches!(error, FrameError::Compressed(_)), "{error}");
    }
    let error = decode(HEADER + 4, length + 1).unwrap_err();
    assert!(matches!(error, FrameError::TooLong { .. }), "{error}");
    for packed in [0, 1, length] {
        let error = decode(HEADER + 4, packed).unwrap_err();
        assert!(matches!(error, FrameError::Compressed(_)), "{error}");
    }
    for cut in [4, HEADER, HEADER + 3, HEADER + 4, HEADER_HEAD - 1, HEADER_HEAD, frame.len() - 1] {
        assert!(matches!(decode_frame::<u8>(&frame[..cut]), Err(FrameError::Truncated)), "{cut}");
    }
}

#[test]
fn lengths_above_the_limit_are_refused() {
    let long = frame_of(FRAME_MAX + 1, 0, &[]);
    assert!(matches!(decode_frame::<ByteBuf>(&long), Err(FrameError::TooLong { .. })));
    let long = frame_of(10, ZSTD, &u32::MAX.to_le_bytes());
    assert!(matches!(decode_frame::<ByteBuf>(&long), Err(FrameError::TooLong { .. })));
    let value = ByteBuf::from(vec![0; FRAME_MAX]);
    for compression in [Compression::Never, Compression::Auto] {
        let error = encode_frame(&value, compression).unwrap_err();
        assert!(matches!(error, FrameError::TooLong { .. }), "{error}");
    }
    // The length prefix of the byte string takes five bytes.
    let value = ByteBuf::from(vec![0; FRAME_MAX - 5]);
    for compression in [Compression::Never, Compression::Auto] {
        let frame = encode_frame(&value, compression).unwrap();
        assert_eq!(decode_frame::<ByteBuf>(&frame).unwrap(), value);
    }
}

#[test]
fn a_compressed_body_cannot_exceed_what_it_announces() {
    let bomb = zstd::bulk::compress(&vec![0; 64 << 20], 1).unwrap();
    assert!(bomb.len() < 16 << 10);
    for announced in [0, 1, 1024, FRAME_MAX] {
        let mut rest = length_bytes(announced).to_vec();
        rest.extend_from_slice(&bomb);
        let error = decode_frame::<ByteBuf>(&frame_of(bomb.len(), ZSTD, &rest)).unwrap_err();
        assert!(matches!(error, FrameError::Compressed(_)), "{error}");
    }
    // Nor fall short of it.
    let short = zstd::bulk::compress(&[0; 100], 1).unwrap();
    let mut rest = length_bytes(101).to_vec();
    rest.extend_from_slice(&short);
    let error = decode_frame::<ByteBuf>(&frame_of(short.len(), ZSTD, &rest)).unwrap_err();
    assert!(error.to_string().contains("100 bytes, 101 announced"), "{error}");
}

#[test]
fn unknown_flags_are_refused() {
    let frame = encode_frame(&7u8, Compression::Never).unwrap();
    for flags in 3..=255 {
        let mut frame = frame.clone();
        frame[4] = flags;
        let error = decode_frame::<u8>(&frame).unwrap_err();
        assert!(matches!(error, FrameError::UnknownFlags(f) if f == flags), "{error}");
    }
}

#[tokio::test]
async fn the_end_is_clean_only_between_frames() {
    let value = ByteBuf::from(b"compressible ".repeat(100));
    let frame = encode_frame(&value, Compression::Auto).unwrap();
    assert_eq!(frame[4], ZSTD);
    for cut in 0..frame.len() {
        let bytes = [&frame[..], &frame[..cut]].concat();
        let mut reader = FrameReader::new(&bytes[..]);
        assert_eq!(reader.read::<ByteBuf>().await.unwrap().unwrap(), value);
        match reader.read::<ByteBuf>().await {
            Ok(None) => assert_eq!(cut, 0),
            Err(FrameError::Truncated) => assert_ne!(cut, 0),
            other => panic!("cut at {cut}: {other:?}"),
        }
        assert!(decode_frame::<ByteBuf>(&frame[..cut]).is_err());
    }
    let more = [&frame[..], b"x"].concat();
    assert!(matches!(decode_frame::<ByteBuf>(&more), Err(FrameError::Trailing(1))));
}

#[tokio::test]
async fn a_cancelled_read_loses_nothing() {
    let frame = encode_frame(&ByteBuf::from(noise(1000)), Compression::Never).unwrap();
    let (mut near, far) = duplex(4096);
    let mut reader = FrameReader::new(far);
    for piece in frame.chunks(7) {
        let short = Duration::from_millis(1);
        let early = tokio::time::timeout(short, reader.read_encoded()).await;
        assert!(early.is_err(), "whole before its last piece");
        near.write_all(piece).await.unwrap();
    }
    assert_eq!(reader.read_encoded().await.unwrap().unwrap(), frame);
}

#[tokio::test]
async fn writer_reports_bytes_and_reader_holds_its_limit() {
    let (near, far) = duplex(1 << 20);
    let mut writer = FrameWriter::new(near).with_compression(Compression::Never);
    assert_eq!(writer.write(&ByteBuf::from(vec![0; 100])).await.unwrap(), 5 + 1 + 100);
    assert_eq!(writer.write(&ByteBuf::from(vec![0; 200])).await.unwrap(), 5 + 1 + 200);
    drop(writer.into_inner());
    let mut reader = FrameReader::with_limit(far, 150);
    assert_eq!(reader.read::<ByteBuf>().await.unwrap().unwrap().len(), 100);
    let error = reader.read::<ByteBuf>().await.unwrap_err();
    assert!(matches!(error, FrameError::TooLong { length: 201, limit: 150 }), "{error}");
}

proptest! {
    #[test]
    fn round_trip(
        seed in proptest::collection::vec(any::<u8>(), 0..2000),
        repeat in 1usize..20,
        number in any::<u64>(),
    ) {
        let value = (number, ByteBuf::from(seed.repeat(repeat)));
        for compression in [Compression::Never, Compression::Auto] {
            let frame = encode_frame(&value, compression).unwrap();
            let read: (u64, ByteBuf) = decode_frame(&frame).unwrap();
            prop_assert_eq!(&read, &value);
        }
    }

    #[test]
    fn random_bytes_never_panic(
        bytes in proptest::collection::vec(any::<u8>(), 0..300),
        flags in 0u8..4,
        length in 0u32..400,
    ) {
        let _ = decode_frame::<crate::wire::SourceMessage>(&bytes);
        // The same with an envelope that leads further in.
        let framed = frame_of(length as usize, flags, &bytes);
        let _ = decode_frame::<crate::wire::SourceMessage>(&framed);
        let exact = frame_of(bytes.len(), 0, &bytes);
        let _ = decode_body::<crate::wire::DataFrame>(&open_frame(&exact).unwrap());
    }

    #[test]
    fn a_reader_of_random_bytes_ends_and_stays_within_its_limit(
        bytes in proptest::collection::vec(any::<u8>(), 0..300),
    ) {
        const LIMIT: usize = 1 << 10;
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let mut reader = FrameReader::with_limit(&bytes[..], LIMIT);
        runtime.block_on(async {
            while let Ok(Some(_)) = reader.read::<crate::wire::SourceMessage>().await {}
        });
        prop_assert!(reader.buffer.capacity() <= HEADER_HEAD + LIMIT);
    }
}
