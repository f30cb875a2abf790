use super::*;

struct NoWatch;

impl DirectoryWatch for NoWatch {
    fn before_listing(&self, _directory: BorrowedFd<'_>, _id: &ObjectId) {}
}

#[test]
fn an_object_that_cannot_be_looked_at_is_not_dead_and_named() {
    let directory = tempfile::tempdir().unwrap();
    let root = Root::open(directory.path()).unwrap();
    assert!(root.by_handle(), "this test opens by handle and needs root");
    let opener = Opener::new(Arc::new(root), Arc::default());
    let mut tree = SourceTree::new(opener, Filter::default(), Arc::new(NoWatch));
    // Not a handle of the kernel's: EINVAL stands for EIO and EACCES.
    let object = ObjectId::new(ObjectId::TAG_INODE, &[7; 24]).unwrap();
    assert_eq!(tree.fate(&object).unwrap(), Fate::Alive);
    let doubts = tree.take_doubts();
    assert!(matches!(&doubts[..], [(named, _)] if *named == object), "{doubts:?}");
    assert_eq!(tree.take_doubts(), []);

    let name = Name::new(b"file").unwrap();
    std::fs::write(directory.path().join("file"), "").unwrap();
    let file = handle::identify_entry(tree.opener.root().fd(), &name).unwrap();
    assert_eq!(tree.fate(&file).unwrap(), Fate::Alive);
    std::fs::remove_file(directory.path().join("file")).unwrap();
    assert_eq!(tree.fate(&file).unwrap(), Fate::Dead);
    assert_eq!(tree.take_doubts(), []);
}

/// A probe answers for what stands where the index says, and for nothing
/// else.
#[test]
fn a_probe_answers_for_the_very_object() {
    let base = tempfile::tempdir().unwrap();
    let path = |name: &str| base.path().join(name);
    for name in ["file", "other", "linked", "replaced", "gone"] {
        std::fs::write(path(name), name).unwrap();
    }
    std::fs::hard_link(path("linked"), path("second")).unwrap();
    std::fs::create_dir(path("directory")).unwrap();
    std::os::unix::fs::symlink("file", path("link")).unwrap();
    let opener = Opener::new(Arc::new(Root::open(base.path()).unwrap()), Arc::default());
    let root = opener.root().id.clone();
    let tree = SourceTree::new(opener, Filter::default(), Arc::new(NoWatch));
    let name = |name: &str| Name::new(name.as_bytes()).unwrap();
    let identify = |name: &Name| {
        let directory = std::fs::File::open(base.path()).unwrap();
        handle::identify_entry(directory.as_fd(), name).unwrap()
    };
    let there = ["file", "other", "linked", "second", "replaced", "gone", "directory", "link"];
    let mut known: Vec<_> = there.iter().map(|n| (name(n), identify(&name(n)))).collect();
    for (name, object) in &known {
        use std::os::unix::fs::MetadataExt;
        let number = std::fs::symlink_metadata(base.path().join(name)).unwrap().ino();
        assert!(object.inode().is_none_or(|inode| inode == number), "{object} {number}");
    }
    let other = known[1].1.clone();
    known.push((name("file"), other));
    std::fs::rename(path("other"), path("replaced")).unwrap();
    std::fs::remove_file(path("gone")).unwrap();
    let probe = tree.prober(&root);
    let found: Vec<_> = known.iter().map(|(name, object)| probe(name, object)).collect();
    let same: Vec<bool> = found.iter().map(Option::is_some).collect();
    assert_eq!(same, [true, false, true, true, false, false, false, true, false]);
    assert_eq!(found[0].as_ref().map(|stat| stat.size), Some(4));
    assert_eq!(found[2], found[3], "one object under two names");
    // A directory that is gone.
    assert_eq!(tree.prober(&known[5].1)(&known[0].0, &known[0].1), None);
}

/// Below a directory of thousands of levels: no path leads there, and no
/// stack and no number of descriptors may either.
#[test]
fn what_lies_deep_is_opened_by_names() {
    const LEVELS: usize = 3000;
    let base = tempfile::tempdir().unwrap();
    let mut root = Root::open(base.path()).unwrap();
    root.by_handle = false;
    let name = Name::new(b"n").unwrap();
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let places = Arc::new(Places::default());
    let mut at = (root.id.clone(), root.fd.try_clone().unwrap());
    for _ in 0..LEVELS {
        rustix::fs::mkdirat(&at.1, name.as_bytes(), Mode::RWXU).unwrap();
        let fd = rustix::fs::openat(&at.1, name.as_bytes(), flags, Mode::empty()).unwrap();
        let id = handle::identify(fd.as_fd()).unwrap();
        places.learn(&id, &at.0, &name);
        at = (id, fd);
    }
    let opener = Opener::new(Arc::new(root), places);
    let elsewhere = (opener.root().id.clone(), name);
    for hint in [None, Some(&elsewhere)] {
        let found = opener.open(&at.0, hint, OFlags::PATH).unwrap();
        let Opened::Here(fd) = found else { panic!("it is there: {found:?}") };
        assert_eq!(handle::identify(fd.as_fd()).unwrap(), at.0);
    }
    drop(at);
    // Deeper than what `remove_dir_all` reaches with the descriptors there are.
    let status = std::process::Command::new("rm").arg("-rf").arg(base.path().join("n")).status();
    assert!(status.unwrap().success());
}
