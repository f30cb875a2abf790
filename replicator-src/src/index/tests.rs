use std::sync::Arc;

use replicator_common::chunk::Chunk;
use replicator_common::id::{BatchId, ObjectId};
use replicator_common::object::{Attributes, Kind, ObjectState};
use replicator_common::time::Timestamp;
use replicator_common::wire::Hash;

use super::*;

fn file(batch: u64, list: u64) -> Known {
    let attributes =
        Attributes { mode: 0o600, uid: 0, gid: 0, mtime: Timestamp(0), xattrs: Vec::new() };
    Known {
        state: ObjectState { kind: Kind::File, attributes, size: 1 << 20, rdev: 0 },
        ctime: Timestamp(0),
        read_at: Timestamp(0),
        version: BatchId(batch),
        content: Content::Chunks { average: 1 << 14, list, digest: Hash([0; 32]) },
        entry: None,
        links: 0,
        nlink: 1,
    }
}

#[test]
fn chunk_lists_of_what_was_given_up_go() {
    let directory = tempfile::tempdir().unwrap();
    let store = Arc::new(Store::open(&directory.path().join("index")).unwrap());
    let chunk = Chunk { length: 1 << 20, hash: Hash([1; 32]) };
    for list in 1..=4 {
        store.put_chunks(list, &[chunk]).unwrap();
    }
    let object = ObjectId::new(1, &[1]).unwrap();
    let delta = |batch, known: Known, dead_lists| Delta {
        objects: vec![(object.clone(), Some(known))],
        dead_lists,
        mark: Mark { batch: BatchId(batch), ..Mark::default() },
        ..Delta::default()
    };
    let mut index = Index::new(store.clone()).unwrap();
    // A transfer was not placed (list 3); the next batches change attributes
    // alone, and then content, and neither is committed.
    index.prepare(delta(1, file(1, 1), vec![3])).unwrap();
    index.prepare(delta(2, file(1, 1), Vec::new())).unwrap();
    index.prepare(delta(3, file(3, 2), vec![1])).unwrap();
    index.settle(BatchId(1)).unwrap();
    let left: Vec<u64> = (1..=4).filter(|list| !store.chunks(*list).unwrap().is_empty()).collect();
    assert_eq!(left, [1, 4], "in use, and not known to anybody yet");
}
