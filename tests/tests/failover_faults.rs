//! Failover when everything else has failed too.

use std::fs::File;
use std::io::Write;

use replicator_tests::mounts::FileSystem::{self, Ext4, Xfs};
use replicator_tests::serial;
use replicator_tests::wreck::{PLACING, State, Wreck};

/// Killed in the middle of applying a batch, with the source gone and a large
/// file half there; interrupted again at the `first`, `first + step`, … th of
/// each kind of call, and repeated.
fn interrupted(kind: FileSystem, nth: u32, calls: &[(&str, u32)]) {
    let _share = serial::share();
    let wreck = Wreck::new(kind, PLACING, nth);
    wreck.fail_over().success();
    let state = wreck.assert_handed_over("not interrupted");
    let mut kills = 0;
    for (call, step) in calls {
        for nth in (1..).step_by(*step as usize) {
            wreck.restore();
            let context = format!("killed at {call} number {nth}");
            let killed = wreck.fail_over_killed(call, nth);
            if killed {
                kills += 1;
                // A kill behind the last step leaves nothing to be done.
                let ended = wreck.fail_over();
                assert!(matches!(ended.code, Some(0 | 1)), "{context}: {ended:#?}");
            }
            assert_eq!(wreck.assert_handed_over(&context), state, "{context}");
            if !killed {
                break;
            }
        }
    }
    eprintln!("{kills} times killed, {state:?}");
    assert!(kills > calls.len(), "too few: {kills}");
}

#[test]
fn interrupted_at_what_makes_it_durable() {
    interrupted(Ext4, 5, &[("fsync", 1), ("fdatasync", 1), ("syncfs", 1)]);
}

#[test]
fn interrupted_at_what_moves_and_removes() {
    let calls =
        [("rename", 1), ("renameat,renameat2", 2), ("umount2", 1), ("unlink,unlinkat,rmdir", 4)];
    interrupted(Xfs, 9, &calls);
}

/// Writes until nothing more can be written.
fn fill(file: &mut File) {
    for size in [1 << 20, 4096, 1] {
        while file.write_all(&vec![1; size]).is_ok() {}
    }
    let _ = file.sync_all();
}

/// Replica and state directory are on a disk without a free byte.
fn full_disk(kind: FileSystem) {
    let _share = serial::share();
    let wreck = Wreck::new(kind, PLACING, 7);
    let mut filler = File::create(wreck.replica().with_file_name("filler")).unwrap();
    fill(&mut filler);
    wreck.fail_over().success();
    assert_eq!(wreck.assert_handed_over("on a full disk"), State::After);
}

#[test]
fn on_a_full_ext4() {
    full_disk(Ext4);
}

#[test]
fn on_a_full_xfs() {
    full_disk(Xfs);
}

/// Killed before the batch was logged: the replica is as it was, and what had
/// arrived of the batch is set aside.
#[test]
fn of_a_batch_that_was_not_logged() {
    let _share = serial::share();
    let wreck = Wreck::new(Ext4, "syncfs", 1);
    wreck.fail_over().success();
    assert_eq!(wreck.assert_handed_over("not logged"), State::Before);
}
