//! A real systemd with one service, or with the units of packages: process 1 of
//! namespaces of its own, beside whatever manages this machine.
//!
//! It knows no units but the test's, cannot change the kernel's settings, and
//! goes with all its processes when it is dropped.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use crate::mounts::{Scratch, require_root};
use crate::process::{Ended, die_with_parent, run_to_end};

/// The name of the service.
pub const SERVICE: &str = "replicator-src.service";
/// How long it may take to boot.
const BOOT_LIMIT: Duration = Duration::from_secs(60);
/// How long its answer may take: a restart includes a clean stop.
const ANSWER_LIMIT: Duration = Duration::from_secs(120);

/// Run with mounts of its own, before it is process 1. What is unmounted
/// outside is unmounted inside too, so that it keeps no file system of others.
const PREPARE: &str = r#"
set -e
mount --make-rslave /
mount -t tmpfs -o mode=755 tmpfs /run
mount -t cgroup2 cgroup2 /sys/fs/cgroup
mount --bind /proc/sys /proc/sys
mount -o remount,bind,ro /proc/sys
mount --bind /dev/null /dev/console
if [ -n "$3" ]; then
    ip link set lo up
    mount -t overlay overlay -o "lowerdir=$3/usr/bin:/usr/bin" /usr/bin
    mount -t overlay overlay -o "lowerdir=$3/etc:/etc" /etc
    mount --bind "$3/var/lib" /var/lib
fi
exec env -i container=replicator-tests "PATH=$PATH" "SYSTEMD_UNIT_PATH=$1" SYSTEMD_GENERATOR_PATH= \
    "$2" --system --unit=test.target --log-target=null --show-status=no
"#;

/// What services and their dependencies expect of any system.
const TARGETS: [&str; 8] = [
    "sysinit.target",
    "basic.target",
    "local-fs.target",
    "remote-fs.target",
    "network.target",
    "multi-user.target",
    "shutdown.target",
    "umount.target",
];

/// See the module.
#[derive(Debug)]
pub struct Systemd {
    /// `unshare`, whose end is the end of all.
    outer: Child,
    /// Process 1 of the namespaces, as it is called out here.
    manager: u32,
    group: PathBuf,
    units: Scratch,
}

impl Systemd {
    /// Boots it in a network namespace, with `command` as its [`SERVICE`], which
    /// has `lines` more in its section. The service is not started yet.
    pub fn boot(network: &Path, command: &Command, lines: &str) -> Self {
        let units = Scratch::new("systemd");
        let log = units.path().join("log");
        fs::write(units.path().join("test.target"), "[Unit]\nDefaultDependencies=no\n").unwrap();
        fs::write(units.path().join(SERVICE), unit(command, lines, &log)).unwrap();
        Self::boot_with(units, Some(network), None)
    }

    /// Boots a host, with a network of its own, on which packages are installed:
    /// `root` has their files, and keeps their state. What is enabled there is
    /// started, up to `sysinit.target`.
    pub fn boot_installed(root: &Path) -> Self {
        let units = Scratch::new("systemd");
        for target in TARGETS {
            let text = "[Unit]\nDefaultDependencies=no\n";
            fs::write(units.path().join(target), text).unwrap();
        }
        let text = "[Unit]\nDefaultDependencies=no\nWants=sysinit.target\nAfter=sysinit.target\n";
        fs::write(units.path().join("test.target"), text).unwrap();
        Self::boot_with(units, None, Some(root))
    }

    fn boot_with(units: Scratch, network: Option<&Path>, root: Option<&Path>) -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        require_root();
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let name = format!("replicator-systemd-{}-{number}", std::process::id());
        let group = groups().join(name);
        fs::create_dir(&group).unwrap_or_else(|error| panic!("{}: {error}", group.display()));
        // It must be in the group before that becomes the root of its own.
        let mut outer = Command::new("sh");
        outer.args(["-c", r#"echo $$ >"$0/cgroup.procs" && exec "$@""#]).arg(&group);
        if let Some(network) = network {
            outer.arg("nsenter").arg(format!("--net={}", network.display())).arg("--");
        }
        outer.args(["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]);
        outer.args(network.is_none().then_some("--net"));
        outer.args(["--uts", "--ipc", "--cgroup", "--", "sh", "-c", PREPARE, "sh"]);
        let mut paths = units.path().display().to_string();
        if let Some(root) = root {
            let (etc, lib) = (root.join("etc/systemd/system"), root.join("usr/lib/systemd/system"));
            paths.push_str(&format!(":{}:{}", etc.display(), lib.display()));
        }
        outer.arg(paths).arg(program()).args(root);
        let boot = fs::File::create(units.path().join("boot")).unwrap();
        outer.stdin(Stdio::null()).stdout(boot.try_clone().unwrap()).stderr(boot);
        die_with_parent(&mut outer);
        let outer = outer.spawn().unwrap_or_else(|error| panic!("{outer:?}: {error}"));
        let mut systemd = Self { outer, manager: 0, group, units };
        systemd.await_boot();
        systemd
    }

    fn await_boot(&mut self) {
        let start = Instant::now();
        loop {
            self.manager = child_of(self.outer.id()).unwrap_or(0);
            let state = (self.manager != 0)
                .then(|| self.systemctl(&["is-system-running"]).stdout.trim().to_owned());
            // Degraded: it is up, and a unit has failed, as some test may want it to.
            if matches!(state.as_deref(), Some("running" | "degraded")) {
                return;
            }
            let ended = self.outer.try_wait().unwrap();
            let boot = fs::read_to_string(self.units.path().join("boot")).unwrap_or_default();
            assert!(ended.is_none(), "systemd did not boot ({ended:?}):\n{boot}");
            assert!(start.elapsed() < BOOT_LIMIT, "systemd is {state:?}:\n{boot}");
            thread::sleep(Duration::from_millis(50));
        }
    }

    /// Runs `systemctl` to its end.
    #[track_caller]
    pub fn systemctl(&self, arguments: &[&str]) -> Ended {
        self.run(&[&["systemctl", "--no-pager"], arguments].concat())
    }

    /// Runs a program on this host to its end, outside of any service.
    #[track_caller]
    pub fn run(&self, words: &[&str]) -> Ended {
        let mut command = Command::new("nsenter");
        command.args(["--mount", "--pid", "--net", "--target"]).arg(self.manager.to_string());
        command.arg("--").args(words);
        run_to_end(command, ANSWER_LIMIT)
    }

    /// The same for a job that must succeed.
    #[track_caller]
    pub fn job(&self, verb: &str) {
        let ended = self.systemctl(&[verb, SERVICE]);
        let status = || self.systemctl(&["status", SERVICE]).stdout;
        assert_eq!(ended.code, Some(0), "{verb}: {ended:#?}\n{}\n{}", status(), self.output());
    }

    /// A property of the service.
    #[track_caller]
    pub fn property(&self, name: &str) -> String {
        let ended = self.systemctl(&["show", "--value", "--property", name, SERVICE]).success();
        ended.stdout.trim().to_owned()
    }

    /// What all processes of the service printed.
    pub fn output(&self) -> String {
        fs::read_to_string(self.units.path().join("log")).unwrap_or_default()
    }
}

impl Drop for Systemd {
    fn drop(&mut self) {
        if thread::panicking() {
            eprintln!("the service printed:\n{}", self.output());
        }
        // Its child is killed with it, and all others with that, for it is their
        // process 1.
        let _ = self.outer.kill();
        let _ = self.outer.wait();
        let start = Instant::now();
        while let Err(error) = remove_groups(&self.group) {
            if start.elapsed() > Duration::from_secs(10) {
                eprintln!("{} could not be removed: {error}", self.group.display());
                return;
            }
            thread::sleep(Duration::from_millis(20));
        }
    }
}

/// The service, as an operator would write it.
fn unit(command: &Command, lines: &str, log: &Path) -> String {
    let quoted = |word: &std::ffi::OsStr| format!("{:?}", word.to_str().unwrap());
    let words: Vec<String> =
        std::iter::once(command.get_program()).chain(command.get_args()).map(quoted).collect();
    let (words, log) = (words.join(" "), log.display());
    format!(
        "[Unit]\nDefaultDependencies=no\n\
         [Service]\nType=notify\nExecStart={words}\nEnvironment=RUST_LOG=info\n\
         StandardOutput=append:{log}\nStandardError=append:{log}\n{lines}\n"
    )
}

fn program() -> &'static str {
    let places = ["/usr/lib/systemd/systemd", "/lib/systemd/systemd"];
    let found = places.into_iter().find(|place| Path::new(place).exists());
    found.expect("systemd is needed (Debian's package `systemd`)")
}

/// Where the unified hierarchy of control groups is mounted.
fn groups() -> PathBuf {
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
    let found = mounts.lines().find_map(|line| {
        let mut fields = line.split(' ');
        let place = fields.nth(1)?;
        (fields.next()? == "cgroup2").then(|| PathBuf::from(place))
    });
    found.expect("control groups of version 2 are needed, in any place")
}

fn child_of(process: u32) -> Option<u32> {
    let children = fs::read_to_string(format!("/proc/{process}/task/{process}/children")).ok()?;
    children.split_whitespace().next()?.parse().ok()
}

/// Removes a group with all groups in it.
fn remove_groups(group: &Path) -> std::io::Result<()> {
    for entry in fs::read_dir(group)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            remove_groups(&entry.path())?;
        }
    }
    fs::remove_dir(group)
}
