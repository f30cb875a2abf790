//! Replays the corpus of the fuzz target `journal_record`, and mutations of it,
//! on stable Rust. `WRITE_CORPUS=1` writes the seeds below anew.

#![allow(clippy::unwrap_used)]

use std::path::Path;
use std::time::Duration;

use replicator_common::codec;
use replicator_common::id::ObjectId;
use replicator_common::name::Name;
use replicator_common::time::Timestamp;
use replicator_src::journal::Record;
use replicator_src::watcher::What;

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
    let corpus = concat!(env!("CARGO_MANIFEST_DIR"), "/../fuzz/corpus/journal_record");
    let corpus = Path::new(corpus);
    if std::env::var_os("WRITE_CORPUS").is_some() {
        std::fs::create_dir_all(corpus).unwrap();
        for (name, record) in records() {
            std::fs::write(corpus.join(name), codec::encode_record(&record).unwrap()).unwrap();
            let body = codec::encode(&record).unwrap();
            std::fs::write(corpus.join(format!("{name}-body")), body).unwrap();
        }
    }
    // The seeds are what they say, also in the format of today.
    for (name, record) in records() {
        let bytes = std::fs::read(corpus.join(name)).unwrap();
        assert_eq!(codec::decode_record::<Record>(&bytes).unwrap(), record, "{name}");
    }
    let time = Duration::from_secs(1);
    replicator_common::fuzzing::replay(corpus, time, replicator_src::fuzzing::journal_record);
}
