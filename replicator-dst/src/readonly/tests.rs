//! On real mounts, each test in a mount namespace of its own, so that nothing
//! is left behind however it ends. They need root.

use std::fs;
use std::os::fd::AsRawFd;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use replicator_common::name::Name;
use replicator_common::sys::{handle, mount};
use rustix::fs::{AtFlags, Mode, OFlags, XattrFlags};
use rustix::io::Errno;
use rustix::mount::{MountFlags, MountPropagationFlags};

use super::*;

/// Runs `body` in a mount namespace of its own, with an empty directory.
fn isolated(body: impl FnOnce(&Path) + Send + 'static) {
    let directory = tempfile::tempdir_in("/var/tmp").unwrap();
    let path = directory.path().canonicalize().unwrap();
    let run = move || {
        // SAFETY: only the mount namespace (and with it root and working
        // directory) is unshared, and only of this thread.
        unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWNS) }
            .expect("this test mounts file systems and needs root (CAP_SYS_ADMIN)");
        let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
        rustix::mount::mount_change("/", private).unwrap();
        body(&path);
    };
    std::thread::spawn(run).join().unwrap();
}

fn mount_tmpfs(at: &Path) {
    fs::create_dir_all(at).unwrap();
    rustix::mount::mount("none", at, "tmpfs", MountFlags::empty(), None).unwrap();
}

fn mounts_at(path: &Path) -> Vec<Mount> {
    mount::list().unwrap().into_iter().filter(|mount| mount.mount_point == path).collect()
}

/// A plain directory (`dir`) and a mount point (`point`), each with a file.
fn both_kinds(base: &Path) -> [PathBuf; 2] {
    let kinds = [base.join("a dir"), base.join("point")];
    fs::create_dir(&kinds[0]).unwrap();
    mount_tmpfs(&kinds[1]);
    for path in &kinds {
        fs::write(path.join("old"), "old").unwrap();
    }
    kinds
}

fn assert_read_only(path: &Path) {
    let rofs = |result: std::io::Result<()>, what: &str| {
        let error = result.expect_err(what);
        assert_eq!(Errno::from_io_error(&error), Some(Errno::ROFS), "{what}: {error}");
    };
    let old = path.join("old");
    rofs(fs::write(path.join("new"), ""), "create");
    rofs(fs::create_dir(path.join("new")), "mkdir");
    rofs(fs::write(&old, "x"), "write");
    rofs(fs::set_permissions(&old, fs::Permissions::from_mode(0o600)), "chmod");
    rofs(std::os::unix::fs::chown(&old, Some(1), None), "chown");
    rofs(fs::rename(&old, path.join("other")), "rename");
    rofs(fs::hard_link(&old, path.join("other")), "link");
    rofs(fs::remove_file(&old), "unlink");
    let set = rustix::fs::setxattr(&old, "trusted.x", b"1", XattrFlags::empty());
    assert_eq!(set.unwrap_err(), Errno::ROFS);
}

fn assert_writes(protection: &Protection, name: &str) {
    let flags = OFlags::CREATE | OFlags::WRONLY;
    let file = rustix::fs::openat(protection.root(), name, flags, Mode::RUSR).unwrap();
    rustix::io::write(&file, b"text").unwrap();
    assert_eq!(fs::read(protection.path().join(name)).unwrap(), b"text", "visible at once");
    rustix::fs::syncfs(protection.root()).unwrap();
}

#[test]
fn root_gets_erofs_and_the_applier_writes() {
    isolated(|base| {
        for path in both_kinds(base) {
            let protection = Protection::establish(&path).unwrap();
            assert_eq!(protection.enforcement().kind, EnforcementKind::Mount);
            assert_read_only(&path);
            let reader = fs::File::open(&path).unwrap();
            assert_writes(&protection, "private");
            assert!(rustix::fs::statat(&reader, "private", AtFlags::empty()).is_ok());
            protection.release().unwrap();
        }
    });
}

#[test]
fn changes_of_mounts_are_told_once() {
    isolated(|base| {
        let changes = mount::Changes::watch().unwrap();
        // (Others may mount something meanwhile, where process 1 sees it.)
        let comes_to_rest = || (0..100).any(|_| changes.any() == Ok(false));
        assert!(comes_to_rest());
        mount_tmpfs(base);
        assert_eq!(changes.any(), Ok(true), "a new mount");
        assert!(comes_to_rest());
        mount::set_read_only(open_path(base).unwrap().as_fd(), true).unwrap();
        assert_eq!(changes.any(), Ok(true), "a mount is read-only now");
        assert!(comes_to_rest());
        mount::unmount(base).unwrap();
        assert_eq!(changes.any(), Ok(true), "a mount is gone");
    });
}

#[test]
fn a_cover_that_is_gone_or_unseen_by_others_is_said() {
    isolated(|base| {
        let path = &both_kinds(base)[0];
        let protection = Protection::establish(path).unwrap();
        let reason = protection.enforcement().reason;
        assert!(reason.contains("NAMESPACE OF ITS OWN"), "{reason}");
        mount::unmount(path).unwrap();
        let enforcement = protection.enforcement();
        assert_eq!(enforcement.kind, EnforcementKind::None, "{}", enforcement.reason);
    });
}

#[test]
fn files_opened_by_handle_through_the_root_are_writable() {
    isolated(|base| {
        let path = &both_kinds(base)[0];
        let protection = Protection::establish(path).unwrap();
        let object = handle::of_entry(protection.root(), &Name::new(b"old").unwrap()).unwrap();
        let file = handle::open(protection.root(), &object, OFlags::WRONLY).unwrap();
        rustix::io::write(&file, b"new").unwrap();
        assert_eq!(fs::read(path.join("old")).unwrap(), b"new");
        let public = fs::File::open(path).unwrap();
        let refused = handle::open(public.as_fd(), &object, OFlags::WRONLY);
        assert_eq!(refused.unwrap_err(), Errno::ROFS);
    });
}

#[test]
fn it_outlives_the_process_and_is_taken_up_without_a_second_mount() {
    isolated(|base| {
        for (path, beneath) in both_kinds(base).into_iter().zip([0, 1]) {
            for round in 0..3 {
                let protection = Protection::establish(&path).unwrap();
                assert_writes(&protection, &format!("round{round}"));
                assert_eq!(mounts_at(&path).len(), beneath + 1);
                drop(protection);
                assert_read_only(&path);
            }
            assert_eq!(release_path(&path).unwrap(), Released::Unmounted);
            assert_eq!(mounts_at(&path).len(), beneath);
        }
    });
}

#[test]
fn release_makes_it_writable_and_leaves_what_was_there_before() {
    isolated(|base| {
        for path in both_kinds(base) {
            let before = mounts_at(&path);
            let protection = Protection::establish(&path).unwrap();
            assert_eq!(protection.release().unwrap(), Released::Unmounted);
            assert_eq!(protection.release().unwrap(), Released::NothingToDo);
            assert_eq!(mounts_at(&path), before);
            fs::write(path.join("after"), "").unwrap();
            assert_writes(&protection, "private still works");
            let again = Protection::establish(&path).unwrap();
            assert_read_only(&path);
            again.release().unwrap();
        }
    });
}

#[test]
fn release_with_readers_lets_them_stay_and_write() {
    isolated(|base| {
        for path in both_kinds(base) {
            let before = mounts_at(&path);
            let protection = Protection::establish(&path).unwrap();
            let reader = fs::File::open(path.join("old")).unwrap();
            let inside = fs::File::open(&path).unwrap();
            assert_eq!(protection.release().unwrap(), Released::Detached);
            assert_eq!(mounts_at(&path), before);
            assert_eq!(std::io::read_to_string(&reader).unwrap(), "old");
            fs::write(path.join("after"), "").unwrap();
            // As a process with its working directory in it would.
            fs::write(format!("/proc/self/fd/{}/inside", inside.as_raw_fd()), "").unwrap();
            assert!(path.join("inside").exists());
        }
    });
}

#[test]
fn release_keeps_what_others_mounted_on_top() {
    isolated(|base| {
        let path = &both_kinds(base)[0];
        let protection = Protection::establish(path).unwrap();
        let nested = path.join("nested");
        rustix::fs::mkdirat(protection.root(), "nested", Mode::RWXU).unwrap();
        rustix::mount::mount("none", &nested, "tmpfs", MountFlags::empty(), None).unwrap();
        let released = protection.release().unwrap();
        assert_eq!(released, Released::LeftInPlace { nested: vec![nested.clone()] });
        assert_eq!(mounts_at(&nested).len(), 1);
        fs::write(path.join("after"), "").unwrap();
        assert_eq!(protection.release().unwrap(), Released::NothingToDo);
    });
}

#[test]
fn a_shared_mount_is_covered_once_and_in_other_namespaces_too() {
    isolated(|base| {
        let shared = base.join("shared");
        mount_tmpfs(&shared);
        rustix::mount::mount_change(&shared, MountPropagationFlags::SHARED).unwrap();
        let plain = shared.join("plain");
        fs::create_dir(&plain).unwrap();
        for path in [plain, shared] {
            fs::write(path.join("old"), "old").unwrap();
            let (other, beneath) = (path.clone(), mounts_at(&path).len());
            let (ask, asked) = std::sync::mpsc::channel();
            let (tell, told) = std::sync::mpsc::channel();
            let elsewhere = std::thread::spawn(move || {
                // SAFETY: as in `isolated`.
                unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWNS) }
                    .unwrap();
                tell.send(()).unwrap();
                asked.recv().unwrap();
                assert_read_only(&other);
                tell.send(()).unwrap();
                asked.recv().unwrap();
                fs::write(other.join("elsewhere"), "").unwrap();
            });
            told.recv().unwrap();
            let protection = Protection::establish(&path).unwrap();
            assert_eq!(mounts_at(&path).len(), beneath + 1);
            assert_writes(&protection, "private");
            ask.send(()).unwrap();
            told.recv().unwrap();
            protection.release().unwrap();
            assert_eq!(mounts_at(&path).len(), beneath);
            ask.send(()).unwrap();
            elsewhere.join().unwrap();
        }
    });
}

#[test]
fn unsuitable_paths_are_refused_and_left_alone() {
    isolated(|base| {
        let outer = base.join("outer");
        mount_tmpfs(&outer.join("in/ner"));
        let error = Protection::establish(&outer).unwrap_err();
        assert!(matches!(error, ReadOnlyError::NestedMount { .. }), "{error}");

        let fixed = base.join("fixed");
        fs::create_dir(&fixed).unwrap();
        rustix::mount::mount("none", &fixed, "tmpfs", MountFlags::RDONLY, None).unwrap();
        let error = Protection::establish(&fixed).unwrap_err();
        assert!(matches!(error, ReadOnlyError::MountedReadOnly { .. }), "{error}");
        assert!(release_path(&fixed).is_err(), "not ours to make writable, so say so");

        let file = base.join("file");
        fs::write(&file, "").unwrap();
        assert!(Protection::establish(&file).is_err());
        assert!(Protection::establish(&base.join("missing")).is_err());
        assert!(mounts_at(&outer).is_empty());
        assert_eq!(mounts_at(&fixed).len(), 1);
    });
}

/// Gives up all capabilities of the calling thread.
fn drop_capabilities() {
    let none = CapabilitySet::empty();
    let sets =
        rustix::thread::CapabilitySets { effective: none, permitted: none, inheritable: none };
    rustix::thread::set_capabilities(None, sets).unwrap();
}

#[test]
fn without_privilege_it_says_what_permissions_do() {
    isolated(|base| {
        let path = base.join("dir");
        fs::create_dir(&path).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        let protected = base.join("protected");
        fs::create_dir(&protected).unwrap();
        drop(Protection::establish(&protected).unwrap());
        drop_capabilities();

        let protection = Protection::establish(&path).unwrap();
        let enforcement = protection.enforcement();
        assert_eq!(enforcement.kind, EnforcementKind::Permissions);
        assert!(enforcement.reason.contains("CAP_SYS_ADMIN"), "{}", enforcement.reason);
        assert_writes(&protection, "own");
        assert_eq!(protection.release().unwrap(), Released::NothingToDo);

        fs::set_permissions(&path, fs::Permissions::from_mode(0o777)).unwrap();
        let open_to_all = Protection::establish(&path).unwrap().enforcement();
        assert_eq!(open_to_all.kind, EnforcementKind::None);

        let error = Protection::establish(&protected).unwrap_err();
        assert!(matches!(error, ReadOnlyError::Unreachable { .. }), "{error}");
    });
}

#[test]
fn works_on_each_file_system() {
    isolated(|base| {
        for (kind, megabytes) in [("ext4", 16), ("xfs", 320), ("btrfs", 120)] {
            let image = base.join(format!("{kind}.img"));
            let path = base.join(kind);
            fs::File::create(&image).unwrap().set_len(megabytes << 20).unwrap();
            fs::create_dir(&path).unwrap();
            let run = |program: &str, arguments: &[&Path]| {
                let output = Command::new(program).args(arguments).output().unwrap();
                assert!(output.status.success(), "{program}: {output:?}");
            };
            run(&format!("mkfs.{kind}"), &[Path::new("-q"), &image]);
            run("mount", &[Path::new("-oloop"), &image, &path]);
            fs::write(path.join("old"), "old").unwrap();
            let protection = Protection::establish(&path).unwrap();
            assert_read_only(&path);
            assert_writes(&protection, "private");
            drop(protection);
            assert_writes(&Protection::establish(&path).unwrap(), "again");
            assert_eq!(release_path(&path).unwrap(), Released::Unmounted);
            run("umount", &[&path]);
        }
    });
}
