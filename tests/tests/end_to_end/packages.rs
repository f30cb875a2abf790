//! The Debian packages: what is in them, and that they come, change and go as an
//! operator expects; and on a host that they are installed on, the units, with all
//! their restrictions, under a real systemd.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use replicator_common::status::{EnforcementKind, Status, WatcherKind};
use replicator_tests::compare::{self, Options};
use replicator_tests::mounts::{FileSystem, Mount, run};
use replicator_tests::packages::{Packages, Root};
use replicator_tests::process::Ended;
use replicator_tests::scenario::patience;
use replicator_tests::serial;
use replicator_tests::systemd::Systemd;

const UNITS: [&str; 3] =
    ["replicator-src.service", "replicator-dst.service", "replicator-dst-protect.service"];
const SOURCE_API: &str = "http://127.0.0.1:4480";
const DESTINATION_API: &str = "http://127.0.0.1:4490";

#[test]
fn packages_come_and_go_and_leave_what_is_the_operators() {
    let root = Root::empty();
    root.install(&Packages::build(""));
    for file in [
        "usr/bin/replicator",
        "usr/share/man/man1/replicator-status.1.gz",
        "usr/share/man/man1/replicator-src-serve.1.gz",
        "usr/share/man/man1/replicator-dst-protect.1.gz",
        "usr/share/bash-completion/completions/replicator",
        "usr/share/zsh/vendor-completions/_replicator-src",
        "usr/share/fish/vendor_completions.d/replicator-dst.fish",
        "usr/lib/systemd/system/replicator-src.service",
        "usr/lib/systemd/system/replicator-dst-protect.service",
        "usr/share/doc/replicator/changelog.gz",
    ] {
        assert!(root.path().join(file).is_file(), "{file}");
    }
    let config = root.path().join("etc/replicator/destination.toml");
    for (program, config) in [("replicator-src", "source"), ("replicator-dst", "destination")] {
        let config = root.path().join(format!("etc/replicator/{config}.toml"));
        let mut check = Command::new(root.path().join("usr/bin").join(program));
        run(check.args(["check-config", "--quiet", "--config"]).arg(config));
    }
    let text = fs::read_to_string(&config).unwrap();
    assert!(!text.lines().any(|line| line == "[[replica]]"), "nobody asked for one:\n{text}");

    // An upgrade keeps what the operator wrote, and a purge what a replica needs.
    fs::write(&config, "log = \"debug\"\n").unwrap();
    root.install(&Packages::build("+later"));
    assert_eq!(fs::read_to_string(&config).unwrap(), "log = \"debug\"\n");
    let state = root.path().join("var/lib/replicator");
    fs::create_dir_all(state.join("source/replications")).unwrap();
    fs::create_dir_all(state.join("destination/replicas/fs-0123")).unwrap();
    run(root.dpkg().args(["--purge", "replicator", "replicator-src", "replicator-dst"]));
    assert!(!state.join("source").exists() && state.join("destination/replicas/fs-0123").exists());
    for gone in ["usr/bin/replicator", "etc/replicator/destination.toml"] {
        assert!(!root.path().join(gone).exists(), "{gone}");
    }
}

/// A host that both packages are installed on.
struct Host {
    /// Ends before the file systems do.
    systemd: Option<Systemd>,
    root: Root,
    source: Mount,
    replica: Mount,
    _share: serial::Share,
}

impl Host {
    fn new() -> Self {
        let share = serial::share();
        let (source, replica) = (Mount::new(FileSystem::Ext4), Mount::new(FileSystem::Xfs));
        let root = Root::installed();
        root.write("etc/replicator/source.toml", "");
        let address = DESTINATION_API.trim_start_matches("http://");
        let path = replica.path();
        let text = format!(
            "api = {address:?}\nadvertise = \"127.0.0.1:4481\"\n[[replica]]\npath = {path:?}\n"
        );
        root.write("etc/replicator/destination.toml", &text);
        for unit in UNITS {
            let log = format!("/var/lib/{unit}.log");
            let lines = format!("[Service]\nStandardOutput=append:{log}\nStandardError=inherit\n");
            root.write(&format!("etc/systemd/system/{unit}.d/log.conf"), &lines);
            let at = format!("--root={}", root.path().display());
            run(Command::new("systemctl").args([&at, "enable", unit]));
        }
        Self { systemd: None, root, source, replica, _share: share }
    }

    fn boot(&mut self) {
        self.systemd = Some(Systemd::boot_installed(self.root.path()));
    }

    fn shut_down(&mut self) {
        self.systemd = None;
    }

    fn systemd(&self) -> &Systemd {
        self.systemd.as_ref().unwrap()
    }

    #[track_caller]
    fn start(&self, unit: &str) {
        let ended = self.systemd().systemctl(&["start", unit]);
        assert_eq!(ended.code, Some(0), "{unit}: {ended:?}\n{}", self.log(unit));
    }

    fn log(&self, unit: &str) -> String {
        let path = self.root.path().join(format!("var/lib/{unit}.log"));
        fs::read_to_string(path).unwrap_or_default()
    }

    #[track_caller]
    fn property(&self, unit: &str, name: &str) -> String {
        let arguments = ["show", "--value", "--property", name, unit];
        self.systemd().systemctl(&arguments).success().stdout.trim().to_owned()
    }

    #[track_caller]
    fn replicator(&self, endpoint: &str, arguments: &[&str]) -> Ended {
        self.systemd().run(&[&["replicator", "--endpoint", endpoint], arguments].concat())
    }

    #[track_caller]
    fn enrol(&self) {
        let replica = self.replica.path().to_str().unwrap();
        let config = "/etc/replicator/destination.toml";
        let words = ["replicator-dst", "token", "--config", config, "--replica", replica];
        let token = self.systemd().run(&words).success().stdout;
        let source = self.source.path().to_str().unwrap();
        let arguments = ["create-replication-configuration", "--devices", "--source", source];
        let arguments = [&arguments[..], &["--destination", token.trim()]].concat();
        self.replicator(SOURCE_API, &arguments).success();
    }

    #[track_caller]
    fn settle(&self, context: &str) {
        let limit = patience().as_secs().to_string();
        let waited = self.replicator(SOURCE_API, &["wait", "--timeout", &limit]);
        let logs = || UNITS.map(|unit| self.log(unit)).join("\n--\n");
        assert_eq!(waited.code, Some(0), "{context}: {waited:?}\n{}", logs());
        let options = Options { devices: true };
        let found = compare::compare(self.source.path(), self.replica.path(), options);
        assert!(found.is_empty(), "{context}:\n{}", compare::report(&found));
    }

    #[track_caller]
    fn status(&self, endpoint: &str) -> Status {
        let said = self.replicator(endpoint, &["status", "--json"]).success();
        let all: Vec<Status> = serde_json::from_str(&said.stdout).unwrap();
        all.into_iter().next().unwrap()
    }

    /// What root on this host gets who writes to the replica.
    #[track_caller]
    fn assert_read_only(&self, context: &str) {
        let path = self.replica.path().join("intruder");
        let ended = self.systemd().run(&["touch", path.to_str().unwrap()]);
        assert!(ended.stderr.contains("Read-only file system"), "{context}: {ended:?}");
    }
}

#[test]
fn units_with_all_their_restrictions_replicate_everything() {
    let mut host = Host::new();
    host.boot();
    fill(host.source.path());
    host.start("replicator-dst.service");
    host.start("replicator-src.service");
    host.enrol();
    host.settle("at first");
    let status = host.status(SOURCE_API);
    let source = status.source.unwrap();
    assert_eq!(source.watcher.kind, WatcherKind::Fanotify, "{:?}", source.watcher);
    assert_eq!(source.watcher.doubts, Vec::<String>::new());
    let there = host.status(DESTINATION_API).destination.unwrap();
    assert_eq!(there.enforcement.kind, EnforcementKind::Mount, "{:?}", there.enforcement);
    assert!(!there.enforcement.reason.contains("NAMESPACE"), "{:?}", there.enforcement);
    let able = &there.abilities;
    let all = [able.chown, able.xattrs, able.privileged_xattrs, able.devices, able.handles];
    assert_eq!(all, [true; 5], "{able:?}");
    host.assert_read_only("while it is replicated");

    // An upgrade of the source loses nothing and walks nowhere.
    host.systemd().systemctl(&["restart", "replicator-src.service"]).success();
    fs::write(host.source.path().join("after"), "a restart").unwrap();
    host.settle("after a restart");
    let counters = host.status(SOURCE_API).source.unwrap().counters;
    assert_eq!((counters.gaps, counters.rescans), (0, 0), "{}", host.log(UNITS[0]));

    // Nothing stands in the way of verification, which looks at all of both sides.
    host.replicator(SOURCE_API, &["verify", "--quiet"]).success();
    let report = host.replicator(DESTINATION_API, &["failover"]).success().json();
    assert_eq!(report["NotReplicatedPaths"], serde_json::json!([]), "{report}");
    let path = host.replica.path().join("ours");
    host.systemd().run(&["touch", path.to_str().unwrap()]).success();
}

/// All that a restriction could stand in the way of.
fn fill(source: &Path) {
    let text = source.join("text");
    fs::write(&text, "content").unwrap();
    std::os::unix::fs::chown(&text, Some(1234), Some(5678)).unwrap();
    let program = source.join("program");
    fs::write(&program, "x").unwrap();
    fs::set_permissions(&program, fs::Permissions::from_mode(0o6755)).unwrap();
    let secret = source.join("secret");
    fs::write(&secret, "nobody reads this").unwrap();
    fs::set_permissions(&secret, fs::Permissions::from_mode(0o0)).unwrap();
    let path = |name: &str| source.join(name).to_str().unwrap().to_owned();
    run(Command::new("mknod").args([&path("null"), "c", "1", "3"]));
    run(Command::new("mknod").args([&path("disk"), "b", "7", "250"]));
    // cap_net_raw, permitted and effective.
    let mut capability = [0; 20];
    (capability[0], capability[3], capability[5]) = (1, 2, 0x20);
    for (name, value) in [
        ("trusted.a", &b"b"[..]),
        ("user.c", b"d"),
        ("security.e", b"f"),
        ("security.capability", &capability),
    ] {
        rustix::fs::setxattr(&text, name, value, rustix::fs::XattrFlags::empty()).unwrap();
    }
    run(Command::new("setfacl").args(["-m", "u:4321:r", &path("text")]));
    fs::write(source.join("large"), vec![7; 3 << 20]).unwrap();
}

#[test]
fn after_a_reboot_replicas_are_read_only_before_any_service_runs() {
    let mut host = Host::new();
    host.boot();
    fs::write(host.source.path().join("file"), "content").unwrap();
    host.start("replicator-dst.service");
    host.start("replicator-src.service");
    host.enrol();
    host.settle("at first");
    host.shut_down();
    fs::write(host.source.path().join("late"), "nobody watched").unwrap();
    host.boot();
    let unit = "replicator-dst-protect.service";
    assert_eq!(host.property("replicator-dst.service", "ActiveState"), "inactive");
    assert_eq!(host.property(unit, "Result"), "success", "{}", host.log(unit));
    host.assert_read_only("after the reboot");
    // Any number of times, by hand too, and while the daemon runs.
    host.start(unit);
    host.start("replicator-dst.service");
    host.start(unit);
    host.start("replicator-src.service");
    host.settle("after the reboot");

    // Its file system is missing: nothing is mounted over the empty directory.
    host.shut_down();
    let path = host.replica.path().to_owned();
    host.replica.detach();
    host.boot();
    assert_eq!(host.property(unit, "Result"), "exit-code");
    assert!(host.log(unit).contains("mount its file system first"), "{}", host.log(unit));
    let ended = host.systemd().run(&["touch", path.join("x").to_str().unwrap()]);
    assert_eq!(ended.code, Some(0), "{ended:?}");
    fs::remove_file(path.join("x")).unwrap();
    host.shut_down();
    host.replica.attach();
}

/// A process that does not come round is killed, and started again.
#[test]
fn the_watchdog_ends_what_hangs_and_nothing_else() {
    let mut host = Host::new();
    for unit in &UNITS[..2] {
        let path = format!("etc/systemd/system/{unit}.d/watchdog.conf");
        let lines = "[Service]\nWatchdogSec=6s\nTimeoutAbortSec=2s\nRestartSec=100ms\n";
        host.root.write(&path, lines);
    }
    host.boot();
    host.start("replicator-dst.service");
    host.start("replicator-src.service");
    host.enrol();
    host.settle("at first");
    let ids = || [0, 1].map(|at| host.property(UNITS[at], "MainPID"));
    let before = ids();
    thread::sleep(Duration::from_secs(15));
    assert_eq!(ids(), before, "they live");
    for (at, unit) in UNITS[..2].iter().enumerate() {
        host.systemd().systemctl(&["kill", "--signal=STOP", unit]).success();
        let start = Instant::now();
        while host.property(unit, "MainPID") == before[at]
            || host.property(unit, "ActiveState") != "active"
        {
            assert!(start.elapsed() < patience(), "{unit} hangs for ever");
            thread::sleep(Duration::from_millis(200));
        }
        assert_eq!(host.property(unit, "NRestarts"), "1");
    }
    fs::write(host.source.path().join("after"), "both hung").unwrap();
    host.settle("after both hung");
}

#[test]
fn systemd_finds_nothing_wrong_with_the_units() {
    let mut host = Host::new();
    host.boot();
    // The worst that is accepted, in tenths: of the source, which has mounts of its
    // own; of the destination, which may not.
    for (unit, worst) in UNITS.into_iter().zip([30, 50, 40]) {
        let path: PathBuf = host.root.path().join("usr/lib/systemd/system").join(unit);
        let path = path.to_str().unwrap();
        let verified = host.systemd().run(&["systemd-analyze", "verify", "--man=no", path]);
        assert_eq!((verified.code, verified.stderr.trim()), (Some(0), ""), "{unit}");
        let worst = format!("--threshold={worst}");
        let words = ["systemd-analyze", "security", "--offline=yes", "--no-pager", &worst, path];
        let rated = host.systemd().run(&words);
        assert_eq!(rated.code, Some(0), "{unit}:\n{}", rated.stdout);
    }
}
