//! Overflow, marks and directories that are lost, choices that do not work.

use std::fs;
use std::os::fd::AsFd;
use std::path::Path;
use std::time::Duration;

use replicator_common::control::WatcherChoice;
use replicator_common::sys::fanotify::{Detail, Group, Queue, bits};
use replicator_common::sys::{handle, mount};
use rustix::mount::MountFlags;

use super::fixture::{Seen, Watched, know, on, on_each, open_directory, settings};
use crate::watcher::{Change, WatchError, Watcher, open};

fn limit(path: &str) -> usize {
    fs::read_to_string(path).unwrap().trim().parse().unwrap()
}

fn gaps(seen: &Seen) -> usize {
    seen.0.iter().filter(|change| matches!(change, Change::Gap { .. })).count()
}

/// More events than the queue holds make one gap, and after it all flows again.
fn overflows(watched: &mut Watched, limit: usize) {
    watched.drain();
    for number in 0..limit + 100 {
        fs::File::create_new(watched.path.join(number.to_string())).unwrap();
    }
    let seen = watched.drain();
    assert_eq!(gaps(&seen), 1);
    let overflow =
        |change: &Change| matches!(change, Change::Gap { reason } if reason.contains("overflow"));
    // What follows it, if anything, came when there was room again.
    assert!(seen.0.iter().any(overflow));
    let path = watched.path.join("after");
    watched.during(|_| fs::write(&path, "").unwrap()).entry(&know(&path));
    assert_eq!(gaps(&watched.drain()), 0);
}

#[test]
fn fanotify_overflow_is_a_gap() {
    on("tmpfs", |path| {
        let mut watched = Watched::fanotify(path, Detail::Target, Queue::Limited);
        overflows(&mut watched, limit("/proc/sys/fs/fanotify/max_queued_events"));
    });
}

#[test]
fn fanotify_as_opened_does_not_overflow() {
    on("tmpfs", |path| {
        let mut watched = Watched::open(path, WatcherChoice::Fanotify);
        let count = limit("/proc/sys/fs/fanotify/max_queued_events") + 100;
        let seen = watched.during(|path| {
            for number in 0..count {
                fs::File::create_new(path.join(number.to_string())).unwrap();
            }
        });
        let entries = seen.0.iter().filter(|change| matches!(change, Change::Entry { .. }));
        assert_eq!(entries.count(), count);
    });
}

#[test]
fn inotify_overflow_is_a_gap() {
    on("tmpfs", |path| {
        let mut watched = Watched::open(path, WatcherChoice::Inotify);
        overflows(&mut watched, limit("/proc/sys/fs/fanotify/max_queued_events"));
    });
    on("tmpfs", |path| {
        let mut watched = Watched::names(path);
        overflows(&mut watched, limit("/proc/sys/fs/inotify/max_queued_events"));
    });
}

#[test]
fn trap_13_a_silent_mark() {
    on("tmpfs", |path| {
        let group = Group::new(Detail::Target, Queue::Unlimited).unwrap();
        let root = open_directory(path);
        group.mark_file_system(root.as_fd(), bits::CREATE).unwrap();
        assert_eq!(group.marks().unwrap(), 1);
        drop(root);
        mount::unmount(path).unwrap();
        assert_eq!(group.marks().unwrap(), 0);
        assert!(group.read(&mut [0; 4096]).is_err(), "the queue says nothing");
    });
}

#[test]
fn trap_13_the_root_is_pinned_and_its_path_is_checked() {
    on("tmpfs", |path| {
        for choice in [WatcherChoice::Fanotify, WatcherChoice::Inotify, WatcherChoice::Scan] {
            let mut watched = Watched::open(path, choice);
            watched.watcher.alive().unwrap();
            assert_eq!(mount::unmount(path).unwrap_err(), rustix::io::Errno::BUSY);
            rustix::mount::mount("none", path, "tmpfs", MountFlags::empty(), None).unwrap();
            let error = watched.watcher.alive().unwrap_err();
            assert!(matches!(error, WatchError::Lost { .. }), "{error}");
            mount::unmount(path).unwrap();
            watched.watcher.alive().unwrap();
        }
    });
}

#[test]
fn a_directory_that_cannot_be_watched_is_in_doubt_until_it_can() {
    on("tmpfs", |path| {
        let file = path.join("not a directory");
        fs::write(&file, "").unwrap();
        let file = fs::File::open(file).unwrap();
        let id = handle::identify(file.as_fd()).unwrap();
        for watched in Watched::each_directory(path) {
            let doubts = watched.watcher.report().doubts.len();
            watched.watcher.directories().before_listing(file.as_fd(), &id);
            assert!(!watched.watcher.proves());
            assert_eq!(watched.watcher.rescan_every(), Some(Duration::from_secs(5)));
            assert_eq!(watched.watcher.report().doubts.len(), doubts + 1);
            watched.walk();
            assert!(watched.watcher.proves());
            assert_eq!(watched.watcher.report().doubts.len(), doubts);
        }
    });
}

#[test]
fn inotify_forgets_directories_that_are_gone() {
    on("tmpfs", |path| {
        for mut watched in Watched::each_directory(path) {
            fs::create_dir_all(path.join("a/b/c")).unwrap();
            watched.walk();
            assert_eq!(watched.watcher.report().watches, Some(4));
            // A watch follows its directory.
            fs::rename(path.join("a/b"), path.join("moved")).unwrap();
            let file = path.join("moved/c/f");
            watched.during(|_| fs::write(&file, "").unwrap()).entry(&know(&file));
            fs::remove_dir_all(path.join("moved")).unwrap();
            watched.drain();
            assert_eq!(watched.watcher.report().watches, Some(2));
        }
    });
}

#[test]
fn trap_3_a_directory_that_left_is_not_watched_until_it_is_listed_again() {
    on("tmpfs", |path| {
        for (number, kind) in ["marks", "names"].into_iter().enumerate() {
            let source = path.join(kind);
            fs::create_dir_all(source.join("d")).unwrap();
            let mut watched = match number {
                0 => Watched::open(&source, WatcherChoice::Inotify),
                _ => Watched::names(&source),
            };
            watched.walk();
            let (inside, outside) = (source.join("d"), path.join(format!("away-{kind}")));
            let id = know(&inside).id;
            fs::rename(&inside, &outside).unwrap();
            watched.drain();
            watched.watcher.directories().forget(&id);
            watched.during(|_| fs::write(outside.join("f"), "").unwrap()).nothing();
            assert_eq!(watched.watcher.report().watches, Some(1));
            fs::rename(&outside, &inside).unwrap();
            watched.walk();
            let file = inside.join("f");
            watched.during(|_| fs::write(&file, "x").unwrap()).content(&know(&file));
            // One that is gone is forgotten without a word.
            fs::remove_dir_all(&inside).unwrap();
            watched.watcher.directories().forget(&id);
        }
    });
}

/// A file that leaves, changes and returns: whoever sees no event of the change
/// must say that all may differ.
#[test]
fn trap_3_a_file_that_comes_from_outside_is_told() {
    on("tmpfs", |path| {
        let source = path.join("source");
        fs::create_dir(&source).unwrap();
        fs::create_dir(source.join("d")).unwrap();
        let (inside, outside, deeper) =
            (source.join("f"), path.join("outside"), source.join("d/f"));
        for mut watched in Watched::each_directory(&source) {
            watched.walk();
            fs::write(&inside, "x").unwrap();
            let object = know(&inside).id;
            let told = |seen: &Seen, place: &Path| {
                let arrived = |change: &Change| matches!(change, Change::Arrived { from: None, object: o, .. } if *o == object);
                let named = |change: &Change| {
                    let place = know(place);
                    matches!(change, Change::Named { name, what, .. } if *name == place.name && what.content)
                };
                seen.0.iter().any(|change| arrived(change) || named(change))
            };
            let seen = watched.during(|_| fs::rename(&inside, &outside).unwrap());
            assert!(!seen.0.is_empty());
            fs::write(&outside, "y").unwrap();
            let seen = watched.during(|_| fs::rename(&outside, &inside).unwrap());
            assert!(told(&seen, &inside), "{seen:?}");
            let seen = watched.during(|_| fs::rename(&inside, &deeper).unwrap());
            assert!(!told(&seen, &deeper), "it was inside all the time: {seen:?}");
            fs::remove_file(&deeper).unwrap();
        }
        let mut watched = Watched::open(&source, WatcherChoice::Fanotify);
        fs::write(&outside, "x").unwrap();
        let seen = watched.during(|_| fs::rename(&outside, &inside).unwrap());
        let object = know(&inside).id;
        let (from, to) = (Some(know(&source).directory), know(&inside).directory);
        assert!(seen.0.contains(&Change::Arrived { object, from, to }), "{seen:?}");
    });
}

/// Without privilege nothing leads to a directory that left: its mark stays
/// until the next walk renews all of them.
#[test]
fn trap_3_marks_of_directories_that_left_go_with_the_next_walk() {
    on("tmpfs", |path| {
        let source = path.join("source");
        fs::create_dir_all(source.join("d")).unwrap();
        let mut watched = Watched::open(&source, WatcherChoice::Inotify);
        watched.walk();
        let (inside, outside) = (source.join("d"), path.join("away"));
        let id = know(&inside).id;
        fs::rename(&inside, &outside).unwrap();
        without_privilege();
        watched.watcher.directories().forget(&id);
        watched.drain();
        let seen = watched.during(|_| fs::write(outside.join("f"), "").unwrap());
        assert!(!seen.0.is_empty(), "this test is of a mark that stayed");
        // Not with one that is to prove that each directory had a mark all the time.
        let below = source.join("e");
        fs::create_dir(&below).unwrap();
        watched.walk_on();
        watched.watcher.directories().begin_walk(true);
        let file = below.join("f");
        watched.during(|_| fs::write(&file, "x").unwrap()).content(&know(&file));
        watched.walk();
        watched.during(|_| fs::write(outside.join("f"), "x").unwrap()).nothing();
        let file = source.join("f");
        watched.during(|_| fs::write(&file, "x").unwrap()).content(&know(&file));
    });
}

/// Takes every capability from this thread.
fn without_privilege() {
    let none = rustix::thread::CapabilitySet::empty();
    let sets =
        rustix::thread::CapabilitySets { effective: none, permitted: none, inheritable: none };
    rustix::thread::set_capabilities(None, sets).unwrap();
}

#[test]
fn trap_4_a_new_directory_that_is_filled_at_once_is_seen_by_watching_before_listing() {
    on("tmpfs", |path| {
        for (number, mut watched) in Watched::each_directory(path).into_iter().enumerate() {
            let directory = path.join(format!("new-{number}"));
            let seen = watched.during(|_| {
                fs::create_dir(&directory).unwrap();
                fs::write(directory.join("early"), "").unwrap();
            });
            seen.entry(&know(&directory));
            let fd = open_directory(&directory);
            let id = handle::identify(fd.as_fd()).unwrap();
            watched.watcher.directories().before_listing(fd.as_fd(), &id);
            // `early` is found by listing, what comes later by the watch.
            let late = directory.join("late");
            watched.during(|_| fs::write(&late, "").unwrap()).entry(&know(&late));
        }
    });
}

/// A file of the source gets a name in a new directory, is changed through that
/// name, and loses it again, before anybody lists the directory.
#[test]
fn trap_2_a_name_that_comes_and_goes_in_a_new_directory() {
    on_each(|path| {
        let old = path.join("old");
        fs::create_dir(&old).unwrap();
        let file = old.join("f");
        fs::write(&file, "x").unwrap();
        let mut watched = Watched::open(path, WatcherChoice::Inotify);
        watched.walk();
        watched.during(|_| fs::create_dir(path.join("new")).unwrap());
        watched.during(|_| fs::create_dir_all(path.join("above/below")).unwrap());
        for new in ["new", "above/below"] {
            let seen = watched.during(|_| {
                let link = path.join(new).join("link");
                fs::hard_link(&file, &link).unwrap();
                fs::write(&link, new).unwrap();
                fs::remove_file(&link).unwrap();
            });
            seen.content(&know(&file));
        }
    });
}

/// The same where only names lead to directories.
#[test]
fn trap_2_a_name_that_comes_and_goes_in_a_new_directory_without_privilege() {
    on("ext4", |path| {
        let file = path.join("f");
        fs::write(&file, "x").unwrap();
        without_privilege();
        let mut watched = Watched::open(path, WatcherChoice::Inotify);
        watched.walk();
        watched.during(|_| fs::create_dir_all(path.join("a/b")).unwrap());
        watched.during(|_| fs::create_dir(path.join("a/b/c")).unwrap());
        let seen = watched.during(|_| {
            let link = path.join("a/b/c/link");
            fs::hard_link(&file, &link).unwrap();
            fs::write(&link, "through the link").unwrap();
            fs::remove_file(&link).unwrap();
        });
        seen.content(&know(&file));
    });
}

/// What was marked early and moves out before anybody lists it is of no concern.
#[test]
fn trap_3_a_new_directory_that_leaves_unlisted_is_not_watched() {
    on("tmpfs", |path| {
        let source = path.join("source");
        fs::create_dir(&source).unwrap();
        let mut watched = Watched::open(&source, WatcherChoice::Inotify);
        watched.walk();
        let (inside, outside) = (source.join("d"), path.join("away"));
        watched.during(|_| fs::create_dir(&inside).unwrap());
        let in_it = inside.join("f");
        watched.during(|_| fs::write(&in_it, "").unwrap()).content(&know(&in_it));
        watched.during(|_| fs::rename(&inside, &outside).unwrap());
        watched.during(|_| fs::write(outside.join("g"), "").unwrap()).nothing();
        assert_eq!(watched.watcher.report().watches, Some(1));
    });
}

/// The batch that found a new directory may have listed it before a walk begins, and
/// does not list it again.
#[test]
fn a_walk_that_begins_takes_no_watch_of_a_new_directory_away() {
    on_each(|path| {
        for mut watched in Watched::each_directory(path) {
            watched.walk();
            for name in ["listed", "early"] {
                watched.during(|_| fs::create_dir(path.join(name)).unwrap());
            }
            let listed = path.join("listed");
            let (fd, id) = (open_directory(&listed), know(&listed).id);
            watched.watcher.directories().before_listing(fd.as_fd(), &id);
            watched.watcher.directories().begin_walk(false);
            let file = listed.join("f");
            watched.during(|_| fs::write(&file, "x").unwrap()).entry(&know(&file));
            fs::remove_dir_all(&listed).unwrap();
            fs::remove_dir(path.join("early")).unwrap();
        }
        let mut watched = Watched::open(path, WatcherChoice::Inotify);
        watched.walk();
        let (early, file) = (path.join("early"), path.join("early/f"));
        watched.during(|_| fs::create_dir(&early).unwrap());
        watched.watcher.directories().begin_walk(false);
        watched.during(|_| fs::write(&file, "x").unwrap()).content(&know(&file));
        // A whole walk passed, and nobody came to it: it is not in the source.
        watched.watcher.directories().begin_walk(false);
        watched.during(|_| fs::write(&file, "y").unwrap()).nothing();
        fs::remove_dir_all(&early).unwrap();
    });
}

#[test]
fn a_walk_that_finds_directories_without_a_watch_says_so() {
    on("tmpfs", |path| {
        for (number, watched) in Watched::each_directory(path).into_iter().enumerate() {
            let found = || watched.watcher.directories().found_unwatched();
            watched.walk();
            assert_eq!(found(), number > 0, "the root has its watch from the start");
            fs::create_dir_all(path.join(format!("{number}/b"))).unwrap();
            watched.walk();
            assert!(found());
            watched.walk();
            assert!(!found());
        }
    });
}

fn open_overlay(base: &Path, choice: WatcherChoice) -> Result<Box<dyn Watcher>, WatchError> {
    let merged = base.join("merged");
    let settings = settings(7);
    open(open_directory(&merged).as_fd(), &merged, choice, &settings)
}

#[test]
fn a_file_system_that_changes_without_events_is_walked() {
    on("tmpfs", |path| {
        for name in ["lower", "upper", "work", "merged"] {
            fs::create_dir(path.join(name)).unwrap();
        }
        let path_of = |name| path.join(name).display().to_string();
        let (lower, upper, work) = (path_of("lower"), path_of("upper"), path_of("work"));
        let options = format!("lowerdir={lower},upperdir={upper},workdir={work}\0");
        let options = std::ffi::CStr::from_bytes_with_nul(options.as_bytes()).unwrap();
        let merged = path.join("merged");
        rustix::mount::mount("none", &merged, "overlay", MountFlags::empty(), options).unwrap();

        let auto = open_overlay(path, WatcherChoice::Auto).unwrap().report();
        assert_eq!(auto.kind.as_str(), "scan");
        assert!(auto.reason.contains("overlay"), "{}", auto.reason);

        let inotify = open_overlay(path, WatcherChoice::Inotify).unwrap();
        assert!(!inotify.proves());
        assert_eq!(inotify.rescan_every(), Some(Duration::from_secs(7)));
        assert!(inotify.report().doubts[0].contains("overlay"));
    });
}

#[test]
fn without_privilege_auto_takes_inotify_and_fanotify_is_refused() {
    on("ext4", |path| {
        without_privilege();
        let settings = settings(5);
        let root = open_directory(path);
        let report = open(root.as_fd(), path, WatcherChoice::Auto, &settings).unwrap().report();
        assert_eq!(report.kind.as_str(), "inotify");
        assert!(report.reason.contains("CAP_SYS_ADMIN"), "{}", report.reason);
        assert!(report.reason.contains("mark on each directory"), "{}", report.reason);
        let refused = open(root.as_fd(), path, WatcherChoice::Fanotify, &settings);
        assert!(matches!(refused, Err(WatchError::Unsupported { watcher: "fanotify", .. })));
    });
}
