//! Replays the corpora of the fuzz targets `log_record` and `session`, and
//! mutations of them, on stable Rust. `WRITE_CORPUS=1` writes the seeds below
//! anew.

#![allow(clippy::unwrap_used)]

use std::path::{Path, PathBuf};
use std::time::Duration;

use replicator_common::codec;
use replicator_common::fuzzing::replay;
use replicator_common::id::ObjectId;
use replicator_common::name::Name;
use replicator_common::object::{Attributes, Kind, ObjectState};
use replicator_common::time::Timestamp;
use replicator_dst::apply::{Place, Step, Within};
use replicator_dst::fuzzing;

const TIME: Duration = Duration::from_secs(1);

fn corpus(target: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/corpus").join(target)
}

fn write(target: &str, seeds: &[(&str, Vec<u8>)]) {
    if std::env::var_os("WRITE_CORPUS").is_some() {
        std::fs::create_dir_all(corpus(target)).unwrap();
        for (name, bytes) in seeds {
            std::fs::write(corpus(target).join(name), bytes).unwrap();
        }
    }
}

fn steps() -> Vec<Step> {
    let object = ObjectId::new(1, &[1, 0, 0, 7]).unwrap();
    let at = |within| Place { within, name: Name::new(b"name").unwrap() };
    let (here, over) = (at(Within::Replica(object.clone())), Some(object.clone()));
    let attributes =
        Attributes { mode: 0o644, uid: 1000, gid: 100, mtime: Timestamp(1), xattrs: Vec::new() };
    let state = ObjectState { kind: Kind::File, attributes, size: 3, rdev: 0 };
    let staged = at(Within::Staging(3));
    vec![
        Step::Move { object: object.clone(), from: staged.clone(), to: here.clone(), over },
        Step::Link {
            object: object.clone(),
            to: here.clone(),
            over: None,
            spare: at(Within::Orphans),
        },
        Step::Unlink { object: object.clone(), at: here.clone() },
        Step::RemoveDirectory { object: object.clone(), at: at(Within::LostAndFound) },
        Step::Rewrite { object: object.clone(), from: staged.clone() },
        Step::Patch { object: object.clone(), literals: staged.clone(), list: staged, size: 9 },
        Step::Attributes { object: object.clone(), state },
        Step::Mtime { object: object.clone(), mtime: Timestamp(2) },
        Step::Hint { object: object.clone(), at: here },
        Step::Append { object, at: 3, bytes: b"more".to_vec() },
    ]
}

#[test]
fn the_corpus_of_log_records_and_what_is_near_it() {
    let (record, body) =
        (codec::encode_record(&steps()).unwrap(), codec::encode(&steps()).unwrap());
    write("log_record", &[("steps", record), ("steps-body", body)]);
    // The seed is what it says, also in the format of today.
    let bytes = std::fs::read(corpus("log_record").join("steps")).unwrap();
    assert_eq!(codec::decode_record::<Vec<Step>>(&bytes).unwrap(), steps());
    replay(&corpus("log_record"), TIME, fuzzing::log_record);
}

#[test]
fn the_corpus_of_sessions_and_what_is_near_it() {
    // See `fuzzing::session` for what the bytes mean.
    let seeds: [(&str, Vec<u8>, Result<u64, &str>); 9] = [
        ("packed-then-planned", vec![3, 0, 1, 1, 0, 0, 0, 1, 1, 2, 1, 2, 0, 1, 1], Ok(1)),
        ("planned-then-packed", vec![0, 0, 1, 1, 2, 1, 2, 0, 1, 1, 3, 202, 1, 1, 0], Ok(1)),
        ("transferred", vec![5, 1, 2, 0, 0, 0, 1, 2, 4, 1, 2, 0, 1, 0], Ok(1)),
        (
            "transfer-given-up",
            vec![5, 1, 2, 0, 0, 0, 2, 2, 4, 1, 1, 2, 1, 2, 0, 2, 1, 6, 1, 3, 202, 1, 1, 0],
            Err("given up"),
        ),
        ("abandoned", vec![3, 0, 1, 1, 0, 0, 0, 1, 1, 0, 7, 0, 2, 0, 0, 0], Ok(1)),
        ("two-batches", vec![0, 0, 1, 1, 2, 1, 2, 0, 1, 1, 2, 0, 0, 0, 3, 201, 1, 1, 0], Ok(2)),
        (
            "no-place",
            vec![
                8, 0, 1, 1, 0, 0, 1, 1, 2, 1, 2, 0, 1, 1, 7, 202, 3, 0, 1, 2, 0, 0, 0, 1, 1, 2, 2,
                2, 0, 1, 1, 10,
            ],
            Ok(1),
        ),
        (
            "given-back-by-the-applier",
            vec![
                0, 0, 1, 1, 2, 1, 2, 0, 1, 1, 3, 202, 1, 1, 0, 11, 7, 202, 3, 0, 1, 2, 0, 0, 0, 1,
                1, 2, 2, 2, 0, 1, 1, 10,
            ],
            Ok(1),
        ),
        ("far-ahead", vec![3, 255, 1, 1, 0], Err("too far ahead")),
    ];
    write("session", &seeds.clone().map(|(name, bytes, _)| (name, bytes)));
    // The seeds are what they say: else mutations begin far from anything.
    for (name, _, expected) in seeds {
        let found = fuzzing::session(&std::fs::read(corpus("session").join(name)).unwrap());
        match (found, expected) {
            (Ok(found), Ok(expected)) => assert_eq!(found, expected, "{name}"),
            (Err(found), Err(expected)) => assert!(found.to_string().contains(expected), "{name}"),
            (found, _) => panic!("{name}: {found:?}"),
        }
    }
    replay(&corpus("session"), TIME, |bytes| drop(fuzzing::session(bytes)));
}
