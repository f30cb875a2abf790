//! The comparer is itself tested by damage: a tree is copied by `cp -a`, found
//! equal, damaged in one respect, and exactly that must be reported.

use std::fs::{self, File, Permissions};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, PermissionsExt, chown, lchown, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use rustix::fs::{AtFlags, CWD, FallocateFlags, FileType, Mode, Timespec, Timestamps, XattrFlags};

use super::*;
use crate::mounts::{FileSystem, Mount, run};
use crate::workload::raw;

/// A file system with a source and a faithful copy of it.
struct Sample {
    mount: Mount,
}

impl Sample {
    fn new(kind: FileSystem) -> Self {
        let sample = Self { mount: Mount::with_size(kind, 512 << 20) };
        sample.fill().unwrap();
        run(Command::new("cp")
            .args(["-a", "--sparse=always", "--"])
            .arg(sample.source())
            .arg(sample.replica()));
        sample
    }

    fn source(&self) -> PathBuf {
        self.mount.path().join("source")
    }

    fn replica(&self) -> PathBuf {
        self.mount.path().join("replica")
    }

    fn fill(&self) -> std::io::Result<()> {
        let root = self.source();
        fs::create_dir_all(root.join("directory/below"))?;
        fs::write(root.join("directory/file"), "content")?;
        fs::write(root.join(std::ffi::OsStr::from_bytes(b"not \xff utf-8\n")), "named")?;
        fs::write(root.join("large"), vec![7; 3 << 20])?;
        let sparse = File::create(root.join("sparse"))?;
        sparse.write_all_at(b"data", 0)?;
        sparse.write_all_at(b"data", 8 << 20)?;
        fs::write(root.join("link-1"), "linked")?;
        fs::hard_link(root.join("link-1"), root.join("directory/link-2"))?;
        fs::hard_link(root.join("link-1"), root.join("link-3"))?;
        symlink("target", root.join("symlink"))?;
        let file = root.join("directory/file");
        setxattr(&file, "user.note", b"value");
        setxattr(&file, "system.posix_acl_access", &raw::acl(7));
        setxattr(&file, "security.capability", &raw::capability(1));
        setxattr(&root.join("directory"), "system.posix_acl_default", &raw::acl(5));
        make_node(&root.join("device"), 259);
        Ok(())
    }

    fn found(&self, options: Options) -> Vec<Difference> {
        compare(&self.source(), &self.replica(), options)
    }
}

fn setxattr(path: &Path, name: &str, value: &[u8]) {
    rustix::fs::lsetxattr(path, name, value, XattrFlags::empty()).unwrap();
}

fn make_node(path: &Path, minor: u32) {
    let mode = Mode::from_raw_mode(0o600);
    let device = libc::makedev(1, minor);
    rustix::fs::mknodat(CWD, path, FileType::CharacterDevice, mode, device).unwrap();
}

fn set_mtime(path: &Path, seconds: i64, nanoseconds: i64) {
    let time = Timespec { tv_sec: seconds, tv_nsec: nanoseconds };
    let times = Timestamps { last_access: time, last_modification: time };
    rustix::fs::utimensat(CWD, path, &times, AtFlags::SYMLINK_NOFOLLOW).unwrap();
}

fn mtime(path: &Path) -> (i64, i64) {
    use std::os::unix::fs::MetadataExt;
    let stat = fs::symlink_metadata(path).unwrap();
    (stat.mtime(), stat.mtime_nsec())
}

/// One way to damage a replica and what must be reported: where, and which
/// aspects.
struct Damage {
    path: &'static str,
    aspects: Vec<Aspect>,
    make: fn(&Path),
}

/// Runs `make` and puts mtime back, so that only what is meant differs.
fn keeping_mtime(path: &Path, make: impl FnOnce(&Path)) {
    let (seconds, nanoseconds) = mtime(path);
    make(path);
    set_mtime(path, seconds, nanoseconds);
}

fn content_damages() -> Vec<Damage> {
    let one = |path, aspect, make| Damage { path, aspects: vec![aspect], make };
    vec![
        one("large", Aspect::Content, |path| {
            keeping_mtime(path, |path| {
                let file = File::options().write(true).open(path).unwrap();
                file.write_all_at(b"!", (2 << 20) + 17).unwrap();
            });
        }),
        Damage {
            path: "directory/file",
            aspects: vec![Aspect::Size, Aspect::Content, Aspect::Capability],
            make: |path| {
                keeping_mtime(path, |path| {
                    let file = File::options().write(true).open(path).unwrap();
                    file.write_all_at(b"more", 7).unwrap();
                });
            },
        },
        one("sparse", Aspect::Holes, |path| {
            keeping_mtime(path, |path| {
                let file = File::options().write(true).open(path).unwrap();
                file.write_all_at(&[0; 4096], 4 << 20).unwrap();
            });
        }),
        one("symlink", Aspect::Target, |path| {
            let (seconds, nanoseconds) = mtime(path);
            let parent = mtime(path.parent().unwrap());
            fs::remove_file(path).unwrap();
            symlink("elsewhere", path).unwrap();
            set_mtime(path, seconds, nanoseconds);
            set_mtime(path.parent().unwrap(), parent.0, parent.1);
        }),
    ]
}

fn attribute_damages() -> Vec<Damage> {
    let one = |path, aspect, make| Damage { path, aspects: vec![aspect], make };
    let mode = |path: &Path, mode| fs::set_permissions(path, Permissions::from_mode(mode)).unwrap();
    let _: fn(&Path, u32) = mode;
    vec![
        one("large", Aspect::Mode, |p| {
            fs::set_permissions(p, Permissions::from_mode(0o600)).unwrap()
        }),
        one("large", Aspect::Mode, |p| {
            fs::set_permissions(p, Permissions::from_mode(0o4644)).unwrap()
        }),
        one("directory", Aspect::Mode, |p| {
            fs::set_permissions(p, Permissions::from_mode(0o1755)).unwrap();
        }),
        one("large", Aspect::Owner, |p| chown(p, Some(12), None).unwrap()),
        one("symlink", Aspect::Group, |p| lchown(p, None, Some(12)).unwrap()),
        one("directory/below", Aspect::Owner, |p| chown(p, Some(12), None).unwrap()),
        one("large", Aspect::Mtime, |p| {
            let (seconds, nanoseconds) = mtime(p);
            set_mtime(p, seconds, nanoseconds ^ 1);
        }),
        one("directory/below", Aspect::Mtime, |p| set_mtime(p, 1, 1)),
        one("symlink", Aspect::Mtime, |p| set_mtime(p, 1, 1)),
        one("directory/file", Aspect::Xattr("user.note".into()), |p| {
            setxattr(p, "user.note", b"other");
        }),
        one("large", Aspect::Xattr("user.new".into()), |p| setxattr(p, "user.new", b"")),
        one("symlink", Aspect::Xattr("trusted.new".into()), |p| setxattr(p, "trusted.new", b"")),
        one("directory/file", Aspect::Xattr("user.note".into()), |p| {
            rustix::fs::removexattr(p, "user.note").unwrap();
        }),
        one("directory/file", Aspect::Acl, |p| {
            setxattr(p, "system.posix_acl_access", &raw::acl_for(77, 7));
        }),
        one("directory", Aspect::Acl, |p| {
            rustix::fs::removexattr(p, "system.posix_acl_default").unwrap();
        }),
        one("directory/file", Aspect::Capability, |p| {
            setxattr(p, "security.capability", &raw::capability(2));
        }),
    ]
}

/// Damages that touch names; the parent's mtime is put back.
fn name_damages() -> Vec<Damage> {
    let one = |path, aspect, make| Damage { path, aspects: vec![aspect], make };
    vec![
        one("directory/below", Aspect::Missing, |p| {
            keeping_mtime(p.parent().unwrap(), |_| fs::remove_dir(p).unwrap());
        }),
        one("directory/added", Aspect::Extra, |p| {
            keeping_mtime(p.parent().unwrap(), |_| fs::write(p, "").unwrap());
        }),
        one("directory/fifo", Aspect::Extra, |p| {
            keeping_mtime(p.parent().unwrap(), |_| run_on("mkfifo", p));
        }),
        one("directory/below", Aspect::Kind, |p| {
            keeping_mtime(p.parent().unwrap(), |_| {
                fs::remove_dir(p).unwrap();
                fs::write(p, "").unwrap();
            });
        }),
        one("large", Aspect::Links, |p| {
            // A second name outside of what is compared, as a forgotten
            // staging link would be.
            fs::hard_link(p, p.parent().unwrap().parent().unwrap().join("elsewhere")).unwrap();
        }),
    ]
}

fn run_on(program: &str, path: &Path) {
    run(Command::new(program).arg("--").arg(path));
}

/// Each damage on a fresh sample, so that none hides another.
fn check(kind: FileSystem, damages: Vec<Damage>) {
    for (number, damage) in damages.into_iter().enumerate() {
        let sample = Sample::new(kind);
        let options = Options { devices: true };
        assert_eq!(sample.found(options), [], "before damage {number}");
        (damage.make)(&sample.replica().join(damage.path));
        let expected: Vec<_> =
            damage.aspects.into_iter().map(|aspect| (damage.path.into(), aspect)).collect();
        let mut found: Vec<_> =
            sample.found(options).into_iter().map(|d| (d.path, d.aspect)).collect();
        found.sort();
        assert_eq!(found, sorted(expected), "damage {number} at {} on {kind:?}", damage.path);
    }
}

fn sorted(mut expected: Vec<(Vec<u8>, Aspect)>) -> Vec<(Vec<u8>, Aspect)> {
    expected.sort();
    expected
}

#[test]
fn damaged_content_is_found() {
    for kind in [FileSystem::Ext4, FileSystem::Xfs, FileSystem::Btrfs, FileSystem::Tmpfs] {
        check(kind, content_damages());
    }
}

#[test]
fn damaged_attributes_are_found() {
    for kind in [FileSystem::Ext4, FileSystem::Xfs] {
        check(kind, attribute_damages());
    }
}

#[test]
fn damaged_names_are_found() {
    check(FileSystem::Tmpfs, name_damages());
}

#[test]
fn split_and_joined_hard_links_are_found() {
    let aspects = |sample: &Sample| -> Vec<_> {
        let found = sample.found(Options { devices: true });
        found.into_iter().map(|d| (String::from_utf8(d.path).unwrap(), d.aspect)).collect()
    };
    let links = |names: &[&str]| -> Vec<_> {
        names.iter().map(|name| ((*name).to_owned(), Aspect::Links)).collect()
    };
    let keeping = |root: PathBuf, make: &dyn Fn(&Path)| keeping_mtime(&root, |root| make(root));

    let sample = Sample::new(FileSystem::Ext4);
    keeping(sample.replica(), &|root| {
        fs::remove_file(root.join("link-3")).unwrap();
        run(Command::new("cp").arg("-a").arg(root.join("link-1")).arg(root.join("link-3")));
    });
    assert_eq!(aspects(&sample), links(&["directory/link-2", "link-1", "link-3"]), "split");

    // Equal names, equal content, equal number of links, other partition.
    let sample = Sample::new(FileSystem::Ext4);
    for root in [sample.source(), sample.replica()] {
        run(Command::new("cp").arg("-a").arg(root.join("link-1")).arg(root.join("twin-1")));
        fs::hard_link(root.join("twin-1"), root.join("twin-2")).unwrap();
        set_mtime(&root, 1, 1);
    }
    assert_eq!(aspects(&sample), []);
    keeping(sample.replica(), &|root| {
        fs::rename(root.join("link-3"), root.join("x")).unwrap();
        fs::rename(root.join("twin-2"), root.join("link-3")).unwrap();
        fs::rename(root.join("x"), root.join("twin-2")).unwrap();
    });
    let all = ["directory/link-2", "link-1", "link-3", "twin-1", "twin-2"];
    assert_eq!(aspects(&sample), links(&all), "swapped between groups");
}

#[test]
fn devices_are_compared_on_request_only() {
    let sample = Sample::new(FileSystem::Ext4);
    keeping_mtime(&sample.replica(), |root| {
        let old = mtime(&root.join("device"));
        fs::remove_file(root.join("device")).unwrap();
        make_node(&root.join("device"), 260);
        set_mtime(&root.join("device"), old.0, old.1);
    });
    let found = sample.found(Options { devices: true });
    assert_eq!(found.iter().map(|d| &d.aspect).collect::<Vec<_>>(), [&Aspect::Device]);
    let found = sample.found(Options::default());
    assert_eq!(found.iter().map(|d| &d.aspect).collect::<Vec<_>>(), [&Aspect::Extra]);
}

#[test]
fn what_does_not_replicate_is_left_out() {
    let sample = Sample::new(FileSystem::Tmpfs);
    keeping_mtime(&sample.source(), |root| {
        run_on("mkfifo", &root.join("fifo"));
        drop(std::os::unix::net::UnixListener::bind(root.join("socket")).unwrap());
        fs::create_dir(root.join("lost+found")).unwrap();
        fs::set_permissions(root.join("lost+found"), Permissions::from_mode(0o700)).unwrap();
        fs::create_dir(root.join("nested")).unwrap();
        run(Command::new("mount").args(["-t", "tmpfs", "tmpfs"]).arg(root.join("nested")));
        fs::write(root.join("nested/file"), "").unwrap();
    });
    keeping_mtime(&sample.replica(), |root| {
        fs::create_dir_all(root.join(".replicator-fs-01234567/staging")).unwrap();
        fs::create_dir(root.join("nested")).unwrap();
    });
    let options = Options { devices: true };
    assert_eq!(sample.found(options), []);
    // But not so on the other side or elsewhere.
    keeping_mtime(&sample.replica(), |root| fs::write(root.join("nested/extra"), "").unwrap());
    keeping_mtime(&sample.source(), |root| {
        fs::create_dir(root.join(".replicator-fs-01234567")).unwrap();
    });
    keeping_mtime(&sample.replica().join("directory"), |directory| {
        fs::create_dir(directory.join(".replicator-x")).unwrap();
    });
    let found: Vec<_> = sample.found(options).into_iter().map(|d| (d.path, d.aspect)).collect();
    let expected = [
        (b".replicator-fs-01234567".to_vec(), Aspect::Missing),
        (b"directory/.replicator-x".to_vec(), Aspect::Extra),
        (b"nested".to_vec(), Aspect::Extra),
        (b"nested/extra".to_vec(), Aspect::Extra),
    ];
    assert_eq!(found, expected);
}

/// Also when somebody has read there, which makes `SEEK_HOLE` of ext4 and xfs
/// call it data.
#[test]
fn unwritten_extents_are_holes() {
    for kind in [FileSystem::Ext4, FileSystem::Xfs, FileSystem::Btrfs] {
        let sample = Sample::new(kind);
        keeping_mtime(&sample.replica().join("sparse"), |path| {
            let file = File::options().read(true).write(true).open(path).unwrap();
            rustix::fs::fallocate(&file, FallocateFlags::KEEP_SIZE, 2 << 20, 4 << 20).unwrap();
            file.read_exact_at(&mut vec![0; 6 << 20], 0).unwrap();
        });
        assert_eq!(sample.found(Options { devices: true }), [], "{kind:?}");
    }
}

#[test]
fn reaches_beyond_path_max() {
    let mount = Mount::new(FileSystem::Ext4);
    let (source, replica) = (mount.path().join("source"), mount.path().join("replica"));
    for root in [&source, &replica] {
        fs::create_dir(root).unwrap();
        raw::deep_file(root, 20, 255, b"same");
        raw::deep_file(root, 2500, 1, b"same");
    }
    let aspects = || -> BTreeSet<Aspect> {
        compare(&source, &replica, Options::default()).into_iter().map(|d| d.aspect).collect()
    };
    // Two trees made one after the other differ in their times only.
    assert_eq!(aspects(), BTreeSet::from([Aspect::Mtime]));
    raw::deep_file(&source, 20, 255, b"diff");
    assert_eq!(aspects(), BTreeSet::from([Aspect::Mtime, Aspect::Content]));
    raw::deep_file(&replica, 20, 255, b"diff");
    assert_eq!(aspects(), BTreeSet::from([Aspect::Mtime]));
    raw::deep_file(&replica, 2500, 1, b"diff");
    assert_eq!(aspects(), BTreeSet::from([Aspect::Mtime, Aspect::Content]));
}
