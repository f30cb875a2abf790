//! The traps of change capture (DESIGN "Traps" 2, 3, 4 and 13), end to end:
//! each is a way to change a file so that a watcher which looks right drops it.

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, SystemTime};

use replicator_common::name::Name;
use replicator_common::sys::{handle, proc_path};
use replicator_tests::mounts::FileSystem::{Btrfs, Ext4, Tmpfs, Xfs};
use replicator_tests::mounts::Mount;
use replicator_tests::process::Daemon;
use replicator_tests::scenario::{Layout, Pair, patience};
use rustix::fs::{AtFlags, CWD, Mode, OFlags};
use rustix::io::Errno;

/// More names removed elsewhere than anything remembers.
fn churn(outside: &Path) {
    for number in 0..9000 {
        let path = outside.join(format!("churn-{}", number % 10));
        fs::write(&path, "").unwrap();
        fs::remove_file(&path).unwrap();
    }
}

/// Changes content and leaves size and time of modification as they were.
fn change_in_secret(path: &Path, content: &str) {
    let file = OpenOptions::new().write(true).open(path).unwrap();
    let before = file.metadata().unwrap();
    assert_eq!(before.len(), content.len() as u64, "the size would tell");
    file.write_all_at(content.as_bytes(), 0).unwrap();
    file.set_modified(before.modified().unwrap()).unwrap();
}

/// Nothing that was read lately may differ without saying so (trap 6): old
/// enough for times to prove what they say.
fn age(daemon: &Daemon) {
    thread::sleep(Duration::from_millis(2500));
    daemon.wait(patience());
}

#[test]
fn trap_2_a_write_through_a_name_outside() {
    for watcher in ["fanotify", "inotify"] {
        let pair = Pair::new(Layout::Two(Ext4, Tmpfs));
        let (inside, outside) = (pair.source().join("f"), pair.outside().join("link"));
        fs::write(&inside, "old").unwrap();
        fs::hard_link(&inside, &outside).unwrap();
        let daemon = pair.start_enabled(watcher);
        churn(pair.outside());
        fs::write(&outside, "written outside").unwrap();
        pair.settle(&daemon, &watcher);
        if watcher == "fanotify" {
            // Also when the name is made only now.
            let (inside, outside) = (pair.source().join("g"), pair.outside().join("link-g"));
            fs::write(&inside, "old").unwrap();
            pair.settle(&daemon, &watcher);
            fs::hard_link(&inside, &outside).unwrap();
            fs::write(&outside, "at once").unwrap();
            pair.settle(&daemon, &watcher);
            churn(pair.outside());
            fs::write(&outside, "and later").unwrap();
            pair.settle(&daemon, &watcher);
        }
    }
}

#[test]
fn trap_2_a_nameless_file_made_outside_and_linked_in() {
    let pair = Pair::new(Layout::Two(Xfs, Tmpfs));
    let daemon = pair.start_enabled("fanotify");
    let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
    let fd = rustix::fs::open(pair.outside(), flags, Mode::RUSR | Mode::WUSR).unwrap();
    let mut file = File::from(fd);
    file.write_all(b"before it had a name").unwrap();
    let name = pair.source().join("f");
    rustix::fs::linkat(CWD, proc_path(file.as_fd()), CWD, &name, AtFlags::SYMLINK_FOLLOW).unwrap();
    pair.settle(&daemon, &"linked in");
    file.write_all(b", and after").unwrap();
    pair.settle(&daemon, &"written");
    churn(pair.outside());
    file.write_all(b", and much later").unwrap();
    pair.settle(&daemon, &"written after much else");
}

#[test]
fn trap_2_a_write_through_a_handle() {
    let pair = Pair::new(Layout::Two(Ext4, Tmpfs));
    let directory = pair.source().join("d");
    fs::create_dir(&directory).unwrap();
    fs::write(directory.join("f"), "by name").unwrap();
    let daemon = pair.start_enabled("fanotify");
    let root = File::open(pair.source()).unwrap();
    let object = handle::identify(File::open(directory.join("f")).unwrap().as_fd()).unwrap();
    // Without this the kernel knows a name for the handle.
    fs::write("/proc/sys/vm/drop_caches", "2").unwrap();
    let file = File::from(handle::open(root.as_fd(), &object, OFlags::WRONLY).unwrap());
    file.write_all_at(b"BY HANDLE", 0).unwrap();
    pair.settle(&daemon, &"written by handle");
}

/// Opened under a name that is removed, together with its directory; another
/// name lives.
#[test]
fn trap_2_a_write_through_a_dead_name() {
    for watcher in ["fanotify", "inotify"] {
        let pair = Pair::new(Layout::Two(Ext4, Tmpfs));
        let (directory, live) = (pair.source().join("d"), pair.source().join("live"));
        fs::create_dir(&directory).unwrap();
        let dead = directory.join("dead");
        fs::write(&live, "x").unwrap();
        fs::hard_link(&live, &dead).unwrap();
        let daemon = pair.start_enabled(watcher);
        let mut file = OpenOptions::new().append(true).open(&dead).unwrap();
        fs::remove_dir_all(&directory).unwrap();
        pair.settle(&daemon, &watcher);
        churn(pair.outside());
        daemon.wait(patience());
        file.write_all(b"through the dead name").unwrap();
        pair.settle(&daemon, &watcher);
    }
}

/// A name in a directory that nobody lists meanwhile: none does while
/// replication is paused, nor while the destination is away. When it is listed,
/// the name is gone, and only a watch that was there by then tells of the file.
#[test]
fn trap_2_a_write_through_a_name_that_comes_and_goes_in_a_new_directory() {
    for watcher in ["fanotify", "inotify"] {
        let pair = Pair::new(Layout::Two(Btrfs, Tmpfs));
        let file = pair.source().join("f");
        fs::write(&file, "old").unwrap();
        let mut daemon = pair.start_enabled(watcher);
        daemon.wait(patience());
        daemon.request("POST", "/replicator/v1/pause", Some(serde_json::json!({}))).unwrap();
        let new = pair.source().join("new/below");
        let watches = |daemon: &Daemon| daemon.status().source.unwrap().watcher.watches;
        let before = watches(&daemon);
        fs::create_dir_all(&new).unwrap();
        daemon.poll_until(patience(), "the new directories are watched", |daemon| {
            (watches(daemon) == before.map(|count| count + 2)).then_some(())
        });
        let link = new.join("link");
        fs::hard_link(&file, &link).unwrap();
        fs::write(&link, "written through the link").unwrap();
        fs::remove_file(&link).unwrap();
        daemon.request("POST", "/replicator/v1/resume", Some(serde_json::json!({}))).unwrap();
        pair.settle(&daemon, &watcher);
    }
}

/// Out, changed without a trace in size and time, and back: at once, and after
/// the replica has dropped it.
fn out_and_back(watcher: &str, change: fn(&Path), make: fn(&Path)) {
    let pair = Pair::new(Layout::Two(Ext4, Tmpfs));
    let (inside, outside) = (pair.source().join("moves"), pair.outside().join("away"));
    make(&inside);
    let daemon = pair.start_enabled(watcher);
    age(&daemon);
    for pause in [false, true] {
        fs::rename(&inside, &outside).unwrap();
        if pause {
            pair.settle(&daemon, &format!("{watcher}: out"));
        }
        change(&outside);
        if pause {
            pair.settle(&daemon, &format!("{watcher}: changed outside"));
        }
        fs::rename(&outside, &inside).unwrap();
        pair.settle(&daemon, &format!("{watcher}: back, after a pause: {pause}"));
        // The same change is none a second time.
        fs::remove_dir_all(&inside).or_else(|_| fs::remove_file(&inside)).unwrap();
        make(&inside);
        pair.settle(&daemon, &watcher);
        age(&daemon);
    }
}

#[test]
fn trap_3_a_directory_out_changed_and_back() {
    let make = |path: &Path| {
        fs::create_dir_all(path.join("below/deep")).unwrap();
        for name in ["f", "below/f", "below/deep/f"] {
            fs::write(path.join(name), "inside").unwrap();
        }
    };
    let change = |path: &Path| {
        for name in ["f", "below/deep/f"] {
            change_in_secret(&path.join(name), "outsid");
        }
        fs::set_permissions(path.join("below/f"), PermissionsExt::from_mode(0o751)).unwrap();
        fs::create_dir_all(path.join("new/deep")).unwrap();
        fs::write(path.join("new/deep/f"), "made outside").unwrap();
        fs::rename(path.join("below/deep"), path.join("new/deep/moved")).unwrap();
        let times = SystemTime::UNIX_EPOCH + Duration::from_secs(77);
        File::open(path.join("below")).unwrap().set_modified(times).unwrap();
    };
    for watcher in ["fanotify", "inotify"] {
        out_and_back(watcher, change, make);
    }
}

#[test]
fn trap_3_a_file_out_changed_and_back() {
    for watcher in ["fanotify", "inotify"] {
        out_and_back(
            watcher,
            |path| change_in_secret(path, "outsid"),
            |path| fs::write(path, "inside").unwrap(),
        );
    }
}

/// One name after the other is taken by directories that go on at once; what is
/// written below each must end where that directory stands now, not where an
/// event saw it.
#[test]
fn trap_4_directories_that_move_on_at_once() {
    for watcher in ["fanotify", "inotify"] {
        let pair = Pair::new(Layout::Two(Ext4, Tmpfs));
        let daemon = pair.start_enabled(watcher);
        let slot = |number: usize| pair.source().join(format!("slot-{}", number % 7));
        for round in 0..300 {
            let (first, second) = (slot(round), slot(round * 3 + 1));
            // What stands in the second slot is moved below what is new.
            let new = pair.source().join(format!("new-{round}"));
            fs::create_dir(&new).unwrap();
            fs::write(new.join(format!("file-{round}")), format!("{round}")).unwrap();
            let _ = fs::rename(&second, new.join("below"));
            let _ = fs::remove_dir_all(&first);
            fs::rename(&new, &first).unwrap();
            fs::write(first.join("late"), format!("late {round}")).unwrap();
            fs::rename(&first, &second).unwrap();
            fs::write(second.join("later"), format!("later {round}")).unwrap();
        }
        pair.settle(&daemon, &watcher);
    }
}

/// The path leads to another directory: the watcher's silence proves nothing
/// any more, so nothing new may be claimed, and status must say so.
#[test]
fn trap_13_a_replaced_root_ends_all_claims() {
    for watcher in ["fanotify", "inotify", "scan"] {
        let pair = Pair::new(Layout::Two(Ext4, Tmpfs));
        fs::write(pair.source().join("f"), "x").unwrap();
        let daemon = pair.start_enabled(watcher);
        daemon.wait(patience());
        let replaced = pair.outside().join("replaced");
        fs::rename(pair.source(), &replaced).unwrap();
        fs::create_dir(pair.source()).unwrap();
        fs::write(pair.source().join("other"), "y").unwrap();
        let said = daemon.try_wait(patience()).expect_err("nobody may claim this");
        // Or, for a moment, to none.
        let seen = ["another directory", "cannot be opened"].iter().any(|way| said.contains(way));
        assert!(seen && said.contains("halted since"), "{watcher}: {said}");
        let claim = || daemon_claim(&daemon);
        let before = claim();
        thread::sleep(Duration::from_secs(3));
        assert_eq!(claim(), before, "{watcher}: the watermark moved on");
        assert_eq!(fs::read(pair.replica().join("f")).unwrap(), b"x");
        assert!(!pair.replica().join("other").exists());
    }
}

fn daemon_claim(daemon: &Daemon) -> Option<replicator_common::time::Timestamp> {
    daemon.status().destination.and_then(|destination| destination.last_replicated)
}

/// A file that is replaced in a loop: ext4 gives its inode number to the next
/// one at once, and for a moment answers that there is no memory.
#[test]
fn a_handle_whose_inode_is_being_reused_is_stale() {
    let disk = Mount::new(Ext4);
    let mount =
        rustix::fs::open(disk.path(), OFlags::DIRECTORY | OFlags::RDONLY, Mode::empty()).unwrap();
    let (first, second) = (disk.path().join("a"), disk.path().join("b"));
    fs::write(&first, "x").unwrap();
    let (mut opened, mut stale) = (0, 0);
    let end = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            while !end.load(Ordering::Relaxed) {
                fs::write(&second, "x").unwrap();
                fs::rename(&second, &first).unwrap();
            }
        });
        // Some thousand races in all; without another try, one in a thousand is lost.
        for _ in 0..20_000 {
            let old = handle::of_entry(mount.as_fd(), &Name::new(b"a").unwrap()).unwrap();
            for _ in 0..50 {
                match handle::open(mount.as_fd(), &old, OFlags::RDONLY) {
                    Ok(_) => opened += 1,
                    Err(Errno::STALE) => stale += 1,
                    Err(error) => {
                        end.store(true, Ordering::Relaxed);
                        panic!("{error} after {opened} opens and {stale} stale handles");
                    }
                }
            }
        }
        end.store(true, Ordering::Relaxed);
    });
    assert!(opened > 0 && stale > 0, "no race: {opened} opens and {stale} stale handles");
}
