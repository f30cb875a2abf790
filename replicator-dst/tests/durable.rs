//! Each durable call of the destination and of small state files is made, and in
//! its order (docs/guarantees.md, "Durable calls"). That the calls themselves
//! reach the disk is seen by strace, in `tests/tests/end_to_end/power.rs`.

#![allow(clippy::unwrap_used)]

mod common;

use std::time::Duration;

use common::{Batch, ROOT, World, id, state};
use replicator_common::control::{Control, DeletionMode};
use replicator_common::crashsafe::{self, Format};
use replicator_common::fault;
use replicator_common::id::{BatchId, Incarnation};
use replicator_common::object::Kind;
use replicator_common::wire::{ContentSource, Op};
use replicator_dst::store::{Commit, SetAsideItem, Standing, Store};
use tokio::sync::Mutex;

/// Calls are seen for the whole process.
static ALONE: Mutex<()> = Mutex::const_new(());

/// What was called meanwhile, as far as `wanted` picks it.
fn seen(wanted: &[&str]) -> Vec<String> {
    let calls = fault::calls();
    calls.into_iter().filter(|call| wanted.iter().any(|w| call.starts_with(w))).collect()
}

#[tokio::test]
async fn a_state_file_is_durable_before_and_after_its_rename() {
    let _alone = ALONE.lock().await;
    const FORMAT: Format = Format { name: "test", version: 1 };
    let directory = tempfile::tempdir().unwrap();
    let at = directory.path().display();
    let path = directory.path().join("state");
    // A destination of another test may be closing its store still.
    let own = || -> Vec<String> {
        let calls = fault::calls().into_iter();
        calls.filter(|call| call.contains(&at.to_string())).collect()
    };
    fault::watch();
    crashsafe::write(&path, &FORMAT, &1).unwrap();
    let expected = [
        format!("state-create {at}/state.new"),
        format!("state-write {at}/state.new"),
        format!("state-fsync {at}/state.new"),
        format!("state-rename {at}/state"),
        format!("state-fsync-directory {at}"),
    ];
    assert_eq!(own(), expected);
    fault::watch();
    crashsafe::remove(&path).unwrap();
    assert_eq!(own().last().unwrap(), &format!("state-fsync-directory {at}"));
    fault::watch();
    crashsafe::create_directory(&directory.path().join("a")).unwrap();
    assert_eq!(own(), [format!("state-fsync-directory {at}")]);
}

#[tokio::test]
async fn what_the_store_promises_is_synced_and_nothing_else_is() {
    let _alone = ALONE.lock().await;
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("store.redb");
    let item = || SetAsideItem {
        file: "a".to_owned(),
        object: "b".to_owned(),
        path: None,
        reason: "c".to_owned(),
    };
    let new = || Standing::new(Incarnation([1; 16]), false);
    let store = Store::open(&path, new).unwrap();
    // What a power cut now would leave: without what closing it would add.
    let cut = directory.path().join("cut");
    std::fs::copy(&path, &cut).unwrap();
    let other = || Standing::new(Incarnation([2; 16]), false);
    let found = Store::open(&cut, other).unwrap().standing().unwrap().incarnation;
    assert_eq!(found, Incarnation([1; 16]), "open");
    let mut standing = store.standing().unwrap();
    standing.committed = BatchId(1);
    let mut durable = |what: &str, call: &mut dyn FnMut(&Store, &mut Standing), expected: bool| {
        fault::watch();
        call(&store, &mut standing);
        assert_eq!(!seen(&["store-sync"]).is_empty(), expected, "{what}");
    };
    durable("set_standing", &mut |store, standing| store.set_standing(standing).unwrap(), true);
    let mut commit = |store: &Store, standing: &mut Standing| {
        store.commit(standing, &Commit::default()).unwrap();
    };
    durable("commit", &mut commit, true);
    durable("forget", &mut |store, _| store.forget(BatchId(1), None).unwrap(), true);
    durable("note_set_aside", &mut |store, _| store.note_set_aside(&[item()]).unwrap(), true);
    durable("renounce", &mut |store, standing| store.renounce(standing).unwrap(), true);
    durable("note_standing", &mut |store, standing| store.note_standing(standing).unwrap(), false);
}

/// Where in `calls` the first is that begins so, at or after `from`.
fn find(calls: &[String], from: usize, start: &str) -> usize {
    let found = calls[from..].iter().position(|call| call.starts_with(start));
    from + found.unwrap_or_else(|| panic!("no {start} after {from}: {calls:#?}"))
}

/// Staged, synced, logged, only then applied; and what was applied is synced
/// before its record goes, and the record before the staged files that it needs.
#[tokio::test(flavor = "multi_thread")]
async fn a_batch_is_synced_then_logged_then_applied_then_covered() {
    let _alone = ALONE.lock().await;
    let mut world = World::new();
    let service = world.open(None).await;
    world.enrol(&service, false).await;
    let mut source = world.connect(&service, 0).await;
    let first = Batch::new()
        .root()
        .content(3, b"hard", true, 2)
        .entry(ROOT, "h1", None, Some(3))
        .entry(ROOT, "h2", None, Some(3));
    fault::watch();
    source.apply(1, &first).await;
    let calls = fault::calls();
    let staged = find(&calls, 0, "create p");
    let synced = find(&calls, staged, "syncfs");
    let logged = find(&calls, synced, "store-sync store.redb");
    let applied = find(&calls, 0, "rename h");
    assert!(logged < applied, "{calls:#?}");
    // Idle: covered, and then forgotten.
    fault::watch();
    source.apply(2, &Batch::new().content(3, b"hardly", false, 2).reread()).await;
    let rewritten = find(&fault::calls(), 0, "copy");
    for _ in 0..400 {
        if seen(&["unlink p"]).iter().any(|call| call.starts_with("unlink p2")) {
            break;
        }
        tokio::time::sleep(Duration::from_millis(25)).await;
    }
    let calls = fault::calls();
    let covered = find(&calls, rewritten, "syncfs");
    let forgotten = find(&calls, covered, "store-sync store.redb");
    let discarded = find(&calls, rewritten, "unlink p2");
    assert!(forgotten < discarded, "{calls:#?}");
    // A heartbeat's claim is durable before it is told.
    fault::watch();
    source.apply(3, &Batch::new()).await;
    find(&fault::calls(), 0, "store-sync store.redb");
    // Failover: what was applied is synced before its record goes; what is handed
    // over is synced before it is said to be released.
    let put = |n| Op::Put {
        object: id(n),
        state: state(Kind::File, 0o600, 0),
        content: ContentSource::Unchanged,
        new: true,
        links: 1,
    };
    source.apply(4, &Batch::new().directory(ROOT).op(put(9)).entry(ROOT, "n", None, Some(9))).await;
    fault::watch();
    service.delete(&world.source, DeletionMode::LocalConfigurationOnly).unwrap();
    let calls = fault::calls();
    let covered = find(&calls, 0, "syncfs");
    let forgotten = find(&calls, covered, "store-sync store.redb");
    let decided = find(&calls, forgotten, "state-rename");
    let handed_over = find(&calls, decided, "syncfs");
    let released = find(&calls, handed_over, "state-rename");
    find(&calls, released, "mount unmount");
}
