//! The source's machine loses its power: its file system and its state go back
//! to what was on disk, the replica does not.

use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use replicator_common::time::Timestamp;
use replicator_tests::binary;
use replicator_tests::compare;
use replicator_tests::disk::Disk;
use replicator_tests::mounts::FileSystem::{self, Ext4, Xfs};
use replicator_tests::mounts::{Mount, Scratch, run};
use replicator_tests::process::{Daemon, free_port};
use replicator_tests::scenario::patience;
use replicator_tests::serial;
use replicator_tests::stamps::{Stamper, steadily};
use replicator_tests::workload::content;

/// A file of these many bytes is sent whole, or as chunks.
const SIZES: [(&str, usize); 2] = [("small", 64 << 10), ("large", 2 << 20)];

/// Both ends as one process; the source's state is on `disk`, and so is the source
/// where it has no mount of its own.
struct Site {
    // First to go: what is on the disk is mounted below it.
    state: Scratch,
    disk: Disk,
    apart: Option<Mount>,
    replica: Mount,
}

impl Site {
    fn new(disk: Disk, apart: Option<Mount>) -> Self {
        let site = Self { disk, apart, replica: Mount::new(Ext4), state: Scratch::new("state") };
        fs::create_dir(site.source()).unwrap();
        // Made where it belongs, then moved to the disk.
        assert!(site.start("first").interrupt().success());
        let made = site.state.path().join("state/source");
        run(Command::new("cp").arg("--archive").arg(made).arg(site.kept()));
        // What the process would have made durable itself.
        run(Command::new("sync").arg("-f").arg(site.kept()));
        site.attach();
        site
    }

    fn source(&self) -> std::path::PathBuf {
        let mount = self.apart.as_ref().map(|mount| mount.path().to_owned());
        mount.unwrap_or_else(|| self.disk.path()).join("source")
    }

    /// What the source's side keeps, on the disk.
    fn kept(&self) -> std::path::PathBuf {
        self.disk.path().join("state")
    }

    /// Puts it where the process looks for it.
    fn attach(&self) {
        let place = self.state.path().join("state/source");
        run(Command::new("mount").arg("--bind").arg(self.kept()).arg(place));
    }

    /// A process on the kernel's boot `id`, which cannot be changed for real.
    fn start(&self, boot: &str) -> Daemon {
        let port = free_port();
        let id = self.state.path().join(format!("boot-{boot}"));
        fs::write(&id, format!("{boot}\n")).unwrap();
        // Mounts are seen on both sides, but for the one over the boot's id.
        let script = "mount --make-private /proc && \
            mount --bind \"$0\" /proc/sys/kernel/random/boot_id && exec \"$@\"";
        let mut command = Command::new("unshare");
        command.args(["--mount", "--propagation", "unchanged", "sh", "-c", script]).arg(id);
        command.arg(binary::replicator()).arg("run").arg(self.source()).arg(self.replica.path());
        command.arg("--state-dir").arg(self.state.path().join("state"));
        command.args(["--api", &format!("127.0.0.1:{port}"), "--watcher", "fanotify"]);
        let log = self.state.path().join("log");
        let mut daemon = Daemon::spawn(command, &format!("http://127.0.0.1:{port}"), &log);
        daemon.wait_ready();
        daemon
    }

    /// The power goes; the process with it.
    fn power_cut(&self, daemon: Daemon, image: &Path) {
        daemon.kill();
        self.come_back(image);
    }

    /// The machine is back; nothing of ours runs on it.
    fn come_back(&self, image: &Path) {
        run(Command::new("umount").arg(self.state.path().join("state/source")));
        self.disk.cut_back_to(image);
        self.attach();
    }
}

/// Overwrites some bytes in place and makes the change's times durable, not its
/// content: what the kernel does for half a minute with every write.
fn overwrite(root: &Path, name: &str) {
    let file = fs::File::options().write(true).open(root.join(name)).unwrap();
    file.write_all_at(&content::incompressible(9, 5000), 20_000).unwrap();
}

/// When a file changed last, and a hash of what it holds.
fn look(path: &Path) -> ((i64, i64), blake3::Hash) {
    let stat = fs::metadata(path).unwrap();
    ((stat.ctime(), stat.ctime_nsec()), blake3::hash(&fs::read(path).unwrap()))
}

/// A change is shipped, and lost on the source while its times are kept. The
/// kernel may write content out at any time; then there was nothing to lose.
fn content_goes_back_under_its_times(kind: FileSystem) {
    let _share = serial::share();
    assert!((0..10).any(|_| lost_and_found_again(kind)), "the kernel writes everything at once");
}

/// Whether content was lost; then the replica has followed.
fn lost_and_found_again(kind: FileSystem) -> bool {
    let site = Site::new(Disk::new(kind), None);
    let root = site.source();
    for (name, size) in SIZES {
        fs::write(root.join(name), content::incompressible(size as u64, size)).unwrap();
    }
    let mut daemon = site.start("first");
    daemon.wait_enabled(patience());
    run(Command::new("sync").arg("-f").arg(&root));
    // Read long after the change, so that nothing else raises a doubt.
    daemon.request("POST", "/replicator/v1/pause", None).unwrap();
    for (name, _) in SIZES {
        overwrite(&root, name);
    }
    // The file system's journal is written, and with it all inodes.
    fs::File::create(root.join("other")).and_then(|file| file.sync_all()).unwrap();
    thread::sleep(Duration::from_millis(2500));
    daemon.request("POST", "/replicator/v1/resume", None).unwrap();
    daemon.wait(patience());
    for (name, _) in SIZES {
        let [here, there] = [&root, site.replica.path()].map(|at| fs::read(at.join(name)).unwrap());
        assert!(here == there, "{name} is not on the replica after waiting");
    }
    // Taken before anything is read by the test, which could write it out.
    let image = site.disk.image_of_now(0);
    compare::assert_same(&root, site.replica.path(), &"before the power cut");
    let before = SIZES.map(|(name, _)| look(&root.join(name)));
    site.power_cut(daemon, &image);
    let after = SIZES.map(|(name, _)| look(&root.join(name)));
    let lost = before.iter().zip(&after).all(|((ctime, content), (ctime_now, content_now))| {
        ctime == ctime_now && content != content_now
    });

    let daemon = site.start("second");
    daemon.wait(patience());
    compare::assert_same(&root, site.replica.path(), &"after the power cut");
    assert!(daemon.interrupt().success());
    lost
}

#[test]
fn content_that_goes_back_under_its_times_ext4() {
    content_goes_back_under_its_times(Ext4);
}

#[test]
fn content_that_goes_back_under_its_times_xfs() {
    content_goes_back_under_its_times(Xfs);
}

/// Power cuts under load, one after the other.
const CUTS: usize = 3;

/// Keeps replacing files, making new ones, removing and appending.
fn change_on(stamper: &Stamper, turns: &AtomicU64, done: &AtomicBool) {
    while !done.load(Ordering::Relaxed) {
        steadily(150.0, Duration::from_millis(500), |_| {
            let turn = turns.fetch_add(1, Ordering::Relaxed);
            stamper.write(&format!("again/{}", turn % 20), turn / 20 + 1).unwrap();
            stamper.write(&format!("new-{}/{turn}", turn % 30), 1).unwrap();
            if turn >= 40 && turn.is_multiple_of(4) {
                let old = turn - 40;
                stamper.remove(&format!("new-{}/{old}", old % 30)).unwrap();
            }
            stamper.write("a.log", turn + 1).unwrap();
        });
    }
}

fn claim(daemon: &Daemon) -> Timestamp {
    daemon.status().destination.unwrap().last_replicated.expect("a claim")
}

fn assert_claim_holds(stamper: &Stamper, replica: &Path, claimed: Timestamp, when: &str) {
    let broken = stamper.broken_claims(replica, claimed);
    assert!(broken.is_empty(), "{when}, {claimed} was claimed:\n{}", broken.join("\n"));
}

/// The disk with the source's state loses any part of what it was not told to
/// flush: the journal and the index go back, the source and the replica do not.
fn the_state_goes_back(kind: FileSystem) {
    let seed = std::env::var("REPLICATOR_SEED").ok().and_then(|text| text.parse().ok());
    let seed: u64 = seed.unwrap_or_else(|| Timestamp::now().0 as u64);
    println!("REPLICATOR_SEED={seed}");
    let _share = serial::share();
    let site = Site::new(Disk::with_cache(kind, seed), Some(Mount::new(Ext4)));
    let (root, replica) = (site.source(), site.replica.path());
    let (stamper, turns) = (Stamper::new(&root), AtomicU64::new(0));
    let mut daemon = site.start("boot-0");
    daemon.wait_enabled(patience());
    for number in 0..CUTS {
        let done = AtomicBool::new(false);
        // The changes go on while the power goes.
        let (claimed, image) = thread::scope(|scope| {
            scope.spawn(|| change_on(&stamper, &turns, &done));
            let pause = 700 + (seed.rotate_left(number as u32 * 13) & 0x3ff);
            thread::sleep(Duration::from_millis(pause));
            let claimed = claim(&daemon);
            // First: the destination must not get a batch that the source, as the
            // image has it, never made.
            daemon.kill();
            let image = site.disk.image_of_now(number);
            done.store(true, Ordering::Relaxed);
            (claimed, image)
        });
        site.come_back(&image);
        assert_claim_holds(&stamper, replica, claimed, "before the cut");
        daemon = site.start(&format!("boot-{}", number + 1));
        let resumed = claim(&daemon);
        assert_claim_holds(&stamper, replica, resumed, "at once after the cut");
        assert!(resumed >= claimed, "the watermark moved back from {claimed} to {resumed}");
        daemon.wait(patience());
        assert_claim_holds(&stamper, replica, claim(&daemon), "after waiting");
        compare::assert_same(&root, replica, &format!("after power cut {number}"));
    }
    assert!(daemon.interrupt().success());
}

#[test]
fn the_state_loses_what_was_not_flushed_ext4() {
    the_state_goes_back(Ext4);
}

#[test]
fn the_state_loses_what_was_not_flushed_xfs() {
    the_state_goes_back(Xfs);
}
