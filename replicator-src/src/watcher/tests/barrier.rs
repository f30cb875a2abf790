//! The barrier: what a drain must give, and that it ends.

use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use replicator_common::control::WatcherChoice;
use replicator_common::id::ObjectId;
use replicator_common::name::Name;

use super::fixture::{Watched, id, on, on_each};
use crate::watcher::Change;

const WRITERS: usize = 2;
/// Drains that have to be right, and files each writer must have made by then.
const ROUNDS: usize = 100;
const FILES: usize = 500;

/// Makes numbered files, and counts each when its system calls have returned.
fn write_files(directory: &Path, done: &AtomicUsize, stop: &AtomicBool) {
    while !stop.load(Ordering::Relaxed) {
        let number = done.load(Ordering::Relaxed);
        let path = directory.join(number.to_string());
        fs::write(&path, "x").unwrap();
        done.store(number + 1, Ordering::SeqCst);
        // Only names have to be there: keep the file system empty.
        fs::remove_file(&path).unwrap();
    }
}

/// While threads write without a pause: each drain gives every change that was
/// complete before it began.
fn holds_under_load(path: &Path, open: fn(&Path) -> Watched) {
    let directories: Vec<_> = (0..WRITERS).map(|n| path.join(format!("dir{n}"))).collect();
    directories.iter().for_each(|directory| fs::create_dir(directory).unwrap());
    let ids: Vec<ObjectId> = directories.iter().map(|directory| id(directory)).collect();
    let mut watched = open(path);
    watched.walk();
    let done: Arc<Vec<AtomicUsize>> = Arc::new((0..WRITERS).map(|_| AtomicUsize::new(0)).collect());
    let stop = Arc::new(AtomicBool::new(false));
    let writers: Vec<_> = directories
        .into_iter()
        .enumerate()
        .map(|(n, directory)| {
            let (done, stop) = (Arc::clone(&done), Arc::clone(&stop));
            std::thread::spawn(move || write_files(&directory, &done[n], &stop))
        })
        .collect();
    // The highest number seen so far; a writer makes them in order.
    let mut seen = [0; WRITERS];
    let mut rounds = 0;
    while rounds < ROUNDS || seen.iter().any(|count| *count < FILES) {
        let complete: Vec<usize> = done.iter().map(|count| count.load(Ordering::SeqCst)).collect();
        let changes = watched.drain().0;
        if changes.iter().any(|change| matches!(change, Change::Gap { .. })) {
            // inotify's queue is short and machines may be busy. A gap covers
            // all that was complete when it was read.
            seen = std::array::from_fn(|n| seen[n].max(complete[n]));
            continue;
        }
        for change in changes {
            let Change::Entry { directory, name } = change else { continue };
            if let Some(n) = ids.iter().position(|id| *id == directory) {
                seen[n] = seen[n].max(number(&name) + 1);
            }
        }
        for n in 0..WRITERS {
            assert!(seen[n] >= complete[n], "writer {n}: seen {}, done {}", seen[n], complete[n]);
        }
        rounds += 1;
    }
    stop.store(true, Ordering::Relaxed);
    writers.into_iter().for_each(|writer| writer.join().unwrap());
}

fn number(name: &Name) -> usize {
    String::from_utf8_lossy(name.as_bytes()).parse().unwrap()
}

#[test]
fn fanotify_drain_gives_all_that_was_complete() {
    on_each(|path| holds_under_load(path, |path| Watched::open(path, WatcherChoice::Fanotify)));
}

#[test]
fn inotify_drain_gives_all_that_was_complete() {
    on_each(|path| holds_under_load(path, |path| Watched::open(path, WatcherChoice::Inotify)));
}

#[test]
fn inotify_by_names_drain_gives_all_that_was_complete() {
    on_each(|path| holds_under_load(path, Watched::names));
}

#[test]
fn drain_gives_a_backlog_of_many_reads_at_once() {
    on("tmpfs", |path| {
        for choice in [WatcherChoice::Fanotify, WatcherChoice::Inotify] {
            let mut watched = Watched::open(path, choice);
            let seen = watched.during(|path| {
                for number in 0..4000 {
                    fs::create_dir(path.join(format!("{number:0200}"))).unwrap();
                }
            });
            let entries = seen.0.iter().filter(|change| matches!(change, Change::Entry { .. }));
            assert_eq!(entries.count(), 4000, "{choice:?}");
            (0..4000).for_each(|n| fs::remove_dir(path.join(format!("{n:0200}"))).unwrap());
        }
    });
}

#[test]
fn read_waits_for_an_event_or_a_wake_up() {
    on("tmpfs", |path| {
        let choices = [WatcherChoice::Fanotify, WatcherChoice::Inotify, WatcherChoice::Scan];
        for choice in choices {
            let long = Duration::from_secs(60);
            let mut watched = Watched::open(path, choice);
            let mut changes = Vec::new();
            let start = Instant::now();
            watched.watcher.read(Duration::from_millis(20), &mut changes).unwrap();
            assert!(start.elapsed() >= Duration::from_millis(20) && changes.is_empty());

            let waker = watched.watcher.waker();
            let other = std::thread::spawn(move || {
                std::thread::sleep(Duration::from_millis(20));
                waker.wake();
            });
            watched.watcher.read(long, &mut changes).unwrap();
            assert!(changes.is_empty());
            other.join().unwrap();
            if choice != WatcherChoice::Scan {
                let file = path.join(format!("{choice:?}"));
                let other = std::thread::spawn(move || {
                    std::thread::sleep(Duration::from_millis(20));
                    fs::write(file, "").unwrap();
                });
                watched.watcher.read(long, &mut changes).unwrap();
                assert!(!changes.is_empty());
                other.join().unwrap();
            }
            assert!(start.elapsed() < long / 2);
        }
    });
}
