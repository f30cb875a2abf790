//! Each durable call of the source's stores is made (docs/guarantees.md,
//! "Durable calls").

#![allow(clippy::unwrap_used)]

use replicator_common::fault;
use replicator_common::id::{BatchId, Incarnation, ObjectId, Seq};
use replicator_src::index::{Delta, Mark, Noted, Store};
use replicator_src::journal::{Journal, Record};
use replicator_src::watcher::What;

/// One test alone in its process: calls are seen for all of it.
#[test]
fn what_the_index_and_the_journal_promise_is_synced() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("index.redb");
    let synced = |call: &str| fault::calls().iter().any(|one| one.starts_with(call));
    let store = Store::open(&path).unwrap();
    // What a power cut now would leave: without what closing it would add.
    let cut = directory.path().join("cut.redb");
    std::fs::copy(&path, &cut).unwrap();
    let found = Store::open(&cut).unwrap().incarnation().unwrap();
    assert_eq!(found, store.incarnation().unwrap(), "open");
    let delta = Delta { mark: Mark { batch: BatchId(1), ..Mark::default() }, ..Delta::default() };
    let calls: [(&str, &dyn Fn(), bool); 7] = [
        ("reserve_lists", &|| assert!(store.reserve_lists(5).unwrap() > 0), true),
        ("set_peer", &|| store.set_peer(Incarnation([1; 16])).unwrap(), true),
        ("set_reconciling", &|| store.set_reconciling(true).unwrap(), true),
        ("prepare", &|| store.prepare(Some((&delta, &Noted::default())), &[]).unwrap(), true),
        ("settle", &|| store.settle(BatchId(1)).unwrap(), true),
        ("reset", &|| store.reset().unwrap(), true),
        ("merge_all", &|| store.merge_all(&[]).unwrap(), false),
    ];
    for (what, call, expected) in calls {
        fault::watch();
        call();
        assert_eq!(synced("store-sync index.redb"), expected, "{what}");
    }
    let journal = Journal::open(&directory.path().join("journal"), Seq(0)).unwrap();
    let what = What { content: true, attributes: true };
    let object = ObjectId::new(1, &[1]).unwrap();
    journal.append(&[Record::Object { object, what }]).unwrap();
    fault::watch();
    journal.flush().unwrap();
    assert!(synced("journal-flush") && synced("journal-fdatasync"), "{:?}", fault::calls());
    // Nothing new, nothing to do.
    fault::watch();
    journal.flush().unwrap();
    assert_eq!(fault::calls(), Vec::<String>::new());
}
