//! The source's machine loses its power: its file system and its state go back
//! to what was on disk, the replica does not.

use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::process::Command;

use replicator_tests::binary;
use replicator_tests::compare;
use replicator_tests::disk::Disk;
use replicator_tests::mounts::FileSystem::{self, Ext4, Xfs};
use replicator_tests::mounts::{Mount, Scratch, run};
use replicator_tests::process::{Daemon, free_port};
use replicator_tests::scenario::patience;
use replicator_tests::serial;
use replicator_tests::workload::content;

/// A file of these many bytes is sent whole, or as chunks.
const SIZES: [(&str, usize); 2] = [("small", 64 << 10), ("large", 2 << 20)];

/// Both ends as one process; the source and the source's state are on `disk`.
struct Site {
    disk: Disk,
    replica: Mount,
    state: Scratch,
}

impl Site {
    fn new(kind: FileSystem) -> Self {
        let site =
            Self { disk: Disk::new(kind), replica: Mount::new(Ext4), state: Scratch::new("state") };
        fs::create_dir(site.source()).unwrap();
        // Made where it belongs, then moved to the disk.
        assert!(site.start("first").interrupt().success());
        let made = site.state.path().join("state/source");
        run(Command::new("cp").arg("--archive").arg(made).arg(site.kept()));
        site.attach();
        site
    }

    fn source(&self) -> std::path::PathBuf {
        self.disk.path().join("source")
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
    let site = Site::new(kind);
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
    std::thread::sleep(std::time::Duration::from_millis(2500));
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
