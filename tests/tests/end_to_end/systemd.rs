//! The source's daemon as a service of a real systemd: what `handover.rs` shows
//! with a manager of its own holds with the one that operators have.

use std::fs;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use replicator_common::status::{Counters, Status};
use replicator_tests::compare;
use replicator_tests::hosts::{Hosts, Side};
use replicator_tests::scenario::patience;
use replicator_tests::systemd::{SERVICE, Systemd};
use replicator_tests::workload::Workload;

/// A replicated directory of a file system, with a part of it outside.
struct Service {
    /// Ends before the file systems do.
    systemd: Systemd,
    hosts: Hosts,
    tree: PathBuf,
    outside: PathBuf,
}

impl Service {
    /// Both daemons run, the source's under systemd.
    fn new(lines: &str) -> Self {
        let mut hosts = Hosts::strangers();
        hosts.terminate(Side::Source);
        let command = hosts.serving(Side::Source);
        let systemd = Systemd::boot(&hosts.namespace(Side::Source), &command, lines);
        systemd.job("start");
        let (tree, outside) = (hosts.source().join("tree"), hosts.source().join("outside"));
        fs::create_dir(&outside).unwrap();
        fs::create_dir_all(tree.join("a/b")).unwrap();
        for number in 0..200 {
            fs::write(tree.join(format!("a/{number}")), format!("{number}")).unwrap();
        }
        hosts.create(&tree, &hosts.token(&[])).success();
        hosts.await_enabled(Side::Source);
        let service = Self { systemd, hosts, tree, outside };
        service.settle("at first");
        service
    }

    #[track_caller]
    fn settle(&self, context: &str) {
        let limit = patience().as_secs().to_string();
        self.hosts.on(Side::Source, &["wait", "--timeout", &limit]).success();
        compare::assert_same(&self.tree, self.hosts.replica(), &context);
    }

    /// Of the process that runs now.
    #[track_caller]
    fn counters(&self) -> Counters {
        let said = self.hosts.on(Side::Source, &["status", "--json"]).success();
        let all: Vec<Status> = serde_json::from_str(&said.stdout).unwrap();
        all.into_iter().next().unwrap().source.unwrap().counters
    }

    /// Gaps and walks.
    #[track_caller]
    fn walks(&self) -> (u64, u64) {
        let counters = self.counters();
        (counters.gaps, counters.rescans)
    }

    fn change(&self, tag: &str) {
        fs::write(self.tree.join(format!("new-{tag}")), tag).unwrap();
        fs::create_dir_all(self.tree.join(format!("directory-{tag}/below"))).unwrap();
        fs::write(self.tree.join(format!("directory-{tag}/below/f")), tag).unwrap();
        fs::write(self.tree.join("a/7"), tag).unwrap();
    }
}

#[test]
fn systemctl_restart_in_the_middle_of_a_storm_loses_nothing_and_walks_nowhere() {
    let service = Service::new("FileDescriptorStoreMax=16");
    let storm = Workload { steps: 60, rate: Some(400.0), ..Workload::new() };
    for restart in 0..4 {
        let process = service.systemd.property("MainPID");
        let (stop, seed) = (AtomicBool::new(false), storm.seed.wrapping_add(1000 * restart));
        let name = format!("restart {restart}: {storm}");
        thread::scope(|scope| {
            scope.spawn(|| {
                // However long a restart takes, it is in the middle.
                for round in 0.. {
                    let seed = seed.wrapping_add(round);
                    Workload { seed, ..storm.clone() }.run(&service.tree, &service.outside);
                    if stop.load(Ordering::Acquire) {
                        return;
                    }
                }
            });
            thread::sleep(Duration::from_millis(1500));
            service.systemd.job("restart");
            stop.store(true, Ordering::Release);
        });
        assert_ne!(service.systemd.property("MainPID"), process, "{name}");
        service.settle(&name);
        assert_eq!(service.walks(), (0, 0), "{name}\n{}", service.systemd.output());
        let kept = service.systemd.property("NFileDescriptorStore");
        assert_eq!(kept, "0", "{name}: nobody would read what systemd keeps");
        service.change(&format!("goes-on-{restart}"));
        service.settle(&name);
        assert_eq!(service.walks(), (0, 0), "{name}");
    }
}

/// What systemd does not keep is a walk, and said: a unit without a store, a
/// stop (after which the store is empty), and a process that was killed, which
/// systemd starts again by itself.
#[test]
fn what_systemd_does_not_keep_is_a_walk() {
    let walked = |service: &Service, context: &str, why: &str| {
        service.settle(context);
        assert_eq!(service.walks(), (1, 1), "{context}\n{}", service.systemd.output());
        assert!(service.systemd.output().contains(why), "{}", service.systemd.output());
    };
    let service = Service::new("");
    service.systemd.job("restart");
    walked(&service, "a unit without a store", "its queue was not kept");
    drop(service);

    let service = Service::new("FileDescriptorStoreMax=16\nRestart=on-failure\nRestartSec=0");
    service.systemd.job("stop");
    service.change("stopped");
    service.systemd.job("start");
    walked(&service, "a stop and a start", "its queue was not kept");

    let process = service.systemd.property("MainPID");
    service.systemd.systemctl(&["kill", "--signal=KILL", SERVICE]).success();
    service.change("killed");
    let start = Instant::now();
    while service.systemd.property("MainPID") == process
        || service.systemd.property("ActiveState") != "active"
    {
        assert!(start.elapsed() < patience(), "systemd does not start it again");
        thread::sleep(Duration::from_millis(50));
    }
    walked(&service, "a kill", "");
}
