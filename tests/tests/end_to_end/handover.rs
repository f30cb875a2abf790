//! The watch goes on while the source's daemon does not run: the service manager
//! keeps its queue (FDSTORE), and the next process needs no walk. Whatever does
//! not fit is a gap, and a walk.

use std::fs::{self, OpenOptions};
use std::io::Write;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use replicator_common::status::Status;
use replicator_tests::compare;
use replicator_tests::hosts::{Hosts, Side};
use replicator_tests::manager::some_descriptor;
use replicator_tests::scenario::patience;
use replicator_tests::workload::{Workload, content};

/// A replicated directory of a file system, so that what lies outside is told
/// apart, with something in it.
struct Service {
    hosts: Hosts,
    tree: PathBuf,
    outside: PathBuf,
}

impl Service {
    fn new() -> Self {
        let hosts = Hosts::supervised();
        let (tree, outside) = (hosts.source().join("tree"), hosts.source().join("outside"));
        fs::create_dir(&outside).unwrap();
        fs::create_dir_all(tree.join("a/b")).unwrap();
        for number in 0..200u64 {
            fs::write(tree.join(format!("a/{number}")), content::bytes(number, 3000)).unwrap();
        }
        fs::write(tree.join("large"), content::incompressible(1, 3 << 20)).unwrap();
        rustix::fs::mkfifoat(rustix::fs::CWD, tree.join("fifo"), rustix::fs::Mode::RUSR).unwrap();
        hosts.create(&tree, &hosts.token(&[])).success();
        hosts.await_enabled(Side::Source);
        let service = Self { hosts, tree, outside };
        service.settle("at first");
        service
    }

    fn status(&self) -> Status {
        self.hosts.daemon(Side::Source).status()
    }

    fn walks(&self) -> (u64, u64) {
        let counters = self.status().source.unwrap().counters;
        (counters.gaps, counters.rescans)
    }

    #[track_caller]
    fn settle(&self, context: &str) {
        self.hosts.daemon(Side::Source).wait(patience());
        compare::assert_same(&self.tree, self.hosts.replica(), &context);
    }

    /// Asks for `what`; `wait` takes its time.
    #[track_caller]
    fn post(&self, what: &str) {
        let path = format!("/replicator/v1/{what}");
        let body = serde_json::json!({ "timeout_seconds": patience().as_secs_f64() });
        let body = if what == "wait" { body } else { serde_json::json!({}) };
        self.hosts.daemon(Side::Source).request("POST", &path, Some(body)).unwrap();
    }

    fn output(&self) -> String {
        self.hosts.daemon(Side::Source).output()
    }

    /// Some more changes, of which a walk that is not run would miss none.
    fn change(&self, tag: &str) {
        fs::write(self.tree.join(format!("new-{tag}")), tag).unwrap();
        fs::create_dir_all(self.tree.join(format!("directory-{tag}/below"))).unwrap();
        fs::write(self.tree.join(format!("directory-{tag}/below/f")), tag).unwrap();
        fs::write(self.tree.join("a/7"), tag).unwrap();
        let _ = fs::remove_file(self.tree.join("a/8"));
        fs::rename(self.tree.join("a/b"), self.tree.join("moved")).unwrap();
        fs::rename(self.tree.join("moved"), self.tree.join("a/b")).unwrap();
        let mut large = OpenOptions::new().append(true).open(self.tree.join("large")).unwrap();
        large.write_all(&content::incompressible(tag.len() as u64, 100_000)).unwrap();
    }

    /// What was replicated is complete, found by no walk, and goes on.
    #[track_caller]
    fn assert_resumed(&self, context: &str) {
        self.settle(context);
        assert_eq!(self.walks(), (0, 0), "{context}: {}", self.output());
        let source = self.status().source.unwrap();
        // A workload makes more of them.
        assert!(source.skipped.fifos >= 1, "{context}: what is passed over is not known any more");
        assert_eq!(self.hosts.manager().kept(), Vec::<String>::new(), "nobody reads a copy");
        self.change("goes-on");
        self.settle(context);
        assert_eq!(self.walks(), (0, 0), "{context}");
    }

    /// It walked, said why, and is complete.
    #[track_caller]
    fn assert_walked(&self, why: &str) {
        self.settle(why);
        assert_eq!(self.walks(), (1, 1), "{}", self.output());
        assert!(self.output().contains(why), "it does not say {why:?}:\n{}", self.output());
    }
}

#[test]
fn a_restart_in_the_middle_of_a_storm_loses_nothing_and_walks_nowhere() {
    let mut service = Service::new();
    let (tree, outside) = (service.tree.clone(), service.outside.clone());
    let storm = Workload { steps: 60, rate: Some(400.0), ..Workload::new() };
    for restart in 0..2 {
        let stop = AtomicBool::new(false);
        let (name, seed) =
            (format!("restart {restart}: {storm}"), storm.seed.wrapping_add(1000 * restart));
        thread::scope(|scope| {
            scope.spawn(|| {
                // However long a restart takes, it is in the middle.
                for round in 0.. {
                    Workload { seed: seed.wrapping_add(round), ..storm.clone() }
                        .run(&tree, &outside);
                    if stop.load(Ordering::Acquire) {
                        return;
                    }
                }
            });
            thread::sleep(Duration::from_millis(1500));
            service.hosts.terminate(Side::Source);
            assert_eq!(service.hosts.manager().kept().len(), 1, "{name}");
            thread::sleep(Duration::from_millis(1000));
            service.change(&format!("nobody-runs-{restart}"));
            service.hosts.start(Side::Source);
            stop.store(true, Ordering::Release);
        });
        service.assert_resumed(&name);
        exact_again(&service);
    }
    let told = service.hosts.manager().told();
    for word in ["READY=1", "STOPPING=1"] {
        assert!(told.iter().any(|line| line == word), "{word} in {told:?}");
    }
}

/// The replica equals an instant of the source after the restart.
fn exact_again(service: &Service) {
    let (start, since) = (Instant::now(), replicator_common::time::Timestamp::now());
    let consistent = || service.status().destination.and_then(|there| there.last_consistent);
    while consistent().is_none_or(|instant| instant < since) {
        assert!(start.elapsed() < patience(), "no exact batch: {:#?}", service.status());
        thread::sleep(Duration::from_millis(50));
    }
}

/// What is only in memory goes along: a large file on its way, a file that cannot
/// be read; and links to the outside, which no directory of ours tells of.
#[test]
fn what_waits_and_what_has_names_outside_is_carried_along() {
    let mut service = Service::new();
    let (inside, outside) = (service.tree.join("linked"), service.outside.join("link"));
    fs::write(&inside, "before").unwrap();
    fs::write(service.tree.join("late"), "before").unwrap();
    service.settle("a file with one name");
    // The records of both are acknowledged, and trimmed, while the file waits.
    for round in 0..5u64 {
        let path = service.tree.join("huge");
        fs::write(&path, content::incompressible(round, 20 << 20)).unwrap();
        fs::write(service.tree.join("small"), format!("{round}")).unwrap();
        thread::sleep(Duration::from_millis(100));
    }
    fs::hard_link(&inside, &outside).unwrap();
    service.post("wait");
    // Told, and not looked at: nobody knows yet that it has a name outside.
    service.post("pause");
    fs::hard_link(service.tree.join("late"), service.outside.join("late")).unwrap();
    service.hosts.terminate(Side::Source);
    change_in_secret(&outside);
    change_in_secret(&service.outside.join("late"));
    service.hosts.start(Side::Source);
    service.post("resume");
    service.assert_resumed("links outside");
}

/// Changes content, and nothing but an event of it tells.
fn change_in_secret(path: &Path) {
    let file = OpenOptions::new().write(true).open(path).unwrap();
    let before = file.metadata().unwrap().modified().unwrap();
    file.write_all_at(b"AFTER", 0).unwrap();
    file.set_modified(before).unwrap();
}

/// Whole directories come in, and change. When their batch was applied
/// and its acknowledgement was lost with the process, the next one knows of them
/// neither by the index nor by a listing.
#[test]
fn directories_that_came_in_with_the_last_batch_are_not_strangers() {
    let mut service = Service::new();
    let stop = AtomicBool::new(false);
    let (tree, outside) = (service.tree.clone(), service.outside.clone());
    thread::scope(|scope| {
        let running = scope.spawn(|| {
            let mut number = 0;
            while !stop.load(Ordering::Acquire) {
                number += 1;
                come_in(&outside.join("new"), &tree.join(format!("in-{}", number % 60)));
                // Long enough after it came in that nobody may run any more.
                change_all(&tree.join(format!("in-{}", (number + 30) % 60)));
                thread::sleep(Duration::from_millis(8));
            }
        });
        for _ in 0..6 {
            thread::sleep(Duration::from_millis(700));
            service.hosts.terminate(Side::Source);
            service.hosts.start(Side::Source);
        }
        stop.store(true, Ordering::Release);
        running.join().unwrap();
    });
    service.assert_resumed("directories that came in");
}

fn come_in(new: &Path, path: &Path) {
    let _ = fs::remove_dir_all(path);
    fs::create_dir_all(new.join("below")).unwrap();
    (0..3).for_each(|n| fs::write(new.join(format!("below/{n}")), "as it came").unwrap());
    fs::rename(new, path).unwrap();
}

fn change_all(path: &Path) {
    if path.exists() {
        (0..3).for_each(|n| change_in_secret(&path.join(format!("below/{n}"))));
    }
}

/// Sent and not acknowledged: the destination has it or not, and only it knows.
#[test]
fn batches_that_were_under_way_are_settled() {
    let mut service = Service::new();
    service.hosts.kill(Side::Destination);
    service.change("the-destination-is-gone");
    thread::sleep(Duration::from_millis(1200));
    service.hosts.terminate(Side::Source);
    service.change("both-are-gone");
    service.hosts.start(Side::Source);
    service.change("only-the-source-is-there");
    // What it is just looking at when it ends is a reason to walk.
    thread::sleep(Duration::from_millis(1200));
    // Twice without a word of the destination.
    service.hosts.terminate(Side::Source);
    service.hosts.start(Side::Source);
    service.hosts.start(Side::Destination);
    service.assert_resumed("the destination was gone");
}

#[test]
fn after_a_kill_what_was_kept_is_not_trusted() {
    let mut service = Service::new();
    // As if what was taken out stayed in, as after a kill in the midst of it.
    service.hosts.manager().ignore_removals();
    service.hosts.terminate(Side::Source);
    service.hosts.start(Side::Source);
    service.settle("taken over");
    assert_eq!(service.walks(), (0, 0));
    for round in 0..300 {
        fs::write(service.tree.join(format!("storm-{round}")), "x").unwrap();
    }
    service.hosts.kill(Side::Source);
    service.change("killed");
    assert_eq!(service.hosts.manager().kept().len(), 1, "the store has its copy still");
    service.hosts.start(Side::Source);
    service.assert_walked("it did not end as it should");
}

#[test]
fn what_does_not_fit_is_thrown_away_and_said() {
    let mut service = Service::new();
    service.hosts.terminate(Side::Source);
    let kept = service.hosts.manager().take();
    let (name, queue) = kept.into_iter().next().unwrap();

    // Another's name; and nothing of ours.
    service.hosts.manager().put("replicator-fs-00000000-0", queue.try_clone().unwrap());
    service.hosts.start(Side::Source);
    service.assert_walked("its queue was not kept");
    assert!(service.output().contains("belongs to no replication here"), "{}", service.output());
    assert_eq!(service.hosts.manager().kept(), Vec::<String>::new(), "nobody would read it");

    // An older queue than the record's.
    service.hosts.terminate(Side::Source);
    drop(service.hosts.manager().take());
    service.hosts.manager().put(&name, queue);
    service.hosts.start(Side::Source);
    service.assert_walked("its queue was not kept");

    // The right name on something else.
    service.hosts.terminate(Side::Source);
    let name = service.hosts.manager().take()[0].0.clone();
    service.hosts.manager().put(&name, some_descriptor());
    service.hosts.start(Side::Source);
    service.assert_walked("no fanotify queue");

    // Numbers that are none, and more than there are.
    for garbage in ["many", "900"] {
        service.hosts.terminate(Side::Source);
        service.change(garbage);
        service.hosts.start_with(Side::Source, &[("LISTEN_FDS", garbage)]);
        service.assert_walked("LISTEN_FDS");
        drop(service.hosts.manager().take());
    }
}

#[test]
fn a_damaged_record_and_a_mark_that_died_are_a_walk() {
    let mut service = Service::new();
    service.hosts.terminate(Side::Source);
    let record = find(&service.hosts.state_dir(Side::Source), "handover");
    let mut bytes = fs::read(&record).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    fs::write(&record, bytes).unwrap();
    service.change("damaged");
    service.hosts.start(Side::Source);
    service.assert_walked("checksum");
    assert!(!record.exists());

    // The queue is the same, and nothing fills it any more, as after an unmount.
    // (A real one need not kill the mark: another mount namespace may still
    // have the file system.)
    service.hosts.terminate(Side::Source);
    let (name, queue) = service.hosts.manager().take().pop().unwrap();
    take_marks_away(&queue);
    service.hosts.manager().put(&name, queue);
    service.change("nothing-tells");
    service.hosts.start(Side::Source);
    service.assert_walked("its mark is not what it was");
}

fn take_marks_away(queue: &OwnedFd) {
    let flags = libc::FAN_MARK_FLUSH | libc::FAN_MARK_FILESYSTEM;
    // SAFETY: a descriptor that is open, and a path that ends with NUL.
    let done =
        unsafe { libc::fanotify_mark(queue.as_raw_fd(), flags, 0, libc::AT_FDCWD, c"/".as_ptr()) };
    assert_eq!(done, 0, "{}", std::io::Error::last_os_error());
}

fn find(directory: &Path, name: &str) -> PathBuf {
    let replications = fs::read_dir(directory.join("replications")).unwrap();
    let found = replications.map(|entry| entry.unwrap().path().join(name)).find(|p| p.exists());
    found.unwrap_or_else(|| panic!("no {name} in {}", directory.display()))
}
