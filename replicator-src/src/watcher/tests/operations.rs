//! Each operation, and what must be seen of it: too much does no harm, too
//! little loses data.

use std::ffi::OsStr;
use std::fs;
use std::io::Write;
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;
use std::time::{Duration, Instant};

use replicator_common::control::WatcherChoice;
use replicator_common::name::Name;
use replicator_common::sys::fanotify::{Detail, Queue};
use replicator_common::sys::handle;
use rustix::fs::{AtFlags, CWD, FallocateFlags, Mode, OFlags, RenameFlags, XattrFlags};

use super::fixture::{Known, Watched, id, know, on, on_each, open_directory, run};

/// What both fanotify and inotify must see.
fn every_operation(watched: &mut Watched) {
    content(watched);
    attributes(watched);
    entries(watched);
    renames(watched);
    names(watched);
}

fn content(watched: &mut Watched) {
    let f = &watched.path.join("f");
    let seen = watched.during(|_| fs::write(f, "text").unwrap());
    seen.entry(&know(f)).content(&know(f)).attributes(&know(f));

    let seen = watched.during(|_| fs::write(f, "other text").unwrap());
    seen.content(&know(f));

    let file = fs::OpenOptions::new().write(true).open(f).unwrap();
    let seen = watched.during(|_| file.set_len(100_000).unwrap());
    seen.content(&know(f));
    let seen = watched.during(|_| (&file).write_all(b"still open").unwrap());
    seen.content(&know(f));
    let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    for mode in [FallocateFlags::empty(), punch] {
        let seen = watched.during(|_| rustix::fs::fallocate(&file, mode, 0, 8192).unwrap());
        seen.content(&know(f));
    }
    let source = watched.path.join("source");
    fs::write(&source, vec![7; 65536]).unwrap();
    let source = fs::File::open(source).unwrap();
    let seen = watched.during(|_| {
        assert!(rustix::fs::copy_file_range(&source, None, &file, None, 4096).unwrap() > 0);
    });
    seen.content(&know(f));
    let mut cloned = false;
    let seen = watched.during(|_| cloned = rustix::fs::ioctl_ficlone(&file, &source).is_ok());
    if cloned {
        seen.content(&know(f));
    }
    drop(file);
}

fn attributes(watched: &mut Watched) {
    let d = &watched.path.join("d");
    fs::create_dir(d).unwrap();
    watched.walk();
    let f = &d.join("f");
    fs::write(f, "").unwrap();
    for path in [f, d, &watched.path.clone()] {
        let at = if *path == watched.path { root(path) } else { know(path) };
        let seen = watched
            .during(|_| fs::set_permissions(path, fs::Permissions::from_mode(0o711)).unwrap());
        seen.attributes(&at);
        let seen = watched.during(|_| std::os::unix::fs::chown(path, Some(7), Some(8)).unwrap());
        seen.attributes(&at);
        let modified = fs::FileTimes::new().set_modified(std::time::UNIX_EPOCH);
        for times in [modified, modified.set_accessed(std::time::UNIX_EPOCH)] {
            let file = fs::File::open(path).unwrap();
            watched.during(|_| file.set_times(times).unwrap()).attributes(&at);
        }
        let seen = watched.during(|_| {
            rustix::fs::setxattr(path, "trusted.x", b"1", XattrFlags::empty()).unwrap();
        });
        seen.attributes(&at);
        let seen = watched.during(|_| run("setfacl", &["-mu:9:r".as_ref(), path]));
        seen.attributes(&at);
    }
}

/// The root has no entry: only its handle counts.
fn root(path: &Path) -> Known {
    let id = id(path);
    Known { directory: id.clone(), id, name: Name::new(b"-").unwrap() }
}

fn entries(watched: &mut Watched) {
    let base = watched.path.clone();
    let (a, b) = (&base.join("link a"), &base.join("link b"));
    fs::write(a, "x").unwrap();
    let seen = watched.during(|_| fs::hard_link(a, b).unwrap());
    seen.entry(&know(b)).attributes(&know(b));
    let gone = know(b);
    let seen = watched.during(|_| fs::remove_file(b).unwrap());
    seen.entry(&gone);

    let d = &base.join("new directory");
    let seen = watched.during(|_| fs::create_dir(d).unwrap());
    seen.entry(&know(d)).content(&know(d));
    let gone = know(d);
    let seen = watched.during(|_| fs::remove_dir(d).unwrap());
    seen.entry(&gone);
    let seen = watched.during(|_| {
        fs::create_dir(d).unwrap();
        fs::remove_dir(d).unwrap();
    });
    seen.entry(&gone);

    let s = &base.join("symlink");
    let seen = watched.during(|_| symlink("nowhere", s).unwrap());
    seen.entry(&know(s)).content(&know(s));
    let p = &base.join("fifo");
    let seen = watched.during(|_| run("mkfifo", &[p]));
    seen.entry(&know(p));

    let t = &base.join("was O_TMPFILE");
    let seen = watched.during(|_| {
        let flags = OFlags::TMPFILE | OFlags::RDWR;
        let file = rustix::fs::open(&base, flags, Mode::RUSR | Mode::WUSR).unwrap();
        rustix::io::write(&file, b"text").unwrap();
        let from = replicator_common::sys::proc_path(file.as_fd());
        rustix::fs::linkat(CWD, from, CWD, t, AtFlags::SYMLINK_FOLLOW).unwrap();
    });
    seen.entry(&know(t)).content(&know(t));
}

fn renames(watched: &mut Watched) {
    let (one, two) = (&watched.path.join("one"), &watched.path.join("two"));
    fs::create_dir(one).unwrap();
    fs::create_dir(two).unwrap();
    watched.walk();
    // A file, a full directory; within a directory and between two.
    fs::create_dir(one.join("d")).unwrap();
    fs::write(one.join("d/below"), "").unwrap();
    fs::write(one.join("f"), "").unwrap();
    for name in ["d", "f"] {
        for (from, to) in
            [(one.join(name), one.join("renamed")), (one.join("renamed"), two.join(name))]
        {
            let old = know(&from);
            let seen = watched.during(|_| fs::rename(&from, &to).unwrap());
            seen.entry(&old).entry(&know(&to)).attributes(&know(&to));
        }
    }
    // Over another.
    fs::write(one.join("victim"), "victim").unwrap();
    let (from, to) = (&two.join("f"), &one.join("victim"));
    let old = know(from);
    let seen = watched.during(|_| fs::rename(from, to).unwrap());
    seen.entry(&old).entry(&know(to)).attributes(&know(to));
    // Two swapped.
    let (a, b) = (&one.join("victim"), &two.join("d"));
    let seen = watched
        .during(|_| rustix::fs::renameat_with(CWD, a, CWD, b, RenameFlags::EXCHANGE).unwrap());
    seen.entry(&know(a)).entry(&know(b)).attributes(&know(a)).attributes(&know(b));
}

fn names(watched: &mut Watched) {
    for name in [&b"\xff\xfe not UTF-8"[..], &[b'x'; 255], b"#7", b"line\nbreak", b"..."] {
        let path = watched.path.join(OsStr::from_bytes(name));
        let seen = watched.during(|_| fs::write(&path, "").unwrap());
        seen.entry(&know(&path)).content(&know(&path));
        let gone = know(&path);
        let seen = watched.during(|_| fs::remove_file(&path).unwrap());
        seen.entry(&gone);
    }
}

#[test]
fn fanotify_sees_every_operation() {
    on_each(|path| {
        let mut watched = Watched::open(path, WatcherChoice::Auto);
        let report = watched.watcher.report();
        assert_eq!(report.kind.as_str(), "fanotify", "{report:?}");
        assert!(watched.watcher.proves() && watched.watcher.rescan_every().is_none());
        every_operation(&mut watched);
        by_handle(&mut watched);
        watched.watcher.alive().unwrap();
    });
}

#[test]
fn fanotify_of_older_kernels_sees_every_operation() {
    on_each(|path| {
        every_operation(&mut Watched::fanotify(path, Detail::Name, Queue::Unlimited));
    });
}

/// Runs in a fresh directory, so that a second watcher finds nothing there.
fn sees_every_operation_by_directory(mut watched: Watched, watches: u64) {
    watched.walk();
    every_operation(&mut watched);
    assert!(watched.watcher.proves() && watched.watcher.rescan_every().is_none());
    assert_eq!(watched.watcher.report().watches, Some(watches));
}

#[test]
fn inotify_sees_every_operation() {
    on_each(|path| {
        let (marks, names) = (path.join("marks"), path.join("names"));
        fs::create_dir(&marks).unwrap();
        fs::create_dir(&names).unwrap();
        // The root, d, one and two; the directory that is renamed with its content
        // was made after the walk, and only marks need none.
        sees_every_operation_by_directory(Watched::open(&marks, WatcherChoice::Inotify), 5);
        sees_every_operation_by_directory(Watched::names(&names), 4);
    });
}

/// What a watch on each directory tells by the object where it can: names that
/// lead nowhere, or elsewhere, by the time anybody looks.
#[test]
fn trap_2_inotify_tells_the_object_behind_a_dead_name() {
    on_each(|path| {
        let mut watched = Watched::open(path, WatcherChoice::Inotify);
        let report = watched.watcher.report();
        assert!(report.reason.contains("fanotify mark on each directory"), "{report:?}");
        let (a, b) = (&path.join("a"), &path.join("b"));
        fs::write(a, "x").unwrap();
        let object = id(a);
        // A second name that comes, is written through, and goes.
        let seen = watched.during(|_| {
            fs::hard_link(a, b).unwrap();
            fs::write(b, "y").unwrap();
            fs::remove_file(b).unwrap();
        });
        assert!(seen.has_object(&object, |what| what.content), "{seen:?}");
        // The same, replaced by another file.
        fs::hard_link(a, b).unwrap();
        fs::write(path.join("temporary"), "").unwrap();
        let mode = fs::Permissions::from_mode(0o751);
        let seen = watched.during(|_| {
            fs::set_permissions(b, mode).unwrap();
            fs::rename(path.join("temporary"), b).unwrap();
        });
        assert!(seen.has_object(&object, |what| what.attributes), "{seen:?}");
        dead_names(&mut watched);
    });
}

#[test]
fn trap_2_inotify_sees_a_file_of_several_names_through_those_outside() {
    on_each(|path| {
        let (source, outside) = (&path.join("source"), &path.join("outside"));
        fs::create_dir(source).unwrap();
        let name = &source.join("f");
        fs::write(name, "x").unwrap();
        fs::hard_link(name, outside).unwrap();
        let mut watched = Watched::open(source, WatcherChoice::Inotify);
        let (known, directory) = (know(name), open_directory(source));
        let watch = watched.watcher.directories();
        watch.linked(directory.as_fd(), &known.name, &known.id);
        watch.linked(directory.as_fd(), &known.name, &known.id);
        assert_eq!(watched.watcher.report().watches, Some(2));
        watched.during(|_| fs::write(outside, "y").unwrap()).content(&known);
        // A further name, and a write through that.
        let further = &path.join("further");
        watched.during(|_| fs::hard_link(name, further).unwrap()).attributes(&known);
        watched.during(|_| fs::write(further, "z").unwrap()).content(&known);
        // It left the source.
        fs::remove_file(name).unwrap();
        watched.drain();
        watch.forget(&known.id);
        watched.during(|_| fs::write(outside, "outside").unwrap()).nothing();
        // One that dies takes its watch along.
        fs::hard_link(outside, name).unwrap();
        watch.linked(directory.as_fd(), &known.name, &known.id);
        [name, outside, further].into_iter().for_each(|name| fs::remove_file(name).unwrap());
        // btrfs lets go of a file in its own time.
        let end = Instant::now() + Duration::from_secs(60);
        while watched.watcher.report().watches != Some(1) {
            assert!(Instant::now() < end, "{:?}", watched.watcher.report());
            std::thread::sleep(Duration::from_millis(20));
            watched.drain();
        }
        assert!(watched.watcher.proves());
    });
}

/// What only handles can tell.
fn by_handle(watched: &mut Watched) {
    let base = watched.path.clone();
    let (a, b) = (&base.join("a"), &base.join("b"));
    fs::write(a, "x").unwrap();
    // An unlink tells of the object, which may have other links.
    fs::hard_link(a, b).unwrap();
    let object = id(a);
    let seen = watched.during(|_| fs::remove_file(a).unwrap());
    assert!(seen.has_object(&object, |what| what.attributes));
    // So does being replaced.
    fs::hard_link(b, a).unwrap();
    fs::write(base.join("temporary"), "").unwrap();
    let seen = watched.during(|_| fs::rename(base.join("temporary"), a).unwrap());
    assert!(seen.has_object(&object, |what| what.attributes));
    // Opened by handle, without a name.
    let root = open_directory(&base);
    let seen = watched.during(|_| {
        let file = handle::open(root.as_fd(), &object, OFlags::WRONLY).unwrap();
        rustix::io::write(&file, b"y").unwrap();
    });
    assert!(seen.has_object(&object, |what| what.content));
    dead_names(watched);
}

/// Writes under names that are no entries.
fn dead_names(watched: &mut Watched) {
    let base = watched.path.clone();
    // Opened under a name that is then unlinked, while another lives.
    let (live, dead) = (&base.join("live"), &base.join("dead"));
    fs::write(live, "x").unwrap();
    fs::hard_link(live, dead).unwrap();
    let mut file = fs::OpenOptions::new().append(true).open(dead).unwrap();
    fs::remove_file(dead).unwrap();
    let seen = watched.during(|_| file.write_all(b"more").unwrap());
    assert!(seen.has_object(&id(live), |what| what.content));
    // O_TMPFILE: later writes still come under its first name.
    let flags = OFlags::TMPFILE | OFlags::RDWR;
    let file = rustix::fs::open(&base, flags, Mode::RUSR | Mode::WUSR).unwrap();
    let t = &base.join("t");
    let from = replicator_common::sys::proc_path(file.as_fd());
    rustix::fs::linkat(CWD, from, CWD, t, AtFlags::SYMLINK_FOLLOW).unwrap();
    let seen = watched.during(|_| {
        rustix::io::write(&file, b"later").unwrap();
    });
    assert!(seen.has_object(&id(t), |what| what.content));
}

#[test]
fn fanotify_sees_a_subtree_through_bind_mounts_and_hard_links_from_outside() {
    on_each(|path| {
        let source = &path.join("source");
        fs::create_dir_all(source).unwrap();
        fs::write(source.join("f"), "").unwrap();
        fs::hard_link(source.join("f"), path.join("outside")).unwrap();
        let bound = &path.with_file_name("bound");
        fs::create_dir(bound).unwrap();
        rustix::mount::mount_bind(source, bound).unwrap();
        let mut watched = Watched::open(source, WatcherChoice::Fanotify);
        let seen = watched.during(|_| fs::write(bound.join("f"), "x").unwrap());
        seen.content(&know(&source.join("f")));
        let seen = watched.during(|_| fs::write(bound.join("new"), "x").unwrap());
        seen.entry(&know(&source.join("new")));
        let seen = watched.during(|_| fs::write(path.join("outside"), "y").unwrap());
        assert!(seen.has_object(&id(&source.join("f")), |what| what.content));
    });
}

#[test]
fn fanotify_sees_btrfs_subvolumes() {
    on("btrfs", |path| {
        let subvolume = &path.join("subvolume");
        run("btrfs", &["subvolume".as_ref(), "create".as_ref(), subvolume]);
        let mounted = &path.with_file_name("mounted");
        fs::create_dir(mounted).unwrap();
        run("mount", &["-oloop,subvol=subvolume".as_ref(), &path.with_file_name("image"), mounted]);
        for source in [subvolume, mounted] {
            let mut watched = Watched::open(source, WatcherChoice::Auto);
            assert_eq!(watched.watcher.report().kind.as_str(), "fanotify");
            every_operation(&mut watched);
            by_handle(&mut watched);
            watched.watcher.alive().unwrap();
            drop(watched);
            for entry in fs::read_dir(source).unwrap() {
                let _ = fs::remove_dir_all(entry.as_ref().unwrap().path());
                let _ = fs::remove_file(entry.unwrap().path());
            }
        }
    });
}

#[test]
fn scan_sees_nothing_and_says_so() {
    on("tmpfs", |path| {
        let mut watched = Watched::open(path, WatcherChoice::Scan);
        watched.during(|path| fs::write(path.join("f"), "").unwrap()).nothing();
        assert!(!watched.watcher.proves());
        assert!(watched.watcher.rescan_every().is_some());
        assert!(!watched.watcher.report().doubts.is_empty());
        watched.watcher.alive().unwrap();
    });
}
