//! The bodies of the fuzz targets that concern this crate, and the replay of
//! their corpora on stable Rust. For tests alone.

use std::path::Path;
use std::pin::pin;
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::codec;
use crate::net::frame::{
    Compression, FrameReader, SWELLING_MAX, decode_frame, encode_frame, open_frame,
};
use crate::sys::counting::peak;
use crate::wire::{DataFrame, DestinationMessage, SourceMessage, contents};

/// Inputs above this are cut by [`replay`]'s mutations.
const INPUT_MAX: usize = 1 << 16;

/// Arbitrary bytes as a frame, and as the body of one, of every stream; as a
/// stream, as sessions read them; and as what swells to a long frame.
pub fn frame(bytes: &[u8]) {
    swollen(bytes);
    one_frame::<SourceMessage>(bytes);
    one_frame::<DestinationMessage>(bytes);
    // What is borrowed of a frame.
    data_body(bytes);
    if let Ok(body) = open_frame(bytes) {
        data_body(&body);
    }
    // Control messages are decoded where they are read, data frames elsewhere.
    let mut control = FrameReader::new(bytes);
    let mut data = FrameReader::new(bytes);
    loop {
        let message = at_once(control.read::<DestinationMessage>());
        let frame = at_once(data.read_encoded());
        let Ok(Some(frame)) = frame else {
            assert!(!matches!(message, Ok(Some(_))), "what is no frame was understood");
            return;
        };
        let alone = decode_frame::<DestinationMessage>(&frame);
        assert_eq!(matches!(message, Ok(Some(_))), alone.is_ok());
        if alone.is_err() {
            return;
        }
    }
}

/// The longest body that [`swollen`] makes.
const SWOLLEN: usize = 1 << 16;

/// A long body of few bytes: the first says how many begin it, the rest repeat up
/// to its end. In memory a message must not be many times as long as its body.
fn swollen(bytes: &[u8]) {
    let Some(body) = swell(bytes) else { return };
    let data = peak(|| drop(codec::decode_bounded::<DataFrame>(&body, SWELLING_MAX * SWOLLEN)));
    let frame = [&(body.len() as u32).to_le_bytes()[..], &[0], &body].concat();
    let source = peak(|| read_swollen::<SourceMessage>(&frame));
    let destination = peak(|| read_swollen::<DestinationMessage>(&frame));
    // Beside the lists: the frame as it was read, its byte strings, an error.
    let most = (SWELLING_MAX + 3) * SWOLLEN;
    assert!(data.max(source).max(destination) <= most, "{data} {source} {destination}");
}

/// What some bytes swell to; `None` when nothing is left to repeat.
pub fn swell(bytes: &[u8]) -> Option<Vec<u8>> {
    let (head, rest) = bytes.split_first()?;
    let (head, unit) = rest.split_at_checked(usize::from(*head))?;
    let count = (SWOLLEN - head.len()).checked_div(unit.len())?;
    Some([head, &unit.repeat(count)].concat())
}

fn read_swollen<T: DeserializeOwned>(frame: &[u8]) {
    drop(at_once(FrameReader::with_limit(frame, SWOLLEN).read::<T>()));
}

/// What a read of bytes that are all there gives.
fn at_once<T>(read: impl Future<Output = T>) -> T {
    let mut context = Context::from_waker(Waker::noop());
    match pin!(read).poll(&mut context) {
        Poll::Ready(read) => read,
        Poll::Pending => unreachable!("memory is always ready"),
    }
}

fn data_body(bytes: &[u8]) {
    let Ok(value) = codec::decode_borrowed::<DataFrame>(bytes) else { return };
    if let DataFrame::Pack { objects, data, .. } | DataFrame::PackPlaced { objects, data, .. } =
        &value
        && let Some(contents) = contents(objects, data)
    {
        let each: Vec<_> = contents.map(|(_, bytes)| bytes).collect();
        assert!(each.len() == objects.len() && each.concat() == data[..], "content was lost");
    }
    let again = codec::encode(&value).expect("what was decoded");
    let value: DataFrame = codec::decode_borrowed(&again).expect("what was encoded");
    assert_eq!(codec::encode(&value).expect("as before"), again);
}

fn one_frame<T: Serialize + DeserializeOwned>(bytes: &[u8]) {
    body::<T>(bytes);
    let Ok(value) = decode_frame::<T>(bytes) else { return };
    // What was understood is said again in the same words.
    if let Ok(again) = encode_frame(&value, Compression::Never) {
        let value: T = decode_frame(&again).expect("what was encoded");
        assert_eq!(encode_frame(&value, Compression::Never).expect("as before"), again);
    }
}

/// Arbitrary bytes as a record on disk, and as the body of one whose checksum
/// is right.
pub fn record<T: Serialize + DeserializeOwned>(bytes: &[u8]) {
    if let Ok(value) = codec::decode_record::<T>(bytes) {
        let again = codec::encode_record(&value).expect("what was decoded");
        codec::decode_record::<T>(&again).expect("what was encoded");
    }
    body::<T>(bytes);
}

fn body<T: Serialize + DeserializeOwned>(bytes: &[u8]) {
    let Ok(value) = codec::decode::<T>(bytes) else { return };
    let again = codec::encode(&value).expect("what was decoded");
    let value: T = codec::decode(&again).expect("what was encoded");
    assert_eq!(codec::encode(&value).expect("as before"), again);
}

/// Feeds `target` each file of `corpus`, then random mutations of them for
/// `time`. `SEED` in the environment repeats a run. Panics when there is no
/// corpus, and when `target` does.
pub fn replay(corpus: &Path, time: Duration, target: impl Fn(&[u8])) {
    let seed = std::env::var("SEED").ok().and_then(|seed| seed.parse().ok());
    let seed: u64 = seed.unwrap_or_else(rand::random);
    eprintln!("SEED={seed}");
    let mut paths: Vec<_> = std::fs::read_dir(corpus)
        .unwrap_or_else(|error| panic!("{}: {error}", corpus.display()))
        .flatten()
        .map(|entry| entry.path())
        .collect();
    paths.sort();
    assert!(!paths.is_empty(), "no corpus in {}", corpus.display());
    let seeds: Vec<Vec<u8>> = paths
        .iter()
        .map(|path| std::fs::read(path).unwrap_or_else(|e| panic!("{}: {e}", path.display())))
        .collect();
    for (path, bytes) in paths.iter().zip(&seeds) {
        eprintln!("{}", path.display());
        target(bytes);
    }
    let mut random = StdRng::seed_from_u64(seed);
    let (start, mut rounds) = (Instant::now(), 0u64);
    while start.elapsed() < time {
        let input = mutate(&seeds, &mut random);
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| target(&input)));
        if let Err(panic) = result {
            eprintln!("SEED={seed}, round {rounds}: {}", hex::encode(&input));
            std::panic::resume_unwind(panic);
        }
        rounds += 1;
    }
    eprintln!("{rounds} mutations");
}

/// One of the seeds, changed in a few places.
fn mutate(seeds: &[Vec<u8>], random: &mut StdRng) -> Vec<u8> {
    let mut input = seeds[random.random_range(0..seeds.len())].clone();
    for _ in 0..random.random_range(1..6) {
        let at = random.random_range(0..=input.len());
        match random.random_range(0..6) {
            0 if at < input.len() => input[at] ^= 1 << random.random_range(0..8),
            1 if at < input.len() => input[at] = random.random(),
            // The codec's marks of long numbers, where they do the most harm.
            2 if at + 9 <= input.len() => {
                input[at] = random.random_range(251..=253);
                let long = u64::MAX >> random.random_range(0..64);
                input[at + 1..at + 9].copy_from_slice(&long.to_le_bytes());
            }
            3 => input.truncate(at),
            4 => input.insert(at, random.random()),
            // A piece of another one.
            _ => {
                let other = &seeds[random.random_range(0..seeds.len())];
                let from = random.random_range(0..=other.len());
                let to = random.random_range(from..=other.len());
                input.splice(at..at, other[from..to].iter().copied());
            }
        }
    }
    input.truncate(INPUT_MAX);
    input
}
