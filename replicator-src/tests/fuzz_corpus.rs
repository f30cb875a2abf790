//! Replays the corpora of the fuzz targets `journal_record` and `replies`, and
//! mutations of them, on stable Rust. `WRITE_CORPUS=1` writes the seeds below anew.

#![allow(clippy::unwrap_used)]

use std::path::{Path, PathBuf};
use std::time::Duration;

use replicator_common::codec;
use replicator_common::fuzzing::replay;
use replicator_common::id::ObjectId;
use replicator_common::name::Name;
use replicator_common::time::Timestamp;
use replicator_src::fuzzing;
use replicator_src::journal::Record;
use replicator_src::watcher::What;

const TIME: Duration = Duration::from_secs(1);

/// The corpus of a target, with its seeds written anew if that is asked for.
fn corpus(target: &str, seeds: &[(&str, Vec<u8>)]) -> PathBuf {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/corpus").join(target);
    if std::env::var_os("WRITE_CORPUS").is_some() {
        std::fs::create_dir_all(&corpus).unwrap();
        for (name, bytes) in seeds {
            std::fs::write(corpus.join(name), bytes).unwrap();
        }
    }
    corpus
}

fn records() -> Vec<(&'static str, Record)> {
    let id = |n| ObjectId::new(1, &[n, 0, 0, 7]).unwrap();
    let name = Name::new(b"name").unwrap();
    vec![
        ("entry", Record::Entry { directory: id(1), name: name.clone() }),
        ("object", Record::Object { object: id(2), what: What::default() }),
        ("named", Record::Named { directory: id(1), name, what: What::default() }),
        ("gap", Record::Gap { reason: "overflow".to_owned() }),
        ("barrier", Record::Barrier { time: Timestamp(1_600_000_000_000_000_000) }),
    ]
}

#[test]
fn the_corpus_of_journal_records_and_what_is_near_it() {
    let (mut seeds, mut bodies) = (Vec::new(), Vec::new());
    for (name, record) in records() {
        seeds.push((name, codec::encode_record(&record).unwrap()));
        bodies.push((format!("{name}-body"), codec::encode(&record).unwrap()));
    }
    seeds.extend(bodies.iter().map(|(name, body)| (name.as_str(), body.clone())));
    let corpus = corpus("journal_record", &seeds);
    // The seeds are what they say, also in the format of today.
    for (name, record) in records() {
        let bytes = std::fs::read(corpus.join(name)).unwrap();
        assert_eq!(codec::decode_record::<Record>(&bytes).unwrap(), record, "{name}");
    }
    replay(&corpus, TIME, fuzzing::journal_record);
}

#[test]
fn the_corpus_of_replies_and_what_is_near_it() {
    // See `fuzzing::replies` for what the bytes mean.
    let many = [6, 255, 255, 0].repeat(130);
    let seeds: [(&str, Vec<u8>, Result<usize, &str>); 13] = [
        ("acknowledged", vec![0, 1, 0, 1, 2, 0, 3, 80], Ok(2)),
        ("acknowledged-not-sent", vec![0, 1, 3, 160], Err("acknowledges batch 3")),
        ("returned", vec![0, 3, 0, 1, 4, 0, 2, 0, 4, 0, 1, 1, 0, 1, 3, 0], Ok(3)),
        ("returned-not-oldest", vec![0, 1, 0, 1, 4, 80, 1, 1], Err("not the oldest")),
        ("returned-never-sent", vec![0, 1, 4, 255, 0, 1], Err("not the oldest")),
        ("returned-too-many", vec![0, 1, 4, 0, 1, 0, 4, 0, 1, 0], Err("more objects")),
        ("session-ended", vec![0, 1, 0, 1, 5, 0, 0, 1, 3, 0], Ok(3)),
        ("compared-anew", vec![0, 1, 3, 0, 5, 255, 0, 1, 3, 0], Ok(2)),
        ("kept", vec![6, 3, 2, 1, 7, 1, 8, 1, 4, 1, 9, 1, 0], Ok(0)),
        ("kept-too-many", many, Ok(0)),
        ("kept-not-asked", vec![6, 0, 1, 1, 8, 0, 5, 1, 9, 0, 1], Ok(0)),
        ("inventory", vec![10, 11, 0, 11, 1], Ok(0)),
        ("inventory-not-asked", vec![10, 11, 0, 11, 0], Err("inventory")),
    ];
    let corpus = corpus("replies", &seeds.clone().map(|(name, bytes, _)| (name, bytes)));
    // The seeds are what they say: else mutations begin far from anything.
    for (name, _, expected) in seeds {
        let found = fuzzing::replies(&std::fs::read(corpus.join(name)).unwrap());
        match (found, expected) {
            (Ok(found), Ok(expected)) => assert_eq!(found, expected, "{name}"),
            (Err(found), Err(expected)) => assert!(found.to_string().contains(expected), "{name}"),
            (found, _) => panic!("{name}: {found:?}"),
        }
    }
    replay(&corpus, TIME, |bytes| drop(fuzzing::replies(bytes)));
}
