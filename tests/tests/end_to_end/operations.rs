//! Each operation alone: do it, wait, compare. And what it may cost: a delta
//! ships what is new, a rename ships nothing.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::FileExt;
use std::path::Path;

use replicator_tests::compare;
use replicator_tests::mounts::FileSystem::{Btrfs, Ext4, Tmpfs, Xfs};
use replicator_tests::mounts::Mount;
use replicator_tests::process::Daemon;
use replicator_tests::scenario::{self, Layout, Pair, patience};
use replicator_tests::workload::content;
use replicator_tests::workload::op::{self, Op};
use replicator_tests::workload::perform::Arena;
use replicator_tests::workload::place::Place;
use replicator_tests::workload::raw;

/// A file of this size is cut into chunks.
const LARGE: usize = 4 << 20;
/// What the chunks around one change come to at most, bytes.
const AROUND: u64 = 256 << 10;

/// One operation on a prepared directory (see [`prepare`]).
struct Case {
    name: &'static str,
    ops: Vec<Op>,
    /// The most content bytes it may ship.
    limit: u64,
}

fn case(name: &'static str, op: Op) -> Case {
    Case { name, ops: vec![op], limit: u64::MAX }
}

fn costing(name: &'static str, limit: u64, ops: Vec<Op>) -> Case {
    Case { name, ops, limit }
}

impl Case {
    /// Whether the watcher can see all of it. What it cannot, its report says.
    fn is_seen_by(&self, watcher: &str) -> bool {
        let unseen = scenario::unseen_by(watcher);
        !self.ops.iter().any(|op| unseen.contains(&op.name()))
    }
}

/// Every case finds this in a directory of its own: `file` (3000 bytes), its
/// `twin`, `large` (incompressible), `link-1` = `link-2`, `symlink`, and the
/// trees `tree` and `other`.
fn prepare(root: &Path) {
    fs::create_dir_all(root.join("tree/branch/twig")).unwrap();
    fs::create_dir_all(root.join("other")).unwrap();
    for number in 0..20u64 {
        let content = content::incompressible(number, 20_000);
        fs::write(root.join(format!("tree/branch/leaf-{number}")), content).unwrap();
    }
    fs::write(root.join("other/leaf-1"), "other").unwrap();
    fs::write(root.join("file"), content::bytes(1, 3000)).unwrap();
    fs::write(root.join("twin"), content::bytes(3, 3000)).unwrap();
    fs::write(root.join("large"), content::incompressible(6, LARGE)).unwrap();
    fs::write(root.join("link-1"), content::bytes(7, 3000)).unwrap();
    fs::hard_link(root.join("link-1"), root.join("link-2")).unwrap();
    std::os::unix::fs::symlink("file", root.join("symlink")).unwrap();
}

fn at(path: &str) -> Place {
    Place::at(path)
}

fn content_cases() -> Vec<Case> {
    let (bytes, seed) = (1000, 11);
    let large = || at("large");
    vec![
        case("create", Op::Create { at: at("new"), bytes, seed }),
        case("create empty", Op::Create { at: at("empty"), bytes: 0, seed }),
        case("rewrite in place", Op::Create { at: at("file"), bytes, seed }),
        case("create large", Op::Create { at: at("big"), bytes: 3 << 20, seed }),
        case("append", Op::Append { at: at("file"), bytes, seed }),
        case("overwrite", Op::Overwrite { at: at("file"), offset: 700, bytes, seed }),
        case(
            "write far behind the end",
            Op::Overwrite { at: at("file"), offset: 9 << 20, bytes, seed },
        ),
        case("hold open", Op::HoldOpen { at: at("file"), bytes, seed }),
        case("truncate shorter", Op::Truncate { at: at("file"), size: 100 }),
        case("truncate longer", Op::Truncate { at: at("file"), size: 5 << 20 }),
        case("truncate to nothing", Op::Truncate { at: large(), size: 0 }),
        case("punch", Op::Punch { at: large(), offset: 1 << 20, bytes: 2 << 20 }),
        case("allocate", Op::Allocate { at: large(), offset: 1 << 20, bytes: 8 << 20 }),
        case("map", Op::Map { at: at("file"), offset: 500, bytes, seed }),
        case("map large", Op::Map { at: large(), offset: 2 << 20, bytes, seed }),
        case(
            "copy range",
            Op::CopyRange { from: large(), to: at("file"), offset: 4096, bytes: 1 << 20 },
        ),
        case("replace", Op::Replace { at: at("file"), bytes, seed }),
        case("replace one of two links", Op::Replace { at: at("link-1"), bytes, seed }),
        case("O_TMPFILE inside", Op::TmpFile { at: at("tmp"), outside: false, bytes, seed }),
        case("O_TMPFILE outside", Op::TmpFile { at: at("tmp"), outside: true, bytes, seed }),
        case("blink", Op::Blink { at: at("blink"), bytes, seed }),
        case("write through a link", Op::Append { at: at("link-2"), bytes, seed }),
        case("write through an outside link", Op::OutsideLink { at: at("file"), slot: 0, seed }),
        costing(
            "delta: append",
            64 << 10 | AROUND,
            vec![Op::Append { at: large(), bytes: 64 << 10, seed: 12 }],
        ),
        costing(
            "delta: patch",
            AROUND,
            vec![Op::Overwrite { at: large(), offset: 2 << 20, bytes: 4096, seed: 12 }],
        ),
        costing(
            "delta: insert, renamed over",
            AROUND,
            vec![Op::Insert { at: large(), bytes: 10, seed }],
        ),
        costing(
            "delta: cut off",
            AROUND,
            vec![Op::Truncate { at: large(), size: LARGE as u64 / 2 + 7 }],
        ),
        costing(
            "delta: the same again",
            0,
            vec![Op::Replace { at: large(), bytes: LARGE as u32, seed: 6 }],
        ),
    ]
}

fn name_cases() -> Vec<Case> {
    let seed = 21;
    let rename = |from, to| Op::Rename { from: at(from), to: at(to) };
    let exchange = |a, b| Op::Exchange { a: at(a), b: at(b) };
    vec![
        costing("rename", 0, vec![rename("file", "renamed")]),
        costing("rename over", 0, vec![rename("file", "twin")]),
        costing("rename across", 0, vec![rename("file", "tree/branch/file")]),
        costing("rename a link over its other", 0, vec![rename("link-1", "link-2")]),
        costing("rename a tree", 0, vec![rename("tree", "forest")]),
        costing("rename a tree across", 0, vec![rename("tree/branch", "other/branch")]),
        costing("rename over an empty directory", 0, vec![rename("other", "tree/branch/twig")]),
        costing(
            "parent and child change places",
            0,
            vec![rename("tree/branch", "branch"), rename("tree", "branch/tree")],
        ),
        costing("swap files", 0, vec![exchange("file", "twin")]),
        costing("swap a file and a tree", 0, vec![exchange("file", "tree")]),
        costing("swap trees", 0, vec![exchange("tree", "other")]),
        costing(
            "swap and swap back",
            0,
            vec![exchange("tree", "other"), exchange("tree", "other")],
        ),
        costing(
            "rotate",
            0,
            vec![Op::Rotate { names: ["file", "twin", "link-1", "rotated"].map(at).to_vec() }],
        ),
        costing("hard link", 0, vec![Op::Link { from: at("large"), to: at("other/link") }]),
        costing("rename one link across", 0, vec![rename("link-1", "other/link")]),
        costing("unlink one of two", 0, vec![Op::Unlink { at: at("link-1") }]),
        costing("unlink", 0, vec![Op::Unlink { at: at("file") }]),
        costing(
            "unlink and make anew",
            3000,
            vec![Op::Unlink { at: at("file") }, Op::Create { at: at("file"), bytes: 3000, seed }],
        ),
        costing(
            "file becomes directory",
            0,
            vec![Op::Unlink { at: at("file") }, Op::MakeDirectory { at: at("file") }],
        ),
        costing(
            "directory becomes symlink",
            0,
            vec![
                Op::RemoveTree { at: at("tree") },
                Op::Symlink { at: at("tree"), target: at("other") },
            ],
        ),
        costing(
            "symlink",
            0,
            vec![Op::Symlink { at: at("s"), target: Place::at(vec![b'x'; 1000]) }],
        ),
        costing("make directory", 0, vec![Op::MakeDirectory { at: at("made") }]),
        case("fill directory", Op::FillDirectory { at: at("filled"), seed }),
        costing("remove tree", 0, vec![Op::RemoveTree { at: at("tree") }]),
        case("move in", Op::MoveIn { at: at("arrived"), seed }),
        costing("move out", 0, vec![Op::MoveOut { at: at("tree"), keep: true, seed: 22 }]),
        case("move out and remove", Op::MoveOut { at: at("tree"), keep: false, seed }),
        case("out, changed, back in", Op::OutAndBack { from: at("tree"), to: at("back"), seed }),
        case(
            "file out, changed, back in",
            Op::OutAndBack { from: at("file"), to: at("back"), seed },
        ),
        case("deep", Op::Deep { at: at("deep"), seed }),
        costing(
            "deep tree renamed",
            2000,
            vec![Op::Deep { at: at("deep"), seed }, rename("deep", "deeper")],
        ),
        costing("FIFO", 0, vec![Op::Special { at: at("fifo"), which: 0 }]),
        costing("socket", 0, vec![Op::Special { at: at("socket"), which: 1 }]),
        costing("device", 0, vec![Op::Special { at: at("device"), which: 2 }]),
        case("not UTF-8", Op::Create { at: Place(vec![b"\xff\xfe\n".to_vec()]), bytes: 10, seed }),
        case("255 bytes", Op::Create { at: Place(vec![vec![b'n'; 255]]), bytes: 10, seed }),
    ]
}

fn attribute_cases() -> Vec<Case> {
    let free = |name, op| costing(name, 0, vec![op]);
    let owner = |at| Op::Owner { at, uid: 1234, gid: 567 };
    let times = |at| Op::Times { at, seconds: 1_000_000_000, nanoseconds: 123_456_789 };
    let xattr = |at| Op::SetXattr { at, number: 1, bytes: 400, seed: 31 };
    vec![
        free("mode", Op::Mode { at: at("large"), mode: 0o604 }),
        free("setuid", Op::Mode { at: at("file"), mode: 0o6755 }),
        free("sticky", Op::Mode { at: at("tree"), mode: 0o1777 }),
        free("owner", owner(at("large"))),
        free("owner of a symlink", owner(at("symlink"))),
        free("owner of a directory", owner(at("tree"))),
        free("times", times(at("large"))),
        free("times of a symlink", times(at("symlink"))),
        free("times of a directory", times(at("tree/branch"))),
        free("times before 1970", Op::Times { at: at("file"), seconds: -7, nanoseconds: 1 }),
        free("xattr", xattr(at("large"))),
        free("xattr of a directory", xattr(at("tree"))),
        free(
            "trusted xattr of a symlink",
            Op::SetXattr { at: at("symlink"), number: 0, bytes: 9, seed: 31 },
        ),
        free("empty xattr", Op::SetXattr { at: at("file"), number: 1, bytes: 0, seed: 31 }),
        costing(
            "xattr removed",
            0,
            vec![xattr(at("file")), Op::RemoveXattr { at: at("file"), number: 1 }],
        ),
        free("ACL", Op::Acl { at: at("large"), default: false, permissions: 5 }),
        free("default ACL", Op::Acl { at: at("tree"), default: true, permissions: 7 }),
        free("capability", Op::Capability { at: at("file"), bits: 0x2000 }),
        costing(
            "owner takes setuid and capability away",
            0,
            vec![Op::Capability { at: at("file"), bits: 0x2000 }, owner(at("file"))],
        ),
        costing(
            "written, then dated back",
            3000,
            vec![Op::Create { at: at("file"), bytes: 3000, seed: 33 }, times(at("file"))],
        ),
    ]
}

fn all_cases() -> Vec<Case> {
    content_cases().into_iter().chain(name_cases()).chain(attribute_cases()).collect()
}

#[test]
fn the_table_covers_every_operation() {
    let cases = all_cases();
    let used: BTreeSet<_> = cases.iter().flat_map(|case| &case.ops).map(Op::name).collect();
    let missing: Vec<_> = op::NAMES.iter().filter(|name| !used.contains(*name)).collect();
    assert!(missing.is_empty(), "no case for {missing:?}");
}

/// Each case does what it says, on each file system, with nobody replicating:
/// what fails later is the replication's fault.
#[test]
fn the_table_can_be_performed() {
    for kind in [Ext4, Xfs, Btrfs, Tmpfs] {
        let mount = Mount::new(kind);
        let outside = mount.path().join("outside");
        fs::create_dir(&outside).unwrap();
        for case in all_cases() {
            let root = mount.path().join(case.name);
            prepare(&root);
            let mut arena = Arena::new(&root, &outside);
            case.ops.iter().for_each(|op| arena.must(op));
        }
    }
}

/// Prepares the directories of all cases, replicates them, and then does one
/// case after the other. All failures are reported, not the first alone.
/// `REPLICATOR_CASE` picks the cases whose names contain it.
fn run_cases(layout: Layout, watcher: &str) {
    let pair = Pair::new(layout);
    let mut cases = all_cases();
    cases.retain(|case| case.is_seen_by(watcher));
    if let Ok(part) = std::env::var("REPLICATOR_CASE") {
        cases.retain(|case| case.name.contains(&part));
    }
    let directory = |case: &Case| pair.source().join(case.name);
    for case in &cases {
        prepare(&directory(case));
    }
    let daemon = pair.start_enabled(watcher);
    pair.settle(&daemon, &"before the first case");
    let mut failures = Vec::new();
    for case in &cases {
        let mut result = run_case(case, &directory(case), &pair, &daemon);
        if matches!(result, Err(Failure::Costly(_))) {
            // A machine that stands still between the writing of a file and its
            // renaming sends it as a new one. Not twice in a row.
            result = run_case(case, &directory(case), &pair, &daemon);
        }
        match result {
            Ok(()) => {}
            Err(Failure::Wrong(text) | Failure::Costly(text)) => {
                failures.push(format!("{}: {text}", case.name))
            }
            Err(Failure::Stuck(text)) => {
                // Then nothing is learnt from those that follow.
                failures.push(format!("{}: {text}", case.name));
                break;
            }
        }
    }
    assert!(failures.is_empty(), "{} failed:\n{}", failures.len(), failures.join("\n"));
    // Whatever each case did to the others' directories.
    pair.settle(&daemon, &"after the last case");
}

enum Failure {
    /// More was shipped than is new.
    Costly(String),
    /// The replica is not right.
    Wrong(String),
    /// Nothing more is replicated.
    Stuck(String),
}

fn run_case(case: &Case, directory: &Path, pair: &Pair, daemon: &Daemon) -> Result<(), Failure> {
    let shipped = daemon.counters().bytes_shipped;
    let mut arena = Arena::new(directory, pair.outside());
    for op in &case.ops {
        arena.must(op);
    }
    daemon.try_wait(patience()).map_err(Failure::Stuck)?;
    let replica = pair.replica().join(case.name);
    let found = compare::compare(directory, &replica, compare::Options::default());
    let shipped = daemon.counters().bytes_shipped - shipped;
    // Only now is closed what an operation held open.
    drop(arena);
    if !found.is_empty() {
        let report = compare::report(&found);
        return Err(Failure::Wrong(format!("the replica differs:\n{report}")));
    }
    // A batch follows what changes while it is read up to three times, and sends
    // what it read each time.
    if shipped > case.limit.saturating_mul(3) {
        let text = format!("{shipped} bytes shipped, at most {} are new", case.limit);
        return Err(Failure::Costly(text));
    }
    Ok(())
}

macro_rules! each_operation {
    ($($name:ident: $layout:expr, $watcher:literal;)*) => {
        $(#[test] fn $name() { run_cases($layout, $watcher); })*
    };
}

each_operation! {
    each_operation_ext4_fanotify: Layout::Two(Ext4, Ext4), "fanotify";
    each_operation_xfs_fanotify: Layout::Two(Xfs, Xfs), "fanotify";
    each_operation_btrfs_fanotify: Layout::Two(Btrfs, Btrfs), "fanotify";
    each_operation_tmpfs_inotify: Layout::Two(Tmpfs, Tmpfs), "inotify";
    each_operation_one_ext4_inotify: Layout::Same(Ext4), "inotify";
    each_operation_one_xfs_scan: Layout::Same(Xfs), "scan";
}

/// Bytes on the replica's disk stay in proportion: a sparse file stays sparse.
#[test]
fn a_sparse_file_stays_sparse() {
    let pair = Pair::new(Layout::Two(Ext4, Ext4));
    let sparse = fs::File::create(pair.source().join("sparse")).unwrap();
    sparse.set_len(20 << 30).unwrap();
    sparse.write_all_at(b"data", 10 << 30).unwrap();
    let daemon = pair.start_enabled("fanotify");
    daemon.wait(patience());
    let replica = fs::metadata(pair.replica().join("sparse")).unwrap();
    use std::os::unix::fs::MetadataExt;
    assert_eq!(replica.len(), 20 << 30);
    assert!(replica.blocks() * 512 < 1 << 20, "{} blocks for 4 bytes", replica.blocks());
    let copy = fs::File::open(pair.replica().join("sparse")).unwrap();
    let mut found = [0; 4];
    copy.read_exact_at(&mut found, 10 << 30).unwrap();
    assert_eq!(&found, b"data");
    assert!(daemon.counters().bytes_shipped < 1 << 20);
}

/// Thousands of levels: no path for it, no recursion for it.
/// Files that are changed in place, a small one because of its two names, get
/// longer by a hole that begins before their old end.
#[test]
fn a_hole_over_the_old_end_is_one_on_the_replica() {
    for to in [Ext4, Xfs, Btrfs] {
        let pair = Pair::new(Layout::Two(Ext4, to));
        let path = |name| pair.source().join(name);
        fs::write(path("small"), vec![7; 183_967]).unwrap();
        fs::hard_link(path("small"), path("second")).unwrap();
        fs::write(path("large"), content::bytes(1, 700_001)).unwrap();
        let daemon = pair.start_enabled("fanotify");
        pair.settle(&daemon, &format!("{to:?}"));
        for (name, keep) in [("small", 0), ("large", 100_000)] {
            let file = fs::File::options().write(true).open(path(name)).unwrap();
            file.set_len(keep).unwrap();
            file.set_len(8 << 20).unwrap();
        }
        pair.settle(&daemon, &format!("longer, {to:?}"));
    }
}

#[test]
fn a_branch_of_thousands_of_levels_arrives_and_goes() {
    let pair = Pair::new(Layout::Two(Ext4, Ext4));
    // Enough beside it that its removal is no reason to halt.
    for file in 0..4000 {
        fs::write(pair.source().join(format!("beside-{file}")), "").unwrap();
    }
    let daemon = pair.start_enabled("fanotify");
    raw::deep_file(pair.source(), 3000, 1, b"at the bottom");
    pair.settle(&daemon, &"made");
    let before = daemon.counters().bytes_shipped;
    fs::rename(pair.source().join("n"), pair.source().join("renamed")).unwrap();
    pair.settle(&daemon, &"renamed");
    assert_eq!(daemon.counters().bytes_shipped, before, "a rename ships nothing");
    let root = fs::File::open(pair.source()).unwrap();
    raw::remove_tree(std::os::fd::AsFd::as_fd(&root), b"renamed").unwrap();
    pair.settle(&daemon, &"removed");
}

/// Sockets and FIFOs are counted, nested mounts are listed and not entered.
#[test]
fn what_is_passed_over_is_said() {
    let pair = Pair::new(Layout::Two(Ext4, Ext4));
    let mut arena = Arena::new(pair.source(), pair.outside());
    for (name, which) in [("fifo", 0), ("socket", 1), ("character", 2), ("block", 3)] {
        arena.must(&Op::Special { at: at(name), which });
    }
    let nested = pair.source().join("nested");
    fs::create_dir(&nested).unwrap();
    let mount =
        std::process::Command::new("mount").args(["-t", "tmpfs", "tmpfs"]).arg(&nested).status();
    assert!(mount.unwrap().success());
    fs::write(nested.join("hidden"), "not to be replicated").unwrap();

    let daemon = pair.start_enabled("fanotify");
    pair.settle(&daemon, &"special files");
    let skipped = daemon.status().source.unwrap().skipped;
    assert_eq!((skipped.fifos, skipped.sockets, skipped.devices), (1, 1, 2), "{skipped:?}");
    assert_eq!(skipped.nested_mounts, ["nested"]);
    assert!(!pair.replica().join("nested/hidden").exists());
}
