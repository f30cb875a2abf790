//! Disks that fill and fail, for real: the replica's, the destination's and the
//! source's state, files that cannot be read or stored. What is affected is
//! named in status and tried again, all else goes on, nothing is claimed that is
//! not so, and nobody has to lend a hand when the fault is over.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use replicator_common::status::ReplicationStatus;
use replicator_tests::disks::{
    Disks, MIB, await_named, await_told, blockers, fill, fill_up, watermark,
};
use replicator_tests::mounts::FileSystem::{self, Ext4, Tmpfs, Xfs};
use replicator_tests::process::{Daemon, free_port};
use replicator_tests::scenario::patience;

/// What fits goes on, deletions above all; what does not is named and comes
/// when there is room.
fn a_full_replica(kind: FileSystem) {
    let disks = Disks::new(Tmpfs, (kind, 400 * MIB), None);
    for name in ["old-1", "old-2", "old-3"] {
        disks.write(name, 10 * MIB);
    }
    let mut daemon = disks.start();
    let filler = fill(&disks.door(), 5 * MIB);
    let written = disks.write("large", 40 * MIB);
    let words = ["no place at the destination", "o space left", "free space"];
    await_named(&mut daemon, "large", &words);
    // Beside it, all goes on that has room, and the watermark stays before it.
    disks.write("small", 1000);
    disks.await_same(&mut daemon, "small");
    // What there was of it when it was first looked at may be there, but not all.
    let there = fs::metadata(disks.replica().join("large")).map_or(0, |large| large.len());
    assert!(there < 40 * MIB, "{there} bytes are there");
    assert!(watermark(&daemon) < written, "claimed, and not there");
    // More small ones than there is room for.
    for number in 0..100 {
        disks.write(&format!("many-{number:02}"), 200_000);
    }
    daemon.poll_until(patience(), "a small file is named", |daemon| {
        let all = blockers(&daemon.try_status()?);
        all.iter()
            .any(|(path, why)| path.starts_with("many-") && why.contains("o space left"))
            .then_some(())
    });
    // A deletion is replicated to a full disk, and makes room there.
    for name in ["old-1", "old-2"] {
        fs::remove_file(disks.source().join(name)).unwrap();
        disks.await_same(&mut daemon, name);
    }
    for number in 0..100 {
        disks.await_same(&mut daemon, &format!("many-{number:02}"));
    }
    fs::remove_file(filler).unwrap();
    disks.settle(&mut daemon, "there is room again");
    assert!(watermark(&daemon) > written);
    assert!(blockers(&daemon.status()).is_empty());
    assert!(daemon.interrupt().success());
}

#[test]
fn a_full_replica_ext4() {
    a_full_replica(Ext4);
}

#[test]
fn a_full_replica_xfs() {
    a_full_replica(Xfs);
}

/// New names need blocks of their directory. On a disk that is full to the last
/// block, a batch that is logged finds those that are kept for it; then nothing
/// is staged before they are there again, and deletions go on.
fn names_on_a_full_replica(kind: FileSystem) {
    let disks = Disks::new(Tmpfs, (kind, 400 * MIB), None);
    let name = |number: usize| format!("{number:04}-{}", "n".repeat(200));
    let [from, to] = ["from", "to"].map(|directory| disks.source().join(directory));
    fs::create_dir(&from).unwrap();
    fs::create_dir(&to).unwrap();
    for number in 0..1000 {
        fs::write(from.join(name(number)), "content").unwrap();
    }
    disks.write("old", MIB);
    let mut daemon = disks.start();
    let filler = fill_up(&disks.door());
    for number in 0..1000 {
        fs::rename(from.join(name(number)), to.join(name(number))).unwrap();
    }
    disks.await_same(&mut daemon, &format!("to/{}", name(999)));
    // The disk takes whatever is freed: what is kept is not to be had again.
    disks.write("new", 100_000);
    await_named(&mut daemon, "new", &["the space for what is logged", "free space"]);
    fs::remove_file(disks.source().join("old")).unwrap();
    disks.await_same(&mut daemon, "old");
    fs::remove_file(filler).unwrap();
    disks.settle(&mut daemon, "there is room again");
    assert!(blockers(&daemon.status()).is_empty());
    assert!(daemon.interrupt().success());
}

#[test]
fn names_on_a_full_replica_ext4() {
    names_on_a_full_replica(Ext4);
}

#[test]
fn names_on_a_full_replica_xfs() {
    names_on_a_full_replica(Xfs);
}

/// One file that can never be stored does not stop the others.
#[test]
fn a_file_larger_than_the_replica_can_hold() {
    let disks = Disks::new(Xfs, (Ext4, 64 * MIB), None);
    let mut daemon = disks.start();
    let huge = fs::File::create(disks.source().join("huge")).unwrap();
    huge.set_len(5 << 40).unwrap();
    await_named(&mut daemon, "huge", &["ile too large", "cannot hold a file of that size"]);
    disks.write("other", 100_000);
    disks.write("other-large", MIB);
    for name in ["other", "other-large"] {
        disks.await_same(&mut daemon, name);
    }
    huge.set_len(1 << 20).unwrap();
    disks.settle(&mut daemon, "the file is smaller");
    assert!(daemon.interrupt().success());
}

/// Runs `mount -o remount,…` until nothing is open that stands in the way.
fn remount(path: &Path, how: &str, daemon: &mut Daemon) {
    daemon.poll_until(patience(), &format!("remounted {how}"), |_| {
        let mut command = Command::new("mount");
        let output = command.args(["-o", &format!("remount,{how}")]).arg(path).output().unwrap();
        output.status.success().then_some(())
    });
}

#[test]
fn a_replica_that_turns_read_only() {
    let disks = Disks::new(Tmpfs, (Ext4, 64 * MIB), None);
    disks.write("before", 1000);
    let mut daemon = disks.start();
    remount(&disks.door(), "ro", &mut daemon);
    let written = disks.write("small", 1000);
    disks.write("large", MIB);
    fs::remove_file(disks.source().join("before")).unwrap();
    await_told(&mut daemon, "ead-only file system");
    assert!(watermark(&daemon) < written, "claimed, and not there");
    assert!(disks.replica().join("before").exists());
    remount(&disks.door(), "rw", &mut daemon);
    disks.settle(&mut daemon, "it is writable again");
    assert!(daemon.interrupt().success());
}

/// State that cannot be written: nothing is lost meanwhile, nothing is claimed,
/// and when there is room again, all goes on by itself.
fn full_state(part: &str) {
    let disks = Disks::new(Tmpfs, (Ext4, 128 * MIB), Some(part));
    disks.write("before", 1000);
    let mut daemon = disks.start();
    disks.settle(&mut daemon, "before the disk is full");
    let filler = fill_up(disks.small.path());
    let mut number = 0;
    // Until the stores have used up what they had taken before.
    daemon.poll_until(patience(), "status names the full disk", |daemon| {
        for _ in 0..200 {
            number += 1;
            disks.write(&format!("file-{number}"), 100);
        }
        std::thread::sleep(Duration::from_millis(200));
        let text = format!("{:?}", daemon.try_status()?);
        text.contains("o space left").then_some(())
    });
    println!("{part}: {number} files until it was told");
    // Changes while it is full: in place, a deletion, a rename.
    let written = disks.write("before", 2000);
    fs::remove_file(disks.source().join("file-1")).unwrap();
    fs::rename(disks.source().join("file-2"), disks.source().join("moved")).unwrap();
    std::thread::sleep(Duration::from_secs(2));
    let claimed = watermark(&daemon);
    let there = fs::read(disks.replica().join("before")).unwrap().len();
    assert!(there == 2000 || claimed < written, "{claimed} is claimed, {written} is not there");
    fs::remove_file(filler).unwrap();
    disks.settle(&mut daemon, "there is room for state again");
    daemon.poll_until(patience(), "the status is ENABLED again", |daemon| {
        (daemon.try_status()?.status == ReplicationStatus::Enabled).then_some(())
    });
    assert!(daemon.interrupt().success());
}

#[test]
fn the_source_has_no_room_for_its_state() {
    full_state("source");
}

#[test]
fn the_destination_has_no_room_for_its_state() {
    full_state("destination");
}

/// A bad spot of the source's disk: reads of one file fail.
#[test]
fn a_file_of_the_source_that_cannot_be_read() {
    let disks = Disks::new(Ext4, (Ext4, 64 * MIB), None);
    disks.write("good", 5000);
    disks.write("bad", 5000);
    disks.write("bad-large", MIB);
    let bad: Vec<_> = ["bad", "bad-large"].map(|name| disks.source().join(name)).to_vec();
    let trace = disks.logs.path().join("strace");
    let port = free_port();
    let inner = disks.command(port);
    let mut command = Command::new("strace");
    command.args(["-D", "-f", "-qq", "-e", "trace=pread64,preadv2,read"]);
    command.args(["-e", "inject=pread64,preadv2,read:error=EIO"]);
    for path in &bad {
        command.arg("-P").arg(path);
    }
    command.arg("-o").arg(trace).arg(inner.get_program()).args(inner.get_args());
    let log = disks.logs.path().join("log");
    let mut daemon = Daemon::spawn(command, &format!("http://127.0.0.1:{port}"), &log);
    daemon.wait_ready();
    for name in ["bad", "bad-large"] {
        await_named(&mut daemon, name, &["cannot be read", "nput/output error"]);
    }
    disks.await_same(&mut daemon, "good");
    disks.write("later", 300_000);
    disks.await_same(&mut daemon, "later");
    assert!(!disks.replica().join("bad").exists() && !disks.replica().join("bad-large").exists());
    // Under other names, they can be read.
    fs::rename(&bad[0], disks.source().join("fine")).unwrap();
    fs::rename(&bad[1], disks.source().join("fine-large")).unwrap();
    disks.settle(&mut daemon, "all can be read");
    assert!(daemon.interrupt().success());
}
