//! A replica as `kill -9` leaves it in the middle of a batch, to fail over again
//! and again: replica and state directory lie on one disk, of which an image is
//! kept.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use serde_json::Value;

use crate::binary;
use crate::compare::{self, Options};
use crate::disk::Disk;
use crate::mounts::{FileSystem, Mount, Scratch, run};
use crate::process::{Daemon, Ended, free_port, run_to_end};
use crate::scenario::patience;
use crate::workload::content;

/// Bytes of the file that is under way when the process dies.
const LARGE: usize = 48 << 20;
/// Bytes by which another large file changes.
const PATCH: usize = 50_000;
/// How often a kill may come before anything of the large file has arrived, or after all
/// of it has.
const ATTEMPTS: u32 = 20;
/// Calls by which the applier places what a batch brings.
const PLACING: &str = "renameat,renameat2";

/// How long a sync is held up: milliseconds are enough where nothing else runs.
const HELD_UP: &str = "delay_enter=500ms";

/// When the process dies.
#[derive(Clone, Copy, Debug)]
pub enum Death {
    /// When it is about to place the n-th object of a batch, which is logged then.
    Placing(u32),
    /// While what a batch brought cannot be synced, so before it is logged.
    Unsynced,
}

/// Which batch the replica is at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// The batch was not logged: the tree as it was before.
    Before,
    /// The batch was logged: the tree with what it brought.
    After,
}

/// The wreck. Drops nothing but what it made.
#[derive(Debug)]
pub struct Wreck {
    // Dropped in this order.
    scratch: Scratch,
    disk: Disk,
    source: Mount,
    image: PathBuf,
    /// Names and sizes in staging that hold what had arrived of the large file.
    arrived: Vec<(String, u64)>,
    /// The same of small files.
    packed: Vec<(String, u64)>,
}

impl Wreck {
    /// Made on a disk of this kind.
    pub fn new(kind: FileSystem, death: Death) -> Self {
        let mut wreck = Self {
            scratch: Scratch::new("wreck"),
            disk: Disk::new(kind),
            source: Mount::new(FileSystem::Ext4),
            image: PathBuf::new(),
            arrived: Vec::new(),
            packed: Vec::new(),
        };
        fs::create_dir(wreck.tree()).unwrap();
        before(&wreck.tree());
        let mut daemon = wreck.daemon(&wreck.run_command(free_port()));
        daemon.wait_ready();
        daemon.wait_enabled(patience());
        daemon.wait(patience());
        assert!(daemon.interrupt().success());
        wreck.keep_copy("before");
        after(&wreck.tree());
        wreck.keep_copy("after");
        wreck.sink(death);
        wreck
    }

    fn sink(&mut self, death: Death) {
        let whole = self.image_of_now(0);
        for attempt in 0..ATTEMPTS {
            let bytes = content::incompressible(u64::from(attempt), LARGE);
            fs::write(self.tree().join("large/new"), bytes).unwrap();
            self.die(death);
            self.arrived = self.staged('t', 4 * PATCH as u64);
            self.packed = self.packed();
            let wanted = matches!(death, Death::Placing(_)) || !self.packed.is_empty();
            let part = self.arrived.iter().any(|(_, size)| *size < LARGE as u64);
            if wanted && part {
                self.image = self.image_of_now(1);
                return;
            }
            self.disk.cut_back_to(&whole);
        }
        panic!("the large file was not partly staged in {ATTEMPTS} attempts");
    }

    fn die(&self, death: Death) {
        let faults = match death {
            // The batch's own sync takes so long that a part of the large file,
            // which travels beside it, is there before the first object is placed.
            Death::Placing(nth) => {
                vec![format!("{PLACING}:signal=KILL:when={nth}"), format!("syncfs:{HELD_UP}")]
            }
            // The first one is for the batch before.
            Death::Unsynced => vec!["syncfs:error=EIO:when=2+".to_owned()],
        };
        let mut command = Command::new("strace");
        command.args(["-D", "-f", "-qq", "-o", "/dev/null"]);
        command.args(["-e", &format!("trace=syncfs,{PLACING}")]);
        command.args(faults.iter().flat_map(|fault| ["-e".to_owned(), format!("inject={fault}")]));
        let run = self.run_command(free_port());
        command.arg(run.get_program()).args(run.get_args());
        let mut daemon = self.daemon(&command);
        if let Death::Placing(_) = death {
            daemon.join(patience());
        } else {
            let large = || !self.staged('t', 4 * PATCH as u64).is_empty();
            let staged = |_: &mut Daemon| (large() && !self.packed().is_empty()).then_some(());
            daemon.poll_until(patience(), "a part of each is staged", staged);
            daemon.kill();
        }
    }

    fn image_of_now(&self, number: usize) -> PathBuf {
        // What a power cut would lose is another test's.
        let root = fs::File::open(self.disk.path()).unwrap();
        rustix::fs::syncfs(&root).unwrap();
        self.disk.image_of_now(number)
    }

    fn tree(&self) -> PathBuf {
        self.source.path().join("tree")
    }

    /// The replica.
    pub fn replica(&self) -> PathBuf {
        self.disk.path().join("replica")
    }

    /// The state directory, which lies beside it.
    pub fn state_dir(&self) -> PathBuf {
        self.disk.path().join("state")
    }

    fn run_command(&self, api_port: u16) -> Command {
        let mut command = Command::new(binary::replicator());
        command.arg("run").arg(self.tree()).arg(self.replica());
        command.arg("--state-dir").arg(self.state_dir()).args(["--watcher", "fanotify"]);
        command.args(["--api", &format!("127.0.0.1:{api_port}")]);
        command
    }

    fn daemon(&self, command: &Command) -> Daemon {
        let port = command.get_args().last().unwrap().to_str().unwrap().to_owned();
        let mut copy = Command::new(command.get_program());
        copy.args(command.get_args());
        Daemon::spawn(copy, &format!("http://{port}"), &self.scratch.path().join("log"))
    }

    fn keep_copy(&self, name: &str) {
        let copy = self.source.path().join(name);
        run(Command::new("cp").arg("-a").arg(self.tree()).arg(copy));
    }

    fn packed(&self) -> Vec<(String, u64)> {
        let mut packed = self.staged('p', 0);
        packed.retain(|(name, _)| !name.starts_with("plan."));
        packed
    }

    /// Names and sizes of what is staged: large files (`t`) or small ones (`p`).
    /// What is short and large may be a patch, and part of what is logged.
    fn staged(&self, kind: char, above: u64) -> Vec<(String, u64)> {
        let ours = |entry: &fs::DirEntry| {
            entry.file_name().as_encoded_bytes().starts_with(b".replicator-")
        };
        let mut entries = fs::read_dir(self.replica()).unwrap().flatten();
        let hidden = entries.find(ours).expect("our directory").path();
        let mut found = Vec::new();
        for shard in fs::read_dir(hidden.join("staging")).unwrap().flatten() {
            for file in fs::read_dir(shard.path()).unwrap().flatten() {
                let name = file.file_name().into_string().unwrap();
                // A daemon that runs may have removed it by now.
                let Ok(size) = file.metadata().map(|stat| stat.len()) else { continue };
                if name.starts_with(kind) && size > above {
                    found.push((name, size));
                }
            }
        }
        found.sort();
        found
    }

    /// Brings the wreck back as it was.
    pub fn restore(&self) {
        self.disk.cut_back_to(&self.image);
    }

    /// `replicator failover`, without a daemon.
    pub fn fail_over(&self) -> Ended {
        run_to_end(self.failover_command(), Duration::from_secs(60))
    }

    /// The same, killed when it is about to make `call` for the `nth` time;
    /// whether it was.
    pub fn fail_over_killed(&self, call: &str, nth: u32) -> bool {
        let mut command = Command::new("strace");
        let inject = format!("inject={call}:signal=KILL:when={nth}");
        let trace = format!("trace={call}");
        command.args(["-f", "-qq", "-o", "/dev/null", "-e", &trace, "-e", &inject]);
        let inner = self.failover_command();
        command.arg(inner.get_program()).args(inner.get_args());
        let ended = run_to_end(command, Duration::from_secs(60));
        assert!(matches!(ended.code, None | Some(0)), "{call} {nth}: {ended:#?}");
        ended.code.is_none()
    }

    /// See [`Self::fail_over`].
    pub fn failover_command(&self) -> Command {
        let mut command = Command::new(binary::replicator());
        command.arg("failover").arg("--state-dir").arg(self.state_dir());
        command
    }

    /// Panics unless the replica was handed over whole: one of the two states,
    /// all that had arrived named in a manifest, nothing of ours left, no
    /// configuration, and writable. Gives the state.
    #[track_caller]
    pub fn assert_handed_over(&self, context: &str) -> State {
        let lost = self.lost_and_found(context);
        self.assert_listed(&lost, context);
        let state = self.state(context);
        if state == State::Before {
            // None of it went into the replica.
            assert_there(&lost, &self.packed, context);
        }
        let configurations = self.state_dir().join("destination/replicas");
        let left: Vec<_> = fs::read_dir(configurations).unwrap().flatten().collect();
        assert!(left.is_empty(), "{context}: of the configuration is left {left:?}");
        fs::write(self.replica().join("written"), "").expect("writable");
        let again = self.fail_over();
        assert_eq!(again.code, Some(1), "{context}: a second time: {again:#?}");
        assert!(again.stderr.contains("no replication configuration"), "{context}: {again:#?}");
        state
    }

    /// The one lost+found; nothing else of ours stands beside it.
    fn lost_and_found(&self, context: &str) -> PathBuf {
        let names = fs::read_dir(self.replica()).unwrap().flatten();
        let ours = names.filter(|entry| {
            let name = entry.file_name().into_encoded_bytes();
            name.starts_with(b".replicator") || name.starts_with(b"efs-replication-lost+found-")
        });
        let found: Vec<_> = ours.map(|entry| entry.path()).collect();
        let [lost] = &found[..] else { panic!("{context}: one lost+found, not {found:?}") };
        assert!(!lost.to_str().unwrap().contains(".replicator"), "{context}: {found:?}");
        lost.clone()
    }

    /// What is in lost+found and what the manifest says is the same, and the
    /// large file is part of it.
    fn assert_listed(&self, lost: &Path, context: &str) {
        let manifest = fs::read(lost.join("manifest.json")).expect("a manifest");
        let manifest: Value = serde_json::from_slice(&manifest).unwrap();
        let items = manifest["items"].as_array().unwrap();
        let mut listed: Vec<_> =
            items.iter().map(|item| item["file"].as_str().unwrap().to_owned()).collect();
        let entries = fs::read_dir(lost).unwrap().flatten();
        let mut there: Vec<_> =
            entries.map(|entry| entry.file_name().into_string().unwrap()).collect();
        there.retain(|name| name != "manifest.json");
        listed.sort();
        there.sort();
        assert_eq!(listed, there, "{context}: listed and there");
        assert_there(lost, &self.arrived, context);
    }

    /// Which state the replica is in, apart from the directory of large files,
    /// which travel in batches of their own.
    fn state(&self, context: &str) -> State {
        let differences = |copy: &str| {
            let mut found = compare::compare(
                &self.source.path().join(copy),
                &self.replica(),
                Options::default(),
            );
            found.retain(|d| {
                // Its time may be told before the file is there; and the root
                // has lost+found in it now.
                let path = &d.path[..];
                !(path.starts_with(b"large") || path.starts_with(b"efs-") || path.is_empty())
            });
            found
        };
        let read = |root: &Path| fs::read(root.join("large/patched")).unwrap();
        let copies = ["before", "after"].map(|copy| read(&self.source.path().join(copy)));
        assert!(copies.contains(&read(&self.replica())), "{context}: the patched file is torn");
        let (before, after) = (differences("before"), differences("after"));
        match (before.is_empty(), after.is_empty()) {
            (true, false) => State::Before,
            (false, true) => State::After,
            _ => panic!(
                "{context}: no state between batches; it is not the one before:\n{}nor the one after:\n{}",
                compare::report(&before),
                compare::report(&after)
            ),
        }
    }
}

#[track_caller]
fn assert_there(lost: &Path, all: &[(String, u64)], context: &str) {
    for (name, size) in all {
        let found = fs::metadata(lost.join(name)).map(|stat| stat.len());
        assert_eq!(found.ok(), Some(*size), "{context}: {name}");
    }
}

/// What is replicated before anything goes wrong.
fn before(root: &Path) {
    let write = |path: &str, seed, length| {
        let path = root.join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, content::bytes(seed, length)).unwrap();
    };
    for number in 0..20 {
        write(&format!("moves/file-{number}"), number, 3000);
        write(&format!("dies/file-{number}"), number, 3000);
    }
    for name in ["a", "b", "c", "replaced", "linked"] {
        write(name, 7, 5000 + name.len());
    }
    write("large/patched", 9, 2 << 20);
    fs::hard_link(root.join("linked"), root.join("moves/linked-too")).unwrap();
}

/// What the interrupted batch brings: a cycle, a move, a new tree, deletions,
/// content of several names, a patch.
fn after(root: &Path) {
    use std::os::unix::fs::FileExt;
    let at = |name: &str| root.join(name);
    fs::rename(at("a"), at("t")).unwrap();
    fs::rename(at("b"), at("a")).unwrap();
    fs::rename(at("c"), at("b")).unwrap();
    fs::rename(at("t"), at("c")).unwrap();
    fs::rename(at("moves"), at("moved")).unwrap();
    fs::remove_dir_all(at("dies")).unwrap();
    fs::create_dir(at("new")).unwrap();
    for number in 0..10 {
        fs::write(at(&format!("new/file-{number}")), content::bytes(number + 50, 4000)).unwrap();
    }
    fs::rename(at("moved/file-3"), at("new/from-there")).unwrap();
    symlink("file-1", at("new/symlink")).unwrap();
    fs::write(at("new/other"), "replaces").unwrap();
    fs::rename(at("new/other"), at("replaced")).unwrap();
    fs::write(at("linked"), "through both names").unwrap();
    let patched = fs::File::options().write(true).open(at("large/patched")).unwrap();
    patched.write_all_at(&content::incompressible(3, PATCH), 900_000).unwrap();
}
